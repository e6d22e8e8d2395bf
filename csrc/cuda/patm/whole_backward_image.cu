// The gradients of PATM's image and of its projections' weights, from the projections' gradients at every pixel.
//
// Both come of one read. A block takes a run of tiles of pixels and one slice of the image's channels: the image's
// gradient there is a product with the slice of all weights, which stay in shared memory, and the weights' gradient of
// the slice is a sum of products that stays in registers. What comes through batch statistics is linear in the image:
// one more matrix, whose products are made first, scaled so that a half type holds them.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole::image_gradients {

constexpr int kProjections = 5, kThirdSlot = 2, kThetaSlot = 3;

template <int C_>
struct Slice {
  static constexpr int C = C_, kSlices = C == 64 ? 1 : 2, kChannels = C / kSlices;
  static constexpr int kPixels = C == 64 ? 64 : 32;        // of a tile
  static constexpr int kColumns = kPixels == 64 ? 16 : 8;  // of the image's gradient, by warp, for 16 pixels
  static constexpr int kWarps = kPixels / kStep * (kChannels / kColumns), kThreads = 32 * kWarps;
  static constexpr int kPairs = kChannels / kStep, kGroups = kWarps / kPairs;  // of warps, for the weights' gradient
  static constexpr int kChunks = kProjections * C / kStep;
  static constexpr int kOfWarp = (kChunks + kGroups - 1) / kGroups;
  static constexpr int kUnroll = C == 128 ? 1 : C / kStep / 2;  // 80 sums leave few registers
  static constexpr int kRow = kChannels + kWord;  // of the weights: odd multiples of 16 bytes fill the banks evenly
  static constexpr int kMatrix = C * kRow, kTile = kPixels * C;
  // In elements: weights of the projections, then of the image; two sets of tiles, the image's last.
  static constexpr int kTiles = (kProjections + 1) * kMatrix, kSet = (kProjections + 1) * kTile;
  static constexpr size_t kBytes = size_t{2} * (kTiles + 2 * kSet);
  static_assert(kWarps % kPairs == 0 && kThreads % (C / kWord) == 0, "warps share both products evenly");
};

