// Shared memory of PATM's mixing kernel: weights, taps and constants, a ring of rows of x, lines of waves, and the
// weighted sum.
#pragma once

#include "cuda/patm/whole.cuh"

namespace wavemix::whole {

// Matrices, those first that stay in shared memory; the others' fragments come from the caches.
enum StripMatrix { kProj, kZ, kTheta = kZ + 2, kZc = kTheta + 2, kMatrices };

// kGroups: of 16 columns; kOfWarp: of these, a warp's, which share what it reads of weights and taps.
template <int C_, int kGroups_, int kOfWarp_, int kResident_>
struct Strip {
  static constexpr int C = C_, kGroups = kGroups_, kOfWarp = kOfWarp_, kResident = kResident_;
  static constexpr int kChunks = C / kStep, kColumns = kGroups * kStep, kThreads = 32 * kChunks * kGroups / kOfWarp;
  static constexpr int kMargin = 4;               // columns beyond an end, whole words of 16 bytes
  static constexpr int kLine = kColumns + kStep;  // words: an odd multiple of 16, eight groups fill the banks evenly
  static constexpr int kRing = kReach + 1;        // rows of x, a power of two
  // In elements of a half type; a row has the pixels beyond the ends behind its own.
  static constexpr int kWeights = kResident * C * C, kRow = (kColumns + 2 * kMargin) * C;
  static constexpr int kMixedAt = kWeights + kRing * kRow, kLinesAt = kMixedAt + kColumns * C;
  static constexpr int kFloatsAt = kLinesAt + C * kLine * 2;
  // In floats.
  static constexpr int kTaps = 2 * C * 16, kConstants = 9 * C;
  static constexpr size_t kBytes = size_t{2} * kFloatsAt + size_t{4} * (kTaps + kConstants);
  static constexpr int kUnroll = C == 64 ? C / kStep : 2;
};

// The channel that row `row` of a matrix makes.
template <int C>
__device__ constexpr int channel_of(int which, int row) {
  return which == kZc ? output_of_row<C>(row) : channel_of_row(row);
}

struct StripParams {
  Image image;
  const void* matrix[kMatrices];
  const void *z_bias[2], *theta_bias[2], *z_c_bias, *proj_bias;  // along W, along H
  const float *scale[2], *shift[2], *taps[2];
  const float *a, *path;
  int64_t n, first_image;
  void* out;
  Strides x, to;           // of the image and of `out`
  int64_t channel_stride;  // of `out`
  bool along;              // neighbouring columns of `out` are a word of 8 bytes
  bool residual, halo;     // halo: strips have neighbours to the left and right
  int rows;                // of a strip
  Divisor across, down;
};

// Each C; of a branch: bias of z, scale, shift.
enum StripConstant { kThird = 0, kZcBias = 1, kProjBias = 2, kOfBranch = 3 };

template <class T, class S>
struct StripTiles {
  static constexpr int C = S::C, kWords = C / kWord, kOfWarp = S::kOfWarp;
  static_assert(S::kThreads * kOfWarp == S::kColumns * kWords, "threads share a row's words evenly");
  const StripParams& p;
  SharedSpan<T> memory;
  SharedSpan<float> floats;
  int64_t n;
  int x0, columns;  // this strip's, as far as the image goes
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4;
  int chunk = warp % S::kChunks, first_pixel = warp / S::kChunks * (kOfWarp * kStep);
  // The thread makes two channels, this and the next, at four columns of each group, in the first from this on.
  int channel = 16 * chunk + 2 * group, column = first_pixel + 4 * member;

  __device__ SharedSpan<T> matrix(int which) const { return memory + which * C * C; }
  __device__ static int row_at(int y) { return S::kWeights + (y & (S::kRing - 1)) * S::kRow; }
  __device__ SharedSpan<float> constants(int which) const { return floats + (S::kTaps + which * C); }
  __device__ float2 of_channels(int which) const { return shared_cast<float2>(constants(which) + channel)[0]; }
  // Words, each a pixel's pair of waves, from a place of this thread's line on.
  __device__ SharedSpan<T> line(int half, int at) const {
    return memory + (S::kLinesAt + ((half * (C / 2) + 8 * chunk + group) * S::kLine + at) * 2);
  }
  __device__ int output_channel(int half) const { return 8 * chunk + group + half * (C / 2); }

