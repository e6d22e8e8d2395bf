// The transposed convolution 4x4, stride 2, by minimal filtering: shared by its forward pass (deconv.cpp) and its
// backward (deconv_backward.cpp). Included by the per-ISA units only.
//
// Along one axis the output rows of one parity are a 2-tap filter of the input rows:
//     y[2i]     = d[i-1] w3 + d[i] w1          y[2i+1] = d[i] w2 + d[i+1] w0
// and two outputs of a 2-tap filter need three products instead of four [Winograd, Arithmetic complexity of
// computations, 1980: F(2, 2)]:
//     y  = d0 g0 + d1 g1 = m0 + m1             m0 = (d0 - d1) g0,  m1 = d1 (g0 + g1),  m2 = (d1 - d2) g1
//     y' = d1 g0 + d2 g1 = m1 - m2
// So two input rows take six products instead of eight, and a tile of 2x2 pixels 36 instead of 64. The factors are sums
// and differences of two values: the error grows by a small constant (measured: docs/develop/tuning.md, Few
// channels: transposed convolution), unlike that of larger tiles. With channels in
// place of single values, each of the 36 is a matrix product (gemm.h), over as many tiles as keep their forms in the L2
// cache. The gradients are the same identities read the other way.
#pragma once

#include "cpu/common/operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {

constexpr int kProducts = 6;  // along one axis
constexpr int kAll = kProducts * kProducts;

// --- Tiles -------------------------------------------------------------------------------------------------

template <class A>
using V = typename Vector<A>::type;
template <class A>
using Memory = typename Vector<A>::unaligned;

// Tiles of 2x2 pixels of u, numbered through all images.
struct Tiles {
  int64_t rows, columns, count;
  explicit Tiles(const DeconvArgs& a) : rows((a.h + 1) / 2), columns((a.w + 1) / 2), count(a.n * rows * columns) {}
};
struct Tile {
  int64_t n, row, column;
  Tile(const Tiles& tiles, int64_t i)
      : n(i / (tiles.rows * tiles.columns)), row(i / tiles.columns % tiles.rows), column(i % tiles.columns) {}
};

// The pixels of a square patch of an image as vectors of channels: where they lie if that needs neither conversion nor
// padding, else in `scratch` (side x side x stride). Outside of the image: zeros.
template <class T, class A, int side>
struct Patch {
  const A* pixel[side][side];
  Patch(const Plane& image, int64_t n, int64_t rows, int64_t columns, int64_t row, int64_t column, int64_t channels,
        int64_t stride, A* scratch, const A* zero) {
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        const int64_t r = row + i, c = column + j;
        if (r < 0 || r >= rows || c < 0 || c >= columns) {
          pixel[i][j] = zero;
          continue;
        }
        const T* from =
            static_cast<const T*>(image.data) + n * image.stride[0] + r * image.stride[2] + c * image.stride[3];
        if constexpr (sizeof(T) == sizeof(A)) {
          if (channels == stride) {
            pixel[i][j] = reinterpret_cast<const A*>(from);
            continue;
          }
        }
        A* to = scratch + (i * side + j) * stride;
        load_row(from, 1, channels, to);  // the rest is zero from the start
        pixel[i][j] = to;
      }
  }
};

// Form along both axes of a square of vectors: from(i, j), handed on as to(i, j, value).
template <class Form, class A, class From, class To>
static inline __attribute__((always_inline)) void both_axes(const From& from, const To& to) {
  V<A> rows[Form::in][Form::out];
#pragma GCC unroll 6
  for (int i = 0; i < Form::in; ++i) {
    V<A> d[Form::in];
#pragma GCC unroll 6
    for (int j = 0; j < Form::in; ++j) d[j] = from(i, j);
    Form::make(d, rows[i]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < Form::out; ++j) {
    V<A> d[Form::in], t[Form::out];
#pragma GCC unroll 6
    for (int i = 0; i < Form::in; ++i) d[i] = rows[i][j];
    Form::make(d, t);
#pragma GCC unroll 6
    for (int i = 0; i < Form::out; ++i) to(i, j, t[i]);
  }
}

// Form (i, j) of the patch, channel c, goes to out[(i * forms + j) * apart + c].
template <class Form, class A>
static inline void make_forms(const A* const (&pixel)[Form::in][Form::in], int64_t channels, A* out, int64_t apart) {
  for (int64_t c = 0; c < channels; c += kLanes<A>)
    both_axes<Form, A>([&](int i, int j) -> V<A> { return *reinterpret_cast<const Memory<A>*>(pixel[i][j] + c); },
                       [&](int i, int j, V<A> value) {
                         *reinterpret_cast<Memory<A>*>(out + (i * Form::out + j) * apart + c) = value;
                       });
}

// At most a vector of values; zeros behind.
template <class T, class A>
static inline V<A> load_vector(const T* from, int64_t left) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (left == kLanes<A>) return *reinterpret_cast<const Memory<A>*>(from);
  }
  alignas(64) A row[kLanes<A>] = {};
  load_row(from, 1, left, row);
  return *reinterpret_cast<const V<A>*>(row);
}

