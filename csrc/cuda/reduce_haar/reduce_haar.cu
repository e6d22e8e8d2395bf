// reduce_haar: 1x1 convolution, bias and all Haar levels of a tile of 256 pixels, from one read of x.
//
// The convolution is a matrix product, pixels by channels by outputs. It is limited by memory (27 to 48 operations a
// byte), so x and weight stream through two shared buffers by cp.async while tensor cores work on the other one. Pixels
// are dealt out so that the four of a 2x2 quad end in the same accumulators' places of one thread: the first level
// costs no exchange. Coarser levels, a third as much data in all, go through shared memory in fp32.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/reduce_haar/tile.cuh"

// Launches are cut so that no block number reaches this; the emulator's build lowers it to exercise the cutting.
#ifndef WAVEMIX_MAX_BLOCKS
#define WAVEMIX_MAX_BLOCKS ::wavemix::Divisor::kMaxDividend
#endif

namespace wavemix::reduce_haar {
namespace {

// All of a block's tiles.
template <class Tile>
__device__ inline void reduce(const Params& p, typename Tile::Memory memory) {
  uint32_t task = blockIdx.x;
  const int first_output = static_cast<int>(p.output_chunks.take(task)) * Tile::kOutputs;
  const int tile_column = static_cast<int>(p.tiles_across.take(task));
  const int tile_row = static_cast<int>(p.tiles_down.take(task));
  Tile tile{p, memory, p.first_image + task, first_output, least(p.o - first_output, Tile::kOutputs), 0, 0};

  const int fold = p.levels > kTileLevels ? 2 : 1;  // tiles along each side
  const int columns = 16 << p.wide_shift, rows = kPixels / columns;
  for (int part = 0; part < fold * fold; ++part) {
    if (part > 0) __syncthreads();  // the pixels of the tile before have gone
    tile.row = (tile_row * fold + part / 2) * rows;
    tile.column = (tile_column * fold + part % 2) * columns;
    typename Tile::Sums sums;
    tile.start(sums);
    if (!Tile::kWithNorm && p.x_along_w) {
      tile.template convolve<true>(sums);
    } else {
      tile.template convolve<false>(sums);
    }
    tile.analyse(sums, part);
  }
}

template <class T, bool kTensorCores, int NT>
__global__ void __launch_bounds__(kThreads, kMinBlocks) reduce_haar(const __grid_constant__ Params p) {
  using Tile = Tile<T, kTensorCores, NT, false>;
  WAVEMIX_SHARED(T, memory, Tile::kElements + Tile::kTop);
  reduce<Tile>(p, memory);
}

template <class T, int NT>
__global__ void __launch_bounds__(kThreads, kMinBlocks) norm_reduce_haar(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  reduce<Tile<T, true, NT, true>>(p, memory);
}

// --- Launches --------------------------------------------------------------------------------------------

// The widest access, in bytes, that every run of `extent` elements in steps of `run` is made of.
template <class T, class... Strides>
int access_bytes(const void* data, int64_t run, int64_t extent, Strides... strides) {
  constexpr int64_t kSize = sizeof(T);
  for (int64_t bytes = kVectorBytes; bytes > kSize; bytes /= 2) {
    const int64_t piece = bytes / kSize;
    if (run == 1 && extent % piece == 0 && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
        ((strides % piece == 0) && ...))
      return static_cast<int>(bytes);
  }
  return static_cast<int>(kSize);
}

template <class T>
Access z_access(const ReduceHaarArgs& args, int level, int64_t chunks) {
  const Plane& z = args.z[level - 1];
  const int64_t* s = z.stride;
  // One chunk: LL and bands are one run (staged without a gap where o is even). Several: each is a run of whole words.
  const int64_t run = chunks == 1 ? 4 * args.o : args.o;
  if (args.o % 2 == 0 && access_bytes<T>(z.data, s[1], run, s[0], s[2], s[3]) == kVectorBytes)
    return Access::channel_words;
  if (access_bytes<T>(z.data, s[3], args.w >> level, s[0], s[1], s[2]) == kVectorBytes) return Access::column_words;
  return Access::elements;
}

// An axis of one element is never stepped along: stride 0 restricts nothing, whatever it came with.
ReduceHaarArgs normalised(ReduceHaarArgs args) {
  const auto settle = [](int64_t* stride, int64_t size) {
    if (size == 1) *stride = 0;
  };
  settle(&args.x.stride[0], args.n);
  settle(&args.x.stride[1], args.c);
  settle(&args.weight_stride[0], args.o);
  settle(&args.weight_stride[1], args.c);
  for (int level = 1; level <= args.levels; ++level) {
    int64_t* stride = args.z[level - 1].stride;
    settle(&stride[0], args.n);
    settle(&stride[2], args.h >> level);
    settle(&stride[3], args.w >> level);
  }
  return args;
}

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

template <class T, bool kTensorCores, int NT>
void launch(const ReduceHaarArgs& args, const NormImageArgs* norm, int64_t chunks, void* stream) {
  Params p = {};
  if (norm) {
    p.y = norm->y;
    p.scale = norm->scale;
    p.shift = norm->shift;
    p.image = norm->image;
  }
  p.x = args.x.data;
  p.weight = args.weight;
  p.bias = args.bias;
  std::copy_n(args.x.stride, 4, p.x_stride);
  std::copy_n(args.weight_stride, 2, p.weight_stride);
  p.bias_stride = args.bias_stride;
  p.c = static_cast<int>(args.c);
  p.h = static_cast<int>(args.h);
  p.w = static_cast<int>(args.w);
  p.o = static_cast<int>(args.o);
  p.levels = args.levels;
  for (int level = 1; level <= args.levels; ++level) {
    const Plane& z = args.z[level - 1];
    Level& out = p.level[level - 1];
    out.z = z.data;
    std::copy_n(z.stride, 4, out.stride);
    out.access = z_access<T>(args, level, chunks);
  }
  const int64_t* s = args.x.stride;
  p.x_along_w = s[3] == 1 && s[1] != 1;
  p.x_bytes = p.x_along_w ? access_bytes<T>(args.x.data, s[3], args.w, s[0], s[1], s[2])
                          : access_bytes<T>(args.x.data, s[1], args.c, s[0], s[2], s[3]);
  p.weight_bytes = access_bytes<T>(args.weight, args.weight_stride[1], args.c, args.weight_stride[0]);

  // The tile's shape: the fewest tiles, and of those the widest, for the longest runs in memory. A level takes 2^level
  // rows, and four rows make a warp.
  const int64_t fold = args.levels > kTileLevels ? 2 : 1;
  int64_t across = 0, down = 0;
  for (int shift = std::min(2, std::max(0, kTileLevels - args.levels)); shift >= 0; --shift) {
    const int64_t columns = fold * (16 << shift), rows = fold * (kPixels / (16 << shift));
    const int64_t a = ceil_div(args.w, columns), d = ceil_div(args.h, rows);
    if (across != 0 && a * d >= across * down) continue;
    across = a;
    down = d;
    p.wide_shift = shift;
  }
  const int64_t per_image = chunks * across * down, most = WAVEMIX_MAX_BLOCKS;
  if (per_image > Divisor::kMaxDividend)
    throw std::invalid_argument("x: an image of " + std::to_string(args.h) + " x " + std::to_string(args.w) +
                                " pixels takes " + std::to_string(per_image) + " blocks; up to " +
                                std::to_string(Divisor::kMaxDividend) + " would work");
  p.output_chunks = Divisor(static_cast<uint32_t>(chunks));
  p.tiles_across = Divisor(static_cast<uint32_t>(across));
  p.tiles_down = Divisor(static_cast<uint32_t>(down));

  Launch launch;
  launch.what = [&] {
    return std::string(norm ? "norm_reduce_haar (" : "reduce_haar (") + name_of(args.dtype) +
           (kTensorCores ? ", tensor cores, " : ", fma, ") + std::to_string(NT) + " tiles of outputs, " +
           std::to_string(p.x_bytes) + " bytes along " + (p.x_along_w ? "W, " : "C, ") + std::to_string(args.levels) +
           " levels)";
  };
  launch.threads = kThreads;
  launch.stream = static_cast<cudaStream_t>(stream);
  const int64_t images = std::max<int64_t>(most / per_image, 1);
  for (int64_t first = 0; first < args.n; first += images) {
    p.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - first) * per_image);
    if constexpr (kTensorCores && sizeof(T) == 2) {
      using Tile = Tile<T, true, NT, true>;
      launch.shared_bytes = norm ? (Tile::kElements + Tile::kTop) * sizeof(T) : 0;
      if (norm) {
        launch(norm_reduce_haar<T, NT>, p);
        continue;
      }
    }
    launch(reduce_haar<T, kTensorCores, NT>, p);
  }
}

