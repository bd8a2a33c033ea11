// The forward and the backward pass, phase by phase. All threads run each phase on their part of
// the rows, columns or heads and meet at a barrier.
#include "engine/training.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>

#include "engine/error.h"
#include "engine/kernels.h"
#include "engine/sampler.h"

namespace nanogpt {

namespace {

constexpr int64_t kNormRows = 64;                   // whose sums are made by one thread
constexpr int64_t kLogitRows = 256;                 // at least
constexpr int64_t kLogitBytes = int64_t{64} << 20;  // at a time
constexpr uint32_t kDropoutStream = 3;              // of the random numbers of one seed
constexpr int64_t kMostWidth = 1024;                // of a head

struct Part {
  int64_t first, last;
};

// This thread's share of `count` things that come `step` at a time.
Part part_of(int64_t count, int64_t step, int thread, int threads) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t first = steps * thread / threads, last = steps * (thread + 1) / threads;
  return {std::min(count, first * step), std::min(count, last * step)};
}

int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Pieces of one allocation; counted first with no memory, then handed out.
class Layout {
 public:
  explicit Layout(char* memory) : memory_(memory) {}
  char* bytes(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += up_to(count, 64);
    return piece;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * 4)); }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

constexpr int64_t kHugePage = int64_t{1} << 21;

// Memory of which the system may make large pages: fewer translations, and pieces that do not
// compete for the same lines of a cache by chance.
char* reserve(int64_t bytes) {
  const int64_t step = bytes < kHugePage ? 64 : kHugePage;
  bytes = up_to(bytes, step);
  void* memory = std::aligned_alloc(static_cast<size_t>(step), static_cast<size_t>(bytes));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (step == kHugePage) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish
#endif
  return static_cast<char*>(memory);
}

}  // namespace

const TrainingKernels* training_kernels(bool bf16) {
  // What NANOGPT_ISA names, or the widest set that runs; which precision is worth its while is
  // measured by who asks.
  const char* named = std::getenv("NANOGPT_ISA");
  const std::string only = named && *named ? choose_kernels().name : "";
  const auto may = [&](const char* name) { return only.empty() ? runs_here(name) : only == name; };
#if defined(__x86_64__)
  if (bf16) return may("avx512_bf16") ? &kAvx512Bf16Training : nullptr;
  if (may("avx512") || may("avx512_bf16")) return &kAvx512Training;
  if (may("avx2")) return &kAvx2Training;
#elif defined(__aarch64__)
  if (!bf16 && may("neon")) return &kNeonTraining;
#endif
  return bf16 ? nullptr : &kScalarTraining;
}

struct TrainingStep::Job {
  Workspace& space;
  const int64_t* windows;
  int64_t batch, positions, rows;  // B, T, N = B T
  double scale;
  bool add, backward;
  uint64_t dropout_seed;
  bool drops;
  int64_t token(int64_t row) const {
    return windows[row / positions * (positions + 1) + row % positions];
  }
  int64_t target(int64_t row) const {
    return windows[row / positions * (positions + 1) + row % positions + 1];
  }
};

void TrainingStep::Free::operator()(char* memory) const { std::free(memory); }

std::string TrainingStep::unfit(const TrainingShape& shape, bool bf16) {
  const Config& c = shape.config;
  const int64_t width = c.head_width();
  if (training_kernels(bf16) == nullptr) return "this CPU has no fast products of bfloat16";
  if (c.n_embd % 2 || width % 2) return "a width is odd";
  if (width > kMostWidth) return "heads are wider than " + std::to_string(kMostWidth);
  return "";
}

