// Mean and covariance of the image's channels, from one read: batch statistics of any 1x1 convolution of it follow.
//
// A block goes through a run of tiles. It takes the run's first pixel off every other one, so that a mean far from zero
// costs no digits; products and sums of the differences are tensor cores' work. Blocks' sums, each about its own pixel,
// are brought to one and added up in double.
#include "cuda/patm/whole.cuh"

namespace wavemix::whole::moments {

constexpr int kPixels = 128;  // of a tile

// Blocks of a multiprocessor. Each leaves a C x C matrix behind.
template <int C>
constexpr int kBlocks = C == 64 ? 2 : 1;
template <int C>
constexpr int kThreads = 4 * C;  // a warp for 16 rows of one half of the columns

// A block leaves products (C, C), sums (C), its pixel (C), and the count of pixels.
template <int C>
constexpr int kProducts = C * C;
template <int C>
constexpr int kRecord = C * C + 3 * C;

struct Params {
  Image image;
  int64_t tiles, tiles_of_block;
  int tiles_of_image;
  float* records;
};

template <class T, int C>
__global__ void __launch_bounds__(kThreads<C>, kBlocks<C>) patm_products(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  constexpr int kWords = C / kWord, kRowTiles = C / kStep, kPairs = C / 32, kTile = kPixels * C;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int word = static_cast<int>(threadIdx.x) % kWords;
  const int64_t begin = blockIdx.x * p.tiles_of_block;
  const int64_t end = begin + p.tiles_of_block < p.tiles ? begin + p.tiles_of_block : p.tiles;
  const int pixels = p.image.h * p.image.w;
  const auto first_of = [&](int64_t tile) { return static_cast<int>(tile % p.tiles_of_image) * kPixels; };
  const auto count_of = [&](int64_t tile) {
    const int rest = pixels - first_of(tile);
    return rest < kPixels ? rest : kPixels;
  };
  const auto fetch = [&](int64_t tile) {
    if (tile < end)
      load_pixels<T, C, kThreads<C>>(p.image, tile / p.tiles_of_image, static_cast<uint32_t>(first_of(tile)),
                                     count_of(tile), kPixels, memory + (tile - begin) % 2 * kTile);
    cp_async_commit();
  };
  fetch(begin);
  float origin[kWord];
  {
    uint32_t y = static_cast<uint32_t>(first_of(begin));
    const uint32_t x = p.image.width.take(y);
    const int64_t n = begin / p.tiles_of_image;
    load(static_cast<const T*>(p.image.x) + n * p.image.stride[0] + y * p.image.stride[1] + x * p.image.stride[2] +
             word * kWord,
         origin);
    const Affine map(p.image, n, word);
#pragma unroll
    for (int k = 0; k < kWord; ++k) origin[k] = origin[k] * map.scale[k] + map.shift[k];
  }
  float products[kPairs][2][4] = {}, sums[2] = {};
  const int row_tile = warp % kRowTiles, half = warp / kRowTiles;
  int64_t counted = 0;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    const SharedSpan<T> now = memory + (tile - begin) % 2 * kTile;
    fetch(tile + 1);
    cp_async_wait<1>();
    Affine map(p.image, tile / p.tiles_of_image, word);
#pragma unroll
    for (int k = 0; k < kWord; ++k) map.shift[k] -= origin[k];
    map_rows<T, C, kThreads<C>>(map, count_of(tile), now);
    counted += count_of(tile);
    __syncthreads();
#pragma unroll 2
    for (int row = 0; row < kPixels; row += kStep) {
      Fragment a[4];
      load_rows_transposed<C>(a, now, row, row_tile);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        Fragment b[4];
        load_columns_transposed<C>(b, now, row, half * kPairs + pair);
        multiply<T>(products[pair], a, b);
      }
    }
    add_columns<T, C>(sums, now, kPixels, warp);
    __syncthreads();
  }
  float* const record = p.records + static_cast<int64_t>(blockIdx.x) * kRecord<C>;
  const int group = lane / 4, member = lane % 4;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = row_tile * kStep + group + k / 2 * 8, column = (half * kPairs + pair) * kStep + 2 * member;
      const float both[2] = {products[pair][k % 2][k / 2 * 2], products[pair][k % 2][k / 2 * 2 + 1]};
      store(record + row * C + column + k % 2 * 8, both);
    }
  }
  float* const more = record + kProducts<C>;
  if (group == 0) store(more + warp * 8 + 2 * member, sums);
  if (threadIdx.x < kWords) {
    store(more + C + word * kWord, origin);
    float count[kWord];
#pragma unroll
    for (int k = 0; k < kWord; ++k) count[k] = static_cast<float>(counted);
    store(more + 2 * C + word * kWord, count);
  }
}

// --- Blocks' sums together -------------------------------------------------------------------------------

constexpr int kSumColumns = 32, kSumGroups = 16, kSumAtOnce = 5;

struct SumParams {
  const float* records;
  int count;
  double share;  // one over their pixels
  double *mean, *covariance;
};

