// Pointwise MLP on the CPU: forward, and backward from the inputs alone. Compiled once per instruction set (see isa.h).
//
// A thread takes a block of rows through everything while it lies in its L2 cache, so the hidden layer never reaches
// memory; weights are packed once and shared. GELU and Philox cost about the same.

#include <math.h>

#include "cpu/choose.h"
#include "cpu/common/gelu.h"
#include "cpu/common/products.h"
#include "cpu/mlp/few_pixels.h"
#include "cpu/mlp/gelu_of_bf16.h"
#include "cpu/mlp/matrix_units.h"
#include "cpu/mlp/philox.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// --- GELU and dropout --------------------------------------------------------------------------------------

// Elements at a time: a chunk's random halves stay in L1, and whole vectors of Philox groups fit them.
constexpr int64_t kChunk = 512;
static_assert(kChunk % (8 * kPhiloxLanes) == 0, "philox_halves writes whole vectors");

constexpr int32_t kKeepAll = 1 << 16;

template <class A>
struct Dropout {
  int32_t threshold;
  A scale;
  uint64_t seed;
  explicit Dropout(double p, uint64_t key)
      : threshold(static_cast<int32_t>(::nearbyint((1.0 - p) * kKeepAll))),
        scale(threshold > 0 ? static_cast<A>(static_cast<double>(kKeepAll) / threshold) : A(0)),
        seed(key) {}
  bool active() const { return threshold < kKeepAll; }
};

template <bool active, class A>
static inline A dropped(const Dropout<A>& dropout, const uint16_t* halves, int64_t i, A value) {
  const A scaled = value * dropout.scale;
  if (!active) return scaled;
  return halves[i] < dropout.threshold ? scaled : A(0);
}

template <bool active, class A>
void forward_chunk(const Dropout<A> dropout, const uint16_t* halves, A* x, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) x[i] = dropped<active>(dropout, halves, i, gelu(x[i]));
}
template <bool active, class A>
void backward_chunk(const Dropout<A> dropout, const uint16_t* halves, A* x, A* g, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    const A h = gelu(x[i], slope);
    const A gradient = g[i] * slope;
    x[i] = dropped<active>(dropout, halves, i, h);
    g[i] = dropped<active>(dropout, halves, i, gradient);
  }
}

#if WAVEMIX_MATRIX_UNITS
// The same of what products in bf16 read.
template <bool active>
void chunk_of_bf16(const Dropout<float> dropout, const uint16_t* halves, float* x, float* g, int64_t n) {
  const __m512 scale = _mm512_set1_ps(dropout.scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(lanes(n - i));
    __mmask16 keep = there;
    if (active) {
      const __m512i drawn = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i)));
      keep = _mm512_cmplt_epi32_mask(drawn, _mm512_set1_epi32(dropout.threshold));
    }
    const __m512 z = _mm512_maskz_loadu_ps(there, x + i);
    if (g == nullptr) {
      _mm512_mask_storeu_ps(x + i, there, _mm512_maskz_mul_ps(keep, gelu_of_bf16(z), scale));
      continue;
    }
    __m512 slope;
    const __m512 h = gelu_of_bf16(z, slope);
    const __m512 gradient = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, g + i), slope);
    _mm512_mask_storeu_ps(x + i, there, _mm512_maskz_mul_ps(keep, h, scale));
    _mm512_mask_storeu_ps(g + i, there, _mm512_maskz_mul_ps(keep, gradient, scale));
  }
}
#endif

template <bool active, class A>
void chunk(const Dropout<A>& dropout, bool units, const uint16_t* halves, A* x, A* g, int64_t n) {
#if WAVEMIX_MATRIX_UNITS
  if constexpr (std::is_same<A, float>::value) {
    if (units) return chunk_of_bf16<active>(dropout, halves, x, g, n);
  }
#endif
  (void)units;
  if (g == nullptr) return forward_chunk<active>(dropout, halves, x, n);
  backward_chunk<active>(dropout, halves, x, g, n);
}

// Some columns of the hidden layer in place, and with `g` its gradient, which becomes that of the pre-activations.
// `group`: Philox's for the first.
template <bool active, class A>
void activate_run(const Dropout<A>& dropout, bool units, uint64_t group, int64_t columns, A* x, A* g) {
  uint16_t halves[kChunk];
  for (int64_t at = 0; at < columns; at += kChunk) {
    const int64_t n = columns - at < kChunk ? columns - at : kChunk;
    if (active) philox_halves(dropout.seed, group + static_cast<uint64_t>(at / 8), (n + 7) / 8, halves);
    chunk<active>(dropout, units, halves, x + at, g == nullptr ? nullptr : g + at, n);
  }
}

