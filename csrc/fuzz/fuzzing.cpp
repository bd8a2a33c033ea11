// Makes a program of a fuzz target: of libFuzzer with NANOGPT_LIBFUZZER, otherwise a loop of its
// own that any compiler builds and that understands the flags that are used here:
//
//   fuzz_NAME FILE…                        runs each input once
//   fuzz_NAME [FLAGS] FOLDER…              mutates the inputs in the folders
//     -runs=N -max_total_time=SECONDS      when to stop; by default never
//     -seed=N -max_len=BYTES -artifact_prefix=PATH
//
// At its end it prints how many inputs were tried and accepted. An input that ends the program is
// written to a file named crash-… after the prefix.

#include "fuzz/fuzzing.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace fuzzing {

uint64_t Random::operator()() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

size_t Random::below(size_t limit) {
  return limit == 0 ? 0 : static_cast<size_t>((*this)() % limit);
}

void must(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "a property does not hold: %s\n", what);
    std::abort();
  }
}

void put(Bytes& bytes, size_t at, size_t width, uint64_t value) {
  if (at > bytes.size() || width > bytes.size() - at) {
    return;
  }
  for (size_t i = 0; i < width; ++i) {
    bytes[at + i] = static_cast<uint8_t>(value >> 8 * i);
  }
}

uint64_t number_at(const Bytes& bytes, size_t at, size_t width) {
  uint64_t value = 0;
  for (size_t i = width; i-- > 0;) {
    value = value << 8 | (at + i < bytes.size() ? bytes[at + i] : 0);
  }
  return value;
}

