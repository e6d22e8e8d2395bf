// The branch weights, from one read of x: the sums of the three branches over each image without their convolutions.
//
// The sum over positions of a 7-tap convolution is taps times sums of waves: of all waves, less those at a border that
// a tap does not reach. Seven sums do: all positions, the first three, the last three. The third branch is linear, its
// sum follows from that of x.
//
// A warp makes the waves of 16 channels of one branch, for every pixel, and keeps their weights in registers. Outputs
// are the rows of its products, eight amplitudes over the eight phases of the same channels, so that both meet in a
// thread; and what it makes of them is, as it lies, an operand of the product that sums: (which sum, pixel) times
// (pixel, channel).
#include <type_traits>

#include "cuda/patm/whole.cuh"

namespace wavemix::whole::branch_sums {

constexpr int kSums = 1 + 2 * kReach;     // all, first three, last three
constexpr int kRows = 2 * kSums * 2 + 1;  // [branch][sum][cos, sin], then x
constexpr int kNowhere = INT32_MIN;       // no position

template <int C>
constexpr int kThreads = 4 * C;
// Pixels of a tile: 16 KB, or 24.
constexpr int pixels_of_tile(int64_t c) { return c == 128 ? 64 : 128; }
template <int C>
constexpr int kPixels = pixels_of_tile(C);
struct Params {
  Image image;
  const void *z[2], *z_bias[2], *theta[2], *theta_bias[2];  // along W, along H
  const float *scale[2], *shift[2];
  int64_t first_image;
  int tiles, tiles_of_block, parts_of_image;
  Divisor parts;
  float* partial;  // (n, parts, kRows, C)
};

// Eight channels of both, as the rows of one operand: in registers, but where these do not suffice, the last steps in
// words of the thread's own in shared memory, `kThreads` apart.
template <class T, int C>
struct Weights {
  static constexpr int kSteps = C / kStep, kHeld = C == 128 ? kSteps - 3 : kSteps;
  static constexpr int kWords = (kSteps - kHeld) * kThreads<C>;
  Fragment held[kHeld][4];

