// The draw costs one pass over the vocabulary. Noise is a function of a 32-bit word, and a word can
// win only if it is close enough to 2^32: with u = (w + 0.5) / 2^32 and the best sum so far,
//   x + g(w) >= best  implies  1 - u <= 1 - exp(-exp(x - best)) <= exp(x - best),
// so log2(2^32 - w) <= 32 + (x - best) / ln 2, up to rounding. The logarithm on the left is bounded
// from below by the bits of the number as a float, which is all that a vector unit computes; the
// two exact logarithms are taken of the few ids that pass, and the result is that of the plain
// argmax in every case.
#include "engine/sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <utility>

#include "engine/error.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NANOGPT_SAMPLER_X86 1
#include <immintrin.h>
#endif

namespace nanogpt {
namespace {

constexpr int64_t kBlock = 64;  // ids that are handled at once; 16 counters of Philox
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLog2E = 1.4426950408889634;
// The noise of the largest word, 22.87, rounded up.
constexpr double kLargestNoise = 22.9;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

struct Place {
  uint32_t position, row, stream;
  std::array<uint32_t, 2> key;
};

double noise_of(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) / 4294967296.0;
  return -std::log(-std::log(uniform));
}

uint32_t word_of(const Place& place, uint32_t id) {
  return philox({id / 4, place.position, place.row, place.stream}, place.key)[id % 4];
}

#define NANOGPT_INLINE inline __attribute__((always_inline))

// What a word has to stay below, in the units of `could_win`; `slack` covers every rounding.
NANOGPT_INLINE float limit_of(double x, double best, double slack) {
  return static_cast<float>((x - best) * kLog2E + slack) + 158.0f;
}

// Whether the word's noise can lift its id to the best; never false where it does.
NANOGPT_INLINE bool could_win(uint32_t word, float limit) {
  // (2^32 - 1 - w) div 2 < (2^32 - w) / 2. The bits of a float f above 0, divided by 2^23, are at
  // most log2 f + 127.
  const float rest = static_cast<float>(static_cast<int32_t>(~word >> 1));
  int32_t bits;
  std::memcpy(&bits, &rest, sizeof bits);
  return static_cast<float>(bits) * 0x1p-23f <= limit;
}

double slack_of(double best) {
  // Rounding of large sums can lift an id by that much; 2e-3 covers the float32 arithmetic.
  return 2e-3 + 4 * DBL_EPSILON * std::fabs(best);
}

// Each of these is compiled for several instruction sets; none of them rounds differently, so the
// choice changes no result.

NANOGPT_INLINE bool any_could_win_body(const uint32_t* words, const double* x, double best,
                                       double slack) {
  int any = 0;
  for (int64_t j = 0; j < kBlock; ++j) any |= could_win(words[j], limit_of(x[j], best, slack));
  return any != 0;
}

NANOGPT_INLINE double block_maximum(const double* x) {
  double lanes[8];
  for (int lane = 0; lane < 8; ++lane) lanes[lane] = x[lane];
  for (int64_t j = 8; j < kBlock; j += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      lanes[lane] = x[j + lane] > lanes[lane] ? x[j + lane] : lanes[lane];
    }
  }
  double maximum = lanes[0];
  for (int lane = 1; lane < 8; ++lane) maximum = lanes[lane] > maximum ? lanes[lane] : maximum;
  return maximum;
}

NANOGPT_INLINE void maxima_body(const double* x, int64_t blocks, double* maxima) {
  for (int64_t b = 0; b < blocks; ++b) maxima[b] = block_maximum(x + b * kBlock);
}

// float64 of whole blocks of logits over the temperature; false where one is NaN or +inf.
NANOGPT_INLINE bool widen_body(const float* logits, int64_t blocks, double temperature, double* x,
                               double* maxima) {
  int bad = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* from = logits + b * kBlock;
    double* to = x + b * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) bad |= !(from[j] <= FLT_MAX);
    if (temperature == 1.0) {
      for (int64_t j = 0; j < kBlock; ++j) to[j] = static_cast<double>(from[j]);
    } else {
      for (int64_t j = 0; j < kBlock; ++j) to[j] = static_cast<double>(from[j]) / temperature;
    }
    maxima[b] = block_maximum(to);
  }
  return bad == 0;
}

