// A Waveblock's 1x1 convolution with all its Haar levels, of bf16 by matrix units, forward. Compiled once per
// instruction set, for those that can have such units.
//
// The first level goes into the weights: four pixels of C channels times (4C x 4O) are the four bands, in the order in
// which they are stored. That is four times the products, which cost less here than the pass that they save, and the
// bands are sums in float, rounded once. Weights are halved and change signs, so bf16 holds them exactly.

#include "cpu/reduce_haar/matrix_units.h"

#include "cpu/choose.h"
#include "cpu/common/products.h"
#include "cpu/reduce_haar/few_channels.h"
#include "cpu/reduce_haar/strips.h"

namespace wavemix {
namespace WAVEMIX_ISA {

#if WAVEMIX_MATRIX_UNITS
namespace {

constexpr int64_t kElement = sizeof(bf16);
constexpr int kTaps = 4;  // the pixels of a 2x2 block

struct PackedWeights {
  int64_t depth, bands;  // tiles of a pixel's channels; columns
  Buffer<float> memory;
  bf16* data;
  PackedWeights(const ReduceHaarArgs& args, int threads)
      : depth((args.c + kTileDepth - 1) / kTileDepth),
        bands(4 * args.o),
        memory(kTaps * depth * kTileDepth * padded<float>(bands) / 2),
        data(reinterpret_cast<bf16*>(memory.data)) {
    const bf16* weight = static_cast<const bf16*>(args.weight);
    // For each pixel, half of the weights by rows of all bands, and the signs of its bands.
    const Buffer<float> of_rows(kTaps * args.c * bands / 2), of_signs(kTaps * bands / 2);
    bf16* const rows = reinterpret_cast<bf16*>(of_rows.data);
    uint16_t* const signs = reinterpret_cast<uint16_t*>(of_signs.data);
    for (int p = 0; p < kTaps; ++p)
      for (int64_t j = 0; j < bands; ++j) {
        const int band = j < args.o ? 0 : static_cast<int>((j - args.o) % 3) + 1;  // LL, LH, HL, HH
        const bool minus = ((band & 1) & (p >> 1)) ^ ((band >> 1) & (p & 1));
        signs[p * bands + j] = minus ? 0x8000 : 0;
      }
    WAVEMIX_PARALLEL(threads) {
      WAVEMIX_FOR
      for (int64_t k = 0; k < args.c; ++k) {
        bf16* const low = rows + k * bands;
        bf16* const high = low + args.o;
        for (int64_t o = 0; o < args.o; ++o) {
          store(low[o], 0.5f * load(weight[o * args.weight_stride[0] + k * args.weight_stride[1]]));
          for (int64_t band = 0; band < 3; ++band) high[3 * o + band] = low[o];
        }
        for (int64_t p = 1; p < kTaps; ++p)
          for (int64_t j = 0; j < bands; ++j)
            rows[(p * args.c + k) * bands + j].bits = low[j].bits ^ signs[p * bands + j];
      }
      WAVEMIX_FOR
      for (int64_t j = 0; j < bands; j += kTileColumns)
        for (int64_t p = 0; p < kTaps; ++p)
          for (int64_t d = 0; d < depth; ++d)
            pack_tile(rows + (p * args.c + d * kTileDepth) * bands + j, bands, 1, args.c - d * kTileDepth, bands - j,
                      data + ((j / kTileColumns * kTaps + p) * depth + d) * kTile);
    }
  }
};

void advise_pyramid(const ReduceHaarArgs& args) {
  for (int l = 0; l < args.levels; ++l)
    advise<3>(args.z[l].data, {args.z[l].stride[0], args.z[l].stride[2], args.z[l].stride[3]},
              {args.n, args.h >> (l + 1), args.w >> (l + 1)}, kElement);
}

struct Biases : ZeroBuffer<float> {
  Biases(const ReduceHaarArgs& args, int64_t columns) : ZeroBuffer<float>(padded<float>(columns)) {
    if (args.bias != nullptr) load_row(static_cast<const bf16*>(args.bias), args.bias_stride, args.o, data);
  }
};

// Some pixels of a row as a left operand's rows, `wide` apart, copied or, if an image's pixels are contiguous, turned.
void fetch(const ReduceHaarArgs& args, const bf16* from, int64_t pixels, bf16* to, int64_t wide) {
  if (!pixels_inner(args)) return copy_rows(from, args.x.stride[3], pixels, args.c, to, wide);
  const auto channel = [&](int64_t c, int64_t p) {
    if (c >= args.c) return _mm256_setzero_si256();
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes(pixels - p)), from + c * args.x.stride[1] + p);
  };
  transpose_rows(wide, pixels, channel, to, wide);
}

// Many channels: the product, then the Haar levels, while a strip lies in the cache.
void product_first(const ReduceHaarArgs& args, int threads) {
  const Strips strips(args);
  advise_pyramid(args);
  const RightOperand<bf16, float> weights(args.c, args.o, static_cast<const bf16*>(args.weight), args.weight_stride[1],
                                          args.weight_stride[0], threads);
  const Biases offset(args, args.o);
  const int64_t wide = round_up(args.c, kTileDepth), apart = args.x.stride[3];
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(true);
    const ZeroBuffer<float> memory(round_up(strips.pixels, kTileRows) * wide / 2), reduced(strips.pixels * args.o / 2);
    bf16* const block = reinterpret_cast<bf16*>(memory.data);
    bf16* const r = reinterpret_cast<bf16*>(reduced.data);
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      const bool joined = args.x.stride[2] == s.columns * apart;  // rows of pixels are one
      const int64_t count = joined ? 1 : s.rows, pixels = s.rows * s.columns / count;
      for (int64_t row = 0; row < count; ++row) {
        const bf16* from = pixel<const bf16>(args.x, s, row);
        Left left = {from, apart, wide / kTileDepth};
        // A tile reads 16 pixels: behind the image's last ones there may be nothing.
        if (args.c != wide || pixels % kTileRows != 0 || pixels_inner(args)) {
          fetch(args, from, pixels, block, wide);
          left = {block, wide, wide / kTileDepth};
        }
        product_by_blocks(round_up(pixels, kTileRows), padded<float>(args.o), left, weights.tiles(), offset.data,
                          stores_rounded(r + row * pixels * args.o, pixels, args.o, args.o));
      }
      haar_analysis(haar_of(args, s, 1, {r, {0, 1, s.columns * args.o, args.o}}, kElement), 1);
    }
  }
}