TrainingStep::TrainingStep(const TrainingShape& shape, const std::vector<Trained>& parameters,
                           bool bf16, int threads, bool recompute)
    : shape_(shape),
      parameters_(parameters),
      kernels_([&]() -> const TrainingKernels& {
        const std::string reason = unfit(shape, bf16);
        if (!reason.empty()) throw UsageError("the native training step cannot run: " + reason);
        return *training_kernels(bf16);
      }()),
      pool_(threads),
      recompute_(recompute) {
  const Config& c = shape_.config;
  const int64_t width = c.n_embd;
  tokens_ = parameter("transformer.wte.weight", c.vocab_size * width);
  if (!shape_.config.rotary) positions_ = parameter("transformer.wpe.weight", c.block_size * width);
  for (int64_t i = 0; i < c.n_layer; ++i) {
    const std::string name = "transformer.h." + std::to_string(i) + ".";
    layers_.push_back(
        {norm(name + "ln_1"), norm(name + "ln_2"), linear(name + "attn.c_attn", 3 * width, width),
         linear(name + "attn.c_proj", width, width), linear(name + "mlp.c_fc", 4 * width, width),
         linear(name + "mlp.c_proj", width, 4 * width)});
  }
  last_norm_ = norm("transformer.ln_f");
  if (shape_.config.rotary) {
    const int64_t half = c.head_width() / 2;
    for (int64_t t = 0; t < c.block_size; ++t) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = c.angle(t, i);
        cosines_.push_back(static_cast<float>(std::cos(angle)));
        sines_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
}

Trained TrainingStep::parameter(const std::string& name, int64_t count) const {
  for (const Trained& each : parameters_) {
    if (each.name != name) continue;
    if (each.count == count) return each;
    throw InputError("parameter " + name + " has " + std::to_string(each.count) + " numbers, not " +
                     std::to_string(count));
  }
  throw InputError("parameter " + name + " is missing");
}

TrainingStep::Norm TrainingStep::norm(const std::string& name) const {
  const int64_t width = shape_.config.n_embd;
  return {parameter(name + ".weight", width),
          shape_.config.bias ? parameter(name + ".bias", width) : Trained{}};
}

TrainingStep::Linear TrainingStep::linear(const std::string& name, int64_t rows,
                                          int64_t cols) const {
  return {parameter(name + ".weight", rows * cols),
          shape_.config.bias ? parameter(name + ".bias", rows) : Trained{}, rows, cols};
}

void TrainingStep::prepare(Workspace& space, int64_t batch, int64_t positions, bool backward) {
  if (space.batch == batch && space.positions == positions) return;
  const Config& c = shape_.config;
  const int64_t width = c.n_embd, n = batch * positions, e = kernels_.element_bytes;
  const int64_t vocab = up_to(c.vocab_size, 2);
  const size_t kept = backward ? static_cast<size_t>(c.n_layer) : 1;
  const auto lay_out = [&](Workspace& s, char* memory) {
    Layout layout(memory);
    s.layers.resize(kept);
    for (Kept& k : s.layers) {
      k.x = layout.floats(n * width);
      if (recompute_ && &k != s.layers.data()) {
        float* x = k.x;
        k = s.layers[0];
        k.x = x;
        continue;
      }
      k.middle = layout.floats(n * width);
      k.first = layout.bytes(n * width * e);
      k.second = layout.bytes(n * width * e);
      k.first_stats = layout.floats(2 * n);
      k.second_stats = layout.floats(2 * n);
      k.qkv = layout.bytes(3 * n * width * e);
      k.mixed = layout.bytes(n * width * e);
      k.lse = layout.floats(n * c.n_head);
      k.before = layout.bytes(4 * n * width * e);
      k.after = layout.bytes(4 * n * width * e);
    }
    s.last = layout.floats(n * width);
    if (backward && shape_.dropout > 0.0f) {
      s.kept = reinterpret_cast<uint8_t*>(layout.bytes((2 * c.n_layer + 1) * n * width));
    }
    s.hidden = layout.bytes(n * width * e);
    s.last_stats = layout.floats(2 * n);
    s.losses = layout.floats(n);
    // Fewer rows would read and write the embedding's gradient too often.
    s.chunk = std::max(kLogitBytes / (4 * c.vocab_size), kLogitRows);
    s.chunk = std::min(n, up_to(s.chunk, 2));
    s.logits = layout.floats(s.chunk * c.vocab_size);
    // The widest of a layer's packed matrices: weights by either side, activations by tokens.
    const int64_t weights =
        std::max(kernels_.packed_bytes(4 * width, width), kernels_.packed_bytes(width, 4 * width));
    const int64_t rows = backward ? kernels_.packed_bytes(n, 4 * width) : 0;
    s.right = layout.bytes(std::max(weights, rows));
    s.left = layout.bytes(weights);
    s.head = layout.bytes(kernels_.packed_bytes(width, c.vocab_size));
    if (backward) {
      s.pair = layout.bytes(kernels_.packed_bytes(n, width));
      s.head_back = layout.bytes(kernels_.packed_bytes(c.vocab_size, width));
      s.grad_logits = layout.bytes(s.chunk * vocab * e);
      s.narrow = layout.bytes(n * width * e);
      s.wide = layout.bytes(4 * n * width * e);
      s.grad_qkv = layout.bytes(3 * n * width * e);
      s.grad = layout.floats(n * width);
      s.dy = layout.floats(n * width);
      const int64_t chunks = (n + kNormRows - 1) / kNormRows;
      for (float*& sums : s.sums) sums = layout.floats(chunks * 2 * width);
    }
    const int64_t scratch =
        std::max(kernels_.head_scratch(positions, c.head_width()), kernels_.product_scratch);
    s.scratch.resize(static_cast<size_t>(pool_.size()));
    for (char*& each : s.scratch) each = layout.bytes(scratch);
    return layout.used();
  };
  space.batch = 0;
  const int64_t bytes = up_to(lay_out(space, nullptr), 64);
  if (bytes > space.bytes) {
    space.memory.reset();
    space.bytes = 0;
    space.memory.reset(reserve(bytes));
    space.bytes = bytes;
  }
  lay_out(space, space.memory.get());
  space.batch = batch;
  space.positions = positions;
}

// Sixteen random bits decide a number: it is dropped where they are below the threshold.
void TrainingStep::draw_masks(Job& job, int thread, int threads) {
  const int64_t count = (2 * shape_.config.n_layer + 1) * job.rows * shape_.config.n_embd;
  const auto threshold = static_cast<uint32_t>(std::lround(shape_.dropout * 65536.0f));
  const Part part = part_of(count, 8, thread, threads);
  for (int64_t i = part.first; i < part.last; i += 8) {
    const uint64_t block = static_cast<uint64_t>(i / 8);
    const std::array<uint32_t, 4> words = philox(
        {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, kDropoutStream},
        {static_cast<uint32_t>(job.dropout_seed), static_cast<uint32_t>(job.dropout_seed >> 32)});
    const int64_t left = std::min<int64_t>(8, part.last - i);
    for (int64_t j = 0; j < left; ++j) {
      const uint32_t bits = words[static_cast<size_t>(j / 2)] >> (j % 2 * 16) & 0xffffu;
      job.space.kept[i + j] = bits >= threshold ? 1 : 0;
    }
  }
}

std::vector<uint8_t> TrainingStep::dropout_masks() const {
  const Workspace& s = spaces_[1];
  if (s.kept == nullptr) return {};
  const int64_t each = s.batch * s.positions * shape_.config.n_embd;
  return std::vector<uint8_t>(s.kept, s.kept + (2 * shape_.config.n_layer + 1) * each);
}

// out = x + the branch in `dy`, of which mask number `mask` drops a part.
void TrainingStep::add_branch(Job& job, int64_t mask, const float* x, float* out, int thread,
                              int threads) {
  const int64_t width = shape_.config.n_embd, all = job.rows * width;
  const Part part = part_of(all, 64, thread, threads);
  const float scale = 1.0f / (1.0f - shape_.dropout);
  kernels_.drop(x ? x + part.first : nullptr, scale, job.space.kept + mask * all + part.first,
                job.space.dy + part.first, part.last - part.first, out + part.first);
}

int64_t TrainingStep::workspace_bytes() const {
  return spaces_[0].bytes + spaces_[1].bytes + muon_bytes_ * pool_.size();
}

double TrainingStep::gradients(const int64_t* windows, int64_t batch, int64_t positions,
                               double scale, bool add, uint64_t dropout_seed) {
  return run(windows, batch, positions, scale, add, true, dropout_seed);
}

double TrainingStep::loss(const int64_t* windows, int64_t batch, int64_t positions) {
  return run(windows, batch, positions, 1.0, false, false, 0);
}

double TrainingStep::run(const int64_t* windows, int64_t batch, int64_t positions, double scale,
                         bool add, bool backward, uint64_t dropout_seed) {
  const Config& c = shape_.config;
  if (batch < 1) throw UsageError("there are no windows");
  if (positions < 1 || positions > c.block_size) {
    throw UsageError("windows of " + std::to_string(positions) +
                     " tokens do not fit the context of " + std::to_string(c.block_size));
  }
  for (int64_t i = 0; i < batch * (positions + 1); ++i) {
    if (windows[i] < 0 || windows[i] >= c.vocab_size) {
      throw UsageError("token " + std::to_string(windows[i]) + " is outside the vocabulary of " +
                       std::to_string(c.vocab_size));
    }
  }
  Workspace& space = spaces_[backward ? 1 : 0];
  prepare(space, batch, positions, backward);
  Job job{space, windows, batch,    positions,    batch * positions,
          scale, add,     backward, dropout_seed, backward && shape_.dropout > 0.0f};
  struct Context {
    TrainingStep* self;
    Job* job;
  } context{this, &job};
  pool_.run(
      [](void* given, int thread, int threads) {
        auto& [self, the_job] = *static_cast<Context*>(given);
        self->forward(*the_job, thread, threads);
        self->head(*the_job, thread, threads);
        if (the_job->backward) self->backward(*the_job, thread, threads);
      },
      &context, pool_.size());
  double sum = 0.0;
  for (int64_t row = 0; row < job.rows; ++row) sum += static_cast<double>(space.losses[row]);
  return sum / static_cast<double>(job.rows);
}

void TrainingStep::norm_rows(Job& job, const Norm& norm, const float* x, char* y, float* stats,
                             int thread, int threads) {
  const int64_t width = shape_.config.n_embd;
  const Part part = part_of(job.rows, 1, thread, threads);
  kernels_.norm(x + part.first * width, part.last - part.first, width, norm.weight.weight,
                norm.bias.weight, y + part.first * width * kernels_.element_bytes,
                stats + 2 * part.first);
}

// Whether a thread takes whole panels of a product rather than rows: where there are more columns
// than rows, so that each panel is read once.
bool TrainingStep::takes_panels(int64_t rows, int64_t cols, int threads) const {
  return cols > rows && cols > (2 * threads - 1) * kernels_.tile_cols;
}

// Panels that one thread alone reads are packed by it, in pieces that stay near: a large weight
// crosses the memory once instead of three times.
bool TrainingStep::packs_late(int64_t rows, const Operand& right, int threads) const {
  return takes_panels(rows, right.cols, threads) && right.depth <= kernels_.packed_depth;
}

// As (rows, cols) the weight is the right operand of the backward pass; by columns, of the other.
Operand TrainingStep::operand_of(const Linear& linear, bool by_column) {
  const int64_t depth = by_column ? linear.cols : linear.rows;
  const int64_t cols = by_column ? linear.rows : linear.cols;
  return {linear.weight.weight, linear.cols, depth, cols, by_column, true};
}

void TrainingStep::pack_weight(int64_t rows, const Linear& linear, bool by_column, char* to,
                               int thread, int threads) {
  const Operand from = operand_of(linear, by_column);
  if (packs_late(rows, from, threads)) return;
  const int64_t panels = (from.cols + kernels_.tile_cols - 1) / kernels_.tile_cols;
  const Part part = part_of(panels, 1, thread, threads);
  kernels_.pack(from, part.first, part.last, to);
}

void TrainingStep::pack_rows(const char* x, int64_t rows, int64_t cols, char* to, int thread,
                             int threads) {
  const Operand from{x, cols, rows, cols, false, false};
  const int64_t panels = (cols + kernels_.tile_cols - 1) / kernels_.tile_cols;
  const Part part = part_of(panels, 1, thread, threads);
  kernels_.pack(from, part.first, part.last, to);
}

void TrainingStep::multiply(Job& job, const Product& product, int thread, int threads) {
  const int64_t panels = (product.cols + kernels_.tile_cols - 1) / kernels_.tile_cols;
  const int64_t tiles = (product.rows + kernels_.tile_rows - 1) / kernels_.tile_rows;
  const bool by_panels = product.a_transposed ? tiles < 2 * threads
                                              : takes_panels(product.rows, product.cols, threads);
  char* scratch = job.space.scratch[static_cast<size_t>(thread)];
  if (by_panels) {
    const Part part = part_of(panels, 1, thread, threads);
    kernels_.multiply(product, 0, product.rows, part.first, part.last, scratch);
  } else {
    const Part part = part_of(product.rows, kernels_.tile_rows, thread, threads);
    kernels_.multiply(product, part.first, part.last, 0, panels, scratch);
  }
}

// A product whose right operand is a weight, packed by `pack_weight` unless it is packed late.
void TrainingStep::multiply_weight(Job& job, const Linear& linear, bool by_column,
                                   const Product& product, int thread, int threads) {
  Product p = product;
  p.right = operand_of(linear, by_column);
  if (packs_late(p.rows, p.right, threads)) p.b = nullptr;
  multiply(job, p, thread, threads);
}

void TrainingStep::heads(Job& job, const Kept& kept, const char* grad_out, int thread,
                         int threads) {
  const Config& c = shape_.config;
  const int64_t width = c.head_width(), e = kernels_.element_bytes;
  const Part part = part_of(job.batch * c.n_head, 1, thread, threads);
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    const int64_t row = unit / c.n_head * job.positions, column = unit % c.n_head * width;
    Head head;
    head.qkv = kept.qkv + (row * 3 * c.n_embd + column) * e;
    head.positions = job.positions;
    head.width = width;
    head.model_width = c.n_embd;
    head.scale = shape_.config.attention_scale();
    head.normed = shape_.config.qk_norm;
    if (shape_.config.rotary) {
      head.cosines = cosines_.data();
      head.sines = sines_.data();
    }
    head.out = kept.mixed + (row * c.n_embd + column) * e;
    head.lse = kept.lse + unit * job.positions;
    head.scratch = job.space.scratch[static_cast<size_t>(thread)];
    if (grad_out != nullptr) {
      head.grad_out = grad_out + (row * c.n_embd + column) * e;
      head.grad_qkv = job.space.grad_qkv + (row * 3 * c.n_embd + column) * e;
      kernels_.attend_backward(head);
    } else {
      kernels_.attend(head);
    }
  }
}

