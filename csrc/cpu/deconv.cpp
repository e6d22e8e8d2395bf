// The transposed convolution 4x4, stride 2, on the CPU by minimal filtering. Compiled once per instruction set.
//
// Along one axis the output rows of one parity are a 2-tap filter of the input rows:
//     y[2i]     = d[i-1] w3 + d[i] w1          y[2i+1] = d[i] w2 + d[i+1] w0
// and two outputs of a 2-tap filter need three products instead of four [Winograd, Arithmetic complexity of
// computations, 1980: F(2, 2)]:
//     y  = d0 g0 + d1 g1 = m0 + m1             m0 = (d0 - d1) g0,  m1 = d1 (g0 + g1),  m2 = (d1 - d2) g1
//     y' = d1 g0 + d2 g1 = m1 - m2
// So two input rows take six products instead of eight, and a tile of 2x2 pixels 36 instead of 64. The factors are sums
// and differences of two values: the error grows by a small constant (fp32 beside oneDNN's direct sums, root mean
// square: 1.5 to 2.0 times forward, 1.0 to 1.1 times in the gradients), unlike that of larger tiles. With channels in
// place of single values, each of the 36 is a matrix product (gemm.h), over as many tiles as keep their forms in the L2
// cache. Both gradients are the same identities read the other way.
//
// Each product belongs to one form of the input (a sum or difference of its rows and columns) and one of the weight.

#include "wavemix/deconv.h"

// GCC 12 takes the undefined operands within its own AVX-512 conversion intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <math.h>

#include "operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

constexpr int kProducts = 6;  // along one axis
constexpr int kAll = kProducts * kProducts;

// --- Along one axis ----------------------------------------------------------------------------------------

// Forms of a vector of rows; `in` of them make `out`.
struct InputForms {  // d[i-1 .. i+2] -> what the products 0..5 multiply: forms 0, 1, 2, 2, 3, 4
  static constexpr int in = 4, out = 5;
  static constexpr int of_product[kProducts] = {0, 1, 2, 2, 3, 4};
  template <class V>
  static inline void make(const V (&d)[in], V (&t)[out]) {
    t[0] = d[0] - d[1];
    t[1] = d[1];
    t[2] = d[1] - d[2];
    t[3] = d[2];
    t[4] = d[2] - d[3];
  }
};
struct OutputForms {  // products -> output rows 2i .. 2i+3
  static constexpr int in = kProducts, out = 4;
  template <class V>
  static inline void make(const V (&m)[in], V (&y)[out]) {
    y[0] = m[0] + m[1];
    y[1] = m[3] + m[4];
    y[2] = m[1] - m[2];
    y[3] = m[4] - m[5];
  }
};
struct OutputAdjoint {  // gradients of output rows 2i .. 2i+3 -> of the products
  static constexpr int in = 4, out = kProducts;
  template <class V>
  static inline void make(const V (&g)[in], V (&m)[out]) {
    m[0] = g[0];
    m[1] = g[0] + g[2];
    m[2] = V{} - g[2];
    m[3] = g[1];
    m[4] = g[1] + g[3];
    m[5] = V{} - g[3];
  }
};
// The gradient of the input is a convolution of stride 2; its rows of one parity are F(2, 2) again:
//     du[i] = (g[2i-1] w0 + g[2i+1] w2) + (g[2i] w1 + g[2i+2] w3)
// and the products of both parities with the same place in it are added up before its last sums: nine sums of four.
struct GradForms {  // g[4t-1 .. 4t+4] -> products
  static constexpr int in = 6, out = kProducts;
  template <class V>
  static inline void make(const V (&g)[in], V (&t)[out]) {
    t[0] = g[0] - g[2];
    t[1] = g[2];
    t[2] = g[2] - g[4];
    t[3] = g[1] - g[3];
    t[4] = g[3];
    t[5] = g[3] - g[5];
  }
};
struct GradSums {  // sums -> du[2t], du[2t+1]
  static constexpr int in = 3, out = 2;
  template <class V>
  static inline void make(const V (&s)[in], V (&d)[out]) {
    d[0] = s[0] + s[1];
    d[1] = s[1] - s[2];
  }
};
struct TapSums {  // gradients of the products' weights -> of the taps
  static constexpr int in = kProducts, out = 4;
  template <class V>
  static inline void make(const V (&m)[in], V (&w)[out]) {
    w[0] = m[4] + m[5];
    w[1] = m[1] + m[2];
    w[2] = m[3] + m[4];
    w[3] = m[0] + m[1];
  }
};
struct WeightForms {  // taps -> what each product multiplies
  static constexpr int in = 4, out = kProducts;
  template <class V>
  static inline void make(const V (&w)[in], V (&g)[out]) {
    g[0] = w[3];
    g[1] = w[1] + w[3];
    g[2] = w[1];
    g[3] = w[2];
    g[4] = w[0] + w[2];
    g[5] = w[0];
  }
};
struct GradWeightForms {
  static constexpr int in = 4, out = kProducts;
  template <class V>
  static inline void make(const V (&w)[in], V (&g)[out]) {
    g[0] = w[0];
    g[1] = w[0] + w[2];
    g[2] = w[2];
    g[3] = w[1];
    g[4] = w[1] + w[3];
    g[5] = w[3];
  }
};

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
        load_row(from, 1, channels, to);  // what is beyond `channels` is zero from the start
        pixel[i][j] = to;
      }
  }
};

