// The layout of .safetensors: a header of JSON, then the tensors' bytes one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "engine/weights.h"

namespace nanogpt {

struct Safetensors {
  std::map<std::string, Tensor> tensors;
  std::string metadata;  // the text under "nanogpt" in "__metadata__"
};

// Tensors as views of the caller's bytes; `file` names them in sentences. Throws InputError where
// the layout is damaged, a tensor is not float32, or the file is not one of nanogpt.
Safetensors read_safetensors(const std::string& file, const uint8_t* data, size_t size);

}  // namespace nanogpt
