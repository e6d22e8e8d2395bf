// PATM's output, from x and the branch weights: projections, waves, both 7-tap convolutions, the weighted sum and
// `proj`, with nothing of it in memory.
//
// A block walks down a strip of an image. A warp owns 16 columns and 16 channels. The convolution along H is in scatter
// form: a wave adds to the seven rows it reaches, sums that move up a place with every row, in registers. The one along
// W finds its neighbours in a line in shared memory.
//
// Channels are the rows of products. Weights' rows are permuted, so that a thread gets both channels of a pair, for
// four neighbouring pixels: one read of the line gives it twelve. It makes the pair's two outputs, C / 2 apart, and
// `proj`'s columns are permuted to the order in which they lie then.
#include "cuda/patm/whole.cuh"

namespace wavemix::whole {
namespace {

// Matrices, those first that stay in shared memory; the others' fragments come from the caches.
enum Matrix { kProj, kZ, kTheta = kZ + 2, kZc = kTheta + 2, kMatrices };

template <int C_, int kGroups_, int kResident_>
struct Strip {
  static constexpr int C = C_, kGroups = kGroups_, kResident = kResident_;  // groups of 16 columns
  static constexpr int kChunks = C / kStep, kColumns = kGroups * kStep, kThreads = 32 * kChunks * kGroups;
  static constexpr int kMargin = 4;               // columns beyond an end, whole words of 16 bytes
  static constexpr int kLine = kColumns + kStep;  // words: an odd multiple of 16, eight groups fill the banks evenly
  static constexpr int kRows = kColumns + kStep;  // of a tile, with those beyond the ends
  // In elements of a half type.
  static constexpr int kWeights = kResident * C * C, kAhead = kColumns * C, kRow = kRows * C;
  static constexpr int kLines = C * kLine * 2;
  static constexpr int kFloatsAt = kWeights + kAhead + 2 * kRow + kLines;
  // In floats.
  static constexpr int kTaps = 2 * C * 16, kConstants = 11 * C;
  static constexpr size_t kBytes = size_t{2} * kFloatsAt + size_t{4} * (kTaps + kConstants);
  static constexpr int kUnroll = kResident == kMatrices ? C / kStep : 2;
};

// The channel that row `row` of a matrix makes.
template <int C>
__device__ constexpr int channel_of(int which, int row) {
  return which == kZc ? output_of_row<C>(row) : channel_of_row(row);
}

struct Params {
  Image image;
  const void* matrix[kMatrices];
  const void *z_bias[2], *theta_bias[2], *z_c_bias, *proj_bias;  // along W, along H
  const float *scale[2], *shift[2], *taps[2];
  const float *a, *path;
  int64_t n, first_image;
  void* out;
  int64_t out_stride[4];  // n, c, h, w
  bool along;             // neighbouring columns are a word of 8 bytes
  bool residual, halo;    // halo: strips have neighbours to the left and right
  int rows;               // of a strip
  Divisor across, down;
};

enum Constant { kA = 0, kZcBias = 3, kProjBias = 4, kOfBranch = 5 };  // each C; of a branch: bias of z, scale, shift

template <class T, class S>
struct Mix {
  static constexpr int C = S::C;
  const Params& p;
  SharedSpan<T> memory;
  SharedSpan<float> floats;
  int64_t n;
  int x0, columns;  // this strip's, as far as the image goes
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4;
  int chunk = warp % S::kChunks, first_pixel = warp / S::kChunks * kStep;

  __device__ SharedSpan<T> matrix(int which) const { return memory + which * C * C; }
  __device__ SharedSpan<T> ahead() const { return memory + S::kWeights; }
  __device__ SharedSpan<T> row_of(int y) const { return memory + (S::kWeights + S::kAhead + (y & 1) * S::kRow); }
  __device__ SharedSpan<float> constants(int which) const { return floats + (S::kTaps + which * C); }
  // Four words, each a pixel's pair of waves, from a place of this thread's line on.
  __device__ SharedSpan<uint4> line(int half, int at) const {
    return shared_cast<uint4>(
        memory + (S::kWeights + S::kAhead + 2 * S::kRow + ((half * (C / 2) + 8 * chunk + group) * S::kLine + at) * 2));
  }
  __device__ int output_channel(int half) const { return 8 * chunk + group + half * (C / 2); }

  __device__ void prepare() const {
    constexpr int kThreads = S::kThreads, kWords = C / kWord;
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
    for (int i = thread; i < S::kTaps; i += kThreads) {  // [branch][k / 4][output][k % 4], two channels' of 7, padded
      const int branch = i / (16 * C), k = i / (4 * C) % 4 * 4 + i % 4;
      floats[i] = k < 2 * kPhaseTaps ? p.taps[branch][i / 4 % C * (2 * kPhaseTaps) + k] : 0.0f;
    }
    for (int i = thread; i < C; i += kThreads) {
      for (int which = 0; which < 3; ++which) constants(kA + which)[i] = p.a[(which * p.n + n) * C + i];
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
      for (int half = 0; half < 2; ++half) line(half, member * (S::kMargin + S::kColumns))[0] = uint4{};
    }
  }