namespace {

Product product_with(const void* a, int64_t rows, int64_t depth, const char* b, int64_t cols,
                     Finish finish, void* out, const float* bias = nullptr, void* other = nullptr) {
  Product p;
  p.a = a;
  p.a_ld = depth;
  p.b = b;
  p.b_depth = depth;
  p.rows = rows;
  p.cols = cols;
  p.depth = depth;
  p.finish = finish;
  p.out = out;
  p.other = other;
  p.ld = cols;
  p.bias = bias;
  return p;
}

}  // namespace

void TrainingStep::forward(Job& job, int thread, int threads) {
  Workspace& s = job.space;
  const int64_t width = shape_.config.n_embd, n = job.rows;
  const Part rows = part_of(n, 1, thread, threads);
  float* x = s.layers[0].x;
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const float* position =
        shape_.config.rotary ? nullptr : positions_.weight + row % job.positions * width;
    kernels_.embed(tokens_.weight + job.token(row) * width, position, width,
                   (job.drops ? s.dy : x) + row * width);
  }
  if (job.drops) {
    draw_masks(job, thread, threads);
    pool_.barrier(thread);
    add_branch(job, 0, nullptr, x, thread, threads);
    pool_.barrier(thread);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    float* next = i + 1 == layers_.size() ? s.last : s.layers[job.backward ? i + 1 : 0].x;
    forward_layer(job, i, x, next, thread, threads);
    x = next;
  }
  norm_rows(job, last_norm_, s.last, s.hidden, s.last_stats, thread, threads);
}

