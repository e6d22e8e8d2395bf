// One level of wavelet synthesis, the exact transpose of analysis, on the CPU. Compiled once per instruction set (see
// isa.h).
//
// An image row is a sum of rows of each band along h, as many as a sample reaches, then along w by phases. What falls
// outside the image goes back to where its samples came from: along w within the row, along h by rows of the border
// that are made again for the rows they belong to.

#include "cpu/dwt/lines.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

template <class A>
struct Synthesis {
  const DwtArgs& args;
  const int64_t reach_w, reach_h;
  const int64_t width;   // elements of a row of coefficients
  const int64_t margin;  // zeros before and behind them
  const int64_t steps;   // of `stride` samples in an extended row
  const A *low_w, *high_w, *low_h, *high_h;
  A *line, *phase[2], *joined[2];
  A* there;           // where args.add: a row of the image
  A* ring;            // rows k of LL, LH, HL and HH at k % slots
  int64_t* held;      // k of each slot
  const A** rows_of;  // rows of LL that an image row adds up
  int64_t* tap_of;    // and the taps that weight them
  int64_t n = 0, c = 0;

  static int64_t most_steps(const DwtAxis& w) {
    const int64_t filtered = w.count + w.reach(), step = w.spacing * w.stride;
    const int64_t image = (w.size - w.start + step - 1) / step;
    return filtered > image ? filtered : image;
  }
  static int64_t scratch_bytes(const DwtArgs& args) {
    return Synthesis(args, nullptr).line_up(nullptr) * static_cast<int64_t>(sizeof(A));
  }
  Synthesis(const DwtArgs& args, A* block)
      : args(args),
        reach_w(args.w.reach()),
        reach_h(args.h.reach()),
        width(row_elements<A>(args.w.count)),
        margin(round_up(reach_w, kLanes<A>)),
        steps(most_steps(args.w)),
        low_w(static_cast<const A*>(args.w.low)),
        high_w(static_cast<const A*>(args.w.high)),
        low_h(static_cast<const A*>(args.h.low)),
        high_h(static_cast<const A*>(args.h.high)) {
    line_up(block);
    if (block == nullptr) return;
    for (A* row : joined)
      for (int64_t i = -margin; i < joined_elements() - margin; ++i) row[i] = A(0);
    for (int64_t i = 0; i < 4 * slots() * width; ++i) ring[i] = A(0);
    point_at(0, 0);
  }
  int64_t slots() const { return reach_h + 1; }
  int64_t joined_elements() const { return 2 * margin + (steps > width ? row_elements<A>(steps) : width); }
  int64_t line_elements() const { return args.w.spacing * args.w.stride * steps; }
  int64_t line_up(A* block) {
    Rows<A> rows(block);
    for (A*& row : phase) row = rows.take(row_elements<A>(steps));
    for (A*& row : joined) row = rows.take(joined_elements()) + (block == nullptr ? 0 : margin);
    line = rows.take(line_elements());
    there = rows.take(args.add ? args.w.size : 0);
    ring = rows.take(4 * slots() * width);
    held = rows.template take<int64_t>(slots());
    rows_of = rows.template take<const A*>(args.h.taps);
    tap_of = rows.template take<int64_t>(args.h.taps);
    return rows.used;
  }
  void point_at(int64_t sample, int64_t channel) {
    n = sample;
    c = channel;
    for (int64_t i = 0; i < slots(); ++i) held[i] = -1;
  }

