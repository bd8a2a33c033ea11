// Rewards of the next token, for reward-augmented decoding: character sets and domain terms.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/tokenizer.h"

namespace nanogpt {

// The reward of every candidate given the text so far. Only new text counts, never the prompt.
class Reward {
 public:
  virtual ~Reward() = default;
  // (V) float64: reward of writing each id next.
  virtual const double* of_candidates() = 0;
  // Tells which id was written.
  virtual void advance(int32_t id) = 0;
};

// 1 for an id whose last character is one of `characters` (UTF-8), else 0: char_reward_fn.
std::unique_ptr<Reward> char_reward(const Tokenizer& tokenizer, const std::string& characters);

// By how much an id extends the text's progress through `terms`; see rewards.cpp for the rule.
std::unique_ptr<Reward> term_reward(const Tokenizer& tokenizer,
                                    const std::vector<std::string>& terms);

}  // namespace nanogpt
