// The gradients of PATM's projections, taps and phases at every pixel, from x, the output's gradient and that of the
// branches' mean.
//
// Along each branch's lines, 64 places a step: d = proj^T grad, four places ahead, is the branch's gradient up to a
// factor and a constant of its image; taps bring it back to the waves, which are made again, and sums of their products
// are the taps' gradient. The third branch's gradient is d alone, and the blocks along W write it.
//
// z and theta go to cells of 16 bytes, one for each pair of channels and place. From there on a warp has four pairs, a
// thread both channels at two places. Convolutions are products on tensor cores: 16 windows of 16 places times a band
// of taps give the four places of each, for both channels. The taps' gradient is windows times waves. Taps and waves
// are in two parts, so that they count in full. What goes to memory passes through the cells, and leaves in words of 16
// bytes.
#include "cuda/patm/whole_wave_tiles.cuh"

namespace wavemix::whole::wave_gradients {

// Sums of a block: the taps' gradient has 14 C floats, each of the others C.
enum Sum { kPre = 2 * kPhaseTaps, kPreTheta, kZ, kThird, kSums };

template <class T, int C>
struct Waves : WaveTiles<T, C> {
  using Tiles = WaveTiles<T, C>;
  using P = typename Tiles::P;
  using Products = float[2][4];  // [two places][row, row + 8 by place]
  using Tiles::find, Tiles::fetch, Tiles::band, Tiles::rest, Tiles::prepare, Tiles::gradients_of;
  using Tiles::kThreads, Tiles::kOfRow, Tiles::x, Tiles::constants, Tiles::word, Tiles::cells, Tiles::thirds;
  using Tiles::p, Tiles::own, Tiles::memory, Tiles::floats, Tiles::lines, Tiles::pixel_place, Tiles::pixel_line;
  static constexpr int kUnroll = C == 64 ? 4 : 2;

  // d to its lines; with `writes` the third branch's gradient to memory.
  __device__ void make_lines(int tile, bool writes) const {
    const Thread<C> t;
    Products d[2] = {};
    const int of_grad = P::kGrad + t.first * C + t.of_columns();
    const int of_proj = P::kProj + t.chunk * kStep * C + t.of_rows();
#pragma unroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) ldmatrix_x4<false>(b[k], memory + (moved<C>(of_grad, step) + k * kStep * C));
      ldmatrix_x4<false>(a, memory + moved<C>(of_proj, step));
#pragma unroll
      for (int k = 0; k < 2; ++k) multiply<T>(d[k], a, b[k]);
    }
    float weight[2], third_weight[2], mean[2], sum_third[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = t.pair() + half * (C / 2);
      weight[half] = constants(kWeight)[output];
      third_weight[half] = constants(kThirdWeight)[output];
      mean[half] = constants(kMean)[output];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int four = (t.first + k * kStep >> 2) + t.member;
      const Four pixels(lines, tile * kStretch + kEarly + 4 * four);
      if (writes) {  // along W
        T* const to = gradients_of(pixels.line * pixel_line + pixels.at) + (2 * C + t.channel());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!pixels.exists(i)) continue;
          const float third[2] = {d[k][i / 2][i % 2] * third_weight[0] + mean[0],
                                  d[k][i / 2][2 + i % 2] * third_weight[1] + mean[1]};
          sum_third[0] += third[0];
          sum_third[1] += third[1];
          store(to + i * (5 * C), third);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          of[i] = pixels.exists(i) ? d[k][i / 2][2 * half + i % 2] * weight[half] + mean[half] : 0.0f;
        const uint2 both = {packed<T>(of[0], of[1]), packed<T>(of[2], of[3])};
        // The first half of word four + 2 and the second of the word before; odd groups change the order, for banks.
        const SharedSpan<uint2> to = shared_cast<uint2>(word(t.pair(), half, four + 1)) + 1;
        to[(t.group & 1)] = both;
        to[1 - (t.group & 1)] = both;
      }
    }
    if (!writes) return;
#pragma unroll
    for (float& sum : sum_third) {
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    }
    if (t.member == 0) {
      const SharedSpan<float2> to = thirds(t.first, t.pair());
      const float2 before = to[0];
      to[0] = float2{before.x + sum_third[0], before.y + sum_third[1]};
    }
  }

  // z and theta, less its center, to their cells.
  __device__ void project() const {
    const Thread<C> t;
    Products z[2], theta[2];
    {
      const float2 bias = shared_cast<float2>(constants(kZBias) + t.channel())[0];
      const float2 center = shared_cast<float2>(constants(kCenter) + t.channel())[0];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          z[i / 2][i % 2][k] = k < 2 ? bias.x : bias.y;
          theta[i / 2][i % 2][k] = k < 2 ? -center.x : -center.y;
        }
      }
    }
    const int of_x = P::kX + t.first * C + t.of_columns();
    const int of_z = t.chunk * kStep * C + t.of_rows();
