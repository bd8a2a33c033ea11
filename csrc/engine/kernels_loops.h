// The loops behind kernels.h, written once over a vector type `Isa`. Included by one file for each
// instruction set, which is compiled for it; everything here has internal linkage and nothing comes
// from the standard library's templates, so that no function compiled for a newer CPU can be shared
// with the rest of the program.
//
// Isa gives: W lanes; F (W floats), I (W int32 sums), with load store zero set fma add sub mul div
// max round, bf16 loads, int16 products and reductions; D (doubles) with fma.

#include <stdint.h>
#include <string.h>

#include "engine/kernels.h"

#if defined(__clang__)
#define NANOGPT_UNROLL _Pragma("unroll")
#else
#define NANOGPT_UNROLL _Pragma("GCC unroll 64")
#endif

namespace nanogpt {
namespace {

using F = Isa::F;
using I = Isa::I;
constexpr int W = Isa::W;
constexpr int kVectors = kLanes / W;  // of one group of tokens

template <int N>
struct Count {
  static constexpr int value = N;
};

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A weight may be -128, though export writes none.
inline int32_t max_of_int16_times(int64_t n) {
  const int64_t limit = INT32_MAX / (128 * n);
  return static_cast<int32_t>(limit < 32767 ? limit : 32767);
}

// e^x to about one unit in the last place: 2^n times a polynomial of the rest (Cephes' expf). NaN
// stays NaN: of two numbers, one of them NaN, max and min give the second.
inline F exp_of(F x) {
  x = Isa::min(Isa::set(88.3f), Isa::max(Isa::set(-87.3f), x));
  const F n = Isa::round(Isa::mul(x, Isa::set(1.44269504088896341f)));
  F r = Isa::fma(n, Isa::set(-0.693359375f), x);
  r = Isa::fma(n, Isa::set(2.12194440e-4f), r);
  F p = Isa::set(1.9875691500e-4f);
  p = Isa::fma(p, r, Isa::set(1.3981999507e-3f));
  p = Isa::fma(p, r, Isa::set(8.3334519073e-3f));
  p = Isa::fma(p, r, Isa::set(4.1665795894e-2f));
  p = Isa::fma(p, r, Isa::set(1.6666665459e-1f));
  p = Isa::fma(p, r, Isa::set(5.0000001201e-1f));
  p = Isa::add(Isa::fma(Isa::mul(r, r), p, r), Isa::set(1.0f));
  return Isa::scale_by_power(p, n);
}

// gelu(x) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form.
inline F gelu_of(F x) {
  const F cubic = Isa::fma(Isa::mul(Isa::mul(x, x), x), Isa::set(0.044715f), x);
  const F e = exp_of(Isa::mul(cubic, Isa::set(-2.0f * 0.7978845608028654f)));
  return Isa::div(x, Isa::add(Isa::set(1.0f), e));
}

// Calls f on W floats at a time; the last ones go through a padded copy.
template <typename Function>
inline void map_floats(float* x, int64_t n, Function f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) Isa::store(x + i, f(Isa::load(x + i)));
  if (i < n) {
    float rest[W] = {};
    memcpy(rest, x + i, static_cast<size_t>(n - i) * 4);
    Isa::store(rest, f(Isa::load(rest)));
    memcpy(x + i, rest, static_cast<size_t>(n - i) * 4);
  }
}

inline void finish(float* out, const float* values, const float* bias, int64_t rows, Store store) {
  for (int64_t r = 0; r < rows; ++r) {
    float value = values[r] + (bias ? bias[r] : 0.0f);
    if (store == Store::add) value += out[r];
    out[r] = value;
  }
  if (store == Store::gelu) map_floats(out, rows, [](F x) { return gelu_of(x); });
}

// ---- decoding: rows times one vector ----

constexpr int kRows = 8;  // rows that share every load of x

// The rows that come next are fetched while these are used: what a CPU fetches by itself follows
// one row at a time and not across pages, and lost a third of the memory's rate with rows of 1.5
// KB.
inline void fetch(const void* at) { __builtin_prefetch(at, 0, 3); }

// How many elements ahead, which is nothing for the last rows.
inline int64_t next_rows(int64_t row, int64_t rows, int64_t cols) {
  return row + 2 * kRows <= rows ? kRows * cols : 0;
}

struct F32Rows {
  const float* w;
  const float* x;
  static constexpr int step = W;
  using Sum = F;
  Sum zero() const { return Isa::zero(); }
  void take(Sum* sums, int rows, int64_t cols, int64_t k, int64_t /* next */) const {
    const F v = Isa::load(x + k);
    NANOGPT_UNROLL
    for (int r = 0; r < rows; ++r) sums[r] = Isa::fma(Isa::load(w + r * cols + k), v, sums[r]);
  }
  float tail(int64_t index, int64_t k) const { return w[index] * x[k]; }
};

struct Bf16Rows {
  const uint16_t* w;
  const float* x;  // as split_bf16 leaves it
  static constexpr int step = 2 * W;
  using Sum = F;
  Sum zero() const { return Isa::zero(); }
  void take(Sum* sums, int rows, int64_t cols, int64_t k, int64_t next) const {
    const F even = Isa::load(x + k), odd = Isa::load(x + k + W);
    NANOGPT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const uint16_t* at = w + r * cols + k;
      fetch(at + next);
      const auto pair = Isa::load_bits(at);
      sums[r] = Isa::fma(Isa::even_bf16(pair), even, sums[r]);
      sums[r] = Isa::fma(Isa::odd_bf16(pair), odd, sums[r]);
    }
  }
  float tail(int64_t index, int64_t k) const { return from_bf16(w[index]) * x[k]; }
};

