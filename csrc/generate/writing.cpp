#include "generate/writing.h"

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "engine/text.h"
#include "generate/inputs.h"

namespace nanogpt {
namespace {

nlohmann::ordered_json or_null(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

// A token as a C string literal.
std::string literal(std::string_view bytes) {
  std::string out = "\"";
  for (const char c : visible(bytes)) {
    if (c == '"') out += '\\';
    out += c;
  }
  return out + "\"";
}

}  // namespace

const float* TimedSource::append(const int32_t* tokens, int64_t count) {
  if (prompt_tokens_ != 0) return source_.append(tokens, count);
  const Clock::time_point start = Clock::now();
  const float* logits = source_.append(tokens, count);
  prompt_tokens_ = count;
  prompt_seconds_ = seconds_since(start);
  return logits;
}

Written write_text(LogitsSource& source, const Tokenizer& tokenizer,
                   const std::vector<int32_t>& prompt, const GenerateOptions& options,
                   Reward* reward, const std::vector<std::string>& stops, bool show,
                   Clock::time_point started) {
  Written written;
  written.timings.load_ms = 1e3 * seconds_since(started);
  TimedSource timed(source);
  Generator generator(timed, prompt, options, reward);
  Utf8Stream characters;
  StopText watch(stops);
  const auto give = [&](const std::string& piece) {
    written.text += piece;
    if (show && !piece.empty()) print(piece);
  };
  Clock::time_point first;
  double decode_seconds = 0;
  try {
    while (!watch.found()) {
      check_interruption();
      const std::optional<Step> step = generator.next();
      if (!step) break;
      if (written.tokens.empty()) {
        first = Clock::now();
        written.timings.first_token_ms = 1e3 * seconds_since(started);
      } else {
        decode_seconds = seconds_since(first);
      }
      written.tokens.push_back(step->token);
      if (options.probabilities) written.probabilities.push_back(step->probability);
      give(watch.feed(characters.feed(tokenizer.bytes_of(step->token))));
    }
  } catch (const Interrupted&) {
    written.interrupted = true;
  }
  give(watch.feed(characters.flush()) + watch.flush());
  if (timed.prompt_seconds() > 0) {
    written.timings.prefill_tokens_per_second =
        static_cast<double>(timed.prompt_tokens()) / timed.prompt_seconds();
  }
  if (decode_seconds > 0) {
    written.timings.decode_tokens_per_second =
        static_cast<double>(written.tokens.size() - 1) / decode_seconds;
  }
  return written;
}

std::string as_json(const Written& written, size_t prompt_tokens, uint64_t seed) {
  const Timings& timings = written.timings;
  const nlohmann::ordered_json object = {
      {"text", written.text},
      {"tokens", written.tokens},
      {"token_probs", written.probabilities},
      {"prompt_tokens", prompt_tokens},
      {"timings",
       {{"load_ms", timings.load_ms},
        {"first_token_ms", or_null(timings.first_token_ms)},
        {"prefill_tokens_per_second", or_null(timings.prefill_tokens_per_second)},
        {"decode_tokens_per_second", or_null(timings.decode_tokens_per_second)}}},
      {"seed", seed}};
  return object.dump(-1, ' ', true) + "\n";
}

std::string timings_line(const Written& written, size_t prompt_tokens, uint64_t seed) {
  const Timings& timings = written.timings;
  char text[160];
  std::snprintf(text, sizeof text, "load %.1f ms", timings.load_ms);
  std::string line = text;
  if (timings.first_token_ms) {
    std::snprintf(text, sizeof text, ", first token after %.1f ms", *timings.first_token_ms);
    line += text;
  }
  std::snprintf(text, sizeof text, "; prompt: %zu tokens", prompt_tokens);
  line += text;
  if (timings.prefill_tokens_per_second) {
    std::snprintf(text, sizeof text, " at %.1f a second", *timings.prefill_tokens_per_second);
    line += text;
  }
  std::snprintf(text, sizeof text, "; written: %zu tokens", written.tokens.size());
  line += text;
  if (timings.decode_tokens_per_second) {
    std::snprintf(text, sizeof text, " at %.1f a second", *timings.decode_tokens_per_second);
    line += text;
  }
  return line + "; seed " + std::to_string(seed) + "\n";
}

std::string confidence_table(const Written& written, const Tokenizer& tokenizer,
                             std::optional<double> calibration_temperature) {
  std::string table = "probability  token\n";
  char text[160];
  double sum = 0, logs = 0;
  for (size_t i = 0; i < written.probabilities.size(); ++i) {
    const double probability = written.probabilities[i];
    const int32_t token = written.tokens[i];
    sum += probability;
    logs += std::log(probability);
    std::snprintf(text, sizeof text, "%11.6f  ", probability);
    table += text;
    table +=
        token == tokenizer.end_of_text_id() ? "<|endoftext|>" : literal(tokenizer.bytes_of(token));
    table += "\n";
  }
  if (written.probabilities.empty()) return table;
  const double count = static_cast<double>(written.probabilities.size());
  std::snprintf(text, sizeof text, "mean probability %.4g, perplexity %.4g over %zu tokens",
                sum / count, std::exp(-logs / count), written.probabilities.size());
  table += text;
  if (calibration_temperature) {
    std::snprintf(text, sizeof text, ", calibrated at temperature %.4g", *calibration_temperature);
    table += text;
  } else {
    table += ", not calibrated";
  }
  return table + "\n";
}

}  // namespace nanogpt
