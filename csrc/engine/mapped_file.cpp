#include "engine/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>

#include "engine/error.h"

namespace nanogpt {

namespace {

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) {
      close(number);
    }
  }
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // Not blocking, so that a pipe without a writer is refused and not waited for.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.number < 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      throw InputError("there is no model file " + path);
    }
    throw InputError("the model file " + path + " cannot be opened: " + std::strerror(errno));
  }
  struct stat status;
  if (fstat(file.number, &status) != 0) {
    throw InputError("the model file " + path + " cannot be read: " + std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw InputError(path + " is not a file");
  }
  if (status.st_size <= 0) {
    throw InputError("the model file " + path + " is empty");
  }
  if (static_cast<uint64_t>(status.st_size) > std::numeric_limits<ptrdiff_t>::max()) {
    throw InputError("the model file " + path + " is too large for this machine");
  }
  size_ = static_cast<size_t>(status.st_size);
  void* const map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number, 0);
  if (map == MAP_FAILED) {
    throw InputError("the model file " + path + " cannot be mapped: " + std::strerror(errno));
  }
  data_ = static_cast<const uint8_t*>(map);
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), size_); }

void populate(const uint8_t* data, size_t size) {
#ifdef MADV_POPULATE_READ
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + size;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ);
#else
  static_cast<void>(data);
  static_cast<void>(size);
#endif
}

}  // namespace nanogpt
