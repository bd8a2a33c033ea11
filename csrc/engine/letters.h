// What Python's re and str.casefold know about characters, as far as term rewards need it.
#pragma once

#include <cstdint>

namespace nanogpt {

// Whether Python's \w matches the character: letters, numbers and the underscore.
bool is_word_character(uint32_t code);

// The character's case folding where that is one character, else the character itself ("ß").
uint32_t folded(uint32_t code);

}  // namespace nanogpt
