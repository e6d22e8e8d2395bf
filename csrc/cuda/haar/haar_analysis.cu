// Haar analysis, all levels in one pass over the image: a thread reduces a tile depth first, keeping one partial
// quad of bands per level in registers; where its tile ends, lanes exchange LL by shuffles. No shared memory, no
// barriers. Every lane of a warp stays until the end, for the shuffles; what lies outside counts as zero.
#include "cuda/haar/haar.cuh"

namespace wavemix::haar::analysis {

constexpr unsigned kWholeWarp = 0xffffffffu;

// low and high of a pair held by two lanes `mask` apart; both lanes get both.
template <class A>
__device__ void exchange(A x, int mask, bool is_second, const PairWeights<A>& weights, A second_weight, A& low,
                         A& high) {
  const A other = __shfl_xor_sync(kWholeWarp, x, mask);
  const A first = is_second ? other : x;
  const A second = second_weight * (is_second ? x : other);
  low = weights.low * first + second;
  high = weights.high * first - second;
}

// The levels beyond a thread's own tile. (i, j) is the quad's place at level `level - 1`; neighbours along columns
// sit `across` lanes apart, along rows `down` lanes. Of the lanes sharing a quad the first one writes.
template <class A, int N, class Store>
__device__ void climb(const Params& p, A (&x)[N], int level, int i, int j, int across, int down, bool writes,
                      const Store& store) {
  for (; level <= p.levels; ++level, across *= 2, down *= 2) {
    const bool right = j & 1, below = i & 1;
    i >>= 1;
    j >>= 1;
    const PairWeights<A> columns(2 * j + 1 < p.level[level - 1].w, p.edge, A(1));
    const PairWeights<A> rows(2 * i + 1 < p.level[level - 1].h, p.edge, A(0.5));
    A bands[4][N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A low, high;
      exchange(x[k], across, right, columns, A(1), low, high);
      exchange(low, down, below, rows, A(0.5), bands[0][k], bands[1][k]);
      exchange(high, down, below, rows, A(0.5), bands[2][k], bands[3][k]);
      x[k] = bands[0][k];
    }
    writes = writes && !right && !below;
    if (writes && i < p.level[level].h && j < p.level[level].w) store(level, i, j, bands);
  }
}

// --- Rows ------------------------------------------------------------------------------------------------

// Levels whose rows a thread reduces alone. Eight rows amortise the index arithmetic; with 16 columns (half types)
// one level more finishes them without a shuffle, and with 2 columns it keeps a level-5 group within a warp.
template <int V>
constexpr int kMaxRowLevels = V == 8 || V == 1 ? 4 : 3;

template <class T, int V, int M>  // M levels of rows within the thread
struct RowsAnalysis {
  using A = Arithmetic<T>;
  static_assert(kMaxHaarLevels - kColumnLevels<V> + kMaxHaarLevels - kMaxRowLevels<V> <= 5,
                "a group of lanes fits a warp");
  static_assert(kMaxRowLevels<V> >= kColumnLevels<V>, "a thread's columns are spent when it starts to climb");

  const Params& p;
  int64_t n, c;
  int column;  // the first of 2V
  bool active;

  // x = row `i` of LL at level `level`, this thread's columns.
  template <int level>
  __device__ void reduce(int i, A (&x)[width(V, level)]) const {
    constexpr int N = width(V, level);
    A bands[4][N] = {};
    const PairWeights<A> rows(2 * i + 1 < p.level[level - 1].h, p.edge, A(0.5));
    Row raw[2];
    if constexpr (level == 1) fetch_rows(i, raw);
#pragma unroll(level <= 2 ? 2 : 1)
    for (int below = 0; below < 2; ++below) {
      A finer[width(V, level - 1)], low[N], high[N];
      if constexpr (level == 1) {
        widen_inside(2 * i + below, raw[below], finer);
      } else {
        reduce<level - 1>(2 * i + below, finer);
      }
      reduce_columns<level>(finer, low, high);
      const A add = below ? A(0.5) : rows.low, subtract = below ? A(-0.5) : rows.high;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        bands[0][k] += add * low[k];
        bands[1][k] += subtract * low[k];
        bands[2][k] += add * high[k];
        bands[3][k] += subtract * high[k];
      }
    }
    const int j = column >> level;
    // A level coarser than the thread's columns is shared by neighbouring lanes: the first one writes it.
    const bool first = level <= kColumnLevels<V> || (column & ((1 << level) - 1)) == 0;
    if (active && first && i < p.level[level].h && j < p.level[level].w) store_bands(level, i, j, bands);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = bands[0][k];
  }

