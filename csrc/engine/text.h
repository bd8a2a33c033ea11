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
  // Throws UsageError for a stop text that is not UTF-8: it could end inside a character.
  explicit StopText(std::vector<std::string> stops);
  // `text` is UTF-8 of whole characters. Takes time in proportion to it.
  std::string feed(std::string_view text);
  std::string flush();
  bool found() const { return found_; }

 private:
  // One stop text, followed as in the algorithm of Knuth, Morris and Pratt.
  struct Stop {
    std::string text;
    std::vector<size_t> border;  // of every beginning, the longest end of it that begins it too
    size_t matched = 0;          // bytes of it that what was fed ends with
  };
  std::vector<Stop> stops_;
  std::string held_;
  bool found_ = false;
};

}  // namespace nanogpt
