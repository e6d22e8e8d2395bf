// The norm in front of a residual branch, its gradient and the sum behind the branch. Compiled once per instruction set
// (see isa.h).
//
// All of them are one map of up to three images, (u - center) * scale + shift + v * rise + w, with parameters that
// depend on the channel and perhaps on the image: one pass. x is centred before it is scaled, so nothing cancels where
// its mean is far above its deviation.

#include "cpu/norm/tiles.h"
namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Parameters as the pass reads them: for each image `columns` values, channels repeated for folded pixels.
template <class A>
struct Parameters {
  int64_t images, columns, channels;
  Scratch memory;
  Parameters(const Geometry& g, int64_t count)
      : images(count), columns(g.fold * g.c), channels(g.c), memory(4 * count * columns * 8) {}
  A* of(int64_t k, int64_t image) const {
    return reinterpret_cast<A*>(memory.block) + (k * images + (images > 1 ? image : 0)) * columns;
  }
  // `value` (image, channel) everywhere.
  template <class Value>
  void fill(int64_t k, const Value& value) const {
    for (int64_t i = 0; i < images; ++i) {
      A* const row = of(k, i);
      for (int64_t j = 0; j < channels; ++j) row[j] = static_cast<A>(value(i, j));
      for (int64_t j = channels; j < columns; ++j) row[j] = row[j - channels];
    }
  }
};
enum { kCenter, kScale, kShift, kRise };

template <bool has_v, bool has_w, bool per_column, class A>
void map_row(const A* u, const A* v, const A* w, const A* const (&p)[4], A* out, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = per_column ? i : 0;
    A sum = (u[i] - p[kCenter][k]) * p[kScale][k] + p[kShift][k];
    if (has_v) sum += v[i] * p[kRise][k];
    if (has_w) sum += w[i];
    out[i] = sum;
  }
}

// `make` fills the parameters, once the geometry is known.
template <class U, class V, class W, class O, bool has_v, bool has_w, class Make>
void map(const BatchNormShape& shape, bool by_image, const Plane& u, const Plane& v, const Plane& w, const Plane& out,
         int threads, const Make& make) {
  using A = typename Arithmetic<O>::type;
  constexpr int inputs = 1 + has_v + has_w, at_w = 2 + has_v;
  const Plane* const planes[4] = {&out, &u, has_v ? &v : &w, &w};
  const Geometry g(shape, planes, 1 + inputs, 0, kTile, by_image);
  if (out.data != u.data)
    advise<4>(out.data, out.stride, {shape.n, shape.c, shape.h, shape.w}, static_cast<int64_t>(sizeof(O)));
  const Parameters<A> parameters(g, by_image ? shape.n : 1);
  make(parameters);
  WAVEMIX_PARALLEL(threads) {
    constexpr int64_t step = Reader<U>::scratch_elements;
    Scratch scratch((Writer<O>::scratch_elements + inputs * step) * static_cast<int64_t>(sizeof(A)));
    A* const memory = reinterpret_cast<A*>(scratch.block);
    Writer<O> writer(memory);
    Reader<U> first(memory + Writer<O>::scratch_elements);
    Reader<V> second(first.buffer + has_v * step);
    Reader<W> third(first.buffer + (inputs - 1) * step);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < g.tiles; ++unit) {
      const Tile tile(g, unit);
      writer.open(g, 0, tile);
      first.open(g, 1, tile);
      if (has_v) second.open(g, 2, tile);
      if (has_w) third.open(g, at_w, tile);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t n = tile.width(i), offset = tile.channel + (g.by_channel ? 0 : i);
        const A* const ru = first.row(i, n);
        const A* const rv = has_v ? second.row(i, n) : nullptr;
        const A* const rw = has_w ? third.row(i, n) : nullptr;
        const A* p[4];
        for (int k = 0; k < 4; ++k) p[k] = parameters.of(k, tile.image(g)) + offset;
        A* const ro = writer.row(i);
        if (g.by_channel) {
          map_row<has_v, has_w, true>(ru, rv, rw, p, ro, n);
        } else {
          map_row<has_v, has_w, false>(ru, rv, rw, p, ro, n);
        }
        writer.close(i, n, ro);
      }
    }
  }
}

