// Counts what the loop of generation allocates: allocation_check MODEL THREADS
//
// Prints the allocations of 100 tokens, after as many that let every buffer find its size.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "engine/decoder.h"
#include "engine/generator.h"
#include "engine/model_file.h"

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
  nanogpt::Generator generator(decoder, {1, 2, 3}, options);
  for (int i = 0; i < 100; ++i) generator.next();
  const long before = allocations;
  for (int i = 0; i < 100; ++i) generator.next();
  std::printf("%ld of %ld\n", allocations - before, before);
  return 0;
}
