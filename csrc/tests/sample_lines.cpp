// Sampling, rewards and generation over standard input, for tests/test_native_sampling.py: one JSON
// object a line, followed by as many raw bytes as its "payload" says; one JSON object comes back.
#include <cmath>
#include <cstring>
#include <ctime>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "engine/error.h"
#include "engine/generator.h"
#include "engine/letters.h"
#include "engine/rewards.h"
#include "engine/sampler.h"

namespace {

using nanogpt::Filters;
using nanogpt::Sampler;
using nlohmann::json;

Filters filters_of(const json& request) {
  Filters filters;
  const json given = request.value("filters", json::object());
  filters.temperature = given.value("temperature", 1.0);
  filters.repetition_penalty = given.value("repetition_penalty", 1.0);
  if (given.contains("top_k")) filters.top_k = given["top_k"].get<int64_t>();
  if (given.contains("top_p")) filters.top_p = given["top_p"].get<double>();
  if (given.contains("min_p")) filters.min_p = given["min_p"].get<double>();
  return filters;
}

// Ids with the bytes that the test names, in hexadecimal.
class GivenTokens : public nanogpt::Tokenizer {
 public:
  explicit GivenTokens(const std::vector<std::string>& hexadecimal) {
    for (const std::string& text : hexadecimal) {
      std::string bytes;
      for (size_t i = 0; i + 1 < text.size(); i += 2) {
        bytes.push_back(static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16)));
      }
      spans_.push_back({static_cast<uint32_t>(arena_.size()), static_cast<uint32_t>(bytes.size())});
      arena_ += bytes;
    }
  }
  std::vector<int32_t> encode(std::string_view) const override {
    throw std::logic_error("the tests give ids");
  }
};

std::unique_ptr<nanogpt::Reward> reward_of(const json& request, const GivenTokens& tokens) {
  if (request.contains("characters")) {
    return nanogpt::char_reward(tokens, request["characters"].get<std::string>());
  }
  if (request.contains("terms")) {
    return nanogpt::term_reward(tokens, request["terms"].get<std::vector<std::string>>());
  }
  return nullptr;
}

// Logits that are a hash of the tokens of the context, in order; the test has the same in Python.
class HashedLogits : public nanogpt::LogitsSource {
 public:
  HashedLogits(int64_t vocab_size, int64_t block_size, double scale) : scale_(scale) {
    config_.vocab_size = vocab_size;
    config_.block_size = block_size;
    logits_.resize(static_cast<size_t>(vocab_size));
  }
  const nanogpt::Config& config() const override { return config_; }
  const float* append(const int32_t* tokens, int64_t count) override {
    if (count < 1 || length_ + count > config_.block_size) {
      throw std::logic_error("a context of " + std::to_string(length_) + " cannot take " +
                             std::to_string(count) + " more");
    }
    for (int64_t i = 0; i < count; ++i) {
      hash_ = (hash_ ^ static_cast<uint64_t>(tokens[i] + 1)) * 0x9E3779B97F4A7C15u;
      hash_ ^= hash_ >> 29;
    }
    length_ += count;
    for (size_t id = 0; id < logits_.size(); ++id) {
      uint64_t mixed = (hash_ + id) * 0xBF58476D1CE4E5B9u;
      mixed ^= mixed >> 32;
      mixed *= 0x94D049BB133111EBu;
      const double unit = static_cast<double>(mixed >> 40) / 16777216.0;
      logits_[id] = static_cast<float>((unit - 0.5) * scale_);
    }
    return logits_.data();
  }
  int64_t length() const override { return length_; }
  void reset() override { length_ = 0, hash_ = 0; }

 private:
  nanogpt::Config config_;
  double scale_;
  std::vector<float> logits_;
  int64_t length_ = 0;
  uint64_t hash_ = 0;
};

