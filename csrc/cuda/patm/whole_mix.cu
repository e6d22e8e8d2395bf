// PATM's output, from x and the branch weights: projections, waves, both 7-tap convolutions, the weighted sum and
// `proj`, with nothing of it in memory.
//
// A block walks down a strip of an image. A warp owns 16 columns and 16 channels. The convolution along H is in scatter
// form: a wave adds to the seven rows it reaches, sums that move up a place with every row, in registers. The one along
// W finds its neighbours in a line in shared memory. A thread's two channels of a pair make two outputs, C / 2 apart:
// the columns of z_c and the channels of `proj` are put in that order (`output`), so that everything meets in a thread.
#include "cuda/patm/whole.cuh"

namespace wavemix::whole {
namespace {

template <int C>
struct Strip {
  static constexpr int kChunks = C / kStep;
  static constexpr int kGroups = C == 64 ? 4 : 2;  // of 16 columns
  static constexpr int kColumns = kGroups * kStep;
  static constexpr int kThreads = 32 * kChunks * kGroups;
  static constexpr int kLine = kColumns + 2 * kReach;
  static constexpr bool kAllShared = C == 64;  // the weights; else z_c and proj come from the caches
  // In elements of a half type.
  static constexpr int kMatrix = C * C, kMatrices = (kAllShared ? 6 : 4) * kMatrix;
  static constexpr int kAhead = kColumns * C, kRow = (kColumns + kStep) * C;
  static constexpr int kFloatsAt = kMatrices + kAhead + 2 * kRow;
  // In floats.
  static constexpr int kWaves = C / 8 * 2 * kLine * 8, kTaps = 2 * C * 2 * kPhaseTaps, kConstants = 11 * C;
  static constexpr size_t kBytes = size_t{2} * kFloatsAt + size_t{4} * (kWaves + kTaps + kConstants);
};

// The output channel that lies at place i: pairs of outputs of one pair of channels.
template <int C>
__device__ constexpr int output(int i) {
  return i / 2 + i % 2 * (C / 2);
}

struct Params {
  Image image;
  const void *z[2], *z_bias[2], *theta[2], *theta_bias[2];  // along W, along H
  const float *scale[2], *shift[2], *taps[2];
  const void *z_c, *z_c_bias, *proj, *proj_bias;
  const float *a, *path;
  int64_t n, first_image;
  void* out;
  int64_t out_stride[3];  // n, h, w
  bool residual, halo;    // halo: strips have neighbours to the left and right
  int rows;               // of a strip
  Divisor across, down;
};

enum Constant { kA = 0, kZcBias = 3, kProjBias = 4, kOfBranch = 5 };  // each C; of a branch: bias of z, scale, shift

template <class T>
__device__ inline float value_or_zero(const void* vector, int channel) {
  return vector == nullptr ? 0.0f : widen(static_cast<const T*>(vector)[channel]);
}

template <class T, int C>
struct Mix {
  using S = Strip<C>;
  const Params& p;
  SharedSpan<T> memory;
  SharedSpan<float> floats;
  int64_t n;
  int x0, columns;  // this strip's, as far as the image goes
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4;
  int chunk = warp % S::kChunks, first_pixel = warp / S::kChunks * kStep;

  __device__ SharedSpan<T> matrix(int which) const { return memory + which * S::kMatrix; }
  __device__ SharedSpan<T> ahead() const { return memory + S::kMatrices; }
  __device__ SharedSpan<T> row_of(int y) const { return memory + (S::kMatrices + S::kAhead + (y & 1) * S::kRow); }
  __device__ SharedSpan<float> constants(int which) const { return floats + (S::kWaves + S::kTaps + which * C); }
  // Eight channels' waves of one half at a place of the line.
  __device__ SharedSpan<float> wave(int t, int half, int at) const {
    return floats + (((2 * chunk + t) * 2 + half) * S::kLine + at) * 8 + 2 * member;
  }
  __device__ SharedSpan<float> taps(int branch, int t, int half) const {
    return floats + (S::kWaves + (branch * C + output<C>(16 * chunk + 8 * t + 2 * member + half)) * 2 * kPhaseTaps);
  }

