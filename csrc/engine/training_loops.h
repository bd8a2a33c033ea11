// The loops behind training_kernels.h, written once over a vector type `Isa` and an element type.
// Included after kernels_loops.h, under the same rules.
#include "engine/training_kernels.h"

namespace nanogpt {
namespace {

constexpr int kTileRows = Isa::registers >= 32 ? 14 : 6;
constexpr int kTileCols = 2 * W;
constexpr int kBlockTiles = 16;  // tiles of rows that share a panel while it is near
constexpr int64_t kDepthBlock = Isa::registers >= 32 ? 512 : 768;  // of a transposed left operand
constexpr int64_t kUnit = 4;                                       // bytes
constexpr int64_t kLine = 64;  // bytes that memory hands over together
constexpr int64_t kLineUnits = kLine / kUnit;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline F load_some(const float* p, int64_t n) {
  float lanes[W] = {};
  if (n > 0) memcpy(lanes, p, static_cast<size_t>(n) * 4);
  return Isa::load(lanes);
}

inline void store_some(float* p, int64_t n, F x) {
  float lanes[W];
  Isa::store(lanes, x);
  memcpy(p, lanes, static_cast<size_t>(n) * 4);
}

// float32: a unit is an element.
struct Floats {
  using T = float;
  using V = F;
  static constexpr int per = 1;
  static V units(const char* p) { return Isa::load(reinterpret_cast<const float*>(p)); }
  static void put_units(char* p, V x) { Isa::store(reinterpret_cast<float*>(p), x); }
  static V spread(const char* p) {
    float one;
    memcpy(&one, p, 4);
    return Isa::set(one);
  }
  static F dot(F sum, V a, V b) { return Isa::fma(a, b, sum); }
  static F get(const T* p) { return Isa::load(p); }
  static void put(T* p, F x) { Isa::store(p, x); }
  static T element(float x) { return x; }
  static float wide(T x) { return x; }
  // W units along a row, of which n elements exist.
  template <bool kFloats>
  static V along(const char* p, int64_t n) {
    const float* at = reinterpret_cast<const float*>(p);
    return n >= W ? Isa::load(at) : load_some(at, n);
  }
  // W units of neighbouring columns, n of which exist; `odd` is no row of this element type.
  template <bool kFloats>
  static V across(const char* even, const char* /* odd */, int64_t n) {
    return along<kFloats>(even, n);
  }
};

#if defined(NANOGPT_BF16_DOT)
// bfloat16: a unit is two of them.
struct Halves {
  using T = uint16_t;
  using V = I;
  static constexpr int per = 2;
  static V units(const char* p) { return _mm512_loadu_si512(p); }
  static void put_units(char* p, V x) { _mm512_storeu_si512(p, x); }
  static V spread(const char* p) {
    int32_t both;
    memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  static F dot(F sum, V a, V b) { return Isa::dot_bf16(sum, a, b); }
  static __m256i bits(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
  static F get(const T* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void put(T* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits(x)); }
  static T element(float x) { return to_bf16(x); }
  static float wide(T x) { return from_bf16(x); }
  template <bool kFloats>
  static V along(const char* p, int64_t n) {
    if constexpr (kFloats) {
      const float* at = reinterpret_cast<const float*>(p);
      const F low = n >= W ? Isa::load(at) : load_some(at, n);
      const F high = n >= 2 * W ? Isa::load(at + W) : load_some(at + W, n - W);
      return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(high, low));
    } else {
      if (n >= 2 * W) return units(p);
      T lanes[2 * W] = {};
      if (n > 0) memcpy(lanes, p, static_cast<size_t>(n) * 2);
      return units(reinterpret_cast<const char*>(lanes));
    }
  }
  template <bool kFloats>
  static __m256i half_row(const char* p, int64_t n) {
    if (p == nullptr) return _mm256_setzero_si256();
    if constexpr (kFloats) {
      const float* at = reinterpret_cast<const float*>(p);
      return bits(n >= W ? Isa::load(at) : load_some(at, n));
    } else {
      if (n >= W) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      T lanes[W] = {};
      if (n > 0) memcpy(lanes, p, static_cast<size_t>(n) * 2);
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    }
  }
  template <bool kFloats>
  static V across(const char* even, const char* odd, int64_t n) {
    const V low = _mm512_cvtepu16_epi32(half_row<kFloats>(even, n));
    const V high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half_row<kFloats>(odd, n)), 16);
    return _mm512_or_si512(low, high);
  }
};
#endif

// ---- packing ----

// W rows of W units become W rows of the other order.
template <class U>
inline void turn(typename U::V (&rows)[W]) {
#if defined(__AVX512F__)
  using V = typename U::V;
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = reinterpret_cast<__m512i>(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = reinterpret_cast<V>(_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    rows[i + 8] = reinterpret_cast<V>(_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#else
  int32_t in[W][W], out[W][W];
  for (int i = 0; i < W; ++i) U::put_units(reinterpret_cast<char*>(in[i]), rows[i]);
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) out[i][j] = in[j][i];
  }
  for (int i = 0; i < W; ++i) rows[i] = U::units(reinterpret_cast<const char*>(out[i]));
#endif
}

template <class U>
constexpr int64_t units_of(int64_t depth) {
  return (depth + U::per - 1) / U::per;
}

template <class U>
constexpr int64_t panel_bytes(int64_t depth) {
  return units_of<U>(depth) * kTileCols * kUnit;
}

template <class U>
int64_t packed_bytes(int64_t depth, int64_t cols) {
  return (cols + kTileCols - 1) / kTileCols * panel_bytes<U>(depth);
}

constexpr int64_t kPackUnits = 32;  // that are read of every panel before more rows are

template <class U, bool kFloats>
void pack_rows(const Operand& from, int64_t first, int64_t last, char* to) {
  constexpr int64_t width = kFloats ? 4 : static_cast<int64_t>(sizeof(typename U::T));
  const char* data = static_cast<const char*>(from.data);
  const int64_t units = units_of<U>(from.depth), row_bytes = from.ld * width;
  for (int64_t start = 0; start < units; start += kPackUnits) {
    const int64_t end = least(units, start + kPackUnits);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t col = panel * kTileCols;
      char* out = to + (panel * units + start) * kTileCols * kUnit;
      for (int64_t u = start; u < end; ++u, out += kTileCols * kUnit) {
        const char* row = data + U::per * u * row_bytes;
        const char* odd = U::per * u + 1 < from.depth ? row + row_bytes : nullptr;
        for (int64_t half = 0; half < kTileCols; half += W) {
          const int64_t at = (col + half) * width;
          U::put_units(out + half * kUnit,
                       U::template across<kFloats>(row + at, odd != nullptr ? odd + at : nullptr,
                                                   from.cols - col - half));
        }
      }
    }
  }
}

template <class U, bool kFloats>
void pack_columns(const Operand& from, int64_t first, int64_t last, char* to) {
  constexpr int64_t width = kFloats ? 4 : static_cast<int64_t>(sizeof(typename U::T));
  const char* data = static_cast<const char*>(from.data);
  const int64_t units = units_of<U>(from.depth), row_bytes = from.ld * width;
  for (int64_t panel = first; panel < last; ++panel) {
    char* out = to + panel * units * kTileCols * kUnit;
    for (int half = 0; half < 2; ++half, out += W * kUnit) {
      const int64_t col = panel * kTileCols + half * W;
      const int64_t cols = from.cols - col;
      for (int64_t u = 0; u < units; u += W) {
        typename U::V rows[W];
        const int64_t left = from.depth - u * U::per;
        for (int i = 0; i < W; ++i) {
          rows[i] = i < cols ? U::template along<kFloats>(
                                   data + (col + i) * row_bytes + u * U::per * width, left)
                             : U::template along<kFloats>(data, 0);
        }
        turn<U>(rows);
        const int64_t count = least(W, units - u);
        for (int64_t i = 0; i < count; ++i)
          U::put_units(out + (u + i) * kTileCols * kUnit, rows[i]);
      }
    }
  }
}

template <class U, bool kFloats>
void pack_panels(const Operand& from, int64_t first, int64_t last, char* to) {
  if (from.by_column) {
    pack_columns<U, kFloats>(from, first, last, to);
  } else {
    pack_rows<U, kFloats>(from, first, last, to);
  }
}

template <class U>
void pack(const Operand& from, int64_t first, int64_t last, void* to) {
  if (from.floats) {
    pack_panels<U, true>(from, first, last, static_cast<char*>(to));
  } else {
    pack_panels<U, false>(from, first, last, static_cast<char*>(to));
  }
}

constexpr int kLeftVectors = (kTileRows + W - 1) / W;

// Bytes from one packed tile of a left matrix to the next: a line more than it needs, for the lanes
// beyond its last unit, and so that tiles do not all begin in the same set of the nearest cache.
constexpr int64_t left_tile_bytes(int64_t units) {
  return round_up(units * kTileRows * kUnit, kLine) + kLine;
}

constexpr int64_t product_scratch() {
  return kBlockTiles * left_tile_bytes(kDepthBlock) + W * kUnit;
}

// How deep one panel may be that is packed there instead.
constexpr int64_t packed_depth() { return product_scratch() / (kTileCols * kUnit); }

// Tiles of kTileRows rows of a matrix that lies as (depth, rows), read as it lies: a page of it
// after another. A unit's lanes beyond the tile are overwritten by the next one's.
template <class U>
inline void pack_left(const Product& p, int64_t depth_start, int64_t units, int64_t first_row,
                      int64_t last_row, char* to) {
  constexpr int64_t width = sizeof(typename U::T);
  const int64_t row_bytes = p.a_ld * width, tile_bytes = left_tile_bytes(units);
  const char* line = static_cast<const char*>(p.a) + depth_start * row_bytes;
  for (int64_t u = 0; u < units; ++u, line += U::per * row_bytes, to += kTileRows * kUnit) {
    const bool odd = depth_start + U::per * u + 1 < p.depth;
    char* out = to;
    for (int64_t row = first_row; row < last_row; row += kTileRows, out += tile_bytes) {
      for (int v = 0; v < kLeftVectors; ++v) {
        const char* at = line + (row + v * W) * width;
        U::put_units(
            out + v * W * kUnit,
            U::template across<false>(at, odd ? at + row_bytes : nullptr, p.rows - row - v * W));
      }
    }
  }
}

// ---- products ----

inline F gelu_slope(F x) {
  // With s = 1 / (1 + exp(-2u)): gelu = x s and gelu' = s + x s (1 - s) 2 u'.
  const F square = Isa::mul(x, x);
  const F u = Isa::mul(x, Isa::fma(square, Isa::set(0.7978845608028654f * 0.044715f),
                                   Isa::set(0.7978845608028654f)));
  const F slope = Isa::fma(square, Isa::set(2.0f * 3.0f * 0.7978845608028654f * 0.044715f),
                           Isa::set(2.0f * 0.7978845608028654f));
  const F one = Isa::set(1.0f);
  const F s = Isa::div(one, Isa::add(one, exp_of(Isa::mul(u, Isa::set(-2.0f)))));
  return Isa::fma(Isa::mul(Isa::mul(x, s), Isa::sub(one, s)), slope, s);
}

template <class U>
inline F get_some(const typename U::T* p, int64_t n) {
  float lanes[W] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = U::wide(p[i]);
  return Isa::load(lanes);
}

template <class U>
inline void put_some(typename U::T* p, int64_t n, F x) {
  float lanes[W];
  Isa::store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = U::element(lanes[i]);
}

// Rows of one or two vectors, of which `cols` columns exist, go where the product wants them.
template <class U, bool kFull>
inline void finish_rows(const Product& product, Finish how, const float* bias, int64_t row,
                        int64_t col, int64_t cols, const F* sums, int rows) {
  using T = typename U::T;
  // Copies: the compiler cannot know that what is stored is none of the product's numbers.
  const int64_t ld = product.ld, start = row * ld + col;
  void* const out = product.out;
  void* const other = product.other;
  const auto each = [=](auto f) {
    for (int v = 0; v < 2; ++v) {
      const int64_t n = kFull ? W : least(W, cols - v * W);
      if (n <= 0) return;
      const F shift = bias != nullptr ? (kFull ? Isa::load(bias + col + v * W)
                                               : load_some(bias + col + v * W, n))
                                      : Isa::zero();
      int64_t at = start + v * W;
      for (int r = 0; r < rows; ++r, at += ld) f(at, n, Isa::add(sums[2 * r + v], shift));
    }
  };
  const auto load = [](const float* from, int64_t n) {
    return kFull ? Isa::load(from) : load_some(from, n);
  };
  const auto store = [](float* to, int64_t n, F x) {
    if constexpr (kFull) {
      Isa::store(to, x);
    } else {
      store_some(to, n, x);
    }
  };
  const auto get = [](const T* from, int64_t n) {
    return kFull ? U::get(from) : get_some<U>(from, n);
  };
  const auto put = [](T* to, int64_t n, F x) {
    if constexpr (kFull) {
      U::put(to, x);
    } else {
      put_some<U>(to, n, x);
    }
  };
  T* const elements = static_cast<T*>(out);
  T* const others = static_cast<T*>(other);
  float* const floats = static_cast<float*>(out);
  const float* const added = static_cast<const float*>(how == Finish::add ? out : other);
  switch (how) {
    case Finish::store:
      each([=](int64_t at, int64_t n, F x) { put(elements + at, n, x); });
      break;
    case Finish::gelu:
      each([=](int64_t at, int64_t n, F x) {
        put(others + at, n, x);
        put(elements + at, n, gelu_of(x));
      });
      break;
    case Finish::gelu_grad:
      each([=](int64_t at, int64_t n, F x) {
        put(elements + at, n, Isa::mul(x, gelu_slope(get(others + at, n))));
      });
      break;
    case Finish::residual:
    case Finish::add:
      each([=](int64_t at, int64_t n, F x) {
        store(floats + at, n, Isa::add(load(added + at, n), x));
      });
      break;
    case Finish::wide:
      each([=](int64_t at, int64_t n, F x) { store(floats + at, n, x); });
      break;
  }
}

// One copy for all heights of tiles: a product's own loop stays small.
template <class U>
__attribute__((noinline)) void finish_tile(const Product& p, Finish how, const float* bias,
                                           int64_t row, int64_t col, const F* sums, int rows) {
  const int64_t cols = p.cols - col;
  if (cols >= kTileCols) {
    finish_rows<U, true>(p, how, bias, row, col, kTileCols, sums, rows);
  } else {
    finish_rows<U, false>(p, how, bias, row, col, cols, sums, rows);
  }
}

// MR rows times one panel. Rows of A lie `stride` bytes apart, or packed unit by unit; `next` is
// what will be read after them, or null.
template <class U, int MR, bool kPacked>
inline void multiply_tile(const Product& p, Finish how, const float* bias, const char* a,
                          int64_t stride, const char* b, int64_t units, int64_t row, int64_t col,
                          const char* next) {
  F sums[MR][2];
  NANOGPT_UNROLL
  for (int r = 0; r < MR; ++r) sums[r][0] = sums[r][1] = Isa::zero();
  // Five pointers reach every row: x86 adds one, two, four or eight strides in the address.
  const char* rows[5] = {a, a + 3 * stride, a + 6 * stride, a + 9 * stride, a + 12 * stride};
  for (int64_t start = 0; start < units; start += kLineUnits) {
    const int64_t end = least(units, start + kLineUnits);
    if (!kPacked && next != nullptr && stride % 4096 != 0) {
      const char* at = next + start * kUnit;
      NANOGPT_UNROLL
      for (int r = 0; r < MR; ++r, at += stride) fetch(at);
    }
    for (int64_t u = start; u < end; ++u) {
      const typename U::V b0 = U::units(b), b1 = U::units(b + W * kUnit);
      b += kTileCols * kUnit;
      NANOGPT_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename U::V x =
            U::spread(kPacked ? a + r * kUnit : rows[r / 3] + (r % 3) * stride + u * kUnit);
        sums[r][0] = U::dot(sums[r][0], x, b0);
        sums[r][1] = U::dot(sums[r][1], x, b1);
      }
      if (kPacked) a += kTileRows * kUnit;
    }
  }
  F kept[2 * MR];
  NANOGPT_UNROLL
  for (int r = 0; r < MR; ++r) {
    kept[2 * r] = sums[r][0];
    kept[2 * r + 1] = sums[r][1];
  }
  finish_tile<U>(p, how, bias, row, col, kept, MR);
}

