// Which inner loops run here.
#include "engine/kernels.h"

#include <chrono>
#include <cstdlib>
#include <string>

#include "engine/error.h"

namespace nanogpt {

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
  bool worth_it = true;
};

#if defined(__x86_64__)
// Some CPUs have products of bfloat16 pairs that are slower than two float32 products (a quarter of
// their rate was seen on an Intel Xeon); the exact form is then the faster one too.
bool pairs_are_faster() {
  constexpr int64_t rows = 48, cols = 64;
  alignas(64) static uint16_t weights[rows * cols];
  alignas(64) static float x[cols * kPanel];
  alignas(64) static float out[rows * kPanel];
  alignas(64) static char scratch[gemm_scratch(cols)];
  const Panel panel{x, nullptr, out, kPanel};
  const auto seconds = [&](const Kernels& kernels) {
    double best = 1.0;
    for (int i = 0; i < 5; ++i) {
      const auto start = std::chrono::steady_clock::now();
      kernels.gemm_bf16(weights, 0, rows, cols, nullptr, &panel, 1, Store::plain, scratch);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      best = taken.count() < best ? taken.count() : best;
    }
    return best;
  };
  return seconds(kAvx512Bf16Kernels) < seconds(kAvx512Kernels);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512_bf16") return has_avx512() && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512") return has_avx512();
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
  if (name == "neon") return true;
#endif
  return name == "scalar";
}

const Kernels& choose_kernels() {
  const char* named = std::getenv("NANOGPT_ISA");
  const std::string wanted = named ? named : "";
#if defined(__x86_64__)
  const bool pairs = runs_here("avx512_bf16");
  static const bool faster = pairs && pairs_are_faster();
#endif
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&kAvx512Bf16Kernels, pairs, faster},
      {&kAvx512Kernels, runs_here("avx512")},
      {&kAvx2Kernels, runs_here("avx2")},
#elif defined(__aarch64__)
      {&kNeonKernels, true},
#endif
      {&kScalarKernels, true},
  };
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (wanted.empty() && candidate.runs && candidate.worth_it) return *candidate.kernels;
    if (wanted == candidate.kernels->name) {
      if (candidate.runs) return *candidate.kernels;
      throw UsageError("NANOGPT_ISA=" + wanted + ": this CPU lacks those instructions");
    }
    known += known.empty() ? "" : ", ";
    known += candidate.kernels->name;
  }
  throw UsageError("NANOGPT_ISA=" + wanted + " is not one of " + known);
}

}  // namespace nanogpt