  __device__ void prepare() const {
    constexpr int kThreads = S::kThreads;
    for (int branch = 0; branch < 2; ++branch) {
      load_matrix<T, C, kThreads>(p.z[branch], C, matrix(2 * branch));
      load_matrix<T, C, kThreads>(p.theta[branch], C, matrix(2 * branch + 1));
    }
    if constexpr (S::kAllShared) {
      const T *const z_c = static_cast<const T*>(p.z_c), *const proj = static_cast<const T*>(p.proj);
      for (int i = static_cast<int>(threadIdx.x); i < S::kMatrix; i += kThreads) {
        const int row = i / C, column = i % C, at = place<C>(row, column / kWord) + column % kWord;
        matrix(4)[at] = z_c[output<C>(row) * C + column];
        matrix(5)[at] = proj[row * C + output<C>(column)];
      }
    }
    for (int i = static_cast<int>(threadIdx.x); i < S::kTaps; i += kThreads)
      floats[S::kWaves + i] = i < S::kTaps / 2 ? p.taps[0][i] : p.taps[1][i - S::kTaps / 2];
    for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
      const int o = output<C>(i);
      for (int which = 0; which < 3; ++which) constants(kA + which)[i] = p.a[(which * p.n + n) * C + o];
      constants(kZcBias)[i] = value_or_zero<T>(p.z_c_bias, o);
      constants(kProjBias)[i] = value_or_zero<T>(p.proj_bias, i);
      for (int branch = 0; branch < 2; ++branch) {
        const float scale = p.scale[branch][i];
        constants(kOfBranch + 3 * branch)[i] = value_or_zero<T>(p.z_bias[branch], i);
        constants(kOfBranch + 3 * branch + 1)[i] = scale;
        constants(kOfBranch + 3 * branch + 2)[i] =
            p.shift[branch][i] + value_or_zero<T>(p.theta_bias[branch], i) * scale;
      }
    }
  }

  // Column of the image at row i behind the strip's own columns in a tile; outside: -1.
  __device__ int halo_column(int i) const {
    const int x = i < kReach ? x0 - kReach + i : x0 + S::kColumns + i - kReach;
    return i < 2 * kReach && x >= 0 && x < p.image.w ? x : -1;
  }

  __device__ void fetch(int y, SharedSpan<T> tile, bool with_halo) const {
    load_pixels<T, C, S::kThreads>(p.image, n, static_cast<uint32_t>(y * p.image.w + x0), columns, S::kColumns, tile);
    if (!with_halo) return;
    constexpr int kWords = C / kWord;
    for (int i = static_cast<int>(threadIdx.x); i < kStep * kWords; i += S::kThreads) {
      const int row = i / kWords, word = i % kWords, x = halo_column(row);
      const SharedSpan<T> target = tile + S::kAhead + place<C>(row, word);
      if (x < 0) {
        shared_cast<uint4>(target)[0] = uint4{};
      } else {
        cp_async<16>(target, static_cast<const T*>(p.image.x) + n * p.image.stride[0] + y * p.image.stride[1] +
                                 x * p.image.stride[2] + word * kWord);
      }
    }
  }
  __device__ void map(SharedSpan<T> tile, bool with_halo) const {
    normalise<T, C, S::kThreads>(p.image, n, columns, tile);
    if (with_halo) normalise<T, C, S::kThreads>(p.image, n, 2 * kReach, tile + S::kAhead);
  }