// exp for x <= 0 within a unit in the last place; below -708 it gives 0. Only additions and
// multiplications, so that any instruction set gives the same double.
NANOGPT_INLINE double exponential(double x) {
  constexpr double kRound = 0x1.8p52;
  constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double held = x < -708.0 ? -708.0 : x;
  const double shifted = held * kLog2E + kRound;
  const double n = shifted - kRound;
  const double r = (held - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  const double e = 1.0 + (r + r * r * p);
  uint64_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &e, sizeof bits);
  bits += exponent << 52;
  double result;
  std::memcpy(&result, &bits, sizeof result);
  return x < -708.0 ? 0.0 : result;
}

// weights[i] = exp(x[i] - maximum) for whole blocks; gives their sum.
NANOGPT_INLINE double exponentials_body(const double* x, int64_t blocks, double maximum,
                                        double* weights) {
  double lanes[8] = {};
  for (int64_t j = 0; j < blocks * kBlock; j += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      weights[j + lane] = exponential(x[j + lane] - maximum);
      lanes[lane] += weights[j + lane];
    }
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

struct Mass {
  double sum, count;
};

// Sum and number of the weights of at least `threshold`, in whole blocks.
NANOGPT_INLINE Mass mass_body(const double* weights, int64_t blocks, double threshold) {
  double sums[kBlock] = {};
  int64_t counts[kBlock] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const double* from = weights + b * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) {
      // Masks instead of a choice, which GCC would turn into jumps.
      const int64_t above = from[j] >= threshold;
      int64_t bits;
      std::memcpy(&bits, &from[j], sizeof bits);
      bits &= -above;
      double weight;
      std::memcpy(&weight, &bits, sizeof weight);
      sums[j] += weight;
      counts[j] += above;
    }
  }
  Mass mass{0.0, 0.0};
  for (int64_t j = 0; j < kBlock; ++j) {
    mass.sum += sums[j], mass.count += static_cast<double>(counts[j]);
  }
  return mass;
}

// x += tilt for whole blocks; false where a sum is NaN or +inf.
NANOGPT_INLINE bool add_body(const double* tilt, int64_t blocks, double* x, double* maxima) {
  int bad = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    double* to = x + b * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) {
      to[j] += tilt[b * kBlock + j];
      bad |= !(to[j] <= DBL_MAX);
    }
    maxima[b] = block_maximum(to);
  }
  return bad == 0;
}

void words_plain(uint32_t first, const Place& place, uint32_t* words) {
  for (uint32_t quad = 0; quad < kBlock / 4; ++quad) {
    const auto four = philox({first + quad, place.position, place.row, place.stream}, place.key);
    std::copy(four.begin(), four.end(), words + 4 * quad);
  }
}

struct Kernels {
  void (*words)(uint32_t first, const Place& place, uint32_t* words);
  bool (*any_could_win)(const uint32_t* words, const double* x, double best, double slack);
  void (*maxima)(const double* x, int64_t blocks, double* maxima);
  bool (*widen)(const float* logits, int64_t blocks, double temperature, double* x, double* maxima);
  double (*exponentials)(const double* x, int64_t blocks, double maximum, double* weights);
  Mass (*mass)(const double* weights, int64_t blocks, double threshold);
  bool (*add)(const double* tilt, int64_t blocks, double* x, double* maxima);
};

