// From the sums over each image of the output's gradient times its branches, G, to the gradients of PATM's branch
// weights (the diagonal of proj^T G) and of proj (G times branch weights).
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole::mixed_sums {

constexpr int kSlice = 16, kShares = 2;  // rows of a block, threads of a column

struct Params {
  const float *partial, *a, *path;
  const void *proj, *z_c, *z_c_bias;
  float *d_a, *d_proj;  // partial: (3, n, slices, C), and (n, 3, C C + C)
  int64_t n, first_image;
  int parts;
};

// A block has one image, one branch and some rows of its G; a thread every second row of a column.
template <class T, int C>
__global__ void __launch_bounds__(kShares* C) patm_mixed_sums(const __grid_constant__ Params p) {
  constexpr int kSlices = C / kSlice, kOfThread = kSlice / kShares;
  WAVEMIX_SHARED(float, of_x, kSlice* C);
  WAVEMIX_SHARED(float, bias, kSlice);
  WAVEMIX_SHARED(float, sums, kShares* C);
  const int thread = static_cast<int>(threadIdx.x), column = thread % C, share = thread / C;
  const int first_row = static_cast<int>(blockIdx.x) % kSlices * kSlice;
  const int which = static_cast<int>(blockIdx.x) / kSlices % 3, branch = which < 2 ? which : column / (C / 2);
  const int64_t n = p.first_image + blockIdx.x / (3 * kSlices);
  const float path = p.path == nullptr ? 1.0f : __ldg(p.path + n);
  const float weight = path * __ldg(p.a + (which * p.n + n) * C + column);
  const T* const proj = static_cast<const T*>(p.proj) + (first_row + share) * C + column;
  // Rows share, share + kShares, ... of G, or of x's.
  const int width = which < 2 ? C : C / 2;
  const float* const from = p.partial + (n * 2 + branch) * p.parts * kPartial<C> +
                            (which < 2 ? 0 : kOfHalf<C>)+(first_row + share) * width + column % width;
  float g[kOfThread] = {}, of_proj[kOfThread], of_column = 0.0f;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) of_proj[i] = widen(proj[kShares * i * C]);
#pragma unroll 1
  for (int part = 0; part < p.parts; ++part) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) g[i] += __ldg(from + part * kPartial<C> + kShares * i * width);
  }
  if (which == 2) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      of_x[(share + kShares * i) * C + column] = g[i];
      g[i] = 0.0f;
    }
    if (thread < kSlice) {
      float sum = 0.0f;
      for (int part = 0; part < p.parts; ++part)
        sum += __ldg(p.partial + (n * 2 * p.parts + part) * kPartial<C> + kOfBias<C> + first_row + thread);
      bias[thread] = sum;
    }
    __syncthreads();
    const T* const weights = static_cast<const T*>(p.z_c) + column * C;
#pragma unroll 1
    for (int k = 0; k < C; k += kWord) {
      float of[kWord];
      load(weights + k, of);
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
#pragma unroll
        for (int j = 0; j < kWord; ++j) g[i] += of_x[(share + kShares * i) * C + k + j] * of[j];
      }
    }
    const float third_bias = value_or_zero<T>(p.z_c_bias, column);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) g[i] += third_bias * bias[share + kShares * i];
  }
  float* const d_proj = p.d_proj + (n * 3 + which) * (C * C + C);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    of_column += g[i] * of_proj[i];
    d_proj[(first_row + share + kShares * i) * C + column] = weight * g[i];
  }
  sums[share * C + column] = of_column;
  if (thread < kSlice) d_proj[C * C + first_row + thread] = which == 2 ? path * bias[thread] : 0.0f;
  __syncthreads();
  if (share == 0)
    p.d_a[((which * p.n + n) * kSlices + first_row / kSlice) * C + column] = path * (sums[column] + sums[C + column]);
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int C>
void run(const PatmArgs& args, const MixedSums& sums, float* workspace, cudaStream_t stream) {
  float* const d_proj = workspace + 3 * args.n * (C / kSlice) * C;
  Params p = {sums.partial,
              sums.a,
              static_cast<const float*>(args.path),
              args.proj,
              args.z_c,
              args.z_c_bias,
              workspace,
              d_proj,
              args.n,
              0,
              sums.parts};
  Launch launch;
  launch.what = [&] { return std::string("patm_mixed_sums (") + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  launch.threads = kShares * C;
  launch.stream = stream;
  const int64_t of_image = 3 * (C / kSlice), most = WAVEMIX_MAX_BLOCKS, images = std::max<int64_t>(most / of_image, 1);
  for (; p.first_image < args.n; p.first_image += images) {
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - p.first_image) * of_image);
    launch(patm_mixed_sums<T, C>, p);
  }
  sum_rows({workspace, C / kSlice, C, 3 * args.n, sums.d_a},
           {d_proj, static_cast<int>(3 * args.n), C * C + C, 1, sums.d_proj}, stream);
}

}  // namespace wavemix::whole::mixed_sums

namespace wavemix::whole {

int64_t mixed_floats(const PatmArgs& args) {
  return 3 * args.n * ((args.c / mixed_sums::kSlice) * args.c + args.c * args.c + args.c);
}

void sum_mixed(const PatmArgs& args, const MixedSums& sums, float* workspace, cudaStream_t stream) {
  dispatch(args, [&](auto element, auto channels) {
    mixed_sums::run<decltype(element), decltype(channels)::value>(args, sums, workspace, stream);
  });
}

}  // namespace wavemix::whole
