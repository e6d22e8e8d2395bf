// A Waveblock's 1x1 convolution with one Haar level, and their gradients, on the CPU for few channels. Compiled once
// per instruction set.
//
// Two reduced channels fill an eighth of a vector, and so does their transform. Convolution and transform commute, so
// here the transform comes first, on the image, and one product takes all four bands of all
// channels to all four bands of the reduced ones, whose matrix is zero between different bands. The zeros cost less
// than empty lanes. The bands of a few rows of blocks lie in a thread's cache as rows of 4 c values, without their
// factor 1/2, which the weights take.

#include "cpu/reduce_haar/few_channels.h"

#include "cpu/common/pixels.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// 2x2 blocks of pixels at a time: with 16 channels 32 KB of bands.
constexpr int64_t kBlocks = 128;

// Rows of blocks of all images, `at_a_time` of them.
struct Rows {
  int64_t h, w, count, at_a_time;
  Shares shares;
  explicit Rows(const ReduceHaarArgs& a)
      : h(a.h / 2),
        w(a.w / 2),
        count(w > 0 ? a.n * h : 0),
        at_a_time(w > 0 && w < kBlocks ? kBlocks / w : 1),
        shares((count + at_a_time - 1) / at_a_time) {}
  int64_t begin(int64_t block) const { return block * at_a_time; }
  int64_t end(int64_t block) const { return begin(block + 1) < count ? begin(block + 1) : count; }
  int64_t most() const { return at_a_time * w; }
};

template <class T>
T* row_of(const Plane& image, const Rows& rows, int64_t row, int64_t scale = 1, int64_t below = 0) {
  return static_cast<T*>(image.data) + row / rows.h * image.stride[0] +
         (scale * (row % rows.h) + below) * image.stride[2];
}

// Place of band b of reduced channel i among the 4 o channels of z, and back.
int64_t place(int64_t band, int64_t i, int64_t o) { return band == 0 ? i : o + 3 * i + band - 1; }
int64_t band_at(int64_t j, int64_t o) { return j < o ? 0 : 1 + (j - o) % 3; }
int64_t channel_at(int64_t j, int64_t o) { return j < o ? j : (j - o) / 3; }

// Elements read beyond the last block: the rest of a group of rows and of a vector.
template <class A>
int64_t slack(int64_t columns) {
  return kGemmRows * columns + kGemmVectors * kLanes<A>;
}

// --- The transform of a row of blocks, some channels at a time -----------------------------------------------

template <class A, int lanes>
void analyse(const A* top, const A* bottom, int64_t blocks, int64_t c, A* out) {
  typedef A V __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A)), may_alias));
  for (int64_t i = 0; i < blocks; ++i, top += 2 * c, bottom += 2 * c, out += 4 * c)
    for (int64_t k = 0; k < c; k += lanes) {
      const auto at = [&](const A* p) -> const V& { return *reinterpret_cast<const V*>(p + k); };
      const V p = at(top) + at(top + c), q = at(top) - at(top + c);
      const V r = at(bottom) + at(bottom + c), t = at(bottom) - at(bottom + c);
      *reinterpret_cast<V*>(out + k) = p + r;
      *reinterpret_cast<V*>(out + c + k) = p - r;
      *reinterpret_cast<V*>(out + 2 * c + k) = q + t;
      *reinterpret_cast<V*>(out + 3 * c + k) = q - t;
    }
}
template <class A, int lanes>
void synthesise(const A* in, int64_t blocks, int64_t c, A* top, A* bottom) {
  typedef A V __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A)), may_alias));
  for (int64_t i = 0; i < blocks; ++i, top += 2 * c, bottom += 2 * c, in += 4 * c)
    for (int64_t k = 0; k < c; k += lanes) {
      const auto at = [&](int64_t band) -> const V& { return *reinterpret_cast<const V*>(in + band * c + k); };
      const V p = at(0) + at(1), q = at(2) + at(3), r = at(0) - at(1), t = at(2) - at(3);
      *reinterpret_cast<V*>(top + k) = p + q;
      *reinterpret_cast<V*>(top + c + k) = p - q;
      *reinterpret_cast<V*>(bottom + k) = r + t;
      *reinterpret_cast<V*>(bottom + c + k) = r - t;
    }
}
template <class A>
void analyse_any(const A* top, const A* bottom, int64_t blocks, int64_t c, A* out) {
  if (c % 8 == 0) return analyse<A, 8>(top, bottom, blocks, c, out);
  if (c % 4 == 0) return analyse<A, 4>(top, bottom, blocks, c, out);
  analyse<A, 1>(top, bottom, blocks, c, out);
}
template <class A>
void synthesise_any(const A* in, int64_t blocks, int64_t c, A* top, A* bottom) {
  if (c % 8 == 0) return synthesise<A, 8>(in, blocks, c, top, bottom);
  if (c % 4 == 0) return synthesise<A, 4>(in, blocks, c, top, bottom);
  synthesise<A, 1>(in, blocks, c, top, bottom);
}