#define NANOGPT_SAMPLER_KERNELS(SUFFIX, TARGET)                                                  \
  TARGET bool any_could_win_##SUFFIX(const uint32_t* words, const double* x, double best,        \
                                     double slack) {                                             \
    return any_could_win_body(words, x, best, slack);                                            \
  }                                                                                              \
  TARGET void maxima_##SUFFIX(const double* x, int64_t blocks, double* maxima) {                 \
    maxima_body(x, blocks, maxima);                                                              \
  }                                                                                              \
  TARGET bool widen_##SUFFIX(const float* logits, int64_t blocks, double temperature, double* x, \
                             double* maxima) {                                                   \
    return widen_body(logits, blocks, temperature, x, maxima);                                   \
  }                                                                                              \
  TARGET double exponentials_##SUFFIX(const double* x, int64_t blocks, double maximum,           \
                                      double* weights) {                                         \
    return exponentials_body(x, blocks, maximum, weights);                                       \
  }                                                                                              \
  TARGET Mass mass_##SUFFIX(const double* weights, int64_t blocks, double threshold) {           \
    return mass_body(weights, blocks, threshold);                                                \
  }                                                                                              \
  TARGET bool add_##SUFFIX(const double* tilt, int64_t blocks, double* x, double* maxima) {      \
    return add_body(tilt, blocks, x, maxima);                                                    \
  }                                                                                              \
  constexpr Kernels k##SUFFIX = {words_##SUFFIX, any_could_win_##SUFFIX, maxima_##SUFFIX,        \
                                 widen_##SUFFIX, exponentials_##SUFFIX,  mass_##SUFFIX,          \
                                 add_##SUFFIX};

NANOGPT_SAMPLER_KERNELS(plain, )

#ifdef NANOGPT_SAMPLER_X86
// Every counter word lies in the lower half of a 64-bit lane. A product is 64 bits wide: its upper
// half is shifted down, its lower half is used as it lies, and what stands above it does not
// matter, for the next product reads the lower half alone.
__attribute__((target("avx2"))) void words_avx2(uint32_t first, const Place& place,
                                                uint32_t* words) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  const __m256i lower = _mm256_set1_epi64x(0xFFFFFFFF);
  for (uint32_t group = 0; group < kBlock / 4; group += 8) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t quad = first + group + 4 * half;
      c0[half] = _mm256_set_epi64x(quad + 3, quad + 2, quad + 1, quad);
      c1[half] = _mm256_set1_epi64x(place.position);
      c2[half] = _mm256_set1_epi64x(place.row);
      c3[half] = _mm256_set1_epi64x(place.stream);
    }
    uint32_t k0 = place.key[0], k1 = place.key[1];
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int half = 0; half < 2; ++half) {
        const __m256i a = _mm256_mul_epu32(c0[half], m0), b = _mm256_mul_epu32(c2[half], m1);
        c0[half] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1[half]), key0);
        c1[half] = b;
        c2[half] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3[half]), key1);
        c3[half] = a;
      }
      k0 += kWeyl0, k1 += kWeyl1;
    }
    for (uint32_t half = 0; half < 2; ++half) {
      const __m256i a =
          _mm256_or_si256(_mm256_and_si256(c0[half], lower), _mm256_slli_epi64(c1[half], 32));
      const __m256i b =
          _mm256_or_si256(_mm256_and_si256(c2[half], lower), _mm256_slli_epi64(c3[half], 32));
      const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
      auto* out = reinterpret_cast<__m256i*>(words + 4 * (group + 4 * half));
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

__attribute__((target("avx512f"))) void words_avx512(uint32_t first, const Place& place,
                                                     uint32_t* words) {
  // Masks of ones, because GCC 12 warns of an uninitialised operand in the plain forms.
  constexpr __mmask8 kAll = 0xFF;
  const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t quad = first + 8 * half;
    c0[half] = _mm512_set_epi64(quad + 7, quad + 6, quad + 5, quad + 4, quad + 3, quad + 2,
                                quad + 1, quad);
    c1[half] = _mm512_set1_epi64(place.position);
    c2[half] = _mm512_set1_epi64(place.row);
    c3[half] = _mm512_set1_epi64(place.stream);
  }
  uint32_t k0 = place.key[0], k1 = place.key[1];
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_maskz_mul_epu32(kAll, c0[half], m0),
                    b = _mm512_maskz_mul_epu32(kAll, c2[half], m1);
      // 0x96 is the exclusive or of three.
      c0[half] =
          _mm512_ternarylogic_epi64(_mm512_maskz_srli_epi64(kAll, b, 32), c1[half], key0, 0x96);
      c1[half] = b;
      c2[half] =
          _mm512_ternarylogic_epi64(_mm512_maskz_srli_epi64(kAll, a, 32), c3[half], key1, 0x96);
      c3[half] = a;
    }
    k0 += kWeyl0, k1 += kWeyl1;
  }
  const __m512i lower_order = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i upper_order = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (uint32_t half = 0; half < 2; ++half) {
    const __m512i a = _mm512_mask_shuffle_epi32(c0[half], 0xAAAA, c1[half], _MM_PERM_CCAA);
    const __m512i b = _mm512_mask_shuffle_epi32(c2[half], 0xAAAA, c3[half], _MM_PERM_CCAA);
    uint32_t* out = words + 32 * half;
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, lower_order, b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, upper_order, b));
  }
}

