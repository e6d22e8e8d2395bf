// Haar synthesis, all levels in one pass over the image: a thread expands its tile depth first from the coarse
// coefficients above it. Threads under one coarse coefficient each read it: it comes from the first-level cache, and
// nothing needs to be exchanged.
#include "cuda/haar/haar.cuh"

namespace wavemix::haar::synthesis {

// A quad's bands contribute this to its row `below`: (low, high) along the columns.
template <class A>
struct RowOfQuad {
  A low_weight, high_weight;
  __device__ RowOfQuad(const PairWeights<A>& rows, bool below)
      : low_weight(below ? A(0.5) : rows.low), high_weight(below ? A(-0.5) : rows.high) {}
  __device__ A low(A ll, A lh) const { return low_weight * ll + high_weight * lh; }
  __device__ A high(A hl, A hh) const { return low_weight * hl + high_weight * hh; }
};

template <class A>
__device__ A column_of_pair(const PairWeights<A>& columns, bool right, A low, A high) {
  return right ? low - high : columns.low * low + columns.high * high;
}

// x = LL at (i, j) of `level`, as the caller holds it: N columns, or N channels from c on.
template <class T, int N>
__device__ void load_ll(const Level& level, int64_t n, int64_t c, int64_t i, int64_t j, Arithmetic<T> (&x)[N]) {
  const int64_t* stride = level.ll_stride;
  load<T, N>(static_cast<const T*>(level.ll) + n * stride[0] + c * stride[1] + i * stride[2] + j * stride[3], x);
}

// Adds to x the LL that the caller gave for this level, if any.
template <class T, int N>
__device__ void add_ll(const Level& level, int64_t n, int64_t c, int i, int j, Arithmetic<T> (&x)[N]) {
  if (!level.ll) return;
  Arithmetic<T> addend[N];
  load_ll<T, N>(level, here(n), here(c), here(i), here(j), addend);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] += addend[k];
}

// The sample at (i, j) of level `level - 1`: for levels coarser than a thread's tile, where it needs one of the four.
template <class T, int N, class Thread>
__device__ void descend(const Thread& thread, int level, int i, int j, Arithmetic<T> (&ll)[N]) {
  using A = Arithmetic<T>;
  const Params& p = thread.p;
  A high[3][N];
  thread.load_bands(level, i >> 1, j >> 1, high);
  const PairWeights<A> rows((i | 1) < p.level[level - 1].h, p.edge, A(0.5));
  const PairWeights<A> columns((j | 1) < p.level[level - 1].w, p.edge, A(1));
  const RowOfQuad<A> row(rows, i & 1);
#pragma unroll
  for (int k = 0; k < N; ++k)
    ll[k] = column_of_pair(columns, j & 1, row.low(ll[k], high[0][k]), row.high(high[1][k], high[2][k]));
  add_ll<T>(p.level[level - 1], thread.n, thread.c, i, j, ll);
}

// --- Rows ------------------------------------------------------------------------------------------------

// Levels of a thread's own tile: eight rows amortise the index arithmetic and the coarse levels; 16 columns (half
// types) take one level more, so that above its tile a thread always holds a single column.
template <int V>
constexpr int kMaxTileLevels = kColumnLevels<V> > 3 ? kColumnLevels<V> : 3;

template <class T, int V>
struct RowsSynthesis {
  using A = Arithmetic<T>;

  const Params& p;
  int64_t n, c;
  int column;  // the first of 2V

