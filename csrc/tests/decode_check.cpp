// The decoder against the equations in double precision, on random weights.
//
//   decode_check            every shape, precision, instruction set of this CPU and thread count
//
// For each it reads a text at once, position by position, and in pieces, and wants of all three
// what the equations give; of every thread count the same bits; and of what it must refuse a
// UsageError that leaves the context as it was. It prints the largest difference of each
// instruction set and ends with 1 where one is too large. The sanitizer builds run it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/error.h"
#include "engine/weights.h"

namespace {

using nanogpt::Config;
using nanogpt::Decoder;
using nanogpt::DType;
using nanogpt::Tensor;
using nanogpt::UsageError;
using nanogpt::Weights;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}
  uint64_t word() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  // In -1 .. 1.
  double even() { return static_cast<double>(word() >> 11) / 4503599627370496.0 - 1.0; }

 private:
  uint64_t state_;
};

uint16_t bf16_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

float float_of(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Weights as a file holds them, and the numbers that they mean. Every tensor has its own
// allocation of exactly its size, so that AddressSanitizer sees a read beyond it.
struct Model {
  Weights weights;
  std::map<std::string, std::vector<double>> meant;
  std::vector<std::unique_ptr<uint8_t[]>> memory;

  template <typename T>
  void put(const std::string& name, DType dtype, std::vector<int64_t> shape,
           const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    memory.push_back(std::make_unique<uint8_t[]>(bytes));
    std::memcpy(memory.back().get(), values.data(), bytes);
    weights.tensors[name] = Tensor{dtype, std::move(shape), memory.back().get(), bytes};
  }

  void vector(const std::string& name, int64_t size, double centre, Random& random) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = static_cast<float>(centre + 0.3 * random.even());
    meant[name].assign(values.begin(), values.end());
    put(name, DType::f32, {size}, values);
  }

  void matrix(const std::string& name, int64_t rows, int64_t cols, DType dtype, double size,
              Random& random) {
    std::vector<float> values(static_cast<size_t>(rows * cols));
    for (float& value : values) value = static_cast<float>(size * random.even());
    std::vector<double>& numbers = meant[name];
    if (dtype == DType::f32) {
      numbers.assign(values.begin(), values.end());
      put(name, dtype, {rows, cols}, values);
    } else if (dtype == DType::bf16) {
      std::vector<uint16_t> halves;
      for (const float value : values) halves.push_back(bf16_of(value));
      for (const uint16_t half : halves) numbers.push_back(float_of(half));
      put(name, dtype, {rows, cols}, halves);
    } else {
      std::vector<int8_t> quantized;
      std::vector<float> scales;
      for (int64_t r = 0; r < rows; ++r) {
        float most = 0;
        for (int64_t c = 0; c < cols; ++c) most = std::max(most, std::fabs(values[r * cols + c]));
        scales.push_back(most / 127);
        for (int64_t c = 0; c < cols; ++c) {
          const double level = most > 0 ? std::nearbyint(values[r * cols + c] / scales.back()) : 0;
          quantized.push_back(static_cast<int8_t>(std::clamp(level, -127.0, 127.0)));
          numbers.push_back(static_cast<double>(quantized.back()) * scales.back());
        }
      }
      put(name, dtype, {rows, cols}, quantized);
      put(name + ".scale", DType::f32, {rows}, scales);
    }
  }

  const double* of(const std::string& name) const { return meant.at(name).data(); }
};