template <int R, typename Rows>
inline void float_rows(const Rows& rows, int64_t cols, int64_t next, float* values) {
  F sums[kRows];
  NANOGPT_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = rows.zero();
  int64_t k = 0;
  for (; k + Rows::step <= cols; k += Rows::step) rows.take(sums, R, cols, k, next);
  Isa::reduce8(sums, values);
  for (; k < cols; ++k) {
    for (int r = 0; r < R; ++r) values[r] += rows.tail(r * cols + k, k);
  }
}

template <typename Rows>
inline void float_matvec(Rows rows, int64_t n, int64_t cols, const float* bias, float* out,
                         Store store) {
  float values[kRows];
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows, rows.w += kRows * cols) {
    float_rows<kRows>(rows, cols, next_rows(r, n, cols), values);
    finish(out + r, values, bias ? bias + r : nullptr, kRows, store);
  }
  for (; r < n; ++r, rows.w += cols) {
    float_rows<1>(rows, cols, 0, values);
    finish(out + r, values, bias ? bias + r : nullptr, 1, store);
  }
}

void matvec_f32(const float* w, int64_t rows, int64_t cols, const float* x, const float* bias,
                float* out, Store store) {
  float_matvec(F32Rows{w, x}, rows, cols, bias, out, store);
}

void matvec_bf16(const uint16_t* w, int64_t rows, int64_t cols, const float* x, const float* bias,
                 float* out, Store store) {
  float_matvec(Bf16Rows{w, x}, rows, cols, bias, out, store);
}

void split_bf16(const float* x, int64_t n, float* out) {
  int64_t block = 0;
  for (; block + 2 * W <= n; block += 2 * W) {
    for (int i = 0; i < W; ++i) {
      out[block + i] = x[block + 2 * i];
      out[block + W + i] = x[block + 2 * i + 1];
    }
  }
  for (; block < n; ++block) out[block] = x[block];
}

template <int R>
inline void int_rows(const int8_t* w, const int16_t* x, int64_t cols, int64_t next,
                     int32_t* values) {
  I sums[kRows];
  NANOGPT_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = Isa::int_zero();
  int64_t k = 0;
  for (; k + 2 * W <= cols; k += 2 * W) {
    const I v = Isa::load_ints(x + k);
    NANOGPT_UNROLL
    for (int r = 0; r < R; ++r) {
      const int8_t* at = w + r * cols + k;
      fetch(at + next);
      sums[r] = Isa::dot_i16(sums[r], Isa::widen_i8(at), v);
    }
  }
  Isa::reduce8(sums, values);
  for (; k < cols; ++k) {
    for (int r = 0; r < R; ++r) values[r] += w[r * cols + k] * x[k];
  }
}

void matvec_i8(const int8_t* w, const float* scales, int64_t rows, int64_t cols, const int16_t* x,
               float x_scale, const float* bias, float* out, Store store) {
  int32_t sums[kRows];
  float values[kRows];
  int64_t r = 0;
  while (r < rows) {
    const int count = r + kRows <= rows ? kRows : 1;
    if (count == kRows) {
      int_rows<kRows>(w + r * cols, x, cols, next_rows(r, rows, cols), sums);
    } else {
      int_rows<1>(w + r * cols, x, cols, 0, sums);
    }
    for (int i = 0; i < count; ++i) {
      values[i] = static_cast<float>(sums[i]) * (scales[r + i] * x_scale);
    }
    finish(out + r, values, bias ? bias + r : nullptr, count, store);
    r += count;
  }
}

// Activations below this are nothing beside any bias, and their inverse might be infinite.
constexpr float kTiny = 1e-30f;

// A NaN or infinite activation makes the scale NaN, and with it every result.
float quantize(const float* x, int64_t n, int16_t* out) {
  const float limit = static_cast<float>(max_of_int16_times(n));
  F largest = Isa::zero();
  F test = Isa::zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F v = Isa::load(x + i);
    largest = Isa::max(largest, Isa::abs(v));
    test = Isa::fma(v, Isa::zero(), test);
  }
  float top = Isa::largest(largest), bad = Isa::total(test);
  for (int64_t j = i; j < n; ++j) {
    const float v = x[j] < 0 ? -x[j] : x[j];
    top = v > top ? v : top;
    bad += x[j] * 0.0f;
  }
  if (bad != 0.0f || top < kTiny) {  // NaN is unequal to zero
    memset(out, 0, static_cast<size_t>(n) * 2);
    return bad;
  }
  const float inverse = limit / top;
  for (i = 0; i + W <= n; i += W) {
    Isa::store_i16(out + i, Isa::mul(Isa::load(x + i), Isa::set(inverse)));
  }
  for (; i < n; ++i) out[i] = Isa::nearest_even(x[i] * inverse);
  return top / limit;
}