// The other way: sums (i, j) at in[(i * sums + j) * apart + c], with `bias` (or null) added, into a patch of pixels; a
// null pixel is left out.
//
// With `sums` (a value near the mean, sums of differences from it and of their squares, each an array of the padded
// channels) the pixels are also counted into these. With `residual` those pixels are added, before rounding.
template <class Form, class T, class A>
static inline void make_pixels(const A* in, int64_t apart, int64_t channels, const A* bias,
                               T* const (&pixel)[Form::out][Form::out], A* const* sums = nullptr,
                               T* const (*residual)[Form::out] = nullptr) {
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    V<A> center{}, first{}, second{};
    if (sums != nullptr) center = *reinterpret_cast<const Memory<A>*>(sums[0] + c);
    const V<A> offset = bias == nullptr ? V<A>{} : *reinterpret_cast<const Memory<A>*>(bias + c);
    const int64_t left = channels - c < kLanes<A> ? channels - c : kLanes<A>;
    both_axes<Form, A>(
        [&](int i, int j) -> V<A> { return *reinterpret_cast<const Memory<A>*>(in + (i * Form::in + j) * apart + c); },
        [&](int i, int j, V<A> value) {
          T* to = pixel[i][j];
          if (to == nullptr) return;
          value += offset;
          if (sums != nullptr) {
            const V<A> off = value - center;
            first += off;
            second += off * off;
          }
          if (residual != nullptr) value += load_vector<T, A>(residual[i][j] + c, left);
          if (sizeof(T) == sizeof(A) && left == kLanes<A>) {
            *reinterpret_cast<Memory<A>*>(to + c) = value;
          } else {
            alignas(64) A row[kLanes<A>];
            *reinterpret_cast<V<A>*>(row) = value;
            store_row(row, to + c, 1, left);
          }
        });
    if (sums != nullptr) {
      *reinterpret_cast<Memory<A>*>(sums[1] + c) += first;
      *reinterpret_cast<Memory<A>*>(sums[2] + c) += second;
    }
  }
}

// Addresses of a square of pixels; null outside of the image.
template <class T, int side>
struct Square {
  T* pixel[side][side];
  Square() = default;
  Square(const Plane& image, int64_t n, int64_t rows, int64_t columns, int64_t row, int64_t column, int64_t channel) {
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        const int64_t r = row + i, c = column + j;
        pixel[i][j] = r >= rows || c >= columns ? nullptr
                                                : static_cast<T*>(image.data) + n * image.stride[0] +
                                                      r * image.stride[2] + c * image.stride[3] + channel;
      }
  }
};

// The forms of the weight, packed, `apart` from each other: (f x o), or (o x f) for the gradient of the input.
template <class Form, class T, class A>
void pack_weights(const DeconvArgs& args, bool transposed, A* out, int64_t apart, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t depth = transposed ? args.o : args.f, columns = transposed ? args.f : args.o;
  const int64_t step_k = 16 * (transposed ? 1 : args.o), step_j = 16 * (transposed ? args.o : 1);
  const int64_t whole = padded<A>(columns);
  const Panels panels(whole / kLanes<A>);
  WAVEMIX_PARALLEL(threads) {
    const Buffer<A> taps(16 * whole);
    taps.clear(16 * whole);
    WAVEMIX_FOR
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < columns; ++j)
        for (int tap = 0; tap < 16; ++tap) taps.data[tap * whole + j] = load(weight[k * step_k + j * step_j + tap]);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t at = panels.begin(p) * kLanes<A>, width = panels.begin(p + 1) * kLanes<A> - at;
        const A* pixel[4][4];
        for (int tap = 0; tap < 16; ++tap) pixel[tap / 4][tap % 4] = taps.data + tap * whole + at;
        make_forms<Form>(pixel, width, out + depth * at + k * width, apart);
      }
    }
  }
}

static inline int threads_for(const DeconvArgs& args, int threads) {
  return args.n * args.h * args.w * args.f < kSerialElements / 4 ? 1 : threads;
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