// Few channels: the first level is a part of the product.
void level_in_weights(const ReduceHaarArgs& args, int threads) {
  const Strips strips(args);
  advise_pyramid(args);
  const PackedWeights weights(args, threads);
  const Biases offset(args, weights.bands);
  for (int64_t j = 0; j < args.o; ++j) offset.data[j] *= 2;  // of four pixels, halved; the other bands take it away
  const int64_t wide = weights.depth * kTileDepth, apart = args.x.stride[3], down = args.x.stride[2];
  const Plane& z = args.z[0];
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(true);
    const int64_t pitch = round_up(strips.columns, 2 * kTileRows) * wide;
    const ZeroBuffer<float> memory(pitch);
    bf16* const block = reinterpret_cast<bf16*>(memory.data);
    WAVEMIX_FOR
    for (int64_t i = 0; i < strips.count; ++i) {
      const Strip s = strips.get(args, i);
      const int64_t across = s.columns / 2;
      bf16* const to =
          static_cast<bf16*>(z.data) + s.n * z.stride[0] + s.row / 2 * z.stride[2] + s.column / 2 * z.stride[3];
      for (int64_t row = 0; row < s.rows; row += 2) {
        const bf16* from = pixel<const bf16>(args.x, s, row);
        // Tiles read 16 blocks each: what is behind the last ones has to lie in the image.
        const int64_t end = (s.row + row + 1) * down + (s.column + 2 * round_up(across, kTileRows) - 1) * apart;
        const bool inside = end <= (args.h - 1) * down + (args.w - 1) * apart;
        Left left = {from, 2 * apart, weights.depth, kTaps, {0, apart, down, down + apart}};
        if (args.c != wide || !inside || pixels_inner(args)) {
          for (int64_t r = 0; r < 2; ++r) fetch(args, from + r * down, s.columns, block + r * pitch, wide);
          left = {block, 2 * wide, weights.depth, kTaps, {0, wide, pitch, pitch + wide}};
        }
        product_by_blocks(round_up(across, kTileRows), padded<float>(weights.bands), left, weights.data, offset.data,
                          stores_rounded(to + row / 2 * z.stride[2], across, weights.bands, z.stride[3]));
      }
      if (args.levels > 1) haar_analysis(haar_of(args, s, 2, {to, {0, 1, z.stride[2], z.stride[3]}}, kElement), 1);
    }
  }
}

}  // namespace

void reduce_haar_matrix_units(const ReduceHaarArgs& args, int threads) {
  threads = threads_for(args, threads);
  if (choose::level_in_weights(args)) return level_in_weights(args, threads);
  product_first(args, threads);
}
#else
void reduce_haar_matrix_units(const ReduceHaarArgs&, int) {}  // choose.h: never called
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
