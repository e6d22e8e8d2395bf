// The processor's matrix units for bf16, AMX: products whose operands are tiles. Where isa.h finds none, what is here
// is never called. Included by the per-ISA units only.
//
// A tile of the left operand is 16 rows of 32 values, one of the right 32 rows of 16 columns with pairs of rows
// interleaved. 2 x 2 tiles of the result stay in registers, so each tile loaded is used twice. Values are multiplied
// exactly and summed in float; subnormals count as zeros.
#pragma once

#include <type_traits>

#include "cpu/common/operands.h"

#if WAVEMIX_HAS_AMX && defined(__AVX512F__)
#define WAVEMIX_MATRIX_UNITS 1
#else
#define WAVEMIX_MATRIX_UNITS 0
#endif

namespace wavemix {
namespace WAVEMIX_ISA {

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileColumns = 16;
constexpr int64_t kTile = kTileDepth * kTileColumns;
// A block of the result that stays in registers has at most so many rows and columns.
constexpr int64_t kBlock = 32;
static_assert(kBlock == 2 * kTileRows && kBlock == 2 * kTileColumns, "2 x 2 tiles");

// Whether products of T's tensors go by matrix units.
template <class T>
static inline bool by_matrix_units() {
  return WAVEMIX_MATRIX_UNITS && std::is_same<T, bf16>::value && cpu_matrix_units();
}

// While one exists that is on, its thread may use tiles.
struct MatrixUnits {
  bool on;
  explicit MatrixUnits(bool wanted) : on(wanted) {
#if WAVEMIX_MATRIX_UNITS
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    static_assert(sizeof shape == 64, "as ldtilecfg reads it");
    if (on) __asm__ volatile("ldtilecfg (%0)" ::"r"(&shape) : "memory");
#endif
  }
  ~MatrixUnits() {
#if WAVEMIX_MATRIX_UNITS
    if (on) __asm__ volatile("tilerelease" ::: "memory");
#endif
  }
  MatrixUnits(const MatrixUnits&) = delete;
  MatrixUnits& operator=(const MatrixUnits&) = delete;
};

#if WAVEMIX_MATRIX_UNITS
// Tiles 0 to 3: the result, row after row; 4, 5: the left operand; 6, 7: the right one. Numbers are part of an
// instruction. Compilers' own intrinsics do not say that they read and write memory.
#define WAVEMIX_TILE_LOAD(tile, from, apart) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(apart) : "memory")
#define WAVEMIX_TILE_STORE(tile, to, apart) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(apart) : "memory")
#define WAVEMIX_TILE_PRODUCT(result, left, right) \
  __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #result::: "memory")

// --- Conversions -------------------------------------------------------------------------------------------

// 32 floats in bf16, rounded to nearest even.
static inline __m512i narrow(__m512 low, __m512 high) {
  __m512i out;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  return out;
}
static inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
// The first n lanes.
static inline uint32_t lanes(int64_t n) { return n >= 32 ? ~uint32_t{0} : (uint32_t{1} << n) - 1; }

// Rows of `depth` values in bf16, each filled up with zeros to whole tiles, `apart` from each other.
static inline void narrow_rows(const float* from, int64_t lda, int64_t rows, int64_t depth, bf16* to, int64_t apart) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const float* at = from + i * lda + k;
      const uint32_t mask = lanes(depth - k);
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), at);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), at + 16);
      _mm512_storeu_si512(to + i * apart + k, narrow(low, high));
    }
}
static inline void copy_rows(const bf16* from, int64_t lda, int64_t rows, int64_t depth, bf16* to, int64_t apart) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; k += kTileDepth)
      _mm512_storeu_si512(to + i * apart + k, _mm512_maskz_loadu_epi16(lanes(depth - k), from + i * lda + k));
}

