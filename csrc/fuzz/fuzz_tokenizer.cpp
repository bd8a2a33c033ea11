// Hostile descriptions and texts: the tokenizers, the UTF-8 stream and the stop texts.
//
// The input is a description, a zero byte, and a text; without a zero byte both are the same.
// Clang links it to libFuzzer with -fsanitize=fuzzer and -DNANOGPT_LIBFUZZER. Otherwise it is a
// program of its own: fuzz_tokenizer RUNS SEED FILE... changes the files' bytes at random.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"
#include "engine/text.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"

namespace {

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_tokenizer: %s\n", what);
  std::abort();
}

void try_tokenizer(std::string_view description, std::string_view text) {
  try {
    const auto tokenizer = nanogpt::Tokenizer::from_json(description);
    must(tokenizer->bytes_of(tokenizer->end_of_text_id()).empty(), "the special token has bytes");
    const std::vector<int32_t> ids = tokenizer->encode(text);
    std::string bytes;
    for (const int32_t id : ids) bytes += tokenizer->bytes_of(id);
    // A merge may make the special token, whose bytes are left out.
    const bool special = bytes.size() != text.size();
    must(special || bytes == text, "the ids' bytes are not the text");
    const std::string decoded = tokenizer->decode(ids);
    must(nanogpt::utf8_valid_prefix(decoded) == decoded.size(), "decode gives what is not UTF-8");
  } catch (const nanogpt::InputError&) {
    // Refused in words, as it should be.
  }
}

void try_streams(std::string_view text) {
  nanogpt::Utf8Stream whole, split;
  std::string at_once = whole.feed(text);
  at_once += whole.flush();
  std::string piecewise;
  for (const char byte : text) piecewise += split.feed({&byte, 1});
  piecewise += split.flush();
  must(at_once == piecewise, "the UTF-8 stream depends on where it is split");

  // Characters at the front of the text are the stop text, what follows is watched.
  size_t edge = at_once.size() < 4 ? at_once.size() : 4;
  while (edge < at_once.size() && (at_once[edge] & 0xC0) == 0x80) ++edge;
  const std::string stop = at_once.substr(0, edge), rest = at_once.substr(edge);
  nanogpt::StopText watch({stop});
  std::string given = watch.feed(rest);
  given += watch.flush();
  const size_t expected = stop.empty() ? std::string::npos : rest.find(stop);
  must(watch.found() == (expected != std::string::npos), "a stop text is missed or made up");
  must(given == rest.substr(0, expected), "a stop text ends the text at the wrong place");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const std::string_view text = zero == std::string_view::npos ? input : input.substr(zero + 1);
  try_tokenizer(input.substr(0, zero), text);
  try_streams(text);
  return 0;
}

#ifndef NANOGPT_LIBFUZZER
namespace {

// A few bytes changed, removed, repeated or taken from another place.
std::string mutated(std::string input, std::mt19937_64& random) {
  const auto below = [&random](size_t limit) { return random() % limit; };
  static const char* const kPieces[] = {"null",        "false", "true",     "-1", "1e9",
                                        "99999999999", "\"",    "[",        "{",  "}",
                                        "\\ud",        "\\u0",  "\xF0\x9F", ","};
  for (size_t changes = 1 + below(6); changes > 0 && !input.empty(); --changes) {
    const size_t at = below(input.size());
    const size_t length = 1 + below(std::min<size_t>(input.size() - at, 16));
    switch (below(6)) {
      case 0:
        input[at] = static_cast<char>(random());
        break;
      case 1:
        input[at] = static_cast<char>(input[at] ^ (1 << below(8)));
        break;
      case 2:
        input.erase(at, length);
        break;
      case 3:
        input.insert(below(input.size()), input.substr(at, length));
        break;
      case 4:
        input.insert(at, kPieces[below(std::size(kPieces))]);
        break;
      default:
        if (below(8) == 0) input.resize(at);
    }
  }
  return input;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: fuzz_tokenizer RUNS SEED FILE...\n");
    return 2;
  }
  std::mt19937_64 random(std::strtoull(arguments[2], nullptr, 10));
  std::vector<std::string> inputs;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", arguments[i]);
      return 2;
    }
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  const auto run_one = [](const std::string& input) {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  };
  for (const std::string& input : inputs) run_one(input);
  const unsigned long long runs = std::strtoull(arguments[1], nullptr, 10);
  for (unsigned long long i = 0; i < runs; ++i) {
    run_one(mutated(inputs[random() % inputs.size()], random));
  }
  std::printf("%llu inputs and %zu files\n", runs, inputs.size());
  return 0;
}
#endif
