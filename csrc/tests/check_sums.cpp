// The check sums on parts of a file, for comparison with Python's.
//
//   check_sums FILE < REQUESTS     one answer a line:
//       PATH OFFSET LENGTH SPLIT       CRC-32 by tables, clmul or clmul512: of the part at once;
//                                      of its first SPLIT bytes continued by the rest; and of both
//                                      halves combined
//       sha OFFSET LENGTH SPLIT        SHA-256 in two updates: with the processor's instructions
//                                      where it has them, and without
//   check_sums --supported         the paths of CRC-32 that this machine has
//   check_sums --bench BYTES       each path's bytes a second on BYTES bytes, and SHA-256's

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

#include "engine/crc32.h"
#include "engine/sha256.h"

namespace {

struct Named {
  const char* name;
  nanogpt::Crc32Path path;
};

constexpr Named paths[] = {{"tables", nanogpt::Crc32Path::tables},
                           {"clmul", nanogpt::Crc32Path::clmul},
                           {"clmul512", nanogpt::Crc32Path::clmul512}};

template <typename Work>
double bytes_per_second(size_t bytes, const Work& work) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const size_t times = 1 + (size_t{64} << 20) / bytes;
    const auto start = Clock::now();
    for (size_t j = 0; j < times; ++j) {
      work();
    }
    const std::chrono::duration<double> seconds = Clock::now() - start;
    best = std::max(best, static_cast<double>(bytes * times) / seconds.count());
  }
  return best;
}

int measure(size_t bytes) {
  const std::vector<uint8_t> data(bytes, 0x5A);
  volatile uint32_t sink = 0;
  for (const Named& named : paths) {
    if (nanogpt::supported(named.path)) {
      std::printf("%s\t%.3g\n", named.name, bytes_per_second(bytes, [&] {
                    sink = nanogpt::crc32_by(named.path, data.data(), bytes, sink);
                  }));
    }
  }
  for (const bool portable : {true, false}) {
    std::printf("%s\t%.3g\n", portable ? "sha portable" : "sha", bytes_per_second(bytes, [&] {
                  nanogpt::Sha256 digest(portable);
                  digest.update(data.data(), bytes);
                  sink = static_cast<uint32_t>(digest.hex()[0]);
                }));
  }
  return 0;
}

int answer(const std::vector<uint8_t>& data) {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream fields(line);
    std::string kind;
    size_t offset = 0, length = 0, split = 0;
    if (!(fields >> kind >> offset >> length >> split) || offset > data.size() ||
        length > data.size() - offset || split > length) {
      std::cerr << "not a request: " << line << '\n';
      return 1;
    }
    const uint8_t* const part = data.data() + offset;
    if (kind == "sha") {
      for (const bool portable : {false, true}) {
        nanogpt::Sha256 digest(portable);
        digest.update(part, split);
        digest.update(part + split, length - split);
        std::cout << digest.hex() << (portable ? '\n' : ' ');
      }
      continue;
    }
    for (const Named& named : paths) {
      if (kind == named.name) {
        const auto sum = [&](const uint8_t* at, size_t size, uint32_t before) {
          return nanogpt::crc32_by(named.path, at, size, before);
        };
        const uint32_t first = sum(part, split, 0);
        std::printf(
            "%08x %08x %08x\n", sum(part, length, 0), sum(part + split, length - split, first),
            nanogpt::crc32_combine(first, sum(part + split, length - split, 0), length - split));
        std::fflush(stdout);
      }
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string first = count > 1 ? arguments[1] : "";
  if (first == "--supported") {
    for (const Named& named : paths) {
      if (nanogpt::supported(named.path)) {
        std::cout << named.name << '\n';
      }
    }
    return 0;
  }
  if (first == "--bench" && count == 3) {
    return measure(std::strtoull(arguments[2], nullptr, 10));
  }
  std::ifstream file(first, std::ios::binary);
  return answer({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}
