// Both directions of the wavelet transform use this: rows in and out of memory, scratch rows, units of work.
// Included by the per-ISA units only.
#pragma once

#include "cpu/common/convert.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Elements of a dtype that is known at run time only: a row is long enough to ask.
struct Elements {
  DType dtype;
  char* data;
  Elements(DType dtype, void* data) : dtype(dtype), data(static_cast<char*>(data)) {}
  int64_t bytes() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  void* at(int64_t offset) const { return data + offset * bytes(); }
};

template <class A>
void load_line(const Elements& from, int64_t offset, int64_t stride, int64_t n, A* dst) {
  dispatch(from.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(typename Arithmetic<T>::type) == sizeof(A))
      load_row(static_cast<const T*>(from.at(offset)), stride, n, dst);
  });
}
template <class A>
void store_line(const A* src, const Elements& to, int64_t offset, int64_t stride, int64_t n) {
  dispatch(to.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(typename Arithmetic<T>::type) == sizeof(A))
      store_row(src, static_cast<T*>(to.at(offset)), stride, n);
  });
}

template <class A>
using Vec = typename Vector<A>::type;
template <class A>
static inline Vec<A> get(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::unaligned*>(p);
}
template <class A>
static inline void put(A* p, const Vec<A>& v) {
  *reinterpret_cast<typename Vector<A>::unaligned*>(p) = v;
}

// Vectors computed at once: enough independent sums to hide the latency of a multiply-add.
constexpr int kAtOnce = 2;

// Elements of a row in scratch: whole steps, and one more for reads past the last.
template <class A>
static inline int64_t row_elements(int64_t n) {
  return round_up(n, kAtOnce * kLanes<A>) + kAtOnce * kLanes<A>;
}

// Hands out the rows of a scratch block; counts them first, when it has none.
template <class A>
struct Rows {
  A* next;
  int64_t used = 0;
  explicit Rows(A* block) : next(block) {}
  template <class T = A>
  T* take(int64_t count) {
    const int64_t elements = (count * static_cast<int64_t>(sizeof(T)) + sizeof(A) - 1) / sizeof(A);
    A* row = next == nullptr ? nullptr : next + used;
    used += round_up(elements, kLanes<A>);
    return reinterpret_cast<T*>(row);
  }
};

// A transform along h alone goes by so many columns at once that its rows stay in the cache.
template <class Run>
static void by_columns(const DwtArgs& args, const Run& run) {
  constexpr int64_t kColumns = 4096;
  if (args.w.taps != 0 || args.w.size <= kColumns) return run(args);
  for (int64_t x = 0; x < args.w.size; x += kColumns) {
    DwtArgs part = args;
    part.w.size = part.w.count = args.w.size - x < kColumns ? args.w.size - x : kColumns;
    part.image.data = Elements(args.image_dtype, args.image.data).at(x * args.image.stride[3]);
    part.ll.data = Elements(args.ll_dtype, args.ll.data).at(x * args.ll.stride[3]);
    if (args.high.data != nullptr)
      part.high.data = Elements(args.high_dtype, args.high.data).at(x * args.high.stride[4]);
    run(part);
  }
}

// A plane is cut into runs of rows where there are too few planes for all threads; each run filters up to `taps` rows
// that its neighbour filters too, so it has to be long.
struct Units {
  int64_t rows, run, per_plane, count;
  Units(int64_t planes, int64_t rows, int64_t taps, int threads) : rows(rows) {
    const int64_t wanted = (4 * threads + planes - 1) / planes;
    run = (rows + wanted - 1) / wanted;
    if (run < 4 * taps) run = 4 * taps;
    per_plane = (rows + run - 1) / run;
    count = planes * per_plane;
  }
  int64_t begin(int64_t unit) const { return unit % per_plane * run; }
  int64_t end(int64_t unit) const { return begin(unit) + run < rows ? begin(unit) + run : rows; }
};

// All planes, in runs of `rows` rows of what is written, by workers with scratch memory of their own.
template <class Worker, class A>
void run_units(const DwtArgs& args, int64_t rows, int threads) {
  if (args.n * args.c * args.h.size * args.w.size < kSerialElements) threads = 1;
  const Units units(args.n * args.c, rows, args.h.dilation * args.h.taps, threads);
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(Worker::scratch_bytes(args));
    Worker worker(args, reinterpret_cast<A*>(scratch.block));
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units.count; ++unit) {
      const int64_t plane = unit / units.per_plane;
      worker.point_at(plane / args.c, plane % args.c);
      worker.run(units.begin(unit), units.end(unit));
    }
  }
}

}  // namespace
}  // namespace WAVEMIX_ISA
}  // namespace wavemix
