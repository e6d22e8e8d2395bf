// Pointwise MLP on the CPU where weights outweigh the image (Wave-MLP's last stages: 2 MB of each, and four times as
// many weights as pixels). Compiled once per instruction set (see isa.h).
//
// Threads share the hidden channels, not the pixels: each takes a chunk of them through the whole MLP, so weights are
// read and their gradients written once, by one thread, and the hidden layer never reaches memory. Everything is
// transposed, channels by pixels: then weights are the operand that products read element by element, in the order in
// which they lie in memory, and only the image has to be packed. One sum over the threads is
// left for each image that comes out.

#include "cpu/mlp/few_pixels.h"

#include "cpu/common/gelu.h"
#include "cpu/common/operands.h"
#include "cpu/common/transpose.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Pixels at a time: a block of a chunk's hidden layer and its gradient take half of a megabyte of L2.
constexpr int64_t kPixels = 448;
constexpr int64_t kHidden = 160;

// c (rows x columns) += a b or transpose(a) b, b by rows.
template <class A, bool transposed>
void add_product(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
                 int64_t ldc) {
  const Panels panels(padded<A>(columns) / kLanes<A>);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
    gemm_panel<A, transposed>(vectors, rows, a, lda, b + at, ldb, depth, nullptr, c + at, ldc);
  }
}

// c (rows x columns) = transpose(a) b + bias, b packed, a (depth x rows) by rows.
template <class A>
void product_of_transpose(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda, const A* b,
                          const A* bias, A* c, int64_t ldc) {
  const Panels panels(padded<A>(columns) / kLanes<A>);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
    gemm_panel<A, true>(vectors, rows, a, lda, b + depth * at, vectors * kLanes<A>, depth, bias + at, c + at, ldc);
  }
}

// The cut of the work: equal chunks of hidden channels, some for each thread, and equal blocks of pixels.
struct Plan {
  int64_t hidden, chunks, pixels, blocks, padded_pixels;
  template <class A>
  static Plan make(const MlpArgs& args, int threads) {
    Plan plan;
    // Whole vectors of channels. Among some numbers of rounds, take the one whose longest share is the shortest.
    const int64_t fewest = (args.k + kHidden * threads - 1) / (kHidden * threads);
    int64_t shortest = 0;
    for (int64_t rounds = fewest; rounds < fewest + 4; ++rounds) {
      const int64_t hidden = round_up((args.k + rounds * threads - 1) / (rounds * threads), padded<A>(1));
      const int64_t chunks = (args.k + hidden - 1) / hidden, longest = (chunks + threads - 1) / threads * hidden;
      if (shortest > 0 && longest >= shortest) continue;
      shortest = longest;
      plan.hidden = hidden;
      plan.chunks = chunks;
    }
    plan.blocks = (args.rows + kPixels - 1) / kPixels;
    plan.pixels = round_up((args.rows + plan.blocks - 1) / plan.blocks, padded<A>(1));
    plan.blocks = (args.rows + plan.pixels - 1) / plan.pixels;
    plan.padded_pixels = plan.pixels * plan.blocks;
    return plan;
  }
};

// An image in the order of products: transposed and packed by blocks of pixels (pack() of gemm.h), and by rows.
template <class T, class A>
struct Image {
  const Plan plan;
  int64_t rows, channels;
  const Matrix from;
  const bool in_place;  // its own rows are whole vectors of A
  Buffer<A> packed;
  Buffer<A> copy;
  int64_t copy_stride;
  Image(const Plan& p, const Matrix& m, int64_t r, int64_t c)
      : plan(p),
        rows(r),
        channels(c),
        from(m),
        in_place(sizeof(T) == sizeof(A) && c % padded<A>(1) == 0),
        packed(p.padded_pixels * c),
        copy(in_place ? 0 : r * padded<A>(c)),
        copy_stride(padded<A>(c)) {}
  const A* by_rows(int64_t row) const {
    return in_place ? static_cast<const A*>(from.data) + row * from.stride : copy.data + row * copy_stride;
  }
  int64_t stride() const { return in_place ? from.stride : copy_stride; }
  const A* block(int64_t i) const { return packed.data + i * plan.pixels * channels; }

  // Called by all threads of a region.
  void load() const {
    if (!in_place) {
      WAVEMIX_FOR
      for (int64_t i = 0; i < rows; ++i) {
        A* const to = copy.data + i * copy_stride;
        load_row(static_cast<const T*>(from.data) + i * from.stride, 1, channels, to);
        for (int64_t j = channels; j < copy_stride; ++j) to[j] = A(0);
      }
    }
    const Panels panels(plan.pixels / kLanes<A>);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < plan.blocks * panels.count; ++unit) {
      const int64_t i = unit / panels.count, p = unit % panels.count;
      const int64_t begin = panels.begin(p) * kLanes<A>, width = panels.begin(p + 1) * kLanes<A> - begin;
      const int64_t first = i * plan.pixels + begin, left = rows - first;
      const int64_t count = left < 0 ? 0 : left < width ? left : width;
      A* const to = packed.data + (i * plan.pixels + begin) * channels;
      if (count < width) std::memset(to, 0, static_cast<size_t>(width * channels) * sizeof(A));
      if (count > 0) transpose(by_rows(first), stride(), count, channels, to, width);
    }
  }
};

