// The weight's gradient of the transposed convolution 4x4, stride 2, of bf16 by matrix units. Compiled once per
// instruction set, for those that can have such units.
//
// For each tap it is a product over pixels, u's channels times those of one phase of the output's gradient. With a
// pixel of zeros around u, whose rows follow each other, all four taps of a phase read the same transposed u, each from
// another pixel on.

#include "cpu/common/products.h"
#include "cpu/deconv/matrix_units.h"

namespace wavemix {
namespace WAVEMIX_ISA {

#if WAVEMIX_MATRIX_UNITS
namespace {

// Pixels at a time, where an image's rows are no longer: sums are in memory, and are read once for so many products.
constexpr int64_t kPixels = 384;

__m256i channels_of(const Plane& image, int64_t n, int64_t row, int64_t column, int64_t first, int64_t channels) {
  const bf16* at = static_cast<const bf16*>(image.data) + n * image.stride[0] + row * image.stride[2] +
                   column * image.stride[3] + first;
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes(channels - first)), at);
}

// Rows of an image, between two others.
struct Strip {
  int64_t n, top, rows;
};

// Place p is column p % pitch - 1 of the strip's row p / pitch - 1; around the image are zeros.
void turn_u(const DeconvArgs& args, const Strip& s, int64_t pitch, int64_t f, bf16* out, int64_t apart) {
  const auto from = [&](int64_t p, int64_t j) {
    const int64_t r = s.top + p / pitch - 1, c = p % pitch - 1;
    const bool inside = r >= 0 && r < args.h && r <= s.top + s.rows && c >= 0 && c < args.w;
    return inside ? channels_of(args.u, s.n, r, c, j, args.f) : _mm256_setzero_si256();
  };
  transpose_rows(apart, f, from, out, apart);
}
// Place p is column p % pitch of row p / pitch, of a phase's; behind each row are zeros.
void pair_gradient(const DeconvArgs& args, const Strip& s, int phase, int64_t pitch, int64_t places, int64_t o,
                   bf16* out) {
  const auto from = [&](int64_t p, int64_t j) {
    const int64_t r = p / pitch, c = p % pitch;
    if (r >= s.rows || c >= args.w) return _mm256_setzero_si256();
    return channels_of(args.y, s.n, 2 * (s.top + r) + phase / 2, 2 * c + phase % 2, j, args.o);
  };
  pair_rows(places, o, from, out);
}

// The products of a phase: the next tap finds in L1 what one has read.
void add_taps(int64_t f, int64_t o, const Left& u, int64_t pitch, const bf16* gradient, float* sums) {
  const int64_t b_apart = u.depth * kTile;
  for (int64_t j = 0; j < o; j += kBlock)
    for (int64_t i = 0; i < f; i += kBlock)
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const Left left = {u.data + tap / 2 * pitch + tap % 2, u.apart, u.depth};
        float* const at = sums + (tap * f + i) * o + j;
        block_product(left, i, f - i, o - j, gradient + j / kTileColumns * b_apart, b_apart, at, o, at, o);
      }
}

// Sums of channels k and k + 1 of u, as the weight has them.
void finish(const DeconvArgs& args, const float* sums, int64_t shares, int64_t f, int64_t o, int64_t k, bf16* out) {
  for (int64_t j = 0; j < args.o; j += 16) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) {
      __m512 value[2];  // of columns kx and kx + 1, one of each phase
      for (int side = 0; side < 2; ++side) {
        const int place = place_of_tap(i % 8 / 2, i % 2 * 2 + side);
        const float* from = sums + (place * f + k + i / 8) * o + j;
        value[side] = _mm512_loadu_ps(from);
        for (int64_t t = 1; t < shares; ++t)
          value[side] = _mm512_add_ps(value[side], _mm512_loadu_ps(from + t * kPhases * kTaps * f * o));
      }
      pairs[i] = interleave(value[0], value[1]);
    }
    alignas(64) bf16 taps[16 * 32];
    store_transposed(pairs, taps, 32);
    for (int64_t l = 0; l < 16 && j + l < args.o; ++l)
      for (int64_t i = 0; i < 2 && k + i < args.f; ++i)
        std::memcpy(out + ((k + i) * args.o + j + l) * 16, taps + l * 32 + i * 16, 16 * sizeof(bf16));
  }
}

}  // namespace

void deconv_matrix_units_backward_weight(const DeconvArgs& args, void* d_weight, int threads) {
  threads = args.n * args.h * args.w * args.f < kSerialElements / 4 ? 1 : threads;
  const int64_t f = round_up(args.f, kTileRows), o = round_up(args.o, kTileColumns);
  const int64_t pitch = args.w + 1, most = kPixels / pitch > 0 ? kPixels / pitch : 1;
  const int64_t rows = most < args.h ? most : args.h, down = rows > 0 ? (args.h + rows - 1) / rows : 0;
  const int64_t places = round_up(rows * pitch, kTileDepth);           // of a phase's gradient
  const int64_t apart = round_up(places + 2 * pitch + 2, kTileDepth);  // of u, with what is around
  // Threads have phases of their own, whose sums then fit their caches, and beyond four of them shares of the strips.
  const int64_t groups = threads < kPhases ? threads : kPhases, shares = threads / kPhases > 1 ? threads / kPhases : 1;
  const int64_t strips = args.n * down, of_phase = kTaps * f * o;
  const Scratch memory(shares * kPhases * of_phase * static_cast<int64_t>(sizeof(float)));
  float* const sums = reinterpret_cast<float*>(memory.block);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(true);
    const Buffer<float> of_u(f * apart / 2), of_y(places * o / 2);
    bf16* const turned = reinterpret_cast<bf16*>(of_u.data);
    bf16* const paired = reinterpret_cast<bf16*>(of_y.data);
    WAVEMIX_FOR
    for (int64_t item = 0; item < shares * groups; ++item) {
      const int64_t share = item / groups, group = item % groups;
      const int64_t first = group * kPhases / groups, last = (group + 1) * kPhases / groups;
      float* const sum = sums + share * kPhases * of_phase;
      std::memset(sum + first * of_phase, 0, static_cast<size_t>((last - first) * of_phase) * sizeof(float));
      for (int64_t i = strips * share / shares; i < strips * (share + 1) / shares; ++i) {
        const int64_t top = i % down * rows;
        const Strip s = {i / down, top, args.h - top < rows ? args.h - top : rows};
        const int64_t deep = round_up(s.rows * pitch, kTileDepth);
        turn_u(args, s, pitch, f, turned, apart);
        for (int64_t phase = first; phase < last; ++phase) {
          pair_gradient(args, s, static_cast<int>(phase), pitch, deep, o, paired);
          add_taps(f, o, {turned + phase / 2 * pitch + phase % 2, apart, deep / kTileDepth}, pitch, paired,
                   sum + phase * of_phase);
        }
      }
    }
    WAVEMIX_FOR
    for (int64_t k = 0; k < args.f; k += 2) finish(args, sums, shares, f, o, k, static_cast<bf16*>(d_weight));
  }
}
#else
void deconv_matrix_units_backward_weight(const DeconvArgs&, void*, int) {}  // choose.h: never called
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
