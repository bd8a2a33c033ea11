// CRC-32 as in zip and zlib, at the speed of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanogpt {

// The sum of `before`'s bytes followed by these, where `before` is their sum (0: none).
uint32_t crc32(const void* data, size_t size, uint32_t before = 0);

// The sum of two parts one after the other, of which the second has `second_size` bytes.
uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t second_size);

// How it is computed: by tables; by carry-less products of 128 bits; of 512 bits.
enum class Crc32Path { tables, clmul, clmul512 };
bool supported(Crc32Path path);
// As above by a named path, which must be supported; for tests and measurements.
uint32_t crc32_by(Crc32Path path, const void* data, size_t size, uint32_t before = 0);

}  // namespace nanogpt