// From the residual stream `x` into the layer to the one after it, or, where `next` is null, only
// to what the backward pass reads.
void TrainingStep::forward_layer(Job& job, size_t i, const float* x, float* next, int thread,
                                 int threads) {
  Workspace& s = job.space;
  const int64_t width = shape_.config.n_embd, n = job.rows;
  const Layer& layer = layers_[i];
  const Kept& k = s.layers[job.backward ? i : 0];
  norm_rows(job, layer.ln_1, x, k.first, k.first_stats, thread, threads);
  pack_weight(n, layer.attention, true, s.left, thread, threads);
  pool_.barrier(thread);
  multiply_weight(job, layer.attention, true,
                  product_with(k.first, n, width, s.left, 3 * width, Finish::store, k.qkv,
                               layer.attention.bias.weight),
                  thread, threads);
  pack_weight(n, layer.projection, true, s.right, thread, threads);
  pool_.barrier(thread);
  heads(job, k, nullptr, thread, threads);
  pool_.barrier(thread);
  // A branch of which a part is dropped stands by itself first.
  const auto branch = [&](const char* from, int64_t depth, const Linear& linear, const float* base,
                          float* out) {
    const bool drops = job.drops;
    multiply_weight(
        job, linear, true,
        product_with(from, n, depth, s.right, width, drops ? Finish::wide : Finish::residual,
                     drops ? s.dy : out, linear.bias.weight, const_cast<float*>(base)),
        thread, threads);
  };
  const auto mask = static_cast<int64_t>(2 * i + 1);
  branch(k.mixed, width, layer.projection, x, k.middle);
  pack_weight(n, layer.up, true, s.left, thread, threads);
  pool_.barrier(thread);
  if (job.drops) {
    add_branch(job, mask, x, k.middle, thread, threads);
    pool_.barrier(thread);
  }
  norm_rows(job, layer.ln_2, k.middle, k.second, k.second_stats, thread, threads);
  pack_weight(n, layer.down, true, s.right, thread, threads);
  pool_.barrier(thread);
  multiply_weight(job, layer.up, true,
                  product_with(k.second, n, width, s.left, 4 * width, Finish::gelu, k.after,
                               layer.up.bias.weight, k.before),
                  thread, threads);
  pool_.barrier(thread);
  if (next == nullptr) return;
  branch(k.after, 4 * width, layer.down, k.middle, next);
  pool_.barrier(thread);
  if (job.drops) {
    add_branch(job, mask + 1, k.middle, next, thread, threads);
    pool_.barrier(thread);
  }
}