// Where a tile's results go, and what is added to them, is fetched while it is computed.
template <class U>
inline void fetch_results(const Product& p, Finish how, int64_t row, int64_t col, int rows) {
  const bool floats = how == Finish::residual || how == Finish::wide || how == Finish::add;
  const int64_t width = floats ? 4 : static_cast<int64_t>(sizeof(typename U::T));
  const int64_t step = p.ld * width;
  const char* out = static_cast<const char*>(p.out) + row * step + col * width;
  const char* other =
      p.other != nullptr && how != Finish::add
          ? static_cast<const char*>(p.other) + (out - static_cast<const char*>(p.out))
          : nullptr;
  for (int r = 0; r < rows; ++r, out += step) {
    for (int64_t at = 0; at < kTileCols * width; at += kLine) __builtin_prefetch(out + at, 1, 3);
    if (other == nullptr) continue;
    for (int64_t at = 0; at < kTileCols * width; at += kLine) fetch(other + at);
    other += step;
  }
}

template <class U, bool kPacked>
inline void multiply_rows(const Product& p, Finish how, const float* bias, const char* a,
                          int64_t stride, const char* b, int64_t units, int64_t row,
                          int64_t last_row, int64_t col) {
  // Where A is packed a tile begins with each kTileRows rows, and its rows are a unit apart.
  const int64_t step = kPacked ? kUnit : stride;
  const int64_t tile = kPacked ? left_tile_bytes(units) : kTileRows * stride;
  for (; row + kTileRows <= last_row; row += kTileRows, a += tile) {
    fetch_results<U>(p, how, row, col, kTileRows);
    const char* next = row + 2 * kTileRows <= last_row ? a + tile : nullptr;
    multiply_tile<U, kTileRows, kPacked>(p, how, bias, a, step, b, units, row, col, next);
  }
  const auto some = [&](auto count) {
    constexpr int MR = decltype(count)::value;
    if constexpr (MR < kTileRows) {
      if (last_row - row >= MR) {
        multiply_tile<U, MR, kPacked>(p, how, bias, a, step, b, units, row, col, nullptr);
        row += MR;
        a += MR * step;
      }
    }
  };
  some(Count<8>());
  some(Count<4>());
  some(Count<2>());
  some(Count<1>());
}

