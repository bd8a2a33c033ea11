// JSON of metadata and descriptions: the three readers of the engine agree with one another and
// with nlohmann::json on what is JSON, and on what it means.

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "engine/error.h"
#include "engine/json_scanner.h"
#include "engine/json_text.h"
#include "engine/json_value.h"
#include "engine/utf8.h"
#include "fuzz/fuzzing.h"

namespace fuzzing {

using nlohmann::json;

const std::vector<std::string> pieces = {
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "\\",
    "null",
    "true",
    "false",
    "-",
    "0",
    "1e99",
    "1e999",
    "0.5",
    "-0",
    "E+1",
    "\\n",
    "\\u0000",
    "\\ud83d",
    "\\ude42",
    "\\u00e9",
    "\"a\":",
    "\xff",
    "\xc3",
    "\xe2\x82\xac",
    "\xf0\x9f\x99\x82",
    "\xed\xa0\x80",
    "\xef\xbb\xbf",
    " ",
    "\n",
    "\"\"",
    "{\"a\":1}",
    "[[[[[[[[",
    "]]]]]]]]",
    "18446744073709551616",
};

namespace {

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// What nlohmann::json makes of a text. Throwing is slow: why it refuses one is asked for when
// needed.
struct Peer {
  std::string_view text;
  json value;
  bool good;

  explicit Peer(std::string_view given)
      : text(given), value(json::parse(given, nullptr, false)), good(!value.is_discarded()) {}

  // It refuses what is grammar to us: halves of characters, and numbers that no double holds. Only
  // it and the scanner look at what is not ASCII.
  bool by_grammar() const {
    if (good) {
      return false;
    }
    try {
      return json::parse(text).is_discarded();
    } catch (const json::exception& error) {
      const std::string_view why = error.what();
      return !contains(why, "surrogate") && !contains(why, "out_of_range.406") &&
             !contains(why, "UTF-8");
    }
  }
};

bool scans(std::string_view text) {
  nanogpt::JsonScanner scanner(text, "input");
  try {
    scanner.skip();
    scanner.finish();
    return true;
  } catch (const nanogpt::InputError&) {
    return false;
  }
}

void check_text(std::string_view text, const Peer& whole, const nanogpt::JsonMember& member) {
  must(member.value.data() >= text.data() &&
           member.value.data() + member.value.size() <= text.data() + text.size(),
       "a member lies outside of the text");
  if (!whole.good || member.value.front() != '"') {
    return;
  }
  const std::string meant = nanogpt::json_unescaped(member.value, "input");
  must(meant == json::parse(member.value).get<std::string>(), "a text means something else");
  nanogpt::JsonScanner scanner(member.value, "input");
  must(scanner.text() == meant, "the scanner reads another text");
}

}  // namespace

bool accepts(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  // nlohmann::json skips a byte order mark and takes a zero byte for the end.
  const bool plain =
      !contains(text, std::string_view("\0", 1)) && text.substr(0, 3) != "\xef\xbb\xbf";
  const bool utf8 = nanogpt::utf8_valid_prefix(text) == text.size();
  const Peer peer(text);
  const bool scanned = scans(text);
  if (scanned) {
    must(utf8, "the scanner takes what is not UTF-8");
    must(!peer.by_grammar(), "the scanner takes what is not JSON");
  }
  try {
    const std::vector<nanogpt::JsonMember> members = nanogpt::json_members(text, "input");
    must(!peer.by_grammar(), "json_members takes what is not JSON");
    must(scanned == utf8, "the scanner and json_members do not agree");
    for (const nanogpt::JsonMember& member : members) {
      must(nanogpt::find_member(members, member.name) == &member, "a member is not found");
      check_text(text, peer, member);
    }
  } catch (const nanogpt::InputError& error) {
    const std::string_view why = error.what();
    const bool limit = contains(why, "deeper") || contains(why, "twice");
    must(limit || !plain || !peer.good || !peer.value.is_object(),
         "json_members refuses an object that is JSON");
    must(limit || !scanned || text[text.find_first_not_of(" \t\r\n")] != '{',
         "json_members refuses an object that the scanner takes");
    return false;
  }
  try {
    const json value = nanogpt::json_value(text, 1 << 20, "input");
    must(peer.good && value == peer.value, "json_value reads something else");
  } catch (const nanogpt::InputError& error) {
    must(!peer.good || contains(error.what(), "twice"), "json_value refuses what is JSON");
    return false;
  }
  return true;
}

void mend(Bytes& bytes, Random&) {
  // Brackets that are open are closed in their order.
  std::string open;
  bool quoted = false;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const auto byte = static_cast<char>(bytes[i]);
    if (quoted) {
      i += byte == '\\' ? 1 : 0;
      quoted = byte != '"';
    } else if (byte == '"') {
      quoted = true;
    } else if (byte == '{' || byte == '[') {
      open += byte == '{' ? '}' : ']';
    } else if (!open.empty() && byte == open.back()) {
      open.pop_back();
    }
  }
  if (quoted) {
    bytes.push_back('"');
  }
  bytes.insert(bytes.end(), open.rbegin(), open.rend());
}

}  // namespace fuzzing
