// Whether a vocabulary can write a term at all.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "engine/tokenizer.h"

namespace nanogpt {

// Finds out whether some text of the vocabulary's tokens holds a term as a whole word, in whatever
// case. The tokenizer has to outlive it.
class Speller {
 public:
  explicit Speller(const Tokenizer& tokenizer);
  // `term`: its characters after `folded`, at least one.
  bool can_write(const std::vector<uint32_t>& term) const;

 private:
  bool has_character(uint32_t folded) const;
  bool can_write_in_pieces(const std::vector<uint32_t>& term) const;

  const Tokenizer& tokenizer_;
  std::array<bool, 256> bytes_{};     // bytes that are a token
  std::vector<uint32_t> characters_;  // characters that are a token, in ascending order
};

}  // namespace nanogpt