struct Params {
  Image image;
  const void* gradients;                   // (n, h, w, 5, C)
  const void* matrices[kProjections + 1];  // (C, C), the last one transposed; null: no statistics
  const float *vector, *size;              // (C); size: what the last matrix's columns have been divided by
  int64_t tiles, tiles_of_block;
  int tiles_of_image;
  void* d_image;
  int64_t out_stride[4];  // n, c, h, w
  float* partial;         // (runs, 5, C, C)
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) patm_image_gradients(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  constexpr int C = S::C, kWords = C / kWord, kThreads = S::kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, member = lane % 4;
  const int slice = static_cast<int>(blockIdx.x) % S::kSlices, first_channel = slice * S::kChannels;
  const int64_t run = blockIdx.x / S::kSlices;
  const int64_t begin = run * p.tiles_of_block;
  const int64_t end = begin + p.tiles_of_block < p.tiles ? begin + p.tiles_of_block : p.tiles;
  const int pixels = p.image.h * p.image.w;
  const bool with_line = p.matrices[kProjections] != nullptr;
  const auto first_of = [&](int64_t tile) { return static_cast<int>(tile % p.tiles_of_image) * S::kPixels; };
  const auto count_of = [&](int64_t tile) {
    const int rest = pixels - first_of(tile);
    return rest < S::kPixels ? rest : S::kPixels;
  };
  const auto tile_at = [&](int64_t tile, int which) {
    return memory + (S::kTiles + static_cast<int>((tile - begin) % 2) * S::kSet + which * S::kTile);
  };
  const auto fetch = [&](int64_t tile) {
    if (tile < end) {
      const int64_t n = tile / p.tiles_of_image;
      const int first = first_of(tile), count = count_of(tile);
      const T* const source = static_cast<const T*>(p.gradients) + (n * pixels + first) * (kProjections * C);
#pragma unroll 4
      for (int i = thread; i < S::kPixels * kProjections * kWords; i += kThreads) {
        const int row = i / (kProjections * kWords), of_row = i % (kProjections * kWords);
        const SharedSpan<T> to = tile_at(tile, of_row / kWords) + place<C>(row, of_row % kWords);
        if (row < count) {
          cp_async<16>(to, source + int64_t{i} * kWord);
        } else {
          shared_cast<uint4>(to)[0] = uint4{};
        }
      }
      load_pixels<T, C, kThreads>(p.image, n, static_cast<uint32_t>(first), count, S::kPixels,
                                  tile_at(tile, kProjections));
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int which = 0; which < kProjections + (with_line ? 1 : 0); ++which)
    for (int i = thread; i < C * (S::kChannels / kWord); i += kThreads) {
      const int row = i / (S::kChannels / kWord), word = i % (S::kChannels / kWord);
      const int of = which == kThirdSlot ? output_at<C>(row) : row;
      cp_async<16>(memory + (which * S::kMatrix + row * S::kRow + word * kWord),
                   static_cast<const T*>(p.matrices[which]) + of * C + first_channel + word * kWord);
    }
  fetch(begin);
  // The warp's part of the image's gradient: 16 pixels, kColumns channels; of the weights': rows of 16, 16 channels.
  constexpr int kOfPixels = S::kChannels / S::kColumns, kParts = S::kColumns / 8;
  const int of_pixels = warp / kOfPixels * kStep, of_channels = warp % kOfPixels * S::kColumns;
  const int pair = warp % S::kPairs, share = warp / S::kPairs;
  const int own = place<C>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const int of_line = first_channel + of_channels + 2 * member;
  float d_weights[S::kOfWarp][2][4] = {};
#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t n = tile / p.tiles_of_image;
    const int count = count_of(tile);
    fetch(tile + 1);
    cp_async_wait<1>();
    const SharedSpan<T> x = tile_at(tile, kProjections);
    normalise<T, C, kThreads>(p.image, n, count, x);
    __syncthreads();
    float d[kParts][4] = {};
    const auto add_product = [&](int which) {
      const SharedSpan<T> from = tile_at(tile, which);
      const SharedSpan<T> weights = memory + (which * S::kMatrix + of_channels);
#pragma unroll S::kUnroll
      for (int step = 0; step < C / kStep; step += 2) {
        Fragment a[2][4], b[4];
        load_rows<C>(a[0], from, of_pixels, step);
        load_rows<C>(a[1], from, of_pixels, step + 1);
        if constexpr (kParts == 1) {
          ldmatrix_x4<true>(b, weights + (step * kStep + lane) * S::kRow);
          const Fragment low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          mma_m16n8k16<T>(d[0], a[0], low);
          mma_m16n8k16<T>(d[0], a[1], high);
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            ldmatrix_x4<true>(b, weights + (((step + k) * kStep + lane % 16) * S::kRow + lane / 16 * 8));
            multiply<T>(d, a[k], b);
          }
        }
      }
    };
    if (with_line) {
      add_product(kProjections);
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        float size[2], line[2];
        load(p.size + of_line + 8 * k, size);
        load(p.vector + of_line + 8 * k, line);
#pragma unroll
        for (int i = 0; i < 4; ++i) d[k][i] = d[k][i] * size[i % 2] + line[i % 2];
      }
    }
#pragma unroll 1
    for (int which = 0; which < kProjections; ++which) add_product(which);
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int row = of_pixels + group + 8 * low;
      if (row >= count) continue;
      uint32_t y = static_cast<uint32_t>(first_of(tile) + row);
      const uint32_t column = p.image.width.take(y);
      T* const out = static_cast<T*>(p.d_image) + n * p.out_stride[0] + of_line * p.out_stride[1] +
                     y * p.out_stride[2] + column * p.out_stride[3];
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const float both[2] = {d[k][2 * low], d[k][2 * low + 1]};
        store_pair(out + 8 * k * p.out_stride[1], p.out_stride[1], both);
      }
    }
