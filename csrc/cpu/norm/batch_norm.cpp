// Batch normalisation on the CPU. Compiled once per instruction set (see isa.h).
//
// Memory decides, so each function is one pass whatever the layouts (tiles.h).

#include <math.h>

#include "cpu/norm/tiles.h"
namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// --- Elementwise passes ---------------------------------------------------------------------------------

enum class Pass {
  affine,           // x * a + d
  affine_residual,  // x * a + d + z
  combine,          // x * a + z * b + d
};

// The parameters are those of each column, or one for the row.
template <Pass pass, bool per_column, class A>
void elementwise_row(const A* x, const A* z, const A* a, const A* b, const A* d, A* out, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = per_column ? i : 0;
    A sum = d[k];
    if (pass == Pass::combine) sum += z[i] * b[k];
    sum += x[i] * a[k];
    if (pass == Pass::affine_residual) sum += z[i];
    out[i] = sum;
  }
}

template <class T, Pass pass>
void elementwise(const BatchNormShape& shape, const Plane& x, const Plane* z, const void* a, const void* b,
                 const void* d, const Plane& out, int threads) {
  using A = typename Arithmetic<T>::type;
  constexpr int inputs = pass == Pass::affine ? 1 : 2, parameters = pass == Pass::combine ? 3 : 2;
  const Plane* const planes[3] = {&out, &x, z};
  const Geometry g(shape, planes, 1 + inputs, 0, kTile);
  if (out.data != x.data && (inputs == 1 || out.data != z->data))
    advise<4>(out.data, out.stride, {shape.n, shape.c, shape.h, shape.w}, static_cast<int64_t>(sizeof(T)));
  const void* const arrays[3] = {a, d, b};
  Scratch repeated(3 * kRow * static_cast<int64_t>(sizeof(A)));
  const A* parameter[3] = {};
  for (int k = 0; k < parameters; ++k)
    parameter[k] = repeat(g, static_cast<const A*>(arrays[k]), reinterpret_cast<A*>(repeated.block) + k * kRow);
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch((Writer<T>::scratch_elements + inputs * Reader<T>::scratch_elements) *
                    static_cast<int64_t>(sizeof(A)));
    A* const memory = reinterpret_cast<A*>(scratch.block);
    Writer<T> writer(memory);
    Reader<T> first(memory + Writer<T>::scratch_elements);
    Reader<T> second(first.buffer + (inputs - 1) * Reader<T>::scratch_elements);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < g.tiles; ++unit) {
      const Tile tile(g, unit);
      writer.open(g, 0, tile);
      first.open(g, 1, tile);
      if (inputs == 2) second.open(g, 2, tile);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t n = tile.width(i), offset = tile.channel + (g.by_channel ? 0 : i);
        const A* const rx = first.row(i, n);
        const A* const rz = inputs == 2 ? second.row(i, n) : nullptr;
        const A* const pa = parameter[0] + offset;
        const A* const pd = parameter[1] + offset;
        const A* const pb = parameters == 3 ? parameter[2] + offset : nullptr;
        A* const ro = writer.row(i);
        if (g.by_channel) {
          elementwise_row<pass, true>(rx, rz, pa, pb, pd, ro, n);
        } else {
          elementwise_row<pass, false>(rx, rz, pa, pb, pd, ro, n);
        }
        writer.close(i, n, ro);
      }
    }
  }
}

// --- Reductions -----------------------------------------------------------------------------------------

// Sums of a tile, by row (one channel each) or by column. `second` is of squares or of products.
template <class A>
void row_moments(const A* x, A shift, int64_t n, A& sum, A& square) {
  A s = 0, q = 0;
  WAVEMIX_SIMD_SUM(s, q)
  for (int64_t i = 0; i < n; ++i) {
    const A v = x[i] - shift;
    s += v;
    q += v * v;
  }
  sum = s;
  square = q;
}
template <class A>
void column_moments(const A* x, const A* shift, int64_t n, A* sum, A* square) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const A v = x[i] - shift[i];
    sum[i] += v;
    square[i] += v * v;
  }
}
// Sums of folded columns by channel.
template <class A>
void fold_columns(const A* columns, int64_t count, int64_t channels, double* out) {
  for (int64_t j = 0; j < channels; ++j) out[j] = static_cast<double>(columns[j]);
  for (int64_t first = channels; first < count; first += channels) {
    WAVEMIX_SIMD
    for (int64_t j = 0; j < channels; ++j) out[j] += static_cast<double>(columns[first + j]);
  }
}