// Some rows of a weight: where they lie, or a copy that has whole tiles.
template <class T, class A>
struct Rows {
  Block<A> copy;
  const A* data = nullptr;
  int64_t stride = 0;
  Rows(int64_t rows, int64_t columns) : copy(round_up(rows, kGemmRows), columns) {}
  void open(const T* from, int64_t apart, int64_t rows) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (rows % kGemmRows == 0 && copy.columns % kGemmRows == 0) {
        data = from;
        stride = apart;
        return;
      }
    }
    load_rows(from, apart, rows, copy);
    data = copy.data;
    stride = copy.stride;
  }
};

// Sums of the threads' partial images (channels x pixels, by blocks) plus a bias, transposed back into rows. Called by
// all threads of a region.
template <class T, class A>
void finish_image(const Plan& plan, const A* partial, int threads, int64_t rows, int64_t channels, const T* bias,
                  const Matrix& out) {
  constexpr int64_t kWidth = 64;
  const int64_t strips = (plan.pixels + kWidth - 1) / kWidth;
  const int64_t block_size = round_up(channels, kGemmRows) * plan.pixels, size = plan.blocks * block_size;
  const Block<A> sums(channels, kWidth), image(kWidth, channels);
  WAVEMIX_FOR
  for (int64_t unit = 0; unit < plan.blocks * strips; ++unit) {
    const int64_t block = unit / strips, at = unit % strips * kWidth, first = block * plan.pixels + at;
    const int64_t here = plan.pixels - at < kWidth ? plan.pixels - at : kWidth;
    const int64_t count = rows - first < here ? rows - first : here;
    if (count <= 0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      A* const row = sums.data + c * sums.stride;
      const A start = bias == nullptr ? A(0) : load(bias[c]);
      for (int64_t j = 0; j < here; ++j) row[j] = start;
      for (int t = 0; t < threads; ++t) {
        const A* const part = partial + t * size + block * block_size + c * plan.pixels + at;
        WAVEMIX_SIMD
        for (int64_t j = 0; j < here; ++j) row[j] += part[j];
      }
    }
    transpose(sums.data, sums.stride, channels, count, image.data, image.stride);
    store_rows(image, 0, channels, count, static_cast<T*>(out.data) + first * out.stride, out.stride);
  }
}

template <class A>
void activate(A* h, A bias, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) h[i] = gelu(h[i] + bias);
}
// Returns the sum of the first `valid` gradients.
template <class A>
A activate(A* h, A* g, A bias, int64_t n, int64_t valid) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    A slope;
    h[i] = gelu(h[i] + bias, slope);
    g[i] *= slope;
  }
  A sum = 0;
  WAVEMIX_SIMD_SUM(sum)
  for (int64_t i = 0; i < valid; ++i) sum += g[i];
  return sum;
}

template <class T>
void forward(const MlpArgs& args, const Matrix& out, int threads) {
  using A = typename Arithmetic<T>::type;
  const Plan plan = Plan::make<A>(args, threads);
  const int64_t n = args.a, o = args.o, k = args.k, o_rows = round_up(o, kGemmRows);
  const T* const w1 = static_cast<const T*>(args.w1);
  const T* const w2 = static_cast<const T*>(args.w2);
  const T* const b1 = static_cast<const T*>(args.b1);
  const Image<T, A> x(plan, args.x, args.rows, n);
  const int64_t size = o_rows * plan.padded_pixels;
  const Buffer<A> partial(threads * size);
  const ZeroBuffer<A> zero(plan.pixels);
  WAVEMIX_PARALLEL(threads) {
    A* const sum = partial.data + WAVEMIX_THREAD * size;
    const Block<A> h(plan.hidden, plan.pixels);
    Rows<T, A> first(plan.hidden, n);
    const Block<A> second(o_rows, plan.hidden);
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(partial.data + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    x.load();
    WAVEMIX_FOR
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t at = chunk * plan.hidden, count = k - at < plan.hidden ? k - at : plan.hidden;
      first.open(w1 + at * n, n, count);
      for (int64_t i = 0; i < o; ++i) load_row(w2 + i * k + at, 1, count, second.data + i * second.stride);
      for (int64_t b = 0; b < plan.blocks; ++b) {
        product(round_up(count, kGemmRows), plan.pixels, n, first.data, first.stride, x.block(b), zero.data, h.data,
                h.stride);
        for (int64_t j = 0; j < count; ++j)
          activate(h.data + j * h.stride, b1 == nullptr ? A(0) : load(b1[at + j]), plan.pixels);
        add_product<A, false>(o_rows, plan.pixels, count, second.data, second.stride, h.data, h.stride,
                              sum + b * o_rows * plan.pixels, plan.pixels);
      }
    }
    finish_image<T>(plan, partial.data, threads, args.rows, o, static_cast<const T*>(args.b2), out);
  }
}

