// One tile of reduce_haar: its product by tensor cores or multiply-adds, then the pyramid of it.
//
// A warp owns 4 rows x 16 columns: 2 x 8 quads. Lane 4 * group + member holds quads (0, column) and (1, column),
//     column = group / 2 + 4 * (group % 2),
// and outputs 8 * tile + 2 * member, + 1. Where memory runs along W a fragment's rows are 16 neighbouring pixels, and
// one exchange of half the accumulators between even and odd groups makes that same deal; hence the order of columns.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/reduce_haar/chunks.cuh"

namespace wavemix::reduce_haar {

template <class A>
__device__ inline void butterfly(A a, A b, A c, A d, A (&bands)[4]) {
  const A top_low = a + b, top_high = a - b, bottom_low = c + d, bottom_high = c - d;
  bands[0] = A(0.5) * (top_low + bottom_low);
  bands[1] = A(0.5) * (top_low - bottom_low);
  bands[2] = A(0.5) * (top_high + bottom_high);
  bands[3] = A(0.5) * (top_high - bottom_high);
}

template <class T, bool kTensorCores, int NT, bool kNorm>  // NT: tiles of eight outputs; kNorm: of NormImageArgs' image
struct Tile {
  using A = Arithmetic<T>;
  using Type = T;
  using Memory = SharedSpan<T>;
  static constexpr bool kWithNorm = kNorm;
  static constexpr int V = kVectorBytes / static_cast<int>(sizeof(T));  // elements of a word
  static constexpr int K = kChunkBytes / static_cast<int>(sizeof(T));   // channels of a chunk
  static constexpr int kOutputs = 8 * NT;
  static constexpr int kXElements = kPixels * K, kWeightAt = kNorm ? 2 * kXElements : kXElements;  // behind x, and y
  static constexpr int kBuffer = kWeightAt + kOutputs * K;
  // Afterwards the same memory holds pixels of Z on their way out, and the LL of two successive levels. Rows are set
  // apart by a few banks.
  static constexpr int kRun = sizeof(T) == 2 ? 8 : 4;  // pixels that a warp writes at a time
  static constexpr int kRow = 4 * kOutputs + V, kSumRow = kOutputs + 8;
  static constexpr int kStaged = kWarps * kRun * kRow;
  static constexpr int kQuads = kPixels / 4;
  static constexpr int kPerSum = static_cast<int>(sizeof(A) / sizeof(T));
  static constexpr int kSums = (kQuads + kQuads / 4) * kSumRow * kPerSum;
  static constexpr int kElements = std::max(2 * kBuffer, kStaged + kSums);
  static constexpr int kTop = 4 * kSumRow * kPerSum;  // LL of four tiles, for the fifth level
  static_assert(kNorm || (kElements + kTop) * sizeof(T) <= 48 * 1024, "static shared memory");
  static_assert(kWarps * kRun >= kQuads / 4, "the pixels of the second level fit where those of the first were");

  using Sums = A[4][NT][4];  // a pixel of the quad (row major); a tile of outputs; quad row, one of two outputs

  const Params& p;
  SharedSpan<T> memory;
  int64_t n;
  int first_output, outputs;  // this block has these
  int row, column;            // the tile's first pixel
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4;
  int quad_column = group / 2 + 4 * (group % 2);

  __device__ int warp_of(int r, int c) const { return ((r >> 2) << p.wide_shift) + (c >> 4); }
  __device__ static int clamp(int elements) { return elements < 0 ? 0 : least(elements, V); }

  // --- One chunk of the product

  // Bits of a float operand, as the tensor core takes it.
  __device__ static Fragment prepared(Fragment bits) {
    if constexpr (std::is_same_v<T, float>) {
      float x;
      memcpy(&x, &bits, sizeof(x));
      return to_tf32(x);
    } else {
      return bits;
    }
  }

  // Four 8x8 matrices of 16-bit elements, or of 32-bit ones as 8x4: lane 4 * group + member gets the element(s)
  // `member` of row `group`, what a fragment wants of either.
  __device__ static void load_matrices(Fragment (&r)[4], SharedSpan<T> at) {
    ldmatrix_x4<false>(r, shared_cast<uint16_t>(at));
#pragma unroll
    for (Fragment& bits : r) bits = prepared(bits);
  }

