// A Waveblock's 1x1 convolution with all its Haar levels, and their gradients, on the CPU. Compiled once per
// instruction set (see isa.h).
//
// A thread takes a strip of whole 2^levels x 2^levels blocks through both: the reduced image of a strip lies in its
// cache and never reaches memory. A product reads its left operand by rows or by columns at the same speed (gemm.h), so
// an image whose pixels are contiguous is multiplied as it lies; a library would first copy all of it into another
// order.

#include "cpu/choose.h"
#include "cpu/common/operands.h"
#include "cpu/reduce_haar/few_channels.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// A strip has this many, if its blocks are small enough: with 64 reduced channels 128 KB of float.
constexpr int64_t kPixels = 512;

struct Strip {
  int64_t n, row, column, rows, columns;
};
struct Strips {
  int64_t rows, columns, down, across, count, pixels;
  explicit Strips(const ReduceHaarArgs& a) {
    const int64_t unit = int64_t{1} << a.levels;
    columns = kPixels / unit / unit * unit;
    columns = columns < unit ? unit : columns;
    columns = a.w < columns ? a.w : columns;
    rows = kPixels / (unit * (columns > 0 ? columns : 1)) * unit;
    rows = rows < unit ? unit : rows;
    rows = a.h < rows ? a.h : rows;
    pixels = rows * columns;
    down = rows > 0 ? (a.h + rows - 1) / rows : 0;
    across = columns > 0 ? (a.w + columns - 1) / columns : 0;
    count = a.n * down * across;
  }
  Strip get(const ReduceHaarArgs& a, int64_t i) const {
    const int64_t row = i / across % down * rows, column = i % across * columns;
    return {i / (down * across), row, column, a.h - row < rows ? a.h - row : rows,
            a.w - column < columns ? a.w - column : columns};
  }
};

template <class T>
T* pixel(const Plane& image, const Strip& s, int64_t row) {
  return static_cast<T*>(image.data) + s.n * image.stride[0] + (s.row + row) * image.stride[2] +
         s.column * image.stride[3];
}
// The Haar transform between a strip of the reduced image, whose pixels are `apart`, and its place in the pyramid.
HaarArgs haar_of(const ReduceHaarArgs& args, const Strip& s, void* reduced, int64_t apart, int64_t element) {
  HaarArgs haar;
  haar.dtype = args.dtype;
  haar.levels = args.levels;
  haar.n = 1;
  haar.c = args.o;
  haar.h = s.rows;
  haar.w = s.columns;
  haar.image = {reduced, {0, 1, s.columns * apart, apart}};
  for (int l = 1; l <= args.levels; ++l) {
    const Plane& z = args.z[l - 1];
    char* at = static_cast<char*>(z.data) +
               element * (s.n * z.stride[0] + (s.row >> l) * z.stride[2] + (s.column >> l) * z.stride[3]);
    const Plane low = {at, {z.stride[0], 1, z.stride[2], z.stride[3]}};
    if (l == args.levels) {
      haar.ll = low;
    } else {
      haar.low[l - 1] = low;
    }
    haar.high[l - 1] = {at + element * args.o, {z.stride[0], 3, 1, z.stride[2], z.stride[3]}};
  }
  return haar;
}

// Rows of an operand where they lie, if a product can read them there (whole groups of rows and vectors, no
// conversion), else copied to `block`.
template <class T, class A>
struct Rows {
  const A* data;
  int64_t stride;
  Rows(const T* from, int64_t apart, int64_t rows, const Block<A>& block) : data(block.data), stride(block.stride) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (rows % kGemmRows == 0 && block.columns == block.stride) {
        data = reinterpret_cast<const A*>(from);
        stride = apart;
        return;
      }
    }
    load_rows(from, apart, rows, block);
  }
};
// The same for an operand read by columns: channels `apart`, pixels contiguous.
template <class T, class A>
struct Columns {
  const A* data;
  int64_t stride;
  Columns(const T* from, int64_t apart, int64_t channels, int64_t pixels, bool whole, const Block<A>& block)
      : data(block.data), stride(block.stride) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (whole) {
        data = reinterpret_cast<const A*>(from);
        stride = apart;
        return;
      }
    }
    for (int64_t c = 0; c < channels; ++c) load_row(from + c * apart, 1, pixels, block.data + c * block.stride);
  }
};

