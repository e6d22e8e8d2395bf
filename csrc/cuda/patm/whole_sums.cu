// Partial sums of the whole PATM's backward kernels, added up.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole::row_sums {

constexpr int kColumns = 32, kParts = 8, kAtOnce = 8;

struct Params {
  RowSums sums[2];
  int64_t first, blocks_of_first;
  Divisor blocks[2];  // of a group
};

// A block makes 32 columns of one group; threads below each other share the rows.
__global__ void __launch_bounds__(kColumns* kParts) patm_sum_rows(const __grid_constant__ Params p) {
  WAVEMIX_SHARED(float, shared, kParts* kColumns);
  const int lane = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t block = p.first + blockIdx.x;
  const int which = block < p.blocks_of_first ? 0 : 1;
  const RowSums& sums = p.sums[which];
  uint32_t group = static_cast<uint32_t>(block - which * p.blocks_of_first);
  const int column = static_cast<int>(p.blocks[which].take(group)) * kColumns + lane;
  float sum = 0.0f;
  if (column < sums.columns) {
    const float* const partial = sums.partial + static_cast<int64_t>(group) * sums.rows * sums.columns + column;
    for (int row = part; row < sums.rows; row += kParts * kAtOnce) {
      float values[kAtOnce];  // all on their way before the first is added
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int of = row + k * kParts;
        values[k] = of < sums.rows ? __ldg(partial + static_cast<int64_t>(of) * sums.columns) : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += values[k];
    }
  }
  shared[part * kColumns + lane] = sum;
  __syncthreads();
  if (part != 0 || column >= sums.columns) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += shared[i * kColumns + lane];
  if (column >= sums.more_from) sum += __ldg(sums.more + (column - sums.more_from));
  sums.out[static_cast<int64_t>(group) * sums.columns + column] = sum;
}

}  // namespace wavemix::whole::row_sums

namespace wavemix::whole {

void sum_rows(const RowSums& first, const RowSums& second, cudaStream_t stream) {
  using namespace row_sums;
  const auto of_group = [](const RowSums& of) { return std::max<int64_t>(1, ceil_div(of.columns, kColumns)); };
  const int64_t of_first = first.groups * of_group(first), all = of_first + second.groups * of_group(second);
  if (std::max(of_first, all - of_first) > Divisor::kMaxDividend)
    throw std::invalid_argument("x: " + std::to_string(all) + " blocks of sums are too many");
  Params p = {{first, second},
              0,
              of_first,
              {Divisor(static_cast<uint32_t>(of_group(first))), Divisor(static_cast<uint32_t>(of_group(second)))}};
  Launch launch;
  launch.what = [] { return std::string("patm_sum_rows"); };
  launch.threads = kColumns * kParts;
  launch.stream = stream;
  const int64_t most = WAVEMIX_MAX_BLOCKS;
  for (; p.first < all; p.first += most) {
    launch.blocks = static_cast<unsigned>(std::min(most, all - p.first));
    launch(patm_sum_rows, p);
  }
}

}  // namespace wavemix::whole
