#include "engine/json_text.h"

#include <array>
#include <cstdint>
#include <set>

#include "engine/damage.h"
#include "engine/error.h"

namespace nanogpt {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

int hex_value(char c) {
  return is_digit(c)              ? c - '0'
         : (c >= 'a' && c <= 'f') ? c - 'a' + 10
         : (c >= 'A' && c <= 'F') ? c - 'A' + 10
                                  : -1;
}

// Bytes that stand for themselves inside a string.
constexpr std::array<bool, 256> plain_bytes() {
  std::array<bool, 256> plain{};
  for (size_t byte = 0x20; byte < plain.size(); ++byte) {
    plain[byte] = byte != '"' && byte != '\\';
  }
  return plain;
}

constexpr auto plain = plain_bytes();

class Scanner {
 public:
  Scanner(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  std::vector<JsonMember> members() {
    std::vector<JsonMember> members;
    std::set<std::string_view> names;
    space();
    expect('{');
    space();
    if (!take('}')) {
      do {
        space();
        const std::string_view quoted = string();
        const std::string_view name = quoted.substr(1, quoted.size() - 2);
        if (!names.insert(name).second) {
          throw InputError(where_ + " names " + shown(name) + " twice");
        }
        space();
        expect(':');
        space();
        const size_t begin = at_;
        value();
        members.push_back({name, text_.substr(begin, at_ - begin)});
        space();
      } while (take(','));
      expect('}');
    }
    space();
    if (at_ != text_.size()) {
      fail();
    }
    return members;
  }

 private:
  [[noreturn]] void fail() const {
    throw InputError(where_ + " is not JSON at its byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    const bool found = at_ < text_.size() && text_[at_] == c;
    at_ += found ? 1 : 0;
    return found;
  }

  void expect(char c) {
    if (!take(c)) {
      fail();
    }
  }

  void space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
      ++at_;
    }
  }

  std::string_view string() {
    const size_t begin = at_;
    expect('"');
    while (true) {
      while (at_ < text_.size() && plain[static_cast<unsigned char>(text_[at_])]) {
        ++at_;
      }
      if (take('"')) {
        return text_.substr(begin, at_ - begin);
      }
      expect('\\');
      escape();
    }
  }

  void escape() {
    const char c = peek();
    if (c == 'u') {
      for (size_t i = 1; i <= 4; ++i) {
        if (at_ + i >= text_.size() || hex_value(text_[at_ + i]) < 0) {
          fail();
        }
      }
      at_ += 5;
    } else if (c != '\0' && std::string_view("\"\\/bfnrt").find(c) != std::string_view::npos) {
      ++at_;
    } else {
      fail();
    }
  }

  void digits() {
    if (!is_digit(peek())) {
      fail();
    }
    while (is_digit(peek())) {
      ++at_;
    }
  }

  void number() {
    take('-');
    if (!take('0')) {
      digits();
    }
    if (take('.')) {
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (!take('+')) {
        take('-');
      }
      digits();
    }
  }

  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) {
      fail();
    }
    at_ += expected.size();
  }

  // One value. What is open around the current place is a stack of one bit each: object or array.
  void value() {
    std::array<bool, deepest_json> in_object{};
    int depth = 0;
    while (true) {
      const char c = peek();
      if (c == '{' || c == '[') {
        // The outermost object, whose members are being listed, counts too.
        if (depth == deepest_json - 1) {
          throw InputError(where_ + " is nested deeper than " + std::to_string(deepest_json) +
                           " levels");
        }
        ++at_;
        const bool object = c == '{';
        in_object[static_cast<size_t>(depth++)] = object;
        space();
        if (peek() != (object ? '}' : ']')) {
          if (object) {
            name();
          }
          continue;
        }
      } else if (c == '"') {
        string();
      } else if (c == 't') {
        word("true");
      } else if (c == 'f') {
        word("false");
      } else if (c == 'n') {
        word("null");
      } else {
        number();
      }
      // A value has ended, or an empty list is about to end: close all that end here.
      while (true) {
        if (depth == 0) {
          return;
        }
        space();
        const bool object = in_object[static_cast<size_t>(depth - 1)];
        if (take(object ? '}' : ']')) {
          --depth;
          continue;
        }
        expect(',');
        space();
        if (object) {
          name();
        }
        break;
      }
    }
  }

  void name() {
    string();
    space();
    expect(':');
    space();
  }

  const std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
};

void append_utf8(std::string& text, uint32_t code) {
  const auto byte = [&](uint32_t value) { text += static_cast<char>(value); };
  if (code < 0x80) {
    byte(code);
  } else if (code < 0x800) {
    byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
  } else {
    byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F));
    byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
  }
}

// The four hexadecimal digits after \u at `at`, or -1.
int64_t code_unit(std::string_view text, size_t at) {
  if (at > text.size() || text.size() - at < 6 || text[at] != '\\' || text[at + 1] != 'u') {
    return -1;
  }
  int64_t value = 0;
  for (size_t i = 2; i < 6; ++i) {
    const int digit = hex_value(text[at + i]);
    if (digit < 0) {
      return -1;
    }
    value = value * 16 + digit;
  }
  return value;
}

}  // namespace

std::vector<JsonMember> json_members(std::string_view text, const std::string& where) {
  return Scanner(text, where).members();
}

const JsonMember* find_member(const std::vector<JsonMember>& members, std::string_view name) {
  for (const JsonMember& member : members) {
    if (member.name == name) {
      return &member;
    }
  }
  return nullptr;
}

std::string json_unescaped(std::string_view text, const std::string& where) {
  if (text.size() < 2 || text.front() != '"' || text.back() != '"') {
    throw InputError(where + " is not a text");
  }
  text = text.substr(1, text.size() - 2);
  std::string result;
  result.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const size_t plain = text.substr(i).find('\\');
    if (plain == std::string_view::npos) {
      result += text.substr(i);
      break;
    }
    result += text.substr(i, plain);
    i += plain;
    static constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const size_t which = i + 1 < text.size() ? letters.find(text[i + 1]) : std::string_view::npos;
    if (which != std::string_view::npos) {
      result += meanings[which];
      i += 2;
      continue;
    }
    int64_t code = code_unit(text, i);
    i += 6;
    if (code >= 0xD800 && code < 0xDC00) {
      const int64_t low = code_unit(text, i);
      code =
          low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : -1;
      i += 6;
    } else if (code >= 0xDC00 && code < 0xE000) {
      code = -1;
    }
    if (code < 0) {
      throw InputError(where + " holds an escape that stands for no character");
    }
    append_utf8(result, static_cast<uint32_t>(code));
  }
  return result;
}

}  // namespace nanogpt
