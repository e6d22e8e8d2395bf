// One level of wavelet analysis on the CPU. Compiled once per instruction set (see isa.h).
//
// Each image row is read once, filtered along w into a ring of as many rows as a filter spans, and the ring's columns
// make the four bands' next row: what lies between the two axes never leaves the cache.

#include "cpu/dwt/lines.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Rows first ... last - 1.
struct Range {
  int64_t first, last;
};

template <class A>
struct Analysis {
  const DwtArgs& args;
  const DwtArgs& source;  // has the rows of the image that `args` has not
  Range held;
  const int64_t reach_w, width;  // elements of a filtered row
  const int64_t span;            // samples of an extended row that are read, from w.start on
  const int64_t ring_rows;
  const A *low_w, *high_w, *low_h, *high_h;
  A *line, *phase[2], *sum;  // the extended row, and its samples by their place in a step of `stride`
  const A** samples_of;      // of coefficient 0 and the next ones, for each tap along w
  A* out[4];
  A *low_ring, *high_ring;  // row start + spacing * r of the extended image at r % ring_rows
  int64_t* slot_of;         // where the ring holds the row of each tap
  int64_t n = 0, c = 0;

  static int64_t scratch_bytes(const DwtArgs& args) {
    return Analysis(args, nullptr).line_up(nullptr) * static_cast<int64_t>(sizeof(A));
  }
  Analysis(const DwtArgs& args, A* block) : Analysis(args, block, args) {}
  Analysis(const DwtArgs& args, A* block, const DwtArgs& source)
      : args(args),
        source(source),
        held{0, args.h.size},
        reach_w(args.w.reach()),
        width(row_elements<A>(args.w.count)),
        span(args.w.spacing * (args.w.stride * (args.w.count + reach_w) - 1) + 1),
        ring_rows(args.h.taps == 0 ? 0 : args.h.dilation * (args.h.taps - 1) + 1),
        low_w(static_cast<const A*>(args.w.low)),
        high_w(static_cast<const A*>(args.w.high)),
        low_h(static_cast<const A*>(args.h.low)),
        high_h(static_cast<const A*>(args.h.high)) {
    line_up(block);
    if (block == nullptr) return;
    // Read past the samples, and multiplied by nothing that is kept.
    for (int64_t i = 0; i < width + reach_w; ++i) phase[0][i] = phase[1][i] = A(0);
    for (int64_t t = 0; t < args.w.taps; ++t)
      samples_of[t] = phase[args.w.dilation * t % args.w.stride] + args.w.dilation * t / args.w.stride;
  }
  int64_t line_up(A* block) {
    Rows<A> rows(block);
    const int64_t whole = args.w.size - args.w.start + args.w.border.after;
    line = rows.take(whole > span ? whole : span);
    sum = rows.take(args.w.size);
    for (A*& row : phase) row = rows.take(width + reach_w);
    slot_of = rows.template take<int64_t>(args.h.taps);
    samples_of = rows.template take<const A*>(args.w.taps);
    for (A*& row : out) row = rows.take(width);
    low_ring = rows.take(ring_rows * width);
    high_ring = rows.take(ring_rows * width);
    return rows.used;
  }

  void point_at(int64_t sample, int64_t channel) {
    n = sample;
    c = channel;
  }

