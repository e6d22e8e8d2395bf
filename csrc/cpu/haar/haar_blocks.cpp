// One level of Haar along one to three axes. Compiled once per instruction set (see isa.h).
//
// Memory decides here too: the rows of one block stay in the L1 cache through the stages, each sample is read once and
// each coefficient written once.

#include "wavemix/haar_blocks.h"

#include <algorithm>

#include "cpu/haar/block_rows.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

template <class T>
struct BlockWorker {
  using A = typename Arithmetic<T>::type;
  static constexpr int kMost = 1 << kMaxHaarAxes;
  const HaarBlocksArgs& args;
  const bool pairs_inside;  // the row itself is transformed
  const int row_axes, rows, bands;
  const int64_t count, step;  // coefficients of a row, and elements between scratch rows
  const bool direct;          // rows go from memory to memory where no border is in them
  const bool joined;          // a coefficient's bands follow each other in memory
  A* row[kMost];
  A* samples;
  T* absent;  // a row of zeros in the place of bands that are not there; analysis writes to it
  int64_t at_outer[kMaxOuterAxes] = {}, at[kMaxHaarAxes] = {};
  int64_t x_offset[kMost], y_offset = 0;
  A row_weight[kMost];
  bool inside = false;  // every row is there

  static const HaarAxis& last(const HaarBlocksArgs& args) { return args.axis[args.axes - 1]; }
  static int64_t coefficients(const HaarBlocksArgs& args) { return args.inner > 0 ? args.inner : last(args).count; }
  static int64_t row_step(const HaarBlocksArgs& args) { return (coefficients(args) + 15) / 16 * 16; }
  static int64_t scratch_bytes(const HaarBlocksArgs& args) {
    return row_step(args) * ((1 << args.axes) + 3) * static_cast<int64_t>(sizeof(A));
  }
  // Blocks go by pieces of a run along the last axis around the rows: a piece divides once, and a block only steps.
  static constexpr int64_t kPiece = 16;
  static int64_t run_length(const HaarBlocksArgs& args) {
    const int row_axes = args.axes - (args.inner > 0 ? 0 : 1);
    return row_axes > 0 ? args.axis[row_axes - 1].count : 1;
  }
  static int64_t pieces_of_run(const HaarBlocksArgs& args) { return (run_length(args) + kPiece - 1) / kPiece; }
  static int64_t runs(const HaarBlocksArgs& args) {
    int64_t runs = 1;
    for (int i = 0; i < kMaxOuterAxes; ++i) runs *= args.outer[i];
    for (int i = 0; i < args.axes - (args.inner > 0 ? 1 : 2); ++i) runs *= args.axis[i].count;
    return runs;
  }
  static bool is_direct(const HaarBlocksArgs& args) {
    for (int k = 0; k < 1 << args.axes; ++k)
      if (args.weight[k] == 0) return false;
    const int64_t x_stride = args.inner > 0 ? args.inner_x : last(args).x_stride;
    const int64_t y_stride = args.inner > 0 ? args.inner_y : last(args).y_stride;
    return vectorises_in_place<T>() && x_stride == 1 && y_stride == 1;
  }

  static bool bands_join(const HaarBlocksArgs& args) {
    const int bands = 1 << args.axes;
    bool join = vectorises_in_place<T>() && args.present == bands && bands > 1;
    for (int k = 0; k < bands; ++k) join = join && args.weight[k] != 0 && args.band[k] == k;
    return join && (args.inner > 0 ? args.inner_y : last(args).y_stride) == bands;
  }

  BlockWorker(const HaarBlocksArgs& args, Scratch& scratch)
      : args(args),
        pairs_inside(args.inner == 0),
        row_axes(args.axes - (pairs_inside ? 1 : 0)),
        rows(1 << row_axes),
        bands(1 << args.axes),
        count(coefficients(args)),
        step(row_step(args)),
        direct(is_direct(args)),
        joined(bands_join(args)) {
    A* next = reinterpret_cast<A*>(scratch.block);
    for (int k = 0; k < bands; ++k, next += step) row[k] = next;
    samples = next;
    absent = reinterpret_cast<T*>(samples + 2 * step);
    std::fill_n(absent, count, T{});
  }