  __device__ void load(const void* z, const void* theta, int channel, int member, SharedSpan<T> own) {
    const auto at = [=](const void* matrix, int k) {
      return __ldg(reinterpret_cast<const Fragment*>(static_cast<const T*>(matrix) + channel * C + k + 2 * member));
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Fragment a[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        a[2 * k] = at(z, step * kStep + 8 * k);
        a[2 * k + 1] = at(theta, step * kStep + 8 * k);
      }
      if (step < kHeld) {
        memcpy(held[step], a, sizeof(a));
      } else {
        shared_cast<uint4>(own)[(step - kHeld) * kThreads<C>] = uint4{a[0], a[1], a[2], a[3]};
      }
    }
  }
  __device__ void at(int step, SharedSpan<T> own, Fragment (&a)[4]) const {
    if (step < kHeld) {
      memcpy(a, held[step], sizeof(a));
    } else {
      const uint4 word = shared_cast<uint4>(own)[(step - kHeld) * kThreads<C>];
      memcpy(a, &word, sizeof(a));
    }
  }
};

template <class T, int C>
__global__ void __launch_bounds__(kThreads<C>, C == 64 ? 2 : 1) patm_branch_sums(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  WAVEMIX_SHARED(int, positions, 2 * kPixels<C>);
  WAVEMIX_SHARED(float, constants, 2 * C * 3);  // of a channel: bias of z, scale and shift of the phase
  constexpr int kTile = kPixels<C> * C, kChunks = C / kStep;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = lane / 4, member = lane % 4;
  const int branch = warp / kChunks, channel = warp % kChunks * kStep;
  uint32_t of_image = blockIdx.x;
  const int part = static_cast<int>(p.parts.take(of_image));
  const int64_t n = p.first_image + of_image;
  const int begin = part * p.tiles_of_block;
  const int end = begin + p.tiles_of_block < p.tiles ? begin + p.tiles_of_block : p.tiles;
  const int pixels = p.image.h * p.image.w;
  const auto count_of = [&](int tile) {
    const int rest = pixels - tile * kPixels<C>;
    return rest < kPixels<C> ? rest : kPixels<C>;
  };
  const auto fetch = [&](int tile) {
    if (tile < end)
      load_pixels<T, C, kThreads<C>>(p.image, n, static_cast<uint32_t>(tile * kPixels<C>), count_of(tile), kPixels<C>,
                                     memory + (tile - begin) % 2 * kTile);
    cp_async_commit();
  };
  fetch(begin);
  constexpr int kOwn = Weights<T, C>::kWords * kWord;
  Weights<T, C> weights[2];
  const SharedSpan<T> own = memory + 2 * kTile + static_cast<int>(threadIdx.x) * kWord;
#pragma unroll
  for (int t = 0; t < 2; ++t)
    weights[t].load(p.z[branch], p.theta[branch], channel + 8 * t + group, member, own + t * kOwn);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * C; i += kThreads<C>) {
    const int b = i / C, of = i % C;
    const float scale = p.scale[b][of];
    constants[3 * i] = value_or_zero<T>(p.z_bias[b], of);
    constants[3 * i + 1] = scale;
    constants[3 * i + 2] = p.shift[b][of] + value_or_zero<T>(p.theta_bias[b], of) * scale;
  }
  const SharedSpan<float> mine = constants + 3 * (branch * C + channel + group);
  // Row `group` of the sums takes a pixel where its position agrees with `wanted` in the bits of `mask`.
  const int length = branch == 0 ? p.image.w : p.image.h;
  const int mask = group == 0 ? INT32_MIN : -1;
  const int wanted = group == 0            ? 0
                     : group <= kReach     ? group - 1
                     : group <= 2 * kReach ? length - 1 - (group - 1 - kReach)
                                           : kNowhere + 1;
  float sums[2][2][4] = {}, x_sums[2] = {};
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const SharedSpan<T> now = memory + (tile - begin) % 2 * kTile;
    fetch(tile + 1);
    cp_async_wait<1>();
    normalise<T, C, kThreads<C>>(p.image, n, count_of(tile), now);
    if (threadIdx.x < kPixels<C>) {
      const int i = static_cast<int>(threadIdx.x);
      uint32_t y = static_cast<uint32_t>(tile * kPixels<C> + i);
      const int x = static_cast<int>(p.image.width.take(y));
      const bool exists = i < count_of(tile);
      positions[i] = exists ? x : kNowhere;
      positions[kPixels<C> + i] = exists ? static_cast<int>(y) : kNowhere;
    }
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < kPixels<C>; row += kStep) {
      if (row >= count_of(tile)) break;
      const auto selected = [&](int pixel) {
        const int2 pair = shared_cast<int2>(positions + (branch * kPixels<C> + row + pixel + 2 * member))[0];
        const auto is = [&](int position) { return ((position ^ wanted) & mask) == 0 ? 1.0f : 0.0f; };
        return packed<T>(is(pair.x), is(pair.y));
      };
      const Fragment which[4] = {selected(0), 0, selected(8), 0};
      float both[2][2][4] = {};  // [eight channels][eight pixels][amplitudes, phases]
#pragma unroll
      for (int step = 0; step < C / kStep; ++step) {
        Fragment b[4];
        load_columns<C>(b, now, row, step);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          Fragment a[4];
          weights[t].at(step, own + t * kOwn, a);
          multiply<T>(both[t], a, b);
        }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const auto& of = both[t];
        const float bias = mine[24 * t], scale = mine[24 * t + 1], shift = mine[24 * t + 2];
        const float z[4] = {of[0][0] + bias, of[0][1] + bias, of[1][0] + bias, of[1][1] + bias};
        const float theta[4] = {of[0][2], of[0][3], of[1][2], of[1][3]};
        const float rise[4] = {scale, scale, scale, scale};
        const float offset[4] = {shift, shift, shift, shift};
        float by_cosine[4], by_sine[4];
        waves(z, theta, rise, offset, by_cosine, by_sine);
        const Fragment cosines[2] = {packed<T>(by_cosine[0], by_cosine[1]), packed<T>(by_cosine[2], by_cosine[3])};
        const Fragment sines[2] = {packed<T>(by_sine[0], by_sine[1]), packed<T>(by_sine[2], by_sine[3])};
        mma_m16n8k16<T>(sums[t][0], which, cosines);
        mma_m16n8k16<T>(sums[t][1], which, sines);
      }
    }
    add_columns<T, C>(x_sums, now, kPixels<C>, warp);
    __syncthreads();
  }
  float* const out = p.partial + (n * p.parts_of_image + part) * (kRows * C);
  if (group < kSums) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float pair[2] = {sums[t][half][0], sums[t][half][1]};
        store(out + ((branch * kSums + group) * 2 + half) * C + channel + 8 * t + 2 * member, pair);
      }
    }
  }
  if (group == 0) store(out + (kRows - 1) * C + warp * 8 + 2 * member, x_sums);
}