json sample(const json& request, const std::vector<char>& payload) {
  const auto vocab = request["vocab"].get<size_t>();
  const auto positions = request["positions"].get<std::vector<uint32_t>>();
  const bool tilted = request.value("tilted", false);
  const size_t numbers = vocab * positions.size();
  std::vector<float> logits(numbers);
  std::vector<double> tilt(tilted ? numbers : 0);
  if (payload.size() != numbers * (tilted ? 12 : 4)) throw std::logic_error("payload");
  std::memcpy(logits.data(), payload.data(), numbers * 4);
  if (tilted) std::memcpy(tilt.data(), payload.data() + numbers * 4, numbers * 8);
  Sampler sampler(static_cast<int64_t>(vocab), filters_of(request), request["seed"].get<uint64_t>(),
                  request.value("row", 0u), request.value("stream", 0u));
  const auto seen = request.value("seen", std::vector<int32_t>());
  sampler.see(seen.data(), seen.size());
  std::vector<int32_t> ids;
  for (size_t i = 0; i < positions.size(); ++i) {
    ids.push_back(sampler.next(logits.data() + i * vocab, positions[i],
                               tilted ? tilt.data() + i * vocab : nullptr));
  }
  return {{"ids", ids}};
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// Draws against the plain argmax of x + noise over all ids, on logits made to be hard for a bound.
json agree(const json& request) {
  const auto vocab = request["vocab"].get<size_t>();
  const auto kind = request["kind"].get<std::string>();
  const auto draws = request["draws"].get<uint32_t>();
  uint64_t state = request["seed"].get<uint64_t>() | 1;
  const uint64_t seed = next_random(state);
  Sampler sampler(static_cast<int64_t>(vocab), Filters(), seed);
  std::vector<float> logits(vocab);
  uint32_t differences = 0;
  for (uint32_t position = 0; position < draws; ++position) {
    for (float& logit : logits) {
      const double unit = static_cast<double>(next_random(state) >> 11) * 0x1p-53;
      double x = 0.0;
      if (kind == "plain") x = 20 * unit - 10;
      if (kind == "ties") x = std::floor(3 * unit);
      if (kind == "flat") x = 1e-3 * unit;
      if (kind == "peaked") x = -60 * unit;
      if (kind == "holes") x = unit < 0.9 ? -std::numeric_limits<double>::infinity() : 5 * unit;
      // So large that adding the noise rounds it to a few values.
      if (kind == "huge") x = 1e16 + 64 * unit;
      logit = static_cast<float>(x);
    }
    if (kind == "holes") logits[position % vocab] = 1.0f;
    double best = -std::numeric_limits<double>::infinity();
    int32_t expected = -1;
    for (size_t id = 0; id < vocab; ++id) {
      const double sum = static_cast<double>(logits[id]) +
                         nanogpt::gumbel(seed, static_cast<uint32_t>(id), position, 0, 0);
      if (sum > best) best = sum, expected = static_cast<int32_t>(id);
    }
    differences += sampler.next(logits.data(), position) != expected;
  }
  return {{"differences", differences}};
}

json rewards(const json& request) {
  const GivenTokens tokens(request["tokens"].get<std::vector<std::string>>());
  auto reward = reward_of(request, tokens);
  json steps = json::array();
  const auto path = request["path"].get<std::vector<int32_t>>();
  for (const int32_t id : path) {
    // Half way a copy goes on instead.
    if (steps.size() == path.size() / 2) reward = reward->clone();
    const double* values = reward->of_candidates();
    steps.push_back(std::vector<double>(values, values + tokens.vocab_size()));
    reward->advance(id);
  }
  return {{"steps", steps}};
}

json generate(const json& request) {
  const GivenTokens tokens(request.value("tokens", std::vector<std::string>()));
  const auto reward = reward_of(request, tokens);
  HashedLogits source(request["vocab"].get<int64_t>(), request["block"].get<int64_t>(),
                      request.value("scale", 8.0));
  nanogpt::GenerateOptions options;
  options.max_new_tokens = request["max_new_tokens"].get<int64_t>();
  options.filters = filters_of(request);
  options.seed = request["seed"].get<uint64_t>();
  options.row = request.value("row", 0u);
  options.beta = request.value("beta", 0.0);
  if (request.contains("eos")) options.eos = request["eos"].get<int32_t>();
  options.calibration_temperature = request.value("calibration_temperature", 1.0);
  options.probabilities = request.value("probabilities", false);
  nanogpt::Generator generator(source, request["prompt"].get<std::vector<int32_t>>(), options,
                               reward.get());
  std::vector<int32_t> ids;
  std::vector<double> probabilities;
  while (const auto step = generator.next()) {
    ids.push_back(step->token);
    probabilities.push_back(step->probability);
  }
  if (generator.next()) throw std::logic_error("a text went on after its end");
  return {{"ids", ids}, {"probabilities", probabilities}, {"text", generator.tokens()}};
}

// Microseconds a draw, or a step of the rewards, on random logits.
json bench(const json& request) {
  const auto vocab = request["vocab"].get<size_t>();
  const auto draws = request["draws"].get<uint32_t>();
  uint64_t state = 88172645463325252u;
  std::vector<std::vector<float>> logits(8, std::vector<float>(vocab));
  for (auto& row : logits) {
    for (float& logit : row) {
      double sum = 0.0;
      for (int i = 0; i < 12; ++i) sum += static_cast<double>(next_random(state) >> 11) * 0x1p-53;
      logit = static_cast<float>((sum - 6.0) * request.value("spread", 3.0));
    }
  }
  Sampler sampler(static_cast<int64_t>(vocab), filters_of(request), 1);
  const GivenTokens tokens(request.value("tokens", std::vector<std::string>()));
  // Processor time, so that what else the machine does is left out.
  const auto seconds = [] { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; };
  const double built = seconds();
  const auto reward = reward_of(request, tokens);
  const double begin = seconds();
  const auto path = request.value("path", std::vector<int32_t>());
  double kept = 0.0;
  for (uint32_t i = 0; i < draws; ++i) {
    if (reward) {
      kept += reward->of_candidates()[0];
      reward->advance(path[i % path.size()]);
    } else {
      kept += sampler.next(logits[i % 8].data(), i);
    }
  }
  return {{"microseconds", (seconds() - begin) / draws * 1e6},
          {"build_microseconds", (begin - built) * 1e6},
          {"kept", kept}};
}

json answer(const json& request, const std::vector<char>& payload) {
  const auto op = request["op"].get<std::string>();
  if (op == "philox") {
    return {{"words", nanogpt::philox(request["counter"].get<std::array<uint32_t, 4>>(),
                                      request["key"].get<std::array<uint32_t, 2>>())}};
  }
  if (op == "gumbel") {
    std::vector<double> values;
    for (const json& at : request["at"]) {
      values.push_back(nanogpt::gumbel(request["seed"].get<uint64_t>(), at[0].get<uint32_t>(),
                                       at[1].get<uint32_t>(), at[2].get<uint32_t>(),
                                       at[3].get<uint32_t>()));
    }
    return {{"values", values}};
  }
  if (op == "probability") {
    std::vector<float> logits(payload.size() / 4);
    std::memcpy(logits.data(), payload.data(), payload.size());
    return {{"value", nanogpt::probability_of(logits.data(), static_cast<int64_t>(logits.size()),
                                              request["id"].get<int32_t>(),
                                              request["temperature"].get<double>())}};
  }
  if (op == "window_starts") {
    std::vector<int64_t> starts;
    const auto block = request["block"].get<int64_t>();
    for (int64_t length = 1; length <= request["until"].get<int64_t>(); ++length) {
      starts.push_back(nanogpt::window_start(length, block));
    }
    return {{"starts", starts}};
  }
  if (op == "characters") {
    std::vector<uint32_t> words, folds;
    for (auto code = request["first"].get<uint32_t>(); code < request["end"].get<uint32_t>();
         ++code) {
      if (nanogpt::is_word_character(code)) words.push_back(code);
      folds.push_back(nanogpt::folded(code));
    }
    return {{"words", words}, {"folds", folds}};
  }
  if (op == "sample") return sample(request, payload);
  if (op == "agree") return agree(request);
  if (op == "rewards") return rewards(request);
  if (op == "generate") return generate(request);
  if (op == "bench") return bench(request);
  throw std::logic_error("no such request: " + op);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    json reply;
    try {
      const json request = json::parse(line);
      std::vector<char> payload(request.value("payload", size_t{0}));
      std::cin.read(payload.data(), static_cast<std::streamsize>(payload.size()));
      reply = answer(request, payload);
    } catch (const nanogpt::Error& error) {
      reply = {{"error", error.what()}, {"code", error.exit_code}};
    } catch (const std::out_of_range& error) {
      reply = {{"error", error.what()}, {"code", -1}};
    }
    std::cout << reply.dump() << std::endl;
  }
}
