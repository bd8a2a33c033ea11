#include "generate/bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "generate/inputs.h"

namespace nanogpt {
namespace {

constexpr int64_t kPrompts[] = {64, 512};
constexpr int64_t kWritten = 128;

double measure(LogitsSource& source, const std::vector<int32_t>& tokens, bool one_by_one) {
  source.reset();
  const Clock::time_point start = Clock::now();
  if (one_by_one) {
    for (const int32_t token : tokens) {
      check_interruption();
      source.append(&token, 1);
    }
  } else {
    check_interruption();
    source.append(tokens.data(), static_cast<int64_t>(tokens.size()));
  }
  return static_cast<double>(tokens.size()) / seconds_since(start);
}

std::string shown_size(size_t bytes) {
  char text[32];
  const double count = static_cast<double>(bytes);
  if (bytes >= 1000000000) {
    std::snprintf(text, sizeof text, "%.2f GB", count / 1e9);
  } else {
    std::snprintf(text, sizeof text, "%.1f MB", count / 1e6);
  }
  return text;
}

std::string shown_parameters(int64_t parameters) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f M", static_cast<double>(parameters) / 1e6);
  return text;
}

std::string shown_rate(double rate) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", rate);
  return text;
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Columns of display width; only "±" is wider in bytes.
size_t width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

}  // namespace

double BenchResult::mean() const {
  return std::accumulate(tokens_per_second.begin(), tokens_per_second.end(), 0.0) /
         static_cast<double>(tokens_per_second.size());
}

double BenchResult::standard_deviation() const {
  if (tokens_per_second.size() < 2) return 0;
  const double middle = mean();
  double squares = 0;
  for (const double rate : tokens_per_second) squares += (rate - middle) * (rate - middle);
  return std::sqrt(squares / static_cast<double>(tokens_per_second.size() - 1));
}

double BenchResult::median() const {
  std::vector<double> ordered = tokens_per_second;
  std::sort(ordered.begin(), ordered.end());
  const size_t half = ordered.size() / 2;
  return ordered.size() % 2 == 1 ? ordered[half] : (ordered[half - 1] + ordered[half]) / 2;
}

std::vector<BenchResult> run_bench(LogitsSource& source, int repetitions, uint64_t seed) {
  const Config& config = source.config();
  std::mt19937_64 random(seed);
  const auto draw = [&](int64_t count) {
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    for (int32_t& token : tokens) {
      token = static_cast<int32_t>(random() % static_cast<uint64_t>(config.vocab_size));
    }
    return tokens;
  };
  std::vector<BenchResult> results;
  const auto add = [&](const std::string& prefix, int64_t wanted, bool one_by_one) {
    const int64_t count = std::min(wanted, config.block_size);
    BenchResult result{prefix + std::to_string(count), count, {}};
    for (const BenchResult& before : results) {
      if (before.test == result.test) return;
    }
    measure(source, draw(count), one_by_one);
    for (int i = 0; i < repetitions; ++i) {
      result.tokens_per_second.push_back(measure(source, draw(count), one_by_one));
    }
    results.push_back(std::move(result));
  };
  for (const int64_t count : kPrompts) add("pp", count, false);
  add("tg", kWritten, true);
  return results;
}

std::string bench_table(const BenchSubject& subject, const std::vector<BenchResult>& results,
                        int threads) {
  std::vector<std::vector<std::string>> rows = {
      {"model", "size", "params", "weights", "engine", "threads", "test", "t/s", "median t/s"}};
  const std::string engine = subject.instruction_set.empty()
                                 ? subject.engine
                                 : subject.engine + " " + subject.instruction_set;
  for (const BenchResult& result : results) {
    rows.push_back({visible(file_name(subject.path)), shown_size(subject.weight_bytes),
                    shown_parameters(subject.parameters), subject.quantization, engine,
                    threads > 0 ? std::to_string(threads) : "torch's", result.test,
                    shown_rate(result.mean()) + " ± " + shown_rate(result.standard_deviation()),
                    shown_rate(result.median())});
  }
  std::vector<size_t> widths(rows[0].size(), 3);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string table;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t i = 0; i < rows[r].size(); ++i) {
      const std::string spaces(widths[i] - width(rows[r][i]), ' ');
      // Words to the left, numbers to the right.
      const bool left = i == 0 || i == 3 || i == 4 || i == 6;
      table += "| " + (left ? rows[r][i] + spaces : spaces + rows[r][i]) + " ";
    }
    table += "|\n";
    if (r == 0) {
      for (const size_t columns : widths) table += "|" + std::string(columns + 2, '-');
      table += "|\n";
    }
  }
  if (subject.read_limit > 0) {
    table +=
        "reading the weights once a token would allow " + shown_rate(subject.read_limit) + " t/s\n";
  }
  return table;
}

std::string bench_json(const BenchSubject& subject, const std::vector<BenchResult>& results,
                       int threads) {
  nlohmann::ordered_json tests = nlohmann::ordered_json::array();
  for (const BenchResult& result : results) {
    tests.push_back({{"test", result.test},
                     {"tokens", result.tokens},
                     {"tokens_per_second", result.tokens_per_second},
                     {"mean", result.mean()},
                     {"standard_deviation", result.standard_deviation()},
                     {"median", result.median()}});
  }
  const auto or_null = [](bool known, const nlohmann::ordered_json& value) {
    return known ? value : nlohmann::ordered_json(nullptr);
  };
  const nlohmann::ordered_json object = {
      {"model", visible(subject.path)},
      {"engine", subject.engine},
      {"instruction_set", or_null(!subject.instruction_set.empty(), subject.instruction_set)},
      {"threads", or_null(threads > 0, threads)},
      {"quantize", subject.quantization},
      {"weight_bytes", subject.weight_bytes},
      {"parameters", subject.parameters},
      {"load_ms", subject.load_ms},
      {"read_limit_tokens_per_second", or_null(subject.read_limit > 0, subject.read_limit)},
      {"tests", tests}};
  return object.dump(-1, ' ', true) + "\n";
}

}  // namespace nanogpt