// The bands of some rows of blocks of x.
template <class T, class A>
struct Bands {
  const Rows& rows;
  int64_t c;
  bool by_channel;
  Buffer<A> lines;  // two rows of pixels, where they do not lie ready
  ZeroBuffer<A> memory;
  Bands(const ReduceHaarArgs& args, const Rows& r)
      : rows(r),
        c(args.c),
        by_channel(pixels_inner(args)),
        lines(4 * r.w * args.c),
        memory(r.most() * 4 * args.c + slack<A>(4 * args.c)) {}
  const A* line(const Plane& x, int64_t row, int64_t below) {
    const T* from = row_of<const T>(x, rows, row, 2, below);
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!by_channel && x.stride[3] == c) return reinterpret_cast<const A*>(from);
    }
    A* to = lines.data + below * 2 * rows.w * c;
    if (by_channel) {
      for (int64_t k = 0; k < c; ++k)
        for (int64_t i = 0; i < 2 * rows.w; ++i) to[i * c + k] = load(from[k * x.stride[1] + i * x.stride[3]]);
    } else {
      load_pixels(from, x.stride[3], 2 * rows.w, c, to);
    }
    return to;
  }
  void fill(const Plane& x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const A* top = line(x, row, 0);
      analyse_any(top, line(x, row, 1), rows.w, c, memory.data + (row - first) * rows.w * 4 * c);
    }
  }
};

// rows x columns = left right, with bias; right packed.
template <class T>
void forward(const ReduceHaarArgs& args, int threads) {
  using A = typename Arithmetic<T>::type;
  const Rows rows(args);
  threads = threads_for(args, threads);
  const int64_t c = args.c, o = args.o, ld = padded<A>(4 * o);
  const Plane& z = args.z[0];
  advise<3>(z.data, {z.stride[0], z.stride[2], z.stride[3]}, {args.n, rows.h, rows.w}, static_cast<int64_t>(sizeof(T)));
  const T* weight = static_cast<const T*>(args.weight);
  const Buffer<A> weights(4 * c * ld);
  pack(4 * c, 4 * o, weights.data, [&](int64_t k, int64_t j) {
    return k / c != band_at(j, o)
               ? A(0)
               : A(0.5) * load(weight[channel_at(j, o) * args.weight_stride[0] + k % c * args.weight_stride[1]]);
  });
  // A constant is twice as large in LL and nothing elsewhere.
  const ZeroBuffer<A> offset(ld);
  for (int64_t i = 0; i < o && args.bias != nullptr; ++i)
    offset.data[i] = A(2) * load(static_cast<const T*>(args.bias)[i * args.bias_stride]);
  WAVEMIX_PARALLEL(threads) {
    Bands<T, A> bands(args, rows);
    const Buffer<A> out((rows.most() + kGemmRows) * ld);
    WAVEMIX_FOR
    for (int64_t block = 0; block < rows.shares.blocks; ++block) {
      const int64_t first = rows.begin(block), last = rows.end(block);
      bands.fill(args.x, first, last);
      product(round_up((last - first) * rows.w, kGemmRows), 4 * o, 4 * c, bands.memory.data, 4 * c, weights.data,
              offset.data, out.data, ld);
      for (int64_t row = first; row < last; ++row) {
        const A* made = out.data + (row - first) * rows.w * ld;
        T* to = row_of<T>(z, rows, row);
        if (ld == 4 * o && z.stride[3] == ld) {
          store_row(made, to, 1, rows.w * ld);
        } else {
          for (int64_t i = 0; i < rows.w; ++i) store_run(made + i * ld, to + i * z.stride[3], 4 * o);
        }
      }
    }
  }
}