template <class A>
void activate(const Dropout<A>& dropout, bool units, int64_t first, int64_t rows, int64_t columns, A* x, A* g,
              int64_t stride) {
  // Rows of whole groups follow each other without a gap, and without dropout any do: one run, for which few columns
  // fill whole vectors.
  const uint64_t groups = static_cast<uint64_t>((columns + 7) / 8);
  if (columns == stride && (!dropout.active() || columns % 8 == 0)) {
    columns *= rows;
    rows = rows > 0 ? 1 : 0;
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* gradient = g == nullptr ? nullptr : g + i * stride;
    const uint64_t group = static_cast<uint64_t>(first + i) * groups;
    if (dropout.active()) {
      activate_run<true>(dropout, units, group, columns, x + i * stride, gradient);
    } else {
      activate_run<false>(dropout, units, 0, columns, x + i * stride, gradient);
    }
  }
}

// --- Operands ----------------------------------------------------------------------------------------------

template <class T>
T* row_of(const Matrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

// [x | second * scale + shift] for some rows.
template <class T, class A>
void join(const MlpArgs& args, int64_t first, int64_t rows, const Block<A>& out) {
  const A* scale = static_cast<const A*>(args.scale);
  const A* shift = static_cast<const A*>(args.shift);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = out.data + i * out.stride;
    load_run(row_of<const T>(args.x, first + i), args.a, row);
    if (args.b == 0) continue;
    row += args.a;
    load_run(row_of<const T>(args.second, first + i), args.b, row);
    if (scale != nullptr)
      for (int64_t j = 0; j < args.b; ++j) row[j] = row[j] * scale[j] + shift[j];
  }
}

// The cut of the rows: blocks whose operands take a quarter of a megabyte, half of the smallest L2 caches of today,
// and as many for each thread. Processors with matrix units have two megabytes.
struct Cut {
  int64_t rows, count;
  Cut(int64_t total, int64_t bytes_per_row, int64_t unit, int threads) {
    int64_t most = (int64_t{1} << (unit == kTileRows ? 20 : 18)) / bytes_per_row;
    most = most < 16 ? 16 : most > 128 ? 128 : most;
    const int64_t least = round_up(total > 0 ? total : 1, most * threads) / most;
    rows = round_up((total + least - 1) / least, unit);
    rows = rows > 0 ? rows : unit;
    count = (total + rows - 1) / rows;
  }
};

// Weights in the orders in which products read them, and padded biases: made once, read by all threads.
template <class T, class A>
struct Weights {
  int64_t inputs;
  ZeroBuffer<A> b1, b2;
  RightOperand<T, A> w1, w2;
  Weights(const MlpArgs& args, int threads)
      : inputs(args.a + args.b),
        b1(padded<A>(args.k)),
        b2(padded<A>(args.o)),
        w1(inputs, args.k, static_cast<const T*>(args.w1), 1, inputs, threads),
        w2(args.k, args.o, static_cast<const T*>(args.w2), 1, args.k, threads) {
    if (args.b1 != nullptr) load_row(static_cast<const T*>(args.b1), 1, args.k, b1.data);
    if (args.b2 != nullptr) load_row(static_cast<const T*>(args.b2), 1, args.o, b2.data);
  }
};

template <class T>
void advise_rows(const Matrix& out, int64_t rows, int64_t columns) {
  if (out.data != nullptr) advise<2>(out.data, {out.stride, 1}, {rows, columns}, static_cast<int64_t>(sizeof(T)));
}

template <class... Columns>
int64_t bytes_per_row(size_t element, Columns... columns) {
  return (static_cast<int64_t>(columns) + ...) * static_cast<int64_t>(element);
}

// --- Forward -----------------------------------------------------------------------------------------------

template <class T>
void forward(const MlpArgs& args, const Matrix& out, int threads) {
  using A = typename Arithmetic<T>::type;
  if (args.rows == 0) return;
  if (args.rows * args.k < kSerialElements) threads = 1;
  advise_rows<T>(out, args.rows, args.o);
  const Weights<T, A> weights(args, threads);
  const Dropout<A> dropout(args.p, args.seed);
  const Cut cut(args.rows, bytes_per_row(sizeof(A), weights.inputs, args.k, args.o), weights.w1.rows(), threads);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(weights.w1.units);
    const Block<A> x(cut.rows, weights.inputs), h(cut.rows, args.k), u(cut.rows, args.o);
    WAVEMIX_FOR
    for (int64_t i = 0; i < cut.count; ++i) {
      const int64_t first = i * cut.rows, rows = args.rows - first < cut.rows ? args.rows - first : cut.rows;
      const int64_t whole = round_up(rows, weights.w1.rows());
      join<T>(args, first, rows, x);
      product(whole, x.data, x.stride, weights.w1, weights.b1.data, h.data, h.stride);
      activate<A>(dropout, weights.w1.units, args.first_row + first, rows, args.k, h.data, nullptr, h.stride);
      product(whole, h.data, h.stride, weights.w2, weights.b2.data, u.data, u.stride);
      store_rows(u, 0, args.o, rows, row_of<T>(out, first), out.stride);
    }
  }
}

// --- Backward ----------------------------------------------------------------------------------------------

