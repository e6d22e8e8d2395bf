// One level of wavelet analysis on the CPU. Compiled once per instruction set (see isa.h).
//
// Each image row is read once, filtered along w into a ring of `taps` rows, and the ring's columns make the four bands'
// next row: what lies between the two axes never leaves the cache.

#include "cpu/dwt/lines.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

template <class A>
struct Analysis {
  const DwtArgs& args;
  const int64_t half_w, half_h, width;  // pairs of taps; elements of a filtered row
  const A *low_w, *high_w, *low_h, *high_h;
  A *line, *even, *odd, *sum;
  A* out[4];
  A *low_ring, *high_ring;  // row r of the extended image at (r - start) % (2 * half_h)
  int64_t* slot_of;         // where the ring holds the row of each tap
  int64_t n = 0, c = 0;

  static int64_t scratch_bytes(const DwtArgs& args) {
    return Analysis(args, nullptr).line_up(nullptr) * static_cast<int64_t>(sizeof(A));
  }
  Analysis(const DwtArgs& args, A* block)
      : args(args),
        half_w((args.w.taps + 1) / 2),
        half_h((args.h.taps + 1) / 2),
        width(row_elements<A>(args.w.count)),
        low_w(static_cast<const A*>(args.w.low)),
        high_w(static_cast<const A*>(args.w.high)),
        low_h(static_cast<const A*>(args.h.low)),
        high_h(static_cast<const A*>(args.h.high)) {
    line_up(block);
    if (block == nullptr) return;
    // Read past the samples, and multiplied by nothing that is kept.
    for (int64_t i = 0; i < width + half_w; ++i) even[i] = odd[i] = A(0);
  }
  int64_t line_up(A* block) {
    Rows<A> rows(block);
    line = rows.take(args.w.size - args.w.start + 2 * (half_w + 1) + args.w.border.after);
    sum = rows.take(args.w.size);
    even = rows.take(width + half_w);
    odd = rows.take(width + half_w);
    slot_of = rows.template take<int64_t>(args.h.taps);
    for (A*& row : out) row = rows.take(width);
    low_ring = rows.take(2 * half_h * width);
    high_ring = rows.take(2 * half_h * width);
    return rows.used;
  }

  void point_at(int64_t sample, int64_t channel) {
    n = sample;
    c = channel;
  }