#define NANOGPT_AVX512 "avx512f,avx512dq,avx512bw,avx512vl"
NANOGPT_SAMPLER_KERNELS(avx2, __attribute__((target("avx2"))))
NANOGPT_SAMPLER_KERNELS(avx512, __attribute__((target(NANOGPT_AVX512))))
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef NANOGPT_SAMPLER_X86
    // The decoder refuses a name that it does not know; here every choice draws the same ids.
    const char* named = std::getenv("NANOGPT_ISA");
    const std::string isa = named ? named : "";
    const bool may_avx512 = isa.empty() || isa == "avx512";
    if (may_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return kavx512;
    }
    if ((may_avx512 || isa == "avx2") && __builtin_cpu_supports("avx2")) return kavx2;
#endif
    return kplain;
  }();
  return chosen;
}

int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

std::string text_of(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// The best id so far; of equal sums the lowest id wins, in whatever order they come.
struct Best {
  double sum = -kInfinity;
  int32_t id = -1;
  void offer(double candidate, int32_t its_id) {
    if (candidate > sum || (candidate == sum && its_id < id)) sum = candidate, id = its_id;
  }
};

}  // namespace

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = static_cast<uint64_t>(counter[0]) * kMultiplier0;
    const uint64_t high = static_cast<uint64_t>(counter[2]) * kMultiplier1;
    counter = {static_cast<uint32_t>(high >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(high),
               static_cast<uint32_t>(low >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(low)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

double gumbel(uint64_t seed, uint32_t id, uint32_t position, uint32_t row, uint32_t stream) {
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed),
                                       static_cast<uint32_t>(seed >> 32)};
  return noise_of(word_of({position, row, stream, key}, id));
}

void Filters::check() const {
  if (!(temperature >= 0 && std::isfinite(temperature))) {
    throw UsageError("temperature must be at least 0, not " + text_of(temperature));
  }
  if (top_k && *top_k < 1) {
    throw UsageError("top_k must be at least 1, not " + std::to_string(*top_k));
  }
  if (top_p && !(*top_p > 0 && *top_p <= 1)) {
    throw UsageError("top_p must be above 0 and at most 1, not " + text_of(*top_p));
  }
  if (min_p && !(*min_p >= 0 && *min_p <= 1)) {
    throw UsageError("min_p must be from 0 to 1, not " + text_of(*min_p));
  }
  if (!(repetition_penalty > 0 && std::isfinite(repetition_penalty))) {
    throw UsageError("repetition_penalty must be above 0, not " + text_of(repetition_penalty));
  }
}

Sampler::Sampler(int64_t vocab_size, Filters filters, uint64_t seed, uint32_t row, uint32_t stream,
                 Tilting tilting)
    : vocab_size_(vocab_size),
      filters_(filters),
      seed_(seed),
      row_(row),
      stream_(stream),
      tilting_(tilting) {
  filters_.check();
  if (tilting_.top_k && *tilting_.top_k < 1) {
    throw UsageError("reward_top_k must be at least 1, not " + std::to_string(*tilting_.top_k));
  }
  if (vocab_size_ < 1 || vocab_size_ > std::numeric_limits<int32_t>::max() - kBlock) {
    throw UsageError("a vocabulary of " + std::to_string(vocab_size_) + " cannot be drawn from");
  }
  const size_t padded = static_cast<size_t>(blocks_of(vocab_size_) * kBlock);
  values_.assign(padded, -kInfinity);
  block_maxima_.assign(padded / kBlock, -kInfinity);
  if (filters_.repetition_penalty != 1.0) {
    seen_.assign(static_cast<size_t>(vocab_size_), 0);
    seen_ids_.reserve(static_cast<size_t>(vocab_size_));
  }
  const bool top_k = filters_.top_k && *filters_.top_k < vocab_size_;
  const bool top_p = filters_.top_p && *filters_.top_p < 1;
  const bool min_p = filters_.min_p && *filters_.min_p > 0;
  const bool tilt_top_k = tilting_.top_k && *tilting_.top_k < vocab_size_;
  if (tilt_top_k || (filters_.temperature > 0 && (top_k || top_p || min_p))) {
    ids_.resize(padded);
    scratch_.resize(padded);
  }
  if (filters_.temperature > 0 && top_p) candidates_.resize(static_cast<size_t>(vocab_size_));
  if (tilting_.details || !candidates_.empty()) weights_.resize(padded);
}

void Sampler::see(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const int32_t id = tokens[i];
    if (id < 0 || id >= vocab_size_) {
      throw UsageError("token " + std::to_string(id) + " is outside the vocabulary of " +
                       std::to_string(vocab_size_));
    }
    if (!seen_.empty() && !seen_[static_cast<size_t>(id)]) {
      seen_[static_cast<size_t>(id)] = 1;
      seen_ids_.push_back(id);
    }
  }
}

