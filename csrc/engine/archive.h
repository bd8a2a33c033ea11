// The zip archives that torch writes, read strictly: structure only, no decompression.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace nanogpt {

struct ArchiveEntry {
  std::string_view name;  // without the top folder
  bool stored = false;    // not compressed
  size_t offset = 0;      // of the payload in the file
  size_t size = 0;        // bytes of the payload
};

// What every byte of the file belongs to is known and checked: entries follow one another from the
// first byte to the central directory without a gap, local headers and directory agree, and the
// directory, zip64 record, locator and end record stand where each says that the other is. A file
// that is read here in one way cannot be read by another program in another way.
class Archive {
 public:
  // `file` names it in sentences; the bytes are the caller's. Throws InputError.
  Archive(const std::string& file, const uint8_t* data, size_t size);

  // Null where there is none of that name.
  const ArchiveEntry* find(std::string_view name) const;
  const std::vector<ArchiveEntry>& entries() const { return entries_; }
  // Where the end record begins.
  size_t end_record() const { return end_record_; }
  // The comment that ends the file, empty where there is none.
  std::string_view comment() const { return comment_; }

 private:
  std::vector<ArchiveEntry> entries_;
  std::unordered_map<std::string_view, size_t> by_name_;
  size_t end_record_ = 0;
  std::string_view comment_;
};

// Bytes of the comment that archives of nanogpt end with; others must have none.
constexpr size_t archive_comment_bytes = 22;

}  // namespace nanogpt