// What is left of an operand from a panel on.
template <class U>
inline Operand from_panel(const Operand& all, int64_t panel) {
  Operand rest = all;
  const int64_t col = panel * kTileCols, width = all.floats ? 4 : sizeof(typename U::T);
  rest.data = static_cast<const char*>(all.data) + col * width * (all.by_column ? all.ld : 1);
  rest.cols -= col;
  return rest;
}

// Of a product whose right operand lies packed from panel `origin` on at `b`.
template <class U, bool kTransposed>
inline void multiply_blocks(const Product& p, const char* b, int64_t origin, int64_t first_row,
                            int64_t last_row, int64_t first, int64_t last, char* packed) {
  constexpr int64_t width = sizeof(typename U::T);
  const int64_t step = kTransposed ? kDepthBlock : round_up(p.depth, U::per);
  const int64_t panel = panel_bytes<U>(p.b_depth), stride = p.a_ld * width;
  for (int64_t start = 0; start < p.depth; start += step) {
    const int64_t units = units_of<U>(least(step, p.depth - start));
    const Finish how = start > 0 ? Finish::add : p.finish;
    const float* bias = start > 0 ? nullptr : p.bias;
    for (int64_t row = first_row; row < last_row; row += kBlockTiles * kTileRows) {
      const int64_t end = least(last_row, row + kBlockTiles * kTileRows);
      if (kTransposed) pack_left<U>(p, start, units, row, end, packed);
      const char* rows = kTransposed ? packed : static_cast<const char*>(p.a) + row * stride;
      for (int64_t c = first; c < last; ++c) {
        const char* at = b + (c - origin) * panel + start / U::per * kTileCols * kUnit;
        multiply_rows<U, kTransposed>(p, how, bias, rows, stride, at, units, row, end,
                                      c * kTileCols);
      }
    }
  }
}