void TrainingStep::head(Job& job, int thread, int threads) {
  Workspace& s = job.space;
  const Config& c = shape_.config;
  const int64_t width = c.n_embd, n = job.rows, vocab = up_to(c.vocab_size, 2);
  const int64_t e = kernels_.element_bytes;
  const Linear weight{tokens_, Trained{}, c.vocab_size, width};
  const int64_t most = std::min(s.chunk, n);
  pack_weight(most, weight, true, s.head, thread, threads);
  if (job.backward) pack_weight(most, weight, false, s.head_back, thread, threads);
  pool_.barrier(thread);
  const float scale = static_cast<float>(job.scale / static_cast<double>(n));
  for (int64_t start = 0; start < n; start += s.chunk) {
    const int64_t rows = std::min(s.chunk, n - start);
    const char* hidden = s.hidden + start * width * e;
    multiply_weight(job, weight, true,
                    product_with(hidden, rows, width, s.head, c.vocab_size, Finish::wide, s.logits),
                    thread, threads);
    if (job.backward) pack_rows(hidden, rows, width, s.pair, thread, threads);
    pool_.barrier(thread);
    const Part part = part_of(rows, 1, thread, threads);
    for (int64_t row = part.first; row < part.last; ++row) {
      void* grad = job.backward ? s.grad_logits + row * vocab * e : nullptr;
      s.losses[start + row] = kernels_.cross_entropy(s.logits + row * c.vocab_size, c.vocab_size,
                                                     job.target(start + row), scale, vocab, grad);
    }
    pool_.barrier(thread);
    if (!job.backward) continue;
    Product back = product_with(s.grad_logits, rows, c.vocab_size, s.head_back, width, Finish::wide,
                                s.dy + start * width);
    back.a_ld = vocab;
    multiply_weight(job, weight, false, back, thread, threads);
    Product own = product_with(s.grad_logits, c.vocab_size, rows, s.pair, width,
                               job.add || start > 0 ? Finish::add : Finish::wide, tokens_.grad);
    own.a_transposed = true;
    own.a_ld = vocab;
    multiply(job, own, thread, threads);
    pool_.barrier(thread);
  }
}