#pragma unroll 1
    for (int row = 0; row < S::kPixels; row += kStep) {
      Fragment b[4];
      load_columns_transposed<C>(b, x, row, slice * S::kPairs + pair);
#pragma unroll
      for (int k = 0; k < S::kOfWarp; ++k) {
        constexpr int kOfProjection = C / kStep;
        Fragment a[4];
        if constexpr (kOfProjection % S::kGroups == 0) {  // all but the share is known: one address serves
          const int first = k * S::kGroups;
          ldmatrix_x4<true>(a, tile_at(tile, first / kOfProjection) +
                                   (row * C + moved<C>(moved<C>(own, share), first % kOfProjection)));
        } else {
          const int chunk = k * S::kGroups + share;
          if (chunk >= S::kChunks) break;
          ldmatrix_x4<true>(a, tile_at(tile, chunk / kOfProjection) + (row * C + moved<C>(own, chunk % kOfProjection)));
        }
        multiply<T>(d_weights[k], a, b);
      }
    }
    __syncthreads();
  }
  float* const out = p.partial + run * (kProjections * C * C) + first_channel + pair * kStep + 2 * member;
#pragma unroll
  for (int k = 0; k < S::kOfWarp; ++k) {
    const int chunk = k * S::kGroups + share;
    if (chunk >= S::kChunks) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int which = chunk / (C / kStep), at = chunk % (C / kStep) * kStep + group + i / 2 * 8;
      const int row = which == kThirdSlot ? output_at<C>(at) : at;
      const float both[2] = {d_weights[k][i % 2][i / 2 * 2], d_weights[k][i % 2][i / 2 * 2 + 1]};
      store(out + (which * C + row) * C + i % 2 * 8, both);
    }
  }
}

// --- Launches --------------------------------------------------------------------------------------------

struct Plan {
  int64_t tiles_of_image, tiles, tiles_of_block, runs;

  Plan(const PatmArgs& args, int multiprocessors) {
    const int64_t slices = args.c == 64 ? 1 : 2;
    tiles_of_image = ceil_div(args.h * args.w, args.c == 64 ? Slice<64>::kPixels : Slice<128>::kPixels);
    tiles = args.n * tiles_of_image;
    const int64_t most = std::max<int64_t>(std::min<int64_t>(multiprocessors, WAVEMIX_MAX_BLOCKS) / slices, 1);
    tiles_of_block = std::max<int64_t>(1, ceil_div(tiles, most));
    runs = ceil_div(tiles, tiles_of_block);
  }
};

template <class T, class S>
void run(const PatmArgs& args, const PatmImageGradArgs& grads, void* workspace, int multiprocessors, void* stream) {
  const Plan plan(args, multiprocessors);
  Params p = {image_of(args),
              grads.gradients,
              {args.z_h, args.z_w, args.z_c, args.theta_h, args.theta_w, grads.matrix},
              grads.vector,
              grads.size,
              plan.tiles,
              plan.tiles_of_block,
              static_cast<int>(plan.tiles_of_image),
              grads.d_image.data,
              {grads.d_image.stride[0], grads.d_image.stride[1], grads.d_image.stride[2], grads.d_image.stride[3]},
              static_cast<float*>(workspace)};
  Launch launch;
  launch.what = [&] {
    return std::string("patm_image_gradients (") + name_of(args.dtype) + ", " + std::to_string(S::C) + ")";
  };
  launch.blocks = static_cast<unsigned>(plan.runs * S::kSlices);
  launch.threads = S::kThreads;
  launch.shared_bytes = S::kBytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch(patm_image_gradients<T, S>, p);
  RowSums sums = {p.partial, static_cast<int>(plan.runs), kProjections * S::C * S::C, 1, grads.d_weights};
  if (grads.matrix != nullptr) {
    sums.more = grads.d_theta;
    sums.more_from = kThetaSlot * S::C * S::C;
  }
  sum_rows(sums, {}, launch.stream);
}

}  // namespace wavemix::whole::image_gradients

namespace wavemix {

int64_t patm_image_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  return whole::image_gradients::Plan(args, multiprocessors).runs * whole::image_gradients::kProjections * args.c *
         args.c * static_cast<int64_t>(sizeof(float));
}

void patm_image_gradients_cuda(const PatmArgs& args, const PatmImageGradArgs& grads, void* workspace,
                               int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::image_gradients::run<decltype(element), whole::image_gradients::Slice<decltype(channels)::value>>(
        args, grads, workspace, multiprocessors, stream);
  });
}

}  // namespace wavemix
