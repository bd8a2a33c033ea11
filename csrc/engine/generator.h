// The loop of generation: windows over a growing text, draws, stop texts, rewards.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/rewards.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"

namespace nanogpt {

// First token of the context that predicts token `length` of a text: 0 while the text fits, then
// hop * ceil((length - block) / hop) with hop = max(1, block div 4).
int64_t window_start(int64_t length, int64_t block_size);

struct GenerateOptions {
  int64_t max_new_tokens = 200;
  Filters filters;
  uint64_t seed = 0;
  uint32_t row = 0;
  double beta = 0.0;  // multiplies the reward that is added to the log-probabilities
  std::optional<int64_t> reward_top_k;  // only so many of the likeliest ids are rewarded and drawn
                                        // from, where beta is not 0
  std::optional<int32_t> eos;           // ends the text when drawn; it is not given out
  double calibration_temperature = 1.0;
  bool probabilities = false;
  bool details = false;  // of the reward, in every step
};

struct Step {
  int32_t token = 0;
  double probability = 0.0;  // the model's, at the calibration temperature; 0 unless asked for
  // Of the details: the token's reward, and the tilt's log Z and KL in nats.
  double reward = 0.0, log_z = 0.0, kl = 0.0;
};

// One text. The source is reset at the start; nothing is allocated per token.
class Generator {
 public:
  // `prompt`: at least one id. `reward` may be null. Throws UsageError where it is for another
  // vocabulary, or an option is out of range.
  Generator(LogitsSource& source, std::vector<int32_t> prompt, const GenerateOptions& options,
            Reward* reward = nullptr);
  // The next token, or nothing once max_new_tokens are written or eos was drawn.
  std::optional<Step> next();
  // Prompt and new tokens.
  const std::vector<int32_t>& tokens() const { return text_; }

 private:
  LogitsSource& source_;
  GenerateOptions options_;
  Reward* reward_;
  Sampler sampler_;
  std::vector<int32_t> text_;
  std::vector<double> tilt_;
  int64_t written_ = 0;
  int64_t cached_from_ = 0;
  bool ended_ = false;
};

}  // namespace nanogpt
