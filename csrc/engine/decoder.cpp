#include "engine/decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "engine/error.h"
#include "engine/kernels.h"
#include "engine/thread_pool.h"

namespace nanogpt {

namespace {

// Tokens of a prompt that go through the layers together: the weights are read once for them.
constexpr int64_t kBlock = 128;
// More wait for each other longer than they work, and thousands stop the machine.
constexpr int kMostThreads = 1024;
// Steps that each candidate number of threads is timed for.
constexpr int kTrials = 4;
// Steps after which the choice is made anew, because what else the machine does changes.
constexpr int kStepsOfAChoice = 2000;

struct Matrix {
  DType dtype = DType::f32;
  const void* data = nullptr;
  const float* scales = nullptr;
  const float* bias = nullptr;
  int64_t rows = 0, cols = 0;
};

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct Layer {
  Norm ln_1, ln_2;
  Matrix qkv, attention_out, feed_in, feed_out;
};

// Uninitialised, 64-byte aligned; pages that are never touched cost no memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(count ? static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T),
                                                     std::align_val_t{64}))
                    : nullptr) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// What one thread works with.
struct Scratch {
  explicit Scratch(const Config& c)
      : normed(kFew * c.n_embd),
        split(kFew * 4 * c.n_embd),
        ints(kFew * 4 * c.n_embd),
        scores(c.block_size * kLanes),
        row(c.head_width()),
        wide_keys(c.block_size * c.head_width()),
        wide_values(c.block_size * c.head_width()),
        gemm(gemm_scratch(4 * c.n_embd)),
        rows(std::max(kRowBlock * kBlock, kFew * c.head_width())) {}
  Buffer<float> normed;
  Buffer<float> split;
  Buffer<int16_t> ints;
  float scales[kFew] = {};
  Buffer<float> scores;
  Buffer<float> row;
  Buffer<float> wide_keys, wide_values;
  Buffer<char> gemm;
  Buffer<float> rows;
};

// What is fetched of the next matrix while a thread waits, and before it norms a vector: about what
// a core can have under way.
constexpr int64_t kBytesAhead = 32768;
constexpr int kLinesAhead = 48;

Ahead ahead_of(const Matrix& m, int64_t row) {
  const int64_t width = static_cast<int64_t>(bytes_of(m.dtype)) * m.cols;
  return Ahead{static_cast<const char*>(m.data) + row * width,
               std::min(kBytesAhead, (m.rows - row) * width)};
}

// Vectors, one a token, in the form that a kind of weights wants.
struct Operand {
  const float* floats;
  const int16_t* ints = nullptr;
  const float* scales = nullptr;
};

int64_t first_row(int64_t rows, int thread, int threads) {
  const int64_t blocks = (rows + 7) / 8;
  return std::min(rows, blocks * thread / threads * 8);
}

float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float element(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.cols + col;
  switch (m.dtype) {
    case DType::f32:
      return static_cast<const float*>(m.data)[at];
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(m.data)[at]);
    case DType::i8:
      return static_cast<const int8_t*>(m.data)[at] * m.scales[row];
  }
  return 0.0f;
}

}  // namespace

struct Decoder::State {
  State(const Weights& weights, int threads);

  const float* append(const int32_t* tokens, int64_t count, float* all);
  void check_tokens(const int32_t* tokens, int64_t count) const;

  // `few` tokens, decoded by all threads of a run in lockstep.
  void step(int thread, int threads);
  // `lanes` tokens, of which `count` are real.
  void block(int thread, int threads);
  void logits_rows(int thread, int threads, const float* x);

  Operand prepare(DType dtype, const float* x, int64_t n, Scratch& scratch) const;
  void multiply(const Matrix& m, int64_t first, int64_t rows, const Operand& x, float* out,
                int64_t stride, Store store) const;
  void multiply_panels(const Matrix& m, int64_t first, int64_t rows, const Panel* panels,
                       Store store, void* scratch) const;
  void pack(DType dtype, int64_t n, const float* x, int group) const;
  void panels_of(const float* in, DType dtype, int64_t in_rows, float* out, int64_t out_rows,
                 Panel* panels) const;

