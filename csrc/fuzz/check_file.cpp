// Opens and verifies model files as the generation binary does, and says what it found.
//
//   check_file PATH          prints the outcome; exits with 0 or the error's exit code
//   check_file < LIST        one outcome a line, for each line of the list:
//       PATH                     the file itself
//       PATH <tab> flip <tab> OFFSET <tab> BIT
//       PATH <tab> cut <tab> LENGTH
//     The damaged ones are made in memory from the file. Exits with 1 only where a line is wrong.
//   check_file --time THREADS ROUNDS PATH
//                            milliseconds to open and to verify, the fastest of the rounds
//
// An outcome is the exit code, a tab and a sentence.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/model_file.h"

namespace {

struct Outcome {
  int code;
  std::string sentence;
};

// Reads every byte that the weights point to, so that a sanitizer sees a wrong pointer.
uint8_t touched(const nanogpt::Weights& weights) {
  uint8_t sum = 0;
  for (const auto& [name, tensor] : weights.tensors) {
    const auto* const bytes = static_cast<const uint8_t*>(tensor.data);
    for (size_t i = 0; i < tensor.bytes; ++i) {
      sum ^= bytes[i];
    }
  }
  return sum;
}

template <typename... Source>
Outcome outcome(const Source&... source) {
  try {
    const nanogpt::ModelFile file(source...);
    file.verify(2);
    const nanogpt::Config& config = file.weights().config;
    std::ostringstream text;
    text << "good: " << file.weights().tensors.size() << " tensors, " << file.quantization()
         << ", V=" << config.vocab_size << " block=" << config.block_size << " L=" << config.n_layer
         << " H=" << config.n_head << " C=" << config.n_embd
         << (config.bias ? " with biases" : " without biases") << (config.rotary ? ", rotary" : "")
         << (config.qk_norm ? ", qk_norm" : "") << ", temperature ";
    if (file.calibration_temperature()) {
      text << *file.calibration_temperature();
    } else {
      text << "none";
    }
    text << ", tokenizer of " << file.tokenizer_json().size() << " bytes, parity "
         << static_cast<int>(touched(file.weights()));
    return {0, text.str()};
  } catch (const nanogpt::Error& error) {
    return {error.exit_code, error.what()};
  }
}

int check_list() {
  std::string line, path, loaded;
  std::vector<uint8_t> bytes;
  while (std::getline(std::cin, line)) {
    std::istringstream fields(line);
    std::string what, number, bit;
    std::getline(fields, path, '\t');
    Outcome found{0, ""};
    if (!std::getline(fields, what, '\t')) {
      found = outcome(path);
    } else {
      if (loaded != path) {
        std::ifstream file(path, std::ios::binary);
        bytes.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        loaded = path;
      }
      std::getline(fields, number, '\t');
      const size_t place = std::strtoull(number.c_str(), nullptr, 10);
      if (what == "flip" && std::getline(fields, bit) && place < bytes.size()) {
        // A copy of the exact size each time, so that reading past its end is seen.
        std::vector<uint8_t> copy(bytes);
        copy[place] = static_cast<uint8_t>(copy[place] ^ 1u << (std::atoi(bit.c_str()) & 7));
        found = outcome(path, copy.data(), copy.size());
      } else if (what == "cut" && place <= bytes.size()) {
        const std::vector<uint8_t> copy(bytes.begin(),
                                        bytes.begin() + static_cast<std::ptrdiff_t>(place));
        found = outcome(path, copy.data(), copy.size());
      } else {
        std::cerr << "not a line of the list: " << line << '\n';
        return 1;
      }
    }
    std::cout << found.code << '\t' << found.sentence << '\n';
  }
  return 0;
}

int measure(int threads, int rounds, const std::string& path) {
  using Clock = std::chrono::steady_clock;
  double opening = 1e9, verifying = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const auto start = Clock::now();
    const nanogpt::ModelFile file(path);
    const auto opened = Clock::now();
    file.verify(threads);
    const auto verified = Clock::now();
    opening = std::min(opening, std::chrono::duration<double, std::milli>(opened - start).count());
    verifying =
        std::min(verifying, std::chrono::duration<double, std::milli>(verified - opened).count());
  }
  std::printf("%.3f\t%.3f\n", opening, verifying);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 5 && std::string(arguments[1]) == "--time") {
    try {
      return measure(std::atoi(arguments[2]), std::atoi(arguments[3]), arguments[4]);
    } catch (const nanogpt::Error& error) {
      std::cerr << error.what() << '\n';
      return error.exit_code;
    }
  }
  if (count == 2) {
    const Outcome found = outcome(std::string(arguments[1]));
    std::cout << found.code << '\t' << found.sentence << '\n';
    return found.code;
  }
  return check_list();
}