// --- The MLP ---------------------------------------------------------------------------------------------

constexpr int kMlpThreads = 256;
constexpr int kMostHidden = 128;

struct MlpParams {
  const float* partial;
  int parts, hidden, pixels;
  int64_t n, first_image;
  const void *z_c, *z_c_bias;
  const float *taps[2], *fc1, *fc1_bias, *fc2, *fc2_bias;
  float *branch_mean, *a;
};

// The sum over an image of output channel `o` of the branch whose sums these are.
template <int C>
__device__ inline float convolved(SharedSpan<float> sums, SharedSpan<float> taps, int o) {
  const int half = o < C / 2 ? 0 : 1, pair = o % (C / 2);
  // Two inputs side by side, as words.
  const auto of = [=](int sum) { return shared_cast<float2>(sums)[((2 * sum + half) * C) / 2 + pair]; };
  float tap[2 * kPhaseTaps];
#pragma unroll
  for (int k = 0; k < kPhaseTaps; ++k) {
    const float2 word = shared_cast<float2>(taps)[o * kPhaseTaps + k];
    tap[2 * k] = word.x;
    tap[2 * k + 1] = word.y;
  }
  float2 left = of(0), right = left;  // without the first, the last positions
  float result = left.x * tap[kReach] + left.y * tap[kPhaseTaps + kReach];
#pragma unroll
  for (int k = 1; k <= kReach; ++k) {
    const float2 first = of(k), last = of(kReach + k);
    left = float2{left.x - first.x, left.y - first.y};
    right = float2{right.x - last.x, right.y - last.y};
    result += left.x * tap[kReach + k] + right.x * tap[kReach - k];
    result += left.y * tap[kPhaseTaps + kReach + k] + right.y * tap[kPhaseTaps + kReach - k];
  }
  return result;
}

__device__ inline int at_most(int i, int most) { return i < most ? i : most; }

// The sum over lanes of a group of `Lanes`, in each of them.
template <int Lanes>
__device__ inline float sum_of_lanes(float sum) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// A block makes one image's. Matrices are read along their rows, by a warp or a quarter of one: whole sectors, several
// rows on their way.
template <class T, int C>
__global__ void __launch_bounds__(kMlpThreads, 2) patm_branch_mlp(const __grid_constant__ MlpParams p) {
  static_assert(3 * C * 8 % kMlpThreads == 0, "whole rows for each quarter of a warp");
  constexpr int kWarps = kMlpThreads / 32, kQuarter = 8, kTaps = 2 * C * kPhaseTaps;
  constexpr int kWord = 4, kAtOnce = 4;  // floats of a word, parts on their way
  WAVEMIX_SHARED(float, sums, kRows* C);
  WAVEMIX_SHARED(float, taps, 2 * kTaps);
  WAVEMIX_SHARED(float, mean, C);
  WAVEMIX_SHARED(float, hidden, kMostHidden);
  WAVEMIX_SHARED(float, logits, 3 * C);
  const int64_t n = p.first_image + blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto* const partial = reinterpret_cast<const float4*>(p.partial + n * p.parts * (kRows * C));
  // All loads of a part before what waits for them, and none behind a branch: the last threads read what others have.
  constexpr int kTapsOfThread = (2 * kTaps + kMlpThreads - 1) / kMlpThreads;
  float tap[kTapsOfThread];
#pragma unroll
  for (int k = 0; k < kTapsOfThread; ++k) {
    const int i = at_most(thread + k * kMlpThreads, 2 * kTaps - 1);
    tap[k] = __ldg(i < kTaps ? p.taps[0] + i : p.taps[1] + (i - kTaps));
  }
  constexpr int kWords = kRows * C / kWord, kOfThread = (kWords + kMlpThreads - 1) / kMlpThreads;
  float of_thread[kOfThread][kWord] = {};
  const auto add = [&](int part, auto count) {
    constexpr int kCount = decltype(count)::value;
    float4 words[kCount][kOfThread];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < kOfThread; ++k)
        words[i][k] = __ldg(partial + (part + i) * kWords + at_most(thread + k * kMlpThreads, kWords - 1));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < kOfThread; ++k) {
        const float values[kWord] = {words[i][k].x, words[i][k].y, words[i][k].z, words[i][k].w};
#pragma unroll
        for (int j = 0; j < kWord; ++j) of_thread[k][j] += values[j];
      }
    }
  };
  int part = 0;
