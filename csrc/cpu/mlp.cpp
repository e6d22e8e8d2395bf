// GELU and dropout of a pointwise MLP's hidden layer on the CPU. Compiled once per instruction set (see isa.h).
//
// One pass over memory: a chunk of a row is read, its Philox words are made in the L1 cache, and it is written.
// Arithmetic (GELU and Philox cost about the same) and memory are level on AVX-512, so both are vectorised.

#include "wavemix/mlp.h"

#include <math.h>

#include "gelu.h"
#include "parallel.h"
#include "philox.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Elements at a time: a chunk's buffers stay in L1, and whole vectors of Philox groups fit its words.
constexpr int64_t kChunk = 512;
static_assert(kChunk % (4 * kPhiloxLanes) == 0, "philox_words writes whole vectors");

constexpr uint64_t kKeepAll = uint64_t{1} << 32;
uint64_t keep_threshold(double p) { return static_cast<uint64_t>(::nearbyint((1.0 - p) * 4294967296.0)); }

template <class A>
struct Dropout {
  uint32_t threshold;  // not used where everything is kept
  A scale;
  explicit Dropout(double p)
      : threshold(static_cast<uint32_t>(keep_threshold(p))), scale(p < 1.0 ? static_cast<A>(1.0 / (1.0 - p)) : A(0)) {}
};

template <bool active, class A>
static inline A dropped(const Dropout<A>& dropout, const uint32_t* words, int64_t i, A value) {
  const A scaled = value * dropout.scale;
  if (!active) return scaled;
  return words[i] < dropout.threshold ? scaled : A(0);
}

// In place (h == x) or not.
template <bool active, class A>
void forward_chunk(const Dropout<A> dropout, const uint32_t* words, const A* x, A* h, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) h[i] = dropped<active>(dropout, words, i, gelu(x[i]));
}
template <bool active, class A>
void backward_chunk(const Dropout<A> dropout, const uint32_t* words, A* x, A* g, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    const A h = gelu(x[i], slope);
    const A gradient = g[i] * slope;
    x[i] = dropped<active>(dropout, words, i, h);
    g[i] = dropped<active>(dropout, words, i, gradient);
  }
}

template <class T, bool backward, bool active>
void run_chunk(const Dropout<typename Arithmetic<T>::type>& dropout, const uint32_t* words, T* p, T* q, int64_t n) {
  using A = typename Arithmetic<T>::type;
  if constexpr (sizeof(T) == sizeof(A)) {
    if constexpr (backward) {
      backward_chunk<active>(dropout, words, p, q, n);
    } else {
      forward_chunk<active>(dropout, words, p, q, n);
    }
  } else {
    A x[kChunk], g[kChunk];
    load_row(p, 1, n, x);
    if constexpr (backward) {
      load_row(q, 1, n, g);
      backward_chunk<active>(dropout, words, x, g, n);
      store_row(x, p, 1, n);
      store_row(g, q, 1, n);
    } else {
      forward_chunk<active>(dropout, words, x, g, n);
      store_row(g, q, 1, n);
    }
  }
}

// `other`: hidden in the forward direction, the gradient in the backward one.
template <class T, bool backward, bool active>
void run(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& other, int threads) {
  const Dropout<typename Arithmetic<T>::type> dropout(args.p);
  const uint64_t groups_per_row = static_cast<uint64_t>((args.cols + 3) / 4);
  int64_t rows = args.rows, cols = args.cols;
  // Rows without gaps, in memory or in the numbering of groups, are one long row: narrow matrices fill whole chunks.
  if (pre.stride == cols && other.stride == cols && (cols % 4 == 0 || !active)) {
    cols *= rows;
    rows = 1;
  }
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  WAVEMIX_PARALLEL(threads) {
    uint32_t words[kChunk];
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < rows * chunks; ++unit) {
      const int64_t row = unit / chunks, col = unit % chunks * kChunk;
      const int64_t n = cols - col < kChunk ? cols - col : kChunk;
      if (active) {
        const uint64_t group = static_cast<uint64_t>(args.first_row + row) * groups_per_row;
        philox_words(args.seed, group + static_cast<uint64_t>(col / 4), (n + 3) / 4, words);
      }
      run_chunk<T, backward, active>(dropout, words, static_cast<T*>(pre.data) + row * pre.stride + col,
                                     static_cast<T*>(other.data) + row * other.stride + col, n);
    }
  }
}

template <class T, bool backward>
void start(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& other, int threads) {
  if (args.rows == 0 || args.cols == 0) return;
  if (other.data != pre.data && !backward)
    advise<2>(other.data, {other.stride, 1}, {args.rows, args.cols}, static_cast<int64_t>(sizeof(T)));
  if (args.rows * args.cols < kSerialElements) threads = 1;
  if (keep_threshold(args.p) < kKeepAll) {
    run<T, backward, true>(args, pre, other, threads);
  } else {
    run<T, backward, false>(args, pre, other, threads);
  }
}

template <bool backward>
void dispatch(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& other, int threads) {
  switch (args.dtype) {
    case DType::f64:
      return start<double, backward>(args, pre, other, threads);
    case DType::f32:
      return start<float, backward>(args, pre, other, threads);
    case DType::f16:
      return start<f16, backward>(args, pre, other, threads);
    case DType::bf16:
      return start<bf16, backward>(args, pre, other, threads);
  }
}

void philox(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]) {
  PhiloxLanes c[4] = {};
  for (int i = 0; i < 4; ++i) c[i] += uint64_t{counter[i]};
  philox4x32(c, key[0], key[1]);
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(c[i][kPhiloxLanes - 1]);
}

}  // namespace

extern const MlpKernels mlp_kernels = {dispatch<false>, dispatch<true>, philox};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