void TrainingStep::norm_backward_rows(Job& job, const Norm& norm, const float* x,
                                      const float* stats, bool first, int which, int64_t mask,
                                      int thread, int threads) {
  Workspace& s = job.space;
  const int64_t width = shape_.config.n_embd;
  const float scale = 1.0f / (1.0f - shape_.dropout);
  const Part part = part_of(job.rows, kNormRows, thread, threads);
  for (int64_t row = part.first; row < part.last; row += kNormRows) {
    const int64_t rows = std::min(kNormRows, part.last - row);
    float* sums = s.sums[which] + row / kNormRows * 2 * width;
    std::memset(sums, 0, static_cast<size_t>(2 * width) * 4);
    kernels_.norm_backward(s.dy + row * width, x + row * width, stats + 2 * row, rows, width,
                           norm.weight.weight, first, s.grad + row * width,
                           s.narrow + row * width * kernels_.element_bytes, sums);
    if (!job.drops) continue;
    // The gradient to the branch that is dropped in part; `dy` of these rows has been read.
    const int64_t first_number = row * width, count = rows * width;
    kernels_.drop(nullptr, scale, s.kept + mask * job.rows * width + first_number,
                  s.grad + first_number, count, s.dy + first_number);
    if (mask == 0) {
      std::memcpy(s.grad + first_number, s.dy + first_number, static_cast<size_t>(count) * 4);
    } else {
      kernels_.narrow(1.0f, s.dy + first_number, count,
                      s.narrow + first_number * kernels_.element_bytes);
    }
  }
}

void TrainingStep::norm_sums(Job& job, const Norm& norm, int which, int thread, int threads) {
  const int64_t width = shape_.config.n_embd;
  const Part part = part_of(width, 16, thread, threads);
  const int64_t count = part.last - part.first;
  if (count <= 0) return;
  const float* sums = job.space.sums[which] + part.first;
  for (int which_one = 0; which_one < 2; ++which_one, sums += width) {
    float* grad = which_one == 0 ? norm.weight.grad : norm.bias.grad;
    if (grad == nullptr) continue;
    grad += part.first;
    if (!job.add) std::memset(grad, 0, static_cast<size_t>(count) * 4);
    for (int64_t row = 0, chunk = 0; row < job.rows; row += kNormRows, ++chunk) {
      kernels_.add(sums + chunk * 2 * width, count, grad);
    }
  }
}

void TrainingStep::bias_sums(Job& job, const Linear& linear, const char* x, int thread,
                             int threads) {
  if (linear.bias.grad == nullptr) return;
  const Part part = part_of(linear.rows, 16, thread, threads);
  const int64_t count = part.last - part.first;
  if (count <= 0) return;
  float* grad = linear.bias.grad + part.first;
  if (!job.add) std::memset(grad, 0, static_cast<size_t>(count) * 4);
  kernels_.column_sums(x + part.first * kernels_.element_bytes, job.rows, count, linear.rows, grad);
}

void TrainingStep::weight_gradient(Job& job, const Linear& linear, const char* grad,
                                   const char* packed, int thread, int threads) {
  // (rows, cols) = grad (N, rows)^T x (N, cols).
  Product p = product_with(grad, linear.rows, job.rows, packed, linear.cols,
                           job.add ? Finish::add : Finish::wide, linear.weight.grad);
  p.a_transposed = true;
  p.a_ld = linear.rows;
  multiply(job, p, thread, threads);
  bias_sums(job, linear, grad, thread, threads);
}

void TrainingStep::backward(Job& job, int thread, int threads) {
  Workspace& s = job.space;
  const int64_t width = shape_.config.n_embd;
  norm_backward_rows(job, last_norm_, s.last, s.last_stats, true, 0, 2 * shape_.config.n_layer,
                     thread, threads);
  for (size_t i = layers_.size(); i-- > 0;) backward_layer(job, i, thread, threads);
  // The embeddings; every thread has its columns of all rows.
  pool_.barrier(thread);
  norm_sums(job, layers_[0].ln_1, 0, thread, threads);
  const Part part = part_of(width, 16, thread, threads);
  const int64_t count = part.last - part.first;
  if (count <= 0) return;
  if (!shape_.config.rotary && !job.add) {
    for (int64_t t = 0; t < shape_.config.block_size; ++t) {
      std::memset(positions_.grad + t * width + part.first, 0, static_cast<size_t>(count) * 4);
    }
  }
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* grad = s.grad + row * width + part.first;
    kernels_.add(grad, count, tokens_.grad + job.token(row) * width + part.first);
    if (!shape_.config.rotary) {
      kernels_.add(grad, count, positions_.grad + row % job.positions * width + part.first);
    }
  }
}