// Both axes: form (i, j) of the patch, channel c, goes to out[(i * forms + j) * apart + c].
template <class Form, class A>
static inline void make_forms(const A* const (&pixel)[Form::in][Form::in], int64_t channels, A* out, int64_t apart) {
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    V<A> rows[Form::in][Form::out];
#pragma GCC unroll 6
    for (int i = 0; i < Form::in; ++i) {
      V<A> d[Form::in];
#pragma GCC unroll 6
      for (int j = 0; j < Form::in; ++j) d[j] = *reinterpret_cast<const Memory<A>*>(pixel[i][j] + c);
      Form::make(d, rows[i]);
    }
#pragma GCC unroll 6
    for (int j = 0; j < Form::out; ++j) {
      V<A> d[Form::in], t[Form::out];
#pragma GCC unroll 6
      for (int i = 0; i < Form::in; ++i) d[i] = rows[i][j];
      Form::make(d, t);
#pragma GCC unroll 6
      for (int i = 0; i < Form::out; ++i) *reinterpret_cast<Memory<A>*>(out + (i * Form::out + j) * apart + c) = t[i];
    }
  }
}

// What lies between the gradient of a normalised output and the output's own, per channel.
template <class A>
struct Norm {
  const A *a, *b, *mean, *d;
  explicit Norm(const DeconvArgs& args)
      : a(static_cast<const A*>(args.a)),
        b(static_cast<const A*>(args.b)),
        mean(static_cast<const A*>(args.mean)),
        d(static_cast<const A*>(args.d)) {}
};

// A patch of the gradient of the output: as it lies, or made from that of the normalised one.
template <class T, class A, int side>
struct GradPatch : Patch<T, A, side> {
  GradPatch(const DeconvArgs& args, int64_t n, int64_t row, int64_t column, int64_t stride, A* scratch, A* values,
            const A* zero)
      : Patch<T, A, side>(args.y, n, 2 * args.h, 2 * args.w, row, column, args.o, stride, scratch, zero) {
    if (args.output.data == nullptr) return;
    const Norm<A> norm(args);
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        if (this->pixel[i][j] == zero) continue;
        const T* output = static_cast<const T*>(args.output.data) + n * args.output.stride[0] +
                          (row + i) * args.output.stride[2] + (column + j) * args.output.stride[3];
        const A* g = this->pixel[i][j];
        A* to = scratch + (i * side + j) * stride;
        load_row(output, 1, args.o, values);
        for (int64_t c = 0; c < args.o; ++c)
          to[c] = norm.a[c] * g[c] + (norm.b[c] * (values[c] - norm.mean[c]) + norm.d[c]);
        this->pixel[i][j] = to;
      }
  }
};

