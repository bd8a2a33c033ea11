#include "engine/model_file.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/archive.h"
#include "engine/crc32.h"
#include "engine/damage.h"
#include "engine/error.h"
#include "engine/json_text.h"
#include "engine/json_value.h"
#include "engine/mapped_file.h"
#include "engine/safetensors.h"
#include "engine/sha256.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors in model files are little-endian and used where they lie"
#endif

namespace nanogpt {

namespace {

using nlohmann::json;

constexpr char index_name[] = "extra/nanogpt.json";
constexpr char archive_format[] = "nanogpt-torchscript-1";
constexpr char safetensors_format[] = "nanogpt-1";
constexpr std::string_view comment_label = "nanogpt-crc32:";
constexpr size_t most_json_bytes = size_t{256} << 20;        // as nanogpt/metadata.py
constexpr size_t most_description_bytes = size_t{16} << 20;  // without the tokenizer
constexpr size_t alignment = 64;
// Large enough that a piece costs more than handing it out, small enough to share evenly.
constexpr size_t piece_bytes = size_t{2} << 20;

// A tensor's bytes in an archive and what their check sum has to be.
struct Payload {
  std::string name, record;
  size_t offset = 0, size = 0;
  uint32_t sum = 0;
};

// Exactly eight lower-case hexadecimal digits.
std::optional<uint32_t> sum_in(std::string_view digits) {
  if (digits.size() != 8) {
    return std::nullopt;
  }
  uint32_t value = 0;
  for (const char digit : digits) {
    const size_t place = std::string_view("0123456789abcdef").find(digit);
    if (place == std::string_view::npos) {
      return std::nullopt;
    }
    value = value << 4 | static_cast<uint32_t>(place);
  }
  return value;
}

// What both kinds of file say about the model, apart from its tensors.
struct Description {
  json value;  // with null in the tokenizer's place
  std::string tokenizer;
  std::vector<JsonMember> members;
};

Description read_description(std::string_view text, const std::string& where) {
  if (text.size() > most_json_bytes) {
    throw InputError(where + " has " + std::to_string(text.size()) + " bytes, too many to be ours");
  }
  Description description;
  description.members = json_members(text, where);
  const JsonMember* const tokenizer = find_member(description.members, "tokenizer");
  if (tokenizer == nullptr) {
    throw InputError(where + " lacks 'tokenizer'");
  }
  if (tokenizer->value != "null") {
    if (tokenizer->value.front() != '{') {
      throw InputError(where + " has a 'tokenizer' that is not an object");
    }
    description.tokenizer = std::string(tokenizer->value);
  }
  const auto begin = static_cast<size_t>(tokenizer->value.data() - text.data());
  std::string rest(text.substr(0, begin));
  rest += "null";
  rest += text.substr(begin + tokenizer->value.size());
  description.value = json_value(rest, most_description_bytes, where);
  return description;
}

Config read_config(const json& description, const std::string& where) {
  const json& fields = object_in(description, "config", where);
  const std::string called = where + "'s configuration";
  check_names(fields,
              {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias",
               "rotary", "qk_norm"},
              called);
  Config config;
  config.vocab_size = whole_in(fields, "vocab_size", called);
  config.block_size = whole_in(fields, "block_size", called);
  config.n_layer = whole_in(fields, "n_layer", called);
  config.n_head = whole_in(fields, "n_head", called);
  config.n_embd = whole_in(fields, "n_embd", called);
  config.bias = truth_in(fields, "bias", called);
  // Files of plain models, and all of earlier versions, have neither.
  config.rotary = fields.contains("rotary") && truth_in(fields, "rotary", called);
  config.qk_norm = fields.contains("qk_norm") && truth_in(fields, "qk_norm", called);
  const json& dropout = member_of(fields, "dropout", called);
  if (!dropout.is_number() || !(dropout.get<double>() >= 0.0 && dropout.get<double>() < 1.0)) {
    throw InputError(called + " has a 'dropout' that is not at least 0 and below 1");
  }
  return config;
}

std::optional<double> read_temperature(const json& description, const std::string& where) {
  const json& value = member_of(description, "calibration_temperature", where);
  if (value.is_null()) {
    return std::nullopt;
  }
  if (!value.is_number() || !std::isfinite(value.get<double>()) || !(value.get<double>() > 0.0)) {
    throw InputError(where + " has a 'calibration_temperature' that is not a positive number");
  }
  return value.get<double>();
}

// Refuses a tensor whose precision is not what the file says that it was written in.
void check_precision(const std::string& name, const Tensor& tensor, const std::string& quantization,
                     const std::string& file) {
  const bool matrix = tensor.shape.size() == 2;
  const bool positions = name == "transformer.wpe.weight";
  DType expected = DType::f32;
  if (matrix && quantization == "bf16") {
    expected = DType::bf16;
  } else if (matrix && quantization == "int8" && !positions) {
    expected = DType::i8;
  }
  if (tensor.dtype != expected) {
    damaged(file, "its tensor " + shown(name) + " is " + name_of(tensor.dtype) + " instead of " +
                      name_of(expected) + ", which " + shown(quantization) + " asks for");
  }
}

// The bytes that `shape` and `dtype` take, or nothing where that is more than `most`.
std::optional<size_t> size_of(const std::vector<int64_t>& shape, DType dtype, size_t most) {
  size_t size = bytes_of(dtype);
  for (const int64_t length : shape) {
    if (length < 1 || static_cast<uint64_t>(length) > most / size) {
      return std::nullopt;
    }
    size *= static_cast<size_t>(length);
  }
  return size;
}

}  // namespace

struct ModelFile::Content {
  std::string file;
  std::optional<MappedFile> map;
  const uint8_t* data = nullptr;
  size_t size = 0;
  Weights weights;
  std::string tokenizer, quantization = "none";
  std::optional<double> temperature;