  // (block, D) of one head, float32 or bfloat16.
  template <typename T>
  T* keys(size_t layer, int64_t head) const {
    return reinterpret_cast<T*>(keys_.get()) + head_offset(layer, head);
  }
  template <typename T>
  T* values(size_t layer, int64_t head) const {
    return reinterpret_cast<T*>(values_.get()) + head_offset(layer, head);
  }
  int64_t head_offset(size_t layer, int64_t head) const {
    return (static_cast<int64_t>(layer) * config.n_head + head) * config.block_size *
           config.head_width();
  }
  float embedded(int32_t token, int64_t position, int64_t feature) const;
  void turn_to(int64_t end);
  void ready(float* x, int64_t width, int64_t count, int64_t position) const;
  void norm_few(const Norm& norm, float* out) const;
  void few_to_logits(int thread, int threads);
  void attend_few(size_t layer, int64_t head, const Operand& normed, Scratch& scratch);
  void store_key_value(size_t layer, int64_t head, int64_t row, const float* key,
                       const float* value, int64_t stride, float* line) const;

  int threads_for_step();
  void start_trial();
  void took(double seconds);

  Config config;
  const Kernels& kernels;
  std::vector<Layer> layers;
  Norm ln_f;
  Matrix tokens_matrix;     // wte: embedding and head
  Matrix positions_matrix;  // wpe
  int64_t length = 0;

  // Models with float32 weights keep keys and values in float32, the others in bfloat16: half the
  // bytes, at the precision of the weights or better.
  bool narrow_cache;
  Buffer<char> keys_, values_;  // (L, H, block, D)
  Buffer<float> x, query, mixed, hidden, logits;

  // Cosines and then sines of a position's angles, (block, D), of the first `turned` positions: a
  // context that is never filled costs nothing.
  Buffer<float> rotation;
  int64_t turned = 0;
  bool prepares;  // queries and keys, before they are compared

  int few = 1;
  // Of a prompt's block.
  struct PromptBuffers {
    PromptBuffers(const Config& c, int64_t lanes)
        : x(c.n_embd * lanes),
          y(c.n_embd * lanes),
          qkv(3 * c.n_embd * lanes),
          hidden(4 * c.n_embd * lanes),
          packed(4 * c.n_embd * lanes * 2 + 2 * lanes),
          scales(lanes),
          last(c.n_embd) {}
    Buffer<float> x, y, qkv, hidden;
    Buffer<int16_t> packed;
    Buffer<float> scales;
    Buffer<float> last;
  };
  std::unique_ptr<PromptBuffers> prompt;
  int64_t largest_block = 0;
  const int32_t* block_tokens = nullptr;
  int64_t block_count = 0;
  int n_panels = 0;
  int widths[2] = {0, 0};
  int64_t offsets[2] = {0, 0};
  bool wants_last = false;
  float* wants_all = nullptr;  // (count, V) of this block

  // Work that threads take in turns; three counters in turn, so that one can be set back while
  // the one before it may still be read.
  alignas(64) std::atomic<int64_t> counters[3] = {};

  std::unique_ptr<ThreadPool> pool;
  std::vector<Scratch> scratches;
  std::vector<int> candidates;  // numbers of threads to choose from; empty where one is given
  std::vector<double> best_seconds;
  bool under_trial = false;
  int trial = 0;               // steps of this trial, or since the last one
  std::atomic<int> chosen{1};  // others may ask while a token is computed
};

