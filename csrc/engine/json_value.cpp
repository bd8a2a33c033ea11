#include "engine/json_value.h"

#include <algorithm>
#include <limits>
#include <set>
#include <vector>

#include "engine/damage.h"
#include "engine/error.h"

namespace nanogpt {

using nlohmann::json;

namespace {

int64_t whole(const json& value, const std::string& what) {
  // The parser makes a number signed or floating where it does not fit 64 bits without a sign.
  if (!value.is_number_unsigned() ||
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    throw InputError(what + " is not a whole number in range");
  }
  return static_cast<int64_t>(value.get<uint64_t>());
}

}  // namespace

json json_value(std::string_view text, size_t most_bytes, const std::string& where) {
  if (text.size() > most_bytes) {
    throw InputError(where + " has " + std::to_string(text.size()) + " bytes, too many to be ours");
  }
  std::vector<std::set<std::string>> open;
  const auto refuse_doubles = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) {
      open.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      open.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      if (!open.back().insert(name).second) {
        throw InputError(where + " names " + shown(name) + " twice");
      }
    }
    return true;
  };
  try {
    return json::parse(text, refuse_doubles);
  } catch (const json::exception&) {
    throw InputError(where + " is not JSON");
  }
}

const json& member_of(const json& object, const char* name, const std::string& where) {
  if (!object.is_object()) {
    throw InputError(where + " is not an object");
  }
  const auto found = object.find(name);
  if (found == object.end()) {
    throw InputError(where + " lacks " + shown(name));
  }
  return *found;
}

std::string text_in(const json& object, const char* name, const std::string& where) {
  const json& value = member_of(object, name, where);
  if (!value.is_string()) {
    throw InputError(where + " has a " + shown(name) + " that is not a text");
  }
  return value.get<std::string>();
}

bool truth_in(const json& object, const char* name, const std::string& where) {
  const json& value = member_of(object, name, where);
  if (!value.is_boolean()) {
    throw InputError(where + " has a " + shown(name) + " that is neither true nor false");
  }
  return value.get<bool>();
}

const json& object_in(const json& object, const char* name, const std::string& where) {
  const json& value = member_of(object, name, where);
  if (!value.is_object()) {
    throw InputError(where + " has a " + shown(name) + " that is not an object");
  }
  return value;
}

int64_t whole_in(const json& object, const char* name, const std::string& where) {
  return whole(member_of(object, name, where), where + " has a " + shown(name) + " that");
}

std::vector<int64_t> shape_in(const json& object, const std::string& where) {
  constexpr size_t most = 8;
  const json& value = member_of(object, "shape", where);
  if (!value.is_array() || value.size() > most) {
    throw InputError(where + " has a 'shape' that is not a list of sizes");
  }
  std::vector<int64_t> shape;
  for (const json& size : value) {
    shape.push_back(whole(size, where + " has a size in its 'shape' that"));
  }
  return shape;
}

void check_names(const json& object, std::initializer_list<std::string_view> known,
                 const std::string& where) {
  for (const auto& item : object.items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      throw InputError(where + " has an unknown member " + shown(item.key()));
    }
  }
}

}  // namespace nanogpt