  // A warp's 16 pixels, from `row` of a tile on, by 16 rows of a matrix.
  __device__ void product(SharedSpan<T> tile, int row, SharedSpan<T> weights, float (&d)[2][4]) const {
#pragma unroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[4];
      load_rows<C>(a, tile, row, step);
      load_columns<C>(b, weights, chunk * kStep, step);
      multiply<T>(d, a, b);
    }
  }
  // With the weights from the caches: eight columns from `at(t, k)`, which gives elements k and k + 1 of this lane's.
  template <class At>
  __device__ void product_from_memory(SharedSpan<T> tile, int row, const At& at, float (&d)[2][4]) const {
#pragma unroll 2
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[4];
      load_rows<C>(a, tile, row, step);
#pragma unroll
      for (int k = 0; k < 4; ++k) b[k] = at(k / 2, step * kStep + k % 2 * 8 + 2 * member);
      multiply<T>(d, a, b);
    }
  }

  // Waves of the warp's 16 pixels: [eight channels][cos, sin][pixel, channel of the pair].
  using Waves = float[2][2][4];
  __device__ void make_waves(SharedSpan<T> tile, int row, int branch, Waves& u) const {
    float z[2][4] = {}, theta[2][4] = {};
    product(tile, row, matrix(2 * branch), z);
    product(tile, row, matrix(2 * branch + 1), theta);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int channel = 16 * chunk + 8 * t + 2 * member;
      float of[3][2], scale[4], shift[4];
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        const float2 pair = shared_cast<float2>(constants(kOfBranch + 3 * branch + which) + channel)[0];
        of[which][0] = pair.x;
        of[which][1] = pair.y;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        z[t][k] += of[0][k % 2];
        scale[k] = of[1][k % 2];
        shift[k] = of[2][k % 2];
      }
      waves<T>(z[t], theta[t], scale, shift, u[t][0], u[t][1]);
    }
  }
  // To the line, zeros for pixels outside the image.
  __device__ void keep(const Waves& u, const int (&at)[2], const bool (&exists)[2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (at[i] < 0) continue;
          const float2 pair = {exists[i] ? u[t][half][2 * i] : 0.0f, exists[i] ? u[t][half][2 * i + 1] : 0.0f};
          shared_cast<float2>(wave(t, half, at[i]))[0] = pair;
        }
      }
    }
  }

  __device__ void run(int y0, int y1) const {
    prepare();
    float below[2][2][2][kPhaseTaps] = {};  // [eight channels][cos, sin][pixel]: rows r - 3 .. r + 3
    const auto fetch_next = [&](int r) {    // what the step of row r reads
      if (r >= 0 && r < p.image.h) fetch(r, ahead(), false);
      if (r - kReach >= y0) fetch(r - kReach, row_of(r - kReach), p.halo);
      cp_async_commit();
    };
    fetch_next(y0 - kReach);
#pragma unroll 1
    for (int r = y0 - kReach; r < y1 + kReach; ++r) {
      const int y = r - kReach;
      const bool exists = r >= 0 && r < p.image.h, writes = y >= y0;
      cp_async_wait<0>();
      if (exists) map(ahead(), false);
      if (writes) map(row_of(y), p.halo);
      __syncthreads();
      scatter(exists, below);
      float third[2][4] = {};
      if (writes) {
        project_row(row_of(y), third);
      }
      __syncthreads();
      if (r + 1 < y1 + kReach) fetch_next(r + 1);
      if (!writes) continue;
      mix(row_of(y), below, third);
      __syncthreads();
      finish(row_of(y), y);
    }
  }

  // Row r's waves along H to the outputs they reach.
  __device__ void scatter(bool exists, float (&below)[2][2][2][kPhaseTaps]) const {
    Waves u = {};
    if (exists) make_waves(ahead(), first_pixel, 1, u);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tap[2 * kPhaseTaps];
        load_taps(1, t, half, tap);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int k = 0; k < kPhaseTaps; ++k) {
            const float above = k + 1 < kPhaseTaps ? below[t][half][i][k + 1] : 0.0f;
            below[t][half][i][k] = above + u[t][half][2 * i] * tap[kPhaseTaps - 1 - k] +
                                   u[t][half][2 * i + 1] * tap[2 * kPhaseTaps - 1 - k];
          }
        }
      }
    }
  }
  __device__ void load_taps(int branch, int t, int half, float (&tap)[2 * kPhaseTaps]) const {
    const SharedSpan<float> from = taps(branch, t, half);
#pragma unroll
    for (int k = 0; k < kPhaseTaps; ++k) {
      const float2 pair = shared_cast<float2>(from + 2 * k)[0];
      tap[2 * k] = pair.x;
      tap[2 * k + 1] = pair.y;
    }
  }

  // Waves along W to the line, and z_c.
  __device__ void project_row(SharedSpan<T> row, float (&third)[2][4]) const {
    Waves u;
    make_waves(row, first_pixel, 0, u);
    const int i = first_pixel + group;
    keep(u, {i + kReach, i + 8 + kReach}, {i < columns, i + 8 < columns});
    if (first_pixel == 0) {  // beyond the strip's ends; zeros where it has no neighbours
      const int at = group < kReach ? group : S::kColumns + group;
      Waves beyond = {};
      if (p.halo) make_waves(row, S::kColumns, 0, beyond);
      keep(beyond, {group < 2 * kReach ? at : -1, -1}, {p.halo && halo_column(group) >= 0, false});
    }
    if constexpr (S::kAllShared) {
      product(row, first_pixel, matrix(4), third);
    } else {
      product_from_memory(
          row, first_pixel,
          [&](int t, int k) {
            const int o = output<C>(16 * chunk + 8 * t + group);
            return __ldg(reinterpret_cast<const Fragment*>(static_cast<const T*>(p.z_c) + o * C + k));
          },
          third);
    }
  }

  // h a[0] + w a[1] + c a[2], to the tile that x was in.
  __device__ void mix(SharedSpan<T> row, const float (&below)[2][2][2][kPhaseTaps], const float (&third)[2][4]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      float mixed[2][2];  // [pixel][cos, sin]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place_of = 16 * chunk + 8 * t + 2 * member + half;
        const float a0 = constants(kA)[place_of], a1 = constants(kA + 1)[place_of], a2 = constants(kA + 2)[place_of];
        const float bias = constants(kZcBias)[place_of];
        float tap[2 * kPhaseTaps];
        load_taps(0, t, half, tap);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float along = 0.0f;
#pragma unroll
          for (int k = 0; k < kPhaseTaps; ++k) {
            const float2 pair = shared_cast<float2>(wave(t, half, first_pixel + group + 8 * i + k))[0];
            along += pair.x * tap[k] + pair.y * tap[kPhaseTaps + k];
          }
          mixed[i][half] = along * a0 + below[t][half][i][0] * a1 + (third[t][2 * i + half] + bias) * a2;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        shared_cast<Fragment>(row + place<C>(first_pixel + group + 8 * i, 2 * chunk + t) + 2 * member)[0] =
            packed<T>(mixed[i][0], mixed[i][1]);
    }
  }

  __device__ void finish(SharedSpan<T> row, int y) const {
    float d[2][4] = {};
    if constexpr (S::kAllShared) {
      product(row, first_pixel, matrix(5), d);
    } else {
      product_from_memory(
          row, first_pixel,
          [&](int t, int k) {
            const T* const from = static_cast<const T*>(p.proj) + (16 * chunk + 8 * t + group) * C + k / 2;
            const T pair[2] = {from[0], from[C / 2]};
            Fragment b;
            memcpy(&b, static_cast<const void*>(pair), sizeof(b));
            return b;
          },
          d);
    }
    const float path = p.path == nullptr ? 1.0f : p.path[n];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first_pixel + group + 8 * i;
      if (column >= columns) continue;
      const T* const x = static_cast<const T*>(p.image.x) + n * p.image.stride[0] + y * p.image.stride[1] +
                         (x0 + column) * p.image.stride[2];
      T* const out =
          static_cast<T*>(p.out) + n * p.out_stride[0] + y * p.out_stride[1] + (x0 + column) * p.out_stride[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int channel = 16 * chunk + 8 * t + 2 * member;
        float pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) pair[k] = d[t][2 * i + k] + constants(kProjBias)[channel + k];
        if (p.residual) {
          float around[2];
          load(x + channel, around);
#pragma unroll
          for (int k = 0; k < 2; ++k) pair[k] = around[k] + path * pair[k];
        }
        store(out + channel, pair);
      }
    }
  }
};

