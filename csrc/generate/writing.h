// One text: drawn, shown as it grows, and reported.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/generator.h"
#include "engine/tokenizer.h"
#include "generate/process.h"

namespace nanogpt {

// Passes everything on and measures how long the prompt took.
class TimedSource : public LogitsSource {
 public:
  explicit TimedSource(LogitsSource& source) : source_(source) {}
  const Config& config() const override { return source_.config(); }
  const float* append(const int32_t* tokens, int64_t count) override;
  int64_t length() const override { return source_.length(); }
  void reset() override { source_.reset(); }

  // Tokens of the first append and its seconds; 0 before it.
  int64_t prompt_tokens() const { return prompt_tokens_; }
  double prompt_seconds() const { return prompt_seconds_; }

 private:
  LogitsSource& source_;
  int64_t prompt_tokens_ = 0;
  double prompt_seconds_ = 0;
};

struct Timings {
  double load_ms = 0;                    // start of the process to a checked model, ready to read
  std::optional<double> first_token_ms;  // start of the process to the first token
  std::optional<double> prefill_tokens_per_second;
  std::optional<double> decode_tokens_per_second;  // from the second token on, writing included
};

struct Written {
  std::string text;  // what is new, without stop texts
  std::vector<int32_t> tokens;
  std::vector<double> probabilities;  // empty unless they were asked for
  Timings timings;
  bool interrupted = false;
};

// Draws until the end, a stop text or an interruption. `show`: prints the text as it grows.
Written write_text(LogitsSource& source, const Tokenizer& tokenizer,
                   const std::vector<int32_t>& prompt, const GenerateOptions& options,
                   Reward* reward, const std::vector<std::string>& stops, bool show,
                   Clock::time_point started);

// The line of --json.
std::string as_json(const Written& written, size_t prompt_tokens, uint64_t seed);

// The line of timings on standard error.
std::string timings_line(const Written& written, size_t prompt_tokens, uint64_t seed);

// The table of --confidence: one token a line, and what they come to.
std::string confidence_table(const Written& written, const Tokenizer& tokenizer,
                             std::optional<double> calibration_temperature);

}  // namespace nanogpt
