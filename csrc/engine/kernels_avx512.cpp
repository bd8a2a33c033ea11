// AVX-512 with VNNI (Cascade Lake and later, Zen 4).
#if defined(__x86_64__)
#include "engine/kernels_avx512.h"
#define NANOGPT_KERNELS kAvx512Kernels
#define NANOGPT_KERNELS_NAME "avx512"
#include "engine/kernels_loops.h"
#define NANOGPT_TRAINING kAvx512Training
#include "engine/training_loops.h"
#endif