void layer_norm(const float* x, int64_t n, const float* weight, const float* bias, float* out) {
  F sums[2] = {Isa::zero(), Isa::zero()};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sums[0] = Isa::add(sums[0], Isa::load(x + i));
    sums[1] = Isa::add(sums[1], Isa::load(x + i + W));
  }
  float sum = Isa::total(Isa::add(sums[0], sums[1]));
  for (; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  const F centre = Isa::set(mean);
  sums[0] = sums[1] = Isa::zero();
  for (i = 0; i + 2 * W <= n; i += 2 * W) {
    const F a = Isa::sub(Isa::load(x + i), centre), b = Isa::sub(Isa::load(x + i + W), centre);
    sums[0] = Isa::fma(a, a, sums[0]);
    sums[1] = Isa::fma(b, b, sums[1]);
  }
  float squares = Isa::total(Isa::add(sums[0], sums[1]));
  for (; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + 1e-5f);
  const F spread = Isa::set(rstd);
  for (i = 0; i + W <= n; i += W) {
    const F y = Isa::mul(Isa::sub(Isa::load(x + i), centre), spread);
    const F scaled = Isa::mul(y, Isa::load(weight + i));
    Isa::store(out + i, bias ? Isa::add(scaled, Isa::load(bias + i)) : scaled);
  }
  for (; i < n; ++i) {
    out[i] = (x[i] - mean) * rstd * weight[i] + (bias ? bias[i] : 0.0f);
  }
}

void softmax(float* x, int64_t n, float scale) {
  F top = Isa::set(x[0]);
  int64_t i = 0;
  for (; i + W <= n; i += W) top = Isa::max(top, Isa::load(x + i));
  float most = Isa::largest(top);
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  const F factor = Isa::set(scale), shift = Isa::set(most);
  F sum = Isa::zero();
  for (i = 0; i + W <= n; i += W) {
    const F e = exp_of(Isa::mul(Isa::sub(Isa::load(x + i), shift), factor));
    Isa::store(x + i, e);
    sum = Isa::add(sum, e);
  }
  float total = Isa::total(sum);
  if (i < n) {
    float rest[W] = {};
    memcpy(rest, x + i, static_cast<size_t>(n - i) * 4);
    Isa::store(rest, exp_of(Isa::mul(Isa::sub(Isa::load(rest), shift), factor)));
    for (int j = 0; j < n - i; ++j) total += rest[j];
    memcpy(x + i, rest, static_cast<size_t>(n - i) * 4);
  }
  const F inverse = Isa::set(1.0f / total);
  map_floats(x, n, [inverse](F v) { return Isa::mul(v, inverse); });
}

void weighted_sum(const float* v, int64_t rows, int64_t cols, const float* p, float* out) {
  int64_t c = 0;
  for (; c + 4 * W <= cols; c += 4 * W) {
    F sums[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
    F more[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      const F a = Isa::set(p[r]), b = Isa::set(p[r + 1]);
      const float* at = v + r * cols + c;
      NANOGPT_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[i] = Isa::fma(a, Isa::load(at + i * W), sums[i]);
        more[i] = Isa::fma(b, Isa::load(at + cols + i * W), more[i]);
      }
    }
    if (r < rows) {
      const F a = Isa::set(p[r]);
      for (int i = 0; i < 4; ++i)
        sums[i] = Isa::fma(a, Isa::load(v + r * cols + c + i * W), sums[i]);
    }
    for (int i = 0; i < 4; ++i) Isa::store(out + c + i * W, Isa::add(sums[i], more[i]));
  }
  for (; c + W <= cols; c += W) {
    F sum = Isa::zero();
    for (int64_t r = 0; r < rows; ++r) {
      sum = Isa::fma(Isa::set(p[r]), Isa::load(v + r * cols + c), sum);
    }
    Isa::store(out + c, sum);
  }
  for (; c < cols; ++c) {
    float sum = 0.0f;
    for (int64_t r = 0; r < rows; ++r) sum += p[r] * v[r * cols + c];
    out[c] = sum;
  }
}

// ---- a few tokens: rows times several vectors, each row read once ----

// R rows times T vectors; every sum runs in the order in which one vector's does.
struct F32Few {
  const float* w;
  using X = float;
  static constexpr int step = W;
  using Sum = F;
  using Value = float;
  static Sum zero() { return Isa::zero(); }
  template <int R, int T>
  void take(Sum* sums, int64_t cols, const X* const* x, int64_t k) const {
    NANOGPT_UNROLL
    for (int r = 0; r < R; ++r) {
      const F row = Isa::load(w + r * cols + k);
      NANOGPT_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r * T + t] = Isa::fma(row, Isa::load(x[t] + k), sums[r * T + t]);
      }
    }
  }
  float tail(int64_t index, const X* x, int64_t k) const { return w[index] * x[k]; }
};

