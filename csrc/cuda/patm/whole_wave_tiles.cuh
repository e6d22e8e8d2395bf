// Shared memory of the waves' gradients: weights, taps and constants of the block's branch, tiles of x and of the
// gradient, windows of d, and cells.
//
// Each output of a pair of channels has a line of 16-byte words, the windows of d. Word b has eight places, which begin
// four before place 4 b, and so overlaps the next word. A cell has 16 bytes of a pair and place.
#pragma once

#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole {

template <int C>
constexpr int kBlocks = C == 64 ? 2 : 1;
constexpr int kStretch = 64;            // places of a step
constexpr int kEarly = 4;               // places by which d begins after x
constexpr int kWindows = kStretch / 4;  // and words of a line: two more
constexpr int kLine = kWindows + 2;     // words of 16 bytes; eight bytes of four lines fill the banks
constexpr int kCells = kStretch + 2;    // of a pair; two pairs of neighbouring cells fill the banks
constexpr int kOfWarp = 4;              // pairs

// C floats each, of input channels, from kWeight on of outputs. kMap: of a pair two scales and two shifts.
enum Constant { kMap, kZBias = 2, kCenter, kWeight, kThirdWeight, kMean, kConstants };
template <class T, int C>
struct WavePlaces {
  // z, theta and proj's columns; wide images leave theta to the caches.
  static constexpr bool kThetaStays = C == 64;
  static constexpr int kProj = kThetaStays ? 2 * C * C : C * C;
  // In elements.
  static constexpr int kX = kProj + C * C, kGrad = kX + kStretch * C, kLines = kGrad + kStretch * C;
  static constexpr int kCellsAt = kLines + C * kLine * kWord, kFloats = kCellsAt + C / 2 * kCells * kWord;
  // In floats.
  static constexpr int kTapsAt = kConstants * C, kBand = 2 * (kPhaseTaps + 5);
  static constexpr int kThirdsAt = kTapsAt + 2 * kBand * C;
  static constexpr size_t kBytes = size_t{2} * kFloats + size_t{4} * (kThirdsAt + 2 * C);
  static_assert(C * 128 <= C / 2 * kCells * 4, "the taps' gradient fits the cells at the end");
};

struct WaveParams : LineParams {
  const float *d_mean, *center;
  void* gradients;  // (n, h, w, 5, C)
  float* partial;   // (2, n, parts, kSums, C)
};

// The cell of place 4 window + i: four neighbours of two pairs, or eight neighbours, lie in different banks.
__device__ constexpr int cell(int window, int i) { return 4 * window + (i ^ (window >> 1 & 3)); }

// The pointer, but the compiler does not know how it came to be, so it does not make it again and again.
template <class T>
__device__ inline T* kept(T* pointer) {
  return reinterpret_cast<T*>(here(reinterpret_cast<int64_t>(pointer)));
}

// Where a thread stands; computed anew in each phase, since kept for all it would take registers.
template <int C>
struct Thread {
  uint32_t number = this_thread();
  int lane = static_cast<int>(number % 32), warp = static_cast<int>(number / 32);
  int group = static_cast<int>(number % 32 / 4), member = static_cast<int>(number % 4);
  int of_eight = static_cast<int>(number % 8), of_sixteen = static_cast<int>(number % 16);
  int eighth = static_cast<int>(number / 8 % 2), sixteenth = static_cast<int>(number / 16 % 2);
  // The warp's part of products: 16 channels, and the first of 32 places.
  int chunk = static_cast<int>(number / 32 % (C / kStep));
  int first = static_cast<int>(number / 32 / (C / kStep) * (2 * kStep));

  __device__ int channel() const { return 16 * chunk + 2 * group; }  // and the next
  __device__ int pair() const { return 8 * chunk + group; }          // outputs: this and the one C / 2 above
  // The element of a matrix's row that this thread hands to ldmatrix: of 16 rows, of two tiles of eight columns.
  __device__ int of_rows() const { return place<C>(of_sixteen, sixteenth); }
  __device__ int of_columns() const { return place<C>(sixteenth * 8 + of_eight, eighth); }
};

template <class T, int C>
struct WaveTiles {
  using P = WavePlaces<T, C>;
  static constexpr int kThreads = kLineThreads<C>, kOfRow = C / kWord;
  static_assert(kThreads / kOfRow == 32 && C / 2 == kThreads / 32 * kOfWarp, "the warps share rows and pairs evenly");
  const WaveParams& p;
  const LinePart& own;
  SharedSpan<T> memory;
  SharedSpan<float> floats;
  Lines lines;  // of the branch, and strides in elements and in pixels
  int64_t x_place, x_line, grad_place, grad_line;
  int pixel_place, pixel_line;
  const T *image, *grad_of_image;
  T* gradients;  // of this image, z's of the branch

