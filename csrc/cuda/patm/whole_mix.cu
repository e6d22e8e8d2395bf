// PATM's output, from x and the branch weights: projections, waves, both 7-tap convolutions, the weighted sum and
// `proj`, with nothing of it in memory.
//
// A block walks down a strip of an image. A warp owns 16 channels of one or two groups of 16 columns. The convolution
// along H is in scatter form: a wave adds to the seven rows it reaches, sums that move up a place with every row, in
// registers. The one along W finds its neighbours in a line in shared memory. It is three rows behind, and x waits for
// it in a ring of rows.
//
// Channels are the rows of products. Weights' rows are permuted, so that a thread gets both channels of a pair, for
// four neighbouring pixels: one read of the line gives it twelve. It makes the pair's two outputs, C / 2 apart, and
// `proj`'s columns are permuted to the order in which they lie then.
#include "cuda/patm/whole_strips.cuh"

namespace wavemix::whole::mix {

template <class T, class S>
struct Mix : StripTiles<T, S> {
  using Tiles = StripTiles<T, S>;
  using Tiles::C, Tiles::kOfWarp, Tiles::p, Tiles::memory, Tiles::n, Tiles::x0, Tiles::columns, Tiles::lane,
      Tiles::group;
  using Tiles::member, Tiles::chunk, Tiles::first_pixel, Tiles::channel, Tiles::column;
  using Tiles::prepare, Tiles::fetch, Tiles::multiply_pixels, Tiles::multiply_beyond;
  using Tiles::row_at, Tiles::constants, Tiles::of_channels, Tiles::line, Tiles::output_channel, Tiles::load_taps;

  using typename Tiles::Products;
  using Waves = float[2][2][4];  // [cos, sin][two pixels][channel of the pair, pixel]

  __device__ static void start(Products& sums, float2 rows) {
#pragma unroll
    for (int i = 0; i < 8 * kOfWarp; ++i) sums[i / 8][i / 4 % 2][i % 4] = i % 4 < 2 ? rows.x : rows.y;
  }
  __device__ void make_waves(int branch, const float (&z)[4], const float (&theta)[4], float (&by_cosine)[4],
                             float (&by_sine)[4]) const {
    const float2 scales = of_channels(kOfBranch + 3 * branch + 1), shifts = of_channels(kOfBranch + 3 * branch + 2);
    const float scale[4] = {scales.x, scales.x, scales.y, scales.y},
                shift[4] = {shifts.x, shifts.x, shifts.y, shifts.y};
    waves(z, theta, scale, shift, by_cosine, by_sine);
  }

  using Below = float[kOfWarp][2][4][kPhaseTaps];  // [group][output of the pair][pixel]: rows r - 3 .. r + 3
  __device__ void run(int y0, int y1) const {
    prepare();
    Below below = {};
    const auto exists = [&](int y) { return y >= 0 && y < p.image.h; };
    const auto beyond = [&](int y) { return p.halo && y >= y0 && y < y1; };
    const auto fetch_for = [&](int r) {
      if (exists(r)) fetch(r, beyond(r));
      cp_async_commit();
    };
    fetch_for(y0 - kReach);
#pragma unroll 1
    for (int r = y0 - kReach; r < y1 + kReach; ++r) {
      const int y = r - kReach;
      cp_async_wait<0>();
      if (exists(r))
        normalise<T, C, S::kThreads>(p.image, n, S::kColumns + (beyond(r) ? 2 * S::kMargin : 0), memory + row_at(r));
      __syncthreads();
      Waves u[kOfWarp] = {};
      if (exists(r)) {
        Products z, theta = {};
        start(z, of_channels(kOfBranch + 3));
        multiply_pixels(row_at(r), std::integer_sequence<int, kZ + 1, kTheta + 1>{}, z, theta);
#pragma unroll
        for (int i = 0; i < 2 * kOfWarp; ++i)
          make_waves(1, z[i / 2][i % 2], theta[i / 2][i % 2], u[i / 2][0][i % 2], u[i / 2][1][i % 2]);
      }
      scatter(u, below);
      Products third;
      if (beyond(y) && first_pixel == 0) project_beyond(row_at(y));
      if (y >= y0) project(row_at(y), third);
      __syncthreads();  // of the ring, row y is free
      if (r + 1 < y1 + kReach) fetch_for(r + 1);
      if (y < y0) continue;
      mix(below, third);
      __syncthreads();
      finish(y);
    }
  }

