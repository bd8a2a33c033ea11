// The zip archives of model files: structure alone, so that inputs are small.

#include <cstring>
#include <set>
#include <string>
#include <string_view>

#include "engine/archive.h"
#include "engine/error.h"
#include "fuzz/fuzzing.h"

namespace fuzzing {

const std::vector<std::string> pieces = {
    std::string("PK\3\4", 4),
    std::string("PK\1\2", 4),
    std::string("PK\5\6", 4),
    std::string("PK\6\6", 4),
    std::string("PK\6\7", 4),
    std::string("PK\7\x08", 4),
    std::string("\1\0\x10\0", 4),
    std::string("\1\0\x18\0", 4),
    std::string("\xff\xff\xff\xff", 4),
    std::string("\0\0\0\0\0\0\0\0", 8),
    "a/",
    "a/b",
    "../",
    "nanogpt-crc32:",
};

bool accepts(const uint8_t* data, size_t size) {
  try {
    const nanogpt::Archive archive("input", data, size);
    must(archive.end_record() + 22 + archive.comment().size() == size, "the end is not the end");
    std::set<std::string_view> names;
    size_t next = 0;
    for (const nanogpt::ArchiveEntry& entry : archive.entries()) {
      must(entry.offset >= next + 30, "a record begins before its header has ended");
      must(entry.offset <= archive.end_record(), "a record begins after the end");
      must(entry.size <= archive.end_record() - entry.offset, "a record reaches past the end");
      must(!entry.name.empty(), "a record has no name");
      must(names.insert(entry.name).second, "two records have one name");
      must(archive.find(entry.name) == &entry, "a record is not found by its name");
      next = entry.offset + entry.size;
    }
    must(archive.find("") == nullptr, "there is a record without a name");
    return true;
  } catch (const nanogpt::InputError& error) {
    must(std::string_view(error.what()).substr(0, 17) == "input is damaged:",
         "a refusal does not say what is damaged");
    return false;
  }
}

namespace {

std::vector<size_t> places(const Bytes& bytes, const char* signature) {
  std::vector<size_t> found;
  for (size_t at = 0; at + 4 <= bytes.size(); ++at) {
    if (std::memcmp(&bytes[at], signature, 4) == 0) {
      found.push_back(at);
    }
  }
  return found;
}

}  // namespace

// Numbers that have to agree in several places agree again: most mutants would fail at the first.
void mend(Bytes& bytes, Random& random) {
  const std::vector<size_t> locals = places(bytes, "PK\3\4"), centrals = places(bytes, "PK\1\2");
  const std::vector<size_t> ends = places(bytes, "PK\5\6"), ends64 = places(bytes, "PK\6\6");
  for (size_t i = 0; i < centrals.size() && i < locals.size(); ++i) {
    const size_t local = locals[i], central = centrals[i];
    if (!random.one_in(8)) {  // version, flags, method, time and sum
      for (size_t field = 0; field < 14; ++field) {
        put(bytes, central + 6 + field, 1, number_at(bytes, local + 4 + field, 1));
      }
    }
    if (!random.one_in(8)) {
      const size_t payload =
          local + 30 + number_at(bytes, local + 26, 2) + number_at(bytes, local + 28, 2);
      const size_t end = i + 1 < locals.size() ? locals[i + 1] : centrals.front();
      const bool wide = number_at(bytes, local + 18, 4) == 0xFFFFFFFF;
      if (payload <= end && !wide) {
        for (const size_t at : {local + 18, local + 22, central + 20, central + 24}) {
          put(bytes, at, 4, end - payload);
        }
      }
    }
    put(bytes, central + 42, 4, local);
  }
  if (!ends.empty() && !centrals.empty() && !random.one_in(8)) {
    const size_t end = ends.back();
    size_t stop = end;
    if (!ends64.empty()) {
      stop = ends64.back();
      put(bytes, stop + 24, 8, centrals.size());
      put(bytes, stop + 32, 8, centrals.size());
      put(bytes, stop + 40, 8, stop - centrals.front());
      put(bytes, stop + 48, 8, centrals.front());
      put(bytes, stop + 56 + 8, 8, stop);
    }
    put(bytes, end + 8, 2, centrals.size());
    put(bytes, end + 10, 2, centrals.size());
    put(bytes, end + 12, 4, stop - centrals.front());
    put(bytes, end + 16, 4, centrals.front());
  }
}

}  // namespace fuzzing