struct Bf16Few {
  const uint16_t* w;
  using X = float;
  static constexpr int step = 2 * W;
  using Sum = F;
  using Value = float;
  static Sum zero() { return Isa::zero(); }
  template <int R, int T>
  void take(Sum* sums, int64_t cols, const X* const* x, int64_t k) const {
    NANOGPT_UNROLL
    for (int r = 0; r < R; ++r) {
      const I pair = Isa::load_bits(w + r * cols + k);
      const F even = Isa::even_bf16(pair), odd = Isa::odd_bf16(pair);
      NANOGPT_UNROLL
      for (int t = 0; t < T; ++t) {
        const F first = Isa::fma(even, Isa::load(x[t] + k), sums[r * T + t]);
        sums[r * T + t] = Isa::fma(odd, Isa::load(x[t] + k + W), first);
      }
    }
  }
  float tail(int64_t index, const X* x, int64_t k) const { return from_bf16(w[index]) * x[k]; }
};

struct I8Few {
  const int8_t* w;
  using X = int16_t;
  static constexpr int step = 2 * W;
  using Sum = I;
  using Value = int32_t;
  static Sum zero() { return Isa::int_zero(); }
  template <int R, int T>
  void take(Sum* sums, int64_t cols, const X* const* x, int64_t k) const {
    NANOGPT_UNROLL
    for (int r = 0; r < R; ++r) {
      const I row = Isa::widen_i8(w + r * cols + k);
      NANOGPT_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r * T + t] = Isa::dot_i16(sums[r * T + t], row, Isa::load_ints(x[t] + k));
      }
    }
  }
  int32_t tail(int64_t index, const X* x, int64_t k) const { return w[index] * x[k]; }
};

// Calls keep(row, token, sum) for R rows from `row` on.
template <int R, int T, typename Rows, typename Keep>
inline void few_tile(const Rows& rows, int64_t row, int64_t cols, const typename Rows::X* const* x,
                     int count, const Keep& keep) {
  constexpr int N = (R * T + 7) / 8 * 8;
  typename Rows::Sum sums[N];
  typename Rows::Value values[N];
  NANOGPT_UNROLL
  for (int i = 0; i < N; ++i) sums[i] = Rows::zero();
  int64_t k = 0;
  for (; k + Rows::step <= cols; k += Rows::step) rows.template take<R, T>(sums, cols, x, k);
  NANOGPT_UNROLL
  for (int i = 0; i < N; i += 8) Isa::reduce8(sums + i, values + i);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < count; ++t) {
      typename Rows::Value value = values[r * T + t];
      for (int64_t at = k; at < cols; ++at) value += rows.tail(r * cols + at, x[t], at);
      keep(row + r, t, value);
    }
  }
}

// `given` vectors, at most T; what is missing is the last one again.
template <int T, typename Rows, typename Keep>
inline void few_rows(Rows rows, int64_t n, int64_t cols, const typename Rows::X* x, int64_t stride,
                     int given, const Keep& keep) {
  constexpr int room = Isa::registers >= 32 ? 24 : 12;
  constexpr int R = room / T > 0 ? room / T : 1;
  const typename Rows::X* each[T];
  for (int t = 0; t < T; ++t) each[t] = x + (t < given ? t : given - 1) * stride;
  int64_t r = 0;
  for (; r + R <= n; r += R, rows.w += R * cols) {
    few_tile<R, T>(rows, r, cols, each, given, keep);
  }
  for (; r < n; ++r, rows.w += cols) few_tile<1, T>(rows, r, cols, each, given, keep);
}

template <typename Rows, typename Keep>
inline void few(Rows rows, int64_t n, int64_t cols, const typename Rows::X* x, int64_t stride,
                int count, const Keep& keep) {
  if (count <= 2) {
    few_rows<2>(rows, n, cols, x, stride, count, keep);
  } else if (count <= 4) {
    few_rows<4>(rows, n, cols, x, stride, count, keep);
  } else if (count <= 6) {
    few_rows<6>(rows, n, cols, x, stride, count, keep);
  } else if (count <= 8) {
    few_rows<8>(rows, n, cols, x, stride, count, keep);
  } else {
    few_rows<kFew>(rows, n, cols, x, stride, count, keep);
  }
}

// The end of `few`: bias, what stands there already, GELU.
struct FewOut {
  const float* bias;
  float* out;
  int64_t stride;
  Store store;
  void keep(int64_t row, int token, float value) const {
    float* at = out + token * stride + row;
    value += bias ? bias[row] : 0.0f;
    *at = store == Store::add ? value + *at : value;
  }
  void end(int64_t rows, int count) const {
    if (store != Store::gelu) return;
    for (int t = 0; t < count; ++t) {
      map_floats(out + t * stride, rows, [](F x) { return gelu_of(x); });
    }
  }
};

void few_f32(const float* w, int64_t rows, int64_t cols, const float* x, int64_t x_stride,
             int count, const float* bias, float* out, int64_t out_stride, Store store) {
  const FewOut end{bias, out, out_stride, store};
  few(F32Few{w}, rows, cols, x, x_stride, count,
      [&](int64_t row, int token, float value) { end.keep(row, token, value); });
  end.end(rows, count);
}

