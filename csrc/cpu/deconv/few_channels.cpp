// The transposed convolution 4x4, stride 2, on the CPU for few channels: as its definition says. Compiled once per
// instruction set.
//
// Minimal filtering (deconv.cpp) saves products and pays in sums around them, which few channels do not repay;
// they need full vectors. The images lie in a thread's cache as rows of pixels with one zero column between rows and
// one zero row between images. There every tap is a fixed offset from a pixel's place, whatever the borders, and
// neighbouring pixels with all their channels are one run of memory, so each pass is a product (gemm.h) whose left
// operand's rows overlap: nothing is gathered, and rows, images and borders need no cases. Where the columns of a
// product would fill half a vector or less, those of two neighbouring pixels stand beside each other, with zeros for
// the taps that belong to one of them alone.

#include "cpu/deconv/few_channels.h"

#include "cpu/common/pixels.h"
#include "cpu/deconv/segments.h"
#include "cpu/deconv/statistics.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

constexpr int kTaps = 4;
// Places of u at a time: with 16 channels their rows of u and both gradients' products stay within 128 KB.
constexpr int64_t kPlaces = 256;

// All rows of all images of u, a zero row behind each image's last; `pitch` places each, the last one zero.
struct Rows {
  int64_t h, w, pitch, count, at_a_time;
  Shares shares;
  explicit Rows(const DeconvArgs& a)
      : h(a.h),
        w(a.w),
        pitch(a.w + 1),
        count(a.w > 0 ? a.n * (a.h + 1) : 0),
        at_a_time(pitch < kPlaces ? kPlaces / pitch : 1),
        shares((count + at_a_time - 1) / at_a_time) {}
  int64_t begin(int64_t block) const { return block * at_a_time; }
  int64_t end(int64_t block) const { return begin(block + 1) < count ? begin(block + 1) : count; }
  bool is_zero(int64_t row) const { return row < 0 || row >= count || row % (h + 1) == h; }
};

int threads_for(const DeconvArgs& args, int threads) {
  return args.n * args.h * args.w * args.f * args.o < kSerialElements ? 1 : threads;
}

template <class T>
T* row_of(const Plane& image, const Rows& rows, int64_t row, int64_t scale = 1, int64_t parity = 0) {
  return static_cast<T*>(image.data) + row / (rows.h + 1) * image.stride[0] +
         (scale * (row % (rows.h + 1)) + parity) * image.stride[2];
}
// Pixels from a product's rows of two to where they lie `apart`.
template <class T, class A>
static inline void store_pairs(const A* from, int64_t ld, int64_t pixels, int64_t channels, T* to, int64_t apart,
                               int64_t skip = 0) {
  const int64_t pair = 2 * channels;
  if (apart == channels && ld == pair) return store_row(from + skip * channels, to, 1, pixels * channels);
  for (int64_t i = skip; i < skip + pixels; ++i, to += apart) {
    const A* one = from + i / 2 * ld + i % 2 * channels;
    if (apart == channels && i % 2 == 0 && i + 1 < skip + pixels) {
      store_run(one, to, pair);
      ++i;
      to += apart;
    } else {
      store_run(one, to, channels);
    }
  }
}

// Pixels that lie `apart`, added to a product's rows of two.
template <class T, class A>
static inline void add_pairs(const T* from, int64_t apart, int64_t pixels, int64_t channels, A* to, int64_t ld) {
  for (int64_t i = 0; i < pixels; ++i, from += apart) {
    A* __restrict one = to + i / 2 * ld + i % 2 * channels;
    WAVEMIX_SIMD
    for (int64_t c = 0; c < channels; ++c) one[c] += load(from[c]);
  }
}

// Elements read beyond a block's last place: the rest of a group of rows, taps to the right, the rest of a vector.
template <class A>
int64_t slack(int64_t channels) {
  return (2 * kGemmRows + 8) * channels + kGemmVectors * kLanes<A>;
}