  template <bool analysis>
  void work_on(int64_t piece) {
    const int64_t length = run_length(args), pieces = pieces_of_run(args), first = piece % pieces * kPiece;
    const int64_t end = first + kPiece < length ? first + kPiece : length;
    int64_t rest = piece / pieces;
    for (int i = row_axes - 2; i >= 0; --i) {
      at[i] = rest % args.axis[i].count;
      rest /= args.axis[i].count;
    }
    for (int i = kMaxOuterAxes - 1; i >= 0; --i) {
      at_outer[i] = rest % args.outer[i];
      rest /= args.outer[i];
    }
    for (int64_t here = first; here < end;) {
      int64_t blocks = 1;  // that are alike
      if (row_axes > 0) {
        const HaarAxis& axis = args.axis[row_axes - 1];
        at[row_axes - 1] = here;
        const int64_t whole = (axis.front + axis.size) / 2 < end ? (axis.front + axis.size) / 2 : end;
        if (2 * here >= axis.front && whole > here) blocks = whole - here;
      }
      point();
      if (direct && inside) {
        by_rows([&](auto block) { several<analysis>(block, blocks); });
        here += blocks;
        continue;
      }
      if constexpr (analysis) {
        analyse_unit();
      } else {
        synthesise_unit();
      }
      ++here;
    }
  }

  // Where the rows lie. A weight of zero stands for a row that is not there.
  void point() {
    int64_t x = 0;
    y_offset = 0;
    for (int i = 0; i < kMaxOuterAxes; ++i) {
      x += at_outer[i] * args.outer_x[i];
      y_offset += at_outer[i] * args.outer_y[i];
    }
    x_offset[0] = x;
    row_weight[0] = A(1);
    for (int i = 0, known = 1; i < row_axes; ++i, known *= 2) {
      const HaarAxis& axis = args.axis[i];
      y_offset += at[i] * axis.y_stride;
      for (int r = known - 1; r >= 0; --r) {  // each row becomes two, in their places
        const int64_t offset = x_offset[r];
        const A weight = row_weight[r];
        for (int k = 0; k < 2; ++k) {
          int64_t sample = 2 * at[i] + k - axis.front;
          row_weight[2 * r + k] = weight;
          if (sample < 0) {
            sample = 0;
            row_weight[2 * r + k] = weight * static_cast<A>(axis.front_weight);
          } else if (sample >= axis.size) {
            sample = axis.tail_index;
            row_weight[2 * r + k] = weight * static_cast<A>(axis.tail_weight);
          }
          x_offset[2 * r + k] = offset + sample * axis.x_stride;
        }
      }
    }
    inside = true;
    for (int r = 0; r < rows; ++r) inside = inside && row_weight[r] == A(1);
  }

 private:
  template <bool analysis, class Block>
  void several(Block block, int64_t blocks) const {
    const int64_t size = last(args).size, whole = pairs_inside ? size / 2 : count;
    for (int64_t i = 0; i < blocks; ++i, block.advance()) {
      if constexpr (analysis) {
        block.analyse(whole);
        if (pairs_inside && size % 2 != 0)
          block.analyse_last(size, static_cast<A>(last(args).tail_weight), last(args).tail_index);
      } else {
        block.synthesise(whole);
        if (pairs_inside && size % 2 != 0) block.synthesise_last(size);
      }
    }
  }
  template <class Run>
  void by_rows(const Run& run) {
    if constexpr (!vectorises_in_place<T>()) return;
    if (pairs_inside) {
      if (rows == 1) return run(block<1, true>());
      if (rows == 2) return run(block<2, true>());
      return run(block<4, true>());
    }
    if (rows == 2) return run(block<2, false>());
    if (rows == 4) return run(block<4, false>());
    return run(block<8, false>());
  }
  template <int rows, bool paired>
  BlockRows<T, rows, paired> block() const {
    BlockRows<T, rows, paired> made;
    for (int r = 0; r < rows; ++r) made.x[r] = static_cast<T*>(args.x) + x_offset[r];
    made.x_step = row_axes > 0 ? 2 * args.axis[row_axes - 1].x_stride : 0;
    const int64_t y_step = row_axes > 0 ? args.axis[row_axes - 1].y_stride : 0;
    for (int k = 0; k < made.bands; ++k) {
      made.y[args.pattern[k]] = k < args.present ? static_cast<T*>(args.y) + y_offset + args.band[k] : absent;
      made.y_step[args.pattern[k]] = k < args.present ? y_step : 0;
      made.weight[args.pattern[k]] = static_cast<A>(args.weight[k]);
    }
    return made;
  }