  // A row's waves along H to the outputs they reach.
  __device__ void scatter(const Waves (&u)[kOfWarp], Below& below) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tap[16];
      load_taps(1, half, tap);
#pragma unroll
      for (int i = 0; i < 4 * kOfWarp; ++i) {
        const auto& wave = u[i / 4][half][i / 2 % 2];
        auto& sums = below[i / 4][half][i % 4];
#pragma unroll
        for (int k = 0; k < kPhaseTaps; ++k) {
          const float above = k + 1 < kPhaseTaps ? sums[k + 1] : 0.0f;
          sums[k] = above + wave[i % 2] * tap[kPhaseTaps - 1 - k] + wave[2 + i % 2] * tap[2 * kPhaseTaps - 1 - k];
        }
      }
    }
  }

  // Waves along W to the line, and z_c.
  __device__ void project(int tile, Products& third) const {
    Products z, theta = {};
    start(z, of_channels(kOfBranch));
    start(third, float2{constants(kZcBias)[output_channel(0)], constants(kZcBias)[output_channel(1)]});
    multiply_pixels(tile, std::integer_sequence<int, kZ, kTheta, kZc>{}, z, theta, third);
#pragma unroll
    for (int w = 0; w < kOfWarp; ++w) {
      const int at = column + w * kStep;
      Waves u;
#pragma unroll
      for (int j = 0; j < 2; ++j) make_waves(0, z[w][j], theta[w][j], u[0][j], u[1][j]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto word = [&](int i) {
          return at + i < columns ? packed<T>(u[half][i / 2][i % 2], u[half][i / 2][2 + i % 2]) : 0u;
        };
        shared_cast<uint4>(line(half, S::kMargin + at))[0] = uint4{word(0), word(1), word(2), word(3)};
      }
    }
  }
  // The same of the columns beyond the ends: this thread's and the next.
  __device__ void project_beyond(int tile) const {
    const float2 bias = of_channels(kOfBranch);
    float z[4] = {bias.x, bias.x, bias.y, bias.y}, theta[4] = {}, u[2][4];
    multiply_beyond(tile, std::integer_sequence<int, kZ, kTheta>{}, z, theta);
    make_waves(0, z, theta, u[0], u[1]);
    const int at = 2 * member + (member < 2 ? 0 : S::kColumns), x = x0 - S::kMargin + at;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto word = [&](int i) {
        const bool exists = static_cast<unsigned>(x + i) < static_cast<unsigned>(p.image.w);
        return exists ? packed<T>(u[half][i], u[half][2 + i]) : 0u;
      };
      shared_cast<uint2>(line(half, at))[0] = uint2{word(0), word(1)};
    }
  }

  // The weighted sum, to shared memory.
  __device__ void mix(const Below& below, const Products& third) const {
    float mixed[2][4 * kOfWarp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // what is at hand first: its registers are free then
      const float weight = constants(kThird)[output_channel(half)];
#pragma unroll
      for (int i = 0; i < 4 * kOfWarp; ++i)
        mixed[half][i] = below[i / 4][half][i % 4][0] + third[i / 4][i / 2 % 2][2 * half + i % 2] * weight;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tap[16];
      load_taps(0, half, tap);
#pragma unroll
      for (int w = 0; w < kOfWarp; ++w) {
        float near[3 * S::kMargin][2];  // from four columns before this thread's on
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const uint4 words = shared_cast<uint4>(line(half, column + w * kStep + 4 * i))[0];
          T elements[8];
          memcpy(static_cast<void*>(elements), &words, sizeof(words));
#pragma unroll
          for (int k = 0; k < 8; ++k) near[4 * i + k / 2][k % 2] = widen(elements[k]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int k = 0; k < kPhaseTaps; ++k) {
            const auto& wave = near[S::kMargin - kReach + i + k];
            mixed[half][4 * w + i] += wave[0] * tap[k];
            mixed[half][4 * w + i] += wave[1] * tap[kPhaseTaps + k];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kOfWarp; ++i) {
      const int row = first_pixel + i / 2 * 8 + 2 * member + i % 2;
      const int at = S::kMixedAt + place<C>(row, 2 * chunk + group / 4) + group % 4 * 2;
      shared_cast<Fragment>(memory + at)[0] = packed<T>(mixed[0][i], mixed[1][i]);
    }
  }

  __device__ void finish(int y) const {
    const int64_t pixel = int64_t{y} * p.x.line[0] + int64_t{x0 + column} * p.x.place[0];
    const T* const x = static_cast<const T*>(p.image.x) + n * p.x.n + channel + pixel;
    Fragment around[kOfWarp][4] = {};  // raw: waiting takes half the registers
    if (p.residual) {
#pragma unroll
      for (int i = 0; i < 4 * kOfWarp; ++i) {
        const int at = i / 4 * kStep + i % 4;
        if (column + at < columns)
          around[i / 4][i % 4] = __ldg(reinterpret_cast<const Fragment*>(x + at * p.x.place[0]));
      }
    }
    Products d;
    start(d, of_channels(kProjBias));
    multiply_pixels(S::kMixedAt, std::integer_sequence<int, kProj>{}, d);
#pragma unroll
    for (int w = 0; w < kOfWarp; ++w) write(y, column + w * kStep, d[w], around[w]);
  }
  // Four columns of the thread's channels, from `first` on.
  __device__ void write(int y, int first, const float (&d)[2][4], const Fragment (&around)[4]) const {
    float made[2][4];  // [channel][column]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      made[0][i] = d[i / 2][i % 2];
      made[1][i] = d[i / 2][2 + i % 2];
    }
    if (p.residual) {
      const float path = p.path == nullptr ? 1.0f : p.path[n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T elements[2];
        memcpy(static_cast<void*>(elements), &around[i], sizeof(around[i]));
#pragma unroll
        for (int k = 0; k < 2; ++k) made[k][i] = widen(elements[k]) + path * made[k][i];
      }
    }
    T* const out = static_cast<T*>(p.out) + n * p.to.n + channel * p.channel_stride + int64_t{y} * p.to.line[0] +
                   int64_t{x0 + first} * p.to.place[0];
    if (p.channel_stride == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float pair[2] = {made[0][i], made[1][i]};
        if (first + i < columns) store(out + i * p.to.place[0], pair);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      T* const of_channel = out + k * p.channel_stride;
      if (p.along && first + 4 <= columns) {
        store(of_channel, made[k]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float one[1] = {made[k][i]};
        if (first + i < columns) store(of_channel + i * p.to.place[0], one);
      }
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) patm_mix(const __grid_constant__ StripParams p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  uint32_t of_image = blockIdx.x;
  const int x0 = static_cast<int>(p.across.take(of_image)) * S::kColumns;
  const int y0 = static_cast<int>(p.down.take(of_image)) * p.rows;
  const int right = p.image.w - x0, columns = right < S::kColumns ? right : S::kColumns, bottom = y0 + p.rows;
  const SharedSpan<float> floats = shared_cast<float>(memory + S::kFloatsAt);
  const Mix<T, S> mix{{p, memory, floats, p.first_image + of_image, x0, columns}};
  mix.run(y0, bottom < p.image.h ? bottom : p.image.h);
}

// --- Launches --------------------------------------------------------------------------------------------

// Such that the chip's turns take the least time; rows beyond a strip's ends cost about half.
inline int64_t rows_of(int64_t strips, int64_t height, int64_t at_once) {
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
  StripParams p = {image_of(args),
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
                   strides_of(args.x, "x"),
                   strides_of(out, "out"),
                   out.stride[1],
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
using StripOf = std::conditional_t<C == 64, Strip<64, 4, 1, 6>,
                                   std::conditional_t<C == 96, Strip<96, 2, 1, 4>, Strip<128, 2, 2, 4>>>;

}  // namespace wavemix::whole::mix

namespace wavemix {

// This kernel or one of the gradients' takes the most.
int64_t patm_shared_cuda(int64_t c) {
  using namespace whole::mix;
  const size_t mix = c == 64 ? StripOf<64>::kBytes : c == 96 ? StripOf<96>::kBytes : StripOf<128>::kBytes;
  return std::max({static_cast<int64_t>(mix), whole::shared_of_mixed(c), whole::shared_of_waves(c)});
}

void patm_mix_cuda(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::mix::run<decltype(element), whole::mix::StripOf<decltype(channels)::value>>(args, a, out, multiprocessors,
                                                                                       stream);
  });
}

}  // namespace wavemix
