// Memory of a tile of reduce_haar's gradients: shared memory, the parameters of a launch, and which pixels of x and of
// Z a tile has.
#pragma once

#include <cstdint>

#include "cuda/common/mma.cuh"
#include "cuda/reduce_haar/words.cuh"
#include "wavemix/reduce_haar.h"

namespace wavemix::reduce_haar::gradients {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 64;  // of a tile
constexpr int kQuads = kPixels / 4;
constexpr int kTileLevels = 3;                // as many as 64 pixels in a square have
constexpr int kWord = kVectorBytes / 2;       // elements of 16 bytes
constexpr int kMostSize = 4;                  // a form of size S serves up to
constexpr int kOutputs = 16, kChannels = 64;  // S times so many

// A tile is made up of squares of 2^side pixels. Those of channels_last images have side 3 and all of a tile's levels.
// Where pixels are contiguous along W, tiles are as flat as two levels allow, 4x16, for runs of 32 bytes; a pixel of
// Z's coarser levels is then shared by two squares. Fewer levels have smaller squares: 16 quads in a row.
constexpr int most_side(bool along_w) { return along_w ? 2 : kTileLevels; }

// Pixels of Z lie level by level: 16, 4, and one or two of each coarser level.
__host__ __device__ constexpr int first_row(bool along_w, int level) {
  return level < 3 ? 16 * (level - 1) : along_w ? 14 + 2 * level : 17 + level;
}
constexpr int kMostRows = first_row(true, kMaxHaarLevels + 1);

// Blocks of a multiprocessor, as registers allow.
constexpr int most_blocks(int size) { return size == 1 ? 3 : size < 4 ? 2 : 1; }

// Shared memory. Rows are a word longer than their values, so that eight of them meet in no bank. Rows of x are
// channels where pixels are contiguous along W; they are 8 words long, and swizzled instead.
template <int S>
struct Places {
  static constexpr int kChannelRow = kChannels * S + kWord, kOutputRow = kOutputs * S + kWord;
  static constexpr int kZRow = 4 * kOutputs * S;
  static constexpr int kWeight = kOutputs * S * kChannelRow, kGradient = kPixels * kOutputRow;
  static constexpr int kX = kPixels * kChannelRow, kStage = kX + kMostRows * kZRow;
  static constexpr int kElements = kWeight + kGradient + 2 * kStage;
  // Behind them, with a BatchNorm: sums of d_x and the others of each channel, by quarter of a tile's pixels, in fp32.
  static constexpr int kOfSum = kChannels * S, kOfQuarter = 2 * kOfSum;
  static constexpr int bytes(bool norm) { return 2 * kElements + (norm ? 4 * kOfQuarter * 4 : 0); }
};

struct Params {
  const void *x, *weight, *add;
  void* d_x;
  const void* z[kMaxHaarLevels];
  float* sums;  // of each block: d_weight, d_bias, and the two of d_x
  int c, h, w, o, levels;
  int side_shift;                  // a tile is made up of squares of 2^side_shift pixels
  uint32_t squares;                // of the batch
  Divisor across, down;            // squares of an image
  int tiles_of_block, more_tiles;  // as many blocks have one more
  bool in_words;                   // along W: rows of an image are whole words
  Divisor sharing;                 // with a BatchNorm: pixels one after the other that share their values of `add`
  int size;                        // of one block's sums
  int z_row[kMaxHaarLevels];       // elements from a pixel of z to the next
  const void* y;                   // NormSumArgs'
  const float *mean, *invstd;
};

struct Square {
  int image, top, left;
};
__device__ inline Square square_of(const Params& p, uint32_t number) {
  const int left = static_cast<int>(p.across.take(number)), top = static_cast<int>(p.down.take(number));
  return {static_cast<int>(number), top, left};
}
__device__ inline uint32_t first_square(const Params& p, int tile) {
  return static_cast<uint32_t>(tile) << 2 * (kTileLevels - p.side_shift);
}

// Number of a tile's pixel i at a level (0: x) through all images of that level, in Z-order within squares; -1 behind
// the last image.
__device__ inline int pixel_of(const Params& p, int tile, int level, int i) {
  const int side = p.side_shift, bits = level < side ? side - level : 0, up = level > side ? level - side : 0;
  const uint32_t number = first_square(p, tile) + (static_cast<uint32_t>(up > 0 ? 2 * i : i) >> 2 * bits);
  if (number >= p.squares) return -1;
  const Square square = square_of(p, number);
  const int in = i & ((1 << 2 * bits) - 1);
  const int right = (in & 1) | (in >> 1 & 2) | (in >> 2 & 4), below = (in >> 1 & 1) | (in >> 2 & 2) | (in >> 3 & 4);
  const int y = ((square.top << bits) + below) >> up, x = ((square.left << bits) + right) >> up;
  return (square.image * (p.h >> level) + y) * (p.w >> level) + x;
}

// A tile along W as rows of words of eight pixels, which run across its squares: image, or -1 behind the last one, and
// pixel there of a word's pair `pair`.
struct Pixel {
  int image, number;
};
__device__ inline Pixel pixel_of_word(const Params& p, int tile, int word, int pair) {
  const int side = p.side_shift, shift = kTileLevels - side;  // 2^shift words in a row, and squares to a word
  const int square = ((word & ((1 << shift) - 1)) << shift) + (pair >> (side - 1));
  const uint32_t number = first_square(p, tile) + static_cast<uint32_t>(square);
  if (number >= p.squares) return {-1, 0};
  const Square at = square_of(p, number);
  const int y = (at.top << side) + (word >> shift), x = (at.left << side) + 2 * (pair & (side - 1));
  return {at.image, y * p.w + x};
}

// The row of the gradient of the reduced image that has pixel i of a tile's words. Both the pixels 8 m and on and, for
// any t, the pixels 8 m + 2 t and 8 m + 2 t + 1 of 32 lie in rows that meet in no bank.
__device__ inline int row_of(int i) { return (i & ~6) | (((i >> 1) + (i >> 3)) & 3) << 1; }

// The place of a word in a channel's row. A quarter of a warp reads one word of eight channels, or writes four of two.
__device__ inline int word_place(int channel, int word) { return word ^ ((channel >> 1 & 3) | (channel & 1) << 2); }

}  // namespace wavemix::reduce_haar::gradients