// Pairs of rows interleaved, as a right operand has them: (a0, b0, a1, b1, ...).
static inline __m512i interleave(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
static inline __m512i interleave(__m512 a, __m512 b) {
  const __m512i both = narrow(a, b);
  return interleave(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
}

// A tile of a right operand from what is left of a matrix, `depth` x `columns`.
static inline void pack_tile(const bf16* from, int64_t by_depth, int64_t by_column, int64_t depth, int64_t columns,
                             bf16* out) {
  if (depth >= kTileDepth && columns >= kTileColumns && (by_depth == 1 || by_column == 1)) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(count, _mm512_set1_epi32(static_cast<int>(by_column)));
    for (int64_t k = 0; k < kTileDepth; k += 2) {
      const bf16* row = from + k * by_depth;
      const auto half = [=](int64_t i) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i * by_depth));
      };
      const __m512i pairs = by_depth == 1 ? _mm512_i32gather_epi32(places, row, 2) : interleave(half(0), half(1));
      _mm512_storeu_si512(out + k * kTileColumns, pairs);
    }
    return;
  }
  for (int64_t k = 0; k < kTileDepth; ++k)
    for (int64_t j = 0; j < kTileColumns; ++j)
      out[(k / 2 * kTileColumns + j) * 2 + k % 2] =
          k < depth && j < columns ? from[k * by_depth + j * by_column] : bf16{0};
}

// 16 x 16 pairs, transposed: row i of `rows` becomes column i of the 16 rows at `to`, which lie `apart`.
static inline void store_transposed(const __m512i (&rows)[16], bf16* to, int64_t apart) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  // Vector 4 i + j now has columns j, 4 + j, 8 + j and 12 + j of rows 4 i to 4 i + 3, a quarter each.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                  high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * apart, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (4 + j) * apart, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + j) * apart, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * apart, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

// Operands of a product over rows, c += transpose(a) b: a's columns as rows, and b's rows in pairs. rows(i, j): 16
// values of row i from column j on, as vectors that interleave() takes; zeros behind the last row. Rows in whole tiles'
// depth; the left operand's rows lie `apart`, at least as many.
template <class Rows>
static inline void transpose_rows(int64_t rows, int64_t columns, const Rows& from, bf16* to, int64_t apart) {
  for (int64_t j = 0; j < columns; j += kTileRows)
    for (int64_t i = 0; i < rows; i += kTileDepth) {
      __m512i pairs[16];
      for (int64_t k = 0; k < 16; ++k) pairs[k] = interleave(from(i + 2 * k, j), from(i + 2 * k + 1, j));
      store_transposed(pairs, to + j * apart + i, apart);
    }
}
template <class Rows>
static inline void pair_rows(int64_t rows, int64_t columns, const Rows& from, bf16* to) {
  for (int64_t j = 0; j < columns; j += kTileColumns)
    for (int64_t i = 0; i < rows; i += 2, to += 2 * kTileColumns)
      _mm512_storeu_si512(to, interleave(from(i, j), from(i + 1, j)));
}

// --- Products ----------------------------------------------------------------------------------------------

// Rows of a left operand: for each of some taps, `depth` tiles from `shift` values behind a row's place on.
struct Left {
  const bf16* data;
  int64_t apart;  // of the rows
  int64_t depth;
  int taps = 1;
  int64_t shift[4] = {0, 0, 0, 0};
};