template <class U>
void multiply(const Product& p, int64_t first_row, int64_t last_row, int64_t first, int64_t last,
              void* scratch) {
  char* memory = static_cast<char*>(scratch);
  const char* b = static_cast<const char*>(p.b);
  if (p.a_transposed) {
    multiply_blocks<U, true>(p, b, 0, first_row, last_row, first, last, memory);
  } else if (b != nullptr) {
    multiply_blocks<U, false>(p, b, 0, first_row, last_row, first, last, memory);
  } else {
    // As many panels as are near at once, for all rows.
    const int64_t group = product_scratch() / panel_bytes<U>(p.depth);
    for (int64_t c = first; c < last; c += group) {
      const int64_t end = least(last, c + group);
      pack<U>(from_panel<U>(p.right, c), 0, end - c, memory);
      multiply_blocks<U, false>(p, memory, c, first_row, last_row, c, end, nullptr);
    }
  }
}

// Up to W rows of floats become columns, W by W where there are so many.
inline void transpose_rows(const float* x, int64_t ld, int64_t rows, int64_t cols, float* out,
                           int64_t out_ld) {
  int64_t c = 0;
  for (; rows == W && c + W <= cols; c += W) {
    F tile[W];
    for (int i = 0; i < W; ++i) tile[i] = Isa::load(x + i * ld + c);
    turn<Floats>(tile);
    for (int i = 0; i < W; ++i) Isa::store(out + (c + i) * out_ld, tile[i]);
  }
  for (; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * out_ld + r] = x[r * ld + c];
  }
}

void transpose(const float* x, int64_t rows, int64_t cols, float* out) {
  for (int64_t r = 0; r < rows; r += W) {
    transpose_rows(x + r * cols, cols, least(W, rows - r), cols, out + r, rows);
  }
}

template <class U>
void multiply_symmetric(const Product& p, void* scratch) {
  constexpr int64_t block = kBlockTiles * kTileRows;
  const int64_t panels = (p.cols + kTileCols - 1) / kTileCols;
  for (int64_t row = 0; row < p.rows; row += block) {
    for (int64_t c = row / kTileCols; c < panels; ++c) {
      // Whole tiles of rows, as far as the panel's part of the diagonal.
      const int64_t last =
          least(least(row + block, p.rows), round_up((c + 1) * kTileCols, kTileRows));
      multiply<U>(p, row, last, c, c + 1, scratch);
    }
  }
  float* out = static_cast<float*>(p.out);
  for (int64_t r = 0; r < p.rows; r += W) {
    const int64_t rows = least(W, p.rows - r), next = r + rows;
    for (int64_t i = r; i < next; ++i) {
      for (int64_t j = i + 1; j < next; ++j) out[j * p.ld + i] = out[i * p.ld + j];
    }
    transpose_rows(out + r * p.ld + next, p.ld, rows, p.cols - next, out + next * p.ld + r, p.ld);
  }
}

// ---- rows ----

// Calls f(i, load, store) for W numbers at a time, the last ones through padded copies.
template <typename Function>
inline void each_vector(int64_t n, Function f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, static_cast<int64_t>(W), Count<1>());
  if (i < n) f(i, n - i, Count<0>());
}

template <class U, typename Full>
inline F element_lanes(const typename U::T* p, int64_t n, Full) {
  return Full::value ? U::get(p) : get_some<U>(p, n);
}

template <typename Full>
inline F float_lanes(const float* p, int64_t n, Full) {
  return Full::value ? Isa::load(p) : load_some(p, n);
}

template <typename Full>
inline void keep_floats(float* p, int64_t n, F x, Full) {
  if constexpr (Full::value) {
    Isa::store(p, x);
  } else {
    store_some(p, n, x);
  }
}

template <class U, typename Full>
inline void keep_elements(typename U::T* p, int64_t n, F x, Full) {
  if constexpr (Full::value) {
    U::put(p, x);
  } else {
    put_some<U>(p, n, x);
  }
}

// x where there are lanes, else zero: what a padded copy makes of a constant.
template <typename Full>
inline F only(F x, int64_t n, Full) {
  if constexpr (Full::value) return x;
  float lanes[W];
  Isa::store(lanes, x);
  return load_some(lanes, n);
}