// Rows [first - 1, last] of u; place p of row `first` at data + p * f.
template <class T, class A>
struct Inputs {
  const Rows& rows;
  int64_t f;
  ZeroBuffer<A> memory;
  A* data;
  Inputs(const Rows& r, int64_t channels)
      : rows(r),
        f(channels),
        memory(((r.at_a_time + 2) * r.pitch + 1) * f + slack<A>(f)),
        data(memory.data + (r.pitch + 1) * f) {}
  void fill(const Plane& u, int64_t first, int64_t last, int64_t halo) {
    for (int64_t row = first - halo; row < last + halo; ++row) {
      A* to = data + (row - first) * rows.pitch * f;
      if (rows.is_zero(row)) {
        std::memset(to, 0, static_cast<size_t>(rows.w * f) * sizeof(A));
      } else {
        load_pixels(row_of<const T>(u, rows, row), u.stride[3], rows.w, f, to);
      }
    }
  }
};

// An array over the channels (the i-th of some, or of none), repeated until it is whole vectors, for loops along the
// pixels of a row.
template <class A>
struct Repeated {
  int64_t length;
  Buffer<A> memory;
  Repeated(const A* const* arrays, int i, int64_t channels) : length(channels * kLanes<A>), memory(length) {
    for (int64_t j = 0; j < length && arrays != nullptr; ++j) memory.data[j] = arrays[i][j % channels];
  }
};

// The gradient of the output: its even and its odd rows apart, so that in each the pixels above place p of u are at 2p;
// pixel 2p of row `first` of u at data + 2 p o. Row -1 of the odd and row `last` of the even ones are taps too.
template <class T, class A>
struct Grads {
  const Rows& rows;
  int64_t o, size;
  ZeroBuffer<A> memory;
  Buffer<A> values;
  A* plane[2];
  Grads(const Rows& r, int64_t channels)
      : rows(r),
        o(channels),
        size(((r.at_a_time + 2) * 2 * r.pitch + 1) * o + slack<A>(4 * o)),
        memory(2 * size),
        values(2 * r.w * o) {
    for (int i = 0; i < 2; ++i) plane[i] = memory.data + i * size + (2 * r.pitch + 1) * o;
  }
  void fill(const DeconvArgs& args, const Repeated<A>* norm, int64_t first, int64_t last) {
    for (int64_t row = first - 1; row <= last; ++row)
      for (int parity = 0; parity < 2; ++parity) {
        if ((parity == 0 && row < first) || (parity == 1 && row == last)) continue;
        A* to = plane[parity] + (row - first) * 2 * rows.pitch * o;
        if (rows.is_zero(row)) {
          std::memset(to, 0, static_cast<size_t>(2 * rows.w * o) * sizeof(A));
          continue;
        }
        load_pixels(row_of<const T>(args.y, rows, row, 2, parity), args.y.stride[3], 2 * rows.w, o, to);
        if (norm == nullptr) continue;
        load_pixels(row_of<const T>(args.output, rows, row, 2, parity), args.output.stride[3], 2 * rows.w, o,
                    values.data);
        const int64_t length = norm[0].length;
        for (int64_t at = 0; at < 2 * rows.w * o; at += length) {
          const int64_t n = 2 * rows.w * o - at < length ? 2 * rows.w * o - at : length;
          A* __restrict g = to + at;
          const A* __restrict y = values.data + at, *a = norm[0].memory.data, *b = norm[1].memory.data,
                              *mean = norm[2].memory.data, *d = norm[3].memory.data;
          WAVEMIX_SIMD
          for (int64_t i = 0; i < n; ++i) g[i] = a[i] * g[i] + (b[i] * (y[i] - mean[i]) + d[i]);
        }
      }
  }
};

// --- The passes --------------------------------------------------------------------------------------------