// Sums that a gradient needs, in double. `weight` and `bias` (c): of g * xhat and of g. For each image `first` and
// `second`: of weight * g and of weight * g * xhat. By channel the latter are not asked for.
template <class T, class B>
void sums(const PreNormArgs& args, const Plane& grad, const Plane& x, double* by_channel, double* by_image,
          int threads) {
  using A = typename Arithmetic<T>::type;
  const BatchNormShape& shape = args.shape.around;
  const Plane* const planes[2] = {&grad, &x};
  const Geometry g(shape, planes, 2, 0, reduction_tile(shape, threads), args.by_image);
  const Parameters<A> center(g, args.by_image ? shape.n : 1);
  const A* const mean = static_cast<const A*>(args.mean);
  const A* const invstd = static_cast<const A*>(args.invstd);
  const A* const weight = static_cast<const A*>(args.weight);
  center.fill(0, [&](int64_t i, int64_t j) { return mean[args.by_image ? i : j]; });
  const PerThread channels(threads, 2, g.c), images(threads, 2, args.by_image ? shape.n : 1);
  WAVEMIX_PARALLEL(threads) {
    constexpr int64_t step = Reader<T>::scratch_elements;
    Scratch scratch((2 * step + 2 * kRow) * static_cast<int64_t>(sizeof(A)));
    A* const sum = reinterpret_cast<A*>(scratch.block);
    A* const product = sum + kRow;
    Reader<B> gradient(product + kRow);
    Reader<T> value(gradient.buffer + step);
    const int64_t thread = WAVEMIX_THREAD;
    // One channel's sums of g and g * (x - mean) in one tile.
    const auto add = [&](int64_t image, int64_t channel, double s, double q) {
      q *= static_cast<double>(invstd[args.by_image ? image : channel]);
      channels.of(thread, 0)[channel] += q;
      channels.of(thread, 1)[channel] += s;
      if (!args.by_image) return;
      const double factor = weight == nullptr ? 1.0 : static_cast<double>(weight[channel]);
      images.of(thread, 0)[image] += factor * s;
      images.of(thread, 1)[image] += factor * q;
    };
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < g.tiles; ++unit) {
      const Tile tile(g, unit);
      const int64_t image = tile.image(g);
      gradient.open(g, 0, tile);
      value.open(g, 1, tile);
      const A* const shift = center.of(0, image) + tile.channel;
      if (!g.by_channel) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          A s, q;
          row_products(gradient.row(i, tile.columns), value.row(i, tile.columns), shift[i], tile.columns, s, q);
          add(image, tile.channel + i, static_cast<double>(s), static_cast<double>(q));
        }
        continue;
      }
      for (int64_t j = 0; j < tile.columns; ++j) sum[j] = product[j] = A(0);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t width = tile.width(i);
        column_products(gradient.row(i, width), value.row(i, width), shift, width, sum, product);
      }
      for (int64_t first = 0; first < tile.columns; first += tile.channels)
        for (int64_t j = 0; j < tile.channels; ++j)
          add(image, tile.channel + j, static_cast<double>(sum[first + j]), static_cast<double>(product[first + j]));
    }
  }
  const auto total = [threads](const PerThread& from, int64_t count, double* to) {
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t j = 0; j < count; ++j) {
        double value = 0;
        for (int t = 0; t < threads; ++t) value += from.of(t, k)[j];
        to[k * count + j] = value;
      }
  };
  total(channels, g.c, by_channel);
  if (args.by_image) total(images, shape.n, by_image);
}

// --- The functions ----------------------------------------------------------------------------------------

template <class T, class B>
void apply(const PreNormArgs& args, const Plane& x, const Plane& out, int threads) {
  using A = typename Arithmetic<T>::type;
  const A* const mean = static_cast<const A*>(args.mean);
  const A* const invstd = static_cast<const A*>(args.invstd);
  const A* const weight = static_cast<const A*>(args.weight);
  const A* const bias = static_cast<const A*>(args.bias);
  const bool by_image = args.by_image;
  map<T, T, T, B, false, false>(args.shape.around, by_image, x, {}, {}, out, threads, [=](const Parameters<A>& p) {
    p.fill(kCenter, [=](int64_t i, int64_t j) { return mean[by_image ? i : j]; });
    p.fill(kScale,
           [=](int64_t i, int64_t j) { return invstd[by_image ? i : j] * (weight == nullptr ? A(1) : weight[j]); });
    p.fill(kShift, [=](int64_t, int64_t j) { return bias == nullptr ? A(0) : bias[j]; });
  });
}