Decoder::State::State(const Weights& weights, int threads)
    : config(weights.config),
      kernels(choose_kernels()),
      narrow_cache(weights.tensors.at("transformer.wte.weight").dtype != DType::f32),
      keys_(config.n_layer * config.block_size * config.n_embd * (narrow_cache ? 2 : 4)),
      values_(config.n_layer * config.block_size * config.n_embd * (narrow_cache ? 2 : 4)),
      x(kFew * config.n_embd),
      query(kFew * config.n_embd),
      mixed(kFew * config.n_embd),
      hidden(kFew * 4 * config.n_embd),
      logits(config.vocab_size),
      rotation(config.rotary ? config.block_size * config.head_width() : 0),
      prepares(config.rotary || config.qk_norm) {
  const auto vector_named = [&](const std::string& name) -> const float* {
    const auto found = weights.tensors.find(name);
    return found == weights.tensors.end() ? nullptr : static_cast<const float*>(found->second.data);
  };
  const auto norm_named = [&](const std::string& name) {
    return Norm{vector_named(name + ".weight"), vector_named(name + ".bias")};
  };
  const auto matrix_named = [&](const std::string& name) {
    const Tensor& tensor = weights.tensors.at(name + ".weight");
    return Matrix{tensor.dtype,
                  tensor.data,
                  vector_named(name + ".weight.scale"),
                  config.bias ? vector_named(name + ".bias") : nullptr,
                  tensor.shape[0],
                  tensor.shape[1]};
  };
  tokens_matrix = matrix_named("transformer.wte");
  if (!config.rotary) positions_matrix = matrix_named("transformer.wpe");
  ln_f = norm_named("transformer.ln_f");
  for (int64_t i = 0; i < config.n_layer; ++i) {
    const std::string prefix = "transformer.h." + std::to_string(i) + ".";
    Layer layer;
    layer.ln_1 = norm_named(prefix + "ln_1");
    layer.ln_2 = norm_named(prefix + "ln_2");
    layer.qkv = matrix_named(prefix + "attn.c_attn");
    layer.attention_out = matrix_named(prefix + "attn.c_proj");
    layer.feed_in = matrix_named(prefix + "mlp.c_fc");
    layer.feed_out = matrix_named(prefix + "mlp.c_proj");
    layers.push_back(layer);
  }

  if (threads < 0 || threads > kMostThreads) {
    throw UsageError("threads must be from 0 to " + std::to_string(kMostThreads) + ", not " +
                     std::to_string(threads));
  }
  const int most = threads > 0 ? threads : std::min(usable_cpus(), kMostThreads);
  pool = std::make_unique<ThreadPool>(most);
  for (int i = 0; i < most; ++i) scratches.emplace_back(config);
  chosen = most;
  if (threads == 0) {
    for (int n = most; n > 1; n /= 2) candidates.push_back(n);
    candidates.push_back(1);
    if (candidates.size() == 1) candidates.clear();
    if (!candidates.empty()) start_trial();
  }
}

void Decoder::State::check_tokens(const int32_t* tokens, int64_t count) const {
  if (count < 1) throw UsageError("there must be at least one token to append");
  if (length + count > config.block_size) {
    throw UsageError(std::to_string(length + count) + " tokens do not fit the context of " +
                     std::to_string(config.block_size));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= config.vocab_size) {
      throw UsageError("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                       std::to_string(config.vocab_size));
    }
  }
}

// A feature of what the first layer reads.
float Decoder::State::embedded(int32_t token, int64_t position, int64_t feature) const {
  const float x = element(tokens_matrix, token, feature);
  return config.rotary ? x : x + element(positions_matrix, position, feature);
}

void Decoder::State::turn_to(int64_t end) {
  const int64_t d = config.head_width(), half = d / 2;
  for (; turned < end; ++turned) {
    float* row = rotation.get() + turned * d;
    for (int64_t i = 0; i < half; ++i) {
      const double angle = config.angle(turned, i);
      row[i] = static_cast<float>(std::cos(angle));
      row[half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

// Queries or keys of one head, of `count` <= kPanel tokens from `position` on: (D, width) in place.
// They are divided by their root mean square, and features i and i + D/2 are turned as a pair.
void Decoder::State::ready(float* x, int64_t width, int64_t count, int64_t position) const {
  const int64_t d = config.head_width(), half = d / 2;
  if (config.qk_norm) {
    float factors[kPanel] = {};
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t t = 0; t < count; ++t) factors[t] += x[i * width + t] * x[i * width + t];
    }
    for (int64_t t = 0; t < count; ++t) {
      factors[t] = 1.0f / std::sqrt(factors[t] / static_cast<float>(d) + kQkEpsilon);
    }
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t t = 0; t < count; ++t) x[i * width + t] *= factors[t];
    }
  }
  if (!config.rotary) return;
  const float* row = rotation.get() + position * d;
  for (int64_t i = 0; i < half; ++i) {
    float* first = x + i * width;
    float* second = x + (half + i) * width;
    for (int64_t t = 0; t < count; ++t) {
      const float cos = row[t * d + i], sin = row[t * d + half + i];
      const float x1 = first[t], x2 = second[t];
      first[t] = x1 * cos - x2 * sin;
      second[t] = x2 * cos + x1 * sin;
    }
  }
}

// `n` elements of each of `few` tokens, which stand one after the other.
Operand Decoder::State::prepare(DType dtype, const float* from, int64_t n, Scratch& scratch) const {
  switch (dtype) {
    case DType::f32:
      break;
    case DType::bf16:
      for (int t = 0; t < few; ++t) {
        kernels.split_bf16(from + t * n, n, scratch.split.get() + t * n);
      }
      return Operand{scratch.split.get()};
    case DType::i8:
      for (int t = 0; t < few; ++t) {
        scratch.scales[t] = kernels.quantize(from + t * n, n, scratch.ints.get() + t * n);
      }
      return Operand{nullptr, scratch.ints.get(), scratch.scales};
  }
  return Operand{from};
}