#pragma unroll 1
  for (; part + kAtOnce <= p.parts; part += kAtOnce) add(part, std::integral_constant<int, kAtOnce>());
#pragma unroll 1
  for (; part < p.parts; ++part) add(part, std::integral_constant<int, 1>());
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) {
    const int word = thread + k * kMlpThreads;
    const float (&of)[kWord] = of_thread[k];
    if (word < kWords) shared_cast<float4>(sums)[word] = float4{of[0], of[1], of[2], of[3]};
  }
#pragma unroll
  for (int k = 0; k < kTapsOfThread; ++k)
    if (thread + k * kMlpThreads < 2 * kTaps) taps[thread + k * kMlpThreads] = tap[k];
  __syncthreads();
  // The third branch's sum, of a channel by a warp.
  constexpr int kPairs = (C + 63) / 64, kOfWarp = C / kWarps;
  const auto pair_of = [=](int k) { return at_most(64 * k + 2 * lane, C - 2); };
  Raw<T, 2> pairs[kOfWarp][kPairs];
#pragma unroll
  for (int j = 0; j < kOfWarp; ++j) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k)
      fetch<T, 2>(static_cast<const T*>(p.z_c) + (warp + j * kWarps) * C + pair_of(k), pairs[j][k]);
  }
  float2 of_x[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const float2 word = shared_cast<float2>(sums + (kRows - 1) * C)[pair_of(k) / 2];
    of_x[k] = 64 * k + 2 * lane < C ? word : float2{};
  }
  float mine = 0.0f;  // of the lane's own number
#pragma unroll
  for (int j = 0; j < kOfWarp; ++j) {
    float third = 0.0f;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      float pair[2];
      widen<T, 2>(pairs[j][k], pair);
      third += pair[0] * of_x[k].x + pair[1] * of_x[k].y;
    }
    third = sum_of_lanes<32>(third);
    if (lane == j) mine = third;
  }
  if (lane < kOfWarp) mean[warp + lane * kWarps] = mine;
  __syncthreads();
  if (thread < C) {
    const float sum = convolved<C>(sums, taps, thread) + convolved<C>(sums + kSums * 2 * C, taps + kTaps, thread);
    const float of_image = (sum + mean[thread]) / static_cast<float>(p.pixels) + value_or_zero<T>(p.z_c_bias, thread);
    mean[thread] = of_image;
    p.branch_mean[n * C + thread] = of_image;
  }
  __syncthreads();
  constexpr int kOfLane = C / 32;
  float of_mean[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) of_mean[i] = mean[lane + 32 * i];
  for (int first = warp; first < p.hidden; first += 2 * kWarps) {
    float both[2] = {};
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const float* const row = p.fc1 + at_most(first + second * kWarps, p.hidden - 1) * C;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) both[second] += __ldg(row + lane + 32 * i) * of_mean[i];
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int k = first + second * kWarps;
      float sum = sum_of_lanes<32>(both[second]);
      if (lane > 0 || k >= p.hidden) continue;
      sum += __ldg(p.fc1_bias + k);
      hidden[k] = 0.5f * sum * (1.0f + erff(sum * 0.70710678118654752f));
    }
  }
  __syncthreads();
  constexpr int kRowsOfThread = 3 * C * kQuarter / kMlpThreads;
  const int member = lane % kQuarter, row = thread / kQuarter * kRowsOfThread;
  float of_rows[kRowsOfThread] = {};
  for (int k = member; k < p.hidden; k += kQuarter) {
    const float unit = hidden[k];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) of_rows[i] += __ldg(p.fc2 + (row + i) * p.hidden + k) * unit;
  }
#pragma unroll
  for (int first = 0; first < kRowsOfThread; first += kQuarter) {
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < kQuarter; ++i) {
      if (first + i >= kRowsOfThread) break;
      const float logit = sum_of_lanes<kQuarter>(of_rows[first + i]);
      if (member == i) own = logit;
    }
    const int of = row + first + member;
    if (first + member < kRowsOfThread) logits[of] = own + __ldg(p.fc2_bias + of);
  }
  __syncthreads();
  if (thread >= C) return;
  float logit[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) logit[i] = logits[3 * thread + i];
  const float most = fmaxf(logit[0], fmaxf(logit[1], logit[2]));
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    logit[i] = expf(logit[i] - most);
    total += logit[i];
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) p.a[(i * p.n + n) * C + thread] = logit[i] / total;
}

