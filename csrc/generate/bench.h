// --bench: how many tokens a second a model reads and writes here, as llama-bench counts them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "generate/process.h"

namespace nanogpt {

struct BenchSubject {
  std::string path;
  std::string engine;           // "native" or "torchscript"
  std::string instruction_set;  // empty for torchscript
  std::string quantization;
  size_t weight_bytes = 0;
  int64_t parameters = 0;
  double load_ms = 0;
  // Tokens a second if a token took no longer than reading the weights once; 0 where not measured.
  double read_limit = 0;
};

struct BenchResult {
  std::string test;  // "pp64": 64 tokens read at once; "tg128": 128 written one by one
  int64_t tokens = 0;
  std::vector<double> tokens_per_second;  // one a repetition
  double mean() const;
  double standard_deviation() const;  // of the sample; 0 for one repetition
  double median() const;
};

// pp64, pp512 and tg128, each cut to the context, from an empty context, after one pass to warm up;
// random tokens, no sampling. Throws Interrupted between two calls of the model.
std::vector<BenchResult> run_bench(LogitsSource& source, int repetitions, uint64_t seed);

std::string bench_table(const BenchSubject& subject, const std::vector<BenchResult>& results,
                        int threads);
std::string bench_json(const BenchSubject& subject, const std::vector<BenchResult>& results,
                       int threads);

}  // namespace nanogpt
