// Products with a packed right operand: by vectors (gemm.h), or for bf16 by matrix units (matrix_units.h), which round
// the left operand to bf16. The left operand and the result are of the arithmetic type either way. Included by the
// per-ISA units only.
#pragma once

#include "cpu/common/matrix_units.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// A right operand (depth x columns) as products of T's tensors read it. Element (k, j) is
// from[k * by_depth + j * by_column]. `may`: go by matrix units; `threads` order it for them.
template <class T, class A>
struct RightOperand {
  int64_t depth, columns;
  bool units;
  Buffer<A> memory;
  // Rows of the left operand and the result come in multiples of this.
  int64_t rows() const { return units ? kTileRows : kGemmRows; }
  const T* tiles() const { return reinterpret_cast<const T*>(memory.data); }
  RightOperand(int64_t d, int64_t c, const T* from, int64_t by_depth, int64_t by_column, int threads, bool may = true)
      : depth(d),
        columns(c),
        units(may && by_matrix_units<T>()),
        memory(round_up(d, units ? kTileDepth : 1) * padded<A>(c)) {
#if WAVEMIX_MATRIX_UNITS
    if constexpr (std::is_same<T, bf16>::value) {
      if (units) {
        T* const out = reinterpret_cast<T*>(memory.data);
        const int64_t apart = round_up(depth, kTileDepth) * kTileColumns;
        WAVEMIX_PARALLEL(depth * columns < kSerialElements ? 1 : threads) {
          WAVEMIX_FOR
          for (int64_t j = 0; j < columns; j += kTileColumns)
            for (int64_t k = 0; k < depth; k += kTileDepth)
              pack_tile(from + k * by_depth + j * by_column, by_depth, by_column, depth - k, columns - j,
                        out + j / kTileColumns * apart + k * kTileColumns);
        }
        return;
      }
    }
#endif
    (void)threads;
    pack(depth, columns, memory.data, [=](int64_t k, int64_t j) { return load(from[k * by_depth + j * by_column]); });
  }
};

#if WAVEMIX_MATRIX_UNITS
__attribute__((noinline, unused)) static void units_product(int64_t rows, int64_t columns, int64_t depth,
                                                            const float* a, int64_t lda, const bf16* b,
                                                            const float* bias, float* c, int64_t ldc) {
  constexpr int64_t kDepth = 16 * kTileDepth;  // the left operand's part of a block stays in L1
  alignas(64) bf16 narrowed[kBlock * kDepth];
  const int64_t apart = round_up(depth, kTileDepth) * kTileColumns;
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t length = depth - k < kDepth ? depth - k : kDepth, wide = round_up(length, kTileDepth);
      narrow_rows(a + i * lda + k, lda, rows - i < kBlock ? rows - i : kBlock, length, narrowed, wide);
      const Left left = {narrowed, wide, wide / kTileDepth};
      for (int64_t j = 0; j < columns; j += kBlock) {
        float* to = c + i * ldc + j;
        block_product(left, 0, rows - i, columns - j, b + j / kTileColumns * apart + k * kTileColumns, apart,
                      k == 0 ? bias + j : to, k == 0 ? 0 : ldc, to, ldc);
      }
    }
}
#endif

// c (rows x columns) = a (rows x depth) b + bias; bias padded. Where `b.units`, the thread has MatrixUnits.
template <class T, class A>
static inline void product(int64_t rows, const A* a, int64_t lda, const RightOperand<T, A>& b, const A* bias, A* c,
                           int64_t ldc) {
#if WAVEMIX_MATRIX_UNITS
  if constexpr (std::is_same<T, bf16>::value) {
    if (b.units) return units_product(rows, padded<A>(b.columns), b.depth, a, lda, b.tiles(), bias, c, ldc);
  }
#endif
  product(rows, b.columns, b.depth, a, lda, b.memory.data, bias, c, ldc);
}

// c (rows x columns, both padded) += transpose(a) b, a (depth x rows) and b (depth x columns) by rows; `scratch` for
// matrix units or null.
template <class T, class A>
static inline void add_product_of_transpose(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda,
                                            const A* b, int64_t ldb, A* c, int64_t ldc, T* scratch) {
#if WAVEMIX_MATRIX_UNITS
  if constexpr (std::is_same<T, bf16>::value) {
    if (scratch != nullptr) {
      const int64_t deep = round_up(depth, kTileDepth), m = round_up(rows, kTileRows);
      const auto rows_of = [depth](const float* from, int64_t ld) {
        return
            [=](int64_t i, int64_t j) { return i < depth ? _mm512_loadu_ps(from + i * ld + j) : _mm512_setzero_ps(); };
      };
      transpose_rows(deep, m, rows_of(a, lda), scratch, deep);
      pair_rows(deep, padded<A>(columns), rows_of(b, ldb), scratch + m * deep);
      return add_product(m, padded<A>(columns), {scratch, deep, deep / kTileDepth}, scratch + m * deep, c, ldc);
    }
  }
#endif
  (void)scratch;
  add_product_of_transpose(rows, columns, depth, a, lda, b, ldb, c, ldc);
}
// Values of such scratch memory.
static inline int64_t transpose_scratch(int64_t rows, int64_t columns, int64_t depth) {
  return (round_up(rows, kTileRows) + round_up(columns, kTileColumns)) * round_up(depth, kTileDepth);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
