// The gradients of the transposed convolution on the CPU, of its input, its weight or both, by minimal filtering
// (minimal_filtering.h). Compiled once per instruction set.
//
// The gradient of the input is a convolution of stride 2; its rows of one parity are F(2, 2) again:
//     du[i] = (g[2i-1] w0 + g[2i+1] w2) + (g[2i] w1 + g[2i+2] w3)
// and the products of both parities with the same place in it are added up before its last sums: nine sums of four.
// With forms G of g and W of the weight, and the sums S of a tile, the whole is one trilinear map of (u, g, w),
//     <u, du> = sum over products p of  S'(u)[sum of p] G(g)[p] W(w)[p],
// so the gradient of the weight is W' of the products S'(u)[sum of p] x G(g)[p], added up over all tiles (' marks the
// transposed map): both gradients from the same forms of g, which is read once, and only nine forms of u.

#include "cpu/choose.h"
#include "cpu/deconv/few_channels.h"
#include "cpu/deconv/matrix_units.h"
#include "cpu/deconv/minimal_filtering.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

constexpr int kSums = 3;  // along one axis

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
struct Sums {  // sums of products -> du[2t], du[2t+1]
  static constexpr int in = kSums, out = 2;
  template <class V>
  static inline void make(const V (&s)[in], V (&d)[out]) {
    d[0] = s[0] + s[1];
    d[1] = s[1] - s[2];
  }
};
struct SumsTransposed {  // u[2t], u[2t+1] -> what is multiplied with the products of each sum
  static constexpr int in = 2, out = kSums;
  template <class V>
  static inline void make(const V (&d)[in], V (&s)[out]) {
    s[0] = d[0];
    s[1] = d[0] + d[1];
    s[2] = V{} - d[1];
  }
};
struct WeightForms {  // taps -> what each product multiplies
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
struct WeightTransposed {  // gradients of the products' weights -> of the taps
  static constexpr int in = kProducts, out = 4;
  template <class V>
  static inline void make(const V (&m)[in], V (&w)[out]) {
    w[0] = m[0] + m[1];
    w[1] = m[3] + m[4];
    w[2] = m[1] + m[2];
    w[3] = m[4] + m[5];
  }
};
constexpr int sum_of(int product) { return product / kProducts % kSums * kSums + product % kProducts % kSums; }

// BatchNorm's backward in the deconvolution's reads: its arrays per channel, padded with zeros.
template <class A>
struct Norm {
  int64_t stride;
  ZeroBuffer<A> line;
  Norm(const DeconvArgs& args, int64_t padded_o) : stride(padded_o), line(4 * padded_o) {
    const void* const from[4] = {args.a, args.b, args.mean, args.d};
    for (int i = 0; i < 4; ++i)
      if (from[i] != nullptr) load_row(static_cast<const A*>(from[i]), 1, args.o, line.data + i * stride);
  }
  V<A> at(int i, int64_t c) const { return *reinterpret_cast<const Memory<A>*>(line.data + i * stride + c); }
};

// The forms of a tile of the gradient of the output: as it lies, or made from that of the normalised one on the way.
template <class T, class A>
void grad_forms(const DeconvArgs& args, const Norm<A>& norm, const Tile& tile, A* scratch, const A* zero, A* out,
                int64_t apart) {
  constexpr int side = GradForms::in;
  const int64_t o = norm.stride, rows = 2 * args.h, columns = 2 * args.w, row = 4 * tile.row - 1;
  const int64_t column = 4 * tile.column - 1;
  const Patch<T, A, side> grad(args.y, tile.n, rows, columns, row, column, args.o, o, scratch, zero);
  if (args.output.data == nullptr) return make_forms<GradForms>(grad.pixel, o, out, apart);
  const Patch<T, A, side> output(args.output, tile.n, rows, columns, row, column, args.o, o, scratch + side * side * o,
                                 zero);
  for (int64_t c = 0; c < o; c += kLanes<A>) {
    const V<A> a = norm.at(0, c), b = norm.at(1, c), mean = norm.at(2, c), d = norm.at(3, c);
    both_axes<GradForms, A>(
        [&](int i, int j) -> V<A> {
          if (grad.pixel[i][j] == zero) return V<A>{};
          const V<A> g = *reinterpret_cast<const Memory<A>*>(grad.pixel[i][j] + c);
          const V<A> y = *reinterpret_cast<const Memory<A>*>(output.pixel[i][j] + c);
          return a * g + (b * (y - mean) + d);
        },
        [&](int i, int j, V<A> value) {
          *reinterpret_cast<Memory<A>*>(out + (i * GradForms::out + j) * apart + c) = value;
        });
  }
}

// Threads make the forms of a block of tiles together and then share out the products, so that there is one sum for
// each product whatever the number of threads, and the result does not depend on it.
template <class T>
void backward(const DeconvArgs& args, const DeconvGradArgs& made, int threads) {
  using A = typename Arithmetic<T>::type;
  const Tiles tiles(args);
  const bool to_u = made.d_u.data != nullptr, to_weight = made.d_weight != nullptr;
  threads = threads_for(args, threads);
  if (to_u)
    advise<3>(made.d_u.data, {made.d_u.stride[0], made.d_u.stride[2], made.d_u.stride[3]}, {args.n, args.h, args.w},
              static_cast<int64_t>(sizeof(T)));
  const int64_t f = padded<A>(args.f), o = padded<A>(args.o);
  constexpr int kOfU = kSums * kSums;
  // The cores' L2 caches hold a block together: weights and sums of products are read, and written, once a block.
  const int64_t per_tile = (kAll * o + (to_u + to_weight) * kOfU * f) * static_cast<int64_t>(sizeof(A));
  int64_t block = threads * (int64_t{3} << 18) / per_tile;
  block = block < 32 ? 32 : block > 256 ? 256 : block;
  block = round_up(tiles.count < block ? tiles.count : block, kGemmRows);
  const Panels of_f(f / kLanes<A>), of_o(o / kLanes<A>);
  // Forms of the same tile are written side by side: a vector between them, or all would fall into one set of the
  // cache.
  constexpr int64_t kGap = kLanes<A>;
  const int64_t forms_of_f = block * f + kGap, forms_of_o = block * o + kGap, size = args.o * f + kGap;
  const int64_t total = f * o + kGap;
  const Buffer<A> grads(kAll * forms_of_o), zero(f > o ? f : o);
  const Buffer<A> weights(to_u ? kAll * size : 0), sums(to_u ? kOfU * forms_of_f : 0);
  const Buffer<A> inputs(to_weight ? kOfU * forms_of_f : 0), totals(to_weight ? kAll * total : 0);
  zero.clear(f > o ? f : o);
  const Norm<A> norm(args, o);
  if (to_u) pack_weights<WeightForms, T>(args, true, weights.data, size, threads);
  WAVEMIX_PARALLEL(threads) {
    constexpr int kPatch = GradForms::in * GradForms::in;
    const ZeroBuffer<A> scratch(2 * kPatch * o), of_input(SumsTransposed::in * SumsTransposed::in * f);
    WAVEMIX_FOR
    for (int product = 0; product < (to_weight ? kAll : 0); ++product)
      std::memset(totals.data + product * total, 0, static_cast<size_t>(total) * sizeof(A));
    for (int64_t first = 0; first < tiles.count; first += block) {
      const int64_t count = tiles.count - first < block ? tiles.count - first : block;
      const int64_t whole = round_up(count, kGemmRows);
      WAVEMIX_FOR
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        grad_forms<T>(args, norm, tile, scratch.data, zero.data, grads.data + t * o, forms_of_o);
        if (!to_weight) continue;
        const Patch<T, A, SumsTransposed::in> input(args.u, tile.n, args.h, args.w, 2 * tile.row, 2 * tile.column,
                                                    args.f, f, of_input.data, zero.data);
        make_forms<SumsTransposed>(input.pixel, f, inputs.data + t * f, forms_of_f);
      }
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < (to_u ? kOfU * of_f.count : 0); ++unit) {
        const int64_t sum = unit / of_f.count, p = unit % of_f.count;
        const int64_t vectors = of_f.begin(p + 1) - of_f.begin(p), at = of_f.begin(p) * kLanes<A>;
        const A* start = zero.data;  // the first of a sum's four products sets it
        for (int product = 0; product < kAll; ++product) {
          if (sum_of(product) != sum) continue;
          gemm_panel<A, false>(vectors, whole, grads.data + product * forms_of_o, o,
                               weights.data + product * size + args.o * at, vectors * kLanes<A>, args.o, start,
                               sums.data + sum * forms_of_f + at, f);
          start = nullptr;
        }
      }
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < (to_weight ? kAll * of_o.count : 0); ++unit) {
        const int product = static_cast<int>(unit / of_o.count);
        const int64_t p = unit % of_o.count;
        const int64_t vectors = of_o.begin(p + 1) - of_o.begin(p), at = of_o.begin(p) * kLanes<A>;
        gemm_panel<A, true>(vectors, f, inputs.data + sum_of(product) * forms_of_f, f,
                            grads.data + product * forms_of_o + at, o, count, nullptr,
                            totals.data + product * total + at, o);
      }
      if (!to_u) continue;
      WAVEMIX_FOR
      for (int64_t t = 0; t < count; ++t) {
        const Tile tile(tiles, first + t);
        const Square<T, 2> square(made.d_u, tile.n, args.h, args.w, 2 * tile.row, 2 * tile.column, 0);
        make_pixels<Sums>(sums.data + t * f, forms_of_f, args.f, static_cast<const A*>(nullptr), square.pixel);
      }
    }
    const Buffer<A> taps(16 * o);
    Square<A, 4> square;
    for (int k = 0; k < 16; ++k) square.pixel[k / 4][k % 4] = taps.data + k * o;
    WAVEMIX_FOR
    for (int64_t i = 0; i < (to_weight ? args.f : 0); ++i) {
      make_pixels<WeightTransposed>(totals.data + i * o, total, o, static_cast<const A*>(nullptr), square.pixel);
      T* weight = static_cast<T*>(made.d_weight) + i * args.o * 16;
      for (int64_t j = 0; j < args.o; ++j)
        for (int k = 0; k < 16; ++k) store(weight[j * 16 + k], taps.data[k * o + j]);
    }
  }
}

}  // namespace

void deconv_backward(const DeconvArgs& args, const DeconvGradArgs& grads, int threads) {
  const choose::Deconv way = choose::deconv_backward(args, grads);
  if (way == choose::Deconv::few_channels) return deconv_few_channels_backward(args, grads, threads);
  if (way == choose::Deconv::matrix_units) return deconv_matrix_units_backward_weight(args, grads.d_weight, threads);
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
