// The transposed convolution 4x4, stride 2, of bf16 by matrix units, forward. Compiled once per instruction set, for
// those that can have such units.
//
// Outputs of one parity of rows and columns are a 2x2 convolution of u. Rows of u lie in a thread's cache with a pixel
// of zeros around, so the left operand of each of the four taps is the same memory, read from another place on:
// nothing is copied for a tap. Minimal filtering would save products and round its sums to bf16; these are cheap here.

#include "cpu/deconv/matrix_units.h"

#include "cpu/common/products.h"
#include "cpu/deconv/statistics.h"

namespace wavemix {
namespace WAVEMIX_ISA {

#if WAVEMIX_MATRIX_UNITS
namespace {

// Pixels at a time, where an image's rows are no longer: enough to use each tile of the weights four times.
constexpr int64_t kPixels = 256;

// Weights as right operands: for each phase the tiles of a column, tap after tap.
struct PackedWeights {
  int64_t depth, columns, of_phase;  // in tiles, but the last
  Buffer<float> memory;
  bf16* data;
  PackedWeights(const DeconvArgs& args, int threads)
      : depth((args.f + kTileDepth - 1) / kTileDepth),
        columns((args.o + kTileColumns - 1) / kTileColumns),
        of_phase(columns * kTaps * depth * kTile),
        memory(kPhases * of_phase / 2),
        data(reinterpret_cast<bf16*>(memory.data)) {
    const bf16* weight = static_cast<const bf16*>(args.weight);
    WAVEMIX_PARALLEL(threads) {
      WAVEMIX_FOR
      for (int64_t i = 0; i < columns * depth; ++i) pack(args, weight, i / depth, i % depth);
    }
  }
  // Tiles of 32 input and 16 output channels, for all taps. Two taps of a row are one 32-bit word of the weights, and
  // belong to two phases.
  void pack(const DeconvArgs& args, const bf16* weight, int64_t column, int64_t part) const {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_slli_epi32(count, 4);
    const int64_t j = column * kTileColumns;
    const __mmask16 mask = static_cast<__mmask16>(lanes(args.o - j));
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t k = 0; k < kTileDepth; k += 2) {
      const int64_t f = part * kTileDepth + k;
      for (int word = 0; word < 8; ++word) {
        const auto row = [&](int64_t of) {
          const __m512i zero = _mm512_setzero_si512();
          if (of >= args.f) return zero;
          return _mm512_mask_i32gather_epi32(zero, mask, places, weight + (of * args.o + j) * 16 + 2 * word, 2);
        };
        const __m512i first = row(f), second = row(f + 1);
        const __m512i even = _mm512_or_si512(_mm512_andnot_si512(upper, first), _mm512_slli_epi32(second, 16));
        const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(upper, second));
        _mm512_storeu_si512(at(word / 2, 2 * (word % 2), column, part) + k * kTileColumns, even);
        _mm512_storeu_si512(at(word / 2, 2 * (word % 2) + 1, column, part) + k * kTileColumns, odd);
      }
    }
  }
  bf16* at(int ky, int kx, int64_t column, int64_t part) const {
    const int place = place_of_tap(ky, kx);
    return data + place / kTaps * of_phase + ((column * kTaps + place % kTaps) * depth + part) * kTile;
  }
};

// Rows of an image.
struct Strip {
  int64_t n, row, rows;
};

}  // namespace

