// One tile of reduce_haar's gradients: Z's and x's ways into shared memory, the synthesis, the two products.
//
// The synthesis' result g, rounded to the images' dtype, lies in shared memory for both products, by rows for d_x and
// by columns for d_weight, whose sums stay in registers from tile to tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/common/mma.cuh"
#include "cuda/common/vector.cuh"
#include "wavemix/reduce_haar.h"

namespace wavemix::reduce_haar::gradients {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 64;  // of a tile: one 8x8 block, or 4 of 4x4, or 16 quads
constexpr int kQuads = kPixels / 4;
constexpr int kTileLevels = 3;
constexpr int kMostRows = kQuads + 7;         // pixels of Z for a tile: 16, 4, 1, and one of levels 4 and 5
constexpr int kWord = kVectorBytes / 2;       // elements of 16 bytes
constexpr int kMostSize = 4;                  // a form of size S serves up to
constexpr int kOutputs = 16, kChannels = 64;  // S times so many

// Blocks of a multiprocessor, as registers allow.
constexpr int most_blocks(int size) { return size == 1 ? 3 : size < 4 ? 2 : 1; }

// Shared memory. Rows are a word longer than their values, so that eight of them meet in no bank.
template <int S>
struct Places {
  static constexpr int kChannelRow = kChannels * S + kWord, kOutputRow = kOutputs * S + kWord;
  static constexpr int kZRow = 4 * kOutputs * S;
  static constexpr int kWeight = kOutputs * S * kChannelRow, kGradient = kPixels * kOutputRow;
  static constexpr int kX = kPixels * kChannelRow, kStage = kX + kMostRows * kZRow;
  static constexpr int kBytes = 2 * (kWeight + kGradient + 2 * kStage);
};

struct Params {
  const void *x, *weight, *add;
  void* d_x;
  const void* z[kMaxHaarLevels];
  float* sums;  // of each block: d_weight, d_bias
  int c, h, w, o, levels;
  int side_shift;                  // a tile is made up of blocks of 2^side_shift pixels square
  uint32_t squares;                // of the batch
  Divisor across, down;            // squares of an image
  int tiles_of_block, more_tiles;  // as many blocks have one more
  int z_rows;                      // pixels of Z for a tile
};

// Pixels of Z lie level by level.
__device__ inline int first_row(int level) { return level == 1 ? 0 : level == 2 ? 16 : 17 + level; }

struct Square {
  int image, top, left;
};
__device__ inline Square square_of(const Params& p, uint32_t number) {
  const int left = static_cast<int>(p.across.take(number)), top = static_cast<int>(p.down.take(number));
  return {static_cast<int>(number), top, left};
}

// Number of a tile's pixel i at a level (0: x) through all images of that level; -1 behind the last image.
__device__ inline int pixel_of(const Params& p, int tile, int level, int i) {
  const int side = p.side_shift, bits = level < side ? side - level : 0, up = level > side ? level - side : 0;
  const uint32_t number =
      (static_cast<uint32_t>(tile) << 2 * (kTileLevels - side)) + (static_cast<uint32_t>(i) >> 2 * bits);
  if (number >= p.squares) return -1;
  const Square square = square_of(p, number);
  const int in = i & ((1 << 2 * bits) - 1);  // in Z-order
  const int right = (in & 1) | (in >> 1 & 2) | (in >> 2 & 4), below = (in >> 1 & 1) | (in >> 2 & 2) | (in >> 3 & 4);
  const int y = ((square.top << bits) + below) >> up, x = ((square.left << bits) + right) >> up;
  return (square.image * (p.h >> level) + y) * (p.w >> level) + x;
}

template <class T>
__device__ inline void get_pair(SharedSpan<T> source, float (&values)[2]) {
  const Fragment bits = shared_cast<Fragment>(source)[0];
  T pair[2];
  memcpy(static_cast<void*>(pair), &bits, sizeof(bits));
  values[0] = widen(pair[0]);
  values[1] = widen(pair[1]);
}
template <class T>
__device__ inline void put_pair(SharedSpan<T> target, float first, float second) {
  const float values[2] = {first, second};
  T pair[2];
  narrow(values, pair);
  Fragment bits;
  memcpy(&bits, static_cast<const void*>(pair), sizeof(bits));
  shared_cast<Fragment>(target)[0] = bits;
}

template <class T, int S>
struct Block {
  using P = Places<S>;
  // A thread of the synthesis has a pair of outputs and one quad of each so many.
  static constexpr int kPairs = kOutputs * S / 2, kQuadsAtOnce = S < 3 ? kQuads : kQuads / 2;
  static_assert(kPairs * kQuadsAtOnce <= kThreads);

  const Params& p;
  SharedSpan<T> memory;
  uint32_t thread;
  int lane = static_cast<int>(thread % 32), warp = static_cast<int>(thread / 32);
  int group = lane / 4, member = static_cast<int>(thread % 4);
  // A warp makes d_x of 16 pixels and half the channels; a thread of pixels `group` and 8 behind, of words of eight
  // channels. It copies x in the same places.
  int first_pixel = static_cast<int>(thread / 32 % 4 * 16), half = static_cast<int>(thread / 128);