// `down` x `across` tiles of the result into `c`, whose rows are ldc apart, from `start` on, whose rows are start_apart
// apart. The tiles of a column of the right operand lie behind each other, b_apart from the next column's.
template <int down, int across>
static inline void tiles_product(const Left& left, int64_t row, const bf16* b, int64_t b_apart, const float* start,
                                 int64_t start_apart, float* c, int64_t ldc) {
  const int64_t from_bytes = 4 * start_apart, to_bytes = 4 * ldc, left_bytes = 2 * left.apart, right_bytes = 64;
  const float* below = start + kTileRows * start_apart;
  WAVEMIX_TILE_LOAD(0, start, from_bytes);
  if constexpr (across > 1) WAVEMIX_TILE_LOAD(1, start + kTileColumns, from_bytes);
  if constexpr (down > 1) WAVEMIX_TILE_LOAD(2, below, from_bytes);
  if constexpr (down > 1 && across > 1) WAVEMIX_TILE_LOAD(3, below + kTileColumns, from_bytes);
  for (int tap = 0; tap < left.taps; ++tap) {
    const bf16* a = left.data + row * left.apart + left.shift[tap];
    for (int64_t k = 0; k < left.depth; ++k, a += kTileDepth, b += kTile) {
      WAVEMIX_TILE_LOAD(4, a, left_bytes);
      WAVEMIX_TILE_LOAD(6, b, right_bytes);
      WAVEMIX_TILE_PRODUCT(0, 4, 6);
      if constexpr (across > 1) {
        WAVEMIX_TILE_LOAD(7, b + b_apart, right_bytes);
        WAVEMIX_TILE_PRODUCT(1, 4, 7);
      }
      if constexpr (down > 1) {
        WAVEMIX_TILE_LOAD(5, a + kTileRows * left.apart, left_bytes);
        WAVEMIX_TILE_PRODUCT(2, 5, 6);
      }
      if constexpr (down > 1 && across > 1) WAVEMIX_TILE_PRODUCT(3, 5, 7);
    }
  }
  WAVEMIX_TILE_STORE(0, c, to_bytes);
  if constexpr (across > 1) WAVEMIX_TILE_STORE(1, c + kTileColumns, to_bytes);
  if constexpr (down > 1) WAVEMIX_TILE_STORE(2, c + kTileRows * ldc, to_bytes);
  if constexpr (down > 1 && across > 1) WAVEMIX_TILE_STORE(3, c + kTileRows * ldc + kTileColumns, to_bytes);
}

// The same for what is left of the result, `rows` and `columns` in whole tiles.
__attribute__((noinline, unused)) static void block_product(const Left& left, int64_t row, int64_t rows,
                                                            int64_t columns, const bf16* b, int64_t b_apart,
                                                            const float* start, int64_t start_apart, float* c,
                                                            int64_t ldc) {
  if (rows > kTileRows) {
    if (columns > kTileColumns) return tiles_product<2, 2>(left, row, b, b_apart, start, start_apart, c, ldc);
    return tiles_product<2, 1>(left, row, b, b_apart, start, start_apart, c, ldc);
  }
  if (columns > kTileColumns) return tiles_product<1, 2>(left, row, b, b_apart, start, start_apart, c, ldc);
  tiles_product<1, 1>(left, row, b, b_apart, start, start_apart, c, ldc);
}

// c (rows x columns) += left b, all in whole tiles, b by pair_rows().
__attribute__((noinline, unused)) static void add_product(int64_t rows, int64_t columns, const Left& left,
                                                          const bf16* b, float* c, int64_t ldc) {
  const int64_t b_apart = left.depth * kTile;
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t i = 0; i < rows; i += kBlock) {
      float* const at = c + i * ldc + j;
      block_product(left, i, rows - i, columns - j, b + j / kTileColumns * b_apart, b_apart, at, ldc, at, ldc);
    }
}

// rows x columns = left b + bias, block after block: finish(row, column, values), kBlock values in a row. Rows in whole
// tiles; b packed; columns and bias padded to whole tiles. A column's tiles stay in L1 for all rows.
template <class Finish>
static inline void product_by_blocks(int64_t rows, int64_t columns, const Left& left, const bf16* b, const float* bias,
                                     const Finish& finish) {
  alignas(64) float values[kBlock * kBlock];
  const int64_t b_apart = left.taps * left.depth * kTile;
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t i = 0; i < rows; i += kBlock) {
      block_product(left, i, rows - i, columns - j, b + j / kTileColumns * b_apart, b_apart, bias + j, 0, values,
                    kBlock);
      finish(i, j, values);
    }
}
// A finish() that stores `rows` x `columns` values, rounded; rows lie `apart`.
static inline auto stores_rounded(bf16* to, int64_t rows, int64_t columns, int64_t apart) {
  return [=](int64_t first, int64_t j, const float* values) {
    const int64_t end = rows - first < kBlock ? rows - first : kBlock;
    for (int64_t i = 0; i < end; ++i) {
      const float* row = values + i * kBlock;
      _mm512_mask_storeu_epi16(to + (first + i) * apart + j, lanes(columns - j),
                               narrow(_mm512_loadu_ps(row), _mm512_loadu_ps(row + 16)));
    }
  };
}
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
