// AVX-512 with VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4).
#if defined(__x86_64__)
#define NANOGPT_BF16_DOT
#include "engine/kernels_avx512.h"
#define NANOGPT_KERNELS kAvx512Bf16Kernels
#define NANOGPT_KERNELS_NAME "avx512_bf16"
#include "engine/kernels_loops.h"
#define NANOGPT_TRAINING kAvx512Bf16Training
#include "engine/training_loops.h"
#endif
