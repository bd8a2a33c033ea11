// Source of the format: PKWARE 2022, APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.

#include "engine/archive.h"

#include <algorithm>
#include <limits>

#include "engine/damage.h"
#include "engine/error.h"

namespace nanogpt {

namespace {

constexpr size_t local_bytes = 30, central_bytes = 46, end_bytes = 22;
constexpr size_t end64_bytes = 56, locator_bytes = 20;
constexpr uint32_t full32 = 0xFFFFFFFF;
constexpr uint16_t zip64_block = 1, zip64_version = 45;
constexpr uint16_t has_descriptor = 0x0008;

// A part of the file; reading outside of it is the file's mistake and not ours.
class Part {
 public:
  Part(const std::string& file, const uint8_t* data, size_t size, const char* name)
      : file_(&file), data_(data), size_(size), name_(name) {}

  size_t size() const { return size_; }

  Part part(size_t offset, size_t size, const char* name) const {
    if (offset > size_ || size > size_ - offset) {
      damaged(*file_, std::string("its ") + name + " lies outside of the file");
    }
    return Part(*file_, data_ + offset, size, name);
  }

  uint64_t number(size_t offset, size_t bytes) const {
    if (offset > size_ || bytes > size_ - offset) {
      damaged(*file_, std::string("its ") + name_ + " is cut short");
    }
    uint64_t value = 0;
    for (size_t i = bytes; i-- > 0;) {
      value = value << 8 | data_[offset + i];
    }
    return value;
  }
  uint16_t u16(size_t offset) const { return static_cast<uint16_t>(number(offset, 2)); }
  uint32_t u32(size_t offset) const { return static_cast<uint32_t>(number(offset, 4)); }
  uint64_t u64(size_t offset) const { return number(offset, 8); }

  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  bool begins_with(const char (&signature)[5]) const {
    return text().substr(0, 4) == std::string_view(signature, 4);
  }

  void expect(bool condition, const std::string& what) const {
    if (!condition) {
      damaged(*file_, std::string("its ") + name_ + " " + what);
    }
  }