// Outputs are padded to whole tiles of eight; 16, 36, 48 and 64, the usual C / 4, waste at most one half of a tile.
// More than the registers hold are cut into equal chunks, which read x again (from L2).
template <class T, bool kTensorCores>
void launch_typed(const ReduceHaarArgs& args, const NormImageArgs* norm, void* stream) {
  constexpr int64_t kMost = kTensorCores ? 64 : sizeof(T) < 8 ? 48 : 16;
  const int64_t chunks = ceil_div(args.o, kMost), tiles = ceil_div(ceil_div(args.o, chunks), 8);
  const auto run = [&](auto count) {
    constexpr int NT = decltype(count)::value;
    return launch<T, kTensorCores, NT>(args, norm, ceil_div(args.o, 8 * NT), stream);
  };
  if constexpr (kTensorCores) {
    if (tiles > 6) return run(std::integral_constant<int, 8>{});
  }
  if constexpr (kMost >= 48) {
    if (tiles > 5) return run(std::integral_constant<int, 6>{});
    if (tiles > (kTensorCores ? 2 : 4)) return run(std::integral_constant<int, 5>{});
  }
  if constexpr (!kTensorCores && kMost >= 48) {
    if (tiles > 2) return run(std::integral_constant<int, 4>{});
  }
  run(std::integral_constant<int, 2>{});
}