  void read(int64_t y, A* to) const {
    const Plane& p = args.image;
    load_line(Elements(args.image_dtype, p.data), n * p.stride[0] + c * p.stride[1] + y * p.stride[2], p.stride[3],
              args.w.size, to);
  }
  // Row y of the image extended along h, its own w samples; false where it is zero.
  bool read_extended(int64_t y, A* to) const {
    if (y >= 0 && y < args.h.size) {
      read(y, to);
      return true;
    }
    const DwtBorder& b = args.h.border;
    const int64_t i = y < 0 ? y + b.before : b.before + y - args.h.size;
    if (i < 0 || i >= b.before + b.after || b.begin[i] == b.begin[i + 1]) return false;
    for (int64_t t = b.begin[i]; t < b.begin[i + 1]; ++t) {
      const A weight = static_cast<A>(b.weight[t]);
      const bool first = t == b.begin[i];
      read(b.index[t], first ? to : sum);
      if (first && weight != A(1))
        for (int64_t x = 0; x < args.w.size; ++x) to[x] *= weight;
      if (!first)
        for (int64_t x = 0; x < args.w.size; ++x) to[x] += weight * sum[x];
    }
    return true;
  }
  // Samples past both ends of the row whose first sample is line[-start].
  void extend() const {
    A* x = line - args.w.start;
    const DwtBorder& b = args.w.border;
    for (int64_t i = args.w.start; i < -b.before; ++i) x[i] = A(0);
    for (int64_t i = 0; i < b.before + b.after; ++i) {
      A value = 0;
      for (int64_t t = b.begin[i]; t < b.begin[i + 1]; ++t) value += static_cast<A>(b.weight[t]) * x[b.index[t]];
      x[i < b.before ? i - b.before : args.w.size + i - b.before] = value;
    }
    for (int64_t i = args.w.size + b.after; i < args.w.start + 2 * (args.w.count + half_w); ++i) x[i] = A(0);
  }
  void filter(int64_t y, A* low, A* high) const {
    if (args.w.taps == 0) {
      if (!read_extended(y, low))
        for (int64_t k = 0; k < width; ++k) low[k] = A(0);
      return;
    }
    if (!read_extended(y, line - args.w.start)) {
      for (int64_t k = 0; k < width; ++k) low[k] = high[k] = A(0);
      return;
    }
    extend();
    const int64_t pairs = args.w.count + half_w - 1;
    for (int64_t k = 0; k < pairs; ++k) {
      even[k] = line[2 * k];
      odd[k] = line[2 * k + 1];
    }
    constexpr int64_t kLane = kLanes<A>;
    for (int64_t k = 0; k < args.w.count; k += kAtOnce * kLane) {
      Vec<A> l[kAtOnce] = {}, h[kAtOnce] = {};
      for (int64_t t = 0; t < args.w.taps; ++t) {
        const A* from = (t % 2 == 0 ? even : odd) + k + t / 2;
        for (int v = 0; v < kAtOnce; ++v) {
          const Vec<A> x = get(from + v * kLane);
          l[v] += low_w[t] * x;
          h[v] += high_w[t] * x;
        }
      }
      for (int v = 0; v < kAtOnce; ++v) {
        put(low + k + v * kLane, l[v]);
        put(high + k + v * kLane, h[v]);
      }
    }
  }
  void combine(int64_t row) const {
    for (int64_t t = 0; t < args.h.taps; ++t) slot_of[t] = (2 * row + t) % (2 * half_h) * width;
    if (args.w.taps == 0) {
      combine<2>();
    } else {
      combine<4>();
    }
    write(row, args.w.taps == 0 ? 2 : 4);
  }
  template <int bands>
  void combine() const {
    constexpr int64_t kLane = kLanes<A>;
    for (int64_t k = 0; k < args.w.count; k += kAtOnce * kLane) {
      Vec<A> b[bands][kAtOnce] = {};
      for (int64_t t = 0; t < args.h.taps; ++t) {
        const int64_t slot = slot_of[t] + k;
        for (int v = 0; v < kAtOnce; ++v)
          for (int i = 0; i < bands; i += 2) {
            const Vec<A> row = get((i == 0 ? low_ring : high_ring) + slot + v * kLane);
            b[i][v] += low_h[t] * row;
            b[i + 1][v] += high_h[t] * row;
          }
      }
      for (int i = 0; i < bands; ++i)
        for (int v = 0; v < kAtOnce; ++v) put(out[i] + k + v * kLane, b[i][v]);
    }
  }
  void write(int64_t row, int bands) const {
    const Plane& p = args.ll;
    store_line(out[0], Elements(args.ll_dtype, p.data), n * p.stride[0] + c * p.stride[1] + row * p.stride[2],
               p.stride[3], args.w.count);
    const Bands& s = args.high;
    for (int i = 1; i < bands; ++i)
      store_line(out[i], Elements(args.high_dtype, s.data),
                 n * s.stride[0] + c * s.stride[1] + (i - 1) * s.stride[2] + row * s.stride[3], s.stride[4],
                 args.w.count);
  }
  void run(int64_t begin, int64_t end) const {
    if (args.h.taps == 0) {
      for (int64_t row = begin; row < end; ++row) {
        filter(row, out[0], out[1]);
        write(row, 2);
      }
      return;
    }
    int64_t ready = args.h.start + 2 * begin;  // the first row not yet in the ring
    for (int64_t row = begin; row < end; ++row) {
      for (; ready < args.h.start + 2 * row + args.h.taps; ++ready) {
        const int64_t slot = (ready - args.h.start) % (2 * half_h) * width;
        filter(ready, low_ring + slot, high_ring + slot);
      }
      combine(row);
    }
  }
};

template <class A>
void analyse(const DwtArgs& args, int threads) {
  const int64_t low[4] = {args.n, args.c, args.h.count, args.w.count};
  const int64_t high[5] = {args.n, args.c, args.h.taps == 0 || args.w.taps == 0 ? 1 : 3, args.h.count, args.w.count};
  advise(args.ll.data, args.ll.stride, low, Elements(args.ll_dtype, nullptr).bytes());
  advise(args.high.data, args.high.stride, high, Elements(args.high_dtype, nullptr).bytes());
  run_units<Analysis<A>, A>(args, args.h.count, threads);
}

}  // namespace

void dwt_analysis(const DwtArgs& args, int threads) {
  if (args.n * args.c * args.h.count * args.w.count == 0) return;
  by_columns(args, [&](const DwtArgs& part) {
    if (args.image_dtype == DType::f64) {
      analyse<double>(part, threads);
    } else {
      analyse<float>(part, threads);
    }
  });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
