// The gradients of PATM's projections, taps and phases at every pixel, from x, the output's gradient and that of the
// branches' mean.
//
// Along each branch's lines: d = proj^T grad, one tile ahead, is the branch's gradient up to a factor and a constant of
// its image; taps bring it back to the waves, which are made again, and sums of their products are the taps' gradient.
// The third branch's gradient is d alone, and the blocks along W write it.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole {
namespace {

template <int C>
constexpr int kBlocks = C == 64 ? 2 : 1;

// C floats each: the first four belong to input channels, the others to outputs.
enum Constant { kZBias, kScale, kShift, kCenter, kWeight, kThirdWeight, kMean, kConstants };
// Sums of a block: the taps' gradient has 14 C floats, each of the others C.
enum Sum { kPre = 2 * kPhaseTaps, kPreTheta, kZ, kThird, kSums };

template <class T, int C>
struct Places {
  // In elements: z, theta, proj's columns.
  static constexpr int kX = 3 * C * C, kGrad = kX + 2 * kPlaces * C, kBranch = kGrad + 2 * kPlaces * C;
  static constexpr int kFloats = kBranch + C * kLine;
  // In floats.
  static constexpr int kConstantsAt = 16 * C;
  static constexpr size_t kBytes = size_t{2} * kFloats + size_t{4} * (kConstantsAt + kConstants * C);
};

struct Params : LineParams {
  const float *d_mean, *center;
  void* gradients;  // (n, h, w, 5, C)
  float* partial;   // (2, n, parts, kSums, C)
};

template <class T, int C>
__global__ void __launch_bounds__(kLineThreads<C>, kBlocks<C>) patm_wave_gradients(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  using P = Places<T, C>;
  constexpr int kThreads = kLineThreads<C>, kTile = kPlaces * C;
  using Products = typename LineBlock<T, C>::Products;
  const LineBlock<T, C> block;
  const LinePart own(p);
  const int64_t n = own.n;
  const int branch = own.branch, part = own.part, begin = own.begin, end = own.end;
  const Lines& lines = p.lines[branch];
  const auto is_tile = [&](int tile) { return tile >= 0 && tile < lines.tiles; };
  const auto x_tile = [&](int tile) { return memory + (P::kX + (tile & 1) * kTile); };
  const auto grad_tile = [&](int tile) { return memory + (P::kGrad + (tile & 1) * kTile); };
  const SharedSpan<uint32_t> line = shared_cast<uint32_t>(memory + P::kBranch) + block.pair() * kLine;
  const SharedSpan<float> floats = shared_cast<float>(memory + P::kFloats);
  const auto constants = [&](int which) { return floats + (P::kConstantsAt + which * C); };
  const T* const x = static_cast<const T*>(p.image.x) + n * p.x.n;
  const T* const grad = static_cast<const T*>(p.grad) + n * p.grad_strides.n;
  // Copies for the step of tile `step`: x of this tile, the gradient of the next.
  const auto fetch_for = [&](int step) {
    if (step >= begin && step < end) block.fetch(x, p.x, branch, lines, step, x_tile(step));
    if (step < end && is_tile(step + 1))
      block.fetch(grad, p.grad_strides, branch, lines, step + 1, grad_tile(step + 1));
    cp_async_commit();
  };
  block.keep_projection(p.z[branch], memory);
  block.keep_projection(p.theta[branch], memory + C * C);
  block.keep_columns(p.proj, memory + 2 * C * C);
  fetch_for(begin - 2);
  fetch_for(begin - 1);
  block.keep_taps(p.taps[branch], floats);
  {
    const float path = p.path == nullptr ? 1.0f : p.path[n];
    for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
      const float scale = p.scale[branch][i], bias = value_or_zero<T>(p.theta_bias[branch], i);
      constants(kZBias)[i] = value_or_zero<T>(p.z_bias[branch], i);
      constants(kScale)[i] = scale;
      constants(kShift)[i] = p.shift[branch][i] + bias * scale;
      constants(kCenter)[i] = (p.center == nullptr ? 0.0f : p.center[branch * C + i]) - bias;
      constants(kWeight)[i] = path * p.a[(branch * p.n + n) * C + i];
      constants(kThirdWeight)[i] = path * p.a[(2 * p.n + n) * C + i];
      constants(kMean)[i] = p.d_mean[n * C + i];
    }
  }
  const int step_of_place = branch == 0 ? 1 : p.image.w, step_of_line = branch == 0 ? p.image.w : 1;
  T* const gradients = static_cast<T*>(p.gradients) + n * p.image.h * p.image.w * (5 * C) + block.channel();
  const auto pixel = [&](const Four& four, int i) { return gradients + static_cast<int64_t>(four.at(i)) * (5 * C); };
  float d_taps[2][2][kPhaseTaps] = {};  // [output of the pair][channel of the pair]
  float sum_pre[2] = {}, sum_pre_theta[2] = {}, sum_z[2] = {}, sum_third[2] = {};
  Four four, four_of_next;
  int slot = 0;  // of the ring, the tile's
#pragma unroll 1
  for (int tile = begin - 2; tile < end; ++tile, slot = after(slot)) {
    const int next = tile + 1;
    four = four_of_next;
    cp_async_wait<1>();
    if (tile >= begin) normalise<T, C, kThreads>(p.image, n, kPlaces, x_tile(tile));
    __syncthreads();
    {
      Products d = {};
      uint32_t words[4] = {};
      if (is_tile(next)) {
        block.multiply_places(grad_tile(next), memory + 2 * C * C, d);
        four_of_next = Four(lines, next * kPlaces + block.first + 4 * block.member, step_of_place, step_of_line);
        const bool mine = branch == 0 && next >= begin && next < end;
        float weight[2], third_weight[2], mean[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = block.pair() + half * (C / 2);
          weight[half] = constants(kWeight)[output];
          third_weight[half] = constants(kThirdWeight)[output];
          mean[half] = constants(kMean)[output];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!four_of_next.exists(i)) continue;
          const float of[2] = {d[i / 2][i % 2], d[i / 2][2 + i % 2]};
          words[i] = packed<T>(of[0] * weight[0] + mean[0], of[1] * weight[1] + mean[1]);
          if (!mine) continue;
          const float third[2] = {of[0] * third_weight[0] + mean[0], of[1] * third_weight[1] + mean[1]};
          sum_third[0] += third[0];
          sum_third[1] += third[1];
          store(pixel(four_of_next, i) + 2 * C, third);
        }
      }
      shared_cast<uint4>(line + block.at(after(slot)))[0] = uint4{words[0], words[1], words[2], words[3]};
    }
    Products z = {}, theta = {};
    if (tile >= begin) block.multiply_places(x_tile(tile), memory, z, theta);
    __syncthreads();
    fetch_for(tile + 2);
    if (tile < begin) continue;
    float near[2][3 * kMargin];
    {
      uint4 words[3];
      block.around(line, slot, words);
      block.unpack(words, near);
    }
    float d_z[2][4], d_theta[2][4];  // [channel of the pair]
#pragma unroll
    for (int even = 0; even < 2; ++even) {
      const int channel = block.channel() + even;
      const float bias = constants(kZBias)[channel], scale = constants(kScale)[channel];
      const float shift = constants(kShift)[channel], center = constants(kCenter)[channel];
      float phase[4], amplitude[4], sine[4], cosine[4];
      bool turns[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float before = theta[i / 2][2 * even + i % 2] * scale + shift;
        turns[i] = !(before <= 0.0f);
        phase[i] = before < 0.0f ? 0.0f : before;
        amplitude[i] = four.exists(i) ? z[i / 2][2 * even + i % 2] + bias : 0.0f;
      }
      sine_cosine<T>(phase, sine, cosine);
      float d_wave[2][4] = {};  // of cosine and sine
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tap[8];
        block.load_taps(floats, half, even, tap);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float wave = amplitude[i] * (half == 0 ? cosine[i] : sine[i]);
#pragma unroll
          for (int k = 0; k < kPhaseTaps; ++k) {
            const float of_branch = near[half][kMargin + kReach + i - k];
            d_wave[half][i] += tap[k] * of_branch;
            d_taps[half][even][k] += wave * of_branch;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float turn = amplitude[i] * (d_wave[1][i] * cosine[i] - d_wave[0][i] * sine[i]);
        const float pre = turns[i] && four.exists(i) ? turn : 0.0f;
        d_z[even][i] = four.exists(i) ? d_wave[0][i] * cosine[i] + d_wave[1][i] * sine[i] : 0.0f;
        d_theta[even][i] = pre * scale;
        sum_pre[even] += pre;
        sum_pre_theta[even] += pre * (theta[i / 2][2 * even + i % 2] - center);
        sum_z[even] += d_z[even][i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!four.exists(i)) continue;
      const float of_z[2] = {d_z[0][i], d_z[1][i]}, of_theta[2] = {d_theta[0][i], d_theta[1][i]};
      T* const to = pixel(four, i);
      store(to + branch * C, of_z);
      store(to + (3 + branch) * C, of_theta);
    }
  }
  cp_async_wait<0>();  // a part without a tile has not waited for its weights
  float* const out = p.partial + ((branch * p.n + n) * p.parts + part) * (kSums * C);
  const SharedSpan<float> scratch = shared_cast<float>(memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int even = 0; even < 2; ++even)
      block.add_up(d_taps[half][even], scratch,
                   [&](int k, float sum) { out[((block.pair() + half * (C / 2)) * 2 + even) * kPhaseTaps + k] = sum; });
  }
  float* const more = out + block.channel();
  block.add_up(sum_pre, scratch, [&](int even, float sum) { more[kPre * C + even] = sum; });
  block.add_up(sum_pre_theta, scratch, [&](int even, float sum) { more[kPreTheta * C + even] = sum; });
  block.add_up(sum_z, scratch, [&](int even, float sum) { more[kZ * C + even] = sum; });
  block.add_up(sum_third, scratch, [&](int half, float sum) { out[kThird * C + block.pair() + half * (C / 2)] = sum; });
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int C>
void run(const PatmArgs& args, const PatmWaveGradArgs& grads, void* workspace, int multiprocessors, void* stream) {
  const Cut cut(args, multiprocessors, kBlocks<C>);
  Params p = {line_params(args, grads.grad, grads.a, cut), grads.d_mean, grads.center, grads.gradients,
              static_cast<float*>(workspace)};
  const auto of = static_cast<cudaStream_t>(stream);
  launch_lines<C>("patm_wave_gradients", patm_wave_gradients<T, C>, args, p, Places<T, C>::kBytes, of);
  sum_rows({p.partial, static_cast<int>(cut.rows(args)), kSums * C, 2, grads.sums}, {}, of);
}

}  // namespace
}  // namespace wavemix::whole

namespace wavemix {

int64_t patm_wave_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  const whole::Cut cut(args, multiprocessors, args.c == 64 ? whole::kBlocks<64> : whole::kBlocks<128>);
  return 2 * cut.rows(args) * whole::kSums * args.c * static_cast<int64_t>(sizeof(float));
}

void patm_wave_gradients_cuda(const PatmArgs& args, const PatmWaveGradArgs& grads, void* workspace, int multiprocessors,
                              void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::run<decltype(element), decltype(channels)::value>(args, grads, workspace, multiprocessors, stream);
  });
}

}  // namespace wavemix
