// Partial sums of the whole PATM's backward kernels, added up.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole {
namespace {

constexpr int kColumns = 32, kParts = 8;

struct Params {
  RowSums sums;
  int64_t first;
  Divisor blocks;  // of a group
};

// A block makes 32 columns of one group; threads below each other share the rows.
__global__ void __launch_bounds__(kColumns* kParts) patm_sum_rows(const __grid_constant__ Params p) {
  WAVEMIX_SHARED(float, shared, kParts* kColumns);
  const int lane = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
  uint32_t group = blockIdx.x;
  const int column = static_cast<int>(p.blocks.take(group)) * kColumns + lane;
  const int64_t of = p.first + group;
  float sum = 0.0f;
  if (column < p.sums.columns) {
    const float* const partial = p.sums.partial + of * p.sums.rows * p.sums.columns + column;
#pragma unroll 8
    for (int row = part; row < p.sums.rows; row += kParts) sum += __ldg(partial + int64_t{row} * p.sums.columns);
  }
  shared[part * kColumns + lane] = sum;
  __syncthreads();
  if (part != 0 || column >= p.sums.columns) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += shared[i * kColumns + lane];
  p.sums.out[of * p.sums.columns + column] = sum;
}

}  // namespace

void sum_rows(const RowSums& sums, cudaStream_t stream) {
  const int64_t blocks = ceil_div(sums.columns, kColumns);
  Params p = {sums, 0, Divisor(static_cast<uint32_t>(blocks))};
  Launch launch;
  launch.what = [] { return std::string("patm_sum_rows"); };
  launch.threads = kColumns * kParts;
  launch.stream = stream;
  const int64_t most = WAVEMIX_MAX_BLOCKS, groups = std::max<int64_t>(most / blocks, 1);
  for (int64_t first = 0; first < sums.groups; first += groups) {
    p.first = first;
    launch.blocks = static_cast<unsigned>(std::min(groups, sums.groups - first) * blocks);
    launch(patm_sum_rows, p);
  }
}

}  // namespace wavemix::whole