int32_t Sampler::next(const float* logits, uint32_t position, const double* tilt) {
  const Kernels& run = kernels();
  const int64_t blocks = blocks_of(vocab_size_), whole = vocab_size_ / kBlock;
  const double temperature = filters_.temperature > 0 ? filters_.temperature : 1.0;
  bool numbers = run.widen(logits, whole, temperature, values_.data(), block_maxima_.data());
  if (whole < blocks) {
    float rest[kBlock];
    std::fill(rest, rest + kBlock, -std::numeric_limits<float>::infinity());
    std::copy(logits + whole * kBlock, logits + vocab_size_, rest);
    numbers &= run.widen(rest, 1, temperature, values_.data() + whole * kBlock,
                         block_maxima_.data() + whole);
  }
  if (!numbers) {
    throw InputError("the model's logits for token " + std::to_string(position) +
                     " of the text are not all numbers");
  }
  if (!seen_ids_.empty()) {
    const double penalty = filters_.repetition_penalty;
    for (const int32_t id : seen_ids_) {
      const double x = static_cast<double>(logits[id]);
      values_[static_cast<size_t>(id)] = (x > 0 ? x / penalty : x * penalty) / temperature;
    }
    run.maxima(values_.data(), blocks, block_maxima_.data());
  }
  maximum_ = *std::max_element(block_maxima_.begin(), block_maxima_.end());
  listed_ = false;
  // Where everything is -inf, or a quotient is infinite, no filter has anything to tell apart.
  if (filters_.temperature > 0 && std::isfinite(maximum_)) {
    if (filters_.top_k && *filters_.top_k < vocab_size_) keep_top_k(*filters_.top_k);
    if (filters_.top_p && *filters_.top_p < 1) keep_top_p(*filters_.top_p);
    if (filters_.min_p && *filters_.min_p > 0) keep_min_p(*filters_.min_p);
  }
  details_ = TiltDetails();
  if (tilt) apply_tilt(tilt, position);
  if (maximum_ == -kInfinity) {
    throw InputError("nothing is left to choose from for token " + std::to_string(position) +
                     " of the text");
  }
  const bool greedy = filters_.temperature == 0 || maximum_ == kInfinity;
  const int32_t id = greedy ? first_of(maximum_) : draw(position);
  see(&id, 1);
  return id;
}