  __device__ void prepare() const {
    constexpr int kThreads = S::kThreads;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < C * C; i += kThreads) {
      const int row = i / C, k = i % C;
      matrix(kProj)[place<C>(row, k / kWord) + k % kWord] =
          static_cast<const T*>(p.matrix[kProj])[channel_of<C>(kProj, row) * C + output_at<C>(k)];
    }
#pragma unroll
    for (int which = kProj + 1; which < S::kResident; ++which)
      for (int i = thread; i < C * kWords; i += kThreads) {
        const int row = i / kWords, word = i % kWords;
        cp_async<16>(matrix(which) + place<C>(row, word),
                     static_cast<const T*>(p.matrix[which]) + channel_of<C>(which, row) * C + word * kWord);
      }
    const auto of_image = [&](int which, int output) { return p.a[(which * p.n + n) * C + output]; };
    // [branch][k / 4][output][k % 4], two channels' of 7, padded, times the branch's weight
    for (int i = thread; i < S::kTaps; i += kThreads) {
      const int branch = i / (16 * C), k = i / (4 * C) % 4 * 4 + i % 4, output = i / 4 % C;
      floats[i] = k < 2 * kPhaseTaps ? p.taps[branch][output * (2 * kPhaseTaps) + k] * of_image(branch, output) : 0.0f;
    }
    for (int i = thread; i < C; i += kThreads) {
      constants(kThird)[i] = of_image(2, i);
      constants(kZcBias)[i] = value_or_zero<T>(p.z_c_bias, i);
      constants(kProjBias)[i] = value_or_zero<T>(p.proj_bias, i);
      for (int branch = 0; branch < 2; ++branch) {
        const float scale = p.scale[branch][i];
        constants(kOfBranch + 3 * branch)[i] = value_or_zero<T>(p.z_bias[branch], i);
        constants(kOfBranch + 3 * branch + 1)[i] = scale;
        constants(kOfBranch + 3 * branch + 2)[i] =
            p.shift[branch][i] + value_or_zero<T>(p.theta_bias[branch], i) * scale;
      }
    }
    if (first_pixel == 0 && member < 2) {  // beyond the ends there is nothing, if there are no neighbours
#pragma unroll
      for (int half = 0; half < 2; ++half)
        shared_cast<uint4>(line(half, member * (S::kMargin + S::kColumns)))[0] = uint4{};
    }
  }

  // A pixel of row y of the image to the ring; zeros where x is outside.
  __device__ void copy(int y, int row, int x) const {
    const int word = static_cast<int>(threadIdx.x) % kWords;
    const SharedSpan<T> to = memory + (row_at(y) + place<C>(row, word));
    if (static_cast<unsigned>(x) < static_cast<unsigned>(p.image.w)) {
      cp_async<16>(to, static_cast<const T*>(p.image.x) + n * p.x.n + word * kWord + int64_t{y} * p.x.line[0] +
                           int64_t{x} * p.x.place[0]);
    } else {
      shared_cast<uint4>(to)[0] = uint4{};
    }
  }
  __device__ void fetch(int y, bool beyond) const {
    const int row = static_cast<int>(threadIdx.x) / kWords;
#pragma unroll
    for (int i = 0; i < S::kColumns; i += S::kThreads / kWords)
      copy(y, row + i, x0 + i + row / kStep * kStep + pixel_of(row % kStep));
    if (beyond && row < 2 * S::kMargin)
      copy(y, S::kColumns + row, x0 - S::kMargin + row + (row < S::kMargin ? 0 : S::kColumns));
  }

  // Channels 16 step .. 16 step + 15 of the warp's 16 rows of a matrix.
  template <int kWhich>
  __device__ void weights(int step, Fragment (&a)[4]) const {
    if constexpr (kWhich < S::kResident) {
      load_rows<C>(a, matrix(kWhich), chunk * kStep, step);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = chunk * kStep + group + k % 2 * 8;
        a[k] = __ldg(reinterpret_cast<const Fragment*>(static_cast<const T*>(p.matrix[kWhich]) +
                                                       channel_of<C>(kWhich, row) * C + step * kStep + k / 2 * 8 +
                                                       2 * member));
      }
    }
  }
  // Products of matrices with the warp's pixels of a tile, all from one read of these.
  using Products = float[kOfWarp][2][4];  // [group][two pixels][channel of the pair, pixel]
  template <int... kWhich, class... Sums>
  __device__ void multiply_pixels(int tile, std::integer_sequence<int, kWhich...>, Sums&... sums) const {
    const auto each = [](Products& d, const Fragment(&a)[4], const Fragment(&b)[kOfWarp][4]) {
#pragma unroll
      for (int w = 0; w < kOfWarp; ++w) multiply<T>(d[w], a, b[w]);
    };
    const int first = tile + place<C>(first_pixel + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll S::kUnroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[kOfWarp][4];
#pragma unroll
      for (int w = 0; w < kOfWarp; ++w) ldmatrix_x4<false>(b[w], memory + (moved<C>(first, step) + w * kStep * C));
      ((weights<kWhich>(step, a), each(sums, a, b)), ...);
    }
  }
  // The same with the eight pixels beyond the ends.
  template <int... kWhich, class... Sums>
  __device__ void multiply_beyond(int tile, std::integer_sequence<int, kWhich...>, Sums&... sums) const {
    const int first = tile + place<C>(S::kColumns + lane % 8, lane / 8);
#pragma unroll 1
    for (int step = 0; step < C / kStep; step += 2) {
      Fragment b[4];
      ldmatrix_x4<false>(b, memory + moved<C>(first, step));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Fragment pixels[2] = {b[2 * k], b[2 * k + 1]};
        Fragment a[4];
        ((weights<kWhich>(step + k, a), mma_m16n8k16<T>(sums, a, pixels)), ...);
      }
    }
  }
  __device__ void load_taps(int branch, int half, float (&tap)[16]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 quad = shared_cast<float4>(floats + ((branch * 4 + k) * C + output_channel(half)) * 4)[0];
      memcpy(tap + 4 * k, &quad, sizeof(quad));
    }
  }
};

}  // namespace wavemix::whole
