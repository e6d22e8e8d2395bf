// A 1x1 convolution between an image in either memory order and one whose channels are contiguous.
#pragma once

#include <cstdint>

#include "wavemix/haar.h"  // DType, Plane

namespace wavemix {

// f64 computes in double, everything else in float; each output is rounded once. The pixels of a plane are evenly apart
// (stride[2] = w stride[3]) in every Plane here, and of x either channels or pixels are contiguous.
struct PointwiseArgs {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, o = 0, h = 0, w = 0;
  Plane x;                       // (n, c, h, w), or its gradient
  Plane r;                       // (n, o, h, w), channels contiguous, or its gradient
  const void* weight = nullptr;  // (o, c), contiguous, in the images' dtype
};

// r = weight x + bias; bias (o), in the images' dtype, may be null.
void pointwise_forward_cpu(const PointwiseArgs& args, const void* bias, int threads);
// x = transpose(weight) r + add; add in the order of x, or null data.
void pointwise_input_grad_cpu(const PointwiseArgs& args, const Plane& add, int threads);
// The gradients of weight and, where not null, of bias (o), in the images' dtype.
void pointwise_weight_grad_cpu(const PointwiseArgs& args, void* d_weight, void* d_bias, int threads);

}  // namespace wavemix