  // `n` elements as arithmetic values: in place where they are, else in `copy`.
  const A* loaded(const T* src, int64_t stride, int64_t n, A* copy) const {
    if constexpr (std::is_same_v<T, A>) {
      if (stride == 1) return src;
    }
    load_row(src, stride, n, copy);
    return copy;
  }

  void analyse_unit() {
    for (int r = 0; r < rows; ++r) {
      const T* src = static_cast<const T*>(args.x) + x_offset[r];
      if (pairs_inside) {
        split(src, row_weight[r], row[2 * r], row[2 * r + 1]);
      } else {
        copy_scaled(loaded(src, args.inner_x, count, samples), row_weight[r], row[r]);
      }
    }
    butterflies();
    if (joined) return by_bands([&](auto n) { join_bands<n>(static_cast<T*>(args.y) + y_offset); });
    for (int k = 0; k < args.present; ++k) {
      T* dst = static_cast<T*>(args.y) + y_offset + args.band[k];
      const int64_t stride = pairs_inside ? last(args).y_stride : args.inner_y;
      const A weight = static_cast<A>(args.weight[k]);
      A* from = row[args.pattern[k]];
      if constexpr (std::is_same_v<T, A>) {
        if (stride == 1) {
          copy_scaled(from, weight, dst);
          continue;
        }
      }
      copy_scaled(from, weight, samples);
      store_row(samples, dst, stride, count);
    }
  }

  void synthesise_unit() {
    for (int k = args.present; k < bands; ++k) copy_scaled(nullptr, A(0), row[args.pattern[k]]);
    if (joined) {
      by_bands([&](auto n) { part_bands<n>(static_cast<const T*>(args.y) + y_offset); });
    } else {
      for (int k = 0; k < args.present; ++k) {
        const T* src = static_cast<const T*>(args.y) + y_offset + args.band[k];
        const int64_t stride = pairs_inside ? last(args).y_stride : args.inner_y;
        copy_scaled(loaded(src, stride, count, samples), static_cast<A>(args.weight[k]), row[args.pattern[k]]);
      }
    }
    butterflies();
    for (int r = 0; r < rows; ++r) {
      if (row_weight[r] == A(0)) continue;
      T* dst = static_cast<T*>(args.x) + x_offset[r];
      if (pairs_inside) {
        join(row[2 * r], row[2 * r + 1], dst);
      } else {
        store_row(row[r], dst, args.inner_x, count);
      }
    }
  }

