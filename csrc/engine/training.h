// One training step of a GPT on the CPU, without torch: the loss, every gradient, AdamW.
//
// The residual stream, sums, weights, gradients and the optimizer's state are float32; with
// bfloat16 the operands of products are rounded to it. Results do not depend on the number of
// threads.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/thread_pool.h"
#include "engine/training_kernels.h"
#include "engine/weights.h"

namespace nanogpt {

// A parameter and what belongs to it, as arrays of `count` float32 that someone else keeps alive.
struct Trained {
  std::string name;  // as in the state dict
  int64_t count = 0;
  float* weight = nullptr;
  float* grad = nullptr;
};

// Muon's numbers for one step.
struct Muon {
  float lr, momentum, weight_decay;
  float grad_scale;  // of the gradients, for clipping
};

// A matrix that Muon updates: `parts` matrices of equal size, one below the other.
struct MuonMatrix {
  size_t parameter;  // its index
  int64_t rows, cols, parts;
  float* momentum;  // rows * cols
};

struct TrainingShape {
  Config config;
  float dropout = 0.0f;  // of the embeddings and of every branch before it is added
};

class TrainingStep {
 public:
  // With `recompute` a layer keeps its input alone and is computed once more in the backward pass.
  // Throws InputError where the parameters do not fit the shape, UsageError where bfloat16 or this
  // shape cannot be computed here; see `unfit`.
  TrainingStep(const TrainingShape& shape, const std::vector<Trained>& parameters, bool bf16,
               int threads, bool recompute);

  // Why this shape cannot be computed here, or nothing.
  static std::string unfit(const TrainingShape& shape, bool bf16);

  // Mean loss in nats of the targets of `batch` windows of `positions` + 1 ids, whose last
  // `positions` are the targets. Gradients of `scale` times the loss are written, or added to what
  // is there. Throws UsageError for an id outside the vocabulary.
  // With dropout, what is dropped is a function of `dropout_seed` and its place.
  double gradients(const int64_t* windows, int64_t batch, int64_t positions, double scale, bool add,
                   uint64_t dropout_seed);
  // The loss alone.
  double loss(const int64_t* windows, int64_t batch, int64_t positions);

  // The Euclidean norm of all gradients.
  double gradient_norm();
  // One step of AdamW over parameter `index`; the moments are `count` floats each.
  void adamw(size_t index, float* first, float* second, const AdamW& by);

  // One step of Muon: with m = lerp(m, g, 1 - momentum) and u = lerp(g, m, momentum) the weights
  // move by -lr sqrt(max(1, rows / cols)) times u's nearest matrix with orthonormal rows or
  // columns.
  void muon(const std::vector<MuonMatrix>& matrices, const Muon& by);

  // What the last pass with gradients kept (1) or dropped (0): (2 L + 1, N, C), of the embeddings,
  // then of each layer's two branches. Empty without dropout.
  std::vector<uint8_t> dropout_masks() const;
  // What the passes so far have made room for.
  int64_t workspace_bytes() const;
  const char* instruction_set() const { return kernels_.name; }
  int threads() const { return pool_.size(); }
  const std::vector<Trained>& parameters() const { return parameters_; }

