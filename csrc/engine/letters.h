// What Python's re and str.casefold know about characters, as far as term rewards need it.
#pragma once

#include <cstdint>
#include <vector>

namespace nanogpt {

// Whether Python's \w matches the character: letters, numbers and the underscore.
bool is_word_character(uint32_t code);

// The character's case folding where that is one character, else the character itself ("ß").
uint32_t folded(uint32_t code);

// The characters whose folding is `code`; none where it is itself folded to another.
std::vector<uint32_t> unfolded(uint32_t code);

}  // namespace nanogpt
