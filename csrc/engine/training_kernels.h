// The inner loops of training, once for every instruction set and precision.
//
// Matrices are row-major. An element is a float32, or a bfloat16 (16 bits); a unit is four bytes:
// one float32, or two bfloat16 that are neighbours along the depth of a product, so that both
// precisions share every loop. Each output of a product is summed by one thread in an order that
// depends on its place alone: results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace nanogpt {

// What becomes of an element of a product before it is stored. `out` and `other` share a row
// length.
enum class Finish {
  store,      // out = element(x)
  gelu,       // other = element(x); out = element(gelu(x))
  gelu_grad,  // out = element(x * gelu'(other))
  residual,   // out = other + x, all float32
  wide,       // out = x, float32
  add,        // out += x, float32
};

// A matrix as it lies, to be packed as the right operand of a product.
struct Operand {
  const void* data = nullptr;
  int64_t ld = 0;
  int64_t depth = 0, cols = 0;
  bool by_column = false;  // data is (cols, depth) rather than (depth, cols)
  bool floats = false;     // of float32 where elements are bfloat16
};

// (rows, cols) = A (rows, depth) B (depth, cols) + bias.
struct Product {
  const void* a = nullptr;  // elements: (rows, depth), or (depth, rows) where transposed
  int64_t a_ld = 0;         // elements from one of its rows to the next
  bool a_transposed = false;
  const void* b = nullptr;  // as `pack` leaves it; null: `right` is packed where it is read
  int64_t b_depth = 0;      // the depth it was packed with, at least `depth`
  Operand right;            // only where A is not transposed
  int64_t rows = 0, cols = 0, depth = 0;
  Finish finish = Finish::store;
  void* out = nullptr;
  void* other = nullptr;
  int64_t ld = 0;  // elements from one row of out and other to the next
  const float* bias = nullptr;
};

// One head of one sequence. Queries, keys and values are rows of (T, 3C); D is even.
struct Head {
  const void* qkv = nullptr;  // elements, at this head's first query; keys and values follow C and
                              // 2C elements later
  int64_t positions = 0, width = 0, model_width = 0;  // T, D, C
  float scale = 1.0f;
  bool normed = false;             // q and k are divided by their root mean square
  const float* cosines = nullptr;  // (T, D / 2) each, or null: no rotation
  const float* sines = nullptr;
  void* out = nullptr;   // elements (T, C), at this head's first column
  float* lse = nullptr;  // (T): log of the sum of exponentials
  // Backward.
  const void* grad_out = nullptr;  // elements (T, C)
  void* grad_qkv = nullptr;        // elements (T, 3C), at this head's first query
  char* scratch = nullptr;         // head_scratch(T, D) bytes, 64-byte aligned
};

// AdamW's numbers for one step.
struct AdamW {
  float lr, beta1, beta2, eps, weight_decay;
  float correction1, correction2;  // 1 - beta^step
  float grad_scale;                // of the gradients, for clipping
};

struct TrainingKernels {
  const char* name;
  int element_bytes;
  int tile_rows, tile_cols;
  // Bytes of scratch that a thread needs for `multiply`; right operands up to `packed_depth` deep
  // can be packed there.
  int64_t product_scratch, packed_depth;

  int64_t (*packed_bytes)(int64_t depth, int64_t cols);
  // Panels first .. last - 1 of tile_cols columns.
  void (*pack)(const Operand& from, int64_t first, int64_t last, void* to);
  // Rows first_row .. last_row - 1 and panels first .. last - 1 of a product.
  void (*multiply)(const Product& product, int64_t first_row, int64_t last_row, int64_t first,
                   int64_t last, void* scratch);
  // A whole product with Finish::wide that is known to be symmetric: half of it is computed, the
  // other half copied.
  void (*multiply_symmetric)(const Product& product, void* scratch);
  // out (cols, rows) = x (rows, cols).
  void (*transpose)(const float* x, int64_t rows, int64_t cols, float* out);

  // y = element((x - mean) rstd weight + bias); stats (rows, 2) keeps mean and rstd.
  void (*norm)(const float* x, int64_t rows, int64_t cols, const float* weight, const float* bias,
               void* y, float* stats);
  // Adds the gradient of x to `grad` (or starts it, where `first`), leaves it as elements in
  // `narrow`, and adds this chunk's sums for weight and bias to two rows of `sums` (2, cols).
  void (*norm_backward)(const float* dy, const float* x, const float* stats, int64_t rows,
                        int64_t cols, const float* weight, bool first, float* grad, void* narrow,
                        float* sums);
  // sums[c] += the column's elements.
  void (*column_sums)(const void* x, int64_t rows, int64_t cols, int64_t ld, float* sums);
  // x = token row + position row (null: none).
  void (*embed)(const float* token, const float* position, int64_t cols, float* out);
  void (*add)(const float* x, int64_t n, float* out);
  // out = a x + b y.
  void (*blend)(float a, const float* x, float b, const float* y, int64_t n, float* out);
  // out = x + scale kept y, where kept is 0 or 1; x may be null, for zeros.
  void (*drop)(const float* x, float scale, const uint8_t* kept, const float* y, int64_t n,
               float* out);
  // out = element(scale x).
  void (*narrow)(float scale, const float* x, int64_t n, void* out);
  // The loss of one row of logits, which are overwritten; its gradient times `scale` as `width`
  // elements, zeros after the cols-th. A negative target has no loss and no gradient.
  float (*cross_entropy)(float* logits, int64_t cols, int64_t target, float scale, int64_t width,
                         void* grad);
  int64_t (*head_scratch)(int64_t positions, int64_t width);
  void (*attend)(const Head& head);
  void (*attend_backward)(const Head& head);
  double (*sum_of_squares)(const float* x, int64_t n);
  void (*adamw)(float* weights, const float* grads, float* first, float* second, int64_t n,
                const AdamW& by);
};

extern const TrainingKernels kScalarTraining;
#if defined(__x86_64__)
extern const TrainingKernels kAvx2Training;
extern const TrainingKernels kAvx512Training;
extern const TrainingKernels kAvx512Bf16Training;
#elif defined(__aarch64__)
extern const TrainingKernels kNeonTraining;
#endif

// The set that goes with choose_kernels(); with bfloat16 null where the CPU has no products of
// them.
const TrainingKernels* training_kernels(bool bf16);

}  // namespace nanogpt
