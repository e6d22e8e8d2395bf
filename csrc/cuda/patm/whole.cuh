// Shared by the kernels of the whole PATM (half types, channels_last): tiles of pixels in shared memory, their products
// with the projections' weights by tensor cores, and waves.
//
// A tile's rows are pixels of one image (or outputs of a weight), C elements each. Their words of 16 bytes are
// permuted, so that the eight rows of an ldmatrix lie in different banks without padding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/mma.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/patm/sincos.cuh"
#include "wavemix/patm_whole.h"

// Launches are cut so that no block number reaches this; the emulator's build lowers it to exercise the cutting.
#ifndef WAVEMIX_MAX_BLOCKS
#define WAVEMIX_MAX_BLOCKS ::wavemix::Divisor::kMaxDividend
#endif

namespace wavemix::whole {

constexpr int kReach = kPhaseTaps / 2;
constexpr int kStep = 16;  // channels of one mma
constexpr int kWord = 8;   // elements of 16 bytes
constexpr unsigned kWholeWarp = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// --- The image -------------------------------------------------------------------------------------------

struct Image {
  const void* x;
  int64_t stride[3];           // n, h, w; channels are contiguous, and every pixel starts at 16 bytes
  const float *scale, *shift;  // the image is x * scale + shift; null: x
  int64_t affine_stride;       // from one image's to the next: 0 or c
  int h, w;
  Divisor width;
};

inline Image image_of(const PatmArgs& args) {
  Image image = {};
  image.x = args.x.data;
  const int kept[3] = {0, 2, 3};
  for (int k = 0; k < 3; ++k) image.stride[k] = args.x.stride[kept[k]];
  image.scale = static_cast<const float*>(args.scale);
  image.shift = static_cast<const float*>(args.shift);
  image.affine_stride = args.by_image ? args.c : 0;
  image.h = static_cast<int>(args.h);
  image.w = static_cast<int>(args.w);
  image.width = Divisor(static_cast<uint32_t>(args.w));
  return image;
}

// A tensor's address in elements: of image n, then by place and line of a branch along W, along H.
struct Strides {
  int64_t n;
  int place[2], line[2];
};
inline Strides strides_of(const Plane& plane, const char* name) {
  for (int k : {2, 3})
    if (plane.stride[k] > INT32_MAX)
      throw std::invalid_argument(std::string(name) + ": got a stride of " + std::to_string(plane.stride[k]) +
                                  " elements from one pixel to the next; up to 2147483647 would work");
  const int h = static_cast<int>(plane.stride[2]), w = static_cast<int>(plane.stride[3]);
  return {plane.stride[0], {w, h}, {h, w}};
}

// Raises std::invalid_argument for what these kernels do not serve; wavemix_kernels/ops/patm/whole_gpu.py asks the same
// before.
inline void check_kind(const PatmArgs& args) {
  if (args.dtype != DType::f16 && args.dtype != DType::bf16)
    throw std::invalid_argument(std::string("dtype: got ") + name_of(args.dtype) + "; float16 and bfloat16 would work");
  if (args.c != 64 && args.c != 96 && args.c != 128)
    throw std::invalid_argument("x: got " + std::to_string(args.c) + " channels; 64, 96 and 128 would work");
}
inline void check_image(const PatmArgs& args) {
  check_kind(args);
  const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
  if (args.h * args.w > (int64_t{1} << 30))
    fail("x: an image of " + std::to_string(args.h) + " x " + std::to_string(args.w) +
         " pixels; up to 1073741824 would work");
  bool aligned = reinterpret_cast<uintptr_t>(args.x.data) % kVectorBytes == 0;
  for (int k : {0, 2, 3}) aligned = aligned && args.x.stride[k] % kWord == 0;
  if (!aligned) fail("x: a pixel does not start at a multiple of 16 bytes");
}

// Calls function(element, channels) with both as types; the arguments have been checked.
template <class Function>
void dispatch(const PatmArgs& args, const Function& function) {
  const auto by_channels = [&](auto element) {
    if (args.c == 64) return function(element, std::integral_constant<int, 64>{});
    if (args.c == 96) return function(element, std::integral_constant<int, 96>{});
    function(element, std::integral_constant<int, 128>{});
  };
  if (args.dtype == DType::f16) return by_channels(__half{});
  by_channels(__nv_bfloat16{});
}

// Bytes of shared memory that a block of `patm_mixed_gradients` takes, and one of `patm_wave_gradients`.
int64_t shared_of_mixed(int64_t c);
int64_t shared_of_waves(int64_t c);

// --- Tiles -----------------------------------------------------------------------------------------------

// The element at which a word of a row begins. C is a multiple of 32: rows fill the banks a whole number of times, or
// every two rows an odd number.
template <int C>
__device__ constexpr int place(int row, int word) {
  static_assert(C % 32 == 0, "whole words in groups of four");
  return row * C + (word ^ (C % 64 == 0 ? row & 7 : row >> 1 & 3)) * kWord;
}

// Rows [0, count) from pixels first, first + 1, ... of image n by cp.async, zeros up to `rows`. The thread that copies
// a word is the one that maps it in `map_rows`.
template <class T, int C, int kThreads>
__device__ inline void load_pixels(const Image& image, int64_t n, uint32_t first, int count, int rows,
                                   SharedSpan<T> tile) {
  constexpr int kWords = C / kWord;
  static_assert(kThreads % kWords == 0, "a thread keeps to one word of the rows");
  const int word = static_cast<int>(threadIdx.x) % kWords;
  const T* const source = static_cast<const T*>(image.x) + n * image.stride[0] + word * kWord;
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kWords; row < rows; row += kThreads / kWords) {
    if (row < count) {
      uint32_t y = first + static_cast<uint32_t>(row);
      const uint32_t x = image.width.take(y);
      cp_async<16>(tile + place<C>(row, word), source + y * image.stride[1] + x * image.stride[2]);
    } else {
      shared_cast<uint4>(tile + place<C>(row, word))[0] = uint4{};
    }
  }
}