  // All bands of a coefficient at once: one after the other they would go through memory as often.
  template <int n>
  void join_bands(T* __restrict to) const {
    const A* from[n];
    A weight[n];
    for (int k = 0; k < n; ++k) {
      from[k] = row[args.pattern[k]];
      weight[k] = static_cast<A>(args.weight[k]);
    }
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) WAVEMIX_EACH(n, k, { store(to[n * j + k], weight[k] * from[k][j]); });
  }
  template <int n>
  void part_bands(const T* __restrict from) const {
    A* to[n];
    A weight[n];
    for (int k = 0; k < n; ++k) {
      to[k] = row[args.pattern[k]];
      weight[k] = static_cast<A>(args.weight[k]);
    }
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) WAVEMIX_EACH(n, k, { to[k][j] = weight[k] * load(from[n * j + k]); });
  }
  template <class Run>
  void by_bands(const Run& run) const {
    if (bands == 2) return run(std::integral_constant<int, 2>{});
    if (bands == 4) return run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 8>{});
  }

  void copy_scaled(const A* src, A weight, A* __restrict dst) const {
    if (weight == A(0)) {  // nothing, not a product: NaN and infinity stay where they are
      for (int64_t j = 0; j < count; ++j) dst[j] = A(0);
      return;
    }
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) dst[j] = weight * src[j];
  }

  // Sums and differences of neighbours in a row of samples.
  void split(const T* src, A weight, A* __restrict low, A* __restrict high) const {
    const HaarAxis& axis = last(args);
    if (weight == A(0)) {
      for (int64_t j = 0; j < count; ++j) low[j] = high[j] = A(0);
      return;
    }
    const int64_t pairs = axis.size / 2;
    const A* x = loaded(src, axis.x_stride, axis.size, samples);
    WAVEMIX_SIMD
    for (int64_t j = 0; j < pairs; ++j) {
      const A a = weight * x[2 * j], b = weight * x[2 * j + 1];
      low[j] = a + b;
      high[j] = a - b;
    }
    if (axis.size % 2 != 0) {
      const A a = weight * x[axis.size - 1], edge = static_cast<A>(axis.tail_weight);
      const A b = edge == A(0) ? A(0) : edge * weight * x[axis.tail_index];
      low[pairs] = a + b;
      high[pairs] = a - b;
    }
  }

  void join(const A* low, const A* high, T* dst) const {
    const HaarAxis& axis = last(args);
    const int64_t pairs = axis.size / 2;
    if constexpr (std::is_same_v<T, A>) {
      if (axis.x_stride == 1) {
        interleave(low, high, pairs, axis.size, dst);
        return;
      }
    }
    interleave(low, high, pairs, axis.size, samples);
    store_row(samples, dst, axis.x_stride, axis.size);
  }
  static void interleave(const A* low, const A* high, int64_t pairs, int64_t size, A* __restrict out) {
    WAVEMIX_SIMD
    for (int64_t j = 0; j < pairs; ++j) {
      out[2 * j] = low[j] + high[j];
      out[2 * j + 1] = low[j] - high[j];
    }
    if (size % 2 != 0) out[size - 1] = low[pairs] + high[pairs];
  }

  // Sums and differences of rows, along every axis but a transformed row's own.
  void butterflies() {
    for (int bit = pairs_inside ? 2 : 1; bit < bands; bit *= 2) {
      for (int k = 0; k < bands; ++k) {
        if ((k & bit) == 0) butterfly_rows(row[k], row[k | bit]);
      }
    }
  }
  void butterfly_rows(A* __restrict a, A* __restrict b) const {
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) {
      const A p = a[j], q = b[j];
      a[j] = p + q;
      b[j] = p - q;
    }
  }
};

// Asks for huge pages behind what is written.
template <class T, bool analysis>
void ask_for_pages(const HaarBlocksArgs& args) {
  constexpr int kBand = kMaxOuterAxes + kMaxHaarAxes + 1;
  int64_t stride[kBand + 1] = {}, extent[kBand + 1];
  for (int64_t& n : extent) n = 1;
  for (int i = 0; i < kMaxOuterAxes; ++i) {
    stride[i] = analysis ? args.outer_y[i] : args.outer_x[i];
    extent[i] = args.outer[i];
  }
  for (int i = 0; i < args.axes; ++i) {
    stride[kMaxOuterAxes + i] = analysis ? args.axis[i].y_stride : args.axis[i].x_stride;
    extent[kMaxOuterAxes + i] = analysis ? args.axis[i].count : args.axis[i].size;
  }
  if (args.inner > 0) {
    stride[kBand - 1] = analysis ? args.inner_y : args.inner_x;
    extent[kBand - 1] = args.inner;
  }
  T* const to = static_cast<T*>(analysis ? args.y : args.x);
  const int bands = args.present;
  bool even = true;  // bands lie at equal distances
  for (int k = 0; k < bands; ++k) even = even && args.band[k] == k * args.band[1];
  if (analysis && even) {
    stride[kBand] = args.band[1];
    extent[kBand] = bands;
  }
  for (int k = 0; k < (analysis && !even ? bands : 1); ++k) advise(to + args.band[k], stride, extent, sizeof(T));
}

template <class T, bool analysis>
void run(const HaarBlocksArgs& args, int threads) {
  using Worker = BlockWorker<T>;
  ask_for_pages<T, analysis>(args);
  const int64_t runs = Worker::runs(args), pieces = runs * Worker::pieces_of_run(args);
  if (runs * Worker::run_length(args) * Worker::coefficients(args) * (1 << args.axes) < kSerialElements) threads = 1;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(Worker::scratch_bytes(args));
    Worker worker(args, scratch);
    WAVEMIX_FOR
    for (int64_t piece = 0; piece < pieces; ++piece) worker.template work_on<analysis>(piece);
  }
}

}  // namespace

void haar_blocks_analysis(const HaarBlocksArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { run<decltype(element), true>(args, threads); });
}
void haar_blocks_synthesis(const HaarBlocksArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { run<decltype(element), false>(args, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