// The other way: sums (i, j) at in[(i * sums + j) * apart + c], with `bias` (or null) added, into a patch of pixels; a
// null pixel is left out.
//
// With `sums` (a value near the mean, sums of differences from it and of their squares, each an array of the padded
// channels) the pixels are also counted into these.
template <class Form, class T, class A>
static inline void make_pixels(const A* in, int64_t apart, int64_t channels, const A* bias,
                               T* const (&pixel)[Form::out][Form::out], A* const* sums = nullptr) {
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    V<A> center{}, first{}, second{};
    if (sums != nullptr) center = *reinterpret_cast<const Memory<A>*>(sums[0] + c);
    V<A> rows[Form::in][Form::out];
#pragma GCC unroll 6
    for (int i = 0; i < Form::in; ++i) {
      V<A> m[Form::in];
#pragma GCC unroll 6
      for (int j = 0; j < Form::in; ++j)
        m[j] = *reinterpret_cast<const Memory<A>*>(in + (i * Form::in + j) * apart + c);
      Form::make(m, rows[i]);
    }
    const V<A> offset = bias == nullptr ? V<A>{} : *reinterpret_cast<const Memory<A>*>(bias + c);
    const int64_t left = channels - c < kLanes<A> ? channels - c : kLanes<A>;
#pragma GCC unroll 4
    for (int j = 0; j < Form::out; ++j) {
      V<A> m[Form::in], y[Form::out];
#pragma GCC unroll 6
      for (int i = 0; i < Form::in; ++i) m[i] = rows[i][j];
      Form::make(m, y);
#pragma GCC unroll 4
      for (int i = 0; i < Form::out; ++i) {
        T* to = pixel[i][j];
        if (to == nullptr) continue;
        y[i] += offset;
        if (sums != nullptr) {
          const V<A> off = y[i] - center;
          first += off;
          second += off * off;
        }
        if (sizeof(T) == sizeof(A) && left == kLanes<A>) {
          *reinterpret_cast<Memory<A>*>(to + c) = y[i];
        } else {
          alignas(64) A row[kLanes<A>];
          *reinterpret_cast<V<A>*>(row) = y[i];
          store_row(row, to + c, 1, left);
        }
      }
    }
    if (sums != nullptr) {
      *reinterpret_cast<Memory<A>*>(sums[1] + c) += first;
      *reinterpret_cast<Memory<A>*>(sums[2] + c) += second;
    }
  }
}

// Mean and sum of squared differences from it, of each channel: parts are merged as Chan, Golub and LeVeque (1983) do,
// so no large numbers are subtracted. Within a part (a block of tiles) values count by their distance to the mean of
// the parts before. In double, which costs nothing at this rate.
template <class A>
struct Statistics {
  int64_t channels, stride;
  double count = 0;
  ZeroBuffer<double> mean, squares;
  ZeroBuffer<A> part;
  A* sums[3];
  Statistics(int64_t c, int64_t padded_c)
      : channels(c), stride(padded_c), mean(padded_c), squares(padded_c), part(3 * padded_c) {
    for (int i = 0; i < 3; ++i) sums[i] = part.data + i * stride;
  }
  void merge(double n, const double* other_mean, const double* other_squares) {
    if (n == 0) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double off = other_mean[c] - mean.data[c];
      mean.data[c] += off * (n / (count + n));
      squares.data[c] += other_squares[c] + off * off * (count * n / (count + n));
    }
    count += n;
  }
  void finish_part(double n, double* scratch) {
    for (int64_t c = 0; c < channels; ++c) {
      const double off = static_cast<double>(sums[1][c]) / n;
      scratch[c] = static_cast<double>(sums[0][c]) + off;
      scratch[stride + c] = static_cast<double>(sums[2][c]) - off * off * n;
    }
    merge(n, scratch, scratch + stride);
    for (int64_t c = 0; c < channels; ++c) {
      sums[0][c] = static_cast<A>(mean.data[c]);
      sums[1][c] = sums[2][c] = A(0);
    }
  }
};

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

// --- Products ----------------------------------------------------------------------------------------------

// The forms of the weight, packed, one after the other: (f x o), or (o x f) for the gradient of the input.
template <class Form, class T, class A>
void pack_weights(const DeconvArgs& args, bool transposed, A* out, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t depth = transposed ? args.o : args.f, columns = transposed ? args.f : args.o;
  const int64_t step_k = 16 * (transposed ? 1 : args.o), step_j = 16 * (transposed ? args.o : 1);
  const int64_t whole = padded<A>(columns), size = depth * whole;
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
        make_forms<Form>(pixel, width, out + depth * at + k * width, size);
      }
    }
  }
}

// As many tiles at a time as keep `forms` vectors of their channels in half of a megabyte, and enough blocks for all
// threads.
template <class A>
int64_t tiles_at_a_time(int64_t tiles, int64_t forms, int64_t channels, int threads) {
  int64_t most = (int64_t{1} << 19) / (forms * channels * static_cast<int64_t>(sizeof(A)));
  most = most < 16 ? 16 : most > 64 ? 64 : most;
  const int64_t share = (tiles + threads - 1) / threads;
  most = share < most ? share : most;
  return round_up(most > 0 ? most : 1, kGemmRows);
}

