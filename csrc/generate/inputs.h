// What the user hands over beside the flags: the prompt and the terms of a reward.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace nanogpt {

// Offset of the first byte that is not UTF-8, where CPython's strict decoder would stop.
std::optional<size_t> first_bad_byte(std::string_view text);

// The text on one line and safe for a terminal: control characters and bytes that are not UTF-8
// are written \n, \t or \xNN.
std::string visible(std::string_view text);

// A whole file, or standard input for "-". Throws InputError naming `what` where it cannot be read.
std::string read_file(const std::string& path, const std::string& what);

// As read_file, for UTF-8 text. Throws InputError with the offset of a bad byte.
std::string read_text(const std::string& path, const std::string& what);

// The terms of --reward-terms: the lines of a file of that name, or what stands between commas.
// Throws InputError where there is none.
std::vector<std::string> read_terms(const std::string& value);

}  // namespace nanogpt