  // The chunk's step of 16 channels (tf32: 8) of the warp's pixels. Fragments are the pixels of the quad, rows its
  // quads; for 16-bit elements along W they are image rows until they are dealt out.
  template <bool along_w>
  __device__ void load_pixels(SharedSpan<T> x, int step, Fragment (&a)[4][4]) const {
    if constexpr (!along_w) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int place = warp * kWarpPixels + q * 16 + lane % 16;
        load_matrices(a[q], x + channel_word<T>(place, 2 * step + lane / 16));
      }
    } else if constexpr (sizeof(T) == 2) {
      const int channel = 16 * step + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int r = 0; r < 4; ++r)
        ldmatrix_x4<true>(a[r], x + pixel_place<T>(channel, warp * kWarpPixels + r * 16 + lane / 8 % 2 * 8));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int place = warp * kWarpPixels + r * 16 + 2 * quad_column;
          const uint2 pair = shared_cast<uint2>(x + pixel_place<T>(8 * step + 4 * half + member, place))[0];
          a[r % 2 * 2][2 * half + r / 2] = prepared(pair.x);
          a[r % 2 * 2 + 1][2 * half + r / 2] = prepared(pair.y);
        }
      }
    }
  }

  template <bool along_w>
  __device__ void multiply_tensor_cores(SharedSpan<T> x, SharedSpan<T> weight, Sums& sums) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      Fragment a[4][4];
      load_pixels<along_w>(x, step, a);
#pragma unroll
      for (int tile = 0; tile < NT; tile += 2) {
        Fragment b[4];  // two words of two tiles
        const int row_of_lane = 8 * least(tile + lane / 16, NT - 1) + lane % 8;
        load_matrices(b, weight + channel_word<T>(row_of_lane, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int k = 0; k < 2 && tile + k < NT; ++k) {
          const Fragment half[2] = {b[2 * k], b[2 * k + 1]};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if constexpr (sizeof(T) == 2) {
              mma_m16n8k16<T>(sums[q][tile + k], a[q], half);
            } else {
              mma_m16n8k8_tf32(sums[q][tile + k], a[q], half);
            }
          }
        }
      }
    }
  }

  template <bool along_w>
  __device__ void multiply_fma(SharedSpan<T> x, SharedSpan<T> weight, Sums& sums) const {
#pragma unroll 1
    for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // quad row: both at once would not leave enough registers
        A pixels[4][V];
        if constexpr (along_w) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
#pragma unroll
            for (int below = 0; below < 2; ++below) {
              const int place = warp * kWarpPixels + (2 * r + below) * 16 + 2 * quad_column;
              A pair[2];
              get(x + pixel_place<T>(word * V + k, place), pair);
              pixels[2 * below][k] = pair[0];
              pixels[2 * below + 1][k] = pair[1];
            }
          }
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q)
            get(x + channel_word<T>(warp * kWarpPixels + q * 16 + r * 8 + group, word), pixels[q]);
        }