// Moments of channels so far: how many values, their mean and the sum of squared deviations from it. Merged as
// Chan, Golub and LeVeque (1983) do: no difference of large numbers.
struct Moments {
  double* count;
  double* mean;
  double* deviation;
  Moments(const PerThread& state, int64_t thread, int64_t channel)
      : count(state.of(thread, 0) + channel),
        mean(state.of(thread, 1) + channel),
        deviation(state.of(thread, 2) + channel) {}

  // To each of `channels` that have had equally many so far: n values whose differences to `shift` sum to `sum`, and
  // the squares of those to `square`.
  template <class A>
  void add(int64_t channels, double n, const A* shift, const double* sum, const double* square) {
    const double total = count[0] + n, share = n / total, weight = count[0] * share, inverse = 1.0 / n;
    WAVEMIX_SIMD
    for (int64_t j = 0; j < channels; ++j) {
      const double offset = sum[j] * inverse, difference = (static_cast<double>(shift[j]) - mean[j]) + offset;
      mean[j] += difference * share;
      deviation[j] += (square[j] - sum[j] * offset) + difference * difference * weight;
      count[j] = total;
    }
  }
};

// Shifting each tile by the mean of what this thread has seen of the channel keeps float sums accurate in one pass:
// by Welford's identity the squared distances of tiles from that mean are, all together, no more than a small multiple
// of the sum of squared deviations itself. The first tile has no such mean and is read twice.
template <class T>
void stats(const BatchNormShape& shape, const Plane& y, void* mean_out, void* var_out, int threads) {
  using A = typename Arithmetic<T>::type;
  const Plane* const planes[1] = {&y};
  const Geometry g(shape, planes, 1, 0, reduction_tile(shape, threads));
  PerThread state(threads, 3, g.c);
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch((Reader<T>::scratch_elements + 3 * kRow) * static_cast<int64_t>(sizeof(A)));
    A* const sum = reinterpret_cast<A*>(scratch.block);
    A* const square = sum + kRow;
    A* const shift = square + kRow;
    Reader<T> reader(shift + kRow);
    Scratch folded(2 * kRow * static_cast<int64_t>(sizeof(double)));
    double* const folded_sum = reinterpret_cast<double*>(folded.block);
    double* const folded_square = folded_sum + kRow;
    const int64_t thread = WAVEMIX_THREAD;
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < g.tiles; ++unit) {
      const Tile tile(g, unit);
      reader.open(g, 0, tile);
      if (!g.by_channel) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          Moments moments(state, thread, tile.channel + i);
          const A* const row = reader.row(i, tile.columns);
          const double n = static_cast<double>(tile.columns);
          A center = static_cast<A>(*moments.mean), s, q;
          if (*moments.count == 0) {
            row_moments(row, A(0), tile.columns, s, q);
            center = static_cast<A>(s / n);
          }
          row_moments(row, center, tile.columns, s, q);
          const double exact[2] = {static_cast<double>(s), static_cast<double>(q)};
          moments.add(1, n, &center, exact, exact + 1);
        }
        continue;
      }
      Moments moments(state, thread, tile.channel);
      const double n = static_cast<double>(tile.pixels);
      const auto accumulate = [&] {
        for (int64_t j = 0; j < tile.columns; ++j) {
          shift[j] = j < tile.channels ? shift[j] : shift[j - tile.channels];
          sum[j] = square[j] = A(0);
        }
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t width = tile.width(i);
          column_moments(reader.row(i, width), shift, width, sum, square);
        }
        fold_columns(sum, tile.columns, tile.channels, folded_sum);
        fold_columns(square, tile.columns, tile.channels, folded_square);
      };
      for (int64_t j = 0; j < tile.channels; ++j) shift[j] = static_cast<A>(moments.mean[j]);
      if (*moments.count == 0) {  // of one channel, and so of all: a tile's channels always come together
        accumulate();
        for (int64_t j = 0; j < tile.channels; ++j) shift[j] = static_cast<A>(folded_sum[j] / n);
      }
      accumulate();
      moments.add(tile.channels, n, shift, folded_sum, folded_square);
    }
  }
  Moments all(state, 0, 0);
  for (int64_t c = 0; c < g.c; ++c) {
    for (int t = 1; t < threads; ++t) {
      const Moments other(state, t, c);
      const double zero = 0;
      if (*other.count > 0) Moments(state, 0, c).add(1, *other.count, other.mean, &zero, other.deviation);
    }
    static_cast<A*>(mean_out)[c] = static_cast<A>(all.mean[c]);
    static_cast<A*>(var_out)[c] = static_cast<A>(all.deviation[c] / all.count[c]);
  }
}