  template <int level>
  __device__ void reduce_columns(const A (&x)[width(V, level - 1)], A (&low)[width(V, level)],
                                 A (&high)[width(V, level)]) const {
    const bool pair_exists = (V > 1 && level <= kColumnLevels<V>) ||  // wide: whole words of columns
                             ((column >> level) << 1) + 1 < p.level[level - 1].w;
    const PairWeights<A> weights(pair_exists, p.edge, A(1));
    if constexpr (level <= kColumnLevels<V>) {
#pragma unroll
      for (int k = 0; k < width(V, level); ++k) {
        low[k] = weights.low * x[2 * k] + x[2 * k + 1];
        high[k] = weights.high * x[2 * k] - x[2 * k + 1];
      }
    } else {
      constexpr int kDistance = 1 << (level - 1);
      exchange(x[0], kDistance / (2 * V), (column & kDistance) != 0, weights, A(1), low[0], high[0]);
    }
  }

  // A thread's columns of one row as they lie in memory; narrow: two elements, wherever the stride puts them.
  struct Row {
    Raw<T, V> part[2];
  };

  __device__ bool inside(int i, int part) const {
    return active && i < p.level[0].h && column + (V > 1 ? 0 : part) < p.level[0].w;
  }

  // Pixels outside are read from the image's first place: no branch keeps the accesses apart.
  __device__ void fetch_rows(int i, Row (&raw)[2]) const {
    const int64_t* stride = p.image_stride;
    const T* image = static_cast<const T*>(p.image);
    const int64_t first = n * stride[0] + c * stride[1] + 2 * i * stride[2] + column * stride[3];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int64_t offset = first + below * stride[2] + part * (V > 1 ? V : stride[3]);
        fetch<T, V>(image + (inside(2 * i + below, part) ? offset : 0), raw[below].part[part]);
      }
    }
  }

  __device__ void widen_inside(int i, const Row& raw, A (&x)[2 * V]) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      A half[V];
      widen<T, V>(raw.part[part], half);
      const bool counts = inside(i, part);
#pragma unroll
      for (int k = 0; k < V; ++k) x[part * V + k] = counts ? half[k] : A(0);
    }
  }

  template <int N>
  __device__ void store_bands(int level, int i, int j, const A (&bands)[4][N]) const {
    const Level& out = p.level[level];
    T* high = static_cast<T*>(out.high) + n * out.stride[0] + c * out.stride[1] + i * out.stride[3] + j * out.stride[4];
#pragma unroll
    for (int b = 0; b < 3; ++b) store<T, N>(high + b * out.stride[2], bands[b + 1]);
    if (out.ll) {
      const int64_t* stride = out.ll_stride;
      T* ll = static_cast<T*>(out.ll) + here(n) * stride[0] + here(c) * stride[1] + here(i) * stride[2] +
              here(j) * stride[3];
      store<T, N>(ll, bands[0]);
    }
  }
};

template <class T, int V, int M>
__global__ void __launch_bounds__(kThreads, kMinBlocks) analysis_rows(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  const uint32_t task = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t lane = task & ((1u << p.group_shift) - 1);
  uint32_t group = task >> p.group_shift;
  const int column_shift = p.levels > kColumnLevels<V> ? p.levels - kColumnLevels<V> : 0;
  const int row_shift = p.levels - M;
  const int tile_column = static_cast<int>(p.inner.take(group));
  const int tile_row = static_cast<int>(p.middle.take(group));
  const int64_t c = p.outer.take(group);
  const int column = ((tile_column << column_shift) + static_cast<int>(lane & ((1u << column_shift) - 1))) * (2 * V);
  const int row = (tile_row << row_shift) + static_cast<int>(lane >> column_shift);  // at level M

  const RowsAnalysis<T, V, M> thread{p, group, c, column, task < p.tasks};
  constexpr int N = width(V, M);
  A x[N];
  thread.template reduce<M>(row, x);
  if constexpr (M == kMaxRowLevels<V>) {
    static_assert(N == 1, "one value per lane when climbing");
    const bool first = (column & ((1 << M) - 1)) == 0;
    climb(p, x, M + 1, row, column >> M, (1 << M) / (2 * V), 1 << column_shift, thread.active && first,
          [&](int level, int i, int j, const A(&bands)[4][1]) { thread.store_bands(level, i, j, bands); });
  }
}