Model random_model(const Config& config, DType dtype, uint64_t seed) {
  Random random(seed);
  Model model;
  model.weights.config = config;
  const int64_t c = config.n_embd;
  // Scaled so that every part of a layer matters and the logits are of the size of real ones.
  const double size = 1.7 / std::sqrt(static_cast<double>(c));
  const auto linear = [&](const std::string& name, int64_t rows, int64_t cols) {
    model.matrix(name + ".weight", rows, cols, dtype, size, random);
    if (config.bias) model.vector(name + ".bias", rows, 0.0, random);
  };
  const auto norm = [&](const std::string& name) {
    model.vector(name + ".weight", c, 1.0, random);
    if (config.bias) model.vector(name + ".bias", c, 0.0, random);
  };
  const DType of_positions = dtype == DType::i8 ? DType::f32 : dtype;
  model.matrix("transformer.wte.weight", config.vocab_size, c, dtype, 1.0, random);
  if (!config.rotary) {
    model.matrix("transformer.wpe.weight", config.block_size, c, of_positions, 0.5, random);
  }
  for (int64_t l = 0; l < config.n_layer; ++l) {
    const std::string layer = "transformer.h." + std::to_string(l) + ".";
    norm(layer + "ln_1");
    linear(layer + "attn.c_attn", 3 * c, c);
    linear(layer + "attn.c_proj", c, c);
    norm(layer + "ln_2");
    linear(layer + "mlp.c_fc", 4 * c, c);
    linear(layer + "mlp.c_proj", c, 4 * c);
  }
  norm("transformer.ln_f");
  return model;
}

using Row = std::vector<double>;

Row multiplied(const Model& model, const std::string& name, const Row& x) {
  const double* w = model.of(name + ".weight");
  const size_t rows = model.meant.at(name + ".weight").size() / x.size();
  Row out(rows, 0.0);
  for (size_t r = 0; r < rows; ++r) {
    if (model.weights.tensors.count(name + ".bias") != 0) out[r] = model.of(name + ".bias")[r];
    for (size_t k = 0; k < x.size(); ++k) out[r] += w[r * x.size() + k] * x[k];
  }
  return out;
}

Row normed(const Model& model, const std::string& name, const Row& x) {
  const auto n = static_cast<double>(x.size());
  double mean = 0;
  double variance = 0;
  for (const double value : x) mean += value / n;
  for (const double value : x) variance += (value - mean) * (value - mean) / n;
  Row out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * model.of(name + ".weight")[i];
    if (model.weights.config.bias) out[i] += model.of(name + ".bias")[i];
  }
  return out;
}

void add(Row& x, const Row& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

// Queries or keys of one head, of the token at position t: divided by their root mean square, and
// turned.
void make_ready(const Config& config, size_t t, double* x) {
  const auto d = static_cast<size_t>(config.head_width());
  if (config.qk_norm) {
    double square = 0;
    for (size_t i = 0; i < d; ++i) square += x[i] * x[i] / static_cast<double>(d);
    for (size_t i = 0; i < d; ++i) x[i] /= std::sqrt(square + 1e-6);
  }
  for (size_t i = 0; config.rotary && i < d / 2; ++i) {
    const double fraction = 2.0 * static_cast<double>(i) / static_cast<double>(d);
    const double angle = static_cast<double>(t) / std::pow(10000.0, fraction);
    const double x1 = x[i], x2 = x[i + d / 2];
    x[i] = x1 * std::cos(angle) - x2 * std::sin(angle);
    x[i + d / 2] = x2 * std::cos(angle) + x1 * std::sin(angle);
  }
}

// (T, V): the equations of nanogpt/model.py, token by token.
std::vector<Row> expected(const Model& model, const std::vector<int32_t>& tokens) {
  const Config& config = model.weights.config;
  const bool narrow = model.weights.tensors.at("transformer.wte.weight").dtype != DType::f32;
  const auto c = static_cast<size_t>(config.n_embd);
  const auto d = static_cast<size_t>(config.head_width());
  const double gain = config.qk_norm ? 1.5 : 1.0;
  std::vector<std::vector<Row>> cache(static_cast<size_t>(config.n_layer));  // rows of q, k, v
  std::vector<Row> logits;
  for (size_t t = 0; t < tokens.size(); ++t) {
    Row x(c);
    for (size_t i = 0; i < c; ++i) {
      x[i] = model.of("transformer.wte.weight")[static_cast<size_t>(tokens[t]) * c + i];
      if (!config.rotary) x[i] += model.of("transformer.wpe.weight")[t * c + i];
    }
    for (size_t l = 0; l < cache.size(); ++l) {
      const std::string layer = "transformer.h." + std::to_string(l) + ".";
      Row qkv = multiplied(model, layer + "attn.c_attn", normed(model, layer + "ln_1", x));
      for (size_t head = 0; head < 2 * c; head += d) make_ready(config, t, &qkv[head]);
      if (narrow) {  // then keys and values are kept in bfloat16
        for (size_t i = c; i < qkv.size(); ++i)
          qkv[i] = float_of(bf16_of(static_cast<float>(qkv[i])));
      }
      cache[l].push_back(std::move(qkv));
      const Row& q = cache[l].back();
      Row mixed(c, 0.0);
      for (size_t head = 0; head < c; head += d) {
        Row p(t + 1, 0.0);
        double total = 0;
        for (size_t s = 0; s <= t; ++s) {
          for (size_t i = head; i < head + d; ++i) p[s] += q[i] * cache[l][s][c + i];
          p[s] = std::exp(gain * p[s] / std::sqrt(static_cast<double>(d)));
          total += p[s];
        }
        for (size_t s = 0; s <= t; ++s) {
          for (size_t i = head; i < head + d; ++i)
            mixed[i] += p[s] / total * cache[l][s][2 * c + i];
        }
      }
      add(x, multiplied(model, layer + "attn.c_proj", mixed));
      Row wide = multiplied(model, layer + "mlp.c_fc", normed(model, layer + "ln_2", x));
      for (double& u : wide) {
        u *= 0.5 * (1 + std::tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)));
      }
      add(x, multiplied(model, layer + "mlp.c_proj", wide));
    }
    logits.push_back(multiplied(model, "transformer.wte", normed(model, "transformer.ln_f", x)));
  }
  return logits;
}

