// Images of any strides, cut into tiles that go through the L1 cache. Passes over memory share this.
//
// Work goes by tiles of major x minor elements, whose minor index is the one that is contiguous in memory: pixels
// (NCHW) or channels (channels_last). An operand laid out the other way is transposed through the cache, tile by tile,
// so mixtures cost no extra pass. Included by the per-ISA units only.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common/convert.h"
#include "cpu/common/parallel.h"
#include "cpu/common/transpose.h"
#include "wavemix/norm.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// Elements of a tile's row: a converted row stays in L1. Rows of channels are limited too, so that sums down a tile's
// columns, or along its rows by lanes of four or more, are chains of at most 256 floats before they go on in double.
constexpr int64_t kRow = 1024, kColumn = 256;
// A tile in which something is transposed: 64 x 64 floats are 16 KB, and 64 elements are whole cache lines either way.
constexpr int64_t kSquare = 64;
// Elements of a tile otherwise: enough to hide the cost of starting one and, in reductions, of leaving float for
// double.
constexpr int64_t kTile = 1 << 14, kReductionTile = 1 << 17;
constexpr int kMaxOperands = 4;

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
  int image_dimension = -1;  // among the outer ones; -1 unless several images stay apart

  // planes[canonical]'s contiguous index becomes the minor one. `apart`: no run goes from one image into the next.
  Geometry(const BatchNormShape& shape, const Plane* const* planes, int count, int canonical, int64_t tile_elements,
           bool apart = false)
      : c(shape.c) {
    apart = apart && shape.n > 1;
    // Pixel dimensions without those of extent 1, neighbours merged where every operand allows it.
    const int64_t extent[3] = {shape.n, shape.h, shape.w};
    constexpr int index[3] = {0, 2, 3};
    int64_t size[3] = {1, 1, 1}, stride[kMaxOperands][3] = {};
    int rank = 0;
    for (int d = 0; d < 3; ++d) {
      const bool behind_images = apart && rank == 1;
      if (extent[d] == 1 && !(behind_images && d == 2)) continue;  // images of one pixel are runs of one, too
      bool merge = rank > 0 && !behind_images;
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
    if (apart) image_dimension = 2 - (rank - 1);
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

// The place of one tile.
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
  int64_t image(const Geometry& g) const { return g.image_dimension < 0 ? 0 : outer[g.image_dimension]; }
  int64_t width(int64_t row) const { return row + 1 < rows ? columns : last_columns; }
};

// --- Tiles in and out -----------------------------------------------------------------------------------

// One operand's rows, as arithmetic values.
template <class T>
struct Reader {
  using A = typename Arithmetic<T>::type;
  static constexpr bool direct = sizeof(T) == sizeof(A);  // T is A itself

  const T* base = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  bool transposed = false;
  A* buffer;     // a row, or a whole transposed tile as it is
  A* converted;  // a row of that

  static constexpr int64_t scratch_elements = kSquare * kSquare + kSquare;
  static_assert(kSquare * kSquare >= kRow, "the tile buffer doubles as the row buffer");
  explicit Reader(A* scratch) : buffer(scratch), converted(scratch + kSquare * kSquare) {}

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
      transpose_halves(reinterpret_cast<const uint16_t*>(base), column_stride, tile.columns, tile.rows,
                       reinterpret_cast<uint16_t*>(buffer), kSquare);
    }
  }
  const A* row(int64_t i, int64_t n) const {
    if (transposed) {
      if constexpr (direct) return buffer + i * kSquare;
      load_row(reinterpret_cast<const T*>(buffer) + i * kSquare, 1, n, converted);
      return converted;
    }
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

// A per-channel array, repeated for folded pixels.
template <class A>
static inline const A* repeat(const Geometry& g, const A* values, A* scratch) {
  if (g.fold == 1) return values;
  for (int64_t i = 0; i < g.fold * g.c; ++i) scratch[i] = values[i % g.c];
  return scratch;
}

// --- Reductions -----------------------------------------------------------------------------------------

// Large tiles, unless the threads would go without.
static inline int64_t reduction_tile(const BatchNormShape& shape, int threads) {
  const int64_t share = shape.n * shape.c * shape.h * shape.w / (8 * threads);
  return share < kTile ? kTile : Geometry::min(share, kReductionTile);
}

template <class A>
static inline void row_products(const A* g, const A* y, A mean, int64_t n, A& sum, A& product) {
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
static inline void column_products(const A* g, const A* y, const A* mean, int64_t n, A* sum, A* product) {
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

// --- Shapes ---------------------------------------------------------------------------------------------

static inline bool empty(const BatchNormShape& shape) {
  return shape.n == 0 || shape.c == 0 || shape.h == 0 || shape.w == 0;
}
static inline int useful(const BatchNormShape& shape, int threads) {
  return shape.n * shape.c * shape.h * shape.w < kSerialElements ? 1 : threads;
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
