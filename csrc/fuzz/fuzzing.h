// What a fuzz target says of itself; fuzzing.cpp makes a program of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fuzzing {

using Bytes = std::vector<uint8_t>;

// SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators): it costs
// nothing to begin, and libFuzzer begins one for every mutation.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()();
  // From 0 to limit - 1; 0 where the limit is 0.
  size_t below(size_t limit);
  bool one_in(size_t many) { return below(many) == 0; }

 private:
  uint64_t state_;
};

// The target's own.

// Whether the reader takes the input. Ends the program where a property does not hold.
bool accepts(const uint8_t* data, size_t size);
// What the format is made of; mutations put it in.
extern const std::vector<std::string> pieces;
// Mends what damage breaks first, such as lengths and check sums, so that what is read behind them
// is reached too. Half of the mutants are mended.
void mend(Bytes& bytes, Random& random);

// For targets.

// Ends the program with a sentence where something that has to hold does not.
void must(bool holds, const char* what);
// A number in little-endian bytes at a place where it fits; otherwise nothing is written.
void put(Bytes& bytes, size_t at, size_t width, uint64_t value);
uint64_t number_at(const Bytes& bytes, size_t at, size_t width);

}  // namespace fuzzing