template <class T>
void forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  using A = typename Arithmetic<T>::type;
  const Rows rows(args);
  if (rows.count == 0) {
    if (mean != nullptr) Statistics<A>::finish(args.o, nullptr, 0, mean, var);
    return;
  }
  threads = threads_for(args, threads);
  advise<3>(args.y.data, {args.y.stride[0], args.y.stride[2], args.y.stride[3]}, {args.n, 2 * args.h, 2 * args.w},
            static_cast<int64_t>(sizeof(T)));
  const int64_t f = args.f, o = args.o;
  // Both pixels of a row above a place of u are made together, from it and its neighbours on either side.
  const int64_t columns = 2 * o, ld = padded<A>(columns);
  const T* taps = static_cast<const T*>(args.weight);
  // The place `shift` to the right or below is behind tap parity + 1 - 2 shift of an output of that parity.
  const auto tap = [](int64_t parity, int64_t shift) { return parity + 1 - 2 * shift; };
  const auto has = [&](int64_t, int64_t pixel, int64_t j) {
    const int64_t x = tap(j / o, pixel - 1);
    return x >= 0 && x < kTaps;
  };
  const auto made_for = [&](int64_t parity) {
    return Weights<A>(2, 3, f, columns, has, [&](int64_t row, int64_t pixel, int64_t k, int64_t j) {
      const int64_t y = tap(parity, row + parity - 1), x = tap(j / o, pixel - 1);
      return load(taps[((k * o + j % o) * kTaps + y) * kTaps + x]);
    });
  };
  const Weights<A> weights[2] = {made_for(0), made_for(1)};
  const ZeroBuffer<A> offset(ld);
  if (bias != nullptr)
    for (int64_t i = 0; i < 2; ++i) load_row(static_cast<const T*>(bias), 1, o, offset.data + i * o);
  const int64_t line = Statistics<A>::line(o);
  const Buffer<double> shares(mean == nullptr ? 0 : rows.shares.count * line);
  WAVEMIX_PARALLEL(threads) {
    Inputs<T, A> u(rows, f);
    const Buffer<A> out((rows.at_a_time * rows.pitch + kGemmRows) * ld);
    const Buffer<double> scratch(2 * o);
    WAVEMIX_FOR
    for (int64_t share = 0; share < rows.shares.count; ++share) {
      Statistics<A> statistics(o, ld);
      bool any = false;
      for (int64_t block = rows.shares.begin(share); block < rows.shares.begin(share + 1); ++block) {
        const int64_t first = rows.begin(block), last = rows.end(block);
        int64_t count = 0;
        u.fill(args.u, first, last, 1);
        for (int64_t parity = 0; parity < 2; ++parity) {
          const A* above = u.data - f + (parity - 1) * rows.pitch * f;
          const A* const left[] = {above, above + rows.pitch * f};
          products<A>((last - first) * rows.pitch, left, f, weights[parity], offset.data, out.data);
          for (int64_t row = first; row < last; ++row) {
            if (rows.is_zero(row)) continue;
            A* made = out.data + (row - first) * rows.pitch * ld;
            if (args.residual.data != nullptr)
              add_pairs(row_of<const T>(args.residual, rows, row, 2, parity), args.residual.stride[3], 2 * rows.w, o,
                        made, ld);
            store_pairs(made, ld, 2 * rows.w, o, row_of<T>(args.y, rows, row, 2, parity), args.y.stride[3]);
            if (mean == nullptr) continue;
            // There is no mean yet: the first pixel is near enough.
            if (!any) statistics.center(made);
            any = true;
            statistics.add(made, rows.w);
            count += 2 * rows.w;
          }
        }
        if (mean != nullptr) statistics.finish_part(static_cast<double>(count), columns, scratch.data);
      }
      if (mean != nullptr) statistics.save(shares.data + share * line);
    }
  }
  if (mean != nullptr) Statistics<A>::finish(o, shares.data, rows.shares.count, mean, var);
}