#pragma unroll
        for (int tile = 0; tile < NT; ++tile) {
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            A factors[V];
            get(weight + channel_word<T>(8 * tile + 2 * member + which, word), factors);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
#pragma unroll
              for (int k = 0; k < V; ++k) sums[q][tile][2 * r + which] += pixels[q][k] * factors[k];
            }
          }
        }
      }
    }
  }

  template <bool along_w>
  __device__ void multiply(SharedSpan<T> x, SharedSpan<T> weight, Sums& sums) const {
    if constexpr (kTensorCores) {
      multiply_tensor_cores<along_w>(x, weight, sums);
    } else {
      multiply_fma<along_w>(x, weight, sums);
    }
  }

  template <bool along_w>
  __device__ void convolve(Sums& sums) const {
    const int chunks = p.c > K ? (p.c + K - 1) / K : 1;
    // A chunk arrives while the one before is multiplied.
#pragma unroll 1
    for (int chunk = 0; chunk <= chunks; ++chunk) {
      const SharedSpan<T> next = memory + chunk % 2 * kBuffer, now = memory + (chunk + 1) % 2 * kBuffer;
      if (chunk < chunks) load_chunk<along_w>(*this, chunk * K, next);
      cp_async_commit();
      if (chunk == 0) continue;
      cp_async_wait<1>();
      if constexpr (kNorm) normalise_chunk(*this, (chunk - 1) * K, now);
      __syncthreads();
      multiply<along_w>(now, now + kWeightAt, sums);
      __syncthreads();
    }
    if constexpr (kTensorCores && along_w && sizeof(T) == 2) deal(sums);
  }

  // Turns rows of 16 pixels into quads: the two pixels of a pair lie in neighbouring groups, in place `group` and
  // `group + 8` alike. Even groups keep the first and get its right neighbour, odd ones keep the second.
  __device__ void deal(Sums& sums) const {
    const bool odd = group % 2;
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      A dealt[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const A first = sums[r][tile][which], second = sums[r][tile][2 + which];
          const A other = __shfl_xor_sync(kWholeWarp, odd ? first : second, 4);
          dealt[r % 2 * 2][r / 2 * 2 + which] = odd ? other : first;
          dealt[r % 2 * 2 + 1][r / 2 * 2 + which] = odd ? second : other;
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[q][tile][k] = dealt[q][k];
      }
    }
  }

  // The bias is where the sums start.
  __device__ void start(Sums& sums) const {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int o = 8 * tile + 2 * member + which;
        A bias = 0;
        if (p.bias && o < outputs) bias = widen(static_cast<const T*>(p.bias)[(first_output + o) * p.bias_stride]);
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[q][tile][which] = sums[q][tile][2 + which] = bias;
      }
    }
  }

  // --- The levels, and Z

  // A row of `memory` on its way out is one pixel of Z: this block's LL, then from here on (even, for pairs) its bands.
  __device__ int bands_at() const { return outputs + outputs % 2; }

  // 2^pixels_shift pixels, 2^columns_shift to a row, of which the first is (i0, j0), by threads first, first + step ...
  __device__ void copy_out(int level, SharedSpan<T> rows, int pixels_shift, int columns_shift, int i0, int j0,
                           int first, int step) const {
    constexpr int kChannels = 4 * kOutputs, kWords = kChannels / V;
    const Level& out = p.level[level - 1];
    const int64_t* stride = out.stride;
    T* z = static_cast<T*>(out.z) + n * stride[0];
    const int h = p.h >> level, w = p.w >> level;
    const auto place = [&](int pixel, int e) -> T* {  // null outside the image; e counts LL, then bands
      const int i = i0 + (pixel >> columns_shift), j = j0 + (pixel & ((1 << columns_shift) - 1));
      if (i >= h || j >= w || e >= 4 * outputs) return nullptr;
      const int channel = e < outputs ? first_output + e : p.o + 3 * first_output + (e - outputs);
      return z + channel * stride[1] + i * stride[2] + j * stride[3];
    };
    const auto from = [&](int pixel, int e) { return pixel * kRow + (e < outputs ? e : e + outputs % 2); };
    if (out.access == Access::channel_words) {
#pragma unroll 2
      for (int i = first; i < kWords << pixels_shift; i += step) {
        const int pixel = i / kWords, e = i % kWords * V;
        T* target = place(pixel, e);
        if (!target) continue;
        const uint4 word = shared_cast<uint4>(rows + from(pixel, e))[0];
        __stwb(reinterpret_cast<uint4*>(target), word);
      }
    } else if (out.access == Access::column_words && 1 << columns_shift >= V) {
#pragma unroll 1
      for (int i = first; i < (kChannels / V) << pixels_shift; i += step) {
        const int pixel = i / kChannels * V, e = i % kChannels;
        T* target = place(pixel, e);
        if (!target) continue;
        T elements[V];
#pragma unroll
        for (int k = 0; k < V; ++k) elements[k] = rows[from(pixel + k, e)];
        uint4 word;
        memcpy(&word, static_cast<const void*>(elements), sizeof(word));
        __stwb(reinterpret_cast<uint4*>(target), word);
      }
    } else {
#pragma unroll 1
      for (int i = first; i < kChannels << pixels_shift; i += step) {
        // Neighbouring lanes along what is contiguous.
        const bool by_channel = stride[1] == 1;
        const int pixel = by_channel ? i / kChannels : i & ((1 << pixels_shift) - 1);
        const int e = by_channel ? i % kChannels : i >> pixels_shift;
        T* target = place(pixel, e);
        if (target) *target = rows[from(pixel, e)];
      }
    }
  }

  // Level 1, each warp for itself.
  __device__ void first_level(Sums& sums, SharedSpan<A> lows) const {
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        A bands[4];
        butterfly(sums[0][tile][k], sums[1][tile][k], sums[2][tile][k], sums[3][tile][k], bands);
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[b][tile][k] = bands[b];
      }
    }
    const SharedSpan<T> rows = memory + warp * kRun * kRow;
    const int across = 1 << p.wide_shift, i0 = warp / across * 2, j0 = warp % across * 8;
    constexpr int kRuns = 8 / kRun, kShift = kRun == 8 ? 3 : 2;