void Sampler::keep_top_k(int64_t k) {
  const int64_t blocks = static_cast<int64_t>(block_maxima_.size());
  // k blocks with a maximum of at least `floor` hold k values of at least `floor`.
  double floor = -kInfinity;
  double* sorted = scratch_.data();
  if (k <= blocks / 2) {
    std::copy(block_maxima_.begin(), block_maxima_.end(), sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + blocks, std::greater<double>());
    floor = sorted[k - 1];
  }
  int64_t gathered = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (block_maxima_[static_cast<size_t>(b)] < floor) continue;
    const int64_t end = std::min((b + 1) * kBlock, vocab_size_);
    for (int64_t i = b * kBlock; i < end; ++i) {
      ids_[static_cast<size_t>(gathered)] = static_cast<int32_t>(i);
      sorted[gathered] = values_[static_cast<size_t>(i)];
      gathered += sorted[gathered] >= floor;
    }
  }
  std::nth_element(sorted, sorted + k - 1, sorted + gathered, std::greater<double>());
  const double edge = sorted[k - 1];
  int64_t room = k;
  for (int64_t i = 0; i < gathered; ++i) {
    room -= values_[static_cast<size_t>(ids_[static_cast<size_t>(i)])] > edge;
  }
  // The ids are in ascending order, so a tie at the edge keeps the lower ones.
  count_ = 0;
  for (int64_t i = 0; i < gathered; ++i) {
    const int32_t id = ids_[static_cast<size_t>(i)];
    const double x = values_[static_cast<size_t>(id)];
    bool kept = x > edge;
    if (x == edge && room > 0) kept = true, --room;
    ids_[static_cast<size_t>(count_)] = id;
    count_ += kept;
  }
  listed_ = true;
}

void Sampler::keep_top_p(double p) {
  // Probabilities in descending order, ties by id, are summed one after another as in Python, but
  // only those that can matter are sorted: a bisection over the weights exp(x - maximum) finds how
  // far down p lies and, where that is far, what is kept for certain. The last bits of a sum may
  // differ from torch's, whose exp and order of summation are its own; that shows where a partial
  // sum comes within about 1e-15 of p (1e-12 where thousands are kept).
  const Kernels& run = kernels();
  const int64_t n = listed_ ? count_ : vocab_size_, blocks = blocks_of(n);
  const double* x = values_.data();
  if (listed_) {
    for (int64_t i = 0; i < n; ++i) {
      scratch_[static_cast<size_t>(i)] = values_[static_cast<size_t>(ids_[static_cast<size_t>(i)])];
    }
    std::fill(scratch_.begin() + n, scratch_.begin() + blocks * kBlock, -kInfinity);
    x = scratch_.data();
  }
  const double* weights = weights_.data();
  const double sum = run.exponentials(x, blocks, maximum_, weights_.data());
  // Weights of at least `low` reach p for certain, those of at least `high` do not.
  double low = 0.0, high = 2.0, low_exponent = -60.0, high_exponent = 0.0;
  Mass at_low{sum, static_cast<double>(n)}, at_high{0.0, 0.0};
  const double narrow = std::max(64.0, static_cast<double>(n) / 128);
  for (int step = 0; step < 16 && at_low.count - at_high.count > narrow; ++step) {
    const double exponent = (low_exponent + high_exponent) / 2, threshold = std::exp2(exponent);
    const Mass mass = run.mass(weights, blocks, threshold);
    if (mass.sum >= (p + 1e-9) * sum) {
      low = threshold, low_exponent = exponent, at_low = mass;
    } else if (mass.sum <= (p - 1e-9) * sum) {
      high = threshold, high_exponent = exponent, at_high = mass;
    } else {
      break;
    }
  }
  constexpr double kSortedAnyway = 1024;
  if (at_low.count <= kSortedAnyway) high = 2.0, at_high = {0.0, 0.0};
  const double floor = low > 0 ? std::log(low) - 1e-6 : -kInfinity;
  int64_t kept = 0, count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!listed_ && block_maxima_[static_cast<size_t>(b)] - maximum_ < floor) continue;
    const int64_t end = std::min((b + 1) * kBlock, n);
    for (int64_t i = b * kBlock; i < end; ++i) {
      const int32_t id = listed_ ? ids_[static_cast<size_t>(i)] : static_cast<int32_t>(i);
      if (weights[i] >= high) {
        ids_[static_cast<size_t>(kept++)] = id;
      } else if (weights[i] >= low) {
        candidates_[static_cast<size_t>(count++)] = {weights[i] / sum, id};
      }
    }
  }
  std::sort(candidates_.begin(), candidates_.begin() + count,
            [](const Candidate& a, const Candidate& b) {
              return a.probability != b.probability ? a.probability > b.probability : a.id < b.id;
            });
  double cumulative = at_high.sum / sum;
  for (int64_t i = 0; i < count; ++i) {
    const Candidate& candidate = candidates_[static_cast<size_t>(i)];
    // Beyond this no rounding brings `before` below p again.
    if (cumulative > p + 1e-12) break;
    cumulative += candidate.probability;
    const double before = cumulative - candidate.probability;
    if (before < p) ids_[static_cast<size_t>(kept++)] = candidate.id;
  }
  // Of ids whose weights are equal though their values are not, the largest need not be kept.
  maximum_ = -kInfinity;
  for (int64_t i = 0; i < kept; ++i) {
    maximum_ = std::max(maximum_, values_[static_cast<size_t>(ids_[static_cast<size_t>(i)])]);
  }
  count_ = kept;
  listed_ = true;
}