// A block makes 32 columns of one row of the covariance, a warp its share of the records.
template <int C>
__global__ void __launch_bounds__(kSumColumns* kSumGroups) patm_sum_products(const __grid_constant__ SumParams p) {
  WAVEMIX_SHARED(double, shared, 3 * kSumGroups * kSumColumns);
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, group = static_cast<int>(threadIdx.x) / kSumColumns;
  const int row = static_cast<int>(blockIdx.x) / (C / kSumColumns);
  const int column = static_cast<int>(blockIdx.x) % (C / kSumColumns) * kSumColumns + lane;
  const float* const first_origin = p.records + kProducts<C> + C;
  const double origin_row = static_cast<double>(first_origin[row]);
  const double origin_column = static_cast<double>(first_origin[column]);
  double sums[3] = {};  // about the first block's pixel: of products, of the row, of the column
  for (int first = group; first < p.count; first += kSumGroups * kSumAtOnce) {
    float of[kSumAtOnce][6] = {};  // all on their way before the first is added; a record past the end counts nothing
#pragma unroll
    for (int k = 0; k < kSumAtOnce; ++k) {
      const int i = first + k * kSumGroups;
      if (i >= p.count) continue;
      const float* const record = p.records + static_cast<int64_t>(i) * kRecord<C>;
      const float* const more = record + kProducts<C>;
      of[k][0] = __ldg(record + row * C + column);
      of[k][1] = __ldg(more + row);
      of[k][2] = __ldg(more + column);
      of[k][3] = __ldg(more + C + row);
      of[k][4] = __ldg(more + C + column);
      of[k][5] = __ldg(more + 2 * C);
    }
#pragma unroll
    for (int k = 0; k < kSumAtOnce; ++k) {
      const double count = static_cast<double>(of[k][5]);
      const double move_row = static_cast<double>(of[k][3]) - origin_row;
      const double move_column = static_cast<double>(of[k][4]) - origin_column;
      const double sum_row = static_cast<double>(of[k][1]) + count * move_row;
      const double sum_column = static_cast<double>(of[k][2]);
      sums[0] += static_cast<double>(of[k][0]) + move_column * sum_row + move_row * sum_column;
      sums[1] += sum_row;
      sums[2] += sum_column + count * move_column;
    }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) shared[(k * kSumGroups + group) * kSumColumns + lane] = sums[k];
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int i = 1; i < kSumGroups; ++i) sums[k] += shared[(k * kSumGroups + i) * kSumColumns + lane];
    sums[k] *= p.share;
  }
  p.covariance[row * C + column] = sums[0] - sums[1] * sums[2];
  if (row == 0) p.mean[column] = origin_column + sums[2];
}

// --- Launches --------------------------------------------------------------------------------------------

struct Plan {
  int64_t tiles_of_image, tiles, tiles_of_block, blocks;

  Plan(const PatmArgs& args, int multiprocessors) {
    tiles_of_image = ceil_div(args.h * args.w, kPixels);
    tiles = args.n * tiles_of_image;
    const int64_t most = std::max<int64_t>(1, multiprocessors) * (args.c == 64 ? kBlocks<64> : kBlocks<128>);
    tiles_of_block = std::max<int64_t>(1, ceil_div(tiles, most));
    blocks = ceil_div(tiles, tiles_of_block);
  }
};

template <class T, int C>
void run(const PatmArgs& args, double* mean, double* covariance, void* workspace, int multiprocessors, void* stream) {
  const Plan plan(args, multiprocessors);
  Params p = {};
  p.image = image_of(args);
  p.tiles = plan.tiles;
  p.tiles_of_block = plan.tiles_of_block;
  p.tiles_of_image = static_cast<int>(plan.tiles_of_image);
  p.records = static_cast<float*>(workspace);
  Launch launch;
  launch.what = [&] { return std::string("patm_products (") + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  launch.blocks = static_cast<unsigned>(plan.blocks);
  launch.threads = kThreads<C>;
  launch.shared_bytes = 2 * kPixels * C * sizeof(T);
  launch.stream = static_cast<cudaStream_t>(stream);
  launch(patm_products<T, C>, p);
  SumParams sums = {p.records, static_cast<int>(plan.blocks), 1.0 / static_cast<double>(args.n * args.h * args.w), mean,
                    covariance};
  launch.what = [] { return std::string("patm_sum_products (") + std::to_string(C) + ")"; };
  launch.blocks = C * (C / kSumColumns);
  launch.threads = kSumColumns * kSumGroups;
  launch.shared_bytes = 0;
  launch(patm_sum_products<C>, sums);
}

}  // namespace wavemix::whole::moments

namespace wavemix {

int64_t patm_moments_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  const int64_t c = args.c;
  return whole::moments::Plan(args, multiprocessors).blocks * (c * c + 3 * c) * static_cast<int64_t>(sizeof(float));
}

void patm_moments_cuda(const PatmArgs& args, double* mean, double* covariance, void* workspace, int multiprocessors,
                       void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) throw std::invalid_argument("x: has no pixels; moments need at least one");
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::moments::run<decltype(element), decltype(channels)::value>(args, mean, covariance, workspace,
                                                                      multiprocessors, stream);
  });
}

}  // namespace wavemix