void check_args(const ReduceHaarArgs& args) {
  if (args.levels < 1 || args.levels > kMaxHaarLevels)
    throw std::invalid_argument("levels: got " + std::to_string(args.levels) + "; one launch takes 1 to " +
                                std::to_string(kMaxHaarLevels));
  const int64_t unit = int64_t{1} << args.levels;
  if (args.h % unit != 0 || args.w % unit != 0)
    throw std::invalid_argument("x: got " + std::to_string(args.h) + " x " + std::to_string(args.w) +
                                " pixels; multiples of " + std::to_string(unit) + " would work");
  constexpr int64_t kMaxExtent = int64_t{1} << 30;
  const int64_t longest = std::max({args.c, args.h, args.w, args.o});
  if (longest > kMaxExtent)
    throw std::invalid_argument("x and weight: an axis has " + std::to_string(longest) + " elements; up to " +
                                std::to_string(kMaxExtent) + " would work");
}

void check_half(const ReduceHaarArgs& args) {
  if (args.dtype != DType::f16 && args.dtype != DType::bf16)
    throw std::invalid_argument(std::string("x: got ") + name_of(args.dtype) + "; float16 and bfloat16 would work");
  if (args.c % 8 != 0 || args.x.stride[1] != 1)
    throw std::invalid_argument("x: got " + std::to_string(args.c) + " channels " + std::to_string(args.x.stride[1]) +
                                " apart; a multiple of 8, 1 apart, would work");
}

}  // namespace
}  // namespace wavemix::reduce_haar

namespace wavemix {

void reduce_haar_cuda(const ReduceHaarArgs& args, void* stream) {
  reduce_haar::check_args(args);
  if (args.n == 0 || args.h == 0 || args.w == 0 || args.o == 0) return;
  const ReduceHaarArgs settled = reduce_haar::normalised(args);
  switch (args.dtype) {
    case DType::f64:
      return reduce_haar::launch_typed<double, false>(settled, nullptr, stream);
    case DType::f32:
      if (args.allow_tf32) return reduce_haar::launch_typed<float, true>(settled, nullptr, stream);
      return reduce_haar::launch_typed<float, false>(settled, nullptr, stream);
    case DType::f16:
      return reduce_haar::launch_typed<__half, true>(settled, nullptr, stream);
    case DType::bf16:
      return reduce_haar::launch_typed<__nv_bfloat16, true>(settled, nullptr, stream);
  }
  throw std::invalid_argument("dtype: unknown code " + std::to_string(static_cast<int>(args.dtype)) +
                              "; 0 to 3 (float64, float32, float16, bfloat16) would work");
}

void norm_reduce_haar_cuda(const ReduceHaarArgs& args, const NormImageArgs& norm, void* stream) {
  reduce_haar::check_args(args);
  reduce_haar::check_half(args);
  if (args.n == 0 || args.h == 0 || args.w == 0) return;
  const ReduceHaarArgs settled = reduce_haar::normalised(args);
  if (args.dtype == DType::f16) return reduce_haar::launch_typed<__half, true>(settled, &norm, stream);
  reduce_haar::launch_typed<__nv_bfloat16, true>(settled, &norm, stream);
}

}  // namespace wavemix
