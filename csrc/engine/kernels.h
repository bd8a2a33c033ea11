// The inner loops, once for every instruction set and chosen at run time.
//
// Dimensions: K columns of a weight matrix, T tokens. Decoding multiplies rows by one vector
// ("matvec"); a prompt is multiplied in panels: matrices (features, P) of P <= 64 tokens, P a
// multiple of 16, so that a vector register holds one feature of neighbouring tokens and weights
// are read as they lie in the file, each once a panel, with no packing.
//
// Every row and token is summed in an order that depends on nothing else, so that results do not
// depend on how rows are shared among threads.
#pragma once

#include <cstdint>
#include <string>

namespace nanogpt {

// Tokens of one vector group; panels are multiples of it.
constexpr int kLanes = 16;
constexpr int kPanel = 64;
// Up to this many tokens go through the layers together as vectors, reading each weight once; from
// there on panels are faster.
constexpr int kFew = 12;

// Added to a mean square before queries and keys are divided by its root; as QK_EPS in
// nanogpt/model.py.
constexpr float kQkEpsilon = 1e-6f;

// What happens to a product before it is stored.
enum class Store { plain, add, gelu };

// One panel of activations and of results.
struct Panel {
  const void* x;        // (K, width) float32, or pairs: see Kernels::pairs
  const float* scales;  // (width): of the tokens, int8 only
  float* out;           // (rows of the whole matrix, width) float32
  int width;
};

struct Kernels {
  const char* name;
  // Whether the prompt's product with bfloat16 weights takes pairs of bfloat16 (K / 2, width, 2),
  // an odd last feature beside a zero; otherwise it takes float32. Products with int8 weights
  // always take pairs of int16.
  bool bf16_pairs;

  // out[r] = sum_k w[r, k] x[k] + bias[r]; added to out[r] with Store::add.
  void (*matvec_f32)(const float* w, int64_t rows, int64_t cols, const float* x, const float* bias,
                     float* out, Store store);
  // `x` in the order that split_bf16 makes.
  void (*matvec_bf16)(const uint16_t* w, int64_t rows, int64_t cols, const float* x,
                      const float* bias, float* out, Store store);
  // out[r] = scales[r] x_scale sum_k w[r, k] x[k] + bias[r]; the sum is exact.
  void (*matvec_i8)(const int8_t* w, const float* scales, int64_t rows, int64_t cols,
                    const int16_t* x, float x_scale, const float* bias, float* out, Store store);
  // The same for `count` <= kFew vectors, `x_stride` and `out_stride` apart.
  void (*few_f32)(const float* w, int64_t rows, int64_t cols, const float* x, int64_t x_stride,
                  int count, const float* bias, float* out, int64_t out_stride, Store store);
  void (*few_bf16)(const uint16_t* w, int64_t rows, int64_t cols, const float* x, int64_t x_stride,
                   int count, const float* bias, float* out, int64_t out_stride, Store store);
  void (*few_i8)(const int8_t* w, const float* scales, int64_t rows, int64_t cols, const int16_t* x,
                 const float* x_scales, int64_t x_stride, int count, const float* bias, float* out,
                 int64_t out_stride, Store store);
  // Reorders x (n) so that every even element of a block stands before every odd one.
  void (*split_bf16)(const float* x, int64_t n, float* out);
  // x = scale * out with out in -limit .. limit; returns the scale. The limit keeps the sum of n
  // products with int8 inside 32 bits.
  float (*quantize)(const float* x, int64_t n, int16_t* out);
  void (*layer_norm)(const float* x, int64_t n, const float* weight, const float* bias, float* out);
  // In place: exp(scale * (x - max)) / sum.
  void (*softmax)(float* x, int64_t n, float scale);
  // out[c] = sum_r p[r] v[r, c].
  void (*weighted_sum)(const float* v, int64_t rows, int64_t cols, const float* p, float* out);
  void (*weighted_sum_bf16)(const uint16_t* v, int64_t rows, int64_t cols, const float* p,
                            float* out);
  // To the nearest bfloat16, ties to even, and back.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  void (*from_bf16)(const uint16_t* x, int64_t n, float* out);
  // Loads all bytes and does next to nothing with them: the floor of what decoding can take.
  int32_t (*read)(const void* from, int64_t bytes);

  // Rows first .. first + rows - 1 of a matrix (w points at row `first`) times every panel.
  // `scratch` holds gemm_scratch(cols) bytes, 64-byte aligned.
  void (*gemm_f32)(const float* w, int64_t first, int64_t rows, int64_t cols, const float* bias,
                   const Panel* panels, int n_panels, Store store, void* scratch);
  void (*gemm_bf16)(const uint16_t* w, int64_t first, int64_t rows, int64_t cols, const float* bias,
                    const Panel* panels, int n_panels, Store store, void* scratch);
  void (*gemm_i8)(const int8_t* w, const float* scales, int64_t first, int64_t rows, int64_t cols,
                  const float* bias, const Panel* panels, int n_panels, Store store, void* scratch);

  // The rest works on one group of kLanes tokens of a panel: pointers at its first token, `width`
  // the panel's.
  void (*norm_group)(const float* x, int64_t n, int width, const float* weight, const float* bias,
                     float* out);
  // (n, width) float32 to pairs.
  void (*pack_bf16)(const float* x, int64_t n, int width, uint16_t* out);
  void (*pack_i16)(const float* x, int64_t n, int width, int16_t* out, float* scales);
  // Attention of kLanes neighbouring queries of one head over its keys: lane l sees keys
  // 0 .. first + l, of which `keys` exist. q, out: (D, width); k, v: (keys, D); scores holds
  // keys * kLanes floats.
  void (*attend)(const float* q, int width, const float* k, const float* v, int64_t first,
                 int64_t keys, int64_t head_width, float scale, float* scores, float* out);

  // For each beta > 0 the sums of exp(beta z), z exp(beta z) and z^2 exp(beta z) over a row of n
  // numbers z <= 0, of which some may be -inf: out (count, 3).
  void (*softmax_sums)(const double* z, int64_t n, const double* betas, int count, double* out);
};

// Rows that gemm_* take at a time: work is best cut into multiples of it.
constexpr int64_t kRowBlock = 48;

// Of those, rows that are widened together and stay in the second-level cache.
constexpr int64_t kRowStep = 12;

constexpr int64_t gemm_scratch(int64_t cols) { return kRowStep * (cols + 1) * 4; }

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;      // F BW DQ VL VNNI
extern const Kernels kAvx512Bf16Kernels;  // and BF16
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The fastest set that this CPU runs (products of bfloat16 pairs are timed, once a process), or the
// one named by NANOGPT_ISA (scalar, avx2, avx512, avx512_bf16, neon). Throws UsageError where that
// is unknown or does not run here.
const Kernels& choose_kernels();

// Whether this CPU has the instructions of the set of that name.
bool runs_here(const std::string& name);

}  // namespace nanogpt
