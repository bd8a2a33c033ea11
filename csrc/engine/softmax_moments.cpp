#include "engine/softmax_moments.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/kernels.h"
#include "engine/thread_pool.h"

namespace nanogpt {

namespace {

struct Work {
  const Kernels* kernels;
  const double* z;
  int64_t rows, cols;
  const double* betas;
  int count;
  int64_t stride;
  double *log_total, *mean, *variance;
};

void share(const Work& work, int thread, int threads) {
  std::vector<double> sums(3 * static_cast<size_t>(work.count));
  const int64_t last = work.rows * (thread + 1) / threads;
  for (int64_t row = work.rows * thread / threads; row < last; ++row) {
    work.kernels->softmax_sums(work.z + row * work.cols, work.cols, work.betas + row * work.stride,
                               work.count, sums.data());
    for (int k = 0; k < work.count; ++k) {
      const double total = sums[3 * k], mean = sums[3 * k + 1] / total;
      const int64_t at = row * work.count + k;
      work.log_total[at] = std::log(total);
      work.mean[at] = mean;
      work.variance[at] = std::max(sums[3 * k + 2] / total - mean * mean, 0.0);
    }
  }
}

}  // namespace

void softmax_moments(const double* z, int64_t rows, int64_t cols, const double* betas, int count,
                     int64_t stride, int threads, double* log_total, double* mean,
                     double* variance) {
  Work work{&choose_kernels(), z, rows, cols, betas, count, stride, log_total, mean, variance};
  // One pool for the process, which is never destroyed: threads may outlive static objects.
  static std::mutex* const alone = new std::mutex;
  static std::unique_ptr<ThreadPool>* const pool = new std::unique_ptr<ThreadPool>;
  const std::lock_guard<std::mutex> lock(*alone);
  if (!*pool || (*pool)->size() < threads) {
    pool->reset();
    *pool = std::make_unique<ThreadPool>(threads);
  }
  (*pool)->run([](void* context, int thread,
                  int among) { share(*static_cast<Work*>(context), thread, among); },
               &work, threads);
}

}  // namespace nanogpt