// How far rounding may carry, in parts of the largest logit. Beside narrow weights a last bit in
// float32 can turn the rounding of a key to bfloat16. Where bfloat16 products are made by
// instructions of their own they round the activations too, to 2^-9 each; int8 products take the
// activations in 15 bits.
double allowed(const std::string& set, DType dtype) {
  if (dtype == DType::f32) return 5e-6;
  if (dtype == DType::i8) return 5e-3;
  return set == "avx512_bf16" ? 3e-2 : 1e-3;
}

int failures = 0;

void must(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// Largest difference of one row, in parts of the largest logit.
double difference(const float* ours, const Row& want) {
  double most = 0;
  double size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double apart = std::fabs(ours[i] - want[i]);
    most = std::isfinite(apart) ? std::max(most, apart) : HUGE_VAL;
    size = std::max(size, std::fabs(want[i]));
  }
  return most / size;
}

using Logits = std::vector<float>;

// (T, V) in three ways, one after the other: at once, token by token, in pieces (whose last
// positions alone are known; the others stay 0).
std::vector<Logits> computed(Decoder& decoder, const std::vector<int32_t>& tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  const auto width = static_cast<size_t>(decoder.config().vocab_size);
  std::vector<Logits> out(3, Logits(tokens.size() * width, 0.0F));
  decoder.append_all(tokens.data(), count, out[0].data());
  decoder.reset();
  for (size_t t = 0; t < tokens.size(); ++t) {
    const float* row = decoder.append(&tokens[t], 1);
    std::copy(row, row + width, out[1].data() + t * width);
  }
  decoder.reset();
  int64_t piece = 1;
  for (int64_t t = 0; t < count; t += piece, piece = 3 * piece + 1) {
    piece = std::min(piece, count - t);
    const float* row = decoder.append(tokens.data() + t, piece);
    std::copy(row, row + width, out[2].data() + static_cast<size_t>(t + piece - 1) * width);
  }
  must(decoder.length() == count, "length after appending");
  return out;
}