// Eight channels' map of one image: x * scale + shift, or x.
struct Affine {
  float scale[kWord], shift[kWord];

  __device__ Affine(const Image& image, int64_t n, int word) {
    if (image.scale == nullptr) {
#pragma unroll
      for (int k = 0; k < kWord; ++k) {
        scale[k] = 1.0f;
        shift[k] = 0.0f;
      }
    } else {
      load(image.scale + n * image.affine_stride + word * kWord, scale);
      load(image.shift + n * image.affine_stride + word * kWord, shift);
    }
  }
};

// x * scale + shift in place, after the thread's own copies have arrived. Rounded to the element type, as an image in
// memory would be.
template <class T, int C, int kThreads>
__device__ inline void map_rows(const Affine& map, int count, SharedSpan<T> tile) {
  constexpr int kWords = C / kWord;
  const int word = static_cast<int>(threadIdx.x) % kWords;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kWords; row < count; row += kThreads / kWords) {
    const SharedSpan<uint4> at = shared_cast<uint4>(tile + place<C>(row, word));
    const uint4 raw = at[0];
    T elements[kWord];
    memcpy(static_cast<void*>(elements), &raw, sizeof(raw));
    float values[kWord];
#pragma unroll
    for (int k = 0; k < kWord; ++k) values[k] = widen(elements[k]) * map.scale[k] + map.shift[k];
    narrow(values, elements);
    uint4 mapped;
    memcpy(&mapped, static_cast<const void*>(elements), sizeof(mapped));
    at[0] = mapped;
  }
}
template <class T, int C, int kThreads>
__device__ inline void normalise(const Image& image, int64_t n, int count, SharedSpan<T> tile) {
  if (image.scale == nullptr) return;
  map_rows<T, C, kThreads>(Affine(image, n, static_cast<int>(threadIdx.x) % (C / kWord)), count, tile);
}

// `rows` rows of a contiguous (rows, C) matrix, as weights are, by cp.async.
template <class T, int C, int kThreads>
__device__ inline void load_matrix(const void* matrix, int rows, SharedSpan<T> tile) {
  constexpr int kWords = C / kWord;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * kWords; i += kThreads)
    cp_async<16>(tile + place<C>(i / kWords, i % kWords), static_cast<const T*>(matrix) + int64_t{i} * kWord);
}

// --- Pairs -----------------------------------------------------------------------------------------------

// Rows of matrices are permuted, so that a thread's two rows of a product are both channels of a pair, or the pair's
// two outputs, C / 2 apart; pixels of a tile, so that its four columns of two products are neighbours.

// The channel that row `row` of a projection makes.
__device__ constexpr int channel_of_row(int row) { return row / kStep * kStep + 2 * (row % 8) + row / 8 % 2; }
// The output channel in row `row` of what lives among outputs.
template <int C>
__device__ constexpr int output_of_row(int row) {
  return row / kStep * 8 + row % 8 + row / 8 % 2 * (C / 2);
}
// The output channel at place i of a pixel whose outputs lie in pairs.
template <int C>
__device__ constexpr int output_at(int i) {
  return i / 2 + i % 2 * (C / 2);
}
// The pixel, of 16, in row i of a tile.
__device__ constexpr int pixel_of(int i) { return i % 8 / 2 * 4 + i / 8 * 2 + i % 2; }

