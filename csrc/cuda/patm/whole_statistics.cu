// Batch statistics of the phases from the moments of the image that they are linear in, and the gradient through them.
//
// Few values for each number of the chip's threads: a block makes one row, threads side by side its columns, below each
// other a share of what is summed.
#include "cuda/patm/whole.cuh"

namespace wavemix::whole::statistics {

constexpr int kShares = 4;
template <int C>
constexpr int kThreads = kShares * C;

// Sums over a block's columns and shares, in one order; the result is every thread's. `scratch` holds a warp's each.
template <int C, class A>
__device__ inline A add_up(A value, SharedSpan<A> scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  __syncthreads();  // of what was there before
  if (threadIdx.x % 32 == 0) scratch[static_cast<int>(threadIdx.x) / 32] = value;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads<C> / 32; ++i) sum += scratch[i];
  return sum;
}

// --- Forward ---------------------------------------------------------------------------------------------

struct StatisticsParams {
  const void *theta[2], *theta_bias[2];
  PatmStatisticsArgs of;
};

// A block makes one channel of one phase: mean w m + b, variance w Cov w^T.
template <class T, int C>
__global__ void __launch_bounds__(kThreads<C>) patm_statistics(const __grid_constant__ StatisticsParams p) {
  WAVEMIX_SHARED(double, weights, C);
  WAVEMIX_SHARED(double, scratch, kThreads<C> / 32);
  const int column = static_cast<int>(threadIdx.x) % C, share = static_cast<int>(threadIdx.x) / C;
  const int branch = static_cast<int>(blockIdx.x) / C, channel = static_cast<int>(blockIdx.x) % C;
  const double own = static_cast<double>(widen(static_cast<const T*>(p.theta[branch])[channel * C + column]));
  if (share == 0) weights[column] = own;
  __syncthreads();
  double product = 0;
#pragma unroll 8
  for (int k = 0; k < C / kShares; ++k) {
    const int row = share * (C / kShares) + k;
    product += weights[row] * __ldg(p.of.covariance + row * C + column);
  }
  const double variance = add_up<C>(product * own, SharedSpan<double>(scratch));
  const double mean = add_up<C>(share == 0 ? own * __ldg(p.of.mean + column) : 0.0, SharedSpan<double>(scratch));
  if (threadIdx.x != 0) return;
  const float bias = value_or_zero<T>(p.theta_bias[branch], channel);
  const float* const of_norm[2] = {p.of.weight[branch], p.of.bias[branch]};
  const float centre = static_cast<float>(mean + static_cast<double>(bias));
  const double positive = variance < 0 ? 0 : variance;
  const float invstd = 1.0f / sqrtf(static_cast<float>(positive + p.of.eps[branch]));
  const float scale = of_norm[0] == nullptr ? invstd : invstd * of_norm[0][channel];
  const float made[5] = {centre, static_cast<float>(positive), invstd, scale,
                         (of_norm[1] == nullptr ? 0.0f : of_norm[1][channel]) - centre * scale};
#pragma unroll
  for (int k = 0; k < 5; ++k) p.of.out[(k * 2 + branch) * C + channel] = made[k];
}

// --- Backward --------------------------------------------------------------------------------------------

struct ThroughParams {
  const void* theta[2];
  const float* scale[2];
  float count;
  PatmThroughArgs of;
};

// Theta's gradient d, summed in `sums`, gets rise (theta - mean) + offset, by channel (ops/patm/statistics.py).
struct Line {
  float rise, offset;
};
__device__ inline Line line_of(const ThroughParams& p, int branch, int channel, int c) {
  const float* const sums = p.of.sums + branch * p.of.sums_stride + channel;
  const float factor = p.scale[branch][channel] * (-1.0f / p.count), invstd = p.of.invstd[branch * c + channel];
  return {factor * sums[c] * (invstd * invstd), factor * sums[0]};
}

