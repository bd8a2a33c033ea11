// Plain C++ for any CPU: four lanes that the compiler may turn into vectors.
#include <stdint.h>

namespace nanogpt {
namespace {

struct Isa {
  static constexpr int W = 4;
  static constexpr int registers = 16;
  struct F {
    float v[W];
  };
  // Sums of products of neighbouring int16, or those int16 themselves.
  union I {
    int32_t v[W];
    int16_t h[2 * W];
    uint16_t u[2 * W];
  };

  typedef double D __attribute__((vector_size(16)));
  static D fma(D a, D b, D c) { return a * b + c; }

  template <typename Function>
  static F each(Function f) {
    F out;
    for (int i = 0; i < W; ++i) out.v[i] = f(i);
    return out;
  }
  static F set(float x) {
    return each([x](int) { return x; });
  }
  static F zero() { return set(0.0f); }
  static F load(const float* p) {
    return each([p](int i) { return p[i]; });
  }
  static void store(float* p, const F& x) {
    for (int i = 0; i < W; ++i) p[i] = x.v[i];
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F max(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F sqrt(const F& a) {
    return each([&](int i) { return __builtin_sqrtf(a.v[i]); });
  }
  static F abs(const F& a) {
    return each([&](int i) { return __builtin_fabsf(a.v[i]); });
  }
  static F round(const F& a) {
    return each([&](int i) { return __builtin_rintf(a.v[i]); });
  }
  static F scale_by_power(const F& a, const F& n) {
    return each([&](int i) {
      const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
      const uint32_t bits = static_cast<uint32_t>(whole + 127) << 23;
      float power;
      __builtin_memcpy(&power, &bits, 4);
      return a.v[i] * power;
    });
  }
  static F zero_below(const F& value, float limit, const F& kept) {
    return each([&](int i) { return value.v[i] < limit ? 0.0f : kept.v[i]; });
  }
  static float total(const F& a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  static float largest(const F& a) {
    float most = a.v[0];
    for (int i = 1; i < W; ++i) most = a.v[i] > most ? a.v[i] : most;
    return most;
  }

  static I int_zero() { return I{{0, 0, 0, 0}}; }
  static I load_ints(const int16_t* p) {
    I out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static void store_ints(int16_t* p, const I& x) { __builtin_memcpy(p, &x, sizeof x); }
  static I widen_i8(const int8_t* p) {
    int16_t wide[2 * W];
    for (int i = 0; i < 2 * W; ++i) wide[i] = p[i];
    return load_ints(wide);
  }
  static I set_pair(const int16_t* p) {
    const int16_t pairs[2 * W] = {p[0], p[1], p[0], p[1], p[0], p[1], p[0], p[1]};
    return load_ints(pairs);
  }
  static I dot_i16(const I& sum, const I& a, const I& b) {
    int16_t x[2 * W], y[2 * W];
    store_ints(x, a);
    store_ints(y, b);
    I out;
    for (int i = 0; i < W; ++i) {
      out.v[i] = sum.v[i] + x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    }
    return out;
  }
  static F to_float(const I& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static int16_t nearest_even(float x) { return static_cast<int16_t>(__builtin_rintf(x)); }
  static void store_i16(int16_t* p, const F& x) {
    for (int i = 0; i < W; ++i) p[i] = nearest_even(x.v[i]);
  }
  static I int_pairs(const F& first, const F& second) {
    int16_t pairs[2 * W];
    for (int i = 0; i < W; ++i) {
      pairs[2 * i] = nearest_even(first.v[i]);
      pairs[2 * i + 1] = nearest_even(second.v[i]);
    }
    return load_ints(pairs);
  }

  static I either(const I& a, const I& b) {
    I out;
    for (int i = 0; i < W; ++i) out.v[i] = a.v[i] | b.v[i];
    return out;
  }
  static I load_bits(const uint16_t* p) {
    I out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static F half_of_pair(const I& pair, int half) {
    uint16_t bits[2 * W];
    __builtin_memcpy(bits, &pair, sizeof bits);
    return each([&](int i) {
      const uint32_t wide = static_cast<uint32_t>(bits[2 * i + half]) << 16;
      float out;
      __builtin_memcpy(&out, &wide, 4);
      return out;
    });
  }
  static F even_bf16(const I& pair) { return half_of_pair(pair, 0); }
  static F odd_bf16(const I& pair) { return half_of_pair(pair, 1); }

  static void reduce8(const F* s, float* out) {
    for (int r = 0; r < 8; ++r) out[r] = total(s[r]);
  }
  static void reduce8(const I* s, int32_t* out) {
    for (int r = 0; r < 8; ++r) out[r] = s[r].v[0] + s[r].v[1] + s[r].v[2] + s[r].v[3];
  }
};

}  // namespace
}  // namespace nanogpt

#define NANOGPT_KERNELS kScalarKernels
#define NANOGPT_KERNELS_NAME "scalar"
#include "engine/kernels_loops.h"
#define NANOGPT_TRAINING kScalarTraining
#include "engine/training_loops.h"