// Rows first .. first + rows - 1; a token's results stand `stride` after those of the one before.
void Decoder::State::multiply(const Matrix& m, int64_t first, int64_t rows, const Operand& in,
                              float* out, int64_t stride, Store store) const {
  const float* bias = m.bias ? m.bias + first : nullptr;
  const int64_t at = first * m.cols;
  switch (m.dtype) {
    case DType::f32: {
      const float* w = static_cast<const float*>(m.data) + at;
      if (few == 1) {
        kernels.matvec_f32(w, rows, m.cols, in.floats, bias, out, store);
      } else {
        kernels.few_f32(w, rows, m.cols, in.floats, m.cols, few, bias, out, stride, store);
      }
      break;
    }
    case DType::bf16: {
      const uint16_t* w = static_cast<const uint16_t*>(m.data) + at;
      if (few == 1) {
        kernels.matvec_bf16(w, rows, m.cols, in.floats, bias, out, store);
      } else {
        kernels.few_bf16(w, rows, m.cols, in.floats, m.cols, few, bias, out, stride, store);
      }
      break;
    }
    case DType::i8: {
      const int8_t* w = static_cast<const int8_t*>(m.data) + at;
      const float* scales = m.scales + first;
      if (few == 1) {
        kernels.matvec_i8(w, scales, rows, m.cols, in.ints, in.scales[0], bias, out, store);
      } else {
        kernels.few_i8(w, scales, rows, m.cols, in.ints, in.scales, m.cols, few, bias, out, stride,
                       store);
      }
      break;
    }
  }
}

// Queries, keys and values of one head, and what each token sees: (few, C) of `mixed`.
void Decoder::State::attend_few(size_t l, int64_t head, const Operand& normed, Scratch& scratch) {
  const Matrix& qkv = layers[l].qkv;
  const int64_t c = config.n_embd, d = config.head_width(), at = head * d;
  const float scale = config.attention_scale();
  float* scores = scratch.scores.get();
  float* rows = scratch.rows.get();
  // Of each token, `stride` after the one before.
  const auto ready_all = [&](float* x, int64_t stride) {
    for (int t = 0; prepares && t < few; ++t) ready(x + t * stride, 1, 1, length + t);
  };
  multiply(qkv, at, d, normed, query.get() + at, c, Store::plain);
  ready_all(query.get() + at, c);
  if (narrow_cache) {
    uint16_t* k = keys<uint16_t>(l, head);
    uint16_t* v = values<uint16_t>(l, head);
    multiply(qkv, c + at, d, normed, rows, d, Store::plain);
    ready_all(rows, d);
    kernels.to_bf16(rows, few * d, k + length * d);
    multiply(qkv, 2 * c + at, d, normed, rows, d, Store::plain);
    kernels.to_bf16(rows, few * d, v + length * d);
    for (int t = 0; t < few; ++t) {
      const int64_t seen = length + t + 1;
      kernels.split_bf16(query.get() + t * c + at, d, rows);
      kernels.matvec_bf16(k, seen, d, rows, nullptr, scores, Store::plain);
      kernels.softmax(scores, seen, scale);
      kernels.weighted_sum_bf16(v, seen, d, scores, mixed.get() + t * c + at);
    }
  } else {
    float* k = keys<float>(l, head);
    float* v = values<float>(l, head);
    multiply(qkv, c + at, d, normed, k + length * d, d, Store::plain);
    ready_all(k + length * d, d);
    multiply(qkv, 2 * c + at, d, normed, v + length * d, d, Store::plain);
    for (int t = 0; t < few; ++t) {
      const int64_t seen = length + t + 1;
      kernels.matvec_f32(k, seen, d, query.get() + t * c + at, nullptr, scores, Store::plain);
      kernels.softmax(scores, seen, scale);
      kernels.weighted_sum(v, seen, d, scores, mixed.get() + t * c + at);
    }
  }
}