// Blocks first make the rows of the weights' gradients, of both phases: count (rise theta Cov + offset mean). Then
// those of the matrix sum of theta^T rise theta, which is symmetric, each over its largest absolute value, and the
// vector theta^T offset - matrix mean.
template <class T, int C>
__global__ void __launch_bounds__(kThreads<C>) patm_through_statistics(const __grid_constant__ ThroughParams p) {
  WAVEMIX_SHARED(float, rises, 2 * C);
  WAVEMIX_SHARED(float, shared, kThreads<C>);
  WAVEMIX_SHARED(float, scratch, kThreads<C> / 32);
  const int thread = static_cast<int>(threadIdx.x), column = thread % C, share = thread / C;
  const auto theta = [&](int row, int of) {  // of both phases, one below the other
    return widen(static_cast<const T*>(p.theta[row / C])[row % C * C + of]);
  };
  const auto over_shares = [&](float value) {
    shared[thread] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kShares; ++i) sum += shared[i * C + column];
    return sum;
  };
  const int row = static_cast<int>(blockIdx.x);
  if (row < 2 * C) {
    const Line line = line_of(p, row / C, row % C, C);
    float product = 0.0f;
#pragma unroll 8
    for (int k = 0; k < C / kShares; ++k) {
      const int of = share * (C / kShares) + k;
      product += theta(row, of) * static_cast<float>(__ldg(p.of.covariance + of * C + column));
    }
    product = over_shares(product);
    if (share == 0)
      p.of.d_theta[row * C + column] =
          p.count * (line.rise * product + line.offset * static_cast<float>(__ldg(p.of.mean + column)));
    return;
  }
  const int own = row - 2 * C;
  float offset = 0.0f;
  for (int i = thread; i < 2 * C; i += kThreads<C>) {
    const Line line = line_of(p, i / C, i % C, C);
    const float weight = theta(i, own);
    rises[i] = line.rise * weight;
    offset += line.offset * weight;
  }
  __syncthreads();
  float product = 0.0f;
#pragma unroll 8
  for (int k = 0; k < 2 * C / kShares; ++k) {
    const int of = share * (2 * C / kShares) + k;
    product += rises[of] * theta(of, column);
  }
  product = over_shares(product);
  const float mean = static_cast<float>(__ldg(p.of.mean + column));
  const float vector = add_up<C>(share == 0 ? offset - product * mean : offset, SharedSpan<float>(scratch));
  float size = fabsf(product);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) size = fmaxf(size, __shfl_xor_sync(kWholeWarp, size, step));
  __syncthreads();
  if (thread % 32 == 0) scratch[thread / 32] = size;
  __syncthreads();
  constexpr float kSmallest = 1.17549435e-38f;
  size = kSmallest;
#pragma unroll
  for (int i = 0; i < kThreads<C> / 32; ++i) size = fmaxf(size, scratch[i]);
  if (share != 0) return;
  const float of_size[1] = {product / size};
  store(static_cast<T*>(p.of.matrix) + column * C + own, of_size);
  if (thread != 0) return;
  p.of.vector[own] = vector;
  p.of.size[own] = size;
}

template <class T, int C, class Kernel, class Params>
void run(const char* name, Kernel kernel, const PatmArgs& args, int blocks, const Params& p, void* stream) {
  Launch launch;
  launch.what = [&] { return std::string(name) + " (" + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  launch.blocks = static_cast<unsigned>(blocks);
  launch.threads = kThreads<C>;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch(kernel, p);
}

}  // namespace wavemix::whole::statistics

namespace wavemix {

void patm_statistics_cuda(const PatmArgs& args, const PatmStatisticsArgs& of, void* stream) {
  whole::check_kind(args);
  const whole::statistics::StatisticsParams p = {
      {args.theta_h, args.theta_w}, {args.theta_h_bias, args.theta_w_bias}, of};
  whole::dispatch(args, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int C = decltype(channels)::value;
    whole::statistics::run<T, C>("patm_statistics", whole::statistics::patm_statistics<T, C>, args, 2 * C, p, stream);
  });
}

void patm_through_statistics_cuda(const PatmArgs& args, const PatmThroughArgs& of, void* stream) {
  whole::check_kind(args);
  const whole::statistics::ThroughParams p = {
      {args.theta_h, args.theta_w},
      {static_cast<const float*>(args.scale_h), static_cast<const float*>(args.scale_w)},
      static_cast<float>(std::max<int64_t>(args.n * args.h * args.w, 1)),
      of};
  whole::dispatch(args, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int C = decltype(channels)::value;
    whole::statistics::run<T, C>("patm_through_statistics", whole::statistics::patm_through_statistics<T, C>, args,
                                 3 * C, p, stream);
  });
}

}  // namespace wavemix
