// Which inner loops run here.
#include "engine/kernels.h"

#include <cstdlib>
#include <string>

#include "engine/error.h"

namespace nanogpt {

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const Kernels& choose_kernels() {
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&kAvx512Bf16Kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {&kAvx512Kernels, has_avx512()},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#elif defined(__aarch64__)
      {&kNeonKernels, true},
#endif
      {&kScalarKernels, true},
  };
  const char* named = std::getenv("NANOGPT_ISA");
  const std::string wanted = named ? named : "";
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (wanted.empty() && candidate.runs) return *candidate.kernels;
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
