// The transformer: tokens -> logits, with a key-value cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine/weights.h"

namespace nanogpt {

// What turns tokens into logits; the native decoder and the TorchScript plug-in are two of it.
class LogitsSource {
 public:
  virtual ~LogitsSource() = default;
  virtual const Config& config() const = 0;
  // Appends `count` >= 1 tokens to the context and gives the logits (V) of the token that follows,
  // valid until the next call. Throws UsageError where the context would be longer than block_size
  // or a token is outside the vocabulary.
  virtual const float* append(const int32_t* tokens, int64_t count) = 0;
  // Tokens in the context.
  virtual int64_t length() const = 0;
  // Forgets the context.
  virtual void reset() = 0;
};

class Decoder : public LogitsSource {
 public:
  // `weights` must outlive this object. `threads` = 0 chooses by measurement during the first
  // calls, up to the number of CPUs this process may use. Throws InputError for weights that do
  // not fit together, UsageError for more than 1,024 threads or fewer than 0. Results do not depend
  // on the number of threads.
  explicit Decoder(const Weights& weights, int threads = 0);
  ~Decoder() override;
  const Config& config() const override;
  const float* append(const int32_t* tokens, int64_t count) override;
  // As append, with the logits of all `count` positions written to (count, V).
  void append_all(const int32_t* tokens, int64_t count, float* logits);
  int64_t length() const override;
  void reset() override;
  // Threads in use (the choice so far where it is measured).
  int threads() const;
  // The instruction set in use: "scalar", "avx2", "avx512", "neon". NANOGPT_ISA forces one;
  // an unknown or unsupported one throws UsageError in the constructor.
  const char* instruction_set() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace nanogpt