template <class T>
void backward(const MlpArgs& args, const MlpGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  if (args.rows * args.k < kSerialElements) threads = 1;
  advise_rows<T>(grads.d_x, args.rows, args.a);
  advise_rows<T>(grads.d_second, args.rows, args.b);
  advise_rows<T>(grads.out, args.rows, args.o);
  const Weights<T, A> weights(args, threads);
  const Dropout<A> dropout(args.p, args.seed);
  const int64_t inputs = weights.inputs, k = args.k, o = args.o;
  // The same weights, packed for the products with their transposes.
  const RightOperand<T, A> w1(k, inputs, static_cast<const T*>(args.w1), inputs, 1, threads);
  const RightOperand<T, A> w2(o, k, static_cast<const T*>(args.w2), k, 1, threads);
  const ZeroBuffer<A> zero(padded<A>(inputs + k));
  // Each thread's sums over its rows: d_w1, d_w2, d_b1, d_b2.
  const int64_t at_w2 = padded<A>(k) * padded<A>(inputs), at_b1 = at_w2 + padded<A>(o) * padded<A>(k);
  const int64_t at_b2 = at_b1 + padded<A>(k), size = at_b2 + padded<A>(o);
  const Scratch memory(threads * size * static_cast<int64_t>(sizeof(A)));
  A* sums = reinterpret_cast<A*>(memory.block);
  const Cut cut(args.rows, bytes_per_row(sizeof(A), inputs, k, o, k, inputs), weights.w1.rows(), threads);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(weights.w1.units);
    const Block<A> x(cut.rows, inputs), h(cut.rows, k), g(cut.rows, o), g_h(cut.rows, k), g_x(cut.rows, inputs);
    const Block<A> out(grads.out.data == nullptr ? 0 : cut.rows, o);
    const int64_t scratch = transpose_scratch(k, o > inputs ? o : inputs, cut.rows);
    const Buffer<A> memory(w1.units ? scratch / 2 : 0);
    T* const ordered = w1.units ? reinterpret_cast<T*>(memory.data) : nullptr;
    A* sum = sums + WAVEMIX_THREAD * size;
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(sums + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    WAVEMIX_FOR
    for (int64_t i = 0; i < cut.count; ++i) {
      const int64_t first = i * cut.rows, rows = args.rows - first < cut.rows ? args.rows - first : cut.rows;
      const int64_t whole = round_up(rows, weights.w1.rows());
      join<T>(args, first, rows, x);
      load_rows(row_of<T>(grads.grad, first), grads.grad.stride, rows, g);
      product(whole, x.data, x.stride, weights.w1, weights.b1.data, h.data, h.stride);
      product(whole, g.data, g.stride, w2, zero.data, g_h.data, g_h.stride);
      activate<A>(dropout, weights.w1.units, args.first_row + first, rows, k, h.data, g_h.data, h.stride);
      if (grads.out.data != nullptr) {
        product(whole, h.data, h.stride, weights.w2, weights.b2.data, out.data, out.stride);
        store_rows(out, 0, o, rows, row_of<T>(grads.out, first), grads.out.stride);
      }
      add_product_of_transpose(padded<A>(o), k, rows, g.data, g.stride, h.data, h.stride, sum + at_w2, h.stride,
                               ordered);
      add_product_of_transpose(padded<A>(k), inputs, rows, g_h.data, g_h.stride, x.data, x.stride, sum, x.stride,
                               ordered);
      add_rows(g_h, rows, sum + at_b1);
      add_rows(g, rows, sum + at_b2);
      product(whole, g_h.data, g_h.stride, w1, zero.data, g_x.data, g_x.stride);
      store_rows(g_x, 0, args.a, rows, row_of<T>(grads.d_x, first), grads.d_x.stride);
      if (args.b > 0) store_rows(g_x, args.a, args.b, rows, row_of<T>(grads.d_second, first), grads.d_second.stride);
    }
  }
  finish_sums<T>(sums, size, threads, k, inputs, padded<A>(inputs), 1, grads.d_w1);
  finish_sums<T>(sums + at_w2, size, threads, o, k, padded<A>(k), 1, grads.d_w2);
  finish_sums<T>(sums + at_b1, size, threads, 1, k, k, 1, grads.d_b1);
  finish_sums<T>(sums + at_b2, size, threads, 1, o, o, 1, grads.d_b2);
}

}  // namespace

void mlp_forward(const MlpArgs& args, const Matrix& out, int threads) {
  const choose::Mlp way = choose::mlp_forward(args);
  if (way == choose::Mlp::few_pixels) return mlp_few_pixels_forward(args, out, threads);
  if (way == choose::Mlp::matrix_units) return mlp_matrix_units_forward(args, out, threads);
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, out, threads); });
}
void mlp_backward(const MlpArgs& args, const MlpGradArgs& grads, int threads) {
  if (choose::mlp_backward(args, grads) == choose::Mlp::few_pixels)
    return mlp_few_pixels_backward(args, grads, threads);
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

void philox4x32(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]) {
  PhiloxLanes c[4] = {};
  for (int i = 0; i < 4; ++i) c[i] += uint64_t{counter[i]};
  philox4x32(c, key[0], key[1]);
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(c[i][kPhiloxLanes - 1]);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
