#include "engine/generator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "engine/error.h"

namespace nanogpt {
namespace {

// Texts up to this many new tokens have their place from the start; longer ones grow by doubling.
constexpr int64_t kReserved = int64_t{1} << 20;

void check_options(const GenerateOptions& options, size_t prompt_tokens, int64_t vocab_size,
                   const Reward* reward) {
  if (prompt_tokens == 0) throw UsageError("a prompt holds at least one token");
  if (options.max_new_tokens < 0) {
    throw UsageError("max_new_tokens must be at least 0, not " +
                     std::to_string(options.max_new_tokens));
  }
  // A draw's counter holds the position in 32 bits; tokens of a larger text would repeat draws.
  constexpr uint64_t kPositions = std::numeric_limits<uint32_t>::max();
  if (prompt_tokens > kPositions ||
      static_cast<uint64_t>(options.max_new_tokens) > kPositions - prompt_tokens) {
    throw UsageError("a text of more than " + std::to_string(kPositions) +
                     " tokens cannot be written");
  }
  if (!std::isfinite(options.beta)) throw UsageError("beta must be a number");
  if (reward && static_cast<int64_t>(reward->vocab_size()) != vocab_size) {
    throw UsageError("the reward is for a vocabulary of " + std::to_string(reward->vocab_size()) +
                     ", the model has " + std::to_string(vocab_size));
  }
  if (!(options.calibration_temperature > 0 && std::isfinite(options.calibration_temperature))) {
    throw UsageError("a calibration temperature must be above 0");
  }
  if (options.eos && (*options.eos < 0 || *options.eos >= vocab_size)) {
    throw UsageError("the end token " + std::to_string(*options.eos) +
                     " is outside the vocabulary of " + std::to_string(vocab_size));
  }
}

}  // namespace

int64_t window_start(int64_t length, int64_t block_size) {
  if (length <= block_size) return 0;
  const int64_t hop = std::max<int64_t>(1, block_size / 4);
  return hop * ((length - block_size + hop - 1) / hop);
}

Generator::Generator(LogitsSource& source, std::vector<int32_t> prompt,
                     const GenerateOptions& options, Reward* reward)
    : source_(source),
      options_(options),
      reward_(reward),
      sampler_(source.config().vocab_size, options.filters, options.seed, options.row, 0,
               {options.reward_top_k, options.details}),
      text_(std::move(prompt)) {
  const int64_t vocab_size = source_.config().vocab_size;
  check_options(options_, text_.size(), vocab_size, reward_);
  sampler_.see(text_.data(), text_.size());
  text_.reserve(text_.size() + static_cast<size_t>(std::min(options_.max_new_tokens, kReserved)));
  if (reward_) tilt_.resize(static_cast<size_t>(vocab_size));
  source_.reset();
}

std::optional<Step> Generator::next() {
  if (ended_ || written_ >= options_.max_new_tokens) return std::nullopt;
  const Config& config = source_.config();
  const int64_t end = static_cast<int64_t>(text_.size());
  const int64_t start = window_start(end, config.block_size);
  if (start != cached_from_) {
    // Positions are learned, so what was computed for the old window does not fit the new one.
    source_.reset();
    cached_from_ = start;
  }
  const int64_t coming = start + source_.length();
  const float* logits = source_.append(text_.data() + coming, end - coming);

  const double* tilt = nullptr;
  const double* rewards = nullptr;
  if (reward_ && (options_.beta != 0.0 || options_.details)) rewards = reward_->of_candidates();
  if (rewards && options_.beta != 0.0) {
    for (size_t id = 0; id < tilt_.size(); ++id) tilt_[id] = options_.beta * rewards[id];
    tilt = tilt_.data();
  }
  Step step;
  step.token = sampler_.next(logits, static_cast<uint32_t>(end), tilt);
  if (options_.eos && step.token == *options_.eos) {
    ended_ = true;
    return std::nullopt;
  }
  if (options_.probabilities) {
    step.probability =
        probability_of(logits, config.vocab_size, step.token, options_.calibration_temperature);
  }
  if (options_.details) {
    if (rewards) step.reward = rewards[step.token];
    step.log_z = sampler_.details().log_z;
    step.kl = sampler_.details().kl;
  }
  if (reward_) reward_->advance(step.token);
  text_.push_back(step.token);
  ++written_;
  return step;
}

}  // namespace nanogpt
