// Whole model files: whatever the bytes are, they are refused in words or read in full, and a file
// that is taken with another bit somewhere is taken for the same model.

#include <cstdio>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "engine/archive.h"
#include "engine/crc32.h"
#include "engine/error.h"
#include "engine/model_file.h"
#include "fuzz/fuzzing.h"

namespace fuzzing {

const std::vector<std::string> pieces = {
    std::string("PK\3\4", 4),
    std::string("PK\1\2", 4),
    std::string("PK\5\6", 4),
    "nanogpt-crc32:",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "null",
    "true",
    "-1",
    "1e99",
    "0.5",
    "\\u0000",
    "\\ud800",
    "\xff",
    "{\"a\":",
    "\"bias\":true",
    "\"rotary\":true,",
    "\"qk_norm\":true,",
    "\"n_layer\":2",
    "\"record\":\"constants/0\"",
    "\"dtype\":\"int8\"",
    "9223372036854775807",
    "18446744073709551615",
};

namespace {

// Everything that a file says, every byte of its tensors included; nothing where it is refused.
// Anything but InputError goes up and ends the program.
std::optional<std::string> content(const Bytes& bytes) {
  try {
    const nanogpt::ModelFile file("input", bytes.data(), bytes.size());
    const nanogpt::Config& config = file.weights().config;
    std::ostringstream text;
    text.precision(17);
    text << config.vocab_size << ' ' << config.block_size << ' ' << config.n_layer << ' '
         << config.n_head << ' ' << config.n_embd << ' ' << config.bias << ' ' << config.rotary
         << ' ' << config.qk_norm << ' ' << file.quantization() << ' '
         << file.calibration_temperature().value_or(-1) << ' ' << file.tokenizer_json();
    for (const auto& [name, tensor] : file.weights().tensors) {
      text << '\n' << name << ' ' << static_cast<int>(tensor.dtype);
      for (const int64_t length : tensor.shape) {
        text << ' ' << length;
      }
      text.write(static_cast<const char*>(tensor.data), static_cast<std::streamsize>(tensor.bytes));
    }
    file.verify(1);
    return text.str();
  } catch (const nanogpt::InputError& error) {
    must(std::string_view(error.what()).find("input") != std::string_view::npos,
         "a refusal does not name the file");
    return std::nullopt;
  }
}

}  // namespace

bool accepts(const uint8_t* data, size_t size) {
  Bytes bytes(data, data + size);
  const std::optional<std::string> whole = content(bytes);
  if (whole) {
    Random random(nanogpt::crc32(data, size, 0));
    for (int i = 0; i < 4; ++i) {
      uint8_t& byte = bytes[random.below(size)];
      const auto bit = static_cast<uint8_t>(1u << random.below(8));
      byte = static_cast<uint8_t>(byte ^ bit);
      const std::optional<std::string> damaged = content(bytes);
      must(!damaged || damaged == whole, "a damaged file is read as something else");
      byte = static_cast<uint8_t>(byte ^ bit);
    }
  }
  return whole.has_value();
}

// Gives an archive the check sum that its bytes have, the tensors left out.
void mend(Bytes& bytes, Random&) {
  try {
    const nanogpt::Archive archive("input", bytes.data(), bytes.size());
    if (archive.comment().empty()) {
      return;
    }
    uint32_t sum = 0;
    size_t next = 0;
    for (const nanogpt::ArchiveEntry& entry : archive.entries()) {
      const bool tensor =
          entry.name.substr(0, 10) == "constants/" || entry.name.substr(0, 5) == "data/";
      if (tensor && entry.stored) {
        sum = nanogpt::crc32(bytes.data() + next, entry.offset - next, sum);
        next = entry.offset + entry.size;
      }
    }
    sum = nanogpt::crc32(bytes.data() + next, archive.end_record() - next, sum);
    char text[nanogpt::archive_comment_bytes + 1];
    std::snprintf(text, sizeof text, "nanogpt-crc32:%08x", sum);
    std::memcpy(bytes.data() + bytes.size() - nanogpt::archive_comment_bytes, text,
                nanogpt::archive_comment_bytes);
  } catch (const nanogpt::InputError&) {
    // No archive, and nothing to mend.
  }
}

}  // namespace fuzzing
