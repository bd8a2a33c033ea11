// The command line of nanogpt-generate: flags with the names and limits that `sample` has.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/sampler.h"

namespace nanogpt {

enum class Engine { native, torchscript };

struct Arguments {
  std::string model;
  std::optional<std::string> prompt;
  std::optional<std::string> file;  // "-" is standard input
  int64_t max_new_tokens = 200;
  std::vector<std::string> stops;
  bool ignore_eos = true;
  bool json = false;
  bool confidence = false;

  Filters filters;
  std::optional<uint64_t> seed;

  std::optional<std::string> reward_chars;
  std::optional<std::string> reward_terms;  // a,b,c or a file of lines
  double beta = 1.0;

  bool bench = false;
  int repetitions = 5;
  Engine engine = Engine::native;
  bool trust = false;
  int threads = 0;  // 0: chosen by measurement

  bool help = false;
  bool version = false;
};

// Reads and checks every flag; no file is touched. Throws UsageError.
Arguments parse_arguments(int count, const char* const* words);

std::string help_text();

}  // namespace nanogpt