int threads_for(const DeconvArgs& args, int threads) {
  return args.n * args.h * args.w * args.f < kSerialElements / 4 ? 1 : threads;
}

template <class T>
void forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  using A = typename Arithmetic<T>::type;
  const Tiles tiles(args);
  if (tiles.count == 0) {
    // The mean of nothing is no number, and says so.
    for (int64_t c = 0; c < args.o && mean != nullptr; ++c)
      static_cast<A*>(mean)[c] = static_cast<A*>(var)[c] = static_cast<A>(NAN);
    return;
  }
  threads = threads_for(args, threads);
  advise<3>(args.y.data, {args.y.stride[0], args.y.stride[2], args.y.stride[3]}, {args.n, 2 * args.h, 2 * args.w},
            static_cast<int64_t>(sizeof(T)));
  const int64_t f = padded<A>(args.f), o = padded<A>(args.o), size = args.f * o;
  const Buffer<A> weights(kAll * size), offset(o), zero(f > o ? f : o);
  offset.clear(o);
  zero.clear(f > o ? f : o);
  if (bias != nullptr) load_row(static_cast<const T*>(bias), 1, args.o, offset.data);
  pack_weights<WeightForms, T>(args, false, weights.data, threads);
  constexpr int kForms = InputForms::out * InputForms::out;
  const int64_t block = tiles_at_a_time<A>(tiles.count, kForms, f, threads);
  const Panels panels(o / kLanes<A>);
  // Of each thread: count, then mean and squares of its pixels, merged in a fixed order at the end.
  const int64_t line = 1 + 2 * o;
  const ZeroBuffer<double> of_thread(mean == nullptr ? 0 : threads * line);
  WAVEMIX_PARALLEL(threads) {
    const Buffer<A> forms(kForms * block * f), products(kAll * block * kGemmVectors * kLanes<A>), scratch(16 * f);
    scratch.clear(16 * f);
    Statistics<A> statistics(mean == nullptr ? 0 : args.o, mean == nullptr ? 0 : o);
    const Buffer<double> part(mean == nullptr ? 0 : 2 * o);
    WAVEMIX_FOR
    for (int64_t first = 0; first < tiles.count; first += block) {
      const int64_t count = tiles.count - first < block ? tiles.count - first : block;
      const int64_t whole = round_up(count, kGemmRows);
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        const Patch<T, A, 4> patch(args.u, tile.n, args.h, args.w, 2 * tile.row - 1, 2 * tile.column - 1, args.f, f,
                                   scratch.data, zero.data);
        make_forms<InputForms>(patch.pixel, f, forms.data + t * f, block * f);
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t vectors = panels.begin(p + 1) - panels.begin(p), width = vectors * kLanes<A>;
        const int64_t at = panels.begin(p) * kLanes<A>;
        for (int i = 0; i < kProducts; ++i)
          for (int j = 0; j < kProducts; ++j) {
            const int form = InputForms::of_product[i] * InputForms::out + InputForms::of_product[j];
            const int product = i * kProducts + j;
            gemm_panel<A, false>(vectors, whole, forms.data + form * block * f, f,
                                 weights.data + product * size + args.f * at, width, args.f, zero.data,
                                 products.data + product * block * width, width);
          }
        const int64_t channels = args.o - at < width ? args.o - at : width;
        for (int64_t t = 0; t < count; ++t) {
          const Tile tile(tiles, first + t);
          const Square<T, 4> square(args.y, tile.n, 2 * args.h, 2 * args.w, 4 * tile.row, 4 * tile.column, at);
          A* const sums[3] = {statistics.sums[0] + at, statistics.sums[1] + at, statistics.sums[2] + at};
          const A* from = products.data + t * width;
          if (mean != nullptr && t == 0 && statistics.count == 0) {
            // Nothing is known of the mean yet: the first pixel is near enough.
            make_pixels<OutputForms>(from, block * width, channels, offset.data + at, square.pixel);
            load_row(square.pixel[0][0], 1, channels, sums[0]);
          }
          make_pixels<OutputForms>(from, block * width, channels, offset.data + at, square.pixel,
                                   mean == nullptr ? nullptr : sums);
        }
      }
      if (mean == nullptr) continue;
      int64_t pixels = 0;
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        pixels += 4 * (2 * tile.row + 1 < args.h ? 2 : 1) * (2 * tile.column + 1 < args.w ? 2 : 1);
      }
      statistics.finish_part(static_cast<double>(pixels), part.data);
    }
    if (mean != nullptr) {
      double* own = of_thread.data + WAVEMIX_THREAD * line;
      own[0] = statistics.count;
      std::memcpy(own + 1, statistics.mean.data, static_cast<size_t>(args.o) * sizeof(double));
      std::memcpy(own + 1 + o, statistics.squares.data, static_cast<size_t>(args.o) * sizeof(double));
    }
  }
  if (mean == nullptr) return;
  Statistics<A> all(args.o, o);
  for (int t = 0; t < threads; ++t) {
    const double* part = of_thread.data + t * line;
    all.merge(part[0], part + 1, part + 1 + o);
  }
  for (int64_t c = 0; c < args.o; ++c) {
    static_cast<A*>(mean)[c] = static_cast<A>(all.mean.data[c]);
    static_cast<A*>(var)[c] = static_cast<A>(all.squares.data[c] / all.count);
  }
}