void few_bf16(const uint16_t* w, int64_t rows, int64_t cols, const float* x, int64_t x_stride,
              int count, const float* bias, float* out, int64_t out_stride, Store store) {
  const FewOut end{bias, out, out_stride, store};
  few(Bf16Few{w}, rows, cols, x, x_stride, count,
      [&](int64_t row, int token, float value) { end.keep(row, token, value); });
  end.end(rows, count);
}

void few_i8(const int8_t* w, const float* scales, int64_t rows, int64_t cols, const int16_t* x,
            const float* x_scales, int64_t x_stride, int count, const float* bias, float* out,
            int64_t out_stride, Store store) {
  const FewOut end{bias, out, out_stride, store};
  few(I8Few{w}, rows, cols, x, x_stride, count, [&](int64_t row, int token, int32_t sum) {
    end.keep(row, token, static_cast<float>(sum) * (scales[row] * x_scales[token]));
  });
  end.end(rows, count);
}

// The columns in the order of the file: a load of pairs gives even and odd ones apart.
void weighted_sum_bf16(const uint16_t* v, int64_t rows, int64_t cols, const float* p, float* out) {
  int64_t c = 0;
  const auto columns = [&](auto count) {
    constexpr int N = decltype(count)::value;
    F even[N], odd[N];
    for (int i = 0; i < N; ++i) even[i] = odd[i] = Isa::zero();
    for (int64_t r = 0; r < rows; ++r) {
      const F a = Isa::set(p[r]);
      NANOGPT_UNROLL
      for (int i = 0; i < N; ++i) {
        const I pair = Isa::load_bits(v + r * cols + c + 2 * i * W);
        even[i] = Isa::fma(a, Isa::even_bf16(pair), even[i]);
        odd[i] = Isa::fma(a, Isa::odd_bf16(pair), odd[i]);
      }
    }
    for (int i = 0; i < N; ++i) {
      float lanes[2][W];
      Isa::store(lanes[0], even[i]);
      Isa::store(lanes[1], odd[i]);
      for (int j = 0; j < W; ++j) {
        out[c + 2 * i * W + 2 * j] = lanes[0][j];
        out[c + 2 * i * W + 2 * j + 1] = lanes[1][j];
      }
    }
    c += 2 * N * W;
  };
  while (c + 4 * W <= cols) columns(Count<2>());
  while (c + 2 * W <= cols) columns(Count<1>());
  for (; c < cols; ++c) {
    float sum = 0.0f;
    for (int64_t r = 0; r < rows; ++r) sum += p[r] * from_bf16(v[r * cols + c]);
    out[c] = sum;
  }
}

void to_bf16s(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
}

void from_bf16s(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(x[i]);
}

int32_t read(const void* from, int64_t bytes) {
  const int16_t* p = static_cast<const int16_t*>(from);
  I bits[4] = {Isa::int_zero(), Isa::int_zero(), Isa::int_zero(), Isa::int_zero()};
  for (int64_t at = 0; at + 8 * W <= bytes / 2; at += 8 * W) {
    NANOGPT_UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = Isa::either(bits[i], Isa::load_ints(p + at + 2 * i * W));
  }
  int16_t all[2 * W];
  Isa::store_ints(all, Isa::either(Isa::either(bits[0], bits[1]), Isa::either(bits[2], bits[3])));
  return all[0];
}

// ---- prompts: rows times panels of tokens ----

// NR rows times NV vectors of tokens; `ld` is the distance of two rows of w.
template <int NR, int NV>
inline void tile_f32(const float* w, int64_t ld, int64_t cols, const float* x, int width,
                     F (&sums)[NR][NV]) {
  for (int64_t k = 0; k < cols; ++k) {
    F v[NV];
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) v[i] = Isa::load(x + k * width + i * W);
    NANOGPT_UNROLL
    for (int r = 0; r < NR; ++r) {
      const F b = Isa::set(w[r * ld + k]);
      NANOGPT_UNROLL
      for (int i = 0; i < NV; ++i) sums[r][i] = Isa::fma(b, v[i], sums[r][i]);
    }
  }
}

template <int NR, int NV>
inline void store_tile(F (&sums)[NR][NV], const float* bias, float* out, int width, Store store) {
  NANOGPT_UNROLL
  for (int r = 0; r < NR; ++r) {
    const F b = Isa::set(bias ? bias[r] : 0.0f);
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) {
      float* at = out + r * width + i * W;
      F value = Isa::add(sums[r][i], b);
      if (store == Store::add) value = Isa::add(Isa::load(at), value);
      if (store == Store::gelu) value = gelu_of(value);
      Isa::store(at, value);
    }
  }
}

template <int NR, int NV>
void block_of(const float* w, int64_t ld, const float*, int64_t cols, const Panel& panel, int token,
              const float* bias, float* out, Store store) {
  F sums[NR][NV];
  NANOGPT_UNROLL
  for (int r = 0; r < NR; ++r) {
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) sums[r][i] = Isa::zero();
  }
  tile_f32<NR, NV>(w, ld, cols, static_cast<const float*>(panel.x) + token, panel.width, sums);
  store_tile<NR, NV>(sums, bias, out + token, panel.width, store);
}