// On entry `narrow` and `grad` are about to hold the gradient of the layer's sum, and the sums of
// the norm after it stand in sums[0].
void TrainingStep::backward_layer(Job& job, size_t i, int thread, int threads) {
  Workspace& s = job.space;
  const Layer& layer = layers_[i];
  const Kept& k = s.layers[i];
  const Norm& after = i + 1 == layers_.size() ? last_norm_ : layers_[i + 1].ln_1;
  const int64_t width = shape_.config.n_embd, n = job.rows;

  if (recompute_) {
    pool_.barrier(thread);
    forward_layer(job, i, k.x, nullptr, thread, threads);
  }

  pack_rows(k.after, n, 4 * width, s.right, thread, threads);
  pack_weight(n, layer.down, false, s.left, thread, threads);
  pool_.barrier(thread);
  norm_sums(job, after, 0, thread, threads);
  weight_gradient(job, layer.down, s.narrow, s.right, thread, threads);
  multiply_weight(job, layer.down, false,
                  product_with(s.narrow, n, width, s.left, 4 * width, Finish::gelu_grad, s.wide,
                               nullptr, k.before),
                  thread, threads);
  pool_.barrier(thread);
  pack_rows(k.second, n, width, s.pair, thread, threads);
  pack_weight(n, layer.up, false, s.left, thread, threads);
  pool_.barrier(thread);
  weight_gradient(job, layer.up, s.wide, s.pair, thread, threads);
  multiply_weight(job, layer.up, false,
                  product_with(s.wide, n, 4 * width, s.left, width, Finish::wide, s.dy), thread,
                  threads);
  pool_.barrier(thread);
  const auto mask = static_cast<int64_t>(2 * i);  // of the branch before this layer
  norm_backward_rows(job, layer.ln_2, k.middle, k.second_stats, false, 1, mask + 1, thread,
                     threads);
  pack_rows(k.mixed, n, width, s.pair, thread, threads);
  pack_weight(n, layer.projection, false, s.left, thread, threads);
  pool_.barrier(thread);
  norm_sums(job, layer.ln_2, 1, thread, threads);
  weight_gradient(job, layer.projection, s.narrow, s.pair, thread, threads);
  multiply_weight(job, layer.projection, false,
                  product_with(s.narrow, n, width, s.left, width, Finish::store, s.wide), thread,
                  threads);
  pool_.barrier(thread);
  heads(job, k, s.wide, thread, threads);
  pack_rows(k.first, n, width, s.pair, thread, threads);
  pack_weight(n, layer.attention, false, s.left, thread, threads);
  pool_.barrier(thread);
  weight_gradient(job, layer.attention, s.grad_qkv, s.pair, thread, threads);
  multiply_weight(job, layer.attention, false,
                  product_with(s.grad_qkv, n, 3 * width, s.left, width, Finish::wide, s.dy), thread,
                  threads);
  pool_.barrier(thread);
  norm_backward_rows(job, layer.ln_1, k.x, k.first_stats, false, 0, mask, thread, threads);
}

double TrainingStep::gradient_norm() {
  double sum = 0.0;
  std::vector<double> parts;
  constexpr int64_t piece = 1 << 16;
  struct Piece {
    const float* at;
    int64_t count;
  };
  std::vector<Piece> pieces;
  for (const Trained& each : parameters_) {
    for (int64_t start = 0; start < each.count; start += piece) {
      pieces.push_back({each.grad + start, std::min(piece, each.count - start)});
    }
  }
  parts.resize(pieces.size());
  struct Context {
    const TrainingKernels& kernels;
    const std::vector<Piece>& pieces;
    std::vector<double>& parts;
  } context{kernels_, pieces, parts};
  pool_.run(
      [](void* given, int thread, int threads) {
        Context& c = *static_cast<Context*>(given);
        const Part part = part_of(static_cast<int64_t>(c.pieces.size()), 1, thread, threads);
        for (int64_t i = part.first; i < part.last; ++i) {
          const size_t at = static_cast<size_t>(i);
          c.parts[at] = c.kernels.sum_of_squares(c.pieces[at].at, c.pieces[at].count);
        }
      },
      &context, pool_.size());
  for (const double part : parts) sum += part;
  return std::sqrt(sum);
}

void TrainingStep::adamw(size_t index, float* first, float* second, const AdamW& by) {
  struct Context {
    const TrainingKernels& kernels;
    const Trained& p;
    float *first, *second;
    const AdamW& by;
  } context{kernels_, parameters_.at(index), first, second, by};
  // Waking a thread takes longer than a few thousand numbers.
  const int threads = context.p.count < 32768 ? 1 : pool_.size();
  pool_.run(
      [](void* given, int thread, int threads) {
        Context& c = *static_cast<Context*>(given);
        const Part part = part_of(c.p.count, 1024, thread, threads);
        c.kernels.adamw(c.p.weight + part.first, c.p.grad + part.first, c.first + part.first,
                        c.second + part.first, part.last - part.first, c.by);
      },
      &context, threads);
}

namespace {

// Newton and Schulz's iteration with coefficients that bring every singular value near 1 in five
// steps. Source: Jordan et al. 2024, Muon.
constexpr int kOrthogonalSteps = 5;
constexpr float kOrthogonal[3] = {3.4445f, -4.7750f, 2.0315f};

struct MuonScratch {
  float *x, *y, *gram, *square;
  char *elements, *gram_elements, *packed, *product;
  int64_t bytes;
};

MuonScratch muon_pieces(const TrainingKernels& k, char* memory, int64_t rows, int64_t cols) {
  const int64_t small = std::min(rows, cols), e = k.element_bytes;
  Layout layout(memory);
  MuonScratch s{};
  s.x = layout.floats(rows * cols);
  s.y = layout.floats(rows * cols);
  s.gram = layout.floats(small * small);
  s.square = layout.floats(small * small);
  s.elements = layout.bytes(rows * cols * e);
  s.gram_elements = layout.bytes(small * small * e);
  s.packed = layout.bytes(std::max(
      {k.packed_bytes(cols, rows), k.packed_bytes(rows, cols), k.packed_bytes(small, small)}));
  s.product = layout.bytes(k.product_scratch);
  s.bytes = layout.used();
  return s;
}

}  // namespace

int64_t TrainingStep::muon_scratch(int64_t rows, int64_t cols) const {
  return muon_pieces(kernels_, nullptr, rows, cols).bytes;
}

