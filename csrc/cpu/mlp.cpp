// GELU and dropout of a pointwise MLP's hidden layer on the CPU. Compiled once per instruction set (see isa.h).
//
// One pass over memory: a chunk of a row is read, its Philox words are made in the L1 cache, and it is written.
// Arithmetic (GELU and Philox cost about the same) and memory are level on AVX-512, so both are vectorised.

#include "wavemix/mlp.h"

#include <math.h>

#include "convert.h"
#include "parallel.h"
// These two use the above.
#include "gelu.h"
#include "philox.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Elements at a time, a multiple of four: buffers of a chunk stay in L1 and its sixteen-group Philox batches are full.
constexpr int64_t kChunk = 512;

template <class A>
struct Dropout {
  bool active;
  uint32_t threshold;
  A scale;
  explicit Dropout(double p) {
    const double limit = ::nearbyint((1.0 - p) * 4294967296.0);
    active = limit < 4294967296.0;
    threshold = active ? static_cast<uint32_t>(limit) : 0;
    scale = p < 1.0 ? static_cast<A>(1.0 / (1.0 - p)) : A(0);
  }
};

template <bool active, class A>
static inline A dropped(const Dropout<A>& dropout, uint32_t word, A value) {
  const A scaled = value * dropout.scale;
  return !active || word < dropout.threshold ? scaled : A(0);
}

// In place (h == x) or not.
template <bool active, class A>
void forward_chunk(const Dropout<A>& dropout, const uint32_t* words, const A* x, A* h, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) h[i] = dropped<active>(dropout, words[active ? i : 0], gelu(x[i]));
}
template <bool active, class A>
void backward_chunk(const Dropout<A>& dropout, const uint32_t* words, A* x, A* g, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    const A h = gelu(x[i], slope);
    const A gradient = g[i] * slope;
    x[i] = dropped<active>(dropout, words[active ? i : 0], h);
    g[i] = dropped<active>(dropout, words[active ? i : 0], gradient);
  }
}

// The elements themselves where they are of the arithmetic type, otherwise a converted copy of them.
template <class T, class A>
static inline A* fetch(const T* p, int64_t n, A* buffer) {
  load_row(p, 1, n, buffer);
  return buffer;
}
template <class A>
static inline A* fetch(A* p, int64_t, A*) {
  return p;
}

template <class T, bool backward>
void run(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& other, int threads) {
  using A = typename Arithmetic<T>::type;
  if (args.rows == 0 || args.cols == 0) return;
  if (!backward && other.data != pre.data)
    advise<2>(other.data, {other.stride, 1}, {args.rows, args.cols}, static_cast<int64_t>(sizeof(T)));
  const Dropout<A> dropout(args.p);
  const uint64_t groups_per_row = static_cast<uint64_t>((args.cols + 3) / 4);
  int64_t rows = args.rows, cols = args.cols;
  // Rows without gaps whose groups have none either are one long row: narrow matrices fill whole chunks.
  const bool gapless = pre.stride == cols && other.stride == cols && (cols % 4 == 0 || !dropout.active);
  if (gapless) {
    cols *= rows;
    rows = 1;
  }
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  if (rows * cols < kSerialElements) threads = 1;
  WAVEMIX_PARALLEL(threads) {
    A buffer[2][kChunk];
    uint32_t words[kChunk];
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < rows * chunks; ++unit) {
      const int64_t row = unit / chunks, col = unit % chunks * kChunk;
      const int64_t n = cols - col < kChunk ? cols - col : kChunk;
      T* const p = static_cast<T*>(pre.data) + row * pre.stride + col;
      T* const q = static_cast<T*>(other.data) + row * other.stride + col;
      if (dropout.active)
        philox_words(args.seed, static_cast<uint64_t>(args.first_row + row) * groups_per_row + static_cast<uint64_t>(col / 4),
                     (n + 3) / 4, words);
      A* const x = fetch(p, n, buffer[0]);
      if (backward) {
        A* const g = fetch(q, n, buffer[1]);
        dropout.active ? backward_chunk<true>(dropout, words, x, g, n) : backward_chunk<false>(dropout, words, x, g, n);
        if (static_cast<void*>(x) != p) store_row(x, p, 1, n);
        if (static_cast<void*>(g) != q) store_row(g, q, 1, n);
      } else {
        A* const h = static_cast<const void*>(x) == p ? reinterpret_cast<A*>(q) : x;
        dropout.active ? forward_chunk<true>(dropout, words, x, h, n) : forward_chunk<false>(dropout, words, x, h, n);
        if (static_cast<void*>(h) != q) store_row(h, q, 1, n);
      }
    }
  }
}

template <bool backward>
void dispatch(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& other, int threads) {
  switch (args.dtype) {
    case DType::f64:
      return run<double, backward>(args, pre, other, threads);
    case DType::f32:
      return run<float, backward>(args, pre, other, threads);
    case DType::f16:
      return run<f16, backward>(args, pre, other, threads);
    case DType::bf16:
      return run<bf16, backward>(args, pre, other, threads);
  }
}

void philox(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]) {
  const PhiloxWords w = philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; ++i) words[i] = w.word[i];
}

}  // namespace

extern const MlpKernels mlp_kernels = {dispatch<false>, dispatch<true>, philox};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
