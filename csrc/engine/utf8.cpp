#include "engine/utf8.h"

#include <cstring>

namespace nanogpt {

size_t utf8_valid_prefix(std::string_view bytes) {
  const char* const begin = bytes.data();
  const char* const end = begin + bytes.size();
  const char* at = begin;
  while (at != end) {
    // Most text is ASCII: eight bytes at a time.
    while (end - at >= 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      if ((word & 0x8080808080808080u) != 0) break;
      at += 8;
    }
    if (at == end) break;
    const Utf8Step step = utf8_step(at, end);
    if (step.kind != Utf8Step::character) break;
    at += step.length;
  }
  return static_cast<size_t>(at - begin);
}

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&out](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

size_t append_replaced(std::string& out, std::string_view bytes, bool last) {
  while (!bytes.empty()) {
    const size_t good = utf8_valid_prefix(bytes);
    out.append(bytes.substr(0, good));
    bytes.remove_prefix(good);
    if (bytes.empty()) break;
    const Utf8Step step = utf8_step(bytes.data(), bytes.data() + bytes.size());
    if (!last) {
      // CPython waits for the third byte of a surrogate too, although it is invalid already.
      const auto second = static_cast<uint8_t>(bytes.back());
      const bool surrogate =
          bytes.size() == 2 && bytes[0] == '\xED' && second >= 0xA0 && second <= 0xBF;
      if (step.kind == Utf8Step::cut || surrogate) return bytes.size();
    }
    out += kReplacement;
    bytes.remove_prefix(step.length);
  }
  return 0;
}

}  // namespace nanogpt