void TrainingStep::muon_part(const MuonMatrix& matrix, int64_t part, const Muon& by,
                             char* memory) const {
  const TrainingKernels& k = kernels_;
  const int64_t rows = matrix.rows / matrix.parts, cols = matrix.cols, count = rows * cols;
  const int64_t small = std::min(rows, cols), large = std::max(rows, cols);
  const bool tall = rows > cols;
  const MuonScratch s = muon_pieces(k, memory, rows, cols);
  const Trained& p = parameters_[matrix.parameter];
  float* weight = p.weight + part * count;
  const float* grad = p.grad + part * count;
  float* momentum = matrix.momentum + part * count;
  k.blend(by.momentum, momentum, (1.0f - by.momentum) * by.grad_scale, grad, count, momentum);
  k.blend((1.0f - by.momentum) * by.grad_scale, grad, by.momentum, momentum, count, s.x);
  const double norm = std::sqrt(k.sum_of_squares(s.x, count));
  if (tall) k.transpose(s.x, rows, cols, s.y);
  k.narrow(static_cast<float>(1.0 / (norm + 1e-12)), tall ? s.y : s.x, count, s.elements);

  const auto pack = [&](const void* data, int64_t ld, int64_t depth, int64_t width,
                        bool by_column) {
    const Operand from{data, ld, depth, width, by_column, false};
    k.pack(from, 0, (width + k.tile_cols - 1) / k.tile_cols, s.packed);
  };
  const auto symmetric = [&](const void* left, int64_t depth, float* out) {
    k.multiply_symmetric(product_with(left, small, depth, s.packed, small, Finish::wide, out),
                         s.product);
  };
  for (int step = 0; step < kOrthogonalSteps; ++step) {
    // With G = X X^T, X becomes (a + b G + c G G) X.
    pack(s.elements, large, large, small, true);
    symmetric(s.elements, large, s.gram);
    k.narrow(1.0f, s.gram, small * small, s.gram_elements);
    pack(s.gram_elements, small, small, small, false);
    symmetric(s.gram_elements, small, s.square);
    k.blend(kOrthogonal[1], s.gram, kOrthogonal[2], s.square, small * small, s.square);
    for (int64_t i = 0; i < small; ++i) s.square[i * small + i] += kOrthogonal[0];
    k.narrow(1.0f, s.square, small * small, s.gram_elements);
    // X is packed, so that the next one takes its place.
    pack(s.elements, large, small, large, false);
    const bool last = step + 1 == kOrthogonalSteps;
    const Product next = product_with(s.gram_elements, small, small, s.packed, large,
                                      last ? Finish::wide : Finish::store,
                                      last ? static_cast<void*>(s.x) : s.elements);
    k.multiply(next, 0, small, 0, (large + k.tile_cols - 1) / k.tile_cols, s.product);
  }
  if (tall) k.transpose(s.x, small, large, s.y);
  const float size = std::sqrt(std::max(1.0f, static_cast<float>(rows) / static_cast<float>(cols)));
  k.blend(1.0f - by.lr * by.weight_decay, weight, -by.lr * size, tall ? s.y : s.x, count, weight);
}

void TrainingStep::muon(const std::vector<MuonMatrix>& matrices, const Muon& by) {
  struct Unit {
    const MuonMatrix* matrix;
    int64_t part;
    double cost;
  };
  std::vector<Unit> units;
  int64_t scratch = 0;
  for (const MuonMatrix& each : matrices) {
    const double rows = static_cast<double>(each.rows / each.parts);
    const double cols = static_cast<double>(each.cols), small = std::min(rows, cols);
    const double cost = small * small * (2.0 * std::max(rows, cols) + small);
    for (int64_t part = 0; part < each.parts; ++part) units.push_back({&each, part, cost});
    scratch = std::max(scratch, muon_scratch(each.rows / each.parts, each.cols));
  }
  // The largest first, each to the thread that has least to do.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  const size_t threads = static_cast<size_t>(pool_.size());
  std::vector<std::vector<Unit>> shares(threads);
  std::vector<double> load(threads, 0.0);
  for (const Unit& unit : units) {
    const auto least =
        static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    shares[least].push_back(unit);
    load[least] += unit.cost;
  }
  scratch = up_to(scratch, 64);
  if (muon_bytes_ < scratch) {
    muon_bytes_ = 0;
    muon_memory_.reset(reserve(scratch * static_cast<int64_t>(threads)));
    muon_bytes_ = scratch;
  }
  struct Context {
    const TrainingStep* self;
    const std::vector<std::vector<Unit>>& shares;
    const Muon& by;
    char* memory;
    int64_t bytes;
  } context{this, shares, by, muon_memory_.get(), muon_bytes_};
  pool_.run(
      [](void* given, int thread, int) {
        Context& c = *static_cast<Context*>(given);
        for (const Unit& unit : c.shares[static_cast<size_t>(thread)]) {
          c.self->muon_part(*unit.matrix, unit.part, c.by, c.memory + thread * c.bytes);
        }
      },
      &context, pool_.size());
}

}  // namespace nanogpt
