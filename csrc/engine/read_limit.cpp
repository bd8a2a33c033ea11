#include "engine/read_limit.h"

#include <algorithm>
#include <chrono>

#include "engine/kernels.h"
#include "engine/thread_pool.h"

namespace nanogpt {

namespace {

constexpr int64_t kLine = 64;

struct Pass {
  const Weights& weights;
  const Kernels& kernels;
};

}  // namespace

double seconds_to_read(const Weights& weights, int threads, int passes) {
  ThreadPool pool(threads);
  Pass context{weights, choose_kernels()};
  double best = 1e30;
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(
        [](void* context, int thread, int count) {
          const Pass& self = *static_cast<const Pass*>(context);
          for (const auto& [name, tensor] : self.weights.tensors) {
            const int64_t lines = static_cast<int64_t>(tensor.bytes) / kLine;
            const int64_t first = lines * thread / count, end = lines * (thread + 1) / count;
            self.kernels.read(static_cast<const char*>(tensor.data) + first * kLine,
                              (end - first) * kLine);
          }
        },
        &context, threads);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

}  // namespace nanogpt
