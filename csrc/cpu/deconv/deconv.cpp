// The transposed convolution 4x4, stride 2, on the CPU by minimal filtering (minimal_filtering.h), with BatchNorm's
// statistics of what it writes. Compiled once per instruction set.

#include "cpu/choose.h"
#include "cpu/deconv/few_channels.h"
#include "cpu/deconv/matrix_units.h"
#include "cpu/deconv/minimal_filtering.h"
#include "cpu/deconv/statistics.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Each product belongs to one form of the input (a sum or difference of its rows and columns) and one of the weight.
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

// Tiles at a time: `forms` vectors of their channels fit half of a megabyte, and all threads have blocks.
template <class A>
int64_t tiles_at_a_time(int64_t tiles, int64_t forms, int64_t channels, int threads) {
  int64_t most = (int64_t{1} << 19) / (forms * channels * static_cast<int64_t>(sizeof(A)));
  most = most < 16 ? 16 : most > 64 ? 64 : most;
  const int64_t share = (tiles + threads - 1) / threads;
  most = share < most ? share : most;
  return round_up(most > 0 ? most : 1, kGemmRows);
}

template <class T>
void forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  using A = typename Arithmetic<T>::type;
  const Tiles tiles(args);
  if (tiles.count == 0) {
    if (mean != nullptr) Statistics<A>::finish(args.o, nullptr, 0, mean, var);
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
  pack_weights<WeightForms, T>(args, false, weights.data, size, threads);
  constexpr int kForms = InputForms::out * InputForms::out;
  const int64_t block = tiles_at_a_time<A>(tiles.count, kForms, f, threads);
  const Panels panels(o / kLanes<A>);
  // Each thread's statistics, merged in a fixed order at the end.
  const int64_t line = Statistics<A>::line(args.o);
  const ZeroBuffer<double> of_thread(mean == nullptr ? 0 : threads * line);
  WAVEMIX_PARALLEL(threads) {
    const Buffer<A> forms(kForms * block * f), products(kAll * block * kGemmVectors * kLanes<A>), scratch(16 * f);
    scratch.clear(16 * f);
    Statistics<A> statistics(mean == nullptr ? 0 : args.o, mean == nullptr ? 0 : o);
    const Buffer<double> part(mean == nullptr ? 0 : 2 * args.o);
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
          A* const sums[3] = {statistics.lane(0) + at, statistics.lane(1) + at, statistics.lane(2) + at};
          const A* from = products.data + t * width;
          if (mean != nullptr && t == 0 && statistics.count == 0) {
            // There is no mean yet: the first pixel is near enough.
            make_pixels<OutputForms>(from, block * width, channels, offset.data + at, square.pixel);
            load_row(square.pixel[0][0], 1, channels, sums[0]);
          }
          Square<T, 4> added;
          if (args.residual.data != nullptr)
            added = {args.residual, tile.n, 2 * args.h, 2 * args.w, 4 * tile.row, 4 * tile.column, at};
          make_pixels<OutputForms>(from, block * width, channels, offset.data + at, square.pixel,
                                   mean == nullptr ? nullptr : sums,
                                   args.residual.data == nullptr ? nullptr : added.pixel);
        }
      }
      if (mean == nullptr) continue;
      int64_t pixels = 0;
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        pixels += 4 * (2 * tile.row + 1 < args.h ? 2 : 1) * (2 * tile.column + 1 < args.w ? 2 : 1);
      }
      statistics.finish_part(static_cast<double>(pixels), args.o, part.data);
    }
    if (mean != nullptr) statistics.save(of_thread.data + WAVEMIX_THREAD * line);
  }
  if (mean != nullptr) Statistics<A>::finish(args.o, of_thread.data, threads, mean, var);
}

}  // namespace

void deconv_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  const choose::Deconv way = choose::deconv_forward(args);
  if (way == choose::Deconv::few_channels) return deconv_few_channels_forward(args, bias, mean, var, threads);
  if (way == choose::Deconv::matrix_units) return deconv_matrix_units_forward(args, bias, mean, var, threads);
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, bias, mean, var, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