template <int NR, int NV>
void block_of(const int16_t* w, int64_t ld, const float* row_scales, int64_t cols,
              const Panel& panel, int token, const float* bias, float* out, Store store) {
  I sums[NR][NV];
  NANOGPT_UNROLL
  for (int r = 0; r < NR; ++r) {
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) sums[r][i] = Isa::int_zero();
  }
  const int16_t* x = static_cast<const int16_t*>(panel.x) + 2 * token;
  for (int64_t k = 0; k < (cols + 1) / 2; ++k) {
    I v[NV];
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) v[i] = Isa::load_ints(x + 2 * (k * panel.width + i * W));
    NANOGPT_UNROLL
    for (int r = 0; r < NR; ++r) {
      const I b = Isa::set_pair(w + r * ld + 2 * k);
      NANOGPT_UNROLL
      for (int i = 0; i < NV; ++i) sums[r][i] = Isa::dot_i16(sums[r][i], b, v[i]);
    }
  }
  F scaled[NR][NV];
  NANOGPT_UNROLL
  for (int r = 0; r < NR; ++r) {
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) {
      const F scale = Isa::mul(Isa::set(row_scales[r]), Isa::load(panel.scales + token + i * W));
      scaled[r][i] = Isa::mul(Isa::to_float(sums[r][i]), scale);
    }
  }
  store_tile<NR, NV>(scaled, bias, out + token, panel.width, store);
}

#if defined(NANOGPT_BF16_DOT)
template <int NR, int NV>
void block_of(const uint16_t* w, int64_t ld, const float*, int64_t cols, const Panel& panel,
              int token, const float* bias, float* out, Store store) {
  F sums[NR][NV];
  NANOGPT_UNROLL
  for (int r = 0; r < NR; ++r) {
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) sums[r][i] = Isa::zero();
  }
  const uint16_t* x = static_cast<const uint16_t*>(panel.x) + 2 * token;
  for (int64_t k = 0; k < cols / 2; ++k) {
    I v[NV];
    NANOGPT_UNROLL
    for (int i = 0; i < NV; ++i) {
      v[i] = Isa::load_ints(reinterpret_cast<const int16_t*>(x + 2 * (k * panel.width + i * W)));
    }
    NANOGPT_UNROLL
    for (int r = 0; r < NR; ++r) {
      const I b = Isa::set_pair(reinterpret_cast<const int16_t*>(w + r * ld + 2 * k));
      NANOGPT_UNROLL
      for (int i = 0; i < NV; ++i) sums[r][i] = Isa::dot_bf16(sums[r][i], b, v[i]);
    }
  }
  if (cols % 2) {
    const int64_t k = cols / 2;
    for (int r = 0; r < NR; ++r) {
      const int16_t pair[2] = {static_cast<int16_t>(w[r * ld + cols - 1]), 0};
      const I b = Isa::set_pair(pair);
      for (int i = 0; i < NV; ++i) {
        const I v =
            Isa::load_ints(reinterpret_cast<const int16_t*>(x + 2 * (k * panel.width + i * W)));
        sums[r][i] = Isa::dot_bf16(sums[r][i], b, v);
      }
    }
  }
  store_tile<NR, NV>(sums, bias, out + token, panel.width, store);
}
#endif

// How many rows go with NV vectors of tokens: as many sums as the registers hold. kRowStep is a
// multiple of each.
constexpr int rows_with(int vectors) {
  return Isa::registers >= 32 ? (vectors >= 3 ? 6 : 12) : (vectors == 2 ? 6 : 2);
}

// Cuts `rows` into blocks and calls block.template run<NR, NV>(row, panel, token) for each.
// Rows go in the outer loop, so that a block's weights stay in the nearest cache.
template <int NV, typename Block>
inline void rows_of_panel(const Block& block, int64_t row, int64_t rows, const Panel& panel,
                          int token) {
  constexpr int NR = rows_with(NV);
  for (; rows >= NR; row += NR, rows -= NR) block.template run<NR, NV>(row, panel, token);
  for (; rows > 0; ++row, --rows) block.template run<1, NV>(row, panel, token);
}

template <typename Block>
inline void all_panels(const Block& block, int64_t row, int64_t rows, const Panel* panels,
                       int n_panels) {
  for (int p = 0; p < n_panels; ++p) {
    const Panel& panel = panels[p];
    if constexpr (Isa::registers >= 32) {
      static_assert(Isa::registers < 32 || W == 16 || W == 4, "panels are counted in registers");
      for (int token = 0; token < panel.width;) {
        const int left = (panel.width - token) / W;
        if (left >= 4) {
          rows_of_panel<4>(block, row, rows, panel, token);
          token += 4 * W;
        } else if (left == 3) {
          rows_of_panel<3>(block, row, rows, panel, token);
          token += 3 * W;
        } else if (left == 2) {
          rows_of_panel<2>(block, row, rows, panel, token);
          token += 2 * W;
        } else {
          rows_of_panel<1>(block, row, rows, panel, token);
          token += W;
        }
      }
    } else {
      for (int token = 0; token < panel.width; token += 2 * W) {
        rows_of_panel<2>(block, row, rows, panel, token);
      }
    }
  }
}

