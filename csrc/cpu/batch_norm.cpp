// Batch normalisation on the CPU. Compiled once per instruction set (see isa.h).
//
// Memory is everything here, so each function is one pass whatever the layouts. Work goes by tiles of major x minor
// elements, whose minor index is the one that is contiguous in memory: pixels (NCHW) or channels (channels_last). An
// operand laid out the other way is transposed through the L1 cache, tile by tile, so mixtures cost no extra pass.

#include "wavemix/batch_norm.h"

#include <math.h>

#include "convert.h"
#include "parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Elements of a tile's row: a converted row stays in L1. And rows of channels: sums down a tile's columns, or along its
// rows by lanes of four or more, are then chains of at most 256 floats before they go on in double.
constexpr int64_t kRow = 1024, kColumn = 256;
// A tile in which something is transposed: 64 x 64 floats are 16 KB, and 64 elements are whole cache lines either way.
constexpr int64_t kSquare = 64;
// Elements of a tile otherwise: enough to hide the cost of starting one and, in reductions, of leaving float for
// double.
constexpr int64_t kTile = 1 << 14, kReductionTile = 1 << 17;
constexpr int kMaxOperands = 3;

// --- The shape as all operands see it -------------------------------------------------------------------

// Strides. Pixels form runs, `pixel` apart; in NCHW a run is a plane, in channels_last all pixels are one run.
struct Operand {
  char* data = nullptr;
  int64_t outer[2] = {0, 0}, channel = 0, pixel = 0;
};

struct Geometry {
  int64_t c = 0, run = 1, outer[2] = {1, 1};
  Operand operand[kMaxOperands];
  bool by_channel = false;       // minor index: channels, not pixels
  int64_t fold = 1;              // by_channel: neighbouring pixels that make one row of fold * c elements
  int64_t major = 1, minor = 1;  // a tile's size; by_channel counts in folded pixels and in channels * fold
  int64_t majors = 1, minors = 1, tiles = 0;

  // planes[canonical]'s contiguous index becomes the minor one.
  Geometry(const BatchNormShape& shape, const Plane* const* planes, int count, int canonical, int64_t tile_elements)
      : c(shape.c) {
    // Pixel dimensions without those of extent 1, neighbours merged where every operand allows it.
    const int64_t extent[3] = {shape.n, shape.h, shape.w};
    constexpr int index[3] = {0, 2, 3};
    int64_t size[3] = {1, 1, 1}, stride[kMaxOperands][3] = {};
    int rank = 0;
    for (int d = 0; d < 3; ++d) {
      if (extent[d] == 1) continue;
      bool merge = rank > 0;
      for (int k = 0; k < count; ++k) merge = merge && stride[k][rank - 1] == planes[k]->stride[index[d]] * extent[d];
      if (!merge) ++rank;
      size[rank - 1] *= extent[d];
      for (int k = 0; k < count; ++k) stride[k][rank - 1] = planes[k]->stride[index[d]];
    }
    if (rank > 0) run = size[rank - 1];
    for (int d = 0; d < rank - 1; ++d) outer[2 - (rank - 1) + d] = size[d];
    for (int k = 0; k < count; ++k) {
      Operand& o = operand[k];
      o.data = static_cast<char*>(planes[k]->data);
      o.channel = planes[k]->stride[1];
      if (rank > 0) o.pixel = stride[k][rank - 1];
      for (int d = 0; d < rank - 1; ++d) o.outer[2 - (rank - 1) + d] = stride[k][d];
    }
    by_channel = channels_inner(operand[canonical]);

    bool square = false, dense = by_channel;
    for (int k = 0; k < count; ++k) {
      square = square || transposed(operand[k]);
      dense = dense && operand[k].channel == 1 && operand[k].pixel == c;
    }
    // Narrow pixels side by side make rows that are worth a loop.
    if (dense && 2 * c <= kRow) fold = kRow / c < run ? kRow / c : run;
    const int64_t all_minor = by_channel ? c * fold : run;
    const int64_t all_major = by_channel ? (run + fold - 1) / fold : c;
    minor = min(all_minor, square ? kSquare : kRow);
    major = min(all_major, square ? kSquare : (tile_elements + minor - 1) / minor);
    if (by_channel) major = min(major, kColumn);
    minors = (all_minor + minor - 1) / minor;
    majors = (all_major + major - 1) / major;
    tiles = outer[0] * outer[1] * majors * minors;
  }
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  bool channels_inner(const Operand& o) const { return c > 1 && o.channel == 1 && (run == 1 || o.pixel != 1); }
  bool pixels_inner(const Operand& o) const { return run > 1 && o.pixel == 1 && (c == 1 || o.channel != 1); }
  bool transposed(const Operand& o) const { return by_channel ? pixels_inner(o) : channels_inner(o); }
};