// Four barriers a layer: what a head reads of its query, key and value it has computed itself, and
// every thread norms the whole vector for itself.
void Decoder::State::step(int thread, int threads) {
  Scratch& scratch = scratches[static_cast<size_t>(thread)];
  const int64_t c = config.n_embd, heads = config.n_head;
  const int64_t first_head = heads * thread / threads;
  const int64_t end_head = heads * (thread + 1) / threads;
  const int64_t first = first_row(c, thread, threads), end = first_row(c, thread + 1, threads);
  const int64_t in = first_row(4 * c, thread, threads);
  const int64_t in_end = first_row(4 * c, thread + 1, threads);
  const int64_t head = first_row(config.vocab_size, thread, threads);
  float* normed = scratch.normed.get();
  Ahead ahead = ahead_of(layers[0].qkv, first_head * config.head_width());
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    ahead.fetch(kLinesAhead);
    norm_few(layer.ln_1, normed);
    Operand operand = prepare(layer.qkv.dtype, normed, c, scratch);
    for (int64_t h = first_head; h < end_head; ++h) attend_few(l, h, operand, scratch);
    ahead = ahead_of(layer.attention_out, first);
    pool->barrier(thread, ahead);

    ahead.fetch(kLinesAhead);
    operand = prepare(layer.attention_out.dtype, mixed.get(), c, scratch);
    multiply(layer.attention_out, first, end - first, operand, x.get() + first, c, Store::add);
    ahead = ahead_of(layer.feed_in, in);
    pool->barrier(thread, ahead);

    ahead.fetch(kLinesAhead);
    norm_few(layer.ln_2, normed);
    operand = prepare(layer.feed_in.dtype, normed, c, scratch);
    multiply(layer.feed_in, in, in_end - in, operand, hidden.get() + in, 4 * c, Store::gelu);
    ahead = ahead_of(layer.feed_out, first);
    pool->barrier(thread, ahead);

    ahead.fetch(kLinesAhead);
    operand = prepare(layer.feed_out.dtype, hidden.get(), 4 * c, scratch);
    multiply(layer.feed_out, first, end - first, operand, x.get() + first, c, Store::add);
    ahead = l + 1 < layers.size() ? ahead_of(layers[l + 1].qkv, first_head * config.head_width())
                                  : ahead_of(tokens_matrix, head);
    pool->barrier(thread, ahead);
  }
  few_to_logits(thread, threads);
}

void Decoder::State::norm_few(const Norm& norm, float* out) const {
  const int64_t c = config.n_embd;
  for (int t = 0; t < few; ++t) {
    kernels.layer_norm(x.get() + t * c, c, norm.weight, norm.bias, out + t * c);
  }
}

// Logits of all `few` tokens where they are wanted, otherwise of the last one.
void Decoder::State::few_to_logits(int thread, int threads) {
  if (!wants_all) {
    logits_rows(thread, threads, x.get() + (few - 1) * config.n_embd);
    return;
  }
  Scratch& scratch = scratches[static_cast<size_t>(thread)];
  const int64_t vocab = config.vocab_size;
  norm_few(ln_f, scratch.normed.get());
  const Operand operand =
      prepare(tokens_matrix.dtype, scratch.normed.get(), config.n_embd, scratch);
  const int64_t first = first_row(vocab, thread, threads);
  const int64_t end = first_row(vocab, thread + 1, threads);
  multiply(tokens_matrix, first, end - first, operand, wants_all + first, vocab, Store::plain);
}

void Decoder::State::logits_rows(int thread, int threads, const float* from) {
  Scratch& scratch = scratches[static_cast<size_t>(thread)];
  float* normed = scratch.normed.get();
  kernels.layer_norm(from, config.n_embd, ln_f.weight, ln_f.bias, normed);
  const Matrix& m = tokens_matrix;
  const int64_t first = first_row(config.vocab_size, thread, threads);
  const int64_t end = first_row(config.vocab_size, thread + 1, threads), rows = end - first;
  float* out = logits.get() + first;
  const int64_t at = first * m.cols;
  switch (m.dtype) {
    case DType::f32:
      kernels.matvec_f32(static_cast<const float*>(m.data) + at, rows, m.cols, normed, nullptr, out,
                         Store::plain);
      break;
    case DType::bf16:
      kernels.split_bf16(normed, m.cols, scratch.split.get());
      kernels.matvec_bf16(static_cast<const uint16_t*>(m.data) + at, rows, m.cols,
                          scratch.split.get(), nullptr, out, Store::plain);
      break;
    case DType::i8: {
      const float scale = kernels.quantize(normed, m.cols, scratch.ints.get());
      kernels.matvec_i8(static_cast<const int8_t*>(m.data) + at, m.scales + first, rows, m.cols,
                        scratch.ints.get(), scale, nullptr, out, Store::plain);
      break;
    }
  }
}