// --- Channels --------------------------------------------------------------------------------------------

template <class T, int V, int M>  // the thread's own tile has 2^M x 2^M pixels of V channels
struct ChannelsAnalysis {
  using A = Arithmetic<T>;

  const Params& p;
  int64_t n, c;  // c: the first of V channels
  bool active;

  template <int level>
  __device__ void reduce(int i, int j, A (&x)[V]) const {
    A bands[4][V] = {};
    const PairWeights<A> rows(2 * i + 1 < p.level[level - 1].h, p.edge, A(0.5));
    const PairWeights<A> columns(2 * j + 1 < p.level[level - 1].w, p.edge, A(1));
    Raw<T, V> raw[4];
    if constexpr (level == 1) fetch_quad(i, j, raw);
    // Two quads in a body: in three nested loops ptxas waits for each pixel before it fetches the next.
#pragma unroll(level == 1 ? 4 : level == 2 && M == 3 ? 2 : 1)
    for (int q = 0; q < 4; ++q) {
      const bool below = q >> 1, right = q & 1;
      A finer[V];
      if constexpr (level == 1) {
        widen_inside(2 * i + below, 2 * j + right, raw[q], finer);
      } else {
        reduce<level - 1>(2 * i + below, 2 * j + right, finer);
      }
      const A row_low = below ? A(0.5) : rows.low, row_high = below ? A(-0.5) : rows.high;
      const A column_low = right ? A(1) : columns.low, column_high = right ? A(-1) : columns.high;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        bands[0][k] += row_low * column_low * finer[k];
        bands[1][k] += row_high * column_low * finer[k];
        bands[2][k] += row_low * column_high * finer[k];
        bands[3][k] += row_high * column_high * finer[k];
      }
    }
    if (active && i < p.level[level].h && j < p.level[level].w) store_bands(level, i, j, bands);
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = bands[0][k];
  }

  __device__ bool inside(int i, int j) const { return active && i < p.level[0].h && j < p.level[0].w; }

  // Pixels outside are read from the image's first one: no branch keeps the four accesses apart.
  __device__ void fetch_quad(int i, int j, Raw<T, V> (&raw)[4]) const {
    const int64_t* stride = p.image_stride;
    const T* image = static_cast<const T*>(p.image);
    const int64_t first = n * stride[0] + c * stride[1] + 2 * i * stride[2] + 2 * j * stride[3];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int below = q >> 1, right = q & 1;
      const int64_t offset = first + below * stride[2] + right * stride[3];
      fetch<T, V>(image + (inside(2 * i + below, 2 * j + right) ? offset : 0), raw[q]);
    }
  }

  __device__ void widen_inside(int i, int j, const Raw<T, V>& raw, A (&x)[V]) const {
    widen<T, V>(raw, x);
    const bool counts = inside(i, j);
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = counts ? x[k] : A(0);
  }

  __device__ void store_bands(int level, int i, int j, const A (&bands)[4][V]) const {
    const Level& out = p.level[level];
    T* high = static_cast<T*>(out.high) + n * out.stride[0] + c * out.stride[1] + i * out.stride[3] + j * out.stride[4];
    if constexpr (V > 1) {
      // Memory order is C, 3: V channels are three whole words, each a mixture of the bands.
#pragma unroll
      for (int word = 0; word < 3; ++word) {
        A mixed[V];
#pragma unroll
        for (int k = 0; k < V; ++k) mixed[k] = bands[(word * V + k) % 3 + 1][(word * V + k) / 3];
        store<T, V>(high + word * V, mixed);
      }
    } else {
#pragma unroll
      for (int b = 0; b < 3; ++b) store<T, V>(high + b * out.stride[2], bands[b + 1]);
    }
    if (out.ll) {
      const int64_t* stride = out.ll_stride;
      T* ll = static_cast<T*>(out.ll) + here(n) * stride[0] + here(c) * stride[1] + here(i) * stride[2] +
              here(j) * stride[3];
      store<T, V>(ll, bands[0]);
    }
  }
};

// A thread's own levels: 4x4 pixels keep small batches parallel; only five levels need 8x8, so that the 16 lanes of
// a tile leave at least two neighbouring words of channels (one 32-byte sector) to a warp.
constexpr int channel_levels(int levels) { return levels == kMaxHaarLevels ? 3 : std::min(levels, 2); }

