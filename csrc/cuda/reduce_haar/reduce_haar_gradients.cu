// Gradients of reduce_haar for half types, from one read of x and of Z's gradients:
//     g = synthesis of Z's gradients (pixels, outputs), d_x = g W + add, d_weight = g^T x, d_bias = sums of g.
//
// x, d_x and `add` lie in channels_last or NCHW order, the gradients of Z in channels_last order.
//
// With a BatchNorm's output y before x (x = y * scale + shift + residual), its sums of d_x come along.
//
// A block goes through a run of tiles of 64 pixels. x and the gradients of Z of the next tile arrive by cp.async while
// one is computed. Each block leaves its sums of d_weight and d_bias; a second kernel adds them in a fixed order.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/reduce_haar/gradients.cuh"

namespace wavemix::reduce_haar::gradients {
namespace {

template <class T, int S, bool kAlongW, bool kNorm>
__global__ void __launch_bounds__(kThreads, most_blocks(S)) reduce_haar_gradients(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  using Block = Block<T, S, kAlongW, kNorm>;
  const auto block = [&] { return Block{p, memory, static_cast<uint32_t>(here(static_cast<int64_t>(threadIdx.x)))}; };
  const auto first_tile = [&](int64_t of_block) {
    const int number = static_cast<int>(here(of_block));
    return number * p.tiles_of_block + (number < p.more_tiles ? number : p.more_tiles);
  };
  const int begin = first_tile(blockIdx.x);
  float products[S][S][4] = {}, sums[2] = {};
  typename Block::Position next;
  block().fetch(begin, next);
  block().load_weight();
  if constexpr (kNorm) {
    for (int j = 0; j < S; ++j) block().totals(j)[0] = block().totals(j)[1] = 0;
  }
#pragma unroll 1
  for (int tile = begin; tile < first_tile(blockIdx.x + 1); ++tile) {
    typename Block::Position now = next;
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < first_tile(blockIdx.x + 1)) block().fetch(tile + 1, next);
    block().synthesise(kNorm ? static_cast<int>(here(tile)) : tile, sums);  // the stage anew, for the registers
    if constexpr (kAlongW || kNorm) now = block().position_of(tile);        // made again for the registers
    Raw<T, kWord> add[2][S];
#pragma unroll
    for (int j = 0; j < Block::kAhead; ++j) block().load_add(now, j, add);
    __syncthreads();
    block().multiply_weight(tile, products);
    if constexpr (kNorm) {
      __syncthreads();
      block().fetch_y(tile, now);
    }
    block().multiply_x(tile, now, add);
  }
  block().store_sums(products, sums);
}

// --- Blocks' sums together -------------------------------------------------------------------------------

struct SumParams {
  const float* sums;
  void *d_weight, *d_bias;
  float* of_norm;  // (2, channels)
  const float* invstd;
  int blocks, weights, outputs, channels, size;  // size: of one block's sums
};

// A warp's lanes are columns; warps share the blocks.
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_haar_sums(const __grid_constant__ SumParams p) {
  WAVEMIX_SHARED(float, shared, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int column = static_cast<int>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (column < p.size) {
#pragma unroll 8
    for (int block = warp; block < p.blocks; block += kWarps)
      sum += __ldg(p.sums + (static_cast<int64_t>(block) * p.size + column));
  }
  shared[static_cast<int>(threadIdx.x)] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.size) return;
  float total[1] = {0};
#pragma unroll
  for (int k = 0; k < kWarps; ++k) total[0] += shared[32 * k + lane];
  const int output = column - p.weights, of_norm = output - p.outputs;
  if (of_norm >= p.channels) total[0] *= p.blocks > 0 ? __ldg(p.invstd + (of_norm - p.channels)) : 0.0f;
  if (of_norm >= 0) return store(p.of_norm + of_norm, total);
  if (output < 0) return store(static_cast<T*>(p.d_weight) + column, total);
  if (p.d_bias != nullptr) store(static_cast<T*>(p.d_bias) + output, total);
}

// --- Launches --------------------------------------------------------------------------------------------

int size_of(int64_t c, int64_t o) {
  return static_cast<int>(std::max((c + kChannels - 1) / kChannels, (o + kOutputs - 1) / kOutputs));
}

template <class F>
auto with_size(int64_t c, int64_t o, const F& run) {
  switch (size_of(c, o)) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    default:
      throw std::invalid_argument("x and weight: got " + std::to_string(c) + " channels and " + std::to_string(o) +
                                  " outputs; up to " + std::to_string(kMostSize * kChannels) + " and " +
                                  std::to_string(kMostSize * kOutputs) + " would work");
  }
}