template <class T>
void input_grad(const DeconvArgs& args, int threads) {
  using A = typename Arithmetic<T>::type;
  const Tiles tiles(args);
  if (tiles.count == 0) return;
  threads = threads_for(args, threads);
  advise<3>(args.u.data, {args.u.stride[0], args.u.stride[2], args.u.stride[3]}, {args.n, args.h, args.w},
            static_cast<int64_t>(sizeof(T)));
  const int64_t f = padded<A>(args.f), o = padded<A>(args.o), size = args.o * f;
  const Buffer<A> weights(kAll * size), zero(f > o ? f : o);
  zero.clear(f > o ? f : o);
  pack_weights<GradWeightForms, T>(args, true, weights.data, threads);
  constexpr int kSums = GradSums::in * GradSums::in;
  const int64_t block = tiles_at_a_time<A>(tiles.count, kAll, o, threads);
  const Panels panels(f / kLanes<A>);
  WAVEMIX_PARALLEL(threads) {
    const Buffer<A> forms(kAll * block * o), sums(kSums * block * kGemmVectors * kLanes<A>), scratch(36 * o), values(o);
    scratch.clear(36 * o);
    WAVEMIX_FOR
    for (int64_t first = 0; first < tiles.count; first += block) {
      const int64_t count = tiles.count - first < block ? tiles.count - first : block;
      const int64_t whole = round_up(count, kGemmRows);
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        const GradPatch<T, A, 6> patch(args, tile.n, 4 * tile.row - 1, 4 * tile.column - 1, o, scratch.data,
                                       values.data, zero.data);
        make_forms<GradForms>(patch.pixel, o, forms.data + t * o, block * o);
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t vectors = panels.begin(p + 1) - panels.begin(p), width = vectors * kLanes<A>;
        const int64_t at = panels.begin(p) * kLanes<A>;
        for (int product = 0; product < kAll; ++product) {
          const int i = product / kProducts, j = product % kProducts;
          const int sum = i % GradSums::in * GradSums::in + j % GradSums::in;
          // The first of a sum's four products sets it.
          const A* start = i < GradSums::in && j < GradSums::in ? zero.data : nullptr;
          gemm_panel<A, false>(vectors, whole, forms.data + product * block * o, o,
                               weights.data + product * size + args.o * at, width, args.o, start,
                               sums.data + sum * block * width, width);
        }
        const int64_t channels = args.f - at < width ? args.f - at : width;
        for (int64_t t = 0; t < count; ++t) {
          const Tile tile(tiles, first + t);
          const Square<T, 2> square(args.u, tile.n, args.h, args.w, 2 * tile.row, 2 * tile.column, at);
          make_pixels<GradSums>(sums.data + t * width, block * width, channels, static_cast<const A*>(nullptr),
                                square.pixel);
        }
      }
    }
  }
}

