#include "engine/sentences.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "engine/error.h"
#include "engine/unicode_tables.h"
#include "engine/utf8.h"

namespace nanogpt {

std::string with_commas(size_t number) {
  std::string digits = std::to_string(number);
  for (size_t at = digits.size(); at > 3;) digits.insert(at -= 3, 1, ',');
  return digits;
}

std::string formatted(const char* format, uint32_t number) {
  char buffer[16];
  std::snprintf(buffer, sizeof buffer, format, number);
  return buffer;
}

std::string python_repr(uint32_t code) {
  if (code == '\'') return "\"'\"";
  std::string out = "'";
  const auto* const change = std::upper_bound(std::begin(kPrintable), std::end(kPrintable), code);
  if (code == '\\') {
    out += "\\\\";
  } else if ((change - kPrintable) % 2 == 0) {
    append_utf8(out, code);
  } else if (code == '\t') {
    out += "\\t";
  } else if (code == '\n') {
    out += "\\n";
  } else if (code == '\r') {
    out += "\\r";
  } else {
    out += formatted(code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x", code);
  }
  return out + "'";
}

void throw_not_utf8(std::string_view text, size_t at) {
  throw InputError("the text is not UTF-8: byte " +
                   formatted("0x%02x", static_cast<uint8_t>(text[at])) + " at byte position " +
                   with_commas(at));
}

}  // namespace nanogpt