template <class U>
void norm(const float* x, int64_t rows, int64_t cols, const float* weight, const float* bias,
          void* y, float* stats) {
  typename U::T* out = static_cast<typename U::T*>(y);
  for (int64_t r = 0; r < rows; ++r, x += cols, out += cols, stats += 2) {
    F sum = Isa::zero();
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      sum = Isa::add(sum, float_lanes(x + i, n, full));
    });
    const float mean = Isa::total(sum) / static_cast<float>(cols);
    const F centre = Isa::set(mean);
    F squares = Isa::zero();
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      const F d = Isa::sub(float_lanes(x + i, n, full), only(centre, n, full));
      squares = Isa::fma(d, d, squares);
    });
    const float variance = Isa::total(squares) / static_cast<float>(cols);
    const float rstd = 1.0f / __builtin_sqrtf(variance + 1e-5f);
    stats[0] = mean;
    stats[1] = rstd;
    const F spread = Isa::set(rstd);
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      const F d = Isa::mul(Isa::sub(float_lanes(x + i, n, full), centre), spread);
      F value = Isa::mul(d, float_lanes(weight + i, n, full));
      if (bias != nullptr) value = Isa::add(value, float_lanes(bias + i, n, full));
      keep_elements<U>(out + i, n, value, full);
    });
  }
}

template <class U>
void norm_backward(const float* dy, const float* x, const float* stats, int64_t rows, int64_t cols,
                   const float* weight, bool first, float* grad, void* narrow, float* sums) {
  typename U::T* elements = static_cast<typename U::T*>(narrow);
  const float inverse = 1.0f / static_cast<float>(cols);
  for (int64_t r = 0; r < rows; ++r, dy += cols, x += cols, grad += cols, elements += cols) {
    const F mean = Isa::set(stats[2 * r]), rstd = Isa::set(stats[2 * r + 1]);
    F first_sum = Isa::zero(), second_sum = Isa::zero();
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      const F d = float_lanes(dy + i, n, full);
      const F hat = only(Isa::mul(Isa::sub(float_lanes(x + i, n, full), mean), rstd), n, full);
      const F scaled = Isa::mul(d, float_lanes(weight + i, n, full));
      first_sum = Isa::add(first_sum, scaled);
      second_sum = Isa::fma(scaled, hat, second_sum);
      keep_floats(sums + i, n, Isa::fma(d, hat, float_lanes(sums + i, n, full)), full);
      keep_floats(sums + cols + i, n, Isa::add(d, float_lanes(sums + cols + i, n, full)), full);
    });
    const F m1 = Isa::set(Isa::total(first_sum) * inverse);
    const F m2 = Isa::set(Isa::total(second_sum) * inverse);
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      const F hat = Isa::mul(Isa::sub(float_lanes(x + i, n, full), mean), rstd);
      const F scaled = Isa::mul(float_lanes(dy + i, n, full), float_lanes(weight + i, n, full));
      F value = Isa::mul(rstd, Isa::sub(Isa::sub(scaled, m1), Isa::mul(hat, m2)));
      if (!first) value = Isa::add(value, float_lanes(grad + i, n, full));
      keep_floats(grad + i, n, value, full);
      keep_elements<U>(elements + i, n, value, full);
    });
  }
}

template <class U>
void column_sums(const void* x, int64_t rows, int64_t cols, int64_t ld, float* sums) {
  const typename U::T* row = static_cast<const typename U::T*>(x);
  for (int64_t r = 0; r < rows; ++r, row += ld) {
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      const F value = element_lanes<U>(row + i, n, full);
      keep_floats(sums + i, n, Isa::add(float_lanes(sums + i, n, full), value), full);
    });
  }
}

void add_floats(const float* x, int64_t count, float* out) {
  each_vector(count, [&](int64_t i, int64_t n, auto full) {
    keep_floats(out + i, n, Isa::add(float_lanes(out + i, n, full), float_lanes(x + i, n, full)),
                full);
  });
}

void blend(float a, const float* x, float b, const float* y, int64_t count, float* out) {
  const F left = Isa::set(a), right = Isa::set(b);
  each_vector(count, [&](int64_t i, int64_t n, auto full) {
    const F second = Isa::mul(right, float_lanes(y + i, n, full));
    keep_floats(out + i, n, Isa::fma(left, float_lanes(x + i, n, full), second), full);
  });
}

void drop(const float* x, float scale, const uint8_t* kept, const float* y, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = scale * static_cast<float>(kept[i]) * y[i];
    out[i] = x != nullptr ? x[i] + value : value;
  }
}

template <class U>
void narrow(float scale, const float* x, int64_t count, void* to) {
  typename U::T* out = static_cast<typename U::T*>(to);
  const F factor = Isa::set(scale);
  each_vector(count, [&](int64_t i, int64_t n, auto full) {
    keep_elements<U>(out + i, n, Isa::mul(float_lanes(x + i, n, full), factor), full);
  });
}

void embed(const float* token, const float* position, int64_t cols, float* out) {
  memcpy(out, token, static_cast<size_t>(cols) * 4);
  if (position != nullptr) add_floats(position, cols, out);
}

constexpr float kLowest = -3.0e38f;