// Threads make the forms of a block of tiles together and then share out the products, so that there is one sum for
// each product whatever the number of threads, and the result does not depend on it.
template <class T>
void weight_grad(const DeconvArgs& args, void* d_weight, void* d_bias, int threads) {
  using A = typename Arithmetic<T>::type;
  const Tiles tiles(args);
  threads = threads_for(args, threads);
  const int64_t f = padded<A>(args.f), o = padded<A>(args.o), size = f * o;
  constexpr int kForms = InputForms::out * InputForms::out;
  // Two megabytes of forms, the cores' L2 caches together; sums of products are read and written once a block.
  int64_t block = (int64_t{1} << 21) / ((kForms * f + kAll * o) * static_cast<int64_t>(sizeof(A)));
  block = round_up(block < 32 ? 32 : block > 256 ? 256 : block, kGemmRows);
  const Panels panels(o / kLanes<A>);
  const Buffer<A> sums(kAll * size), inputs(kForms * block * f), grads(kAll * block * o), zero(f > o ? f : o);
  const Buffer<A> bias(4 * o);
  zero.clear(f > o ? f : o);
  bias.clear(4 * o);
  WAVEMIX_PARALLEL(threads) {
    const Buffer<A> scratch(16 * (f > o ? f : o)), values(o);
    WAVEMIX_FOR
    for (int product = 0; product < kAll; ++product)
      std::memset(sums.data + product * size, 0, static_cast<size_t>(size) * sizeof(A));
    for (int64_t first = 0; first < tiles.count; first += block) {
      const int64_t count = tiles.count - first < block ? tiles.count - first : block;
      scratch.clear(16 * f);
      WAVEMIX_FOR
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        const Patch<T, A, 4> patch(args.u, tile.n, args.h, args.w, 2 * tile.row - 1, 2 * tile.column - 1, args.f, f,
                                   scratch.data, zero.data);
        make_forms<InputForms>(patch.pixel, f, inputs.data + t * f, block * f);
      }
      scratch.clear(16 * o);
      WAVEMIX_FOR
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        const GradPatch<T, A, 4> patch(args, tile.n, 4 * tile.row, 4 * tile.column, o, scratch.data, values.data,
                                       zero.data);
        make_forms<OutputAdjoint>(patch.pixel, o, grads.data + t * o, block * o);
      }
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < kAll * panels.count; ++unit) {
        const int64_t product = unit / panels.count, p = unit % panels.count;
        const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
        const int64_t i = product / kProducts, j = product % kProducts;
        const int form = InputForms::of_product[i] * InputForms::out + InputForms::of_product[j];
        const A* grad = grads.data + product * block * o + at;
        gemm_panel<A, true>(vectors, f, inputs.data + form * block * f, f, grad, o, count, nullptr,
                            sums.data + product * size + at, o);
        // m1 and m4 in both axes hold every pixel's gradient once between them: their sums are the bias's.
        if (d_bias == nullptr || i % GradSums::in != 1 || j % GradSums::in != 1) continue;
        A* total = bias.data + (i / GradSums::in * 2 + j / GradSums::in) * o + at;
        for (int64_t c = 0; c < vectors * kLanes<A>; ++c) {
          A sum = 0;
          for (int64_t t = 0; t < count; ++t) sum += grad[t * o + c];
          total[c] += sum;
        }
      }
    }
    const Buffer<A> taps(16 * o);
    Square<A, 4> square;
    for (int k = 0; k < 16; ++k) square.pixel[k / 4][k % 4] = taps.data + k * o;
    WAVEMIX_FOR
    for (int64_t i = 0; i < args.f; ++i) {
      make_pixels<TapSums>(sums.data + i * o, size, o, static_cast<const A*>(nullptr), square.pixel);
      T* out = static_cast<T*>(d_weight) + i * args.o * 16;
      for (int64_t j = 0; j < args.o; ++j)
        for (int k = 0; k < 16; ++k) store(out[j * 16 + k], taps.data[k * o + j]);
    }
  }
  if (d_bias == nullptr) return;
  for (int64_t j = 0; j < args.o; ++j)
    store(static_cast<T*>(d_bias)[j], bias.data[j] + bias.data[o + j] + bias.data[2 * o + j] + bias.data[3 * o + j]);
}

void forward_any(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, bias, mean, var, threads); });
}
void input_grad_any(const DeconvArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { input_grad<decltype(element)>(args, threads); });
}
void weight_grad_any(const DeconvArgs& args, void* d_weight, void* d_bias, int threads) {
  dispatch(args.dtype, [&](auto element) { weight_grad<decltype(element)>(args, d_weight, d_bias, threads); });
}

}  // namespace

extern const DeconvKernels deconv_kernels = {forward_any, input_grad_any, weight_grad_any};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
