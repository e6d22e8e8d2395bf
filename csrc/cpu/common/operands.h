// Kernels with products (gemm.h) share these: memory of the arithmetic type, rows in and out, sums of threads. Included
// by the per-ISA units only.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common/convert.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {

template <class A>
struct Buffer {
  Scratch memory;
  A* data;
  explicit Buffer(int64_t count)
      : memory((count + 1) * static_cast<int64_t>(sizeof(A))), data(reinterpret_cast<A*>(memory.block)) {}
  void clear(int64_t count) const { std::memset(data, 0, static_cast<size_t>(count) * sizeof(A)); }
};
template <class A>
struct ZeroBuffer : Buffer<A> {
  explicit ZeroBuffer(int64_t count) : Buffer<A>(count) { this->clear(count); }
};

// Some rows of a matrix, as products want them: whole vectors apart, zeros behind the last column.
template <class A>
struct Block {
  int64_t columns, stride;
  ZeroBuffer<A> buffer;
  A* data;
  Block(int64_t rows, int64_t c) : columns(c), stride(padded<A>(c)), buffer(rows * stride), data(buffer.data) {}
};

// load_row and store_row for contiguous runs of a vector or so: where nothing is converted, whole or half vectors that
// may overlap, because a loop's entry and exit would cost more than the run.
template <class A>
static inline void copy_run(const A* from, A* to, int64_t n) {
  constexpr int64_t whole = kLanes<A>, half = whole / 2;
  if (n >= whole) {
    for (int64_t i = 0; i + whole <= n; i += whole) std::memcpy(to + i, from + i, whole * sizeof(A));
    std::memcpy(to + n - whole, from + n - whole, whole * sizeof(A));
  } else if (n >= half) {
    std::memcpy(to, from, half * sizeof(A));
    std::memcpy(to + n - half, from + n - half, half * sizeof(A));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}
template <class T, class A>
static inline void load_run(const T* from, int64_t n, A* to) {
  if constexpr (sizeof(T) == sizeof(A)) {
    copy_run(reinterpret_cast<const A*>(from), to, n);
  } else {
    load_row(from, 1, n, to);
  }
}
template <class T, class A>
static inline void store_run(const A* from, T* to, int64_t n) {
  if constexpr (sizeof(T) == sizeof(A)) {
    copy_run(from, reinterpret_cast<A*>(to), n);
  } else {
    store_row(from, to, 1, n);
  }
}

// Rows `apart` elements from each other.
template <class T, class A>
static inline void load_rows(const T* from, int64_t apart, int64_t rows, const Block<A>& to) {
  for (int64_t i = 0; i < rows; ++i) load_run(from + i * apart, to.columns, to.data + i * to.stride);
}
template <class T, class A>
static inline void store_rows(const Block<A>& from, int64_t offset, int64_t columns, int64_t rows, T* to,
                              int64_t apart) {
  for (int64_t i = 0; i < rows; ++i) store_run(from.data + i * from.stride + offset, to + i * apart, columns);
}

// Column sums of some rows, added to `sum` (padded): two steps of additions err less than one long one.
template <class A>
static inline void add_rows(const Block<A>& from, int64_t rows, A* sum) {
  for (int64_t j = 0; j < from.stride; j += kLanes<A>) {
    A part[kLanes<A>] = {};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < kLanes<A>; ++k) part[k] += from.data[i * from.stride + j + k];
    for (int64_t k = 0; k < kLanes<A>; ++k) sum[j + k] += part[k];
  }
}

// The threads' sums, `size` apart, one by one: a fixed order, so the same number of threads gives the same bits.
// Element (i, j) lies at i * row + j * column in each.
template <class T, class A>
static void finish_sums(const A* sums, int64_t size, int threads, int64_t rows, int64_t columns, int64_t row,
                        int64_t column, void* out) {
  if (out == nullptr) return;
  WAVEMIX_PARALLEL(rows > 1 ? threads : 1) {
    WAVEMIX_FOR
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        A sum = 0;
        for (int t = 0; t < threads; ++t) sum += sums[t * size + i * row + j * column];
        store(static_cast<T*>(out)[i * columns + j], sum);
      }
  }
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
