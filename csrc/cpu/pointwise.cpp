// 1x1 convolutions from and to images in either memory order, on the CPU. Compiled once per instruction set.
//
// A product reads its left operand by rows or by columns at the same speed (gemm.h), so an image whose pixels are
// contiguous is multiplied as it lies; a library would first copy all of it into another order.

#include "wavemix/pointwise.h"

// GCC 12 takes the undefined operands within its own AVX-512 conversion intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

constexpr int64_t kPixels = 128;  // at a time: with 256 channels an eighth of a megabyte
static_assert(kPixels % kGemmRows == 0 && kPixels % (64 / static_cast<int64_t>(sizeof(float))) == 0, "whole vectors");

// Runs of pixels of one image.
struct Runs {
  int64_t plane, per_image, count;
  explicit Runs(const PointwiseArgs& a)
      : plane(a.h * a.w), per_image((plane + kPixels - 1) / kPixels), count(a.n * per_image) {}
};
struct Run {
  int64_t n, first, pixels;
  Run(const Runs& runs, int64_t i) : n(i / runs.per_image), first(i % runs.per_image * kPixels) {
    pixels = runs.plane - first < kPixels ? runs.plane - first : kPixels;
  }
};
template <class T>
T* at(const Plane& image, const Run& run) {
  return static_cast<T*>(image.data) + run.n * image.stride[0] + run.first * image.stride[3];
}
bool pixels_inner(const PointwiseArgs& args) { return args.x.stride[3] == 1 && args.c > 1 && args.x.stride[1] != 1; }

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

int threads_for(const PointwiseArgs& args, int threads) {
  return args.n * args.h * args.w * args.c < kSerialElements ? 1 : threads;
}

template <class T>
void forward(const PointwiseArgs& args, const void* bias, int threads) {
  using A = typename Arithmetic<T>::type;
  const Runs runs(args);
  threads = threads_for(args, threads);
  const T* weight = static_cast<const T*>(args.weight);
  const Buffer<A> weights(args.c * padded<A>(args.o));
  const ZeroBuffer<A> offset(padded<A>(args.o));
  pack(args.c, args.o, weights.data, [=](int64_t k, int64_t j) { return load(weight[j * args.c + k]); });
  if (bias != nullptr) load_row(static_cast<const T*>(bias), 1, args.o, offset.data);
  const bool by_channel = pixels_inner(args);
  const Panels panels(padded<A>(args.o) / kLanes<A>);
  WAVEMIX_PARALLEL(threads) {
    const Block<A> x(by_channel ? args.c : kPixels, by_channel ? kPixels : args.c), r(kPixels, args.o);
    WAVEMIX_FOR
    for (int64_t i = 0; i < runs.count; ++i) {
      const Run run(runs, i);
      const T* from = at<const T>(args.x, run);
      const int64_t whole = round_up(run.pixels, kGemmRows);
      if (by_channel) {
        const A* a = x.data;
        int64_t apart = x.stride;
        if (sizeof(T) == sizeof(A) && run.pixels == whole) {
          a = reinterpret_cast<const A*>(from);
          apart = args.x.stride[1];
        } else {
          for (int64_t c = 0; c < args.c; ++c)
            load_row(from + c * args.x.stride[1], 1, run.pixels, x.data + c * x.stride);
        }
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.begin(p + 1) - panels.begin(p), column = panels.begin(p) * kLanes<A>;
          gemm_panel<A, true>(vectors, whole, a, apart, weights.data + args.c * column, vectors * kLanes<A>, args.c,
                              offset.data + column, r.data + column, r.stride);
        }
      } else {
        const Rows<T, A> rows(from, args.x.stride[3], run.pixels, x);
        product(whole, args.o, args.c, rows.data, rows.stride, weights.data, offset.data, r.data, r.stride);
      }
      store_rows(r, 0, args.o, run.pixels, at<T>(args.r, run), args.r.stride[3]);
    }
  }
}