template <class T>
void backward(const DeconvArgs& args, const DeconvGradArgs& made, int threads) {
  using A = typename Arithmetic<T>::type;
  const Rows rows(args);
  const int64_t f = args.f, o = args.o;
  const bool to_u = made.d_u.data != nullptr, to_weight = made.d_weight != nullptr;
  threads = threads_for(args, threads);
  if (to_u)
    advise<3>(made.d_u.data, {made.d_u.stride[0], made.d_u.stride[2], made.d_u.stride[3]}, {args.n, args.h, args.w},
              static_cast<int64_t>(sizeof(T)));
  // Two neighbouring places of u are made together, from the six pixels in a row that either has taps for.
  const int64_t columns = 2 * f, ld = padded<A>(columns);
  const T* taps = static_cast<const T*>(args.weight);
  const auto tap = [&](int64_t pixel, int64_t j) { return pixel - 2 * (j / f); };
  const Weights<A> weights(
      to_u ? kTaps : 0, 6, o, columns,
      [&](int64_t, int64_t pixel, int64_t j) { return tap(pixel, j) >= 0 && tap(pixel, j) < kTaps; },
      [&](int64_t y, int64_t pixel, int64_t k, int64_t j) {
        return load(taps[((j % f * o + k) * kTaps + y) * kTaps + tap(pixel, j)]);
      });
  // Each share's gradient of the weight: for each row of taps (f x (tap, o)).
  const int64_t whole_f = round_up(f, kGemmRows), wide = padded<A>(kTaps * o), size = kTaps * whole_f * wide;
  const ZeroBuffer<A> sums(to_weight ? rows.shares.count * size : 0), zero(ld > wide ? ld : wide);
  const Panels panels(wide / kLanes<A>);
  const A* const line[] = {static_cast<const A*>(args.a), static_cast<const A*>(args.b),
                           static_cast<const A*>(args.mean), static_cast<const A*>(args.d)};
  WAVEMIX_PARALLEL(threads) {
    Inputs<T, A> inputs(rows, f);
    Grads<T, A> grads(rows, o);
    const A* const* from = args.output.data == nullptr ? nullptr : line;
    const Repeated<A> norm[] = {{from, 0, o}, {from, 1, o}, {from, 2, o}, {from, 3, o}};
    const Buffer<A> out((rows.at_a_time * rows.pitch / 2 + 1 + kGemmRows) * ld), part(whole_f * wide);
    WAVEMIX_FOR
    for (int64_t share = 0; share < rows.shares.count; ++share)
      for (int64_t block = rows.shares.begin(share); block < rows.shares.begin(share + 1); ++block) {
        const int64_t first = rows.begin(block), last = rows.end(block), count = (last - first) * rows.pitch;
        grads.fill(args, from == nullptr ? nullptr : norm, first, last);
        // The taps' rows begin one pixel to the left of those above a place.
        const int64_t row = 2 * rows.pitch * o;
        const A* const tap_rows[kTaps] = {grads.plane[1] - row - o, grads.plane[0] - o, grads.plane[1] - o,
                                          grads.plane[0] + row - o};
        if (to_u) {
          products<A>((count + 1) / 2, tap_rows, 4 * o, weights, zero.data, out.data);
          for (int64_t r = first; r < last; ++r) {
            const int64_t at = (r - first) * rows.pitch;
            if (!rows.is_zero(r))
              store_pairs(out.data + at / 2 * ld, ld, rows.w, f, row_of<T>(made.d_u, rows, r), made.d_u.stride[3],
                          at % 2);
          }
        }
        if (to_weight) {
          inputs.fill(args.u, first, last, 0);
          for (int y = 0; y < kTaps; ++y) {
            // Sums of a block by themselves: two steps of additions err less than one long one.
            for (int64_t p = 0; p < panels.count; ++p) {
              const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
              gemm_panel<A, true>(vectors, whole_f, inputs.data, f, tap_rows[y] + at, 2 * o, count, zero.data,
                                  part.data + at, wide);
            }
            A* __restrict sum = sums.data + share * size + y * whole_f * wide;
            const A* __restrict of_block = part.data;
            WAVEMIX_SIMD
            for (int64_t i = 0; i < whole_f * wide; ++i) sum[i] += of_block[i];
          }
        }
      }
  }
  if (to_weight) {
    const ZeroBuffer<double> total(size);
    for (int64_t share = 0; share < rows.shares.count; ++share)
      for (int64_t i = 0; i < size; ++i) total.data[i] += static_cast<double>(sums.data[share * size + i]);
    for (int64_t i = 0; i < f; ++i)
      for (int64_t j = 0; j < o; ++j)
        for (int64_t k = 0; k < kTaps * kTaps; ++k)
          store(static_cast<T*>(made.d_weight)[(i * o + j) * kTaps * kTaps + k],
                static_cast<A>(total.data[(k / kTaps * whole_f + i) * wide + k % kTaps * o + j]));
  }
}

}  // namespace

void deconv_few_channels_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, bias, mean, var, threads); });
}
void deconv_few_channels_backward(const DeconvArgs& args, const DeconvGradArgs& grads, int threads) {
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