  // The column of the image in a row of a tile; -1: none.
  __device__ int column_of(int row) const {
    const int i = row / kStep * kStep + pixel_of(row % kStep);
    if (i < S::kColumns) return i < columns ? x0 + i : -1;
    const int beyond = i - S::kColumns;
    const int x = beyond < S::kMargin ? x0 - S::kMargin + beyond : x0 + i - S::kMargin;
    return beyond < 2 * S::kMargin && x >= 0 && x < p.image.w ? x : -1;
  }
  __device__ void fetch(int y, SharedSpan<T> tile, int rows) const {
    constexpr int kWords = C / kWord;  // a thread keeps to one word of the rows, as in map_rows
    const int word = static_cast<int>(threadIdx.x) % kWords;
    const T* const source =
        static_cast<const T*>(p.image.x) + n * p.image.stride[0] + y * p.image.stride[1] + word * kWord;
    for (int row = static_cast<int>(threadIdx.x) / kWords; row < rows; row += S::kThreads / kWords) {
      const int x = column_of(row);
      if (x >= 0) {
        cp_async<16>(tile + place<C>(row, word), source + x * p.image.stride[2]);
      } else {
        shared_cast<uint4>(tile + place<C>(row, word))[0] = uint4{};
      }
    }
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
  // Products of matrices with 16 pixels of a tile, all from one read of these: [two pixels][channel of the pair,
  // pixel].
  template <int... kWhich, class... Sums>
  __device__ void multiply_pixels(SharedSpan<T> tile, int row, std::integer_sequence<int, kWhich...>,
                                  Sums&... sums) const {
#pragma unroll S::kUnroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment b[4];
      load_columns<C>(b, tile, row, step);
      Fragment a[4];
      ((weights<kWhich>(step, a), multiply<T>(sums, a, b)), ...);
    }
  }

  using Products = float[2][4];
  using Waves = float[2][2][4];  // [cos, sin][two pixels][channel of the pair, pixel]
  __device__ void make_waves(int branch, Products& z, const Products& theta, Waves& u) const {
    const int channel = 16 * chunk + 2 * group;
    float2 of[3];
#pragma unroll
    for (int which = 0; which < 3; ++which)
      of[which] = shared_cast<float2>(constants(kOfBranch + 3 * branch + which) + channel)[0];
    const float scale[4] = {of[1].x, of[1].x, of[1].y, of[1].y}, shift[4] = {of[2].x, of[2].x, of[2].y, of[2].y};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) z[j][k] += k < 2 ? of[0].x : of[0].y;
      waves(z[j], theta[j], scale, shift, u[0][j], u[1][j]);
    }
  }
  __device__ void load_taps(int branch, int half, float (&tap)[16]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 quad = shared_cast<float4>(floats + ((branch * 4 + k) * C + output_channel(half)) * 4)[0];
      memcpy(tap + 4 * k, &quad, sizeof(quad));
    }
  }

  using Below = float[2][4][kPhaseTaps];  // [output of the pair][pixel]: rows r - 3 .. r + 3
  __device__ void run(int y0, int y1) const {
    prepare();
    Below below = {};
    const int rows = S::kColumns + (p.halo ? kStep : 0);
    const auto exists = [&](int y) { return y >= 0 && y < p.image.h; };
    const auto fetch_for = [&](int r) {  // what the step of row r reads
      if (exists(r)) fetch(r, ahead(), S::kColumns);
      if (r - kReach >= y0) fetch(r - kReach, row_of(r - kReach), rows);
      cp_async_commit();
    };
    fetch_for(y0 - kReach);
#pragma unroll 1
    for (int r = y0 - kReach; r < y1 + kReach; ++r) {
      const int y = r - kReach;
      const SharedSpan<T> row = row_of(y);
      cp_async_wait<0>();
      if (exists(r)) normalise<T, C, S::kThreads>(p.image, n, S::kColumns, ahead());
      if (y >= y0) normalise<T, C, S::kThreads>(p.image, n, rows, row);
      __syncthreads();
      Waves u = {};
      if (exists(r)) {
        Products z = {}, theta = {};
        multiply_pixels(ahead(), first_pixel, std::integer_sequence<int, kZ + 1, kTheta + 1>{}, z, theta);
        make_waves(1, z, theta, u);
      }
      scatter(u, below);
      Products third = {};
      if (y >= y0) project(row, third);
      __syncthreads();
      if (r + 1 < y1 + kReach) fetch_for(r + 1);
      if (y < y0) continue;
      mix(row, below, third);
      __syncthreads();
      finish(row, y);
    }
  }

  // A row's waves along H to the outputs they reach.
  __device__ void scatter(const Waves& u, Below& below) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tap[16];
      load_taps(1, half, tap);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = u[half][i / 2][i % 2], second = u[half][i / 2][2 + i % 2];
