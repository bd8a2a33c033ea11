// Long inputs are folded: the bytes are a polynomial over GF(2), and a block of it may be replaced
// by its carry-less product with x^distance mod P, added to the block that lies `distance` bits
// further on, without changing the remainder. What is left in the end, 16 bytes, and short inputs
// go through tables.
// Source: Gopal et al. 2009, Fast CRC Computation Using PCLMULQDQ (Intel); tables: Kounavis and
// Berry 2005, A Systematic Approach to Building High Performance Software-Based CRC Generators.

#include "engine/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nanogpt {

namespace {

// Bits are reflected: the highest bit of a word is the coefficient of x^0.
constexpr uint32_t polynomial = 0xEDB88320;
constexpr uint32_t one = 0x80000000;

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ (value & 1 ? polynomial : 0); }

// a * b mod P.
constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (uint32_t bit = one; bit != 0; bit >>= 1) {
    sum ^= a & bit ? b : 0;
    b = times_x(b);
  }
  return sum;
}

constexpr int slices = 16;

// tables[k][b]: the remainder of byte b followed by k zero bytes.
constexpr std::array<std::array<uint32_t, 256>, slices> make_tables() {
  std::array<std::array<uint32_t, 256>, slices> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) {
      value = times_x(value);
    }
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < slices; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t shorter = tables[k - 1][byte];
      tables[k][byte] = (shorter >> 8) ^ tables[0][shorter & 0xff];
    }
  }
  return tables;
}

constexpr auto tables = make_tables();

// From here on `state` is the register without the inversions at both ends.
uint32_t by_tables(const uint8_t* data, size_t size, uint32_t state) {
  for (; size >= slices; data += slices, size -= slices) {
    uint32_t sum = 0;
    for (size_t i = 0; i < 4; ++i) {
      sum ^= tables[slices - 1 - i][(data[i] ^ (state >> (8 * i))) & 0xff];
    }
    for (size_t i = 4; i < slices; ++i) {
      sum ^= tables[slices - 1 - i][data[i]];
    }
    state = sum;
  }
  for (; size > 0; ++data, --size) {
    state = (state >> 8) ^ tables[0][(state ^ *data) & 0xff];
  }
  return state;
}

#if defined(__x86_64__)

// x^bits mod P, placed so that the product of two reflected numbers comes out in its place.
constexpr long long constant(int bits) {
  uint32_t value = one;
  for (int i = 0; i < bits; ++i) {
    value = times_x(value);
  }
  return static_cast<long long>(static_cast<uint64_t>(value) << 1);
}

// The multipliers that carry a block of 16 bytes over `bits`: of its first and of its last half.
template <int bits>
struct Carry {
  static constexpr long long first = constant(bits + 32);
  static constexpr long long last = constant(bits - 32);
};

#define NANOGPT_CLMUL __attribute__((target("pclmul,sse4.1")))

template <int bits>
NANOGPT_CLMUL inline __m128i carried(__m128i block, __m128i next) {
  const __m128i by = _mm_set_epi64x(Carry<bits>::last, Carry<bits>::first);
  return _mm_xor_si128(
      _mm_xor_si128(_mm_clmulepi64_si128(block, by, 0x00), _mm_clmulepi64_si128(block, by, 0x11)),
      next);
}

NANOGPT_CLMUL inline __m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

NANOGPT_CLMUL uint32_t finished(__m128i block, const uint8_t* data, size_t size) {
  for (; size >= 16; data += 16, size -= 16) {
    block = carried<128>(block, load(data));
  }
  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), block);
  return by_tables(data, size, by_tables(rest, sizeof rest, 0));
}

NANOGPT_CLMUL uint32_t by_clmul(const uint8_t* data, size_t size, uint32_t state) {
  if (size < 64) {
    return by_tables(data, size, state);
  }
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = carried<512>(a, load(data));
    b = carried<512>(b, load(data + 16));
    c = carried<512>(c, load(data + 32));
    d = carried<512>(d, load(data + 48));
  }
  return finished(carried<128>(carried<128>(carried<128>(a, b), c), d), data, size);
}

#define NANOGPT_CLMUL512 __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

template <int bits>
NANOGPT_CLMUL512 inline __m512i carried(__m512i block, __m512i next) {
  const __m512i by = _mm512_set_epi64(Carry<bits>::last, Carry<bits>::first, Carry<bits>::last,
                                      Carry<bits>::first, Carry<bits>::last, Carry<bits>::first,
                                      Carry<bits>::last, Carry<bits>::first);
  constexpr int exclusive_or = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(block, by, 0x00),
                                   _mm512_clmulepi64_epi128(block, by, 0x11), next, exclusive_or);
}

NANOGPT_CLMUL512 inline __m512i load512(const uint8_t* data) { return _mm512_loadu_si512(data); }

NANOGPT_CLMUL512 uint32_t by_clmul512(const uint8_t* data, size_t size, uint32_t state) {
  if (size < 256) {
    return by_clmul(data, size, state);
  }
  const __m512i before = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state)));
  __m512i a = _mm512_xor_si512(load512(data), before);
  __m512i b = load512(data + 64), c = load512(data + 128), d = load512(data + 192);
  for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
    a = carried<2048>(a, load512(data));
    b = carried<2048>(b, load512(data + 64));
    c = carried<2048>(c, load512(data + 128));
    d = carried<2048>(d, load512(data + 192));
  }
  a = carried<512>(carried<512>(carried<512>(a, b), c), d);
  // By way of memory: the intrinsics that take a quarter out make GCC 12 warn about its own header.
  alignas(64) uint8_t quarters[64];
  _mm512_store_si512(quarters, a);
  __m128i block = load(quarters);
  for (size_t i = 16; i < sizeof quarters; i += 16) {
    block = carried<128>(block, load(quarters + i));
  }
  return finished(block, data, size);
}

#endif

Crc32Path fastest() {
  static const Crc32Path path = supported(Crc32Path::clmul512) ? Crc32Path::clmul512
                                : supported(Crc32Path::clmul)  ? Crc32Path::clmul
                                                               : Crc32Path::tables;
  return path;
}

}  // namespace

bool supported(Crc32Path path) {
#if defined(__x86_64__)
  if (path == Crc32Path::clmul) {
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  }
  if (path == Crc32Path::clmul512) {
    return supported(Crc32Path::clmul) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("vpclmulqdq");
  }
#endif
  return path == Crc32Path::tables;
}

uint32_t crc32_by(Crc32Path path, const void* data, size_t size, uint32_t before) {
  const auto* const bytes = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  if (path == Crc32Path::clmul) {
    return ~by_clmul(bytes, size, ~before);
  }
  if (path == Crc32Path::clmul512) {
    return ~by_clmul512(bytes, size, ~before);
  }
#endif
  static_cast<void>(path);
  return ~by_tables(bytes, size, ~before);
}

uint32_t crc32(const void* data, size_t size, uint32_t before) {
  return crc32_by(fastest(), data, size, before);
}

uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t second_size) {
  uint32_t square = one >> 8;  // x^8: the shift by one byte
  uint32_t shift = one;
  for (; second_size != 0; second_size >>= 1) {
    if (second_size & 1) {
      shift = product(shift, square);
    }
    square = product(square, square);
  }
  return product(first, shift) ^ second;
}

}  // namespace nanogpt