// With xhat = (x - mean) * invstd and h = weight * g, over the m values that share statistics:
// dx = invstd * (h - mean(h) - xhat * mean(h * xhat)).
template <class T, class B>
void backward(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
              const Plane& out, void* d_weight, void* d_bias, int threads) {
  using A = typename Arithmetic<T>::type;
  const BatchNormShape& shape = args.shape.around;
  const bool by_image = args.by_image;
  const int64_t c = shape.c, n = shape.n, pixels = shape.h * shape.w;
  Scratch memory(2 * (c + n) * static_cast<int64_t>(sizeof(double)));
  double* const by_channel = reinterpret_cast<double*>(memory.block);
  double* const of_images = by_channel + 2 * c;
  sums<T, B>(args, grad, x, by_channel, of_images, threads);
  for (int64_t j = 0; j < c; ++j) {
    if (d_weight != nullptr) static_cast<A*>(d_weight)[j] = static_cast<A>(by_channel[j]);
    if (d_bias != nullptr) static_cast<A*>(d_bias)[j] = static_cast<A>(by_channel[c + j]);
  }
  const A* const mean = static_cast<const A*>(args.mean);
  const A* const invstd = static_cast<const A*>(args.invstd);
  const A* const weight = static_cast<const A*>(args.weight);
  const double share = own ? 1.0 / static_cast<double>(by_image ? c * pixels : n * pixels) : 0.0;
  const auto factor = [=](int64_t j) { return weight == nullptr ? 1.0 : static_cast<double>(weight[j]); };
  const auto deviation = [=](int64_t i, int64_t j) { return static_cast<double>(invstd[by_image ? i : j]); };
  map<T, B, T, T, true, true>(shape, by_image, x, grad, around, out, threads, [&](const Parameters<A>& p) {
    p.fill(kCenter, [=](int64_t i, int64_t j) { return mean[by_image ? i : j]; });
    p.fill(kRise, [=](int64_t i, int64_t j) { return deviation(i, j) * factor(j); });
    p.fill(kScale, [=](int64_t i, int64_t j) {
      const double sum = by_image ? of_images[n + i] : factor(j) * by_channel[j];
      return -deviation(i, j) * deviation(i, j) * sum * share;
    });
    p.fill(kShift, [=](int64_t i, int64_t j) {
      const double sum = by_image ? of_images[i] : factor(j) * by_channel[c + j];
      return -deviation(i, j) * sum * share;
    });
  });
}

template <class T, class B>
void join(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path, const Plane& out,
          int threads) {
  using A = typename Arithmetic<T>::type;
  const A* const factor = static_cast<const A*>(path);
  map<B, T, T, T, false, true>(
      shape.around, factor != nullptr, branch, {}, x, out, threads, [=](const Parameters<A>& p) {
        p.fill(kCenter, [](int64_t, int64_t) { return A(0); });
        p.fill(kScale, [=](int64_t i, int64_t) { return factor == nullptr ? A(1) : factor[i]; });
        p.fill(kShift, [](int64_t, int64_t) { return A(0); });
      });
}

// --- Entry points -----------------------------------------------------------------------------------------

// Calls `use` with values of the two types.
template <class Use>
void with_types(const PreNormShape& shape, const Use& use) {
  switch (shape.around.dtype) {
    case DType::f64:
      return use(double(), double());
    case DType::f32:
      if (shape.branch == DType::f16) return use(float(), f16());
      if (shape.branch == DType::bf16) return use(float(), bf16());
      return use(float(), float());
    case DType::f16:
      return use(f16(), f16());
    case DType::bf16:
      return use(bf16(), bf16());
  }
}

}  // namespace

void pre_norm_apply(const PreNormArgs& args, const Plane& x, const Plane& out, int threads) {
  const BatchNormShape& shape = args.shape.around;
  if (empty(shape)) return;
  with_types(args.shape,
             [&](auto a, auto b) { apply<decltype(a), decltype(b)>(args, x, out, useful(shape, threads)); });
}
void pre_norm_backward(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
                       const Plane& out, void* d_weight, void* d_bias, int threads) {
  const BatchNormShape& shape = args.shape.around;
  with_types(args.shape, [&](auto a, auto b) {
    using A = typename Arithmetic<decltype(a)>::type;
    if (!empty(shape)) {
      return backward<decltype(a), decltype(b)>(args, own, grad, x, around, out, d_weight, d_bias,
                                                useful(shape, threads));
    }
    const size_t bytes = static_cast<size_t>(shape.c) * sizeof(A);
    if (d_weight != nullptr) std::memset(d_weight, 0, bytes);
    if (d_bias != nullptr) std::memset(d_bias, 0, bytes);
  });
}
void pre_norm_join(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path, const Plane& out,
                   int threads) {
  if (empty(shape.around)) return;
  with_types(shape, [&](auto a, auto b) {
    join<decltype(a), decltype(b)>(shape, x, branch, path, out, useful(shape.around, threads));
  });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
