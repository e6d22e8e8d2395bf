// Batch normalisation of an image (n, c, h, w), by channel, in passes that each read and write memory once.
//
// Per-channel arrays hold `c` contiguous values of the accumulation type: double for f64 images, float for the others.
// Sums are carried in double. Every tensor has its own strides: any are right; rows of pixels (NCHW) and rows of
// channels (channels_last) are fast, mixtures of the two included.
#pragma once

#include <cstdint>

#include "wavemix/haar.h"  // DType, Plane

namespace wavemix {

struct BatchNormShape {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// Mean and biased variance over (n, h, w); NaN where there is nothing to average. The variance is accurate for
// |mean| >> standard deviation too. For a given number of threads the result is the same in every run.
void batch_norm_stats_cpu(const BatchNormShape& shape, const Plane& y, void* mean, void* var, int threads);

// out = y * scale + shift (+ residual, unless its data is null). out may be y or residual (the same view).
void batch_norm_apply_cpu(const BatchNormShape& shape, const Plane& y, const void* scale, const void* shift,
                          const Plane& residual, const Plane& out, int threads);

// sum_g = sum of g and sum_gx = sum of g * (y - mean) * invstd, over (n, h, w). Reproducible like the statistics.
void batch_norm_backward_reduce_cpu(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* mean,
                                    const void* invstd, void* sum_g, void* sum_gx, int threads);

// out = a * g + b * y + d, which the caller makes the gradient by y. out may be g or y (the same view).
void batch_norm_backward_apply_cpu(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* a,
                                   const void* b, const void* d, const Plane& out, int threads);

}  // namespace wavemix
