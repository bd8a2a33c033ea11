// Hostile model files: whatever the bytes are, they are refused in words or read in full.
//
// LLVMFuzzerTestOneInput is libFuzzer's. Without it (NANOGPT_LIBFUZZER off) a driver mutates seed
// files by itself, so that any compiler can run it:
//
//   fuzz_model_file SECONDS SEED FILE…
//
// It prints how many inputs were tried, refused and accepted. Half of the mutants that are still
// archives get the check sum that fits them, so that mistakes behind that check are reached too;
// only such a mutant or an unchanged file may be accepted, and the driver exits with 1 otherwise.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "engine/archive.h"
#include "engine/crc32.h"
#include "engine/error.h"
#include "engine/model_file.h"

namespace {

// Of all weights; a result that nobody may leave out.
volatile uint8_t parity;

using Bytes = std::vector<uint8_t>;

// Whether a file is accepted. Anything but InputError goes up and ends the program.
bool accepted(const uint8_t* data, size_t size) {
  try {
    const nanogpt::ModelFile file("input", data, size);
    uint8_t sum = 0;
    for (const auto& [name, tensor] : file.weights().tensors) {
      const auto* const bytes = static_cast<const uint8_t*>(tensor.data);
      for (size_t i = 0; i < tensor.bytes; ++i) {
        sum ^= bytes[i];
      }
    }
    parity = sum;
    file.verify(1);
    return true;
  } catch (const nanogpt::InputError& error) {
    if (std::strlen(error.what()) == 0) {
      std::abort();
    }
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const Bytes exact(data, data + size);
  accepted(exact.data(), exact.size());
  return 0;
}

#ifndef NANOGPT_LIBFUZZER

namespace {

using Random = std::mt19937_64;

size_t below(Random& random, size_t limit) { return limit == 0 ? 0 : random() % limit; }

// Places worth damaging: around signatures of the zip format and inside the index.
size_t place(Random& random, const Bytes& bytes) {
  if (random() % 3 == 0) {
    return below(random, bytes.size());
  }
  const size_t start = below(random, bytes.size());
  const uint8_t first = random() % 2 ? 'P' : '"';
  const auto found =
      std::find(bytes.begin() + static_cast<std::ptrdiff_t>(start), bytes.end(), first);
  const auto at = static_cast<size_t>(found - bytes.begin()) + below(random, 60);
  return std::min(at, bytes.size() - 1);
}

void insert(Bytes& bytes, size_t at, const Bytes& what) {
  bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), what.begin(), what.end());
}

void mutate(Random& random, Bytes& bytes, const Bytes& other) {
  if (bytes.empty()) {
    bytes.push_back(0);
  }
  const size_t at = place(random, bytes);
  const size_t left = bytes.size() - at;
  switch (random() % 9) {
    case 0:
      bytes[at] = static_cast<uint8_t>(bytes[at] ^ 1u << random() % 8);
      break;
    case 1:
      bytes[at] = static_cast<uint8_t>(random());
      break;
    case 2: {  // a number that is at an end of its range, or off by one
      static constexpr uint64_t ends[] = {0,
                                          1,
                                          0x7F,
                                          0xFF,
                                          0x7FFF,
                                          0xFFFF,
                                          0x7FFFFFFF,
                                          0xFFFFFFFF,
                                          0x7FFFFFFFFFFFFFFF,
                                          0xFFFFFFFFFFFFFFFF};
      uint64_t value = ends[random() % std::size(ends)];
      const size_t width = std::min(left, size_t{1} << random() % 4);
      if (random() % 2) {
        value = 0;
        std::memcpy(&value, &bytes[at], width);
        value += random() % 2 ? 1 : ~uint64_t{0};
      }
      std::memcpy(&bytes[at], &value, width);
      break;
    }
    case 3:
      bytes.resize(at);
      break;
    case 4: {  // cut a part out
      const size_t length = std::min(left, below(random, 100));
      const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
      bytes.erase(begin, begin + static_cast<std::ptrdiff_t>(length));
      break;
    }
    case 5: {  // repeat a part elsewhere
      const size_t length = std::min(left, below(random, 200));
      const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
      insert(bytes, below(random, bytes.size()),
             Bytes(begin, begin + static_cast<std::ptrdiff_t>(length)));
      break;
    }
    case 6: {  // the end of another file
      const size_t from = below(random, other.size());
      bytes.resize(at);
      bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      break;
    }
    case 7: {  // another digit, longer numbers
      const auto digit = std::find_if(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.end(),
                                      [](uint8_t c) { return c >= '0' && c <= '9'; });
      if (digit != bytes.end()) {
        *digit = static_cast<uint8_t>('0' + random() % 10);
      }
      break;
    }
    default: {  // what JSON is made of
      static const std::string words[] = {"{",    "}",     "[",   "]",    "\"",      ",",
                                          ":",    "null",  "-1",  "1e99", "\\u0000", "\\ud800",
                                          "true", "1e999", "0.5", "\\",   "\xff",    "{\"a\":"};
      const std::string& word = words[random() % std::size(words)];
      const size_t times = random() % 8 ? 1 : 1 + below(random, 100);
      for (size_t i = 0; i < times; ++i) {
        insert(bytes, at, Bytes(word.begin(), word.end()));
      }
    }
  }
}

// Gives a mutant the check sum that its bytes have, the tensors of the seeds left out; whether it
// is still an archive that can have one.
bool seal(Bytes& bytes) {
  try {
    const nanogpt::Archive archive("input", bytes.data(), bytes.size());
    if (archive.comment().empty()) {
      return false;
    }
    uint32_t sum = 0;
    size_t next = 0;
    for (const nanogpt::ArchiveEntry& entry : archive.entries()) {
      const bool tensor =
          entry.name.substr(0, 10) == "constants/" || entry.name.substr(0, 5) == "data/";
      if (tensor && entry.stored) {
        sum = nanogpt::crc32(&bytes[next], entry.offset - next, sum);
        next = entry.offset + entry.size;
      }
    }
    sum = nanogpt::crc32(&bytes[next], archive.end_record() - next, sum);
    char text[nanogpt::archive_comment_bytes + 1];
    std::snprintf(text, sizeof text, "nanogpt-crc32:%08x", sum);
    std::copy_n(text, nanogpt::archive_comment_bytes,
                bytes.end() - static_cast<std::ptrdiff_t>(nanogpt::archive_comment_bytes));
    return true;
  } catch (const nanogpt::InputError&) {
    return false;
  }
}

Bytes contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: fuzz_model_file SECONDS SEED FILE...\n";
    return 2;
  }
  std::vector<Bytes> seeds;
  for (int i = 3; i < count; ++i) {
    seeds.push_back(contents(arguments[i]));
    if (!accepted(seeds.back().data(), seeds.back().size())) {
      std::cerr << arguments[i] << " is not a good model file to begin with\n";
      return 2;
    }
  }
  Random random(std::strtoull(arguments[2], nullptr, 10));
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(std::strtod(arguments[1], nullptr));
  uint64_t tried = 0, refused = 0;
  while (std::chrono::steady_clock::now() < end) {
    const Bytes& seed = seeds[below(random, seeds.size())];
    Bytes bytes = seed;
    const uint64_t rounds = 1 + random() % 4;
    for (uint64_t i = 0; i < rounds; ++i) {
      mutate(random, bytes, seeds[below(random, seeds.size())]);
    }
    const bool sealed = random() % 2 && seal(bytes);
    bytes.shrink_to_fit();
    const bool good = accepted(bytes.data(), bytes.size());
    ++tried;
    refused += good ? 0 : 1;
    // Damage that nobody notices: accepted, not what it was, and no sum was made to fit it.
    if (good && !sealed && std::find(seeds.begin(), seeds.end(), bytes) == seeds.end()) {
      std::ofstream("accepted.bin", std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
      std::cerr << "a damaged file was accepted; it is in accepted.bin\n";
      return 1;
    }
  }
  std::printf("tried %llu refused %llu accepted %llu\n", static_cast<unsigned long long>(tried),
              static_cast<unsigned long long>(refused),
              static_cast<unsigned long long>(tried - refused));
  return 0;
}

#endif