  // Of an archive: the tensors' payloads in file order, and the sum of everything else before the
  // end record.
  std::vector<Payload> payloads;
  size_t end_record = 0;
  uint32_t rest_sum = 0;

  // Of a .safetensors file.
  bool safetensors = false;
  std::string sealed, tensors_digest, sealed_digest;

  void open();
  void open_archive();
  void open_safetensors();
  void read_index(const Archive& archive, const json& index, const std::string& where);
  void verify_archive(int threads) const;
  void verify_safetensors() const;
};

void ModelFile::Content::open() {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::string_view ending = ".safetensors";
  if (text.substr(0, 4) == std::string_view("PK\3\4", 4)) {
    open_archive();
  } else if ((size > 8 && text[8] == '{') ||
             (file.size() >= ending.size() &&
              file.compare(file.size() - ending.size(), ending.size(), ending) == 0)) {
    open_safetensors();
  } else {
    throw InputError(file +
                     " is not a model file: neither an archive of nanogpt export nor .safetensors");
  }
  try {
    check(weights);
  } catch (const InputError& error) {
    damaged(file, error.what());
  }
}

void ModelFile::Content::open_archive() {
  const Archive archive(file, data, size);
  end_record = archive.end_record();
  const ArchiveEntry* const entry = archive.find(index_name);
  if (entry == nullptr) {
    throw InputError(file + " is an ordinary TorchScript file or state dict, not one of nanogpt " +
                     "export, which makes one of it: it has no " + index_name);
  }
  if (!entry->stored) {
    damaged(file, std::string("its record ") + index_name + " is compressed");
  }
  const std::string_view comment = archive.comment();
  const std::optional<uint32_t> sum = comment.substr(0, comment_label.size()) == comment_label
                                          ? sum_in(comment.substr(comment_label.size()))
                                          : std::nullopt;
  if (!sum) {
    damaged(file, "it does not end with its check sum");
  }
  rest_sum = *sum;

  const std::string where = file + " is damaged: its " + index_name;
  const std::string_view text(reinterpret_cast<const char*>(data) + entry->offset, entry->size);
  Description description = read_description(text, where);
  const std::string format = text_in(description.value, "format", where);
  if (format != archive_format) {
    throw InputError(file + " has the format " + shown(format) + ", but this version reads '" +
                     archive_format + "'");
  }
  weights.config = read_config(description.value, where);
  temperature = read_temperature(description.value, where);
  tokenizer = std::move(description.tokenizer);
  quantization = text_in(description.value, "quantize", where);
  if (quantization != "none" && quantization != "bf16" && quantization != "int8") {
    throw InputError(where + " has a 'quantize' of " + shown(quantization) +
                     ", not none, bf16 or int8");
  }
  read_index(archive, object_in(description.value, "tensors", where), where);
}

void ModelFile::Content::read_index(const Archive& archive, const json& index,
                                    const std::string& where) {
  std::set<const ArchiveEntry*> used;
  for (const auto& item : index.items()) {
    const json& fields = item.value();
    const std::string called = where + "'s entry of the tensor " + shown(item.key());
    Payload payload;
    payload.name = item.key();
    payload.record = text_in(fields, "record", called);
    check_names(fields, {"record", "dtype", "shape", "bytes", "crc32"}, called);
    const std::string dtype = text_in(fields, "dtype", called);
    const std::optional<uint32_t> sum = sum_in(text_in(fields, "crc32", called));
    const int64_t bytes = whole_in(fields, "bytes", called);

    const std::string tensor_text = "its tensor " + shown(payload.name) + " ";
    const std::string record_text = "its record " + shown(payload.record) + " ";
    Tensor tensor;
    tensor.shape = shape_in(fields, called);
    const std::optional<DType> known = dtype_named(dtype);
    if (!known) {
      damaged(file, tensor_text + "has the unknown dtype " + shown(dtype));
    }
    tensor.dtype = *known;
    if (!sum) {
      damaged(file, tensor_text + "has a check sum that is not eight hexadecimal digits");
    }
    payload.sum = *sum;
    const std::optional<size_t> expected = size_of(tensor.shape, tensor.dtype, size);
    if (!expected || static_cast<uint64_t>(bytes) != *expected) {
      damaged(file, tensor_text + "has a shape that does not fit its bytes");
    }
    const ArchiveEntry* const entry = archive.find(payload.record);
    if (entry == nullptr) {
      damaged(file, tensor_text + "is missing: there is no record " + shown(payload.record));
    }
    if (!entry->stored) {
      damaged(file, record_text + "is compressed, but a tensor's must not be");
    }
    if (entry->size != *expected) {
      damaged(file, record_text + "has " + std::to_string(entry->size) + " bytes instead of " +
                        std::to_string(*expected));
    }
    if (entry->offset % alignment != 0) {
      damaged(file, record_text + "is not aligned to " + std::to_string(alignment) + " bytes");
    }
    if (!used.insert(entry).second) {
      damaged(file, record_text + "belongs to two tensors");
    }
    payload.offset = entry->offset;
    payload.size = entry->size;
    tensor.data = data + entry->offset;
    tensor.bytes = entry->size;
    check_precision(payload.name, tensor, quantization, file);
    weights.tensors.emplace(payload.name, std::move(tensor));
    payloads.push_back(std::move(payload));
  }
  std::sort(payloads.begin(), payloads.end(),
            [](const Payload& a, const Payload& b) { return a.offset < b.offset; });
}

void ModelFile::Content::open_safetensors() {
  safetensors = true;
  Safetensors read = read_safetensors(file, data, size);
  weights.tensors = std::move(read.tensors);
  sealed = std::move(read.metadata);

  const std::string where = file + " is damaged: its metadata";
  Description description = read_description(sealed, where);
  const std::string format = text_in(description.value, "format", where);
  if (format != safetensors_format) {
    throw InputError(file + " has the format " + shown(format) + ", but this version reads '" +
                     safetensors_format + "'");
  }
  weights.config = read_config(description.value, where);
  temperature = read_temperature(description.value, where);
  tokenizer = std::move(description.tokenizer);
  tensors_digest = text_in(description.value, "sha256", where);
  sealed_digest = text_in(description.value, "metadata_sha256", where);

  // The metadata's own sum is that of its text without the sum, which is canonical: no spaces, and
  // a comma after or, for the last member, before.
  const JsonMember* const own = find_member(description.members, "metadata_sha256");
  if (own == nullptr) {
    throw InputError(where + " lacks 'metadata_sha256'");
  }
  auto begin = static_cast<size_t>(own->name.data() - sealed.data()) - 1;
  auto end = static_cast<size_t>(own->value.data() - sealed.data()) + own->value.size();
  if (sealed[end] == ',') {
    ++end;
  } else if (sealed[begin - 1] == ',') {
    --begin;
  }
  sealed.erase(begin, end - begin);
}

void ModelFile::Content::verify_safetensors() const {
  Sha256 metadata;
  metadata.update(sealed);
  if (metadata.hex() != sealed_digest) {
    damaged(file, "its metadata does not match its SHA-256");
  }
  Sha256 digest;
  for (const auto& [name, tensor] : weights.tensors) {
    std::string line = name + " " + name_of(tensor.dtype) + " ";
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      line += (i ? "x" : "") + std::to_string(tensor.shape[i]);
    }
    digest.update(line + "\n");
    digest.update(tensor.data, tensor.bytes);
  }
  if (digest.hex() != tensors_digest) {
    damaged(file, "its weights do not match their SHA-256");
  }
}