// --- Launches --------------------------------------------------------------------------------------------

// Blocks of an image: tiles a block such that the chip's turns take the least time, a block's start counted as a tile.
struct Plan {
  int64_t tiles, tiles_of_block = 1, parts;

  Plan(const PatmArgs& args, int multiprocessors) {
    tiles = ceil_div(args.h * args.w, pixels_of_tile(args.c));
    const int64_t at_once = std::max<int64_t>(1, multiprocessors) * (args.c == 64 ? 2 : 1);
    int64_t least = INT64_MAX;
    for (int64_t of_block = 1; of_block <= std::min<int64_t>(tiles, 16); ++of_block) {
      const int64_t cost = ceil_div(args.n * ceil_div(tiles, of_block), at_once) * (of_block + 1);
      if (cost < least) {
        least = cost;
        tiles_of_block = of_block;
      }
    }
    parts = ceil_div(tiles, tiles_of_block);
  }
};

template <class T, int C>
void run(const PatmArgs& args, float* branch_mean, float* a, void* workspace, int multiprocessors, void* stream) {
  const Plan plan(args, multiprocessors);
  const auto vector = [](const void* data) { return static_cast<const float*>(data); };
  Params p = {{},
              {args.z_h, args.z_w},
              {args.z_h_bias, args.z_w_bias},
              {args.theta_h, args.theta_w},
              {args.theta_h_bias, args.theta_w_bias},
              {vector(args.scale_h), vector(args.scale_w)},
              {vector(args.shift_h), vector(args.shift_w)},
              0,
              static_cast<int>(plan.tiles),
              static_cast<int>(plan.tiles_of_block),
              static_cast<int>(plan.parts),
              Divisor(static_cast<uint32_t>(plan.parts)),
              static_cast<float*>(workspace)};
  p.image = image_of(args);
  MlpParams mlp = {p.partial,
                   p.parts_of_image,
                   static_cast<int>(args.hidden),
                   static_cast<int>(args.h * args.w),
                   args.n,
                   0,
                   args.z_c,
                   args.z_c_bias,
                   {vector(args.taps_h), vector(args.taps_w)},
                   vector(args.fc1),
                   vector(args.fc1_bias),
                   vector(args.fc2),
                   vector(args.fc2_bias),
                   branch_mean,
                   a};
  Launch launch;
  launch.stream = static_cast<cudaStream_t>(stream);
  const char* name = "patm_branch_sums";
  launch.what = [&] { return std::string(name) + " (" + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  const int64_t most = WAVEMIX_MAX_BLOCKS, images = std::max<int64_t>(most / plan.parts, 1);
  for (int64_t first = 0; first < args.n; first += images) {
    p.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - first) * plan.parts);
    launch.threads = kThreads<C>;
    launch.shared_bytes = 2 * (kPixels<C> * C + Weights<T, C>::kWords * kWord) * sizeof(T);
    launch(patm_branch_sums<T, C>, p);
  }
  name = "patm_branch_mlp";
  for (int64_t first = 0; first < args.n; first += most) {
    mlp.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(most, args.n - first));
    launch.threads = kMlpThreads;
    launch.shared_bytes = 0;
    launch(patm_branch_mlp<T, C>, mlp);
  }
}

}  // namespace wavemix::whole::branch_sums

namespace wavemix {

int64_t patm_branch_weights_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  return args.n * whole::branch_sums::Plan(args, multiprocessors).parts * whole::branch_sums::kRows * args.c *
         static_cast<int64_t>(sizeof(float));
}

void patm_branch_weights_cuda(const PatmArgs& args, float* branch_mean, float* a, void* workspace, int multiprocessors,
                              void* stream) {
  whole::check_image(args);
  if (args.hidden > whole::branch_sums::kMostHidden)
    throw std::invalid_argument("fc1: has " + std::to_string(args.hidden) + " hidden channels; up to " +
                                std::to_string(whole::branch_sums::kMostHidden) + " would work");
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::branch_sums::run<decltype(element), decltype(channels)::value>(args, branch_mean, a, workspace,
                                                                          multiprocessors, stream);
  });
}

}  // namespace wavemix