  void read(int64_t y, A* to) const {
    const DwtArgs& from = y >= held.first && y < held.last ? args : source;
    const Plane& p = from.image;
    load_line(Elements(from.image_dtype, p.data), n * p.stride[0] + c * p.stride[1] + y * p.stride[2], p.stride[3],
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
    for (int64_t i = args.w.size + b.after; i < args.w.start + span; ++i) x[i] = A(0);
  }
  void split() const {
    const int64_t steps = args.w.count + reach_w - 1, spacing = args.w.spacing;
    if (args.w.stride == 1) {
      for (int64_t k = 0; k < steps; ++k) phase[0][k] = line[spacing * k];
    } else if (spacing == 1) {
      for (int64_t k = 0; k < steps; ++k) {
        phase[0][k] = line[2 * k];
        phase[1][k] = line[2 * k + 1];
      }
    } else {
      for (int64_t k = 0; k < steps; ++k) {
        phase[0][k] = line[2 * spacing * k];
        phase[1][k] = line[spacing * (2 * k + 1)];
      }
    }
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
    split();
    constexpr int64_t kLane = kLanes<A>;
    for (int64_t k = 0; k < args.w.count; k += kAtOnce * kLane) {
      Vec<A> l[kAtOnce] = {}, h[kAtOnce] = {};
      for (int64_t t = 0; t < args.w.taps; ++t) {
        const A* from = samples_of[t] + k;
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
    for (int64_t t = 0; t < args.h.taps; ++t)
      slot_of[t] = (args.h.stride * row + args.h.dilation * t) % ring_rows * width;
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
    int64_t ready = args.h.stride * begin;  // the first row not yet in the ring
    for (int64_t row = begin; row < end; ++row) {
      for (; ready < args.h.stride * row + ring_rows; ++ready) {
        const int64_t slot = ready % ring_rows * width;
        filter(args.h.start + args.h.spacing * ready, low_ring + slot, high_ring + slot);
      }
      combine(row);
    }
  }
};

// The rows of the image that rows begin ... end - 1 of the coefficients read.
Range rows_read(const DwtAxis& h, int64_t begin, int64_t end) {
  const int64_t top = h.start + h.spacing * h.stride * begin;
  const int64_t bottom = h.start + h.spacing * (h.stride * (end - 1) + h.dilation * (h.taps - 1));
  return {top < 0 ? 0 : top < h.size ? top : h.size, bottom < 0 ? 0 : bottom < h.size ? bottom + 1 : h.size};
}

// An image whose channels lie side by side: a group of them is laid out by rows in a tile that stays in the cache. Rows
// that a border takes from elsewhere are read where they are.
template <class A>
void analyse_channels_inner(const DwtArgs& args, int threads) {
  constexpr int64_t kGroup = 16, kTileBytes = 1 << 20;
  const int64_t groups = (args.c + kGroup - 1) / kGroup, width = args.w.size;
  const int64_t held = kTileBytes / (kGroup * width * static_cast<int64_t>(sizeof(A)));
  int64_t run = held / (args.h.stride * args.h.spacing) - args.h.reach();
  if (run < args.h.reach()) run = args.h.reach();
  const int64_t runs = (args.h.count + run - 1) / run;
  int64_t tallest = 0;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t end = (i + 1) * run < args.h.count ? (i + 1) * run : args.h.count;
    const Range range = rows_read(args.h, i * run, end);
    if (range.last - range.first > tallest) tallest = range.last - range.first;
  }
  if (args.n * args.c * args.h.size * width < kSerialElements) threads = 1;
  WAVEMIX_PARALLEL(threads) {
    Scratch memory(kGroup * tallest * width * static_cast<int64_t>(sizeof(A)));
    A* tile = reinterpret_cast<A*>(memory.block);
    DwtArgs rows = args;
    rows.image_dtype = sizeof(A) == sizeof(double) ? DType::f64 : DType::f32;
    rows.image.stride[0] = 0;
    rows.image.stride[1] = tallest * width;
    rows.image.stride[2] = width;
    rows.image.stride[3] = 1;
    Scratch scratch(Analysis<A>::scratch_bytes(args));
    Analysis<A> worker(rows, reinterpret_cast<A*>(scratch.block), args);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < args.n * groups * runs; ++unit) {
      const int64_t n = unit / (groups * runs), channel = unit / runs % groups * kGroup, begin = unit % runs * run;
      const int64_t end = begin + run < args.h.count ? begin + run : args.h.count;
      const int64_t channels = args.c - channel < kGroup ? args.c - channel : kGroup;
      const Range range = worker.held = rows_read(args.h, begin, end);
      const Plane& p = args.image;
      const Elements image(args.image_dtype, p.data);
      dispatch(args.image_dtype, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(typename Arithmetic<T>::type) == sizeof(A))
          for (int64_t y = range.first; y < range.last; ++y) {
            const T* from = static_cast<const T*>(image.at(n * p.stride[0] + channel + y * p.stride[2]));
            A* to = tile + (y - range.first) * width;
            for (int64_t x = 0; x < width; ++x)
              for (int64_t c = 0; c < channels; ++c) to[c * tallest * width + x] = load(from[x * p.stride[3] + c]);
          }
      });
      rows.image.data = tile - channel * rows.image.stride[1] - range.first * width;
      for (int64_t c = channel; c < channel + channels; ++c) {
        worker.point_at(n, c);
        worker.run(begin, end);
      }
    }
  }
}

template <class A>
void analyse(const DwtArgs& args, int threads) {
  const int64_t low[4] = {args.n, args.c, args.h.count, args.w.count};
  const int64_t high[5] = {args.n, args.c, args.h.taps == 0 || args.w.taps == 0 ? 1 : 3, args.h.count, args.w.count};
  advise(args.ll.data, args.ll.stride, low, Elements(args.ll_dtype, nullptr).bytes());
  advise(args.high.data, args.high.stride, high, Elements(args.high_dtype, nullptr).bytes());
  if (args.image.stride[1] == 1 && args.c > 1 && args.h.taps != 0 && args.w.taps != 0) {
    analyse_channels_inner<A>(args, threads);
  } else {
    run_units<Analysis<A>, A>(args, args.h.count, threads);
  }
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
