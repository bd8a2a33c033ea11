// JSON read from front to back without building a tree, for descriptions of megabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nanogpt {

// The callers of `object`, `array` and `string` say what becomes of the parts. Whatever is not JSON
// throws InputError, nesting deeper than `kDepth` too.
class JsonScanner {
 public:
  static constexpr int kDepth = 64;

  // `subject` begins the error's sentence, as in "the tokenizer's description".
  JsonScanner(std::string_view text, const char* subject)
      : begin_(text.data()), at_(begin_), end_(begin_ + text.size()), subject_(subject) {}

  // The first character of the next value, not consumed.
  char next() {
    skip_space();
    if (at_ == end_) damaged();
    return *at_;
  }

  // Calls on_key(key) at every value, which it has to consume.
  template <typename OnKey>
  void object(OnKey&& on_key) {
    enter('{');
    if (!leave_if('}')) {
      do {
        // A local, because the value may have keys of its own.
        const std::string key = text();
        take(':');
        on_key(key);
      } while (!last_of('}'));
    }
  }

  // Calls on_character(code point, maybe half a pair) for the characters of every key and then
  // on_value() at its value.
  template <typename OnCharacter, typename OnValue>
  void raw_object(OnCharacter&& on_character, OnValue&& on_value) {
    enter('{');
    if (!leave_if('}')) {
      do {
        string(on_character);
        take(':');
        on_value();
      } while (!last_of('}'));
    }
  }

  // Calls on_element() at every value, which it has to consume.
  template <typename OnElement>
  void array(OnElement&& on_element) {
    enter('[');
    if (!leave_if(']')) {
      do {
        on_element();
      } while (!last_of(']'));
    }
  }

  // Calls on_character with every code point; half of a surrogate pair may be among them.
  template <typename OnCharacter>
  void string(OnCharacter&& on_character) {
    take('"');
    // A local place, because what on_character writes could be the member's bytes to the compiler.
    const char* at = at_;
    for (;;) {
      const auto byte = static_cast<uint8_t>(at != end_ ? *at : 0);
      if (byte >= 0x20 && byte < 0x80 && byte != '"' && byte != '\\') {
        ++at;
        on_character(byte);
        continue;
      }
      at_ = at;
      if (byte < 0x20) damaged();
      if (byte == '"') break;
      const uint32_t code = byte == '\\' ? escape() : character();
      at = at_;
      on_character(code);
    }
    ++at_;
  }

  // A string as UTF-8; half a pair in it counts as damage.
  std::string text();
  // A whole number of 0 … 2^31 - 1.
  int32_t count();
  // true or false.
  bool flag() {
    if (literal("true")) return true;
    if (!literal("false")) damaged();
    return false;
  }
  // Consumes `literal` (null, true, false) if it comes next.
  bool literal(std::string_view literal);
  // Any value.
  void skip();
  // Nothing but space may follow.
  void finish();

  // Bytes to come.
  size_t left() const { return static_cast<size_t>(end_ - at_); }
  // A place to come back to with `seek`.
  const char* tell() const { return at_; }
  void seek(const char* at) { at_ = at; }

  [[noreturn]] void damaged() const;

 private:
  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  void take(char wanted) {
    if (next() != wanted) damaged();
    ++at_;
  }
  void enter(char bracket) {
    take(bracket);
    if (++depth_ > kDepth) damaged();
  }
  bool leave_if(char bracket) {
    if (next() != bracket) return false;
    ++at_;
    --depth_;
    return true;
  }
  bool last_of(char bracket) {
    if (leave_if(bracket)) return true;
    take(',');
    return false;
  }
  uint32_t escape();
  uint32_t four_hex_digits();
  uint32_t character();
  void skip_number();

  const char* begin_;
  const char* at_;
  const char* end_;
  const char* subject_;
  int depth_ = 0;
};

}  // namespace nanogpt
