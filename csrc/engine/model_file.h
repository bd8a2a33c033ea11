// A model on disk: the TorchScript archive of `export`, or a .safetensors model file.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "engine/weights.h"

namespace nanogpt {

// Maps the file; the weights point into the map and are valid as long as this object.
class ModelFile {
 public:
  // Reads structure, metadata and index. Throws InputError where the file is missing, damaged or
  // foreign. No tensor's bytes have been checked yet.
  explicit ModelFile(const std::string& path);
  // The same from a file's bytes in memory, which must outlive this object; `name` stands for the
  // path in sentences. Tensors lie as aligned as the bytes do.
  ModelFile(const std::string& name, const void* bytes, size_t size);
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  // Compares every byte that is used with its check sum, on `threads` threads.
  // Throws InputError naming the first record that differs.
  void verify(int threads) const;

  const Weights& weights() const;
  // The whole file.
  std::string_view bytes() const;
  // The tokenizer's description as JSON text (Python's Tokenizer.to_dict), empty where there is
  // none.
  const std::string& tokenizer_json() const;
  std::optional<double> calibration_temperature() const;
  // "none", "bf16" or "int8".
  const std::string& quantization() const;

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

}  // namespace nanogpt