void Sampler::keep_min_p(double min_p) {
  const double floor = maximum_ + std::log(min_p);
  const int64_t n = listed_ ? count_ : vocab_size_;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t id = listed_ ? ids_[static_cast<size_t>(i)] : static_cast<int32_t>(i);
    ids_[static_cast<size_t>(count)] = id;
    count += !(values_[static_cast<size_t>(id)] < floor);
  }
  count_ = count;
  listed_ = true;
}

void Sampler::keep_likeliest(int64_t k) {
  if (!listed_) return keep_top_k(k);
  if (count_ <= k) return;
  std::nth_element(ids_.begin(), ids_.begin() + (k - 1), ids_.begin() + count_,
                   [this](int32_t a, int32_t b) {
                     const double x = values_[static_cast<size_t>(a)];
                     const double y = values_[static_cast<size_t>(b)];
                     return x != y ? x > y : a < b;
                   });
  count_ = k;
}

void Sampler::apply_tilt(const double* tilt, uint32_t position) {
  const bool finite = std::isfinite(maximum_);
  if (tilting_.top_k && *tilting_.top_k < vocab_size_ && finite) keep_likeliest(*tilting_.top_k);
  const double before = tilting_.details && finite ? log_sum(nullptr, nullptr) : 0.0;
  add_tilt(tilt, position);
  if (tilting_.details && std::isfinite(maximum_)) {
    double mean = 0.0;
    details_.log_z = log_sum(tilt, &mean) - before;
    details_.kl = mean - details_.log_z;
  }
}

// Log of the sum of exp over what is kept, and the mean of `tilt`, where given, with those weights.
double Sampler::log_sum(const double* tilt, double* mean) {
  double sum = 0.0, tilted = 0.0;
  // What has no weight is left out, because its tilt may be -inf.
  const auto add = [&](size_t id, double weight) {
    if (weight > 0.0) tilted += weight * tilt[id];
  };
  if (listed_) {
    for (int64_t i = 0; i < count_; ++i) {
      const size_t id = static_cast<size_t>(ids_[static_cast<size_t>(i)]);
      const double weight = std::exp(values_[id] - maximum_);
      sum += weight;
      if (tilt) add(id, weight);
    }
  } else {
    const int64_t blocks = blocks_of(vocab_size_);
    sum = kernels().exponentials(values_.data(), blocks, maximum_, weights_.data());
    for (size_t id = 0; tilt && id < static_cast<size_t>(vocab_size_); ++id) add(id, weights_[id]);
  }
  if (mean) *mean = tilted / sum;
  return maximum_ + std::log(sum);
}

void Sampler::add_tilt(const double* tilt, uint32_t position) {
  bool numbers = true;
  if (listed_) {
    maximum_ = -kInfinity;
    for (int64_t i = 0; i < count_; ++i) {
      const size_t id = static_cast<size_t>(ids_[static_cast<size_t>(i)]);
      values_[id] += tilt[id];
      numbers &= values_[id] <= DBL_MAX;
      maximum_ = std::max(maximum_, values_[id]);
    }
  } else {
    const Kernels& run = kernels();
    const int64_t whole = vocab_size_ / kBlock;
    numbers = run.add(tilt, whole, values_.data(), block_maxima_.data());
    if (whole * kBlock < vocab_size_) {
      double rest[kBlock] = {};
      std::copy(tilt + whole * kBlock, tilt + vocab_size_, rest);
      numbers &= run.add(rest, 1, values_.data() + whole * kBlock, block_maxima_.data() + whole);
    }
    maximum_ = *std::max_element(block_maxima_.begin(), block_maxima_.end());
  }
  if (!numbers) {
    throw InputError("the rewards for token " + std::to_string(position) +
                     " of the text are not all numbers");
  }
}