  // ll = row `i` of LL at level `level`, this thread's columns.
  template <int level>
  __device__ void expand(int i, const A (&ll)[width(V, level)]) const {
    if constexpr (level == 0) {
      store_row(i, ll);
    } else {
      constexpr int N = width(V, level);
      const int j = column >> level;
      A high[3][N];
      load_bands(level, i, j, high);
      const int h = p.level[level - 1].h;
      const PairWeights<A> rows(2 * i + 1 < h, p.edge, A(0.5));
      const bool pair_exists = (V > 1 && level <= kColumnLevels<V>) ||  // wide: whole words of columns
                               2 * j + 1 < p.level[level - 1].w;
      const PairWeights<A> columns(pair_exists, p.edge, A(1));
#pragma unroll(level <= 2 ? 2 : 1)
      for (int below = 0; below < 2; ++below) {
        if (2 * i + below < h) {
          const RowOfQuad<A> row(rows, below);
          A finer[width(V, level - 1)];
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const A low = row.low(ll[k], high[0][k]), high_ = row.high(high[1][k], high[2][k]);
            if constexpr (level <= kColumnLevels<V>) {
              finer[2 * k] = column_of_pair(columns, false, low, high_);
              finer[2 * k + 1] = column_of_pair(columns, true, low, high_);
            } else {
              finer[k] = column_of_pair(columns, (column >> (level - 1)) & 1, low, high_);
            }
          }
          if constexpr (level > 1) add_ll<T>(p.level[level - 1], n, c, 2 * i + below, column >> (level - 1), finer);
          expand<level - 1>(2 * i + below, finer);
        }
      }
    }
  }

  template <int N>
  __device__ void load_bands(int level, int i, int j, A (&high)[3][N]) const {
    const Level& in = p.level[level];
    const T* source =
        static_cast<const T*>(in.high) + n * in.stride[0] + c * in.stride[1] + i * in.stride[3] + j * in.stride[4];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (in.high) {
        load<T, N>(source + b * in.stride[2], high[b]);
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) high[b][k] = 0;
      }
    }
  }

  template <int N>
  __device__ void write(int i, int j, const A (&x)[N]) const {
    A sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = x[k];
    add_ll<T>(p.level[0], n, c, i, j, sum);
    const int64_t* stride = p.image_stride;
    store<T, N>(static_cast<T*>(p.image) + n * stride[0] + c * stride[1] + i * stride[2] + j * stride[3], sum);
  }

  __device__ void store_row(int i, const A (&x)[2 * V]) const {
    // In two words: rows need not be aligned to more than one.
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      A half[V];
#pragma unroll
      for (int k = 0; k < V; ++k) half[k] = x[part * V + k];
      if (V > 1 || part == 0 || column + 1 < p.level[0].w) write(i, column + part * V, half);
    }
  }
};

template <class T, int V, int M>  // tiles of 2^M rows by 2V columns
__global__ void __launch_bounds__(kThreads, kMinBlocks) synthesis_rows(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  uint32_t task = blockIdx.x * kThreads + threadIdx.x;
  if (task >= p.tasks) return;
  const int column = static_cast<int>(p.inner.take(task)) * (2 * V);
  const int row = static_cast<int>(p.middle.take(task));  // at level M
  const int64_t c = p.outer.take(task);
  const RowsSynthesis<T, V> thread{p, task, c, column};
  A ll[width(V, M)];
  load_ll<T>(p.level[p.levels], task, c, row >> (p.levels - M), column >> p.levels, ll);
  if constexpr (M == kMaxTileLevels<V>) {
    static_assert(width(V, M) == 1, "one column above the tile");
    for (int level = p.levels; level > M; --level)
      descend<T>(thread, level, row >> (level - 1 - M), column >> (level - 1), ll);
  }
  thread.template expand<M>(row, ll);
}

// --- Channels --------------------------------------------------------------------------------------------

template <class T, int V>
struct ChannelsSynthesis {
  using A = Arithmetic<T>;

  const Params& p;
  int64_t n, c;  // c: the first of V channels

  template <int level>
  __device__ void expand(int i, int j, const A (&ll)[V]) const {
    if constexpr (level == 0) {
      store_pixel(i, j, ll);
    } else {
      A high[3][V];
      load_bands(level, i, j, high);
      const int h = p.level[level - 1].h, w = p.level[level - 1].w;
      const PairWeights<A> rows(2 * i + 1 < h, p.edge, A(0.5));
      const PairWeights<A> columns(2 * j + 1 < w, p.edge, A(1));
#pragma unroll(level == 1 ? 4 : 1)
      for (int q = 0; q < 4; ++q) {
        const int below = q >> 1, right = q & 1;
        if (2 * i + below < h && 2 * j + right < w) {
          const RowOfQuad<A> row(rows, below);
          A finer[V];
#pragma unroll
          for (int k = 0; k < V; ++k)
            finer[k] = column_of_pair(columns, right, row.low(ll[k], high[0][k]), row.high(high[1][k], high[2][k]));
          if constexpr (level > 1) add_ll<T>(p.level[level - 1], n, c, 2 * i + below, 2 * j + right, finer);
          expand<level - 1>(2 * i + below, 2 * j + right, finer);
        }
      }
    }
  }