#pragma unroll
        for (int k = 0; k < kPhaseTaps; ++k) {
          const float above = k + 1 < kPhaseTaps ? below[half][i][k + 1] : 0.0f;
          below[half][i][k] = above + first * tap[kPhaseTaps - 1 - k] + second * tap[2 * kPhaseTaps - 1 - k];
        }
      }
    }
  }

  // Waves along W to the line, and z_c.
  __device__ void project(SharedSpan<T> row, Products& third) const {
    const auto keep = [&](const Waves& u, int at, int inside) {  // zeros from pixel `inside` on
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& of = u[half];
        const auto word = [&](int i) { return i < inside ? packed<T>(of[i / 2][i % 2], of[i / 2][2 + i % 2]) : 0u; };
        line(half, at)[0] = uint4{word(0), word(1), word(2), word(3)};
      }
    };
    Products z = {}, theta = {};
    Waves u;
    multiply_pixels(row, first_pixel, std::integer_sequence<int, kZ, kTheta, kZc>{}, z, theta, third);
    make_waves(0, z, theta, u);
    keep(u, S::kMargin + first_pixel + 4 * member, columns - (first_pixel + 4 * member));
    if (!p.halo || first_pixel != 0) return;
    Products beyond_z = {}, beyond_theta = {};
    multiply_pixels(row, S::kColumns, std::integer_sequence<int, kZ, kTheta>{}, beyond_z, beyond_theta);
    make_waves(0, beyond_z, beyond_theta, u);
    // Left of the strip all four columns are in the image or none; to the right as many as there are.
    const int inside = member == 0 ? (x0 > 0 ? 4 : 0) : p.image.w - (x0 + S::kColumns);
    if (member < 2) keep(u, member * (S::kMargin + S::kColumns), inside);
  }

  // h a[0] + w a[1] + c a[2], to the tile that x was in.
  __device__ void mix(SharedSpan<T> row, const Below& below, const Products& third) const {
    float mixed[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // what is at hand first: its registers are free then
      const int o = output_channel(half);
      const float a1 = constants(kA + 1)[o], a2 = constants(kA + 2)[o], bias = constants(kZcBias)[o];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mixed[half][i] = below[half][i][0] * a1 + (third[i / 2][2 * half + i % 2] + bias) * a2;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float a0 = constants(kA)[output_channel(half)];
      float near[3 * S::kMargin][2], tap[16];  // from four columns before this thread's on
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const uint4 words = line(half, first_pixel + 4 * (member + i))[0];
        T elements[8];
        memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
        for (int k = 0; k < 8; ++k) near[4 * i + k / 2][k % 2] = widen(elements[k]);
      }
      load_taps(0, half, tap);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float along = 0.0f;
#pragma unroll
        for (int k = 0; k < kPhaseTaps; ++k) {
          const auto& wave = near[S::kMargin - kReach + i + k];
          along += wave[0] * tap[k] + wave[1] * tap[kPhaseTaps + k];
        }
        mixed[half][i] += along * a0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared_cast<Fragment>(row + place<C>(first_pixel + i / 2 * 8 + 2 * member + i % 2, 2 * chunk + group / 4) +
                            group % 4 * 2)[0] = packed<T>(mixed[0][i], mixed[1][i]);
  }

  __device__ void finish(SharedSpan<T> row, int y) const {
    const int channel = 16 * chunk + 2 * group, column = first_pixel + 4 * member;
    const T* const x = static_cast<const T*>(p.image.x) + n * p.image.stride[0] + y * p.image.stride[1] +
                       (x0 + column) * p.image.stride[2] + channel;
    T* const out = static_cast<T*>(p.out) + n * p.out_stride[0] + channel * p.out_stride[1] + y * p.out_stride[2] +
                   (x0 + column) * p.out_stride[3];
    Fragment around[4] = {};  // raw: waiting takes half the registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.residual && column + i < columns)
        around[i] = __ldg(reinterpret_cast<const Fragment*>(x + i * p.image.stride[2]));
    }
    Products d = {};
    multiply_pixels(row, first_pixel, std::integer_sequence<int, kProj>{}, d);
    const float path = p.path == nullptr ? 1.0f : p.path[n];
    const float2 bias = shared_cast<float2>(constants(kProjBias) + channel)[0];
    float made[4][2];  // [column][channel]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      made[i][0] = d[i / 2][i % 2] + bias.x;
      made[i][1] = d[i / 2][2 + i % 2] + bias.y;
      if (!p.residual) continue;
      T elements[2];
      memcpy(static_cast<void*>(elements), &around[i], sizeof(around[i]));