void Decoder::State::multiply_panels(const Matrix& m, int64_t first, int64_t rows,
                                     const Panel* panels, Store store, void* scratch) const {
  const int64_t at = first * m.cols;
  switch (m.dtype) {
    case DType::f32:
      kernels.gemm_f32(static_cast<const float*>(m.data) + at, first, rows, m.cols, m.bias, panels,
                       n_panels, store, scratch);
      break;
    case DType::bf16:
      kernels.gemm_bf16(static_cast<const uint16_t*>(m.data) + at, first, rows, m.cols, m.bias,
                        panels, n_panels, store, scratch);
      break;
    case DType::i8:
      kernels.gemm_i8(static_cast<const int8_t*>(m.data) + at, m.scales + first, first, rows,
                      m.cols, m.bias, panels, n_panels, store, scratch);
      break;
  }
}

// Group `group` of kLanes tokens of (n, lanes) activations into the operand's form, where it is not
// float32 itself.
void Decoder::State::pack(DType dtype, int64_t n, const float* from, int group) const {
  const int p = group * kLanes >= kPanel ? 1 : 0;
  const int within = group * kLanes - p * kPanel;
  const float* in = from + offsets[p] * n + within;
  const int64_t even = (n + 1) / 2 * 2;
  int16_t* out = prompt->packed.get() + offsets[p] * even + 2 * within;
  if (dtype == DType::i8) {
    kernels.pack_i16(in, n, widths[p], out, prompt->scales.get() + group * kLanes);
  } else if (dtype == DType::bf16 && kernels.bf16_pairs) {
    kernels.pack_bf16(in, n, widths[p], reinterpret_cast<uint16_t*>(out));
  }
}

void Decoder::State::panels_of(const float* in, DType dtype, int64_t in_rows, float* out,
                               int64_t out_rows, Panel* panels) const {
  const bool pairs = dtype == DType::i8 || (dtype == DType::bf16 && kernels.bf16_pairs);
  const int64_t even = (in_rows + 1) / 2 * 2;
  for (int p = 0; p < n_panels; ++p) {
    panels[p].x = pairs ? static_cast<const void*>(prompt->packed.get() + offsets[p] * even)
                        : static_cast<const void*>(in + offsets[p] * in_rows);
    panels[p].scales = prompt->scales.get() + offsets[p];
    panels[p].out = out + offsets[p] * out_rows;
    panels[p].width = widths[p];
  }
}

// Key and value of one head and token, whose features are `stride` apart, to row `row` / D.
void Decoder::State::store_key_value(size_t l, int64_t head, int64_t row, const float* key,
                                     const float* value, int64_t stride, float* line) const {
  const int64_t d = config.head_width();
  const auto store = [&](const float* from, float* wide, uint16_t* narrow) {
    float* to = narrow_cache ? line : wide;
    for (int64_t i = 0; i < d; ++i) to[i] = from[i * stride];
    if (narrow_cache) kernels.to_bf16(line, d, narrow);
  };
  store(key, keys<float>(l, head) + row, keys<uint16_t>(l, head) + row);
  store(value, values<float>(l, head) + row, values<uint16_t>(l, head) + row);
}

