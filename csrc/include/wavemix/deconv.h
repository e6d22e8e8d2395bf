// The Waveblock's transposed convolution: 4x4 taps, stride 2, padding 1, so (n, f, h, w) becomes (n, o, 2h, 2w).
#pragma once

#include "wavemix/types.h"

namespace wavemix {

// Channels of both images are contiguous (stride[1] = 1). f64 computes in double, everything else in float.
struct DeconvArgs {
  DType dtype = DType::f32;
  int64_t n = 0, f = 0, o = 0, h = 0, w = 0;
  Plane u, y;                    // (n, f, h, w) and (n, o, 2h, 2w); backward has y's gradient here
  const void* weight = nullptr;  // (f, o, 4, 4), contiguous, in the images' dtype
  // Backward only, optional: y is the gradient of the normalised output, and the output's own gradient is
  // a y + b (output - mean) + d, with arrays (o) in the arithmetic type: BatchNorm's backward, made on the way.
  Plane output;
  const void *a = nullptr, *b = nullptr, *mean = nullptr, *d = nullptr;
  // Forward only, optional, without statistics: added to y before it is rounded; shaped as y.
  Plane residual;
};

// y from u; bias (o), in the images' dtype, may be null. mean and var (o), in the arithmetic type, or both null: the
// statistics over n, 2h, 2w of y before it is rounded to a half type; var is biased.
void deconv_forward_cpu(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads);

// Made from the gradient of y, in the images' dtype; either may be absent. d_u's channels are contiguous.
struct DeconvGradArgs {
  Plane d_u;                 // needs the weight
  void* d_weight = nullptr;  // needs u; (f, o, 4, 4), contiguous
};
// One pass over the gradient of y (and over the output, where there is one) makes both.
void deconv_backward_cpu(const DeconvArgs& args, const DeconvGradArgs& grads, int threads);

}  // namespace wavemix