// The reduced image of a strip in the images' dtype: the products' own memory where that is the arithmetic type.
template <class T, class A>
struct Reduced {
  Buffer<A> wide;
  Buffer<A> narrow;  // large enough for T
  int64_t stride, apart;
  static constexpr bool same = sizeof(T) == sizeof(A);
  // A product writes whole groups of rows: up to a group more than there are, which the next row of pixels overwrites.
  Reduced(int64_t pixels, int64_t channels)
      : wide((pixels + kGemmRows) * padded<A>(channels)),
        narrow(same ? 0 : (pixels * channels * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(A)) + 1)),
        stride(padded<A>(channels)),
        apart(same ? stride : channels) {
    wide.clear((pixels + kGemmRows) * stride);
  }
  T* image() { return same ? reinterpret_cast<T*>(wide.data) : reinterpret_cast<T*>(narrow.data); }
  void to_image(int64_t pixels, int64_t channels) {
    if (same) return;
    for (int64_t i = 0; i < pixels; ++i) store_row(wide.data + i * stride, image() + i * apart, 1, channels);
  }
  void from_image(int64_t pixels, int64_t channels) {
    if (same) return;
    for (int64_t i = 0; i < pixels; ++i) load_row(image() + i * apart, 1, channels, wide.data + i * stride);
  }
};

template <class T>
void forward(const ReduceHaarArgs& args, int threads) {
  using A = typename Arithmetic<T>::type;
  const Strips strips(args);
  threads = threads_for(args, threads);
  for (int l = 0; l < args.levels; ++l)
    advise<3>(args.z[l].data, {args.z[l].stride[0], args.z[l].stride[2], args.z[l].stride[3]},
              {args.n, args.h >> (l + 1), args.w >> (l + 1)}, static_cast<int64_t>(sizeof(T)));
  const T* weight = static_cast<const T*>(args.weight);
  const Buffer<A> weights(args.c * padded<A>(args.o));
  const ZeroBuffer<A> offset(padded<A>(args.o));
  pack(args.c, args.o, weights.data,
       [&](int64_t k, int64_t j) { return load(weight[j * args.weight_stride[0] + k * args.weight_stride[1]]); });
  if (args.bias != nullptr) load_row(static_cast<const T*>(args.bias), args.bias_stride, args.o, offset.data);
  const bool by_channel = pixels_inner(args);
  const Panels panels(padded<A>(args.o) / kLanes<A>);
  WAVEMIX_PARALLEL(threads) {
    const Block<A> x(by_channel ? args.c : round_up(strips.columns, kGemmRows),
                     by_channel ? round_up(strips.columns, kGemmRows) : args.c);
    Reduced<T, A> r(strips.pixels, args.o);
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      const int64_t whole = round_up(s.columns, kGemmRows);
      for (int64_t row = 0; row < s.rows; ++row) {
        const T* from = pixel<const T>(args.x, s, row);
        A* to = r.wide.data + row * s.columns * r.stride;
        if (by_channel) {
          const Columns<T, A> a(from, args.x.stride[1], args.c, s.columns, s.columns == whole, x);
          for (int64_t p = 0; p < panels.count; ++p) {
            const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
            gemm_panel<A, true>(vectors, whole, a.data, a.stride, weights.data + args.c * at, vectors * kLanes<A>,
                                args.c, offset.data + at, to + at, r.stride);
          }
        } else {
          const Rows<T, A> a(from, args.x.stride[3], s.columns, x);
          product(whole, args.o, args.c, a.data, a.stride, weights.data, offset.data, to, r.stride);
        }
      }
      r.to_image(s.rows * s.columns, args.o);
      haar_analysis(haar_of(args, s, r.image(), r.apart, static_cast<int64_t>(sizeof(T))), 1);
    }
  }
}

