#include "engine/weights.h"

#include <cmath>

#include "engine/damage.h"
#include "engine/error.h"

namespace nanogpt {

// As QK_GAIN and ROTARY_BASE in nanogpt/model.py.
constexpr float kQkGain = 1.5f;
constexpr double kRotaryBase = 10000.0;

float Config::attention_scale() const {
  return (qk_norm ? kQkGain : 1.0f) / std::sqrt(static_cast<float>(head_width()));
}

double Config::angle(int64_t position, int64_t pair) const {
  const double exponent = -2.0 * static_cast<double>(pair) / static_cast<double>(head_width());
  return static_cast<double>(position) * std::pow(kRotaryBase, exponent);
}

namespace {

// The largest sizes together stay below 2^62 in every product that anyone forms of them:
// L * 12 * C * C, V * C and 2 * L * block * C, times four bytes.
constexpr int64_t largest_vocab = int64_t{1} << 24;
constexpr int64_t largest_block = int64_t{1} << 24;
constexpr int64_t largest_layers = int64_t{1} << 12;
constexpr int64_t largest_width = int64_t{1} << 20;
// As MOST_ROTARY_POSITIONS in nanogpt/config.py: no tensor has this many rows.
constexpr int64_t largest_rotary_block = int64_t{1} << 20;

void check_size(const char* name, int64_t value, int64_t largest) {
  if (value < 1 || value > largest) {
    throw InputError(std::string(name) + " is " + std::to_string(value) + ", outside of 1 to " +
                     std::to_string(largest));
  }
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + ")";
}

// Finds tensors by name and counts them, so that in the end none is left over.
class Inventory {
 public:
  explicit Inventory(const std::map<std::string, Tensor>& tensors) : tensors_(tensors) {}

  // A matrix of a product or the token embedding, in any precision.
  void matrix(const std::string& name, int64_t rows, int64_t columns) {
    const Tensor& tensor = shaped(name, {rows, columns});
    if (tensor.dtype == DType::i8) {
      single(name + ".scale", {rows});
    }
  }

  void positions(const std::string& name, int64_t rows, int64_t columns) {
    if (shaped(name, {rows, columns}).dtype == DType::i8) {
      throw InputError("the tensor " + name + " is int8, but positions are float32 or bfloat16");
    }
  }

  // A float32 tensor.
  void single(const std::string& name, const std::vector<int64_t>& shape) {
    const Tensor& tensor = shaped(name, shape);
    if (tensor.dtype != DType::f32) {
      throw InputError("the tensor " + name + " is " + name_of(tensor.dtype) +
                       ", but it has to be float32");
    }
  }

  void check_nothing_left() const {
    if (seen_.size() == tensors_.size()) {
      return;
    }
    for (const auto& [name, tensor] : tensors_) {
      if (!seen_.count(name)) {
        throw InputError("the tensor " + shown(name) + " belongs to no part of the model");
      }
    }
  }

 private:
  const Tensor& shaped(const std::string& name, const std::vector<int64_t>& shape) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      throw InputError("the tensor " + name + " is missing");
    }
    const Tensor& tensor = found->second;
    if (tensor.shape != shape) {
      throw InputError("the tensor " + name + " has the shape " + text_of(tensor.shape) +
                       " instead of " + text_of(shape));
    }
    size_t bytes = bytes_of(tensor.dtype);
    for (const int64_t size : shape) {
      bytes *= static_cast<size_t>(size);
    }
    if (tensor.data == nullptr || tensor.bytes < bytes) {
      throw InputError("the tensor " + name + " has " + std::to_string(tensor.bytes) +
                       " bytes instead of " + std::to_string(bytes));
    }
    seen_.emplace(name, true);
    return tensor;
  }

  const std::map<std::string, Tensor>& tensors_;
  std::map<std::string, bool> seen_;
};

}  // namespace

size_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::i8:
      return 1;
  }
  throw InputError("a tensor has an unknown dtype");
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::i8:
      return "int8";
  }
  throw InputError("a tensor has an unknown dtype");
}

std::optional<DType> dtype_named(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::i8}) {
    if (name == name_of(dtype)) {
      return dtype;
    }
  }
  return std::nullopt;
}

void check(const Weights& weights) {
  const Config& config = weights.config;
  check_size("vocab_size", config.vocab_size, largest_vocab);
  check_size("block_size", config.block_size, largest_block);
  check_size("n_layer", config.n_layer, largest_layers);
  check_size("n_embd", config.n_embd, largest_width);
  check_size("n_head", config.n_head, config.n_embd);
  if (config.n_embd % config.n_head != 0) {
    throw InputError("n_embd (" + std::to_string(config.n_embd) +
                     ") is not a multiple of n_head (" + std::to_string(config.n_head) + ")");
  }
  if (config.rotary && config.head_width() % 2 != 0) {
    throw InputError("rotary positions turn pairs, but the heads' width (n_embd / n_head) is " +
                     std::to_string(config.head_width()) + ", which is odd");
  }
  if (config.rotary) {
    check_size("block_size", config.block_size, largest_rotary_block);
  }
  const int64_t width = config.n_embd;
  Inventory inventory(weights.tensors);
  const auto norm = [&](const std::string& name) {
    inventory.single(name + ".weight", {width});
    if (config.bias) {
      inventory.single(name + ".bias", {width});
    }
  };
  const auto linear = [&](const std::string& name, int64_t rows, int64_t columns) {
    inventory.matrix(name + ".weight", rows, columns);
    if (config.bias) {
      inventory.single(name + ".bias", {rows});
    }
  };
  inventory.matrix("transformer.wte.weight", config.vocab_size, width);
  if (!config.rotary) {
    inventory.positions("transformer.wpe.weight", config.block_size, width);
  }
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "transformer.h." + std::to_string(layer);
    norm(block + ".ln_1");
    linear(block + ".attn.c_attn", 3 * width, width);
    linear(block + ".attn.c_proj", width, width);
    norm(block + ".ln_2");
    linear(block + ".mlp.c_fc", 4 * width, width);
    linear(block + ".mlp.c_proj", width, 4 * width);
  }
  norm("transformer.ln_f");
  inventory.check_nothing_left();
}

}  // namespace nanogpt
