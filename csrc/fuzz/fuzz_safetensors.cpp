// The header of .safetensors files and the layout that it describes.

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "engine/error.h"
#include "engine/safetensors.h"
#include "fuzz/fuzzing.h"

namespace fuzzing {

const std::vector<std::string> pieces = {
    "{",
    "}",
    "\"__metadata__\":{\"nanogpt\":\"{}\"}",
    "\"nanogpt\":\"\"",
    "\"dtype\":\"F32\"",
    "\"shape\":[1]",
    "\"shape\":[]",
    "\"data_offsets\":[0,4]",
    "[4,8]",
    "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}",
    ",",
    ":",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "-1",
    "1e3",
    "\\u0061",
    "\\ud800",
    "\xff",
};

bool accepts(const uint8_t* data, size_t size) {
  try {
    const nanogpt::Safetensors read = nanogpt::read_safetensors("input", data, size);
    const size_t begin = 8 + static_cast<size_t>(number_at(Bytes(data, data + 8), 0, 8));
    size_t sum = 0;
    for (const auto& [name, tensor] : read.tensors) {
      const auto* const bytes = static_cast<const uint8_t*>(tensor.data);
      must(bytes >= data + begin && bytes + tensor.bytes <= data + size,
           "a tensor lies outside of the file");
      size_t expected = sizeof(float);
      for (const int64_t length : tensor.shape) {
        expected *= static_cast<size_t>(length);
      }
      must(expected == tensor.bytes, "a tensor's shape does not fit its bytes");
      sum += tensor.bytes;
    }
    must(begin + sum == size, "bytes belong to no tensor or to two");
    const std::string_view header(reinterpret_cast<const char*>(data) + 8, begin - 8);
    // Of the metadata's texts nobody but who reads them looks at what is not ASCII, at numbers that
    // are too large and at halves of characters.
    if (header.find('\\') == std::string_view::npos &&
        std::all_of(header.begin(), header.end(), [](char c) { return c > 0; }) &&
        header.find_first_of("eE") == std::string_view::npos) {
      must(nlohmann::json::accept(header), "the header is not JSON");
    }
    return true;
  } catch (const nanogpt::InputError& error) {
    must(std::string_view(error.what()).find("input") != std::string_view::npos,
         "a refusal does not name the file");
    return false;
  }
}

// The length of the header, which ends at the last brace, and as many bytes as a tensor asks for.
void mend(Bytes& bytes, Random& random) {
  const auto brace = std::find(bytes.rbegin(), bytes.rend(), '}');
  if (bytes.size() < 9 || brace == bytes.rend()) {
    return;
  }
  auto end = static_cast<size_t>(bytes.rend() - brace);
  if (end < 9) {
    return;
  }
  Bytes payload(bytes.begin() + static_cast<std::ptrdiff_t>(end), bytes.end());
  bytes.resize(end);
  while (end % 4 != 0) {
    bytes.push_back(' ');
    ++end;
  }
  put(bytes, 0, 8, end - 8);
  if (random.one_in(4)) {
    payload.resize(4 * random.below(8));
  }
  bytes.insert(bytes.end(), payload.begin(), payload.end());
}

}  // namespace fuzzing