// --- Fragments -------------------------------------------------------------------------------------------

// `place` of word 2 step + 0 or 1, from that of word 0 or 1 of the same row: next to no arithmetic where `step` is
// known.
template <int C>
__device__ constexpr int moved(int first, int step) {
  return C % 64 == 0 ? first ^ step * kStep : (first ^ step % 2 * kStep) + step / 2 * (2 * kStep);
}

// A operand: 16 rows of the tile, channels 16 step .. 16 step + 15.
template <int C, class T>
__device__ inline void load_rows(Fragment (&a)[4], SharedSpan<T> tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ldmatrix_x4<false>(a, tile + moved<C>(place<C>(row + lane % 16, lane / 16), step));
}
// B operand: the same rows as two tiles of eight columns, b[0], b[1] and b[2], b[3].
template <int C, class T>
__device__ inline void load_columns(Fragment (&b)[4], SharedSpan<T> tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ldmatrix_x4<false>(b, tile + moved<C>(place<C>(row + lane / 16 * 8 + lane % 8, lane / 8 % 2), step));
}
// The same memory with rows as the inner dimension k (16 of them): as A operand channels 16 step .. + 15, as B operand
// these as two tiles of eight columns.
template <int C, class T>
__device__ inline void load_rows_transposed(Fragment (&a)[4], SharedSpan<T> tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ldmatrix_x4<true>(a, tile + moved<C>(place<C>(row + lane / 16 * 8 + lane % 8, lane / 8 % 2), step));
}
template <int C, class T>
__device__ inline void load_columns_transposed(Fragment (&b)[4], SharedSpan<T> tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ldmatrix_x4<true>(b, tile + moved<C>(place<C>(row + lane % 16, lane / 16), step));
}

// d[0] += a * first two of b, d[1] += a * last two.
template <class T>
__device__ inline void multiply(float (&d)[2][4], const Fragment (&a)[4], const Fragment (&b)[4]) {
  const Fragment low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  mma_m16n8k16<T>(d[0], a, low);
  mma_m16n8k16<T>(d[1], a, high);
}

template <class T>
__device__ inline float value_or_zero(const void* vector, int channel) {
  return vector == nullptr ? 0.0f : widen(static_cast<const T*>(vector)[channel]);
}

template <class T>
__device__ inline Fragment packed(float first, float second) {
  const float values[2] = {first, second};
  T elements[2];
  narrow(values, elements);
  Fragment pair;
  memcpy(&pair, static_cast<const void*>(elements), sizeof(pair));
  return pair;
}

// Two neighbouring channels of a pixel, an even one first.
template <class T>
__device__ inline void store_pair(T* target, int64_t stride_of_channels, const float (&pair)[2]) {
  if (stride_of_channels == 1) {
    store(target, pair);
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float one[1] = {pair[k]};
      store(target + k * stride_of_channels, one);
    }
  }
}

// Adds the tile's columns 8 word .. + 7 up: to d go columns 2 * member and + 1, in every group alike.
template <class T, int C>
__device__ inline void add_columns(float (&d)[2], SharedSpan<T> tile, int rows, int word) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Fragment one = packed<T>(1.0f, 1.0f), ones[4] = {one, 0, one, 0};
  float sums[4] = {d[0], d[1], 0.0f, 0.0f};
#pragma unroll 1
  for (int row = 0; row < rows; row += 32) {
    Fragment b[4];
    ldmatrix_x4<true>(b, tile + place<C>(row + lane, word));
    const Fragment low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    mma_m16n8k16<T>(sums, ones, low);
    mma_m16n8k16<T>(sums, ones, high);
  }
  d[0] = sums[0];
  d[1] = sums[1];
}

// --- Waves -----------------------------------------------------------------------------------------------

// z cos and z sin of relu(theta * scale + shift). A NaN stays NaN, as in torch.
template <int N>
__device__ inline void waves(const float (&z)[N], const float (&theta)[N], const float (&scale)[N],
                             const float (&shift)[N], float (&by_cosine)[N], float (&by_sine)[N]) {
  float phase[N], sine[N], cosine[N];
#pragma unroll
  for (int k = 0; k < N; ++k) phase[k] = positive(theta[k] * scale[k] + shift[k]);
  sine_cosine_of_chip(phase, sine, cosine);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    by_cosine[k] = z[k] * cosine[k];
    by_sine[k] = z[k] * sine[k];
  }
}

}  // namespace wavemix::whole
