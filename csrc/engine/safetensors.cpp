#include "engine/safetensors.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "engine/damage.h"
#include "engine/error.h"
#include "engine/json_text.h"
#include "engine/json_value.h"

namespace nanogpt {

namespace {

constexpr size_t length_bytes = 8;
constexpr size_t most_header_bytes = 100'000'000;      // the format's own limit
constexpr size_t most_index_bytes = size_t{16} << 20;  // the header without the metadata
constexpr char metadata_name[] = "__metadata__";

struct Extent {
  size_t begin, end;
  std::string name;
};

}  // namespace

Safetensors read_safetensors(const std::string& file, const uint8_t* data, size_t size) {
  uint64_t header_bytes = 0;
  for (size_t i = std::min(size, length_bytes); i-- > 0;) {
    header_bytes = header_bytes << 8 | data[i];
  }
  if (size < length_bytes || header_bytes > size - length_bytes ||
      header_bytes > most_header_bytes) {
    damaged(file, "its header is cut short or of an impossible length");
  }
  const std::string_view header(reinterpret_cast<const char*>(data) + length_bytes,
                                static_cast<size_t>(header_bytes));
  const uint8_t* const payload = data + length_bytes + header.size();
  const size_t payload_bytes = size - length_bytes - header.size();
  const std::string where = file + " is damaged: its header";

  const std::vector<JsonMember> members = json_members(header, where);
  const JsonMember* const metadata = find_member(members, metadata_name);
  const JsonMember* ours = nullptr;
  std::vector<JsonMember> texts;
  if (metadata != nullptr) {
    texts = json_members(metadata->value, where + "'s metadata");
    ours = find_member(texts, "nanogpt");
  }
  if (ours == nullptr) {
    throw InputError(file + " is not a model file of nanogpt: it has no configuration");
  }
  Safetensors result;
  result.metadata = json_unescaped(ours->value, where + "'s metadata");

  std::string index(header.substr(0, static_cast<size_t>(metadata->value.data() - header.data())));
  index += "null";
  index += header.substr(static_cast<size_t>(metadata->value.data() - header.data()) +
                         metadata->value.size());
  std::vector<Extent> extents;
  const nlohmann::json entries = json_value(index, most_index_bytes, where);
  for (const auto& item : entries.items()) {
    if (item.key() == metadata_name) {
      continue;
    }
    const nlohmann::json& entry = item.value();
    const std::string called = where + "'s entry of the tensor " + shown(item.key());
    const std::string dtype = text_in(entry, "dtype", called);
    check_names(entry, {"dtype", "shape", "data_offsets"}, called);
    if (dtype != "F32") {
      throw InputError("the tensor " + shown(item.key()) + " of " + file + " is " + shown(dtype) +
                       ", but a .safetensors model file holds F32");
    }
    const nlohmann::json& offsets = member_of(entry, "data_offsets", called);
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      throw InputError(called + " has no two offsets");
    }
    const auto begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    if (begin >= end || end > payload_bytes) {
      throw InputError(called + " points outside of the file");
    }
    Tensor tensor;
    tensor.dtype = DType::f32;
    tensor.shape = shape_in(entry, called);
    tensor.data = payload + begin;
    tensor.bytes = static_cast<size_t>(end - begin);
    uint64_t left = tensor.bytes;
    bool fits = left % sizeof(float) == 0;
    left /= sizeof(float);
    for (const int64_t length : tensor.shape) {
      fits = fits && length > 0 && left % static_cast<uint64_t>(length) == 0;
      left /= fits ? static_cast<uint64_t>(length) : 1;
    }
    if (!fits || left != 1) {
      throw InputError(called + " has a shape that does not fit its bytes");
    }
    extents.push_back({static_cast<size_t>(begin), static_cast<size_t>(end), item.key()});
    result.tensors.emplace(item.key(), std::move(tensor));
  }

  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  size_t next = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != next) {
      damaged(file, "the tensor " + shown(extent.name) + " overlaps another or leaves a gap");
    }
    next = extent.end;
  }
  if (next != payload_bytes) {
    damaged(file,
            "it has " + std::to_string(payload_bytes - next) + " bytes that belong to no tensor");
  }
  if ((length_bytes + header.size()) % alignof(float) != 0) {
    throw InputError(file + " is not a model file of nanogpt: its tensors are not aligned");
  }
  return result;
}

}  // namespace nanogpt
