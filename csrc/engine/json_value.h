// JSON from a file as values whose types and ranges are checked where they are read.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace nanogpt {

// Text that json_members has accepted, as a value. Throws InputError beginning with `where` where
// it has more than `most_bytes`, is not JSON after all or names a member of an object twice.
nlohmann::json json_value(std::string_view text, size_t most_bytes, const std::string& where);

// A member of an object. All of them throw InputError that names it where it is missing or of
// another type.
const nlohmann::json& member_of(const nlohmann::json& object, const char* name,
                                const std::string& where);
std::string text_in(const nlohmann::json& object, const char* name, const std::string& where);
bool truth_in(const nlohmann::json& object, const char* name, const std::string& where);
const nlohmann::json& object_in(const nlohmann::json& object, const char* name,
                                const std::string& where);
// A whole number from 0 to 2^63 - 1.
int64_t whole_in(const nlohmann::json& object, const char* name, const std::string& where);
// A list of at most eight of them: the sizes of a tensor.
std::vector<int64_t> shape_in(const nlohmann::json& object, const std::string& where);

// Refuses members that are not among `known`: what is not understood could change the meaning.
void check_names(const nlohmann::json& object, std::initializer_list<std::string_view> known,
                 const std::string& where);

}  // namespace nanogpt