// Where one tile lies.
struct Tile {
  int64_t outer[2];
  int64_t channel, pixel;    // the first
  int64_t channels, pixels;  // how many
  int64_t rows;              // along the major index
  int64_t columns;           // of every row but perhaps the last, where folded pixels run out
  int64_t last_columns;

  Tile(const Geometry& g, int64_t tile) {
    const int64_t minor = tile % g.minors * g.minor, rest = tile / g.minors;
    const int64_t major = rest % g.majors * g.major, out = rest / g.majors;
    outer[0] = out / g.outer[1];
    outer[1] = out % g.outer[1];
    if (g.by_channel) {
      channel = minor;  // 0 where pixels are folded
      pixel = major * g.fold;
      channels = g.fold > 1 ? g.c : Geometry::min(g.c - channel, g.minor);
      pixels = Geometry::min(g.run - pixel, g.major * g.fold);
      rows = (pixels + g.fold - 1) / g.fold;
      columns = Geometry::min(pixels, g.fold) * channels;
      last_columns = (pixels - (rows - 1) * g.fold) * channels;
    } else {
      channel = major;
      pixel = minor;
      channels = rows = Geometry::min(g.c - channel, g.major);
      pixels = columns = last_columns = Geometry::min(g.run - pixel, g.minor);
    }
  }
  int64_t width(int64_t row) const { return row + 1 < rows ? columns : last_columns; }
};

// --- Tiles in and out -----------------------------------------------------------------------------------

// dst[j][i] = src[i][j], for i < rows and j < columns, in blocks of 4 x 4 registers.
template <class A>
void transpose(const A* src, int64_t src_stride, int64_t rows, int64_t columns, A* dst, int64_t dst_stride) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Four r[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&r[k], src + (i + k) * src_stride + j, sizeof(Four));
      const Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                 b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const Four c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
                 d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
      r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
      r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
      r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(dst + (j + k) * dst_stride + i, &r[k], sizeof(Four));
    }
    for (; j < columns; ++j)
      for (int k = 0; k < 4; ++k) dst[j * dst_stride + i + k] = src[(i + k) * src_stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
}

// One operand's rows, as arithmetic values.
template <class T>
struct Reader {
  using A = typename Arithmetic<T>::type;
  static constexpr bool direct = sizeof(T) == sizeof(A);  // T is A itself

  const T* base = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  bool transposed = false;
  A* buffer;  // a row, or a whole transposed tile
  A* stage;   // four converted rows on their way into it

  static constexpr int64_t scratch_elements = kSquare * kSquare + 4 * kSquare;
  static_assert(kSquare * kSquare >= kRow, "the tile buffer doubles as the row buffer");
  explicit Reader(A* scratch) : buffer(scratch), stage(scratch + kSquare * kSquare) {}

  void open(const Geometry& g, int k, const Tile& tile) {
    const Operand& o = g.operand[k];
    base = reinterpret_cast<const T*>(o.data) + tile.outer[0] * o.outer[0] + tile.outer[1] * o.outer[1] +
           tile.channel * o.channel + tile.pixel * o.pixel;
    row_stride = g.by_channel ? o.pixel * g.fold : o.channel;
    column_stride = g.by_channel ? o.channel : o.pixel;
    transposed = g.transposed(o);
    if (!transposed) return;
    // row_stride is 1 here: the tile's columns are what is contiguous.
    if constexpr (direct) {
      transpose(base, column_stride, tile.columns, tile.rows, buffer, kSquare);
    } else {
      for (int64_t j = 0; j < tile.columns; j += 4) {
        const int64_t n = tile.columns - j < 4 ? tile.columns - j : 4;
        for (int64_t i = 0; i < n; ++i) load_row(base + (j + i) * column_stride, 1, tile.rows, stage + i * kSquare);
        transpose<A>(stage, kSquare, n, tile.rows, buffer + j, kSquare);
      }
    }
  }
  const A* row(int64_t i, int64_t n) const {
    if (transposed) return buffer + i * kSquare;
    const T* p = base + i * row_stride;
    if constexpr (direct) {
      if (column_stride == 1) return p;
    }
    load_row(p, column_stride, n, buffer);
    return buffer;
  }
};

template <class T>
struct Writer {
  using A = typename Arithmetic<T>::type;
  T* base;
  int64_t row_stride, column_stride;
  A* buffer;