void deconv_matrix_units_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  if (args.n * args.h * args.w == 0) {
    if (mean != nullptr) Statistics<float>::finish(args.o, nullptr, 0, mean, var);
    return;
  }
  threads = args.n * args.h * args.w * args.f < kSerialElements / 4 ? 1 : threads;
  advise<3>(args.y.data, {args.y.stride[0], args.y.stride[2], args.y.stride[3]}, {args.n, 2 * args.h, 2 * args.w},
            int64_t{sizeof(bf16)});
  const PackedWeights weights(args, threads);
  const int64_t wide = weights.depth * kTileDepth, o = weights.columns * kTileColumns;
  const ZeroBuffer<float> offset(o);
  if (bias != nullptr) load_row(static_cast<const bf16*>(bias), 1, args.o, offset.data);
  // A pixel of zeros between two rows of u is a border of both. Results there are garbage, never read.
  const int64_t pitch = args.w + 1, most = kPixels / pitch > 0 ? kPixels / pitch : 1;
  const int64_t shares = (args.h * args.n + threads - 1) / threads, high = most < args.h ? most : args.h;
  const int64_t rows_at_once = high < shares ? high : shares, down = (args.h + rows_at_once - 1) / rows_at_once;
  const int64_t places = round_up(rows_at_once * pitch, kTileRows);
  const int64_t line = Statistics<float>::line(args.o);
  const ZeroBuffer<double> of_thread(mean == nullptr ? 0 : threads * line);
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(true);
    const ZeroBuffer<float> memory((places + 2 * pitch + 2) * wide / 2);
    bf16* const image = reinterpret_cast<bf16*>(memory.data);
    Statistics<float> statistics(mean == nullptr ? 0 : args.o, mean == nullptr ? 0 : o);
    const Buffer<double> part(mean == nullptr ? 0 : 2 * args.o);
    WAVEMIX_FOR
    for (int64_t i = 0; i < args.n * down; ++i) {
      const int64_t row = i % down * rows_at_once;
      const Strip s = {i / down, row, args.h - row < rows_at_once ? args.h - row : rows_at_once};
      for (int64_t r = -1; r <= s.rows; ++r) {
        bf16* to = image + ((r + 1) * pitch + 1) * wide;
        if (s.row + r < 0 || s.row + r >= args.h) {
          std::memset(to, 0, static_cast<size_t>(args.w * wide) * sizeof(bf16));
        } else {
          const bf16* from =
              static_cast<const bf16*>(args.u.data) + s.n * args.u.stride[0] + (s.row + r) * args.u.stride[2];
          copy_rows(from, args.u.stride[3], args.w, args.f, to, wide);
        }
      }
      const int64_t whole = round_up(s.rows * pitch, kTileRows);
      for (int phase = 0; phase < kPhases; ++phase) {
        const int py = phase / 2, px = phase % 2;
        Left left = {image, wide, weights.depth, kTaps};
        for (int tap = 0; tap < kTaps; ++tap) left.shift[tap] = ((tap / 2 + py) * pitch + tap % 2 + px) * wide;
        const auto place = [&](const Plane& plane, int64_t r, int64_t c) {
          return static_cast<bf16*>(plane.data) + s.n * plane.stride[0] + (2 * (s.row + r) + py) * plane.stride[2] +
                 (2 * c + px) * plane.stride[3];
        };
        const auto finish = [&](int64_t first, int64_t j, const float* values) {
          const uint32_t mask = lanes(args.o - j);
          float* const sums = statistics.lanes.data + j;
          if (mean != nullptr && statistics.count == 0 && phase == 0 && first == 0)
            std::memcpy(sums, values, sizeof(float) * static_cast<size_t>(o - j < kBlock ? o - j : kBlock));
          const bool two = o - j > kTileColumns;
          __m512 center[2] = {}, sum[2] = {}, squares[2] = {};
          for (int k = 0; mean != nullptr && k <= two; ++k) center[k] = _mm512_loadu_ps(sums + 16 * k);
          int64_t r = first / pitch, c = first % pitch;
          for (int64_t p = 0; p < kBlock && r < s.rows; ++p, ++c) {
            if (c == pitch) {
              c = 0;
              ++r;
            }
            if (c >= args.w || r >= s.rows) continue;
            __m512 pair[2] = {_mm512_loadu_ps(values + p * kBlock), _mm512_loadu_ps(values + p * kBlock + 16)};
            if (mean != nullptr)
              for (int k = 0; k < 2; ++k) {
                const __m512 off = _mm512_sub_ps(pair[k], center[k]);
                sum[k] = _mm512_add_ps(sum[k], off);
                squares[k] = _mm512_fmadd_ps(off, off, squares[k]);
              }
            if (args.residual.data != nullptr) {
              const __m512i added = _mm512_maskz_loadu_epi16(mask, place(args.residual, r, c) + j);
              pair[0] = _mm512_add_ps(pair[0], widen(_mm512_castsi512_si256(added)));
              pair[1] = _mm512_add_ps(pair[1], widen(_mm512_extracti64x4_epi64(added, 1)));
            }
            _mm512_mask_storeu_epi16(place(args.y, r, c) + j, mask, narrow(pair[0], pair[1]));
          }
          for (int k = 0; mean != nullptr && k <= two; ++k) {
            float* const at = sums + 16 * k;
            _mm512_storeu_ps(at + o, _mm512_add_ps(_mm512_loadu_ps(at + o), sum[k]));
            _mm512_storeu_ps(at + 2 * o, _mm512_add_ps(_mm512_loadu_ps(at + 2 * o), squares[k]));
          }
        };
        product_by_blocks(whole, o, left, weights.data + phase * weights.of_phase, offset.data, finish);
      }
      if (mean != nullptr) statistics.finish_part(static_cast<double>(4 * s.rows * args.w), args.o, part.data);
    }
    if (mean != nullptr) statistics.save(of_thread.data + WAVEMIX_THREAD * line);
  }
  if (mean != nullptr) Statistics<float>::finish(args.o, of_thread.data, threads, mean, var);
}
#else
void deconv_matrix_units_forward(const DeconvArgs&, const void*, void*, void*, int) {}  // choose.h: never called
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
