// The two halves of every sentence about a damaged file: which file, and what is wrong with it.
#pragma once

#include <string>
#include <string_view>

namespace nanogpt {

// Throws InputError: "FILE is damaged: WHAT".
[[noreturn]] void damaged(const std::string& file, const std::string& what);

// Bytes from a file for a sentence: in quotes, unprintable ones as \xNN, at most 100 of them.
std::string shown(std::string_view bytes);

}  // namespace nanogpt
