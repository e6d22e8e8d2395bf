// A Waveblock's 1x1 convolution with all its Haar levels, and their gradients, on the CPU. Compiled once per
// instruction set (see isa.h).
//
// A thread takes a strip of whole 2^levels x 2^levels blocks through both: the reduced image of a strip lies in its
// cache and never reaches memory. A product reads its left operand by rows or by columns at the same speed (gemm.h), so
// an image whose pixels are contiguous is multiplied as it lies; a library would first copy all of it into another
// order.

#include "cpu/choose.h"
#include "cpu/common/products.h"
#include "cpu/reduce_haar/few_channels.h"
#include "cpu/reduce_haar/matrix_units.h"
#include "cpu/reduce_haar/strips.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

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
  Reduced(int64_t pixels, int64_t group, int64_t channels)
      : wide((pixels + group) * padded<A>(channels)),
        narrow(same ? 0 : (pixels * channels * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(A)) + 1)),
        stride(padded<A>(channels)),
        apart(same ? stride : channels) {
    wide.clear((pixels + group) * stride);
  }
  Plane plane(const Strip& s) { return {image(), {0, 1, s.columns * apart, apart}}; }
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
  const RightOperand<T, A> weights(args.c, args.o, weight, args.weight_stride[1], args.weight_stride[0], threads,
                                   !pixels_inner(args));
  const ZeroBuffer<A> offset(padded<A>(args.o));
  if (args.bias != nullptr) load_row(static_cast<const T*>(args.bias), args.bias_stride, args.o, offset.data);
  const bool by_channel = pixels_inner(args);
  const Panels panels(padded<A>(args.o) / kLanes<A>);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(weights.units);
    const Block<A> x(by_channel ? args.c : round_up(strips.columns, weights.rows()),
                     by_channel ? round_up(strips.columns, kGemmRows) : args.c);
    Reduced<T, A> r(strips.pixels, weights.rows(), args.o);
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      const int64_t whole = round_up(s.columns, weights.rows());
      for (int64_t row = 0; row < s.rows; ++row) {
        const T* from = pixel<const T>(args.x, s, row);
        A* to = r.wide.data + row * s.columns * r.stride;
        if (by_channel) {
          const Columns<T, A> a(from, args.x.stride[1], args.c, s.columns, s.columns == whole, x);
          for (int64_t p = 0; p < panels.count; ++p) {
            const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
            gemm_panel<A, true>(vectors, whole, a.data, a.stride, weights.memory.data + args.c * at,
                                vectors * kLanes<A>, args.c, offset.data + at, to + at, r.stride);
          }
        } else {
          const Rows<T, A> a(from, args.x.stride[3], s.columns, x);
          product(whole, a.data, a.stride, weights, offset.data, to, r.stride);
        }
      }
      r.to_image(s.rows * s.columns, args.o);
      haar_analysis(haar_of(args, s, 1, r.plane(s), static_cast<int64_t>(sizeof(T))), 1);
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
  const ZeroBuffer<A> left(by_channel ? args.o * c : 0), zero(c > wide ? c : wide);
  const RightOperand<T, A> right(args.o, args.c, weight, args.weight_stride[0], args.weight_stride[1], threads,
                                 !by_channel);
  if (by_channel)
    for (int64_t k = 0; k < args.o; ++k)
      for (int64_t j = 0; j < args.c; ++j) left.data[k * c + j] = element(k, j);
  const int64_t at_bias = c * o, size = at_bias + o;
  const Buffer<A> sums(threads * size);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(right.units);
    const int64_t whole = round_up(strips.columns, right.rows());
    const Block<A> x(by_channel ? c : whole, by_channel ? strips.columns : args.c);
    const Block<A> d_x(by_channel ? c : whole, by_channel ? strips.columns : args.c);
    Reduced<T, A> r(strips.pixels, right.rows(), args.o);
    const Buffer<A> packed(args.o * wide), line(c > wide ? c : wide);
    const Buffer<A> memory(right.units ? transpose_scratch(o, args.c, strips.columns) / 2 : 0);
    T* const ordered = right.units ? reinterpret_cast<T*>(memory.data) : nullptr;
    A* sum = sums.data + WAVEMIX_THREAD * size;
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(sums.data + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      haar_synthesis(haar_of(args, s, 1, r.plane(s), static_cast<int64_t>(sizeof(T))), 1);
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
            gemm_panel<A, true>(vectors, round_up(args.c, kGemmRows), left.data, c, packed.data + args.o * at,
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
          product(round_up(s.columns, right.rows()), reduced, r.stride, right, zero.data, d_x.data, d_x.stride);
          const Rows<T, A> a(from, args.x.stride[3], s.columns, x);
          add_product_of_transpose(o, args.c, s.columns, reduced, r.stride, a.data, a.stride, sum, c, ordered);
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
  const choose::ReduceHaar way = choose::reduce_haar_forward(args);
  if (way == choose::ReduceHaar::few_channels) return reduce_haar_few_channels(args, threads);
  if (way == choose::ReduceHaar::matrix_units) return reduce_haar_matrix_units(args, threads);
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}
void reduce_haar_backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  if (choose::reduce_haar(args) == choose::ReduceHaar::few_channels)
    return reduce_haar_few_channels_backward(args, grads, threads);
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
