// Sixteen lanes of AVX-512: shared by the two files that are compiled with and without BF16.
#include <immintrin.h>
#include <stdint.h>

namespace nanogpt {
namespace {

struct Isa {
  using F = __m512;
  using I = __m512i;
  static constexpr int W = 16;
  static constexpr int registers = 32;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F zero_below(F value, float limit, F kept) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, set(limit), _CMP_NLT_UQ), kept);
  }
  static float total(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }

  using D = __m512d;
  static D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }

  static I int_zero() { return _mm512_setzero_si512(); }
  static I load_ints(const int16_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(int16_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I widen_i8(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I set_pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  static I dot_i16(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static int16_t nearest_even(float x) {
    return static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(x)));
  }
  static void store_i16(int16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
  }
  static I int_pairs(F first, F second) {
    const I low = _mm512_and_si512(_mm512_cvtps_epi32(first), _mm512_set1_epi32(0xffff));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16));
  }
#if defined(NANOGPT_BF16_DOT)
  // Adds half of the last place that is kept, and the kept bit itself where that is a tie. NaN
  // stays NaN, whatever its bits.
  static I rounded_bf16(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7fc00000));
  }
  static I bf16_pairs(F first, F second) {
    const I high =
        _mm512_and_si512(rounded_bf16(second), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_or_si512(high, _mm512_srli_epi32(rounded_bf16(first), 16));
  }
#endif

  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I load_bits(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static F even_bf16(I pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
  static F odd_bf16(I pair) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
#if defined(NANOGPT_BF16_DOT)
  static F dot_bf16(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#endif

  // Eight sums of sixteen lanes at once: halves are folded pairwise until one vector of eight is
  // left.
  static void reduce8(const F* s, float* out) {
    __m256 h[8];
    for (int r = 0; r < 8; ++r) {
      h[r] = _mm256_add_ps(_mm512_castps512_ps256(s[r]), _mm512_extractf32x8_ps(s[r], 1));
    }
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(h[4], h[5]), _mm256_hadd_ps(h[6], h[7]));
    _mm256_storeu_ps(
        out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
  }
  static void reduce8(const I* s, int32_t* out) {
    __m256i h[8];
    for (int r = 0; r < 8; ++r) {
      h[r] = _mm256_add_epi32(_mm512_castsi512_si256(s[r]), _mm512_extracti64x4_epi64(s[r], 1));
    }
    const __m256i a =
        _mm256_hadd_epi32(_mm256_hadd_epi32(h[0], h[1]), _mm256_hadd_epi32(h[2], h[3]));
    const __m256i b =
        _mm256_hadd_epi32(_mm256_hadd_epi32(h[4], h[5]), _mm256_hadd_epi32(h[6], h[7]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                         _mm256_permute2x128_si256(a, b, 0x31)));
  }
};

}  // namespace
}  // namespace nanogpt