void refuses(Decoder& decoder) {
  decoder.reset();
  const Config& config = decoder.config();
  const std::vector<int32_t> many(static_cast<size_t>(config.block_size) + 1, 0);
  const auto beyond = static_cast<int32_t>(config.vocab_size);
  const std::vector<std::pair<std::vector<int32_t>, const char*>> cases = {
      {many, "a text longer than the context"},
      {{0, beyond}, "a token beyond the vocabulary"},
      {{-1}, "a negative token"},
      {{}, "no token"}};
  for (const auto& [tokens, what] : cases) {
    bool refused = false;
    try {
      decoder.append(tokens.data(), static_cast<int64_t>(tokens.size()));
    } catch (const UsageError&) {
      refused = true;
    }
    must(refused && decoder.length() == 0, std::string("refuses ") + what);
  }
}

}  // namespace

int main() {
  // Odd widths, one beyond a vector register, more rows and tokens than a kernel takes at a time.
  const std::vector<Config> shapes = {{67, 70, 2, 3, 21, false},
                                      {131, 81, 2, 4, 64, true},
                                      {50, 20, 1, 1, 1, true},
                                      {259, 33, 3, 2, 132, false},
                                      {30, 12, 1, 1, 520, false},
                                      {67, 150, 2, 3, 42, true, true, false},
                                      {45, 70, 2, 3, 21, false, false, true},
                                      {131, 81, 2, 4, 64, false, true, true}};
  const std::vector<DType> dtypes = {DType::f32, DType::bf16, DType::i8};
  const std::vector<std::string> sets = {"scalar", "avx2", "avx512", "avx512_bf16", "neon"};
  std::map<std::string, double> largest;
  for (size_t shape = 0; shape < shapes.size(); ++shape) {
    for (const DType dtype : dtypes) {
      const Model model = random_model(shapes[shape], dtype, shape + 1);
      Random random(99 + shape);
      std::vector<int32_t> tokens;
      for (int64_t t = 0; t < shapes[shape].block_size; ++t) {
        tokens.push_back(static_cast<int32_t>(random.word() % shapes[shape].vocab_size));
      }
      const std::vector<Row> want = expected(model, tokens);
      for (const std::string& set : sets) {
        setenv("NANOGPT_ISA", set.c_str(), 1);
        const std::string title = set + " " + nanogpt::name_of(dtype);
        const double limit = allowed(set, dtype);
        const std::string where = title + " shape " + std::to_string(shape);
        std::vector<Logits> first;
        // More threads than processors wait for each other long, so they read the short text.
        const std::vector<int> counts = shape == 2   ? std::vector<int>{1, 2, 5, 0}
                                        : shape == 4 ? std::vector<int>{1, 2}
                                                     : std::vector<int>{1, 2, 3};
        for (const int threads : counts) {
          std::unique_ptr<Decoder> decoder;
          try {
            decoder = std::make_unique<Decoder>(model.weights, threads);
          } catch (const UsageError&) {
            break;  // this CPU lacks it
          }
          must(decoder->instruction_set() == set, where + ": the set that was asked for");
          const std::vector<Logits> got = computed(*decoder, tokens);
          if (threads == 1) {
            first = got;
            refuses(*decoder);
          }
          must(got == first,
               where + ": the same bits with " + std::to_string(threads) + " threads");
          for (size_t way = 0; way < got.size(); ++way) {
            for (size_t t = 0; t < tokens.size(); ++t) {
              const float* row = got[way].data() + t * want[t].size();
              if (way == 2 &&
                  std::all_of(row, row + want[t].size(), [](float f) { return f == 0; }))
                continue;
              const double apart = difference(row, want[t]);
              largest[title] = std::max(largest[title], apart);
              if (apart > limit) {
                must(false, where + ": way " + std::to_string(way) + " position " +
                                std::to_string(t) + " differs by " + std::to_string(apart));
                break;
              }
            }
          }
        }
      }
    }
  }
  must(largest.count("scalar float32") == 1, "scalar runs everywhere");
  for (const auto& [title, apart] : largest) std::printf("%-24s %.2e\n", title.c_str(), apart);
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