inline float largest_of(const float* x, int64_t n) {
  F top = Isa::set(kLowest);
  int64_t i = 0;
  for (; i + W <= n; i += W) top = Isa::max(top, Isa::load(x + i));
  float most = Isa::largest(top);
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

template <class U>
float cross_entropy(float* logits, int64_t cols, int64_t target, float scale, int64_t width,
                    void* grad) {
  typename U::T* out = static_cast<typename U::T*>(grad);
  if (target < 0) {
    if (out != nullptr) memset(out, 0, static_cast<size_t>(width) * sizeof *out);
    return 0.0f;
  }
  const float most = largest_of(logits, cols);
  const float own = logits[target];
  const F shift = Isa::set(most);
  F sum = Isa::zero();
  each_vector(cols, [&](int64_t i, int64_t n, auto full) {
    const F e = only(exp_of(Isa::sub(float_lanes(logits + i, n, full), shift)), n, full);
    keep_floats(logits + i, n, e, full);
    sum = Isa::add(sum, e);
  });
  const float total = Isa::total(sum);
  if (out != nullptr) {
    const F factor = Isa::set(scale / total);
    each_vector(cols, [&](int64_t i, int64_t n, auto full) {
      keep_elements<U>(out + i, n, Isa::mul(float_lanes(logits + i, n, full), factor), full);
    });
    out[target] = U::element((logits[target] / total - 1.0f) * scale);
    for (int64_t i = cols; i < width; ++i) out[i] = U::element(0.0f);
  }
  return __builtin_logf(total) + (most - own);
}

double sum_of_squares(const float* x, int64_t count) {
  // Vectors of a few thousand products are summed in float32, these sums in float64.
  double total = 0.0;
  for (int64_t start = 0; start < count; start += 4096) {
    F sums[2] = {Isa::zero(), Isa::zero()};
    const int64_t end = least(count, start + 4096);
    int64_t i = start;
    for (; i + 2 * W <= end; i += 2 * W) {
      const F a = Isa::load(x + i), b = Isa::load(x + i + W);
      sums[0] = Isa::fma(a, a, sums[0]);
      sums[1] = Isa::fma(b, b, sums[1]);
    }
    float sum = Isa::total(Isa::add(sums[0], sums[1]));
    for (; i < end; ++i) sum += x[i] * x[i];
    total += static_cast<double>(sum);
  }
  return total;
}

void adamw(float* weights, const float* grads, float* first, float* second, int64_t count,
           const AdamW& by) {
  const F decay = Isa::set(1.0f - by.lr * by.weight_decay);
  const F b1 = Isa::set(1.0f - by.beta1), b2 = Isa::set(by.beta2), c2 = Isa::set(1.0f - by.beta2);
  const F step = Isa::set(by.lr / by.correction1), eps = Isa::set(by.eps);
  const F root = Isa::set(1.0f / __builtin_sqrtf(by.correction2)), scale = Isa::set(by.grad_scale);
  each_vector(count, [&](int64_t i, int64_t n, auto full) {
    const F g = Isa::mul(float_lanes(grads + i, n, full), scale);
    const F old = float_lanes(first + i, n, full);
    const F m = Isa::fma(Isa::sub(g, old), b1, old);
    const F v = Isa::fma(Isa::mul(g, g), c2, Isa::mul(float_lanes(second + i, n, full), b2));
    const F w = Isa::mul(float_lanes(weights + i, n, full), decay);
    const F bottom = Isa::fma(Isa::sqrt(v), root, eps);
    keep_floats(first + i, n, m, full);
    keep_floats(second + i, n, v, full);
    keep_floats(weights + i, n, Isa::sub(w, Isa::div(Isa::mul(m, step), bottom)), full);
  });
}

// ---- attention of one head of one sequence ----

constexpr int64_t kQueries = 64;  // of a block, about

constexpr int64_t query_block(int64_t positions) {
  const int64_t blocks = (positions + kQueries - 1) / kQueries;
  return round_up((positions + blocks - 1) / blocks, 2);
}

// Pieces of a scratch, 64-byte aligned one after another.
struct Pieces {
  char* memory;  // null: the pieces are only counted
  int64_t used;
  template <typename T>
  T* take(int64_t count) {
    T* piece = memory != nullptr ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

template <class U>
struct HeadScratch {
  using T = typename U::T;
  char *keys, *values, *keys_by_row, *block, *product;
  T *q, *k, *p, *ds;
  float *scores, *dp, *dq, *dk, *dv;
  int64_t ld, end;  // elements in a row of scores; bytes of it all

  HeadScratch(char* at, int64_t positions, int64_t width) {
    Pieces pieces{at, 0};
    const int64_t queries = query_block(positions);
    ld = round_up(positions, W);
    keys = pieces.take<char>(packed_bytes<U>(width, positions));
    values =
        pieces.take<char>(packed_bytes<U>(positions, width) + packed_bytes<U>(width, positions));
    keys_by_row = pieces.take<char>(packed_bytes<U>(positions, width));
    block = pieces.take<char>(2 * packed_bytes<U>(queries, width));
    q = pieces.take<T>(positions * width);
    k = pieces.take<T>(positions * width);
    p = pieces.take<T>(queries * ld);
    ds = pieces.take<T>(queries * ld);
    scores = pieces.take<float>(queries * ld);
    dp = pieces.take<float>(queries * ld);
    dq = pieces.take<float>(queries * width);
    dk = pieces.take<float>(positions * width);
    dv = pieces.take<float>(positions * width);
    product = pieces.take<char>(product_scratch());
    end = pieces.used;
  }
};

template <class U>
int64_t head_scratch(int64_t positions, int64_t width) {
  return HeadScratch<U>(nullptr, positions, width).end;
}

inline float dot_of(const float* x, const float* y, int64_t count) {
  F sum = Isa::zero();
  each_vector(count, [&](int64_t i, int64_t n, auto full) {
    sum = Isa::fma(float_lanes(x + i, n, full), float_lanes(y + i, n, full), sum);
  });
  return Isa::total(sum);
}

inline float inverse_rms(const float* x, int64_t n) {
  return 1.0f / __builtin_sqrtf(dot_of(x, x, n) / static_cast<float>(n) + kQkEpsilon);
}

constexpr int64_t kMostHeadWidth = 1024;

template <class U>
inline void widen_row(const typename U::T* from, int64_t width, float* row) {
  each_vector(width, [&](int64_t i, int64_t n, auto full) {
    keep_floats(row + i, n, element_lanes<U>(from + i, n, full), full);
  });
}

template <class U>
inline void narrow_row(const float* row, int64_t width, typename U::T* to) {
  each_vector(width, [&](int64_t i, int64_t n, auto full) {
    keep_elements<U>(to + i, n, float_lanes(row + i, n, full), full);
  });
}

// Rows of q or k, `from_ld` apart, divided by their root mean square and rotated.
template <class U>
inline void prepare(const Head& h, const typename U::T* from, int64_t from_ld, typename U::T* to) {
  const int64_t half = h.width / 2;
  float row[kMostHeadWidth];
  for (int64_t t = 0; t < h.positions; ++t) {
    widen_row<U>(from + t * from_ld, h.width, row);
    if (h.normed) {
      const float factor = inverse_rms(row, h.width);
      for (int64_t i = 0; i < h.width; ++i) row[i] *= factor;
    }
    if (h.cosines != nullptr) {
      const float *c = h.cosines + t * half, *s = h.sines + t * half;
      for (int64_t i = 0; i < half; ++i) {
        const float first = row[i], second = row[i + half];
        row[i] = first * c[i] - second * s[i];
        row[i + half] = second * c[i] + first * s[i];
      }
    }
    narrow_row<U>(row, h.width, to + t * h.width);
  }
}

// The gradient of one prepared row, which is overwritten, as that of the row it was made from.
template <class U>
inline void prepare_backward(const Head& h, int64_t t, float* grad, const typename U::T* from,
                             typename U::T* to) {
  const int64_t half = h.width / 2;
  if (h.cosines != nullptr) {
    const float *c = h.cosines + t * half, *s = h.sines + t * half;
    for (int64_t i = 0; i < half; ++i) {
      const float first = grad[i], second = grad[i + half];
      grad[i] = first * c[i] + second * s[i];
      grad[i + half] = second * c[i] - first * s[i];
    }
  }
  if (h.normed) {
    float row[kMostHeadWidth];
    widen_row<U>(from, h.width, row);
    const float factor = inverse_rms(row, h.width);
    const float along = dot_of(grad, row, h.width) * factor * factor / static_cast<float>(h.width);
    for (int64_t i = 0; i < h.width; ++i) grad[i] = factor * (grad[i] - row[i] * along);
  }
  narrow_row<U>(grad, h.width, to);
}

template <class U>
struct HeadOperands {
  using T = typename U::T;
  const T *q, *k, *v;
  int64_t q_ld, k_ld, v_ld;
};

template <class U>
inline HeadOperands<U> operands_of(const Head& h, HeadScratch<U>& s) {
  using T = typename U::T;
  const int64_t ld = 3 * h.model_width;
  const T* qkv = static_cast<const T*>(h.qkv);
  const T *q = qkv, *k = qkv + h.model_width, *v = qkv + 2 * h.model_width;
  if (!h.normed && h.cosines == nullptr) return {q, k, v, ld, ld, ld};
  prepare<U>(h, q, ld, s.q);
  prepare<U>(h, k, ld, s.k);
  return {s.q, s.k, v, h.width, h.width, ld};
}

template <class U>
inline void pack_all(const void* data, int64_t ld, int64_t depth, int64_t cols, bool by_column,
                     char* to) {
  const Operand from{data, ld, depth, cols, by_column, false};
  pack<U>(from, 0, (cols + kTileCols - 1) / kTileCols, to);
}

// A query sees the keys up to itself. Of a block of queries that begins at position `first`, tiles
// that only hold pairs beyond that are left out.

constexpr int64_t kStair = kTileRows >= 12 ? kTileRows : 2 * kTileRows;  // rows of one depth

// Scores: (queries, keys). What is left out is not written.
template <class U>
inline void multiply_seen(const Product& p, int64_t first, char* scratch) {
  const int64_t panels = (p.cols + kTileCols - 1) / kTileCols;
  const int64_t whole = least(panels, first / kTileCols + 1);
  multiply<U>(p, 0, p.rows, 0, whole, scratch);
  for (int64_t c = whole; c < panels; ++c) {
    multiply<U>(p, c * kTileCols - first, p.rows, c, c + 1, scratch);
  }
}

// Sums over keys: (queries, depth of keys), zeros beyond the ones seen.
template <class U>
inline void multiply_by_seen(const Product& p, int64_t first, char* scratch) {
  const int64_t panels = (p.cols + kTileCols - 1) / kTileCols;
  for (int64_t row = 0; row < p.rows; row += kStair) {
    const int64_t end = least(p.rows, row + kStair);
    Product part = p;
    part.depth = least(p.depth, first + end);
    multiply<U>(part, row, end, 0, panels, scratch);
  }
}

// Sums over queries: (keys, depth of queries), transposed.
template <class U>
inline void multiply_by_seeing(const Product& p, int64_t first, char* scratch) {
  const int64_t panels = (p.cols + kTileCols - 1) / kTileCols;
  multiply<U>(p, 0, first, 0, panels, scratch);
  for (int64_t row = first; row < p.rows; row += kStair) {
    const int64_t blind = (row - first) / U::per * U::per;
    Product part = p;
    part.a = static_cast<const typename U::T*>(p.a) + blind * p.a_ld;
    part.b = static_cast<const char*>(p.b) + blind / U::per * kTileCols * kUnit;
    part.depth = p.depth - blind;
    multiply<U>(part, row, least(p.rows, row + kStair), 0, panels, scratch);
  }
}

template <class U>
inline Product product_of(const void* a, int64_t a_ld, bool transposed, const char* b,
                          int64_t b_depth, int64_t rows, int64_t cols, int64_t depth, Finish finish,
                          void* out, int64_t ld) {
  Product p;
  p.a = a;
  p.a_ld = a_ld;
  p.a_transposed = transposed;
  p.b = b;
  p.b_depth = b_depth;
  p.rows = rows;
  p.cols = cols;
  p.depth = depth;
  p.finish = finish;
  p.out = out;
  p.ld = ld;
  return p;
}

template <class U>
void attend(const Head& h) {
  using T = typename U::T;
  HeadScratch<U> s(h.scratch, h.positions, h.width);
  const HeadOperands<U> x = operands_of<U>(h, s);
  pack_all<U>(x.k, x.k_ld, h.width, h.positions, true, s.keys);
  pack_all<U>(x.v, x.v_ld, h.positions, h.width, false, s.values);
  const int64_t block = query_block(h.positions);
  for (int64_t first = 0; first < h.positions; first += block) {
    const int64_t queries = least(block, h.positions - first), keys = first + queries;
    multiply_seen<U>(product_of<U>(x.q + first * x.q_ld, x.q_ld, false, s.keys, h.width, queries,
                                   keys, h.width, Finish::wide, s.scores, s.ld),
                     first, s.product);
    const int64_t filled = round_up(keys, U::per);
    for (int64_t r = 0; r < queries; ++r) {
      float* row = s.scores + r * s.ld;
      T* p = s.p + r * s.ld;
      const int64_t seen = first + r + 1;
      const float most = largest_of(row, seen);
      const F shift = Isa::set(most), scale = Isa::set(h.scale);
      F sum = Isa::zero();
      each_vector(seen, [&](int64_t i, int64_t n, auto full) {
        const F d = Isa::mul(Isa::sub(float_lanes(row + i, n, full), shift), scale);
        const F e = only(exp_of(d), n, full);
        keep_floats(row + i, n, e, full);
        sum = Isa::add(sum, e);
      });
      const float total = Isa::total(sum);
      const F inverse = Isa::set(1.0f / total);
      each_vector(seen, [&](int64_t i, int64_t n, auto full) {
        keep_elements<U>(p + i, n, Isa::mul(float_lanes(row + i, n, full), inverse), full);
      });
      for (int64_t i = seen; i < filled; ++i) p[i] = U::element(0.0f);
      if (h.lse != nullptr) h.lse[first + r] = most * h.scale + __builtin_logf(total);
    }
    multiply_by_seen<U>(
        product_of<U>(s.p, s.ld, false, s.values, h.positions, queries, h.width, keys,
                      Finish::store, static_cast<T*>(h.out) + first * h.model_width, h.model_width),
        first, s.product);
  }
}

template <class U>
void attend_backward(const Head& h) {
  using T = typename U::T;
  HeadScratch<U> s(h.scratch, h.positions, h.width);
  const HeadOperands<U> x = operands_of<U>(h, s);
  const int64_t c = h.model_width, width = h.width;
  const T *out = static_cast<const T*>(h.out), *grad_out = static_cast<const T*>(h.grad_out);
  T* grad = static_cast<T*>(h.grad_qkv);
  const T* qkv = static_cast<const T*>(h.qkv);
  pack_all<U>(x.k, x.k_ld, width, h.positions, true, s.keys);
  pack_all<U>(x.k, x.k_ld, h.positions, width, false, s.keys_by_row);
  pack_all<U>(x.v, x.v_ld, width, h.positions, true, s.values);
  memset(s.dk, 0, static_cast<size_t>(h.positions * width) * 4);
  memset(s.dv, 0, static_cast<size_t>(h.positions * width) * 4);
  const int64_t block = query_block(h.positions);
  char* grad_block = s.block + packed_bytes<U>(block, width);
  for (int64_t first = 0; first < h.positions; first += block) {
    const int64_t queries = least(block, h.positions - first), keys = first + queries;
    const T* q = x.q + first * x.q_ld;
    const T* go = grad_out + first * c;
    pack_all<U>(q, x.q_ld, queries, width, false, s.block);
    pack_all<U>(go, c, queries, width, false, grad_block);
    multiply_seen<U>(product_of<U>(q, x.q_ld, false, s.keys, width, queries, keys, width,
                                   Finish::wide, s.scores, s.ld),
                     first, s.product);
    multiply_seen<U>(product_of<U>(go, c, false, s.values, width, queries, keys, width,
                                   Finish::wide, s.dp, s.ld),
                     first, s.product);
    const int64_t filled = round_up(keys, U::per);
    for (int64_t r = 0; r < queries; ++r) {
      const float *row = s.scores + r * s.ld, *dp = s.dp + r * s.ld;
      T *p = s.p + r * s.ld, *ds = s.ds + r * s.ld;
      const int64_t seen = first + r + 1;
      F dot = Isa::zero();
      each_vector(width, [&](int64_t i, int64_t n, auto full) {
        dot = Isa::fma(element_lanes<U>(out + (first + r) * c + i, n, full),
                       element_lanes<U>(go + r * c + i, n, full), dot);
      });
      const F delta = Isa::set(Isa::total(dot)), scale = Isa::set(h.scale);
      const F lse = Isa::set(-h.lse[first + r]);
      each_vector(seen, [&](int64_t i, int64_t n, auto full) {
        const F e = exp_of(Isa::fma(float_lanes(row + i, n, full), scale, lse));
        const F d = Isa::mul(Isa::sub(float_lanes(dp + i, n, full), delta), scale);
        keep_elements<U>(p + i, n, e, full);
        keep_elements<U>(ds + i, n, Isa::mul(e, d), full);
      });
      for (int64_t i = seen; i < filled; ++i) p[i] = ds[i] = U::element(0.0f);
    }
    multiply_by_seen<U>(product_of<U>(s.ds, s.ld, false, s.keys_by_row, h.positions, queries, width,
                                      keys, Finish::wide, s.dq, width),
                        first, s.product);
    multiply_by_seeing<U>(product_of<U>(s.ds, s.ld, true, s.block, queries, keys, width, queries,
                                        Finish::add, s.dk, width),
                          first, s.product);
    multiply_by_seeing<U>(product_of<U>(s.p, s.ld, true, grad_block, queries, keys, width, queries,
                                        Finish::add, s.dv, width),
                          first, s.product);
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t t = first + r;
      prepare_backward<U>(h, t, s.dq + r * width, qkv + t * 3 * c, grad + t * 3 * c);
    }
  }
  for (int64_t t = 0; t < h.positions; ++t) {
    prepare_backward<U>(h, t, s.dk + t * width, qkv + t * 3 * c + c, grad + t * 3 * c + c);
    narrow_row<U>(s.dv + t * width, width, grad + t * 3 * c + 2 * c);
  }
}

template <class U>
constexpr TrainingKernels training_table(const char* name) {
  return {
      name,
      static_cast<int>(sizeof(typename U::T)),
      kTileRows,
      kTileCols,
      product_scratch(),
      packed_depth(),
      packed_bytes<U>,
      pack<U>,
      multiply<U>,
      multiply_symmetric<U>,
      transpose,
      norm<U>,
      norm_backward<U>,
      column_sums<U>,
      embed,
      add_floats,
      blend,
      drop,
      narrow<U>,
      cross_entropy<U>,
      head_scratch<U>,
      attend<U>,
      attend_backward<U>,
      sum_of_squares,
      adamw,
  };
}

}  // namespace

#if defined(NANOGPT_BF16_DOT)
const TrainingKernels NANOGPT_TRAINING = training_table<Halves>(NANOGPT_KERNELS_NAME);
#else
const TrainingKernels NANOGPT_TRAINING = training_table<Floats>(NANOGPT_KERNELS_NAME);
#endif

}  // namespace nanogpt