 private:
  struct Norm {
    Trained weight, bias;
  };
  struct Linear {
    Trained weight, bias;
    int64_t rows = 0, cols = 0;
  };
  struct Layer {
    Norm ln_1, ln_2;
    Linear attention, projection, up, down;
  };
  struct Free {
    void operator()(char* memory) const;
  };
  // What a forward pass leaves for the backward pass.
  struct Kept {
    float *x, *middle;     // (N, C): the residual stream into the layer and between its halves
    char *first, *second;  // (N, C) elements: what the norms gave
    float *first_stats, *second_stats;
    char *qkv, *mixed;     // (N, 3C), (N, C)
    float* lse;            // (B, H, T)
    char *before, *after;  // (N, 4C): around GELU
  };
  struct Workspace {
    std::unique_ptr<char, Free> memory;
    int64_t batch = 0, positions = 0, bytes = 0;
    std::vector<Kept> layers;
    float* last = nullptr;  // (N, C): the residual stream after the last layer
    char* hidden = nullptr;
    float *last_stats = nullptr, *losses = nullptr, *logits = nullptr;
    int64_t chunk = 0;  // rows of logits at a time
    char *left = nullptr, *right = nullptr, *head = nullptr, *head_back = nullptr;  // packed
    char* pair = nullptr;     // packed beside `right`
    uint8_t* kept = nullptr;  // dropout's masks; see dropout_masks
    // Backward only.
    char *grad_logits = nullptr, *narrow = nullptr, *wide = nullptr, *grad_qkv = nullptr;
    float *grad = nullptr, *dy = nullptr, *sums[2] = {nullptr, nullptr};
    std::vector<char*> scratch;  // of each thread
  };
  struct Job;

  Trained parameter(const std::string& name, int64_t count) const;
  Norm norm(const std::string& name) const;
  Linear linear(const std::string& name, int64_t rows, int64_t cols) const;
  void prepare(Workspace& space, int64_t batch, int64_t positions, bool backward);
  double run(const int64_t* windows, int64_t batch, int64_t positions, double scale, bool add,
             bool backward, uint64_t dropout_seed);
  void draw_masks(Job& job, int thread, int threads);
  void add_branch(Job& job, int64_t mask, const float* x, float* out, int thread, int threads);
  void forward(Job& job, int thread, int threads);
  void forward_layer(Job& job, size_t layer, const float* x, float* next, int thread, int threads);
  void head(Job& job, int thread, int threads);
  void backward(Job& job, int thread, int threads);
  void backward_layer(Job& job, size_t layer, int thread, int threads);
  void norm_rows(Job& job, const Norm& norm, const float* x, char* y, float* stats, int thread,
                 int threads);
  void norm_backward_rows(Job& job, const Norm& norm, const float* x, const float* stats,
                          bool first, int which, int64_t mask, int thread, int threads);
  void norm_sums(Job& job, const Norm& norm, int which, int thread, int threads);
  void bias_sums(Job& job, const Linear& linear, const char* x, int thread, int threads);
  bool takes_panels(int64_t rows, int64_t cols, int threads) const;
  bool packs_late(int64_t rows, const Operand& right, int threads) const;
  static Operand operand_of(const Linear& linear, bool by_column);
  void pack_weight(int64_t rows, const Linear& linear, bool by_column, char* to, int thread,
                   int threads);
  void pack_rows(const char* x, int64_t rows, int64_t cols, char* to, int thread, int threads);
  void multiply(Job& job, const Product& product, int thread, int threads);
  void multiply_weight(Job& job, const Linear& linear, bool by_column, const Product& product,
                       int thread, int threads);
  void weight_gradient(Job& job, const Linear& linear, const char* grad, const char* packed,
                       int thread, int threads);
  // Attention, or its backward pass where the gradient of its output is given.
  void heads(Job& job, const Kept& kept, const char* grad_out, int thread, int threads);

  void muon_part(const MuonMatrix& matrix, int64_t part, const Muon& by, char* memory) const;
  int64_t muon_scratch(int64_t rows, int64_t cols) const;

  TrainingShape shape_;
  std::vector<Trained> parameters_;
  const TrainingKernels& kernels_;
  ThreadPool pool_;
  const bool recompute_;
  Trained tokens_, positions_;
  std::vector<Layer> layers_;
  Norm last_norm_;
  std::vector<float> cosines_, sines_;
  std::unique_ptr<char, Free> muon_memory_;  // of every thread
  int64_t muon_bytes_ = 0;                   // of one
  std::array<Workspace, 2> spaces_;          // of the loss alone, and with gradients
};

}  // namespace nanogpt