bool along_w(const ReduceHaarArgs& args) { return args.x.stride[1] != 1; }

struct Geometry {
  int side_shift = 0;
  int64_t squares = 0, tiles = 0, blocks = 0;
};

// Either order of x makes the same tiles.
Geometry geometry(const ReduceHaarArgs& args, bool norm, int multiprocessors, int64_t shared_of_multiprocessor) {
  Geometry made;
  made.side_shift = std::min(args.levels, most_side(along_w(args)));
  made.squares = args.n * (args.h >> made.side_shift) * (args.w >> made.side_shift);
  const int64_t of_tile = int64_t{1} << 2 * (kTileLevels - made.side_shift);
  made.tiles = (made.squares + of_tile - 1) / of_tile;
  constexpr int64_t kOfSystem = 1024;  // bytes of shared memory of each block
  const int64_t resident = with_size(args.c, args.o, [&](auto size) -> int64_t {
    constexpr int S = decltype(size)::value;
    const int64_t fit = shared_of_multiprocessor / (Places<S>::bytes(norm) + kOfSystem);
    return std::min<int64_t>(most_blocks(S), std::max<int64_t>(fit, 1));
  });
  made.blocks = std::min<int64_t>(made.tiles, resident * multiprocessors);
  return made;
}

void check_args(const ReduceHaarArgs& args) {
  if (args.dtype != DType::f16 && args.dtype != DType::bf16)
    throw std::invalid_argument(std::string("x: got ") + name_of(args.dtype) + "; float16 and bfloat16 would work");
  if (args.levels < 1 || args.levels > kMaxHaarLevels)
    throw std::invalid_argument("levels: got " + std::to_string(args.levels) + "; one launch takes 1 to " +
                                std::to_string(kMaxHaarLevels));
  const int64_t unit = int64_t{1} << args.levels;
  if (args.h % unit != 0 || args.w % unit != 0)
    throw std::invalid_argument("x: got " + std::to_string(args.h) + " x " + std::to_string(args.w) +
                                " pixels; multiples of " + std::to_string(unit) + " would work");
  if (args.c % kWord != 0 || args.o % 2 != 0)
    throw std::invalid_argument("x and weight: got " + std::to_string(args.c) + " channels and " +
                                std::to_string(args.o) + " outputs; multiples of 8 and of 2 would work");
  if (args.n * args.h * args.w > Divisor::kMaxDividend)
    throw std::invalid_argument("x: got " + std::to_string(args.n * args.h * args.w) + " pixels; up to " +
                                std::to_string(Divisor::kMaxDividend) + " would work");
}

int size_of_sums(const ReduceHaarArgs& args, bool norm) {
  return static_cast<int>(args.o * args.c + args.o + (norm ? 2 * args.c : 0));
}

