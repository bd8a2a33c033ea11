// A file's bytes, mapped into memory read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace nanogpt {

// The map shows the file itself: a program that shortens the file while it is open breaks the
// readers of the map. Model files are only ever replaced whole, which leaves an open map alone.
class MappedFile {
 public:
  // Throws InputError where the file is missing, not a regular file, empty or unreadable.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Enters the pages of a part of a map at once, from the page cache or the disk, instead of one
// fault after another. Only a hint: it does nothing where the system cannot.
void populate(const uint8_t* data, size_t size);

}  // namespace nanogpt
