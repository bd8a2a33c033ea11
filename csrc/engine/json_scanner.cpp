#include "engine/json_scanner.h"

#include <array>

#include "engine/error.h"
#include "engine/utf8.h"

namespace nanogpt {
namespace {

constexpr std::array<int8_t, 256> hex_digits() {
  std::array<int8_t, 256> digits{};
  for (size_t i = 0; i < 256; ++i) digits[i] = -1;
  for (int8_t i = 0; i < 10; ++i) digits[static_cast<size_t>('0' + i)] = i;
  for (int8_t i = 0; i < 6; ++i) {
    digits[static_cast<size_t>('a' + i)] = digits[static_cast<size_t>('A' + i)] = 10 + i;
  }
  return digits;
}
constexpr std::array<int8_t, 256> kHexDigits = hex_digits();

}  // namespace

void JsonScanner::damaged() const {
  throw InputError(std::string(subject_) + " is damaged: it is not JSON from byte " +
                   std::to_string(at_ - begin_) + " on");
}

std::string JsonScanner::text() {
  std::string out;
  string([&](uint32_t code) {
    if (code >= 0xD800 && code < 0xE000) damaged();
    append_utf8(out, code);
  });
  return out;
}

int32_t JsonScanner::count() {
  next();
  int64_t value = 0;
  const char* const first = at_;
  while (at_ != end_ && *at_ >= '0' && *at_ <= '9') {
    value = value * 10 + (*at_++ - '0');
    if (value > INT32_MAX) damaged();
  }
  const bool leading_zero = *first == '0' && at_ - first > 1;
  const bool goes_on = at_ != end_ && (*at_ == '.' || *at_ == 'e' || *at_ == 'E');
  if (at_ == first || leading_zero || goes_on) damaged();
  return static_cast<int32_t>(value);
}

bool JsonScanner::literal(std::string_view literal) {
  next();
  if (std::string_view(at_, static_cast<size_t>(end_ - at_)).substr(0, literal.size()) != literal) {
    return false;
  }
  at_ += literal.size();
  return true;
}

void JsonScanner::skip() {
  const auto ignore = [](uint32_t) {};
  switch (next()) {
    case '{':
      raw_object(ignore, [this] { skip(); });
      break;
    case '[':
      array([this] { skip(); });
      break;
    case '"':
      string(ignore);
      break;
    default:
      if (!literal("null") && !literal("true") && !literal("false")) skip_number();
  }
}

void JsonScanner::finish() {
  skip_space();
  if (at_ != end_) damaged();
}

uint32_t JsonScanner::escape() {
  ++at_;
  if (at_ == end_) damaged();
  switch (*at_++) {
    case '"':
      return '"';
    case '\\':
      return '\\';
    case '/':
      return '/';
    case 'b':
      return '\b';
    case 'f':
      return '\f';
    case 'n':
      return '\n';
    case 'r':
      return '\r';
    case 't':
      return '\t';
    case 'u':
      break;
    default:
      damaged();
  }
  const uint32_t code = four_hex_digits();
  if (code < 0xD800 || code >= 0xDC00) return code;
  // The first half of a pair: with a second one after it they are one character.
  if (end_ - at_ < 6 || at_[0] != '\\' || at_[1] != 'u') return code;
  const char* const after = at_;
  at_ += 2;
  const uint32_t second = four_hex_digits();
  if (second >= 0xDC00 && second < 0xE000) {
    return 0x10000 + ((code - 0xD800) << 10) + (second - 0xDC00);
  }
  at_ = after;
  return code;
}

uint32_t JsonScanner::four_hex_digits() {
  if (end_ - at_ < 4) damaged();
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const int8_t digit = kHexDigits[static_cast<uint8_t>(*at_)];
    if (digit < 0) damaged();
    value = value << 4 | static_cast<uint32_t>(digit);
    ++at_;
  }
  return value;
}

uint32_t JsonScanner::character() {
  const Utf8Step step = utf8_step(at_, end_);
  if (step.kind != Utf8Step::character) damaged();
  at_ += step.length;
  return step.code;
}

void JsonScanner::skip_number() {
  const auto digits = [this] {
    const char* const first = at_;
    while (at_ != end_ && *at_ >= '0' && *at_ <= '9') ++at_;
    if (at_ == first) damaged();
  };
  const auto comes = [this](char wanted) {
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  };
  comes('-');
  if (!comes('0')) digits();
  if (comes('.')) digits();
  if (comes('e') || comes('E')) {
    if (!comes('+')) comes('-');
    digits();
  }
}

}  // namespace nanogpt
