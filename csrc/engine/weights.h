// The model's shape and views of its tensors, wherever their bytes lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace nanogpt {

enum class DType { f32, bf16, i8 };

size_t bytes_of(DType dtype);
// "float32", "bfloat16", "int8": torch's names.
const char* name_of(DType dtype);
std::optional<DType> dtype_named(const std::string& name);

// The fields of GPTConfig that change what is computed.
struct Config {
  int64_t vocab_size = 0;  // V
  int64_t block_size = 0;  // context length in tokens
  int64_t n_layer = 0;     // L
  int64_t n_head = 0;      // H
  int64_t n_embd = 0;      // C
  bool bias = false;
  bool rotary = false;   // positions turn queries and keys; there is no wpe
  bool qk_norm = false;  // queries and keys of a head are divided by their root mean square
  int64_t head_width() const { return n_embd / n_head; }  // D
  // What the attention's logits are multiplied by.
  float attention_scale() const;
  // Of rotary positions: position * base^(-2 pair / D), in double precision as in Python.
  double angle(int64_t position, int64_t pair) const;
};

// A row-major tensor that someone else keeps alive.
struct Tensor {
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  const void* data = nullptr;
  size_t bytes = 0;
};

// Named as in the state dict: "transformer.wte.weight" (V, C), "transformer.wpe.weight" (block, C),
// "transformer.h.0.ln_1.weight" (C), "….attn.c_attn.weight" (3C, C), "….attn.c_proj.weight" (C, C),
// "….ln_2.weight", "….mlp.c_fc.weight" (4C, C), "….mlp.c_proj.weight" (C, 4C),
// "transformer.ln_f.weight", with ".bias" beside each but the embeddings where config.bias, and no
// wpe where config.rotary.
// An int8 matrix W has its float32 scales, one a row, under W's name + ".scale": W = scale * int8.
// Vectors are float32; "transformer.wpe.weight" is float32 or bfloat16.
struct Weights {
  Config config;
  std::map<std::string, Tensor> tensors;
};

// Throws InputError where a size is out of range, a tensor is missing, has another shape or dtype,
// or has too few bytes. Everything that reads weights relies on it.
void check(const Weights& weights);

}  // namespace nanogpt