void Decoder::State::block(int thread, int threads) {
  Scratch& scratch = scratches[static_cast<size_t>(thread)];
  PromptBuffers& b = *prompt;
  const int64_t c = config.n_embd, d = config.head_width(), heads = config.n_head;
  const int groups = (widths[0] + widths[1]) / kLanes;
  const float scale = config.attention_scale();
  int64_t phase = 0;
  // Takes one of `count` pieces after another until none is left, then waits for the others.
  const auto share = [&](int64_t count, auto&& work) {
    std::atomic<int64_t>& counter = counters[phase % 3];
    for (int64_t i; (i = counter.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    pool->barrier(thread);
    if (thread == 0) counters[(phase + 2) % 3].store(0, std::memory_order_relaxed);
    ++phase;
  };
  const auto at_group = [&](float* base, int64_t n, int64_t group) {
    const int p = group * kLanes >= kPanel ? 1 : 0;
    return base + offsets[p] * n + group * kLanes - p * kPanel;
  };
  const auto width_of = [&](int64_t group) { return widths[group * kLanes >= kPanel ? 1 : 0]; };
  const auto norm = [&](const Norm& weights, DType dtype, int64_t group) {
    kernels.norm_group(at_group(b.x.get(), c, group), c, width_of(group), weights.weight,
                       weights.bias, at_group(b.y.get(), c, group));
    pack(dtype, c, b.y.get(), static_cast<int>(group));
  };
  const auto product = [&](const Matrix& m, const float* in, float* out, Store store) {
    Panel panels[2];
    panels_of(in, m.dtype, m.cols, out, m.rows, panels);
    share((m.rows + kRowBlock - 1) / kRowBlock, [&](int64_t i) {
      const int64_t first = i * kRowBlock;
      multiply_panels(m, first, std::min(kRowBlock, m.rows - first), panels, store,
                      scratch.gemm.get());
    });
  };

  share(groups, [&](int64_t group) {
    float* to = at_group(b.x.get(), c, group);
    const int width = width_of(group);
    for (int t = 0; t < kLanes; ++t) {
      const int64_t token = group * kLanes + t;
      if (token < block_count) {
        for (int64_t i = 0; i < c; ++i) {
          to[i * width + t] = embedded(block_tokens[token], length + token, i);
        }
      } else {
        for (int64_t i = 0; i < c; ++i) to[i * width + t] = 0.0f;
      }
    }
  });
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    share(groups, [&](int64_t group) { norm(layer.ln_1, layer.qkv.dtype, group); });
    product(layer.qkv, b.y.get(), b.qkv.get(), Store::plain);
    share(heads, [&](int64_t h) {
      for (int p = 0; p < n_panels; ++p) {
        float* qkv = b.qkv.get() + offsets[p] * 3 * c;
        const int64_t w = widths[p];
        const int64_t real = std::min<int64_t>(w, block_count - offsets[p]);
        if (prepares) {
          ready(qkv + h * d * w, w, real, length + offsets[p]);
          ready(qkv + (c + h * d) * w, w, real, length + offsets[p]);
        }
        for (int64_t t = 0; t < real; ++t) {
          const int64_t row = (length + offsets[p] + t) * d;
          store_key_value(l, h, row, qkv + (c + h * d) * w + t, qkv + (2 * c + h * d) * w + t, w,
                          scratch.row.get());
        }
      }
      const int64_t seen = length + block_count;
      const float* k = keys<float>(l, h);
      const float* v = values<float>(l, h);
      if (narrow_cache) {
        kernels.from_bf16(keys<uint16_t>(l, h), seen * d, scratch.wide_keys.get());
        kernels.from_bf16(values<uint16_t>(l, h), seen * d, scratch.wide_values.get());
        k = scratch.wide_keys.get();
        v = scratch.wide_values.get();
      }
      for (int64_t group = 0; group < groups; ++group) {
        const float* q = at_group(b.qkv.get(), 3 * c, group) + h * d * width_of(group);
        float* out = at_group(b.y.get(), c, group) + h * d * width_of(group);
        kernels.attend(q, width_of(group), k, v, length + group * kLanes, seen, d, scale,
                       scratch.scores.get(), out);
      }
    });
    const auto pack_groups = [&](DType dtype, int64_t n, const float* from) {
      if (dtype == DType::f32 || (dtype == DType::bf16 && !kernels.bf16_pairs)) return;
      share(groups, [&](int64_t group) { pack(dtype, n, from, static_cast<int>(group)); });
    };
    pack_groups(layer.attention_out.dtype, c, b.y.get());
    product(layer.attention_out, b.y.get(), b.x.get(), Store::add);
    share(groups, [&](int64_t group) { norm(layer.ln_2, layer.feed_in.dtype, group); });
    product(layer.feed_in, b.y.get(), b.hidden.get(), Store::gelu);
    pack_groups(layer.feed_out.dtype, 4 * c, b.hidden.get());
    product(layer.feed_out, b.hidden.get(), b.x.get(), Store::add);
  }
  if (wants_all) {
    const Matrix& m = tokens_matrix;
    share(groups, [&](int64_t group) { norm(ln_f, m.dtype, group); });
    share((m.rows + kRowBlock - 1) / kRowBlock, [&](int64_t i) {
      const int64_t first = i * kRowBlock, rows = std::min(kRowBlock, m.rows - first);
      // Rows go to this thread's own panels, and from there to their tokens.
      Matrix part = m;
      part.data = static_cast<const char*>(m.data) +
                  static_cast<size_t>(first * m.cols) * bytes_of(m.dtype);
      part.scales = m.scales ? m.scales + first : nullptr;
      Panel panels[2];
      panels_of(b.y.get(), m.dtype, m.cols, scratch.rows.get(), kRowBlock, panels);
      multiply_panels(part, 0, rows, panels, Store::plain, scratch.gemm.get());
      for (int64_t t = 0; t < block_count; ++t) {
        const int p = t >= kPanel ? 1 : 0;
        const float* from = panels[p].out + t - offsets[p];
        for (int64_t r = 0; r < rows; ++r) {
          wants_all[t * m.rows + first + r] = from[r * widths[p]];
        }
      }
    });
  }
  if (wants_last) {
    const int64_t t = block_count - 1;
    const int p = t >= kPanel ? 1 : 0;
    if (thread == 0) {
      for (int64_t i = 0; i < c; ++i) {
        b.last.get()[i] = b.x.get()[(offsets[p] * c + i * widths[p]) + t - offsets[p]];
      }
    }
    pool->barrier(thread);
    logits_rows(thread, threads, b.last.get());
  }
}

int Decoder::State::threads_for_step() {
  return under_trial ? candidates[static_cast<size_t>(trial) % candidates.size()] : chosen.load();
}

void Decoder::State::took(double seconds) {
  if (candidates.empty()) return;
  ++trial;
  if (!under_trial) {
    if (trial == kStepsOfAChoice) start_trial();
    return;
  }
  const size_t which = static_cast<size_t>(trial - 1) % candidates.size();
  best_seconds[which] = std::min(best_seconds[which], seconds);
  if (trial < kTrials * static_cast<int>(candidates.size())) return;
  const auto best = std::min_element(best_seconds.begin(), best_seconds.end());
  chosen = candidates[static_cast<size_t>(best - best_seconds.begin())];
  under_trial = false;
  trial = 0;
}

void Decoder::State::start_trial() {
  under_trial = true;
  trial = 0;
  best_seconds.assign(candidates.size(), 1e30);
}

const float* Decoder::State::append(const int32_t* tokens, int64_t count, float* all) {
  check_tokens(tokens, count);
  if (config.rotary) turn_to(length + count);
  if (count <= kFew) {
    few = static_cast<int>(count);
    for (int t = 0; t < few; ++t) {
      for (int64_t i = 0; i < config.n_embd; ++i) {
        x.get()[t * config.n_embd + i] = embedded(tokens[t], length + t, i);
      }
    }
    wants_all = all;
    const auto started = std::chrono::steady_clock::now();
    pool->run([](void* self, int thread,
                 int threads) { static_cast<State*>(self)->step(thread, threads); },
              this, threads_for_step());
    if (count == 1) {
      took(std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    }
    length += count;
    return logits.get();
  }
  const int64_t lanes = (std::min(count, kBlock) + kLanes - 1) / kLanes * kLanes;
  if (lanes > largest_block) {
    prompt.reset();
    largest_block = 0;  // where memory is refused, the next call asks again
    prompt = std::make_unique<PromptBuffers>(config, lanes);
    largest_block = lanes;
  }
  for (int64_t done = 0; done < count; done += block_count) {
    block_tokens = tokens + done;
    block_count = std::min(kBlock, count - done);
    const int rounded = static_cast<int>((block_count + kLanes - 1) / kLanes * kLanes);
    widths[0] = std::min(rounded, kPanel);
    widths[1] = rounded - widths[0];
    offsets[1] = widths[0];
    n_panels = widths[1] ? 2 : 1;
    wants_last = done + block_count == count && !all;
    wants_all = all ? all + done * config.vocab_size : nullptr;
    for (auto& counter : counters) counter.store(0, std::memory_order_relaxed);
    pool->run([](void* self, int thread,
                 int threads) { static_cast<State*>(self)->block(thread, threads); },
              this, pool->size());
    length += block_count;
  }
  return logits.get();
}

Decoder::Decoder(const Weights& weights, int threads) {
  check(weights);
  state_ = std::make_unique<State>(weights, threads);
}
Decoder::~Decoder() = default;
const Config& Decoder::config() const { return state_->config; }
const float* Decoder::append(const int32_t* tokens, int64_t count) {
  return state_->append(tokens, count, nullptr);
}
void Decoder::append_all(const int32_t* tokens, int64_t count, float* logits) {
  state_->append(tokens, count, logits);
}
int64_t Decoder::length() const { return state_->length; }
void Decoder::reset() { state_->length = 0; }
int Decoder::threads() const { return state_->chosen; }
const char* Decoder::instruction_set() const { return state_->kernels.name; }

}  // namespace nanogpt