#pragma unroll kUnroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) ldmatrix_x4<false>(b[k], memory + (moved<C>(of_x, step) + k * kStep * C));
      ldmatrix_x4<false>(a, memory + moved<C>(of_z, step));
#pragma unroll
      for (int k = 0; k < 2; ++k) multiply<T>(z[k], a, b[k]);
      if constexpr (P::kThetaStays) {
        ldmatrix_x4<false>(a, memory + (moved<C>(of_z, step) + C * C));
      } else {
        LineBlock<T, C>().from_caches(p.theta[own.branch], [](int row) { return channel_of_row(row); }, step, a);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) multiply<T>(theta[k], a, b[k]);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        cells(t.pair())[cell((t.first >> 2) + k * 4 + t.member, i)] =
            float4{z[k][i / 2][i % 2], z[k][i / 2][2 + i % 2], theta[k][i / 2][i % 2], theta[k][i / 2][2 + i % 2]};
    }
  }

  struct Sums {  // of the warp's pairs
    float pre[kOfWarp][2] = {}, pre_theta[kOfWarp][2] = {}, z[kOfWarp][2] = {};
    float taps[kOfWarp][2][4] = {};  // [output of the pair][place of a window's 16, place of its four and channel]
  };
  // The gradients of z and theta, to their cells, and sums.
  __device__ void turn(int tile, Sums& sums) const {
    const Thread<C> t;
    // The tap of the band's first place that this thread has, and of the eighth after it.
    const int first_tap = (t.group >> 1) + kPhaseTaps - 2 * t.member, none = kPhaseTaps + 1;
    const int at[2] = {2 * (first_tap < none ? first_tap : none) + (t.group & 1),
                       2 * (first_tap >= none ? first_tap - none : none + 3) + (t.group & 1)};
    bool exists[2];
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      int at_line, line;
      exists[low] = find(tile * kStretch + 4 * t.group + 32 * low + t.member, at_line, line);
    }
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      __syncwarp();  // loads of this pair wait here: ahead of time they would take registers
      const int of = kOfWarp * t.warp + i;
      Fragment windows[2][4];
      float d[2][4] = {};  // [output of the pair][window's and the eighth after its, channel of the pair]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ldmatrix_x4<false>(windows[half], word(of, half, t.of_sixteen + t.sixteenth * 2));
        const uint2 words[2] = {band(of, half)[at[0]], band(of, half)[at[1]]};
        const Fragment high[2] = {words[0].x, words[1].x}, low[2] = {words[0].y, words[1].y};
        mma_m16n8k16<T>(d[half], windows[half], low);
        mma_m16n8k16<T>(d[half], windows[half], high);
      }
      const float4 map = shared_cast<float4>(constants(kMap))[of];
      Fragment waves[2][2][2];  // [output of the pair][high, low][window]
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int own_cell = cell(t.group + 8 * low, t.member);
        const float4 raw = cells(of)[own_cell];
        const float z[2] = {raw.x, raw.y}, theta[2] = {raw.z, raw.w}, scale[2] = {map.x, map.y};
        const float by_cosine[2] = {d[0][2 * low], d[0][2 * low + 1]}, by_sine[2] = {d[1][2 * low], d[1][2 * low + 1]};
        float phase[2] = {theta[0] * scale[0] + map.z, theta[1] * scale[1] + map.w}, sine[2], cosine[2];
        float wave[2][2], d_z[2], d_theta[2];
        const bool turns[2] = {!(phase[0] <= 0.0f), !(phase[1] <= 0.0f)};