template <class T, int S, bool kAlongW, bool kNorm>
void launch(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, const NormSumArgs& norm, const Geometry& made,
            float* sums, cudaStream_t stream) {
  Params p = {};
  p.x = args.x.data;
  p.weight = args.weight;
  p.add = grads.add.data;
  p.y = norm.y;
  p.mean = norm.mean;
  p.invstd = norm.invstd;
  p.d_x = grads.d_x.data;
  for (int level = 1; level <= args.levels; ++level) {
    p.z[level - 1] = args.z[level - 1].data;
    p.z_row[level - 1] = static_cast<int>(args.z[level - 1].stride[3]);
  }
  p.sums = sums;
  p.size = size_of_sums(args, kNorm);
  p.c = static_cast<int>(args.c);
  p.h = static_cast<int>(args.h);
  p.w = static_cast<int>(args.w);
  p.o = static_cast<int>(args.o);
  p.levels = args.levels;
  p.side_shift = made.side_shift;
  p.squares = static_cast<uint32_t>(made.squares);
  p.across = Divisor(static_cast<uint32_t>(args.w >> made.side_shift));
  p.down = Divisor(static_cast<uint32_t>(args.h >> made.side_shift));
  const bool by_image = grads.add.data != nullptr && grads.add.stride[2] == 0 && grads.add.stride[3] == 0;
  p.sharing = Divisor(by_image ? static_cast<uint32_t>(args.h * args.w) : 1);
  if (made.blocks > 0) {
    p.tiles_of_block = static_cast<int>(made.tiles / made.blocks);
    p.more_tiles = static_cast<int>(made.tiles % made.blocks);
  }
  p.in_words = args.w % kWord == 0;

  Launch launch;
  launch.what = [&] {
    return std::string("reduce_haar_gradients (") + name_of(args.dtype) + ", size " + std::to_string(S) + ", " +
           (kAlongW ? "along W, "
            : kNorm ? "norm, "
                    : "") +
           std::to_string(args.levels) + " levels)";
  };
  launch.threads = kThreads;
  launch.stream = stream;
  launch.blocks = static_cast<unsigned>(made.blocks);
  launch.shared_bytes = Places<S>::bytes(kNorm);
  if (made.blocks > 0) launch(reduce_haar_gradients<T, S, kAlongW, kNorm>, p);

  SumParams of = {};
  of.sums = sums;
  of.d_weight = grads.d_weight;
  of.d_bias = grads.d_bias;
  of.blocks = static_cast<int>(made.blocks);
  of.of_norm = norm.sums;
  of.invstd = norm.invstd;
  of.weights = p.o * p.c;
  of.outputs = p.o;
  of.channels = p.c;
  of.size = p.size;
  launch.what = [&] { return std::string("reduce_haar_sums (") + name_of(args.dtype) + ")"; };
  launch.shared_bytes = 0;
  launch.blocks = static_cast<unsigned>((of.size + 31) / 32);
  launch(reduce_haar_sums<T>, of);
}

}  // namespace
}  // namespace wavemix::reduce_haar::gradients

namespace wavemix {

int64_t reduce_haar_backward_shared_cuda(int64_t c, int64_t o, bool norm) {
  return reduce_haar::gradients::with_size(c, o, [norm](auto size) -> int64_t {
    return reduce_haar::gradients::Places<decltype(size)::value>::bytes(norm);
  });
}

int64_t reduce_haar_backward_workspace_cuda(const ReduceHaarArgs& args, bool norm, int multiprocessors,
                                            int64_t shared_of_multiprocessor) {
  namespace of = reduce_haar::gradients;
  of::check_args(args);
  const auto made = of::geometry(args, norm, multiprocessors, shared_of_multiprocessor);
  return made.blocks * of::size_of_sums(args, norm) * static_cast<int64_t>(sizeof(float));
}

void reduce_haar_backward_cuda(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, const NormSumArgs& norm,
                               void* workspace, int multiprocessors, int64_t shared_of_multiprocessor, void* stream) {
  namespace of = reduce_haar::gradients;
  of::check_args(args);
  if (norm.y != nullptr && of::along_w(args))
    throw std::invalid_argument("x: got channels " + std::to_string(args.x.stride[1]) +
                                " apart; behind a BatchNorm 1 apart, channels_last, would work");
  const auto made = of::geometry(args, norm.y != nullptr, multiprocessors, shared_of_multiprocessor);
  of::with_size(args.c, args.o, [&](auto size) {
    constexpr int S = decltype(size)::value;
    const auto run = [&](auto element, auto along_w, auto with_norm) {
      constexpr bool kAlongW = decltype(along_w)::value, kNorm = decltype(with_norm)::value;
      of::launch<decltype(element), S, kAlongW, kNorm>(args, grads, norm, made, static_cast<float*>(workspace),
                                                       static_cast<cudaStream_t>(stream));
    };
    const auto in_order = [&](auto element) {
      if (norm.y != nullptr) return run(element, std::false_type{}, std::true_type{});
      return of::along_w(args) ? run(element, std::true_type{}, std::false_type{})
                               : run(element, std::false_type{}, std::false_type{});
    };
    return args.dtype == DType::f16 ? in_order(__half{}) : in_order(__nv_bfloat16{});
  });
}

}  // namespace wavemix
