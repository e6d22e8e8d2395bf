// A tile's memory: the parameters of a launch, the places in shared memory, and the copies into it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/common/mma.cuh"
#include "cuda/reduce_haar/words.cuh"
#include "wavemix/reduce_haar.h"

namespace wavemix::reduce_haar {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMinBlocks = 2;  // one computes while the other waits for memory or writes
constexpr int kWarpPixels = 64;
constexpr int kPixels = kWarps * kWarpPixels;
constexpr int kChunkBytes = 64;  // channels at a time: four words of a pixel, two steps of a 16-bit mma
constexpr int kChunkWords = kChunkBytes / kVectorBytes;
constexpr int kTileLevels = 4;  // a 16x16 tile has four; a fifth level takes four tiles one after the other

// --- Parameters ------------------------------------------------------------------------------------------

// Z is written by 16 bytes along the channels or along a row where alignment allows it.
enum class Access : int { elements, channel_words, column_words };

struct Level {
  void* z;
  int64_t stride[4];
  Access access;
};

struct Params {
  const void *x, *weight, *bias;
  const void* y;  // NormImageArgs'
  const float *scale, *shift;
  void* image;
  int64_t x_stride[4], weight_stride[2], bias_stride;
  Level level[kMaxHaarLevels];
  int c, h, w, o, levels;
  bool x_along_w;             // words of x run along W, else along C
  int x_bytes, weight_bytes;  // size of one access
  int wide_shift;             // the tile's warps: 2^wide_shift side by side, the others below
  int64_t first_image;        // this launch begins here
  // A block is counted off along these extents, fastest first: chunks of outputs share their tile of x in L2.
  Divisor output_chunks, tiles_across, tiles_down;
};

// --- Places in shared memory -----------------------------------------------------------------------------
// Words are permuted within their rows so that the eight rows of an ldmatrix, and the lanes of a plain read, fall into
// different banks without padding.

// Rows of one chunk of channels, 64 bytes: two rows share the 32 banks.
template <class T>
__device__ constexpr int channel_word(int row, int word) {
  return (row * kChunkWords + (word ^ ((row >> 1) & 3))) * (kVectorBytes / static_cast<int>(sizeof(T)));
}

// Rows of one channel, all pixels of the tile: every row starts at bank 0. 16-bit rows are read by ldmatrix, eight
// channels at a time; wider ones by four channels of eight pairs of pixels.
template <class T>
__device__ constexpr int pixel_place(int channel, int pixel) {
  constexpr int V = kVectorBytes / static_cast<int>(sizeof(T));
  const int permute = sizeof(T) == 2 ? channel & 7 : (channel & 1) | (channel & 2) << 1;
  return channel * kPixels + ((pixel / V) ^ permute) * V + pixel % V;
}

// One word of shared memory from `valid` elements `step` apart, zeros behind them, in accesses of `bytes`.
template <int bytes, class T>
__device__ inline void load_pieces(SharedSpan<T> target, const T* source, int64_t step, int valid) {
  constexpr int V = kVectorBytes / static_cast<int>(sizeof(T));
  if constexpr (bytes >= static_cast<int>(sizeof(T)) && bytes >= 4) {
    constexpr int kPiece = bytes / static_cast<int>(sizeof(T));
#pragma unroll
    for (int e = 0; e < V; e += kPiece) {
      if (e < valid) {
        cp_async<bytes>(target + e, source + e * step);
      } else {
        shared_cast<typename WordOf<bytes>::type>(target + e)[0] = typename WordOf<bytes>::type{};
      }
    }
  } else if constexpr (bytes == static_cast<int>(sizeof(T))) {
    unsigned short bits[V];  // narrower than any asynchronous copy
#pragma unroll
    for (int e = 0; e < V; ++e)
      bits[e] = e < valid ? __ldg(reinterpret_cast<const unsigned short*>(source + e * step)) : 0;
    uint4 word;
    memcpy(&word, bits, sizeof(word));
    shared_cast<uint4>(target)[0] = word;
  }
}
template <class T>
__device__ inline void load_word(SharedSpan<T> target, const T* source, int64_t step, int valid, int bytes) {
  if (bytes == 16) return load_pieces<16>(target, source, step, valid);
  if (bytes == 8) return load_pieces<8>(target, source, step, valid);
  if (bytes == 4) return load_pieces<4>(target, source, step, valid);
  load_pieces<2>(target, source, step, valid);
}

}  // namespace wavemix::reduce_haar
