// Rewards of the next token, for reward-augmented decoding: character sets and domain terms.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/tokenizer.h"

namespace nanogpt {

// The reward of every candidate given the text so far. Only new text counts, never the prompt.
// Nothing is allocated after the first steps.
class Reward {
 public:
  virtual ~Reward() = default;
  // V, the ids that are rewarded.
  virtual size_t vocab_size() const = 0;
  // (V) float64: reward of writing each id next. Valid until the next call of this object.
  virtual const double* of_candidates() = 0;
  // Tells which id was written. Throws std::out_of_range for an id outside the vocabulary.
  virtual void advance(int32_t id) = 0;
  // The same reward at the same place of the text, which goes on by itself.
  virtual std::unique_ptr<Reward> clone() const = 0;
};

// The same (V) values at every step: a reward of the last token alone.
std::unique_ptr<Reward> token_reward(std::vector<double> values);

// 1 for an id whose last character is one of `characters` (UTF-8), else 0: char_reward_fn. An id
// whose bytes do not end with a whole character gets 0. Throws InputError where `characters` is
// empty, is not UTF-8, or holds a character with which no id ends.
std::unique_ptr<Reward> char_reward(const Tokenizer& tokenizer, const std::string& characters);

// By how much an id extends the text's progress through `terms` (UTF-8): the rewards of a text's
// ids add up to the number of distinct terms in it, plus the progress of what is unfinished at its
// end, below 1. Matching is that of the expression (?<!\w)(?:t1|t2|...)(?!\w) with the longer terms
// first, on case-folded text; see rewards.cpp for the rule. The tokenizer has to outlive the
// reward. Throws InputError where there is no term, or one is empty, is not UTF-8 or cannot be
// written with the vocabulary's tokens.
std::unique_ptr<Reward> term_reward(const Tokenizer& tokenizer,
                                    const std::vector<std::string>& terms);

struct WeightedReward {
  std::unique_ptr<Reward> reward;
  double weight = 1.0;
};

// The weighted sum of rewards; of a single one of weight 1, that reward. Throws UsageError where
// there is none, a weight is not finite, or the vocabularies differ.
std::unique_ptr<Reward> sum_reward(std::vector<WeightedReward> parts);

}  // namespace nanogpt
