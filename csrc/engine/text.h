// Text that grows byte by byte: whole characters only, and stop texts.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace nanogpt {

// Python's incremental UTF-8 decoder with errors="replace": gives complete characters, holds back
// an unfinished one, replaces invalid bytes by U+FFFD exactly as CPython does.
class Utf8Stream {
 public:
  std::string feed(std::string_view bytes);
  std::string flush();

 private:
  std::string held_;
};

// nanogpt/decoding.py's StopText: gives what is certain not to be part of a stop text; `found`
// turns true once one has appeared, and nothing from its beginning on is given out.
class StopText {
 public:
  explicit StopText(std::vector<std::string> stops);
  std::string feed(std::string_view text);
  std::string flush();
  bool found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool found_ = false;
};

}  // namespace nanogpt