namespace {

uint64_t tried, accepted;

void run_one(const uint8_t* data, size_t size) {
  ++tried;
  accepted += accepts(data, size) ? 1 : 0;
}

void print_counts() {
  std::fprintf(stderr, "tried %llu accepted %llu\n", static_cast<unsigned long long>(tried),
               static_cast<unsigned long long>(accepted));
}

Bytes::iterator at(Bytes& bytes, size_t place) {
  return bytes.begin() + static_cast<std::ptrdiff_t>(place);
}

// One change. `other` is another input, a part of which may be put in.
void mutate(Bytes& bytes, Random& random, const Bytes& other) {
  if (bytes.empty()) {
    bytes.push_back(static_cast<uint8_t>(random()));
  }
  const size_t place = random.below(bytes.size());
  const size_t left = bytes.size() - place;
  switch (random.below(11)) {
    case 0:
      bytes[place] = static_cast<uint8_t>(bytes[place] ^ 1u << random.below(8));
      break;
    case 1:
      bytes[place] = static_cast<uint8_t>(random());
      break;
    case 2: {  // a number at an end of its range
      static constexpr uint64_t ends[] = {0,      1,          0x7F,       0xFF,      0x7FFF,
                                          0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, INT64_MAX, UINT64_MAX};
      put(bytes, place, size_t{1} << random.below(4), ends[random.below(std::size(ends))]);
      break;
    }
    case 3: {  // a number that is off by one
      const size_t width = size_t{1} << random.below(4);
      const uint64_t value = number_at(bytes, place, width);
      put(bytes, place, width, random.one_in(2) ? value + 1 : value - 1);
      break;
    }
    case 4:  // cut off, rarely
      if (random.one_in(4)) {
        bytes.resize(place);
      }
      break;
    case 5: {  // a part is missing
      const size_t length = std::min(left, 1 + random.below(random.one_in(4) ? 100 : 8));
      bytes.erase(at(bytes, place), at(bytes, place + length));
      break;
    }
    case 6: {  // a part stands there twice
      const size_t length = std::min(left, 1 + random.below(random.one_in(4) ? 200 : 16));
      const Bytes part(at(bytes, place), at(bytes, place + length));
      bytes.insert(at(bytes, random.below(bytes.size() + 1)), part.begin(), part.end());
      break;
    }
    case 7: {  // a part of another input
      if (!other.empty()) {
        const size_t from = random.below(other.size());
        const size_t length = std::min(other.size() - from, 1 + random.below(100));
        const Bytes part(other.begin() + static_cast<std::ptrdiff_t>(from),
                         other.begin() + static_cast<std::ptrdiff_t>(from + length));
        bytes.insert(at(bytes, place), part.begin(), part.end());
      }
      break;
    }
    case 8: {  // another digit
      const auto digit = std::find_if(at(bytes, place), bytes.end(),
                                      [](uint8_t c) { return c >= '0' && c <= '9'; });
      if (digit != bytes.end()) {
        *digit = static_cast<uint8_t>('0' + random.below(10));
      }
      break;
    }
    default: {  // what the format is made of, in addition or in place of what stands there
      if (!pieces.empty()) {
        const std::string& piece = pieces[random.below(pieces.size())];
        if (random.one_in(3)) {
          std::copy_n(piece.begin(), std::min(left, piece.size()), at(bytes, place));
        } else {
          for (size_t times = random.one_in(50) ? random.below(100) : 1; times > 0; --times) {
            bytes.insert(at(bytes, place), piece.begin(), piece.end());
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fuzzing

#ifdef NANOGPT_LIBFUZZER

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed);

extern "C" int LLVMFuzzerInitialize(int*, char***) { return std::atexit(fuzzing::print_counts); }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::run_one(data, size);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  fuzzing::Random random(seed);
  fuzzing::Bytes bytes;
  if (random.one_in(3)) {
    bytes.assign(data, data + size);
    fuzzing::mutate(bytes, random, bytes);
  } else {
    size = LLVMFuzzerMutate(data, size, most);
    bytes.assign(data, data + size);
  }
  if (random.one_in(2)) {
    fuzzing::mend(bytes, random);
  }
  bytes.resize(std::min(bytes.size(), most));
  std::copy(bytes.begin(), bytes.end(), data);
  return bytes.size();
}

#else

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <utility>

// AddressSanitizer's, where it is linked in.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace fuzzing {
namespace {

constexpr unsigned slow_seconds = 20;

// The input that is being run and where it goes if it is the last; nowhere where it is a file.
const Bytes* current;
std::string artifact;

void save_current() {
  if (current != nullptr && !artifact.empty()) {
    const Bytes* const input = std::exchange(current, nullptr);
    std::ofstream(artifact, std::ios::binary)
        .write(reinterpret_cast<const char*>(input->data()),
               static_cast<std::streamsize>(input->size()));
    std::fprintf(stderr, "the input is in %s\n", artifact.c_str());
  }
}

// Nothing but the program's end comes after it, so that it may do more than a handler is allowed.
void on_signal(int number) {
  if (number == SIGALRM) {
    std::fprintf(stderr, "an input takes more than %u s\n", slow_seconds);
  }
  save_current();
  _exit(77);
}

Bytes contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << path.string() << '\n';
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Options {
  uint64_t runs = UINT64_MAX, seed = std::random_device()();
  double seconds = 1e18;
  size_t most = 4096;
  std::string prefix = "./";
  std::vector<std::filesystem::path> paths;
};

Options options_of(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (word.substr(0, 1) != "-") {
      options.paths.emplace_back(word);
    } else if (name == "-runs") {
      options.runs = std::stoull(value);
    } else if (name == "-seed") {
      options.seed = std::stoull(value);
    } else if (name == "-max_total_time") {
      options.seconds = std::stod(value);
    } else if (name == "-max_len") {
      options.most = std::stoull(value);
    } else if (name == "-artifact_prefix") {
      options.prefix = value;
    }  // Others are libFuzzer's own.
  }
  return options;
}

void run(const Bytes& input) {
  // Of the exact size, so that reading past its end is seen.
  const Bytes exact(input.begin(), input.end());
  current = &exact;
  run_one(exact.data(), exact.size());
  current = nullptr;
}

void run_mutants(const Options& options, const std::vector<Bytes>& seeds) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  Random random(options.seed);
  for (uint64_t i = 0; i < options.runs; ++i) {
    if (i % 256 == 0) {
      alarm(slow_seconds);
      if (std::chrono::duration<double>(Clock::now() - begin).count() > options.seconds) {
        return;
      }
    }
    Bytes bytes = seeds[random.below(seeds.size())];
    for (size_t changes = 1 + random.below(4); changes > 0; --changes) {
      mutate(bytes, random, seeds[random.below(seeds.size())]);
    }
    if (random.one_in(2)) {
      mend(bytes, random);
    }
    bytes.resize(std::min(bytes.size(), options.most));
    run(bytes);
  }
}

int main_loop(int count, char** arguments) {
  const Options options = options_of(count, arguments);
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(save_current);
  }
  signal(SIGABRT, on_signal);
  signal(SIGALRM, on_signal);
  std::vector<Bytes> seeds;
  bool mutants = false;
  for (const std::filesystem::path& path : options.paths) {
    if (std::filesystem::is_directory(path)) {
      mutants = true;
      artifact = options.prefix + "crash-" + std::to_string(options.seed);
      for (const auto& entry : std::filesystem::directory_iterator(path)) {
        seeds.push_back(contents(entry.path()));
      }
    } else {
      seeds.push_back(contents(path));
    }
  }
  if (seeds.empty()) {
    std::cerr << "no inputs to begin with\n";
    return 2;
  }
  std::sort(seeds.begin(), seeds.end());
  for (const Bytes& seed : seeds) {
    alarm(slow_seconds);
    run(seed);
  }
  if (mutants) {
    run_mutants(options, seeds);
  }
  print_counts();
  return 0;
}

}  // namespace
}  // namespace fuzzing

int main(int count, char** arguments) { return fuzzing::main_loop(count, arguments); }

#endif