template <class A>
void add_row(A* to, const A* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <class T>
void input_grad(const PointwiseArgs& args, const Plane& add, int threads) {
  using A = typename Arithmetic<T>::type;
  const Runs runs(args);
  threads = threads_for(args, threads);
  advise<3>(args.x.data, {args.x.stride[0], args.x.stride[1], args.x.stride[3]}, {args.n, args.c, args.h * args.w},
            static_cast<int64_t>(sizeof(T)));
  const T* weight = static_cast<const T*>(args.weight);
  const bool by_channel = pixels_inner(args);
  // As left operand (o x c, by columns) or right one (packed).
  const int64_t c = padded<A>(args.c);
  const ZeroBuffer<A> weights(args.o * c), zero(c > kPixels ? c : kPixels);
  if (by_channel) {
    for (int64_t k = 0; k < args.o; ++k) load_row(weight + k * args.c, 1, args.c, weights.data + k * c);
  } else {
    pack(args.o, args.c, weights.data, [=](int64_t k, int64_t j) { return load(weight[k * args.c + j]); });
  }
  WAVEMIX_PARALLEL(threads) {
    const Block<A> r(kPixels, args.o), x(by_channel ? c : kPixels, by_channel ? kPixels : args.c);
    const Buffer<A> packed(args.o * kPixels), row(c > kPixels ? c : kPixels);
    const Panels panels(kPixels / kLanes<A>);
    WAVEMIX_FOR
    for (int64_t i = 0; i < runs.count; ++i) {
      const Run run(runs, i);
      const Rows<T, A> rows(at<const T>(args.r, run), args.r.stride[3], run.pixels, r);
      T* to = at<T>(args.x, run);
      const T* also = add.data == nullptr ? nullptr : at<const T>(add, run);
      int64_t lines = run.pixels, length = args.c, apart = args.x.stride[3], also_apart = add.stride[3];
      if (by_channel) {
        pack(args.o, kPixels, packed.data,
             [&](int64_t k, int64_t j) { return j < run.pixels ? rows.data[j * rows.stride + k] : A(0); });
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.begin(p + 1) - panels.begin(p), column = panels.begin(p) * kLanes<A>;
          gemm_panel<A, true>(vectors, c, weights.data, c, packed.data + args.o * column, vectors * kLanes<A>, args.o,
                              zero.data + column, x.data + column, x.stride);
        }
        lines = args.c;
        length = run.pixels;
        apart = args.x.stride[1];
        also_apart = add.stride[1];
      } else {
        product(round_up(run.pixels, kGemmRows), args.c, args.o, rows.data, rows.stride, weights.data, zero.data,
                x.data, x.stride);
      }
      for (int64_t j = 0; j < lines; ++j) {
        A* line = x.data + j * x.stride;
        if (also != nullptr) {
          load_row(also + j * also_apart, 1, length, row.data);
          add_row(line, row.data, length);
        }
        store_row(line, to + j * apart, 1, length);
      }
    }
  }
}

template <class T>
void weight_grad(const PointwiseArgs& args, void* d_weight, void* d_bias, int threads) {
  using A = typename Arithmetic<T>::type;
  const Runs runs(args);
  threads = threads_for(args, threads);
  const bool by_channel = pixels_inner(args);
  const int64_t c = padded<A>(args.c), o = padded<A>(args.o), at_bias = c * o, size = at_bias + o;
  const Buffer<A> sums(threads * size);
  WAVEMIX_PARALLEL(threads) {
    const Block<A> r(kPixels, args.o), x(by_channel ? c : kPixels, by_channel ? kPixels : args.c);
    A* sum = sums.data + WAVEMIX_THREAD * size;
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(sums.data + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    WAVEMIX_FOR
    for (int64_t i = 0; i < runs.count; ++i) {
      const Run run(runs, i);
      load_rows(at<const T>(args.r, run), args.r.stride[3], run.pixels, r);
      const T* from = at<const T>(args.x, run);
      if (by_channel) {  // (c x o) = x r
        const A* a = x.data;
        int64_t apart = x.stride;
        if (sizeof(T) == sizeof(A) && args.c % kGemmRows == 0) {
          a = reinterpret_cast<const A*>(from);
          apart = args.x.stride[1];
        } else {
          for (int64_t k = 0; k < args.c; ++k)
            load_row(from + k * args.x.stride[1], 1, run.pixels, x.data + k * x.stride);
        }
        const Panels panels(o / kLanes<A>);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.begin(p + 1) - panels.begin(p), column = panels.begin(p) * kLanes<A>;
          gemm_panel<A, false>(vectors, round_up(args.c, kGemmRows), a, apart, r.data + column, o, run.pixels, nullptr,
                               sum + column, o);
        }
      } else {  // (o x c) = transpose(r) x
        const Rows<T, A> rows(from, args.x.stride[3], run.pixels, x);
        add_product_of_transpose(o, args.c, run.pixels, r.data, r.stride, rows.data, rows.stride, sum, c);
      }
      add_rows(r, run.pixels, sum + at_bias);
    }
  }
  finish_sums<T>(sums.data, size, threads, args.o, args.c, by_channel ? 1 : c, by_channel ? o : 1, d_weight);
  finish_sums<T>(sums.data + at_bias, size, threads, 1, args.o, o, 1, d_bias);
}

void forward_any(const PointwiseArgs& args, const void* bias, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, bias, threads); });
}
void input_grad_any(const PointwiseArgs& args, const Plane& add, int threads) {
  dispatch(args.dtype, [&](auto element) { input_grad<decltype(element)>(args, add, threads); });
}
void weight_grad_any(const PointwiseArgs& args, void* d_weight, void* d_bias, int threads) {
  dispatch(args.dtype, [&](auto element) { weight_grad<decltype(element)>(args, d_weight, d_bias, threads); });
}

}  // namespace

extern const PointwiseKernels pointwise_kernels = {forward_any, input_grad_any, weight_grad_any};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