template <class T>
void backward(const MlpArgs& args, const MlpGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  const Plan plan = Plan::make<A>(args, threads);
  const int64_t n = args.a, o = args.o, k = args.k, n_rows = round_up(n, kGemmRows);
  const T* const w1 = static_cast<const T*>(args.w1);
  const T* const w2 = static_cast<const T*>(args.w2);
  const T* const b1 = static_cast<const T*>(args.b1);
  const Image<T, A> x(plan, args.x, args.rows, n), g(plan, grads.grad, args.rows, o);
  const int64_t size = n_rows * plan.padded_pixels;
  const Buffer<A> partial(threads * size);
  const ZeroBuffer<A> zero(plan.pixels);
  WAVEMIX_PARALLEL(threads) {
    A* const sum = partial.data + WAVEMIX_THREAD * size;
    const Block<A> h(plan.hidden, plan.pixels), g_h(plan.hidden, plan.pixels);
    Rows<T, A> first(plan.hidden, n);
    const Block<A> second(o, plan.hidden), d_w1(plan.hidden, n), d_w2(plan.hidden, o), turned(o, plan.hidden);
    Buffer<A> d_b1(plan.hidden);
    WAVEMIX_FOR
    for (int t = 0; t < threads; ++t) std::memset(partial.data + t * size, 0, static_cast<size_t>(size) * sizeof(A));
    x.load();
    g.load();
    WAVEMIX_FOR
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t at = chunk * plan.hidden, count = k - at < plan.hidden ? k - at : plan.hidden;
      const int64_t count_rows = round_up(count, kGemmRows);
      first.open(w1 + at * n, n, count);
      for (int64_t i = 0; i < o; ++i) load_row(w2 + i * k + at, 1, count, second.data + i * second.stride);
      d_w1.buffer.clear(plan.hidden * d_w1.stride);
      d_w2.buffer.clear(plan.hidden * d_w2.stride);
      d_b1.clear(plan.hidden);
      for (int64_t b = 0; b < plan.blocks; ++b) {
        const int64_t row = b * plan.pixels, left = args.rows - row, valid = left < plan.pixels ? left : plan.pixels;
        product(count_rows, plan.pixels, n, first.data, first.stride, x.block(b), zero.data, h.data, h.stride);
        product_of_transpose(count_rows, plan.pixels, o, second.data, second.stride, g.block(b), zero.data, g_h.data,
                             g_h.stride);
        for (int64_t j = 0; j < count; ++j)
          d_b1.data[j] += activate(h.data + j * h.stride, g_h.data + j * g_h.stride,
                                   b1 == nullptr ? A(0) : load(b1[at + j]), plan.pixels, valid);
        add_product<A, false>(count_rows, o, valid, h.data, h.stride, g.by_rows(row), g.stride(), d_w2.data,
                              d_w2.stride);
        add_product<A, false>(count_rows, n, valid, g_h.data, g_h.stride, x.by_rows(row), x.stride(), d_w1.data,
                              d_w1.stride);
        add_product<A, true>(n_rows, plan.pixels, count, first.data, first.stride, g_h.data, g_h.stride,
                             sum + b * n_rows * plan.pixels, plan.pixels);
      }
      store_rows(d_w1, 0, n, count, static_cast<T*>(grads.d_w1) + at * n, n);
      transpose(d_w2.data, d_w2.stride, count, o, turned.data, turned.stride);
      store_rows(turned, 0, count, o, static_cast<T*>(grads.d_w2) + at, k);
      if (grads.d_b1 != nullptr) store_row(d_b1.data, static_cast<T*>(grads.d_b1) + at, 1, count);
    }
    finish_image<T>(plan, partial.data, threads, args.rows, n, static_cast<const T*>(nullptr), grads.d_x);
    if (grads.d_b2 != nullptr) {
      constexpr int64_t kStrip = 64;
      WAVEMIX_FOR
      for (int64_t at = 0; at < o; at += kStrip) {
        const int64_t width = o - at < kStrip ? o - at : kStrip;
        double total[kStrip] = {};
        for (int64_t i = 0; i < args.rows; ++i) {
          const A* const row = g.by_rows(i) + at;
          for (int64_t j = 0; j < width; ++j) total[j] += static_cast<double>(row[j]);
        }
        for (int64_t j = 0; j < width; ++j) store(static_cast<T*>(grads.d_b2)[at + j], static_cast<A>(total[j]));
      }
    }
  }
}

}  // namespace

void mlp_few_pixels_forward(const MlpArgs& args, const Matrix& out, int threads) {
  if (args.rows * args.k < kSerialElements) threads = 1;
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, out, threads); });
}
void mlp_few_pixels_backward(const MlpArgs& args, const MlpGradArgs& grads, int threads) {
  if (args.rows * args.k < kSerialElements) threads = 1;
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