  __device__ SharedSpan<T> x() const { return memory + P::kX; }
  __device__ SharedSpan<T> grad() const { return memory + P::kGrad; }
  __device__ SharedSpan<float> constants(int which) const { return floats + which * C; }
  // Word `at` of a line, of output pair + half C / 2.
  __device__ SharedSpan<T> word(int pair, int half, int at) const {
    return memory + (P::kLines + ((half * (C / 2) + pair) * kLine + at) * kWord);
  }
  __device__ SharedSpan<float4> cells(int pair) const {
    return shared_cast<float4>(memory + (P::kCellsAt + pair * kCells * kWord));
  }

  // Sums of the third branch's gradient, of a group of warps and an output pair.
  __device__ SharedSpan<float2> thirds(int first, int pair) const {
    return shared_cast<float2>(floats + (P::kThirdsAt + first / (2 * kStep) * C)) + pair;
  }

  // Whether there is a pixel at a place, and where: its place of a line, and the line.
  __device__ bool find(int at_place, int& at, int& line) const {
    uint32_t value = static_cast<uint32_t>(at_place < 0 ? lines.length : at_place);
    at = static_cast<int>(lines.pitch.take(value));
    line = static_cast<int>(value);
    return (at < lines.length) & (line < lines.count);
  }
  // A tile's rows, zeros where there is no pixel.
  __device__ void copy(const T* source, int64_t of_place, int64_t of_line, int from, SharedSpan<T> to) const {
    const uint32_t thread = this_thread();
    const int row = static_cast<int>(thread / kOfRow), of_row = static_cast<int>(thread % kOfRow);
    const int place_of_row = (row & kStep) + pixel_of(row & (kStep - 1)), begin = place<C>(row, of_row);
#pragma unroll
    for (int i = 0; i < kStretch; i += 32) {
      int at, line;
      if (find(from + place_of_row + i, at, line)) {
        cp_async<16>(to + (begin + i * C), source + (at * of_place + line * of_line + of_row * kWord));
      } else {
        shared_cast<uint4>(to + (begin + i * C))[0] = uint4{};
      }
    }
  }
  __device__ void fetch(int tile) const {
    if (tile < own.end) {
      copy(grad_of_image, grad_place, grad_line, tile * kStretch + kEarly, grad());
      if (tile >= own.begin) copy(image, x_place, x_line, tile * kStretch, x());
    }
    cp_async_commit();
  }

  // Words of the band, in two parts: a tap and the one before it, of both channels of a pair; the last are zero.
  __device__ SharedSpan<uint2> band(int pair, int half) const {
    return shared_cast<uint2>(floats + (P::kTapsAt + (half * (C / 2) + pair) * (2 * P::kBand)));
  }
  __device__ void keep_taps() const {
    for (int i = static_cast<int>(threadIdx.x); i < C * P::kBand; i += kThreads) {
      const int output = i / P::kBand, at = i % P::kBand / 2;
      const float* const from = p.taps[own.branch] + (output * 2 + i % 2) * kPhaseTaps;
      const float tap[2] = {at < kPhaseTaps ? from[at] : 0.0f, at > 0 && at <= kPhaseTaps ? from[at - 1] : 0.0f};
      const Fragment high = packed<T>(tap[0], tap[1]);
      shared_cast<uint2>(floats + P::kTapsAt)[i] = uint2{high, rest(high, tap[0], tap[1])};
    }
  }
  // The second parts of two values: what rounding took from the first ones.
  __device__ static Fragment rest(Fragment high, float first, float second) {
    T elements[2];
    memcpy(static_cast<void*>(elements), &high, sizeof(high));
    return packed<T>(first - widen(elements[0]), second - widen(elements[1]));
  }

  __device__ void prepare() const {
    const LineBlock<T, C> block;
    block.keep_projection(p.z[own.branch], memory);
    if constexpr (P::kThetaStays) block.keep_projection(p.theta[own.branch], memory + C * C);
    block.keep_columns(p.proj, memory + P::kProj);
    keep_taps();
    const float path = p.path == nullptr ? 1.0f : p.path[own.n];
    for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
      const int branch = own.branch;
      const float scale = p.scale[branch][i], bias = value_or_zero<T>(p.theta_bias[branch], i);
      const float center = (p.center == nullptr ? 0.0f : p.center[branch * C + i]) - bias;
      constants(kZBias)[i] = value_or_zero<T>(p.z_bias[branch], i);
      constants(kCenter)[i] = center;
      constants(kMap)[i / 2 * 4 + i % 2] = scale;  // of theta less its center
      constants(kMap)[i / 2 * 4 + 2 + i % 2] = p.shift[branch][i] + (center + bias) * scale;
      constants(kWeight)[i] = path * p.a[(branch * p.n + own.n) * C + i];
      constants(kThirdWeight)[i] = path * p.a[(2 * p.n + own.n) * C + i];
      constants(kMean)[i] = p.d_mean[own.n * C + i];
      shared_cast<float2>(floats + P::kThirdsAt)[i] = float2{};
      shared_cast<uint4>(word(i, 0, kLine - 1))[0] = uint4{};  // its end is read, for taps that are zero
    }
  }

  __device__ T* gradients_of(int pixel) const { return gradients + static_cast<int64_t>(pixel) * (5 * C); }
};

}  // namespace wavemix::whole
