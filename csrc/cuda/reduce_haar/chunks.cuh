// A chunk of channels of a tile: x and weight on their way into shared memory, and the image that is made of x there.
#pragma once

#include <cstdint>

#include "cuda/reduce_haar/memory.cuh"

namespace wavemix::reduce_haar {

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// The thread's pixels: where each lies among the rows of shared memory, which are in the order of the fragments' (warp,
// pixel of the quad, quad), and in the image.
template <class Tile, class F>
__device__ inline void each_pixel(const Tile& tile, const F& run) {
  const int shift = 4 + tile.p.wide_shift;
  const int64_t* stride = tile.p.x_stride;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kChunkWords; i < kPixels; i += kThreads / kChunkWords) {
    const int r = i >> shift, c = i & ((1 << shift) - 1);
    const bool exists = tile.row + r < tile.p.h && tile.column + c < tile.p.w;
    const int quad = (r >> 1 & 1) * 8 + ((c >> 1 & 3) << 1 | (c >> 3 & 1));
    const int place = tile.warp_of(r, c) * kWarpPixels + ((r & 1) * 2 + (c & 1)) * 16 + quad;
    run(place, (tile.row + r) * stride[2] + (tile.column + c) * stride[3], exists);
  }
}

template <class Tile>
__device__ inline void load_along_c(const Tile& tile, int k0, typename Tile::Memory x) {
  using E = typename Tile::Type;
  const int word = static_cast<int>(threadIdx.x) % kChunkWords, k = k0 + word * Tile::V;
  const int64_t first = tile.n * tile.p.x_stride[0] + k * tile.p.x_stride[1];
  each_pixel(tile, [&](int place, int64_t at, bool exists) {
    const typename Tile::Memory target = x + channel_word<E>(place, word);
    const int valid = exists ? Tile::clamp(tile.p.c - k) : 0;
    load_word(target, static_cast<const E*>(tile.p.x) + (first + at), tile.p.x_stride[1], valid, tile.p.x_bytes);
    if constexpr (Tile::kWithNorm)
      load_pieces<kVectorBytes>(target + Tile::kXElements, static_cast<const E*>(tile.p.y) + (first + at), 1, valid);
  });
}

// Rows of shared memory are channels; within them warps, then the rows and columns of the image.
template <class Tile>
__device__ inline void load_along_w(const Tile& tile, int k0, typename Tile::Memory x) {
  using E = typename Tile::Type;
  constexpr int V = Tile::V;
  const Params& p = tile.p;
  const int shift = 4 + p.wide_shift;
  const int64_t* stride = p.x_stride;
  const E* source = static_cast<const E*>(p.x) + tile.n * stride[0] + k0 * stride[1];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::K * (kPixels / V); i += kThreads) {
    const int pixel = i % (kPixels / V) * V, k = i / (kPixels / V);
    const int r = pixel >> shift, c = pixel & ((1 << shift) - 1);
    const bool exists = tile.row + r < p.h && k0 + k < p.c;
    const int place = tile.warp_of(r, c) * kWarpPixels + (r & 3) * 16 + (c & 15);
    load_word(x + pixel_place<E>(k, place),
              source + k * stride[1] + (tile.row + r) * stride[2] + (tile.column + c) * stride[3], stride[3],
              exists ? Tile::clamp(p.w - (tile.column + c)) : 0, p.x_bytes);
  }
}

// Starts the copies of channels k0 and on of x (and behind it y) and of the weight.
template <bool along_w, class Tile>
__device__ inline void load_chunk(const Tile& tile, int k0, typename Tile::Memory chunk) {
  using E = typename Tile::Type;
  constexpr int V = Tile::V;
  const Params& p = tile.p;
  if constexpr (along_w) {
    load_along_w(tile, k0, chunk);
  } else {
    load_along_c(tile, k0, chunk);
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kOutputs * kChunkWords; i += kThreads) {
    const int o = i / kChunkWords, word = i % kChunkWords, k = k0 + word * V;
    const E* source =
        static_cast<const E*>(p.weight) + (tile.first_output + o) * p.weight_stride[0] + k * p.weight_stride[1];
    load_word(chunk + (Tile::kWeightAt + channel_word<E>(o, word)), source, p.weight_stride[1],
              o < tile.outputs ? Tile::clamp(p.c - k) : 0, p.weight_bytes);
  }
}

// image = y * scale + shift + x in x's place and, by the block of the first outputs, in memory: each thread of what it
// copied itself.
template <class Tile>
__device__ inline void normalise_chunk(const Tile& tile, int k0, typename Tile::Memory x) {
  using E = typename Tile::Type;
  constexpr int V = Tile::V;
  const Params& p = tile.p;
  const int word = static_cast<int>(threadIdx.x) % kChunkWords, k = k0 + word * V;
  if (k >= p.c) return;
  const int64_t first = tile.n * p.x_stride[0] + k;
  float scale[V], shift[V];
  load(p.scale + k, scale);
  load(p.shift + k, shift);
  each_pixel(tile, [&](int place, int64_t at, bool exists) {
    if (!exists) return;
    const typename Tile::Memory target = x + channel_word<E>(place, word);
    float image[V], y[V];
    get(target, image);
    get(target + Tile::kXElements, y);
#pragma unroll
    for (int e = 0; e < V; ++e) image[e] += fmaf(y[e], scale[e], shift[e]);
    put(target, image);
    if (tile.first_output == 0) store(static_cast<E*>(p.image) + (first + at), image);
  });
}

}  // namespace wavemix::reduce_haar
