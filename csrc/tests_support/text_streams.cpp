// What the tests compare with Python, a stream of cases at a time: text_streams MODE
// [TOKENIZER.json]
//
// Standard input holds cases one after the other, standard output their results in the same order.
// A string is its length (uint32) and its bytes, a list its length (uint32) and its parts; numbers
// are little-endian. A result is a list of ids, or the number 2^32 - 1 and the error's sentence.
//   encode    string -> ids                       with TOKENIZER.json
//   decode    list of int32 -> string             with TOKENIZER.json
//   describe  nothing -> list of strings          with TOKENIZER.json: the bytes of every id
//   load      description, text -> ids
//   utf8      list of strings -> list of strings  every feed's result and the flush's
//   stop      stops, list of strings -> list of strings, the number found
//   bench     path of a text -> {"load_ms", "encode_ms", "tokens"}, the best of many, as JSON

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/text.h"
#include "engine/tokenizer.h"

namespace {

using nanogpt::Tokenizer;

template <typename Number>
bool read_number(Number& number) {
  return std::fread(&number, sizeof number, 1, stdin) == 1;
}

void write_number(uint32_t number) { std::fwrite(&number, sizeof number, 1, stdout); }

// False at the end of the stream.
bool read_string(std::string& text) {
  uint32_t size;
  if (!read_number(size)) return false;
  text.resize(size);
  if (std::fread(text.data(), 1, size, stdin) != size) {
    throw nanogpt::UsageError("a case ends early");
  }
  return true;
}

void write_string(const std::string& text) {
  write_number(static_cast<uint32_t>(text.size()));
  std::fwrite(text.data(), 1, text.size(), stdout);
}

bool read_strings(std::vector<std::string>& texts) {
  uint32_t count;
  if (!read_number(count)) return false;
  texts.assign(count, {});
  for (std::string& text : texts) {
    if (!read_string(text)) throw nanogpt::UsageError("a case ends early");
  }
  return true;
}

template <typename Encode>
void write_ids(const Encode& encode) {
  try {
    const std::vector<int32_t> ids = encode();
    write_number(static_cast<uint32_t>(ids.size()));
    std::fwrite(ids.data(), sizeof ids[0], ids.size(), stdout);
  } catch (const nanogpt::InputError& error) {
    write_number(std::numeric_limits<uint32_t>::max());
    write_string(error.what());
  }
}

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw nanogpt::UsageError("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Processor time, which other work on the machine does not lengthen much.
template <typename Work>
double best_milliseconds(int repetitions, const Work& work) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repetitions; ++i) {
    const std::clock_t start = std::clock();
    work();
    best = std::min(best, static_cast<double>(std::clock() - start) * 1000 / CLOCKS_PER_SEC);
  }
  return best;
}

void bench(const std::string& description, const std::string& text) {
  const auto tokenizer = Tokenizer::from_json(description);
  size_t tokens = 0;
  const double load =
      best_milliseconds(20, [&] { return Tokenizer::from_json(description)->vocab_size(); });
  const double encode = best_milliseconds(20, [&] { tokens = tokenizer->encode(text).size(); });
  std::printf("{\"load_ms\": %.3f, \"encode_ms\": %.3f, \"tokens\": %zu}\n", load, encode, tokens);
}

void run(const std::string& mode, const std::string& argument) {
  std::string text, description;
  std::vector<std::string> texts, stops;
  if (mode == "utf8") {
    while (read_strings(texts)) {
      nanogpt::Utf8Stream stream;
      write_number(static_cast<uint32_t>(texts.size() + 1));
      for (const std::string& piece : texts) write_string(stream.feed(piece));
      write_string(stream.flush());
    }
    return;
  }
  if (mode == "stop") {
    while (read_strings(stops)) {
      if (!read_strings(texts)) throw nanogpt::UsageError("a case ends early");
      nanogpt::StopText stop(stops);
      write_number(static_cast<uint32_t>(texts.size() + 1));
      for (const std::string& piece : texts) write_string(stop.feed(piece));
      write_string(stop.flush());
      write_number(stop.found() ? 1 : 0);
    }
    return;
  }
  if (mode == "load") {
    while (read_string(description)) {
      if (!read_string(text)) throw nanogpt::UsageError("a case ends early");
      write_ids([&] { return Tokenizer::from_json(description)->encode(text); });
    }
    return;
  }
  description = content_of(argument);
  if (mode == "bench") {
    std::getline(std::cin, text);
    return bench(description, content_of(text));
  }
  const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::from_json(description);
  if (mode == "encode") {
    while (read_string(text)) write_ids([&] { return tokenizer->encode(text); });
  } else if (mode == "decode") {
    std::vector<int32_t> ids;
    uint32_t count;
    while (read_number(count)) {
      ids.resize(count);
      if (std::fread(ids.data(), sizeof ids[0], count, stdin) != count) {
        throw nanogpt::UsageError("a case ends early");
      }
      write_string(tokenizer->decode(ids));
    }
  } else if (mode == "describe") {
    write_number(static_cast<uint32_t>(tokenizer->vocab_size()));
    for (int32_t id = 0; id <= tokenizer->end_of_text_id(); ++id) {
      write_string(std::string(tokenizer->bytes_of(id)));
    }
  } else {
    throw nanogpt::UsageError("unknown mode " + mode);
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(count > 1 ? arguments[1] : "", count > 2 ? arguments[2] : "");
  } catch (const nanogpt::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.exit_code;
  }
  return 0;
}