void ModelFile::Content::verify_archive(int threads) const {
  struct Piece {
    size_t begin, size;
    size_t owner;  // index of the payload, or payloads.size() for the rest
    uint32_t sum;
  };
  std::vector<Piece> pieces;
  const auto add = [&](size_t begin, size_t end, size_t owner) {
    for (; begin < end; begin += pieces.back().size) {
      pieces.push_back({begin, std::min(piece_bytes, end - begin), owner, 0});
    }
  };
  const size_t rest = payloads.size();
  size_t next = 0;
  for (size_t i = 0; i < payloads.size(); ++i) {
    add(next, payloads[i].offset, rest);
    next = payloads[i].offset + payloads[i].size;
    add(payloads[i].offset, next, i);
  }
  add(next, end_record, rest);

  std::atomic<size_t> taken{0};
  const auto work = [&]() {
    for (size_t i = taken++; i < pieces.size(); i = taken++) {
      Piece& piece = pieces[i];
      if (map) {
        populate(data + piece.begin, piece.size);
      }
      piece.sum = crc32(data + piece.begin, piece.size);
    }
  };
  // A thread costs about as much as the sum of a megabyte.
  const size_t useful = std::min(static_cast<size_t>(std::max(threads, 1)), 1 + size / piece_bytes);
  std::vector<std::thread> others;
  others.reserve(useful - 1);
  try {
    while (others.size() + 1 < useful) {
      others.emplace_back(work);
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are do it all.
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }

  std::vector<uint32_t> sums(payloads.size() + 1, 0);
  for (const Piece& piece : pieces) {
    uint32_t& sum = sums[piece.owner];
    sum = crc32_combine(sum, piece.sum, piece.size);
  }
  // The index first: where it is damaged, what it says about the tensors means nothing.
  if (sums[rest] != rest_sum) {
    damaged(file, "what it says about its tensors does not match its check sum");
  }
  for (size_t i = 0; i < payloads.size(); ++i) {
    if (sums[i] != payloads[i].sum) {
      damaged(file, "its record " + shown(payloads[i].record) + " (" + payloads[i].name +
                        ") does not match its check sum");
    }
  }
}

ModelFile::ModelFile(const std::string& path) : content_(std::make_unique<Content>()) {
  content_->file = path;
  content_->map.emplace(path);
  content_->data = content_->map->data();
  content_->size = content_->map->size();
  content_->open();
}

ModelFile::ModelFile(const std::string& name, const void* bytes, size_t size)
    : content_(std::make_unique<Content>()) {
  content_->file = name;
  content_->data = static_cast<const uint8_t*>(bytes);
  content_->size = size;
  content_->open();
}

ModelFile::~ModelFile() = default;

void ModelFile::verify(int threads) const {
  if (content_->safetensors) {
    content_->verify_safetensors();
  } else {
    content_->verify_archive(threads);
  }
}

const Weights& ModelFile::weights() const { return content_->weights; }

std::string_view ModelFile::bytes() const {
  return {reinterpret_cast<const char*>(content_->data), content_->size};
}

const std::string& ModelFile::tokenizer_json() const { return content_->tokenizer; }

std::optional<double> ModelFile::calibration_temperature() const { return content_->temperature; }

const std::string& ModelFile::quantization() const { return content_->quantization; }

}  // namespace nanogpt