  __device__ SharedSpan<T> weight() const { return memory; }
  __device__ SharedSpan<T> gradient() const { return memory + P::kWeight; }
  __device__ SharedSpan<T> stage(int tile) const {
    return memory + (P::kWeight + P::kGradient + (tile & 1) * P::kStage);
  }
  __device__ int channel(int j) const { return (4 * (half * S + j) + member) * kWord; }

  // --- Into shared memory

  // Channel 8 m + 2 t + e of 32 goes to place 8 t + 2 m + e: the product's columns 2 m and 2 m + 1 of four tiles t,
  // which are one thread's, are then neighbours in d_x.
  __device__ void load_weight() const {
    constexpr int kRowPairs = kChannels * S / 2;
    const SharedSpan<Fragment> target = shared_cast<Fragment>(weight());
#pragma unroll 2
    for (int i = static_cast<int>(thread); i < kOutputs * S * kRowPairs; i += kThreads) {
      const int o = i / kRowPairs, at = i % kRowPairs, pair = (at & ~15) | (at & 3) << 2 | (at >> 2 & 3);
      Fragment bits = 0;
      if (o < p.o && 2 * pair < p.c) bits = __ldg(static_cast<const Fragment*>(p.weight) + (o * (p.c / 2) + pair));
      target[o * (P::kChannelRow / 2) + at] = bits;
    }
  }

