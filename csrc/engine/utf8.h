// UTF-8, one character at a time, with CPython's view of what is invalid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nanogpt {

// What stands at the start of some bytes.
struct Utf8Step {
  enum Kind : uint8_t {
    character,  // `code` in `length` bytes
    invalid,    // `length` bytes that one U+FFFD stands for
    cut,        // `length` bytes, all that are left, that a character could begin with
  };
  Kind kind;
  uint8_t length;
  uint32_t code;
};

// `at` < `end`.
inline Utf8Step utf8_step(const char* at, const char* end) {
  const auto byte = [at](int i) { return static_cast<uint8_t>(at[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Step::character, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Step::invalid, 1, 0};
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range keeps out overlong forms, surrogates and what is above U+10FFFF.
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  uint32_t code = lead & (0xFFu >> (length + 1));
  for (int i = 1; i < length; ++i) {
    if (end - at <= i) return {Utf8Step::cut, static_cast<uint8_t>(i), 0};
    const uint8_t next = byte(i);
    if (next < (i == 1 ? low : 0x80) || next > (i == 1 ? high : 0xBF)) {
      return {Utf8Step::invalid, static_cast<uint8_t>(i), 0};
    }
    code = code << 6 | (next & 0x3Fu);
  }
  return {Utf8Step::character, static_cast<uint8_t>(length), code};
}

// The character at the start of valid UTF-8; `length` receives its bytes.
inline uint32_t utf8_valid_step(const char* at, int& length) {
  const auto byte = [at](int i) { return static_cast<uint8_t>(at[i]); };
  const uint32_t lead = byte(0);
  if (lead < 0x80) {
    length = 1;
    return lead;
  }
  if (lead < 0xE0) {
    length = 2;
    return (lead & 0x1F) << 6 | (byte(1) & 0x3Fu);
  }
  if (lead < 0xF0) {
    length = 3;
    return (lead & 0x0F) << 12 | (byte(1) & 0x3Fu) << 6 | (byte(2) & 0x3Fu);
  }
  length = 4;
  return (lead & 0x07) << 18 | (byte(1) & 0x3Fu) << 12 | (byte(2) & 0x3Fu) << 6 | (byte(3) & 0x3Fu);
}

// Bytes from the start that are whole, valid characters.
size_t utf8_valid_prefix(std::string_view bytes);

// Appends a code point, which is not half of a character.
void append_utf8(std::string& out, uint32_t code);

// Appends `bytes` with U+FFFD for what is invalid. With `last` that is all of them; otherwise bytes
// at the end that more could follow are left out. Returns how many are.
size_t append_replaced(std::string& out, std::string_view bytes, bool last);

inline constexpr char kReplacement[] = "\xEF\xBF\xBD";

}  // namespace nanogpt