#pragma unroll
        for (int k = 0; k < 2; ++k) phase[k] = positive(phase[k]);
        sine_cosine_of_chip(phase, sine, cosine);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float amplitude = exists[low] ? z[k] : 0.0f;
          wave[0][k] = amplitude * cosine[k];
          wave[1][k] = amplitude * sine[k];
          const float turned = by_sine[k] * wave[0][k] - by_cosine[k] * wave[1][k];
          const float pre = turns[k] ? turned : 0.0f;
          d_z[k] = by_cosine[k] * cosine[k] + by_sine[k] * sine[k];
          d_theta[k] = pre * scale[k];
          sums.pre[i][k] += pre;
          sums.pre_theta[i][k] += pre * theta[k];
          if (exists[low]) sums.z[i][k] += d_z[k];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Fragment high = packed<T>(wave[half][0], wave[half][1]);
          waves[half][0][low] = transposed(high);
          waves[half][1][low] = transposed(rest(high, wave[half][0], wave[half][1]));
        }
        // One half of the cell; neighbours in different banks.
        shared_cast<uint2>(cells(of) + own_cell)[(t.group >> 1 & 1)] =
            uint2{packed<T>(d_z[0], d_z[1]), packed<T>(d_theta[0], d_theta[1])};
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Fragment a[4];
        ldmatrix_x4<true>(a, word(of, half, t.of_eight + t.sixteenth * 8 + t.eighth * 2));
        mma_m16n8k16<T>(sums.taps[i][half], a, waves[half][1]);
        mma_m16n8k16<T>(sums.taps[i][half], a, waves[half][0]);
      }
    }
  }
  // From the cells to memory.
  __device__ void write(int tile) const {
    const uint32_t thread = this_thread();
    const int four = static_cast<int>(thread / kStep % kOfRow);  // of pairs
#pragma unroll
    for (int i = 0; i < kStretch / (2 * kStep); ++i) {
      const int at_tile = 2 * i * kStep + static_cast<int>(thread / kStep / kOfRow * kStep + thread % kStep);
      int at, line;
      if (!find(tile * kStretch + at_tile, at, line)) continue;
      Fragment words[2][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint2 both = shared_cast<uint2>(cells(4 * four + k) + cell(at_tile >> 2, at_tile & 3))[at_tile >> 3 & 1];
        words[0][k] = both.x;
        words[1][k] = both.y;
      }
      T* const of_pixel = gradients_of(at * pixel_place + line * pixel_line) + four * kWord;
#pragma unroll
      for (int k = 0; k < 2; ++k)
        __stwb(reinterpret_cast<uint4*>(of_pixel + 3 * k * C),
               uint4{words[k][0], words[k][1], words[k][2], words[k][3]});
    }
  }

  // The last eight places of the warp's lines become the first.
  __device__ void move_on() const {
    const Thread<C> t;
    __syncwarp();
    if (t.lane >= 4 * kOfWarp) return;
    const int line = t.lane >> 1;
    const SharedSpan<uint4> to = shared_cast<uint4>(word(kOfWarp * t.warp + (line >> 1), line & 1, t.lane & 1));
    to[0] = to[kWindows];
  }

  __device__ void run() const {
    prepare();
    Sums sums;
    fetch(own.begin - 1);
    if (own.begin < own.end) {  // before the first tile there are the last places of d, or its first
      cp_async_wait<0>();
      __syncthreads();
      make_lines(own.begin - 1, own.branch == 0 && own.part == 0);
      __syncthreads();
      fetch(own.begin);
      move_on();
    }
#pragma unroll 1
    for (int tile = own.begin; tile < own.end; ++tile) {
      cp_async_wait<0>();
      normalise<T, C, kThreads>(p.image, own.n, kStretch, x());
      __syncthreads();
      project();
      make_lines(tile, own.branch == 0);
      __syncthreads();
      fetch(tile + 1);
      turn(tile, sums);
      __syncthreads();
      write(tile);
      move_on();
    }
    cp_async_wait<0>();  // a part without a tile has not waited for its weights
    finish(sums);
  }

  __device__ void finish(const Sums& sums) const {
    const Thread<C> t;
    float* const out = p.partial + ((own.branch * p.n + own.n) * p.parts + own.part) * (kSums * C);
    const SharedSpan<float> scratch = shared_cast<float>(memory + P::kCellsAt);
#pragma unroll
    for (int i = 0; i < 2 * kOfWarp; ++i) {
      const int channel = 2 * kOfWarp * t.warp + i;
      const float sum[3] = {sums.pre[i / 2][i % 2], sums.pre_theta[i / 2][i % 2], sums.z[i / 2][i % 2]};
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        float all = sum[k];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) all += __shfl_xor_sync(kWholeWarp, all, step);
        if (t.lane == 0) out[(kPre + k) * C + channel] = all;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kOfWarp; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        scratch[((kOfWarp * t.warp + i / 2) * 2 + i % 2) * 128 + (t.group + k / 2 * 8) * 8 + 2 * t.member + k % 2] =
            sums.taps[i / 2][i % 2][k];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * C * kPhaseTaps; i += kThreads) {
      const int tap = i % kPhaseTaps, even = i / kPhaseTaps % 2, output = i / (2 * kPhaseTaps);
      const SharedSpan<float> from = scratch + (output % (C / 2) * 2 + output / (C / 2)) * 128 + even;
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += from[(k + kPhaseTaps - tap) * 8 + 2 * k];
      out[i] = sum;
    }
    for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
      const int pair = i % (C / 2);
      const float2 low = thirds(0, pair)[0], high = thirds(2 * kStep, pair)[0];
      out[kThird * C + i] = i == pair ? low.x + high.x : low.y + high.y;
    }
  }
};