int32_t Sampler::first_of(double value) const {
  if (listed_) {
    int32_t first = std::numeric_limits<int32_t>::max();
    for (int64_t i = 0; i < count_; ++i) {
      const int32_t id = ids_[static_cast<size_t>(i)];
      if (values_[static_cast<size_t>(id)] == value) first = std::min(first, id);
    }
    return first;
  }
  const auto block = std::find(block_maxima_.begin(), block_maxima_.end(), value);
  const auto from = values_.begin() + (block - block_maxima_.begin()) * kBlock;
  return static_cast<int32_t>(std::find(from, values_.end(), value) - values_.begin());
}

void Sampler::widen_list() {
  std::fill(scratch_.begin(), scratch_.end(), -kInfinity);
  for (int64_t i = 0; i < count_; ++i) {
    const size_t id = static_cast<size_t>(ids_[static_cast<size_t>(i)]);
    scratch_[id] = values_[id];
  }
  std::swap(values_, scratch_);
  kernels().maxima(values_.data(), static_cast<int64_t>(block_maxima_.size()),
                   block_maxima_.data());
  listed_ = false;
}

int32_t Sampler::draw(uint32_t position) {
  const Kernels& run = kernels();
  const Place place{
      position, row_, stream_, {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)}};
  // A long list costs more, id by id, than all ids in blocks.
  if (listed_ && count_ > 16 + vocab_size_ / 32) widen_list();
  Best best;
  const int32_t likeliest = first_of(maximum_);
  best.offer(maximum_ + noise_of(word_of(place, static_cast<uint32_t>(likeliest))), likeliest);
  if (listed_) {
    for (int64_t i = 0; i < count_; ++i) {
      const int32_t id = ids_[static_cast<size_t>(i)];
      const double x = values_[static_cast<size_t>(id)];
      const uint32_t word = word_of(place, static_cast<uint32_t>(id));
      if (could_win(word, limit_of(x, best.sum, slack_of(best.sum)))) {
        best.offer(x + noise_of(word), id);
      }
    }
    return best.id;
  }
  uint32_t words[kBlock];
  for (size_t b = 0; b < block_maxima_.size(); ++b) {
    const double slack = slack_of(best.sum);
    if (block_maxima_[b] + kLargestNoise + slack < best.sum) continue;
    const double* x = values_.data() + b * kBlock;
    run.words(static_cast<uint32_t>(b * kBlock / 4), place, words);
    if (!run.any_could_win(words, x, best.sum, slack)) continue;
    for (int64_t j = 0; j < kBlock; ++j) {
      if (could_win(words[j], limit_of(x[j], best.sum, slack_of(best.sum)))) {
        best.offer(x[j] + noise_of(words[j]),
                   static_cast<int32_t>(b * kBlock) + static_cast<int32_t>(j));
      }
    }
  }
  return best.id;
}

double probability_of(const float* logits, int64_t vocab_size, int32_t id, double temperature) {
  if (id < 0 || id >= vocab_size) {
    throw UsageError("token " + std::to_string(id) + " is outside the vocabulary of " +
                     std::to_string(vocab_size));
  }
  if (!(temperature > 0 && std::isfinite(temperature))) {
    throw UsageError("a calibration temperature must be above 0, not " + text_of(temperature));
  }
  const Kernels& run = kernels();
  double maximum = -kInfinity, sum = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t from = 0; from < vocab_size; from += kBlock) {
      float block[kBlock];
      double x[kBlock], weights[kBlock], block_maximum;
      const int64_t count = std::min(kBlock, vocab_size - from);
      std::fill(block + count, block + kBlock, -std::numeric_limits<float>::infinity());
      std::copy(logits + from, logits + from + count, block);
      run.widen(block, 1, temperature, x, &block_maximum);
      if (pass == 0) {
        maximum = std::max(maximum, block_maximum);
      } else {
        sum += run.exponentials(x, 1, maximum, weights);
      }
    }
  }
  return std::exp(static_cast<double>(logits[id]) / temperature - maximum) / sum;
}

}  // namespace nanogpt