 private:
  const std::string* file_;
  const uint8_t* data_;
  size_t size_;
  const char* name_;
};

// The extra field of a header is a row of blocks: number, size, bytes. Gives the one with 64-bit
// sizes, or an empty part.
Part zip64_of(const Part& extra) {
  Part found = extra.part(0, 0, "field of 64-bit sizes");
  for (size_t at = 0; at < extra.size();) {
    const uint16_t number = extra.u16(at);
    const Part block = extra.part(at + 4, extra.u16(at + 2), "field of 64-bit sizes");
    if (number == zip64_block) {
      extra.expect(found.size() == 0 && block.size() > 0,
                   "has two fields of 64-bit sizes or an empty one");
      found = block;
    }
    at += 4 + block.size();
  }
  return found;
}

struct End {
  size_t record = 0;           // where the end record begins
  size_t comment_bytes = 0;    // after it
  size_t directory = 0;        // where the central directory begins
  size_t directory_bytes = 0;  // of the central directory
  size_t entries = 0;
};

// A field of the end record is the number itself or, where a 64-bit record has it, all ones.
template <typename Field>
bool agrees(Field field, uint64_t value, bool has_end64) {
  return field == value || (has_end64 && field == std::numeric_limits<Field>::max());
}

End find_end(const std::string& file, const Part& whole) {
  End end;
  bool found = false;
  for (const size_t comment : {archive_comment_bytes, size_t{0}}) {
    if (!found && whole.size() >= end_bytes + comment) {
      end.record = whole.size() - end_bytes - comment;
      const Part record = whole.part(end.record, end_bytes, "end record");
      found = record.begins_with("PK\5\6") && record.u16(20) == comment;
      end.comment_bytes = comment;
    }
  }
  if (!found) {
    damaged(file, "it does not end as an archive does, so it may be cut short");
  }
  const Part record = whole.part(end.record, end_bytes, "end record");
  record.expect(record.u16(4) == 0 && record.u16(6) == 0, "speaks of several disks");

  size_t directory_end = end.record;
  uint64_t entries = record.u16(10), bytes = record.u32(12), offset = record.u32(16);
  constexpr size_t both = end64_bytes + locator_bytes;
  const bool has_end64 = end.record >= both &&
                         whole.part(end.record - locator_bytes, 4, "locator").begins_with("PK\6\7");
  if (has_end64) {
    directory_end = end.record - both;
    const Part locator = whole.part(end.record - locator_bytes, locator_bytes, "locator");
    const Part end64 = whole.part(directory_end, end64_bytes, "64-bit end record");
    locator.expect(locator.u32(4) == 0 && locator.u32(16) == 1, "speaks of several disks");
    locator.expect(locator.u64(8) == directory_end, "points to a wrong place");
    end64.expect(end64.begins_with("PK\6\6") && end64.u64(4) == end64_bytes - 12,
                 "is not where it has to be");
    end64.expect(end64.u32(16) == 0 && end64.u32(20) == 0, "speaks of several disks");
    end64.expect(end64.u64(24) == end64.u64(32), "has two numbers of entries");
    entries = end64.u64(32), bytes = end64.u64(40), offset = end64.u64(48);
  }
  record.expect(
      agrees(record.u16(8), entries, has_end64) && agrees(record.u16(10), entries, has_end64) &&
          agrees(record.u32(12), bytes, has_end64) && agrees(record.u32(16), offset, has_end64),
      "does not agree with the 64-bit one");
  record.expect(bytes <= directory_end && offset == directory_end - bytes,
                "puts the central directory in a wrong place");
  record.expect(entries <= bytes / central_bytes, "counts more entries than there can be");
  end.directory = static_cast<size_t>(offset);
  end.directory_bytes = static_cast<size_t>(bytes);
  end.entries = static_cast<size_t>(entries);
  return end;
}

// One entry as the central directory has it.
struct Central {
  uint16_t version, flags, method, name_bytes, extra_bytes;
  uint32_t time, crc;
  uint64_t packed, size, offset;
  bool zip64;
  std::string_view name;
};

Central read_central(const Part& directory, size_t at) {
  const Part fixed = directory.part(at, central_bytes, "central directory");
  fixed.expect(fixed.begins_with("PK\1\2"), "holds something else than entries");
  Central entry{};
  entry.version = fixed.u16(6);
  entry.flags = fixed.u16(8);
  entry.method = fixed.u16(10);
  entry.time = fixed.u32(12);
  entry.crc = fixed.u32(16);
  entry.packed = fixed.u32(20);
  entry.size = fixed.u32(24);
  entry.name_bytes = fixed.u16(28);
  entry.extra_bytes = fixed.u16(30);
  entry.offset = fixed.u32(42);
  fixed.expect(fixed.u16(32) == 0, "has a comment on an entry");
  fixed.expect(fixed.u16(34) == 0, "speaks of several disks");
  entry.name = directory.part(at + central_bytes, entry.name_bytes, "central directory").text();
  const Part zip64 = zip64_of(directory.part(at + central_bytes + entry.name_bytes,
                                             entry.extra_bytes, "central directory"));
  size_t taken = 0;
  for (uint64_t* field : {&entry.size, &entry.packed, &entry.offset}) {
    if (*field == full32) {
      *field = zip64.u64(taken);
      taken += 8;
    }
  }
  zip64.expect(zip64.size() == taken, "has a wrong length");
  entry.zip64 = taken > 0;
  return entry;
}

}  // namespace

Archive::Archive(const std::string& file, const uint8_t* data, size_t size) {
  const Part whole(file, data, size, "archive");
  const End end = find_end(file, whole);
  end_record_ = end.record;
  comment_ = whole.part(end.record + end_bytes, end.comment_bytes, "comment").text();

  const Part directory = whole.part(end.directory, end.directory_bytes, "central directory");
  entries_.reserve(end.entries);
  by_name_.reserve(end.entries);
  std::string_view top;
  size_t at = 0, next = 0;
  for (size_t i = 0; i < end.entries; ++i) {
    const Central entry = read_central(directory, at);
    at += central_bytes + entry.name_bytes + entry.extra_bytes;
    const std::string called = "record " + shown(entry.name);
    const auto expect = [&](bool condition, const char* what) {
      if (!condition) {
        damaged(file, "its " + called + " " + what);
      }
    };
    if (i == 0) {
      top = entry.name.substr(0, entry.name.find('/'));
    }
    expect(!top.empty() && entry.name.size() > top.size() + 1 &&
               entry.name.substr(0, top.size()) == top && entry.name[top.size()] == '/',
           "lies outside of the archive's folder");
    // UTF-8 names, sizes after the payload, and what deflate says about its effort.
    expect((entry.flags & ~0x080E) == 0, "has flags that torch does not set");
    expect(entry.method == 0 || entry.method == 8, "is packed in an unknown way");
    expect(entry.method != 0 || entry.packed == entry.size, "has two sizes");
    expect(entry.offset == next, "overlaps another or leaves a gap");

    const Part local = whole.part(next, local_bytes, "local header");
    expect(local.begins_with("PK\3\4"), "has no header of its own");
    const size_t extra_bytes = local.u16(28);
    const Part zip64 = zip64_of(
        whole.part(next + local_bytes, size_t{entry.name_bytes} + extra_bytes, "local header")
            .part(entry.name_bytes, extra_bytes, "local header"));
    // Only the directory holds the offset, so that it alone can need the version that has 64 bits.
    const bool newer = entry.zip64 && zip64.size() == 0 && entry.version == zip64_version;
    expect((local.u16(4) == entry.version || newer) && local.u16(6) == entry.flags &&
               local.u16(8) == entry.method && local.u32(10) == entry.time &&
               local.u16(26) == entry.name_bytes,
           "has a header that does not agree with the directory");
    const std::string_view name =
        whole.part(next + local_bytes, entry.name_bytes, "local header").text();
    expect(name == entry.name, "has another name in its own header");
    const bool later = (entry.flags & has_descriptor) != 0;
    const bool empty_sums = local.u32(14) == 0 && local.u32(18) == 0 && local.u32(22) == 0;
    if (!later || !empty_sums) {
      const auto same = [&](size_t field, uint64_t value) {
        return local.u32(field) == value || (zip64.size() > 0 && local.u32(field) == full32);
      };
      expect(local.u32(14) == entry.crc && same(18, entry.packed) && same(22, entry.size),
             "has other sizes in its own header");
    }
    if (zip64.size() > 0 && !later) {
      expect(zip64.size() >= 16 && zip64.u64(0) == entry.size && zip64.u64(8) == entry.packed,
             "has other sizes in its own header");
    }

    const size_t payload = next + local_bytes + entry.name_bytes + extra_bytes;
    expect(payload <= end.directory && entry.packed <= end.directory - payload,
           "reaches into the central directory");
    next = payload + static_cast<size_t>(entry.packed);
    if (later) {
      const size_t width = entry.zip64 || zip64.size() > 0 ? 8 : 4;
      const Part after = whole.part(next, 8 + 2 * width, "data descriptor");
      expect(after.begins_with("PK\7\x08") && after.u32(4) == entry.crc &&
                 after.number(8, width) == entry.packed &&
                 after.number(8 + width, width) == entry.size,
             "has other sizes after it than in the directory");
      next += after.size();
    }

    ArchiveEntry found;
    found.name = entry.name.substr(top.size() + 1);
    found.stored = entry.method == 0;
    found.offset = payload;
    found.size = static_cast<size_t>(entry.packed);
    expect(by_name_.emplace(found.name, entries_.size()).second, "is there twice");
    entries_.push_back(found);
  }
  directory.expect(at == directory.size(), "is longer than its entries");
  directory.expect(next == end.directory, "does not follow the last record");
}

const ArchiveEntry* Archive::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

}  // namespace nanogpt