  static constexpr int64_t scratch_elements = kRow;
  explicit Writer(A* scratch) : base(nullptr), row_stride(0), column_stride(0), buffer(scratch) {}
  void open(const Geometry& g, int k, const Tile& tile) {
    const Operand& o = g.operand[k];
    base = reinterpret_cast<T*>(o.data) + tile.outer[0] * o.outer[0] + tile.outer[1] * o.outer[1] +
           tile.channel * o.channel + tile.pixel * o.pixel;
    row_stride = g.by_channel ? o.pixel * g.fold : o.channel;
    column_stride = g.by_channel ? o.channel : o.pixel;
  }
  A* row(int64_t i) {
    if constexpr (Reader<T>::direct) {
      if (column_stride == 1) return base + i * row_stride;
    }
    return buffer;
  }
  void close(int64_t i, int64_t n, const A* row) {
    T* p = base + i * row_stride;
    if (static_cast<const void*>(row) != p) store_row(row, p, column_stride, n);
  }
};

// --- Elementwise passes ---------------------------------------------------------------------------------

// A per-channel array, repeated for folded pixels.
template <class A>
const A* repeat(const Geometry& g, const A* values, A* scratch) {
  if (g.fold == 1) return values;
  for (int64_t i = 0; i < g.fold * g.c; ++i) scratch[i] = values[i % g.c];
  return scratch;
}

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

// Large tiles, unless the threads would go without.
int64_t reduction_tile(const BatchNormShape& shape, int threads) {
  const int64_t share = shape.n * shape.c * shape.h * shape.w / (8 * threads);
  return share < kTile ? kTile : Geometry::min(share, kReductionTile);
}

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
template <class A>
void row_products(const A* g, const A* y, A mean, int64_t n, A& sum, A& product) {
  A s = 0, q = 0;
  WAVEMIX_SIMD_SUM(s, q)
  for (int64_t i = 0; i < n; ++i) {
    s += g[i];
    q += g[i] * (y[i] - mean);
  }
  sum = s;
  product = q;
}
template <class A>
void column_products(const A* g, const A* y, const A* mean, int64_t n, A* sum, A* product) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    sum[i] += g[i];
    product[i] += g[i] * (y[i] - mean[i]);
  }
}

// Three (or two) doubles for every channel and thread; those of a thread that never came stay zero.
struct PerThread {
  int64_t channels, step;  // padded: no cache line is written by two threads
  Scratch scratch;
  PerThread(int threads, int64_t arrays, int64_t c)
      : channels((c + 7) / 8 * 8),
        step(arrays * channels),
        scratch(threads * step * static_cast<int64_t>(sizeof(double))) {
    std::memset(scratch.block, 0, static_cast<size_t>(threads * step) * sizeof(double));
  }
  double* of(int64_t thread, int64_t array) const {
    return reinterpret_cast<double*>(scratch.block) + thread * step + array * channels;
  }
};

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

// Calls `use` with a value of the element type.
template <class Use>
void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::f64:
      return use(double());
    case DType::f32:
      return use(float());
    case DType::f16:
      return use(f16());
    case DType::bf16:
      return use(bf16());
  }
}

bool empty(const BatchNormShape& shape) { return shape.n == 0 || shape.c == 0 || shape.h == 0 || shape.w == 0; }
int useful(const BatchNormShape& shape, int threads) {
  return shape.n * shape.c * shape.h * shape.w < kSerialElements ? 1 : threads;
}
template <class T>
void fill(void* array, int64_t c, double value) {
  using A = typename Arithmetic<T>::type;
  for (int64_t i = 0; i < c; ++i) static_cast<A*>(array)[i] = static_cast<A>(value);
}

void stats_of(const BatchNormShape& shape, const Plane& y, void* mean, void* var, int threads) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!empty(shape)) return stats<T>(shape, y, mean, var, useful(shape, threads));
    fill<T>(mean, shape.c, NAN);
    fill<T>(var, shape.c, NAN);
  });
}
void apply(const BatchNormShape& shape, const Plane& y, const void* scale, const void* shift, const Plane& residual,
           const Plane& out, int threads) {
  if (empty(shape)) return;
  threads = useful(shape, threads);
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (residual.data == nullptr) {
      elementwise<T, Pass::affine>(shape, y, nullptr, scale, nullptr, shift, out, threads);
    } else {
      elementwise<T, Pass::affine_residual>(shape, y, &residual, scale, nullptr, shift, out, threads);
    }
  });
}
void backward_reduce_of(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* mean,
                        const void* invstd, void* sum_g, void* sum_gx, int threads) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!empty(shape)) return backward_reduce<T>(shape, g, y, mean, invstd, sum_g, sum_gx, useful(shape, threads));
    fill<T>(sum_g, shape.c, 0.0);
    fill<T>(sum_gx, shape.c, 0.0);
  });
}
void backward_apply(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* a, const void* b,
                    const void* d, const Plane& out, int threads) {
  if (empty(shape)) return;
  with_type(shape.dtype, [&](auto zero) {
    elementwise<decltype(zero), Pass::combine>(shape, g, &y, a, b, d, out, useful(shape, threads));
  });
}

}  // namespace

extern const BatchNormKernels batch_norm_kernels = {stats_of, apply, backward_reduce_of, backward_apply};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
