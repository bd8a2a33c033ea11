// Four lanes of NEON, which every 64-bit ARM CPU has.
#if defined(__aarch64__)
#include <arm_neon.h>
#include <stdint.h>

namespace nanogpt {
namespace {

struct Isa {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int W = 4;
  static constexpr int registers = 32;

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  using D = float64x2_t;
  static D fma(D a, D b, D c) { return vfmaq_f64(c, a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  // The numbers' larger one where the other is NaN, like the x86 instruction with a NaN first.
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F sqrt(F a) { return vsqrtq_f32(a); }
  static F abs(F a) { return vabsq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }
  static F scale_by_power(F a, F n) {
    const I power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(power));
  }
  static F zero_below(F value, float limit, F kept) {
    return vreinterpretq_f32_u32(
        vbicq_u32(vreinterpretq_u32_f32(kept), vcltq_f32(value, set(limit))));
  }
  static float total(F a) { return vaddvq_f32(a); }
  static float largest(F a) { return vmaxnmvq_f32(a); }

  static I int_zero() { return vdupq_n_s32(0); }
  static I load_ints(const int16_t* p) { return vreinterpretq_s32_s16(vld1q_s16(p)); }
  static void store_ints(int16_t* p, I x) { vst1q_s16(p, vreinterpretq_s16_s32(x)); }
  static I widen_i8(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }
  static I set_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return vdupq_n_s32(both);
  }
  static I dot_i16(I sum, I a, I b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const I low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(x, y)));
  }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static int16_t nearest_even(float x) { return static_cast<int16_t>(vcvtns_s32_f32(x)); }
  static void store_i16(int16_t* p, F x) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(x))); }
  static I int_pairs(F first, F second) {
    const I low = vandq_s32(vcvtnq_s32_f32(first), vdupq_n_s32(0xffff));
    return vorrq_s32(low, vshlq_n_s32(vcvtnq_s32_f32(second), 16));
  }

  static I either(I a, I b) { return vorrq_s32(a, b); }
  static I load_bits(const uint16_t* p) { return vreinterpretq_s32_u16(vld1q_u16(p)); }
  static F even_bf16(I pair) { return vreinterpretq_f32_s32(vshlq_n_s32(pair, 16)); }
  static F odd_bf16(I pair) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_s32(pair), vdupq_n_u32(0xffff0000u)));
  }

  static void reduce8(const F* s, float* out) {
    const F a = vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));
    const F b = vpaddq_f32(vpaddq_f32(s[4], s[5]), vpaddq_f32(s[6], s[7]));
    store(out, a);
    store(out + 4, b);
  }
  static void reduce8(const I* s, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])));
    vst1q_s32(out + 4, vpaddq_s32(vpaddq_s32(s[4], s[5]), vpaddq_s32(s[6], s[7])));
  }
};

}  // namespace
}  // namespace nanogpt

#define NANOGPT_KERNELS kNeonKernels
#define NANOGPT_KERNELS_NAME "neon"
#include "engine/kernels_loops.h"
#define NANOGPT_TRAINING kNeonTraining
#include "engine/training_loops.h"
#endif