  // Starts the copies of a tile; the thread's own pixels are wanted again for d_x.
  __device__ void fetch(int tile, int (&pixels)[2]) const {
    const SharedSpan<T> x = stage(tile), z = x + P::kX;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int in_tile = first_pixel + group + 8 * below;
      pixels[below] = pixel_of(p, tile, 0, in_tile);
      const T* const source = static_cast<const T*>(p.x) + static_cast<int64_t>(pixels[below]) * p.c;
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const SharedSpan<T> target = x + (in_tile * P::kChannelRow + channel(j));
        if (pixels[below] >= 0 && channel(j) < p.c) {
          cp_async<16>(target, source + channel(j));
        } else {
          shared_cast<uint4>(target)[0] = uint4{};
        }
      }
    }
#pragma unroll 1
    for (int i = warp; i < p.z_rows; i += kWarps) {
      const int level = 1 + (i >= 16) + (i >= 20) + (i >= 21) + (i >= 22);
      const int pixel = pixel_of(p, tile, level, i - first_row(level));
      if (pixel < 0) continue;
      const T* const source = static_cast<const T*>(p.z[level - 1]) + static_cast<int64_t>(pixel) * (4 * p.o);
      for (int e = lane * kWord; e < 4 * p.o; e += 32 * kWord) cp_async<16>(z + (i * P::kZRow + e), source + e);
    }
    cp_async_commit();
  }

  // --- The synthesis

  // LL of a pair of outputs in `low`, to which this level's own is added, and the bands.
  __device__ void get_bands(SharedSpan<T> pixel, int pair, float (&low)[2], float (&bands)[3][2]) const {
    float own[2], mixed[3][2];
    get_pair(pixel + 2 * pair, own);
#pragma unroll
    for (int k = 0; k < 3; ++k) get_pair(pixel + (p.o + 6 * pair + 2 * k), mixed[k]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      low[e] += own[e];
#pragma unroll
      for (int b = 0; b < 3; ++b) bands[b][e] = mixed[(3 * e + b) / 2][(3 * e + b) % 2];
    }
  }

  // g of the tile, and its sums over the thread's quads; zeros for what does not exist.
  __device__ void synthesise(int tile, float (&sums)[2]) const {
    const SharedSpan<T> z = stage(tile) + P::kX, g = gradient();
    const int pair = static_cast<int>(thread % kPairs), per_square = p.side_shift - 1;
    if (thread >= kPairs * kQuadsAtOnce) return;
#pragma unroll 1
    for (int quad = static_cast<int>(thread / kPairs); quad < kQuads; quad += kQuadsAtOnce) {
      const uint32_t square = (static_cast<uint32_t>(tile) << 2 * (kTileLevels - p.side_shift)) +
                              (static_cast<uint32_t>(quad) >> 2 * per_square);
      float low[2] = {}, bands[3][2] = {};
      if (square < p.squares && pair < p.o / 2) {
#pragma unroll 1
        for (int level = p.levels; level > 1; --level) {
          get_bands(z + (first_row(level) + (quad >> 2 * (level - 1))) * P::kZRow, pair, low, bands);
          int corner = quad >> 2 * (level - 2) & 3;
          if (level > kTileLevels) {
            const Square at = square_of(p, square);
            corner = (at.left >> (level - kTileLevels - 1) & 1) | (at.top >> (level - kTileLevels - 1) & 1) << 1;
          }
          const float across = corner & 1 ? -0.5f : 0.5f, down = corner & 2 ? -1.0f : 1.0f;
#pragma unroll
          for (int e = 0; e < 2; ++e)
            low[e] = 0.5f * (low[e] + down * bands[0][e]) + across * (bands[1][e] + down * bands[2][e]);
        }
        get_bands(z + quad * P::kZRow, pair, low, bands);
      }
      float corners[4][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float top = low[e] + bands[0][e], bottom = low[e] - bands[0][e];
        const float top_high = bands[1][e] + bands[2][e], bottom_high = bands[1][e] - bands[2][e];
        corners[0][e] = 0.5f * (top + top_high);
        corners[1][e] = 0.5f * (top - top_high);
        corners[2][e] = 0.5f * (bottom + bottom_high);
        corners[3][e] = 0.5f * (bottom - bottom_high);
        sums[e] += 2 * low[e];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        put_pair(g + ((4 * quad + k) * P::kOutputRow + 2 * pair), corners[k][0], corners[k][1]);
    }
  }

  // --- The products

  __device__ static void multiply(float (&sums)[4], const Fragment (&a)[4], Fragment low, Fragment high) {
    const Fragment b[2] = {low, high};
    mma_m16n8k16<T>(sums, a, b);
  }

  // Columns 8 (warp S + i) and on of d_weight, all rows.
  __device__ void multiply_weight(int tile, float (&products)[S][S][4]) const {
    const SharedSpan<T> x = stage(tile), g = gradient();
#pragma unroll
    for (int first = 0; first < kPixels; first += 32) {
      Fragment b[S][4];
#pragma unroll
      for (int i = 0; i < S; ++i)
        ldmatrix_x4<true>(b[i], x + ((first + lane) * P::kChannelRow + (warp * S + i) * kWord));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int pixel = first + 16 * step + lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int m = 0; m < S; ++m) {
          Fragment a[4];
          ldmatrix_x4<true>(a, g + (pixel * P::kOutputRow + (2 * m + lane / 8 % 2) * kWord));
#pragma unroll
          for (int i = 0; i < S; ++i) multiply(products[m][i], a, b[i][2 * step], b[i][2 * step + 1]);
        }
      }
    }
  }

  static constexpr int kAhead = S < 2 ? 1 : 2;
  // Word j of both pixels.
  __device__ void load_add(const int (&pixels)[2], int j, Raw<T, kWord> (&add)[2][S]) const {
    if (p.add == nullptr || channel(j) >= p.c) return;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const T* const source = static_cast<const T*>(p.add) + static_cast<int64_t>(pixels[below]) * p.c;
      if (pixels[below] >= 0) wavemix::fetch<T, kWord>(source + channel(j), add[below][j]);
    }
  }

  // kAhead words of `add` are on their way.
  __device__ void multiply_x(const int (&pixels)[2], Raw<T, kWord> (&add)[2][S]) const {
    const SharedSpan<T> g = gradient();
#pragma unroll
    for (int j = 0; j < S; ++j) {
      float sums[4][4] = {};
#pragma unroll
      for (int step = 0; step < S; ++step) {
        Fragment a[4];
        ldmatrix_x4<false>(a, g + ((first_pixel + lane % 16) * P::kOutputRow + (2 * step + lane / 16) * kWord));
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          Fragment b[4];
          ldmatrix_x4<true>(
              b, weight() + ((16 * step + lane % 16) * P::kChannelRow + (4 * (half * S + j) + t + lane / 16) * kWord));
          multiply(sums[t], a, b[0], b[1]);
          multiply(sums[t + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        if (pixels[below] < 0 || channel(j) >= p.c) continue;
        float values[kWord];
        if (p.add != nullptr) {
          widen<T, kWord>(add[below][j], values);
        } else {
#pragma unroll
          for (float& value : values) value = 0;
        }
#pragma unroll
        for (int e = 0; e < kWord; ++e) values[e] += sums[e / 2][2 * below + e % 2];
        store(static_cast<T*>(p.d_x) + static_cast<int64_t>(pixels[below]) * p.c + channel(j), values);
      }
      if (j + kAhead < S) load_add(pixels, j + kAhead, add);
    }
  }

  // --- The sums

  __device__ void store_sums(const float (&products)[S][S][4], const float (&sums)[2]) const {
    float* const d_weight = p.sums + static_cast<int64_t>(blockIdx.x) * (p.o * p.c + p.o);
#pragma unroll
    for (int m = 0; m < S; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int o = 16 * m + 8 * k + group;
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int c = (warp * S + i) * kWord + 2 * member;
          if (o >= p.o || c >= p.c) continue;
          const float both[2] = {products[m][i][2 * k], products[m][i][2 * k + 1]};
          store(d_weight + (o * p.c + c), both);
        }
      }
    }
    __syncthreads();  // the stages are free
    const SharedSpan<float> by_thread = shared_cast<float>(stage(0));
    if (thread < kPairs * kQuadsAtOnce) {
      by_thread[2 * thread] = sums[0];
      by_thread[2 * thread + 1] = sums[1];
    }
    __syncthreads();
    if (static_cast<int>(thread) >= p.o) return;
    float sum = 0;
    for (int quad = 0; quad < kQuadsAtOnce; ++quad) sum += by_thread[2 * kPairs * quad + thread];
    d_weight[p.o * p.c + thread] = sum;
  }
};

}  // namespace wavemix::reduce_haar::gradients