template <class T, int C>
__global__ void __launch_bounds__(Strip<C>::kThreads, 1) patm_mix(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  uint32_t of_image = blockIdx.x;
  const int x0 = static_cast<int>(p.across.take(of_image)) * Strip<C>::kColumns;
  const int y0 = static_cast<int>(p.down.take(of_image)) * p.rows;
  const int right = p.image.w - x0, bottom = y0 + p.rows;
  const Mix<T, C> mix{p,
                      memory,
                      shared_cast<float>(memory + Strip<C>::kFloatsAt),
                      p.first_image + of_image,
                      x0,
                      right < Strip<C>::kColumns ? right : Strip<C>::kColumns};
  mix.run(y0, bottom < p.image.h ? bottom : p.image.h);
}

// --- Launches --------------------------------------------------------------------------------------------

// Rows of a strip such that the chip's turns take the least time; rows beyond its ends cost about half.
int64_t rows_of(int64_t strips, int64_t height, int multiprocessors) {
  int64_t rows = height, least = INT64_MAX;
  for (int64_t parts = 1; parts <= height; ++parts) {
    const int64_t of_part = ceil_div(height, parts);
    const int64_t turns = ceil_div(strips * ceil_div(height, of_part), std::max(1, multiprocessors));
    const int64_t cost = turns * (of_part + kReach + 2);
    if (cost < least) {
      least = cost;
      rows = of_part;
    }
  }
  return rows;
}