// Rows from `first` of a matrix on, `ld` apart, with all that `block_of` wants to know.
template <typename T>
struct RowBlock {
  const T* w;
  int64_t ld, first, cols;
  const float* scales;  // int8 only
  const float* bias;
  Store store;
  template <int NR, int NV>
  void run(int64_t row, const Panel& panel, int token) const {
    block_of<NR, NV>(w + row * ld, ld, scales ? scales + row : nullptr, cols, panel, token,
                     bias ? bias + first + row : nullptr, panel.out + (first + row) * panel.width,
                     store);
  }
};

// Calls part(row, count) for a few rows at a time.
template <typename Part>
inline void by_steps(int64_t rows, const Part& part) {
  for (int64_t row = 0; row < rows; row += kRowStep) {
    part(row, rows - row < kRowStep ? rows - row : kRowStep);
  }
}

void gemm_f32(const float* w, int64_t first, int64_t rows, int64_t cols, const float* bias,
              const Panel* panels, int n_panels, Store store, void*) {
  by_steps(rows, [&](int64_t row, int64_t count) {
    all_panels(RowBlock<float>{w + row * cols, cols, first + row, cols, nullptr, bias, store}, 0,
               count, panels, n_panels);
  });
}

// Without products of bfloat16 pairs, rows become float32 first.
void gemm_bf16(const uint16_t* w, int64_t first, int64_t rows, int64_t cols, const float* bias,
               const Panel* panels, int n_panels, Store store, [[maybe_unused]] void* scratch) {
  by_steps(rows, [&](int64_t row, int64_t count) {
#if defined(NANOGPT_BF16_DOT)
    all_panels(RowBlock<uint16_t>{w + row * cols, cols, first + row, cols, nullptr, bias, store}, 0,
               count, panels, n_panels);
#else
    float* wide = static_cast<float*>(scratch);
    from_bf16s(w + row * cols, count * cols, wide);
    all_panels(RowBlock<float>{wide, cols, first + row, cols, nullptr, bias, store}, 0, count,
               panels, n_panels);
#endif
  });
}

void gemm_i8(const int8_t* w, const float* scales, int64_t first, int64_t rows, int64_t cols,
             const float* bias, const Panel* panels, int n_panels, Store store, void* scratch) {
  int16_t* wide = static_cast<int16_t*>(scratch);
  const int64_t ld = (cols + 1) / 2 * 2;
  by_steps(rows, [&](int64_t row, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int8_t* from = w + (row + r) * cols;
      int16_t* to = wide + r * ld;
      int64_t k = 0;
      for (; k + 2 * W <= cols; k += 2 * W) Isa::store_ints(to + k, Isa::widen_i8(from + k));
      for (; k < cols; ++k) to[k] = from[k];
      if (ld > cols) to[cols] = 0;
    }
    all_panels(RowBlock<int16_t>{wide, ld, first + row, cols, scales + row, bias, store}, 0, count,
               panels, n_panels);
  });
}

// ---- one group of kLanes tokens ----

void norm_group(const float* x, int64_t n, int width, const float* weight, const float* bias,
                float* out) {
  const F count = Isa::set(1.0f / static_cast<float>(n));
  for (int i = 0; i < kVectors; ++i, x += W, out += W) {
    F sum = Isa::zero();
    for (int64_t c = 0; c < n; ++c) sum = Isa::add(sum, Isa::load(x + c * width));
    const F mean = Isa::mul(sum, count);
    F squares = Isa::zero();
    for (int64_t c = 0; c < n; ++c) {
      const F d = Isa::sub(Isa::load(x + c * width), mean);
      squares = Isa::fma(d, d, squares);
    }
    const F spread = Isa::sqrt(Isa::add(Isa::mul(squares, count), Isa::set(1e-5f)));
    const F rstd = Isa::div(Isa::set(1.0f), spread);
    for (int64_t c = 0; c < n; ++c) {
      const F y = Isa::mul(Isa::sub(Isa::load(x + c * width), mean), rstd);
      const F scaled = Isa::mul(y, Isa::set(weight[c]));
      Isa::store(out + c * width, bias ? Isa::add(scaled, Isa::set(bias[c])) : scaled);
    }
  }
}

#if defined(NANOGPT_BF16_DOT)
void pack_bf16(const float* x, int64_t n, int width, uint16_t* out) {
  for (int64_t k = 0; k < n; k += 2) {
    for (int i = 0; i < kVectors; ++i) {
      const F first = Isa::load(x + k * width + i * W);
      const F second = k + 1 < n ? Isa::load(x + (k + 1) * width + i * W) : Isa::zero();
      Isa::store_ints(reinterpret_cast<int16_t*>(out + k * width + 2 * i * W),
                      Isa::bf16_pairs(first, second));
    }
  }
}

#else
void pack_bf16(const float*, int64_t, int, uint16_t*) {}
#endif