  __device__ void load_bands(int level, int i, int j, A (&high)[3][V]) const {
    const Level& in = p.level[level];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
#pragma unroll
      for (int k = 0; k < V; ++k) high[b][k] = 0;
    }
    if (!in.high) return;
    const T* source =
        static_cast<const T*>(in.high) + n * in.stride[0] + c * in.stride[1] + i * in.stride[3] + j * in.stride[4];
#pragma unroll
    for (int word = 0; word < 3; ++word) {
      A mixed[V];
      if constexpr (V > 1) {
        // Memory order is C, 3: V channels are three whole words, each a mixture of the bands.
        load<T, V>(source + word * V, mixed);
#pragma unroll
        for (int k = 0; k < V; ++k) high[(word * V + k) % 3][(word * V + k) / 3] = mixed[k];
      } else {
        load<T, V>(source + word * in.stride[2], mixed);
        high[word][0] = mixed[0];
      }
    }
  }

  __device__ void store_pixel(int i, int j, const A (&x)[V]) const {
    A sum[V];
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] = x[k];
    add_ll<T>(p.level[0], n, c, i, j, sum);
    const int64_t* stride = p.image_stride;
    store<T, V>(static_cast<T*>(p.image) + n * stride[0] + c * stride[1] + i * stride[2] + j * stride[3], sum);
  }
};

constexpr int kMaxChannelTileLevels = 2;  // 4x4 pixels of one word: enough threads even for a batch of one

template <class T, int V, int M>
__global__ void __launch_bounds__(kThreads, kMinBlocks) synthesis_channels(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  uint32_t task = blockIdx.x * kThreads + threadIdx.x;
  if (task >= p.tasks) return;
  const int64_t c = static_cast<int64_t>(p.inner.take(task)) * V;
  const int j = static_cast<int>(p.middle.take(task));  // at level M, as is i
  const int i = static_cast<int>(p.outer.take(task));
  const ChannelsSynthesis<T, V> thread{p, task, c};
  A ll[V];
  load_ll<T>(p.level[p.levels], task, c, i >> (p.levels - M), j >> (p.levels - M), ll);
  if constexpr (M == kMaxChannelTileLevels) {
    for (int level = p.levels; level > M; --level)
      descend<T>(thread, level, i >> (level - 1 - M), j >> (level - 1 - M), ll);
  }
  thread.template expand<M>(i, j, ll);
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int V>
void launch_rows(const HaarArgs& args, const Form& form, void* stream) {
  const int tile_levels = std::min(args.levels, kMaxTileLevels<V>);
  const auto grid_of = [&](const HaarArgs& a) {
    return Grid{0, ceil_div(a.w, 2 * V), ceil_div(a.h, int64_t{1} << tile_levels), a.c, a.n};
  };
  for_each_part(
      args, [&](const HaarArgs& a) { return grid_of(a).tasks(); },
      [&](const HaarArgs& a) {
        Params p = make_params(a);
        grid_of(a).fill(p);
        const Launch launch = make_launch("synthesis", a, form, p.tasks, stream);
        switch (tile_levels) {
          case 1:
            return launch(synthesis_rows<T, V, 1>, p);
          case 2:
            return launch(synthesis_rows<T, V, 2>, p);
          case 3:
            return launch(synthesis_rows<T, V, 3>, p);
          default:
            return launch(synthesis_rows<T, V, kMaxTileLevels<V>>, p);
        }
      });
}

template <class T, int V>
void launch_channels(const HaarArgs& args, const Form& form, void* stream) {
  const int tile_levels = std::min(args.levels, kMaxChannelTileLevels);
  const auto grid_of = [&](const HaarArgs& a) {
    const int64_t tile = int64_t{1} << tile_levels;
    return Grid{0, ceil_div(a.c, V), ceil_div(a.w, tile), ceil_div(a.h, tile), a.n};
  };
  for_each_part(
      args, [&](const HaarArgs& a) { return grid_of(a).tasks(); },
      [&](const HaarArgs& a) {
        Params p = make_params(a);
        grid_of(a).fill(p);
        const Launch launch = make_launch("synthesis", a, form, p.tasks, stream);
        if (tile_levels == 1) return launch(synthesis_channels<T, V, 1>, p);
        return launch(synthesis_channels<T, V, kMaxChannelTileLevels>, p);
      });
}

}  // namespace wavemix::haar::synthesis

namespace wavemix {

void haar_synthesis_cuda(const HaarArgs& args, void* stream) {
  haar::check_args(args);
  if (haar::is_empty(args)) return;
  const HaarArgs settled = haar::normalised(args);
  haar::with_form(settled, [&](auto zero, auto per_access, const haar::Form& form) {
    using T = decltype(zero);
    constexpr int V = decltype(per_access)::value;
    if (form.layout == haar::Layout::rows) return haar::synthesis::launch_rows<T, V>(settled, form, stream);
    return haar::synthesis::launch_channels<T, V>(settled, form, stream);
  });
}

}  // namespace wavemix