#pragma unroll 1
    for (int part = 0; part < 2 * kRuns; ++part) {
      const int r = part / kRuns, run = part % kRuns;
      if (quad_column / kRun == run) {
        const SharedSpan<T> pixel = rows + quad_column % kRun * kRow;
        const SharedSpan<A> low = lows + ((i0 + r) * (8 * across) + j0 + quad_column) * kSumRow;
#pragma unroll
        for (int tile = 0; tile < NT; ++tile) {
          const int o = 8 * tile + 2 * member;
          const auto value = [&](int b, int which) { return r ? sums[b][tile][2 + which] : sums[b][tile][which]; };
          const A pairs[4][2] = {{value(0, 0), value(0, 1)},
                                 {value(1, 0), value(2, 0)},
                                 {value(3, 0), value(1, 1)},
                                 {value(2, 1), value(3, 1)}};
          if (p.levels > 1) put(low + o, pairs[0]);
          if (o >= outputs) continue;
          put(pixel + o, pairs[0]);
#pragma unroll
          for (int k = 0; k < 3; ++k) put(pixel + (bands_at() + 3 * o + 2 * k), pairs[1 + k]);
        }
      }
      __syncwarp();
      copy_out(1, rows, kShift, kShift, (row >> 1) + i0 + r, (column >> 1) + j0 + run * kRun, lane, 32);
      __syncwarp();
    }
  }

  // A level from `lows`, the LL of the one before, by all threads; its own LL goes to `keep`.
  __device__ void coarser_level(int level, SharedSpan<A> lows, SharedSpan<A> keep) const {
    const int columns_shift = level > kTileLevels ? 0 : 4 + p.wide_shift - level;
    const int pixels_shift = level > kTileLevels ? 0 : 2 * (kTileLevels - level);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kOutputs << pixels_shift; i += kThreads) {
      const int pixel = i / kOutputs, o = i % kOutputs;
      const int r = pixel >> columns_shift, c = pixel & ((1 << columns_shift) - 1);
      const int above = (2 * r << (columns_shift + 1)) + 2 * c, below = above + (2 << columns_shift);
      A bands[4];
      butterfly<A>(lows[above * kSumRow + o], lows[(above + 1) * kSumRow + o], lows[below * kSumRow + o],
                   lows[(below + 1) * kSumRow + o], bands);
      keep[pixel * kSumRow + o] = bands[0];
      if (o >= outputs) continue;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const A one[1] = {bands[b]};
        put(memory + (pixel * kRow + (b == 0 ? o : bands_at() + 3 * o + b - 1)), one);
      }
    }
    __syncthreads();
    copy_out(level, memory, pixels_shift, columns_shift, row >> level, column >> level, static_cast<int>(threadIdx.x),
             kThreads);
  }

  // Four tiles share a fifth level; this is number `part`, and the last one computes the level.
  __device__ void analyse(Sums& sums, int part) const {
    const SharedSpan<A> odd = shared_cast<A>(memory + kStaged), even = odd + kQuads * kSumRow;
    const SharedSpan<A> top = shared_cast<A>(memory + kElements);
    first_level(sums, odd);
    const int last = part == 3 ? p.levels : least(p.levels, kTileLevels);
#pragma unroll 1
    for (int level = 2; level <= last; ++level) {
      __syncthreads();  // the LL of the level before is there, and its pixels have gone
      const SharedSpan<A> lows = level > kTileLevels ? top : level % 2 == 0 ? odd : even;
      coarser_level(level, lows, level == kTileLevels ? top + part * kSumRow : level % 2 == 0 ? even : odd);
    }
  }
};

}  // namespace wavemix::reduce_haar
