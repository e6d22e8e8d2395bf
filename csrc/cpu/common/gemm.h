// Matrix products of operands that lie in one thread's cache, in the arithmetic type. A fused kernel needs them between
// its passes; a library's product would write the whole result to memory and start its threads anew.
//
// Leading dimensions are padded to whole vectors and counts of rows to kGemmRows, so that there are no tails;
// padding in results is garbage, never read. A tile of the result stays in registers for the whole
// depth: kGemmRows x kGemmVectors accumulators take three quarters of the register file, enough independent sums to
// hide the latency of a fused multiply-add. Included by the per-ISA units only.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace wavemix {
namespace WAVEMIX_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kGemmRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kGemmRows = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kGemmRows = 4;
#endif
constexpr int kGemmVectors = 3;

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class A>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(A));

static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
// Columns of one operand may be rows of another's transpose.
template <class A>
static inline int64_t padded(int64_t columns) {
  return round_up(columns, kLanes<A> > kGemmRows ? kLanes<A> : kGemmRows);
}

// Columns are cut into panels of at most kGemmVectors vectors, as equal as whole vectors allow.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t v) : vectors(v), count((v + kGemmVectors - 1) / kGemmVectors) {}
  int64_t begin(int64_t i) const { return vectors * i / count; }
};

// kGemmRows rows of c: a b + bias, or c + a b where bias is null. Element (i, k) of a is a[i * lda + k], or
// a[k * lda + i] if `transposed`; rows of b are ldb apart.
template <class A, int vectors, bool transposed>
static inline void gemm_tile(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth, const A* bias, A* c,
                             int64_t ldc) {
  typedef typename Vector<A>::type V;
  typedef typename Vector<A>::unaligned Memory;
  constexpr int64_t lanes = kLanes<A>;
  V sum[kGemmRows][vectors];
  const A* start = bias != nullptr ? bias : c;
  const int64_t step = bias != nullptr ? 0 : ldc;
#pragma GCC unroll 8
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) sum[i][j] = *reinterpret_cast<const Memory*>(start + i * step + j * lanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V row[vectors];
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) row[j] = *reinterpret_cast<const Memory*>(b + k * ldb + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kGemmRows; ++i) {
      const V factor = (transposed ? a[k * lda + i] : a[i * lda + k]) - V{};
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) *reinterpret_cast<Memory*>(c + i * ldc + j * lanes) = sum[i][j];
  }
}

// Not inlined: a call costs nothing beside its work, and copies of three unrolled tiles at many places would add half
// a minute to a build from source.
template <class A, bool transposed>
__attribute__((noinline)) static void gemm_panel(int64_t vectors, int64_t rows, const A* a, int64_t lda, const A* b,
                                                 int64_t ldb, int64_t depth, const A* bias, A* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; i += kGemmRows) {
    const A* first = a + (transposed ? i : i * lda);
    // Sums lie beyond the L2 cache, rows apart, where no hardware prefetcher looks: fetch the next ones while this tile
    // is computed.
    if (bias == nullptr && i + kGemmRows < rows)
      for (int64_t row = i + kGemmRows; row < i + 2 * kGemmRows; ++row)
        for (int64_t j = 0; j < vectors; ++j) __builtin_prefetch(c + row * ldc + j * kLanes<A>, 1);
    switch (vectors) {
      case 1:
        gemm_tile<A, 1, transposed>(first, lda, b, ldb, depth, bias, c + i * ldc, ldc);
        break;
      case 2:
        gemm_tile<A, 2, transposed>(first, lda, b, ldb, depth, bias, c + i * ldc, ldc);
        break;
      default:
        gemm_tile<A, 3, transposed>(first, lda, b, ldb, depth, bias, c + i * ldc, ldc);
    }
  }
}

// A (depth x columns) matrix into depth * padded(columns) elements, panel after panel, so that a product reads it from
// end to end. Element (k, j) is at(k, j).
template <class A, class At>
static void pack(int64_t depth, int64_t columns, A* out, const At& at) {
  const Panels panels(padded<A>(columns) / kLanes<A>);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t begin = panels.begin(p) * kLanes<A>, end = panels.begin(p + 1) * kLanes<A>;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = begin; j < end; ++j) *out++ = j < columns ? at(k, j) : A(0);
  }
}

// c (rows x columns) = a (rows x depth) b + bias; b packed, bias padded.
template <class A>
static void product(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda, const A* b, const A* bias,
                    A* c, int64_t ldc) {
  const Panels panels(padded<A>(columns) / kLanes<A>);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
    gemm_panel<A, false>(vectors, rows, a, lda, b + depth * at, vectors * kLanes<A>, depth, bias + at, c + at, ldc);
  }
}

// c (rows x columns) += transpose(a) b, a (depth x rows) and b (depth x columns) by rows.
template <class A>
static void add_product_of_transpose(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda, const A* b,
                                     int64_t ldb, A* c, int64_t ldc) {
  const Panels panels(padded<A>(columns) / kLanes<A>);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
    gemm_panel<A, true>(vectors, rows, a, lda, b + at, ldb, depth, nullptr, c + at, ldc);
  }
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