  const A* bands(int64_t k) const {
    A* row = ring + k % slots() * 4 * width;
    if (held[k % slots()] != k) {
      held[k % slots()] = k;
      const Plane& p = args.ll;
      load_line(Elements(args.ll_dtype, p.data), n * p.stride[0] + c * p.stride[1] + k * p.stride[2], p.stride[3],
                args.w.count, row);
      const Bands& s = args.high;
      if (s.data != nullptr)
        for (int i = 0; i < (args.w.taps == 0 ? 1 : 3); ++i)
          load_line(Elements(args.high_dtype, s.data),
                    n * s.stride[0] + c * s.stride[1] + i * s.stride[2] + k * s.stride[3], s.stride[4], args.w.count,
                    row + (i + 1) * width);
    }
    return row;
  }
  // Adds `weight` times row y of the extended image, before the pass along w, to the joined rows, or begins with it.
  // False where no row of coefficients reaches it.
  bool join(int64_t y, A weight, bool begin) const {
    const DwtAxis& h = args.h;
    const int64_t above = (y - h.start) / h.spacing;
    int64_t count = 0;
    if ((y - h.start) % h.spacing == 0)
      for (int64_t tap = h.taps - 1; tap >= 0; --tap) {
        const int64_t from = above - h.dilation * tap;
        if (from < 0 || from % h.stride != 0 || from / h.stride >= h.count) continue;
        rows_of[count] = bands(from / h.stride);
        tap_of[count++] = tap;
      }
    if (count == 0 && !begin) return false;
    if (args.w.taps == 0) {
      join<1>(weight, begin, count);
    } else {
      join<2>(weight, begin, count);
    }
    return count > 0;
  }
  template <int rows>
  void join(A weight, bool begin, int64_t count) const {
    constexpr int64_t kLane = kLanes<A>;
    for (int64_t x = 0; x < args.w.count; x += kAtOnce * kLane) {
      Vec<A> sum[rows][kAtOnce] = {};
      for (int64_t i = 0; i < count; ++i) {
        const A low = low_h[tap_of[i]], high = high_h[tap_of[i]];
        for (int r = 0; r < rows; ++r) {
          const A* row = rows_of[i] + 2 * r * width + x;
          for (int v = 0; v < kAtOnce; ++v, row += kLane) sum[r][v] += low * get(row) + high * get(row + width);
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kAtOnce; ++v) {
          A* to = joined[r] + x + v * kLane;
          put(to, begin ? weight * sum[r][v] : get(to) + weight * sum[r][v]);
        }
    }
  }
  // The joined rows of a transform along w alone.
  void read(int64_t y) const {
    const Plane& p = args.ll;
    load_line(Elements(args.ll_dtype, p.data), n * p.stride[0] + c * p.stride[1] + y * p.stride[2], p.stride[3],
              args.w.count, joined[0]);
    const Bands& s = args.high;
    if (s.data != nullptr)
      load_line(Elements(args.high_dtype, s.data), n * s.stride[0] + c * s.stride[1] + y * s.stride[3], s.stride[4],
                args.w.count, joined[1]);
  }
  void expand() const {
    if (args.w.stride == 1) {
      expand<1>();
    } else {
      expand<2>();
    }
    const int64_t spacing = args.w.spacing;
    if (spacing > 1)  // samples between the filter's
      for (int64_t x = 0; x < line_elements(); ++x) line[x] = A(0);
    if (args.w.stride == 1) {
      for (int64_t m = 0; m < steps; ++m) line[spacing * m] = phase[0][m];
    } else if (spacing == 1) {
      for (int64_t m = 0; m < steps; ++m) {
        line[2 * m] = phase[0][m];
        line[2 * m + 1] = phase[1][m];
      }
    } else {
      for (int64_t m = 0; m < steps; ++m) {
        line[2 * spacing * m] = phase[0][m];
        line[spacing * (2 * m + 1)] = phase[1][m];
      }
    }
  }
  template <int stride>
  void expand() const {
    constexpr int64_t kLane = kLanes<A>;
    const int64_t taps = args.w.taps, apart = stride == 2 ? 1 : args.w.dilation;
    for (int64_t m = 0; m < steps; m += kAtOnce * kLane) {
      Vec<A> sum[stride][kAtOnce] = {};
      for (int64_t t = 0, back = 0; t < taps; t += stride, back += apart) {
        const bool both = stride == 2 && t + 1 < taps;
        for (int v = 0; v < kAtOnce; ++v) {
          const Vec<A> l = get(joined[0] + m - back + v * kLane), h = get(joined[1] + m - back + v * kLane);
          sum[0][v] += low_w[t] * l + high_w[t] * h;
          if (both) sum[stride - 1][v] += low_w[t + 1] * l + high_w[t + 1] * h;
        }
      }
      for (int p = 0; p < stride; ++p)
        for (int v = 0; v < kAtOnce; ++v) put(phase[p] + m + v * kLane, sum[p][v]);
    }
  }
  void fold() const {
    A* x = line - args.w.start;
    const DwtBorder& b = args.w.border;
    for (int64_t i = 0; i < b.before + b.after; ++i) {
      const int64_t from = i < b.before ? i - b.before : args.w.size + i - b.before;
      if (from < args.w.start || from - args.w.start >= line_elements()) continue;
      for (int64_t t = b.begin[i]; t < b.begin[i + 1]; ++t) x[b.index[t]] += static_cast<A>(b.weight[t]) * x[from];
    }
  }
  void add_to_line(int64_t offset) const {
    const Plane& p = args.image;
    load_line(Elements(args.image_dtype, p.data), offset, p.stride[3], args.w.size, there);
    A* __restrict to = line - args.w.start;
    for (int64_t x = 0; x < args.w.size; ++x) to[x] += there[x];
  }
  void run(int64_t begin, int64_t end) const {
    const DwtBorder& b = args.h.border;
    const Plane& p = args.image;
    for (int64_t y = begin; y < end; ++y) {
      bool reached = true;
      if (args.h.taps == 0) {
        read(y);
      } else {
        reached = join(y, A(1), true);
      }
      for (int64_t i = 0; i < b.before + b.after; ++i)
        for (int64_t t = b.begin[i]; t < b.begin[i + 1]; ++t)
          if (b.index[t] == y &&
              join(i < b.before ? i - b.before : args.h.size + i - b.before, static_cast<A>(b.weight[t]), false))
            reached = true;
      if (args.add && !reached) continue;
      const int64_t offset = n * p.stride[0] + c * p.stride[1] + y * p.stride[2];
      if (args.w.taps != 0 && reached) {
        expand();
        fold();
        if (args.add) add_to_line(offset);
      } else if (args.w.taps != 0) {
        for (int64_t x = 0; x < line_elements(); ++x) line[x] = A(0);
      }
      store_line(args.w.taps == 0 ? joined[0] : line - args.w.start, Elements(args.image_dtype, p.data), offset,
                 p.stride[3], args.w.size);
    }
  }
};

template <class A>
void synthesise(const DwtArgs& args, int threads) {
  const int64_t full[4] = {args.n, args.c, args.h.size, args.w.size};
  advise(args.image.data, args.image.stride, full, Elements(args.image_dtype, nullptr).bytes());
  run_units<Synthesis<A>, A>(args, args.h.size, threads);
}

}  // namespace

void dwt_synthesis(const DwtArgs& args, int threads) {
  if (args.n * args.c * args.h.size * args.w.size == 0) return;
  by_columns(args, [&](const DwtArgs& part) {
    if (args.image_dtype == DType::f64) {
      synthesise<double>(part, threads);
    } else {
      synthesise<float>(part, threads);
    }
  });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