template <class T>
void backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  const Rows rows(args);
  threads = threads_for(args, threads);
  const Plane &z = args.z[0], &d_x = grads.d_x, &add = grads.add;
  advise<4>(d_x.data, d_x.stride, {args.n, args.c, args.h, args.w}, static_cast<int64_t>(sizeof(T)));
  const int64_t c = args.c, o = args.o, wide = padded<A>(4 * c);
  const T* weight = static_cast<const T*>(args.weight);
  const Buffer<A> weights(4 * o * wide);
  pack(4 * o, 4 * c, weights.data, [&](int64_t k, int64_t j) {
    return band_at(k, o) != j / c
               ? A(0)
               : A(0.5) * load(weight[channel_at(k, o) * args.weight_stride[0] + j % c * args.weight_stride[1]]);
  });
  // Each share has the products of all bands of the gradient and all bands of x; only those of equal bands count.
  const int64_t whole = round_up(4 * o, kGemmRows), size = whole * wide;
  const ZeroBuffer<A> zero(wide), sums(rows.shares.count * size);
  const ZeroBuffer<double> bias_sums(rows.shares.count * o);
  const Panels panels(wide / kLanes<A>);
  const bool by_channel = pixels_inner(args);
  WAVEMIX_PARALLEL(threads) {
    Bands<T, A> bands(args, rows);
    const ZeroBuffer<A> d_z(rows.most() * 4 * o + slack<A>(4 * o));
    const Buffer<A> d_bands((rows.most() + kGemmRows) * wide), narrow(wide == 4 * c ? 0 : rows.most() * 4 * c),
        lines(4 * rows.w * c), also(2 * rows.w * c), part(size);
    WAVEMIX_FOR
    for (int64_t share = 0; share < rows.shares.count; ++share)
      for (int64_t block = rows.shares.begin(share); block < rows.shares.begin(share + 1); ++block) {
        const int64_t first = rows.begin(block), last = rows.end(block), count = (last - first) * rows.w;
        for (int64_t row = first; row < last; ++row)
          load_pixels(row_of<const T>(z, rows, row), z.stride[3], rows.w, 4 * o,
                      d_z.data + (row - first) * rows.w * 4 * o);
        // The gradient of the weight. Sums of a block by themselves: two steps of additions err less than a long one.
        bands.fill(args.x, first, last);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t vectors = panels.begin(p + 1) - panels.begin(p), at = panels.begin(p) * kLanes<A>;
          gemm_panel<A, true>(vectors, whole, d_z.data, 4 * o, bands.memory.data + at, 4 * c, count, zero.data,
                              part.data + at, wide);
        }
        A* __restrict sum = sums.data + share * size;
        const A* __restrict made = part.data;
        WAVEMIX_SIMD
        for (int64_t i = 0; i < size; ++i) sum[i] += made[i];
        for (int64_t j = 0; j < o; ++j) {
          A total = 0;
          for (int64_t i = 0; i < count; ++i) total += d_z.data[i * 4 * o + j];
          bias_sums.data[share * o + j] += static_cast<double>(total);
        }
        // The gradient of x.
        product(round_up(count, kGemmRows), 4 * c, 4 * o, d_z.data, 4 * o, weights.data, zero.data, d_bands.data, wide);
        const A* dense = d_bands.data;
        if (wide != 4 * c) {
          for (int64_t i = 0; i < count; ++i)
            std::memcpy(narrow.data + i * 4 * c, d_bands.data + i * wide, static_cast<size_t>(4 * c) * sizeof(A));
          dense = narrow.data;
        }
        for (int64_t row = first; row < last; ++row) {
          synthesise_any(dense + (row - first) * rows.w * 4 * c, rows.w, c, lines.data, lines.data + 2 * rows.w * c);
          for (int64_t below = 0; below < 2; ++below) {
            A* __restrict line = lines.data + below * 2 * rows.w * c;
            T* to = row_of<T>(d_x, rows, row, 2, below);
            const T* more = add.data == nullptr ? nullptr : row_of<const T>(add, rows, row, 2, below);
            if (by_channel) {
              for (int64_t k = 0; k < c; ++k)
                for (int64_t i = 0; i < 2 * rows.w; ++i) {
                  const A extra = more == nullptr ? A(0) : load(more[k * add.stride[1] + i * add.stride[3]]);
                  store(to[k * d_x.stride[1] + i * d_x.stride[3]], line[i * c + k] + extra);
                }
              continue;
            }
            if (more != nullptr) {
              load_pixels(more, add.stride[3], 2 * rows.w, c, also.data);
              const A* __restrict extra = also.data;
              WAVEMIX_SIMD
              for (int64_t i = 0; i < 2 * rows.w * c; ++i) line[i] += extra[i];
            }
            if (d_x.stride[3] == c) {
              store_row(line, to, 1, 2 * rows.w * c);
            } else {
              for (int64_t i = 0; i < 2 * rows.w; ++i) store_run(line + i * c, to + i * d_x.stride[3], c);
            }
          }
        }
      }
  }
  for (int64_t i = 0; i < o; ++i) {
    for (int64_t k = 0; k < c; ++k) {
      double sum = 0;
      for (int64_t share = 0; share < rows.shares.count; ++share)
        for (int64_t band = 0; band < 4; ++band)
          sum += static_cast<double>(sums.data[share * size + place(band, i, o) * wide + band * c + k]);
      store(static_cast<T*>(grads.d_weight)[i * c + k], static_cast<A>(0.5 * sum));
    }
    if (grads.d_bias == nullptr) continue;
    double sum = 0;
    for (int64_t share = 0; share < rows.shares.count; ++share) sum += bias_sums.data[share * o + i];
    store(static_cast<T*>(grads.d_bias)[i], static_cast<A>(2 * sum));
  }
}

}  // namespace

void reduce_haar_few_channels(const ReduceHaarArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}
void reduce_haar_few_channels_backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
