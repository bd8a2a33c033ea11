#include "engine/text.h"

#include <algorithm>
#include <utility>

#include "engine/error.h"
#include "engine/utf8.h"

namespace nanogpt {

std::string Utf8Stream::feed(std::string_view bytes) {
  std::string out;
  size_t left;
  if (held_.empty()) {
    left = append_replaced(out, bytes, false);
  } else {
    held_ += bytes;
    left = append_replaced(out, held_, false);
    bytes = held_;
  }
  held_ = std::string(bytes.substr(bytes.size() - left));
  return out;
}

std::string Utf8Stream::flush() {
  std::string out;
  append_replaced(out, std::exchange(held_, {}), true);
  return out;
}

StopText::StopText(std::vector<std::string> stops) {
  for (std::string& text : stops) {
    if (text.empty()) continue;
    if (utf8_valid_prefix(text) != text.size()) throw UsageError("a stop text is not UTF-8");
    std::vector<size_t> border(text.size(), 0);
    for (size_t i = 1, length = 0; i < text.size(); ++i) {
      while (length > 0 && text[i] != text[length]) length = border[length - 1];
      if (text[i] == text[length]) ++length;
      border[i] = length;
    }
    stops_.push_back({std::move(text), std::move(border), 0});
  }
}

std::string StopText::feed(std::string_view text) {
  if (found_) return {};
  const size_t before = held_.size();
  held_ += text;
  size_t first = held_.size(), keep = 0;
  for (Stop& stop : stops_) {
    for (size_t i = 0; i < text.size(); ++i) {
      while (stop.matched > 0 && text[i] != stop.text[stop.matched]) {
        stop.matched = stop.border[stop.matched - 1];
      }
      if (text[i] == stop.text[stop.matched]) ++stop.matched;
      if (stop.matched == stop.text.size()) {
        found_ = true;
        first = std::min(first, before + i + 1 - stop.text.size());
        break;
      }
    }
    keep = std::max(keep, stop.matched);
  }
  const size_t ready = found_ ? first : held_.size() - keep;
  std::string out = held_.substr(0, ready);
  held_.erase(0, found_ ? held_.size() : ready);
  return out;
}

std::string StopText::flush() {
  for (Stop& stop : stops_) stop.matched = 0;
  return std::exchange(held_, {});
}

}  // namespace nanogpt
