// JSON as text: checked and cut into members without making values of it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace nanogpt {

// Objects and arrays inside one another, at most.
constexpr int deepest_json = 64;

struct JsonMember {
  std::string_view name;   // as it stands between the quotes, escapes and all
  std::string_view value;  // its text, without white space around it
};

// The members of a JSON object, in their order; the whole text is checked against the grammar.
// Nothing is allocated but the list, and nothing recurses, so that millions of bytes of vocabulary
// cost milliseconds and hostile text costs no more. Bytes above 0x7f inside strings are not looked
// at. Throws InputError beginning with `where` for anything else than one object, for depth, and
// for two members of one name.
std::vector<JsonMember> json_members(std::string_view text, const std::string& where);

// The member's value, or null.
const JsonMember* find_member(const std::vector<JsonMember>& members, std::string_view name);

// The string that a JSON string's text (with its quotes) stands for, in UTF-8.
std::string json_unescaped(std::string_view text, const std::string& where);

}  // namespace nanogpt
