// A reader with two mistakes, which the fuzzers have to find: for the tests of the fuzzers.

#include <string>

#include "fuzz/fuzzing.h"

namespace fuzzing {

const std::vector<std::string> pieces = {"len:", "sum:"};

bool accepts(const uint8_t* data, size_t size) {
  if (size == 0) {
    return false;
  }
  const std::string text(reinterpret_cast<const char*>(data), size);
  const size_t length = text.find("len:"), sum = text.find("sum:");
  if (data[0] == 'l' && length != std::string::npos && length + 4 < size) {
    // The number is believed: it may point behind the input.
    const size_t place = static_cast<size_t>(data[length + 4]);
    return data[place] == 0;
  }
  if (data[0] == 's' && sum != std::string::npos && sum + 5 < size) {
    must(data[sum + 4] <= data[sum + 5], "the sum is smaller than its part");
  }
  return true;
}

void mend(Bytes&, Random&) {}

}  // namespace fuzzing