template <class T>
void backward_reduce(const BatchNormShape& shape, const Plane& g_plane, const Plane& y_plane, const void* mean,
                     const void* invstd, void* sum_g, void* sum_gx, int threads) {
  using A = typename Arithmetic<T>::type;
  const Plane* const planes[2] = {&g_plane, &y_plane};
  const int64_t elements = reduction_tile(shape, threads);
  // Sums by column need no horizontal additions: rows of channels wherever one of the two has them.
  const int canonical = Geometry(shape, planes, 2, 0, elements).by_channel ? 0 : 1;
  const Geometry g(shape, planes, 2, canonical, elements);
  PerThread state(threads, 2, g.c);
  Scratch repeated(kRow * static_cast<int64_t>(sizeof(A)));
  const A* const center = repeat(g, static_cast<const A*>(mean), reinterpret_cast<A*>(repeated.block));
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch((2 * Reader<T>::scratch_elements + 2 * kRow) * static_cast<int64_t>(sizeof(A)));
    A* const sum = reinterpret_cast<A*>(scratch.block);
    A* const product = sum + kRow;
    Reader<T> gradient(product + kRow);
    Reader<T> value(gradient.buffer + Reader<T>::scratch_elements);
    double* const sums = state.of(WAVEMIX_THREAD, 0);
    double* const products = state.of(WAVEMIX_THREAD, 1);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < g.tiles; ++unit) {
      const Tile tile(g, unit);
      gradient.open(g, 0, tile);
      value.open(g, 1, tile);
      if (!g.by_channel) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t channel = tile.channel + i;
          A s, q;
          row_products(gradient.row(i, tile.columns), value.row(i, tile.columns), center[channel], tile.columns, s, q);
          sums[channel] += static_cast<double>(s);
          products[channel] += static_cast<double>(q);
        }
        continue;
      }
      for (int64_t j = 0; j < tile.columns; ++j) sum[j] = product[j] = A(0);
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t width = tile.width(i);
        column_products(gradient.row(i, width), value.row(i, width), center + tile.channel, width, sum, product);
      }
      for (int64_t first = 0; first < tile.columns; first += tile.channels) {
        for (int64_t j = 0; j < tile.channels; ++j) {
          sums[tile.channel + j] += static_cast<double>(sum[first + j]);
          products[tile.channel + j] += static_cast<double>(product[first + j]);
        }
      }
    }
  }
  for (int64_t c = 0; c < g.c; ++c) {
    double total = 0, product = 0;
    for (int t = 0; t < threads; ++t) {
      total += state.of(t, 0)[c];
      product += state.of(t, 1)[c];
    }
    static_cast<A*>(sum_g)[c] = static_cast<A>(total);
    static_cast<A*>(sum_gx)[c] = static_cast<A>(product * static_cast<double>(static_cast<const A*>(invstd)[c]));
  }
}

// --- Entry points ---------------------------------------------------------------------------------------

template <class T>
void fill(void* array, int64_t c, double value) {
  using A = typename Arithmetic<T>::type;
  for (int64_t i = 0; i < c; ++i) static_cast<A*>(array)[i] = static_cast<A>(value);
}

}  // namespace

void batch_norm_stats(const BatchNormShape& shape, const Plane& y, void* mean, void* var, int threads) {
  dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!empty(shape)) return stats<T>(shape, y, mean, var, useful(shape, threads));
    fill<T>(mean, shape.c, NAN);
    fill<T>(var, shape.c, NAN);
  });
}
void batch_norm_apply(const BatchNormShape& shape, const Plane& y, const void* scale, const void* shift,
                      const Plane& residual, const Plane& out, int threads) {
  if (empty(shape)) return;
  threads = useful(shape, threads);
  dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (residual.data == nullptr) {
      elementwise<T, Pass::affine>(shape, y, nullptr, scale, nullptr, shift, out, threads);
    } else {
      elementwise<T, Pass::affine_residual>(shape, y, &residual, scale, nullptr, shift, out, threads);
    }
  });
}
void batch_norm_backward_reduce(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* mean,
                                const void* invstd, void* sum_g, void* sum_gx, int threads) {
  dispatch(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!empty(shape)) return backward_reduce<T>(shape, g, y, mean, invstd, sum_g, sum_gx, useful(shape, threads));
    fill<T>(sum_g, shape.c, 0.0);
    fill<T>(sum_gx, shape.c, 0.0);
  });
}
void batch_norm_backward_apply(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* a,
                               const void* b, const void* d, const Plane& out, int threads) {
  if (empty(shape)) return;
  dispatch(shape.dtype, [&](auto zero) {
    elementwise<decltype(zero), Pass::combine>(shape, g, &y, a, b, d, out, useful(shape, threads));
  });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
