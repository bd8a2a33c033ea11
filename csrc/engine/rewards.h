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
  // (V) float64: reward of writing each id next. Valid until the next call of this object.
  virtual const double* of_candidates() = 0;
  // Tells which id was written. Throws std::out_of_range for an id outside the vocabulary.
  virtual void advance(int32_t id) = 0;
};

// 1 for an id whose last character is one of `characters` (UTF-8), else 0: char_reward_fn. An id
// whose bytes do not end with a whole character gets 0. Throws InputError where `characters` is
// empty, is not UTF-8, or holds a character with which no id ends.
std::unique_ptr<Reward> char_reward(const Tokenizer& tokenizer, const std::string& characters);

// By how much an id extends the text's progress through `terms` (UTF-8): the rewards of a text's
// ids add up to the number of distinct terms in it, plus the progress of what is unfinished at its
// end, below 1. Matching is that of the expression (?<!\w)(?:t1|t2|...)(?!\w) with the longer terms
// first, on case-folded text; see rewards.cpp for the rule. Throws InputError where there is no
// term, or one is empty or not UTF-8.
std::unique_ptr<Reward> term_reward(const Tokenizer& tokenizer,
                                    const std::vector<std::string>& terms);

}  // namespace nanogpt