template <class T, int C>
__global__ void __launch_bounds__(kLineThreads<C>, kBlocks<C>)
    patm_wave_gradients(const __grid_constant__ WaveParams p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  const LinePart own(p);
  const int branch = own.branch;
  const int64_t pixels = int64_t{p.image.h} * p.image.w;
  const Waves<T, C> waves{{p, own, memory, shared_cast<float>(memory + WavePlaces<T, C>::kFloats), p.lines[branch],
                           p.x.place[branch], p.x.line[branch], p.grad_strides.place[branch],
                           p.grad_strides.line[branch], branch == 0 ? 1 : p.image.w, branch == 0 ? p.image.w : 1,
                           static_cast<const T*>(p.image.x) + own.n * p.x.n,
                           static_cast<const T*>(p.grad) + own.n * p.grad_strides.n,
                           kept(static_cast<T*>(p.gradients) + (own.n * pixels * 5 + branch) * C)}};
  waves.run();
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int C>
void run(const PatmArgs& args, const PatmWaveGradArgs& grads, void* workspace, int multiprocessors, void* stream) {
  const Cut cut(args, multiprocessors, kBlocks<C>, kStretch);
  WaveParams p = {line_params(args, grads.grad, grads.a, cut), grads.d_mean, grads.center, grads.gradients,
                  static_cast<float*>(workspace)};
  const auto of = static_cast<cudaStream_t>(stream);
  launch_lines<C>("patm_wave_gradients", patm_wave_gradients<T, C>, args, p, WavePlaces<T, C>::kBytes, of);
  sum_rows({p.partial, static_cast<int>(cut.rows(args)), kSums * C, 2, grads.sums}, {}, of);
}

}  // namespace wavemix::whole::wave_gradients

namespace wavemix::whole {

int64_t shared_of_waves(int64_t c) {
  const size_t bytes = c == 64   ? WavePlaces<__half, 64>::kBytes
                       : c == 96 ? WavePlaces<__half, 96>::kBytes
                                 : WavePlaces<__half, 128>::kBytes;
  return static_cast<int64_t>(bytes);
}

}  // namespace wavemix::whole

namespace wavemix {

int64_t patm_wave_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  const whole::Cut cut(args, multiprocessors, args.c == 64 ? whole::kBlocks<64> : whole::kBlocks<128>, whole::kStretch);
  return 2 * cut.rows(args) * whole::wave_gradients::kSums * args.c * static_cast<int64_t>(sizeof(float));
}

void patm_wave_gradients_cuda(const PatmArgs& args, const PatmWaveGradArgs& grads, void* workspace, int multiprocessors,
                              void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::wave_gradients::run<decltype(element), decltype(channels)::value>(args, grads, workspace, multiprocessors,
                                                                             stream);
  });
}

}  // namespace wavemix
