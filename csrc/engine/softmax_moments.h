// What a temperature does to the distributions that rows of logits stand for.
#pragma once

#include <cstdint>

namespace nanogpt {

// Log-sum-exp of beta z, and mean and variance of z under softmax(beta z), of every row and beta.
//
// z (rows, cols): the largest number of a row is 0; the others may be -inf. betas > 0: `count` for
// each row, `stride` apart from row to row (0: the same ones for all). log_total, mean, variance:
// (rows, count). One row is summed by one thread in one order, whatever the number of threads.
// Throws UsageError where the system gives fewer threads.
void softmax_moments(const double* z, int64_t rows, int64_t cols, const double* betas, int count,
                     int64_t stride, int threads, double* log_total, double* mean,
                     double* variance);

}  // namespace nanogpt