template <class T>
void backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  const Strips strips(args);
  threads = threads_for(args, threads);
  advise<4>(grads.d_x.data, grads.d_x.stride, {args.n, args.c, args.h, args.w}, static_cast<int64_t>(sizeof(T)));
  const T* weight = static_cast<const T*>(args.weight);
  const auto element = [&](int64_t k, int64_t j) {
    return load(weight[k * args.weight_stride[0] + j * args.weight_stride[1]]);
  };
  const bool by_channel = pixels_inner(args);
  const int64_t c = padded<A>(args.c), o = padded<A>(args.o), wide = padded<A>(strips.columns);
  // The weight as left operand (o x c, read by columns) or as right one.
  const ZeroBuffer<A> weights(args.o * c), zero(c > wide ? c : wide);
  if (by_channel) {
    for (int64_t k = 0; k < args.o; ++k)
      for (int64_t j = 0; j < args.c; ++j) weights.data[k * c + j] = element(k, j);
  } else {
    pack(args.o, args.c, weights.data, element);
  }
  const int64_t at_bias = c * o, size = at_bias + o;
  const Buffer<A> sums(threads * size);
  WAVEMIX_PARALLEL(threads) {
    const Block<A> x(by_channel ? c : round_up(strips.columns, kGemmRows), by_channel ? strips.columns : args.c);
    const Block<A> d_x(by_channel ? c : round_up(strips.columns, kGemmRows), by_channel ? strips.columns : args.c);
    Reduced<T, A> r(strips.pixels, args.o);
    const Buffer<A> packed(args.o * wide), line(c > wide ? c : wide);
    A* sum = sums.data + WAVEMIX_THREAD * size;
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(sums.data + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      haar_synthesis(haar_of(args, s, r.image(), r.apart, static_cast<int64_t>(sizeof(T))), 1);
      r.from_image(s.rows * s.columns, args.o);
      for (int64_t row = 0; row < s.rows; ++row) {
        const A* reduced = r.wide.data + row * s.columns * r.stride;
        const T* from = pixel<const T>(args.x, s, row);
        T* to = pixel<T>(grads.d_x, s, row);
        const T* also = grads.add.data == nullptr ? nullptr : pixel<const T>(grads.add, s, row);
        int64_t lines = s.columns, length = args.c, apart = grads.d_x.stride[3], also_apart = grads.add.stride[3];
        if (by_channel) {
          lines = args.c;
          length = s.columns;
          apart = grads.d_x.stride[1];
          also_apart = grads.add.stride[1];
          // d_x (c x pixels), and d_weight (c x o) = x r.
          pack(args.o, s.columns, packed.data, [&](int64_t k, int64_t j) { return reduced[j * r.stride + k]; });
          const Panels across(padded<A>(s.columns) / kLanes<A>);
          for (int64_t p = 0; p < across.count; ++p) {
            const int64_t vectors = across.begin(p + 1) - across.begin(p), at = across.begin(p) * kLanes<A>;
            gemm_panel<A, true>(vectors, round_up(args.c, kGemmRows), weights.data, c, packed.data + args.o * at,
                                vectors * kLanes<A>, args.o, zero.data + at, d_x.data + at, d_x.stride);
          }
          const Columns<T, A> a(from, args.x.stride[1], args.c, s.columns, args.c % kGemmRows == 0, x);
          const Panels panels(o / kLanes<A>);
          for (int64_t p = 0; p < panels.count; ++p) {
            const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
            gemm_panel<A, false>(vectors, round_up(args.c, kGemmRows), a.data, a.stride, reduced + at, r.stride,
                                 s.columns, nullptr, sum + at, o);
          }
        } else {
          // d_x (pixels x c), and d_weight (o x c) = transpose(r) x.
          product(round_up(s.columns, kGemmRows), args.c, args.o, reduced, r.stride, weights.data, zero.data, d_x.data,
                  d_x.stride);
          const Rows<T, A> a(from, args.x.stride[3], s.columns, x);
          add_product_of_transpose(o, args.c, s.columns, reduced, r.stride, a.data, a.stride, sum, c);
        }
        for (int64_t j = 0; j < lines; ++j) {
          A* out = d_x.data + j * d_x.stride;
          if (also != nullptr) {
            load_row(also + j * also_apart, 1, length, line.data);
            for (int64_t k = 0; k < length; ++k) out[k] += line.data[k];
          }
          store_row(out, to + j * apart, 1, length);
        }
        for (int64_t j = 0; j < o; j += kLanes<A>) {
          A part[kLanes<A>] = {};
          for (int64_t p = 0; p < s.columns; ++p)
            for (int64_t k = 0; k < kLanes<A>; ++k) part[k] += reduced[p * r.stride + j + k];
          for (int64_t k = 0; k < kLanes<A>; ++k) sum[at_bias + j + k] += part[k];
        }
      }
    }
  }
  finish_sums<T>(sums.data, size, threads, args.o, args.c, by_channel ? 1 : c, by_channel ? o : 1, grads.d_weight);
  finish_sums<T>(sums.data + at_bias, size, threads, 1, args.o, o, 1, grads.d_bias);
}

}  // namespace

void reduce_haar(const ReduceHaarArgs& args, int threads) {
  if (choose::reduce_haar(args) == choose::ReduceHaar::few_channels) return reduce_haar_few_channels(args, threads);
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}
void reduce_haar_backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  if (choose::reduce_haar(args) == choose::ReduceHaar::few_channels)
    return reduce_haar_few_channels_backward(args, grads, threads);
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
