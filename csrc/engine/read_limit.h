// The floor of decoding: how fast the weights can be read at all.
#pragma once

#include "engine/weights.h"

namespace nanogpt {

// Seconds of one plain pass over every byte of the weights by `threads` threads, the best of
// `passes`.
double seconds_to_read(const Weights& weights, int threads, int passes);

}  // namespace nanogpt
