// Counts what the loop of generation allocates: allocation_check MODEL THREADS
//
// Prints the allocations of 100 tokens, after as many that let every buffer find its size.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "engine/decoder.h"
#include "engine/generator.h"
#include "engine/model_file.h"
#include "engine/rewards.h"
#include "engine/tokenizer.h"

namespace {
std::atomic<long> allocations{0};
}

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (size + unit - 1) / unit * unit)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

int main(int count, char** words) {
  if (count != 3) return 2;
  const nanogpt::ModelFile file(words[1]);
  nanogpt::Decoder decoder(file.weights(), std::atoi(words[2]));
  nanogpt::GenerateOptions options;
  options.max_new_tokens = 200;
  options.filters.temperature = 0.9;
  options.filters.top_k = 20;
  options.filters.top_p = 0.95;
  options.filters.repetition_penalty = 1.1;
  options.probabilities = true;
  options.beta = 2.0;
  options.reward_top_k = 15;
  options.details = true;
  const auto tokenizer = nanogpt::Tokenizer::from_json(file.tokenizer_json());
  std::vector<nanogpt::WeightedReward> parts;
  parts.push_back({nanogpt::char_reward(*tokenizer, "ae"), 0.5});
  parts.push_back({nanogpt::term_reward(*tokenizer, {"a", "b", "gene", "gene therapy"}), 3.0});
  // A copy has its own buffers.
  const auto reward = nanogpt::sum_reward(std::move(parts))->clone();
  nanogpt::Generator generator(decoder, {1, 2, 3}, options, reward.get());
  for (int i = 0; i < 100; ++i) generator.next();
  const long before = allocations;
  for (int i = 0; i < 100; ++i) generator.next();
  std::printf("%ld of %ld\n", allocations - before, before);
  return 0;
}
