// Parts of sentences about texts, worded as Python words them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nanogpt {

// A number as Python's format with "," writes it.
std::string with_commas(size_t number);

// A number by a printf format with one unsigned int.
std::string formatted(const char* format, uint32_t number);

// Python's repr of one character.
std::string python_repr(uint32_t code);

// Throws InputError: the text's bytes from `at` on are no character.
[[noreturn]] void throw_not_utf8(std::string_view text, size_t at);

}  // namespace nanogpt