void pack_i16(const float* x, int64_t n, int width, int16_t* out, float* scales) {
  const float limit = static_cast<float>(max_of_int16_times(n));
  float inverse[kLanes];
  for (int i = 0; i < kVectors; ++i) {
    F largest = Isa::zero(), test = Isa::zero();
    for (int64_t k = 0; k < n; ++k) {
      const F v = Isa::load(x + k * width + i * W);
      largest = Isa::max(largest, Isa::abs(v));
      test = Isa::fma(v, Isa::zero(), test);
    }
    float top[W], bad[W];
    Isa::store(top, largest);
    Isa::store(bad, test);
    for (int t = 0; t < W; ++t) {
      const bool usable = bad[t] == 0.0f && top[t] >= kTiny;
      inverse[i * W + t] = usable ? limit / top[t] : 0.0f;
      scales[i * W + t] = usable ? top[t] / limit : bad[t];
    }
  }
  for (int64_t k = 0; k < n; k += 2) {
    for (int i = 0; i < kVectors; ++i) {
      const F factor = Isa::load(inverse + i * W);
      const F first = Isa::load(x + k * width + i * W);
      const F second = k + 1 < n ? Isa::load(x + (k + 1) * width + i * W) : Isa::zero();
      Isa::store_ints(out + k * width + 2 * i * W,
                      Isa::int_pairs(Isa::mul(first, factor), Isa::mul(second, factor)));
    }
  }
}

void attend(const float* q, int width, const float* k, const float* v, int64_t first, int64_t keys,
            int64_t head_width, float scale, float* scores, float* out) {
  const int64_t seen = first + kLanes < keys ? first + kLanes : keys;
  constexpr int NK = Isa::registers >= 32 ? 8 : 4;
  for (int i = 0; i < kVectors; ++i) {
    const F factor = Isa::set(scale);
    F top = Isa::set(-3.0e38f);
    int64_t j = 0;
    const auto keep = [&](int64_t key, F score) {
      score = Isa::mul(score, factor);
      if (key > first) {
        float lanes[W];
        Isa::store(lanes, score);
        for (int l = 0; l < W; ++l) {
          if (key > first + i * W + l) lanes[l] = -3.0e38f;
        }
        score = Isa::load(lanes);
      }
      top = Isa::max(top, score);
      Isa::store(scores + key * W, score);
    };
    for (; j + NK <= seen; j += NK) {
      F sums[NK];
      NANOGPT_UNROLL
      for (int n = 0; n < NK; ++n) sums[n] = Isa::zero();
      for (int64_t d = 0; d < head_width; ++d) {
        const F query = Isa::load(q + d * width + i * W);
        NANOGPT_UNROLL
        for (int n = 0; n < NK; ++n) {
          sums[n] = Isa::fma(Isa::set(k[(j + n) * head_width + d]), query, sums[n]);
        }
      }
      for (int n = 0; n < NK; ++n) keep(j + n, sums[n]);
    }
    for (; j < seen; ++j) {
      F sum = Isa::zero();
      for (int64_t d = 0; d < head_width; ++d) {
        sum = Isa::fma(Isa::set(k[j * head_width + d]), Isa::load(q + d * width + i * W), sum);
      }
      keep(j, sum);
    }
    F total = Isa::zero();
    for (j = 0; j < seen; ++j) {
      // exp_of never gives zero; what is masked has to be.
      const F score = Isa::load(scores + j * W);
      const F e = Isa::zero_below(score, -1.0e38f, exp_of(Isa::sub(score, top)));
      Isa::store(scores + j * W, e);
      total = Isa::add(total, e);
    }
    const F inverse = Isa::div(Isa::set(1.0f), total);
    int64_t d = 0;
    for (; d + NK <= head_width; d += NK) {
      F sums[NK];
      NANOGPT_UNROLL
      for (int n = 0; n < NK; ++n) sums[n] = Isa::zero();
      for (j = 0; j < seen; ++j) {
        const F p = Isa::load(scores + j * W);
        NANOGPT_UNROLL
        for (int n = 0; n < NK; ++n) {
          sums[n] = Isa::fma(Isa::set(v[j * head_width + d + n]), p, sums[n]);
        }
      }
      for (int n = 0; n < NK; ++n) {
        Isa::store(out + (d + n) * width + i * W, Isa::mul(sums[n], inverse));
      }
    }
    for (; d < head_width; ++d) {
      F sum = Isa::zero();
      for (j = 0; j < seen; ++j) {
        sum = Isa::fma(Isa::set(v[j * head_width + d]), Isa::load(scores + j * W), sum);
      }
      Isa::store(out + d * width + i * W, Isa::mul(sum, inverse));
    }
  }
}

}  // namespace
}  // namespace nanogpt

#include "engine/softmax_loops.h"

namespace nanogpt {

#if defined(NANOGPT_BF16_DOT)
#define NANOGPT_PAIRS true
#else
#define NANOGPT_PAIRS false
#endif

const Kernels NANOGPT_KERNELS = {
    NANOGPT_KERNELS_NAME,
    NANOGPT_PAIRS,
    matvec_f32,
    matvec_bf16,
    matvec_i8,
    few_f32,
    few_bf16,
    few_i8,
    split_bf16,
    quantize,
    layer_norm,
    softmax,
    weighted_sum,
    weighted_sum_bf16,
    to_bf16s,
    from_bf16s,
    read,
    gemm_f32,
    gemm_bf16,
    gemm_i8,
    norm_group,
    pack_bf16,
    pack_i16,
    attend,
    softmax_sums,
};

}  // namespace nanogpt