template <class T, int C>
void run(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream) {
  using S = Strip<C>;
  const auto vector = [](const void* data) { return static_cast<const float*>(data); };
  const int64_t across = ceil_div(args.w, S::kColumns);
  const int64_t rows = rows_of(args.n * across, args.h, multiprocessors), down = ceil_div(args.h, rows);
  Params p = {};
  p.image = image_of(args);
  const void* const of[2][7] = {
      {args.z_h, args.z_h_bias, args.theta_h, args.theta_h_bias, args.scale_h, args.shift_h, args.taps_h},
      {args.z_w, args.z_w_bias, args.theta_w, args.theta_w_bias, args.scale_w, args.shift_w, args.taps_w}};
  for (int branch = 0; branch < 2; ++branch) {
    p.z[branch] = of[branch][0];
    p.z_bias[branch] = of[branch][1];
    p.theta[branch] = of[branch][2];
    p.theta_bias[branch] = of[branch][3];
    p.scale[branch] = vector(of[branch][4]);
    p.shift[branch] = vector(of[branch][5]);
    p.taps[branch] = vector(of[branch][6]);
  }
  p.z_c = args.z_c;
  p.z_c_bias = args.z_c_bias;
  p.proj = args.proj;
  p.proj_bias = args.proj_bias;
  p.a = a;
  p.path = vector(args.path);
  p.n = args.n;
  p.out = out.data;
  const int kept[3] = {0, 2, 3};
  for (int k = 0; k < 3; ++k) p.out_stride[k] = out.stride[kept[k]];
  p.residual = args.residual;
  p.halo = across > 1;
  p.rows = static_cast<int>(rows);
  p.across = Divisor(static_cast<uint32_t>(across));
  p.down = Divisor(static_cast<uint32_t>(down));
  Launch launch;
  launch.what = [&] { return std::string("patm_mix (") + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  launch.threads = S::kThreads;
  launch.shared_bytes = S::kBytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  const int64_t most = WAVEMIX_MAX_BLOCKS, images = std::max<int64_t>(most / (across * down), 1);
  for (int64_t first = 0; first < args.n; first += images) {
    p.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - first) * across * down);
    launch(patm_mix<T, C>, p);
  }
}

}  // namespace
}  // namespace wavemix::whole

namespace wavemix {

// The mix takes the most: moments and branch sums hold two tiles, and weights in registers.
int64_t patm_shared_cuda(int64_t c) {
  return static_cast<int64_t>(c == 64   ? whole::Strip<64>::kBytes
                              : c == 96 ? whole::Strip<96>::kBytes
                                        : whole::Strip<128>::kBytes);
}

void patm_mix_cuda(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::run<decltype(element), decltype(channels)::value>(args, a, out, multiprocessors, stream);
  });
}

}  // namespace wavemix