template <class T, int V, int M>
__global__ void __launch_bounds__(kThreads, kMinBlocks) analysis_channels(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  const uint32_t task = blockIdx.x * kThreads + threadIdx.x;
  const int shift = p.levels - M;  // a group is 2^shift x 2^shift thread tiles by `channels` words
  const uint32_t channels = shift > 0 ? kWarp >> (2 * shift) : 1;
  const uint32_t lane = task & ((1u << p.group_shift) - 1);
  uint32_t group = task >> p.group_shift;
  const int64_t c = static_cast<int64_t>(p.inner.take(group) * channels + (lane & (channels - 1))) * V;
  const int tile_column = static_cast<int>(p.middle.take(group));
  const int tile_row = static_cast<int>(p.outer.take(group));
  const int sub = static_cast<int>(lane / channels);
  const int j = (tile_column << shift) + (sub & ((1 << shift) - 1));
  const int i = (tile_row << shift) + (sub >> shift);

  const ChannelsAnalysis<T, V, M> thread{p, group, c, task < p.tasks && c < p.c};
  A x[V];
  thread.template reduce<M>(i, j, x);
  if constexpr (M > 1) {
    climb(
        p, x, M + 1, i, j, static_cast<int>(channels), static_cast<int>(channels << shift), thread.active,
        [&](int level, int row, int column, const A(&bands)[4][V]) { thread.store_bands(level, row, column, bands); });
  }
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int V>
void launch_rows(const HaarArgs& args, const Form& form, void* stream) {
  const int row_levels = std::min(args.levels, kMaxRowLevels<V>);
  const auto grid_of = [&](const HaarArgs& a) {
    const int column_shift = std::max(a.levels - kColumnLevels<V>, 0);
    return Grid{column_shift + a.levels - row_levels, ceil_div(a.w, int64_t{2 * V} << column_shift),
                ceil_div(a.h, int64_t{1} << a.levels), a.c, a.n};
  };
  for_each_part(
      args, [&](const HaarArgs& a) { return grid_of(a).tasks(); },
      [&](const HaarArgs& a) {
        Params p = make_params(a);
        grid_of(a).fill(p);
        const Launch launch = make_launch("analysis", a, form, p.tasks, stream);
        switch (row_levels) {
          case 1:
            return launch(analysis_rows<T, V, 1>, p);
          case 2:
            return launch(analysis_rows<T, V, 2>, p);
          case 3:
            return launch(analysis_rows<T, V, 3>, p);
          default:
            return launch(analysis_rows<T, V, kMaxRowLevels<V>>, p);
        }
      });
}

template <class T, int V>
void launch_channels(const HaarArgs& args, const Form& form, void* stream) {
  const int own_levels = channel_levels(args.levels);
  const auto grid_of = [&](const HaarArgs& a) {
    const int shift = a.levels - own_levels;
    const int64_t words = ceil_div(a.c, V);
    const int64_t tile = int64_t{1} << a.levels;
    return Grid{shift > 0 ? 5 : 0, ceil_div(words, shift > 0 ? kWarp >> (2 * shift) : 1), ceil_div(a.w, tile),
                ceil_div(a.h, tile), a.n};
  };
  for_each_part(
      args, [&](const HaarArgs& a) { return grid_of(a).tasks(); },
      [&](const HaarArgs& a) {
        Params p = make_params(a);
        grid_of(a).fill(p);
        const Launch launch = make_launch("analysis", a, form, p.tasks, stream);
        switch (own_levels) {
          case 1:
            return launch(analysis_channels<T, V, 1>, p);
          case 2:
            return launch(analysis_channels<T, V, 2>, p);
          default:
            return launch(analysis_channels<T, V, 3>, p);
        }
      });
}

}  // namespace wavemix::haar::analysis

namespace wavemix {

void haar_analysis_cuda(const HaarArgs& args, void* stream) {
  haar::check_args(args);
  if (haar::is_empty(args)) return;
  const HaarArgs settled = haar::normalised(args);
  haar::with_form(settled, [&](auto zero, auto per_access, const haar::Form& form) {
    using T = decltype(zero);
    constexpr int V = decltype(per_access)::value;
    if (form.layout == haar::Layout::rows) return haar::analysis::launch_rows<T, V>(settled, form, stream);
    return haar::analysis::launch_channels<T, V>(settled, form, stream);
  });
}

}  // namespace wavemix