#pragma unroll
      for (int k = 0; k < 2; ++k) made[i][k] = widen(elements[k]) + path * made[i][k];
    }
    const bool four = p.along && column + 4 <= columns;
    const float rows[2][4] = {{made[0][0], made[1][0], made[2][0], made[3][0]},
                              {made[0][1], made[1][1], made[2][1], made[3][1]}};
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (four) store(out + k * p.out_stride[1], rows[k]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!four && column + i < columns) store_pair(out + i * p.out_stride[3], p.out_stride[1], made[i]);
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) patm_mix(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  uint32_t of_image = blockIdx.x;
  const int x0 = static_cast<int>(p.across.take(of_image)) * S::kColumns;
  const int y0 = static_cast<int>(p.down.take(of_image)) * p.rows;
  const int right = p.image.w - x0, columns = right < S::kColumns ? right : S::kColumns, bottom = y0 + p.rows;
  const SharedSpan<float> floats = shared_cast<float>(memory + S::kFloatsAt);
  const Mix<T, S> mix{p, memory, floats, p.first_image + of_image, x0, columns};
  mix.run(y0, bottom < p.image.h ? bottom : p.image.h);
}

// --- Launches --------------------------------------------------------------------------------------------

// Such that the chip's turns take the least time; rows beyond a strip's ends cost about half.
int64_t rows_of(int64_t strips, int64_t height, int64_t at_once) {
  int64_t rows = height, least = INT64_MAX;
  for (int64_t parts = 1; parts <= height; ++parts) {
    const int64_t of_part = ceil_div(height, parts);
    const int64_t cost = ceil_div(strips * ceil_div(height, of_part), at_once) * (of_part + kReach + 2);
    if (cost < least) {
      least = cost;
      rows = of_part;
    }
  }
  return rows;
}

template <class T, class S>
void run(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream) {
  const auto vector = [](const void* data) { return static_cast<const float*>(data); };
  const int64_t across = ceil_div(args.w, S::kColumns);
  const int64_t rows = rows_of(args.n * across, args.h, std::max(1, multiprocessors));
  const int64_t down = ceil_div(args.h, rows);
  bool along = out.stride[3] == 1 && reinterpret_cast<uintptr_t>(out.data) % 8 == 0;
  for (int k = 0; k < 3; ++k) along = along && out.stride[k] % 4 == 0;
  Params p = {image_of(args),
              {args.proj, args.z_h, args.z_w, args.theta_h, args.theta_w, args.z_c},
              {args.z_h_bias, args.z_w_bias},
              {args.theta_h_bias, args.theta_w_bias},
              args.z_c_bias,
              args.proj_bias,
              {vector(args.scale_h), vector(args.scale_w)},
              {vector(args.shift_h), vector(args.shift_w)},
              {vector(args.taps_h), vector(args.taps_w)},
              a,
              vector(args.path),
              args.n,
              0,
              out.data,
              {out.stride[0], out.stride[1], out.stride[2], out.stride[3]},
              along,
              args.residual,
              across > 1,
              static_cast<int>(rows),
              Divisor(static_cast<uint32_t>(across)),
              Divisor(static_cast<uint32_t>(down))};
  Launch launch;
  launch.what = [&] { return std::string("patm_mix (") + name_of(args.dtype) + ", " + std::to_string(S::C) + ")"; };
  launch.threads = S::kThreads;
  launch.shared_bytes = S::kBytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  const int64_t most = WAVEMIX_MAX_BLOCKS, images = std::max<int64_t>(most / (across * down), 1);
  for (int64_t first = 0; first < args.n; first += images) {
    p.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - first) * across * down);
    launch(patm_mix<T, S>, p);
  }
}

template <int C>
using StripOf =
    std::conditional_t<C == 64, Strip<64, 4, 6>, std::conditional_t<C == 96, Strip<96, 2, 4>, Strip<128, 2, 4>>>;

}  // namespace
}  // namespace wavemix::whole

namespace wavemix {

// This kernel or one of the gradients' takes the most.
int64_t patm_shared_cuda(int64_t c) {
  using namespace whole;
  const size_t mix = c == 64 ? StripOf<64>::kBytes : c == 96 ? StripOf<96>::kBytes : StripOf<128>::kBytes;
  return std::max({static_cast<int64_t>(mix), shared_of_mixed(c), shared_of_waves(c)});
}

void patm_mix_cuda(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::run<decltype(element), whole::StripOf<decltype(channels)::value>>(args, a, out, multiprocessors, stream);
  });
}

}  // namespace wavemix
