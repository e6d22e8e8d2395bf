// One level of Haar along any axes of a tensor, with the order, signs and scale of the bands free.
#pragma once

#include "wavemix/types.h"

namespace wavemix {

constexpr int kMaxHaarAxes = 3;
constexpr int kMaxOuterAxes = 4;

// An axis that is transformed. Its samples are the tensor's `size`, after `front` more and before as many as make it
// even: analysis reads front_weight * sample 0 there and tail_weight * sample tail_index, synthesis writes neither.
struct HaarAxis {
  int64_t size = 0, count = 0;  // of samples, and of coefficients: (front + size + 1) / 2
  int64_t x_stride = 0, y_stride = 0;
  int64_t front = 0, tail_index = 0;
  double front_weight = 0, tail_weight = 0;
};

// `x` holds samples, `y` the first `present` of 2^axes bands, the k-th `band[k]` elements on; the others are zero. Band
// k has weight[k] times the sums and differences of pattern[k], whose bit `axes - 1 - i` says that axis i takes
// differences. Synthesis sums weight[k] * band k likewise.
struct HaarBlocksArgs {
  DType dtype = DType::f32;
  void* x = nullptr;
  void* y = nullptr;
  int64_t band[1 << kMaxHaarAxes] = {};
  int present = 0;
  int axes = 0;
  HaarAxis axis[kMaxHaarAxes];
  int pattern[1 << kMaxHaarAxes] = {};
  double weight[1 << kMaxHaarAxes] = {};
  int64_t outer[kMaxOuterAxes] = {1, 1, 1, 1}, outer_x[kMaxOuterAxes] = {}, outer_y[kMaxOuterAxes] = {};
  // Work goes by rows: along the last transformed axis (inner = 0; its front must be 0), or along another axis.
  int64_t inner = 0, inner_x = 0, inner_y = 0;
};

// f64 computes in double, everything else in float; each output is rounded once.
void haar_blocks_analysis_cpu(const HaarBlocksArgs& args, int threads);
void haar_blocks_synthesis_cpu(const HaarBlocksArgs& args, int threads);

}  // namespace wavemix
