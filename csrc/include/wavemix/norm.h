// Batch normalisation of an image (n, c, h, w), by channel, in passes that each read and write memory once.
//
// Per-channel arrays hold `c` contiguous values of the accumulation type: double for f64 images, float for the others.
// Sums are carried in double. Every tensor has its own strides: any are right; rows of pixels (NCHW) and rows of
// channels (channels_last) are fast, mixtures of the two included.
#pragma once

#include "wavemix/types.h"

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

// --- The norm in front of a residual branch, and the sum behind it ------------------------------------------
//
// Images around the branch (x, what is added to it, their gradients) have one type, images of the branch another
// or the same: half where the former are f32 under autocast. Any strides do. Each result is rounded once.

struct PreNormShape {
  BatchNormShape around;  // its dtype: that of the images around the branch
  DType branch = DType::f32;
};

// Whether the kernels have the pair: equal types, or f32 around a half type.
inline bool pre_norm_types(DType around, DType branch) {
  return around == branch || (around == DType::f32 && (branch == DType::f16 || branch == DType::bf16));
}

struct PreNormArgs {
  PreNormShape shape;
  bool by_image = false;       // mean and invstd are (n), else (c)
  const void* mean = nullptr;  // x was normalised by these
  const void* invstd = nullptr;
  const void* weight = nullptr;  // (c) or null
  const void* bias = nullptr;    // (c) or null
};

// out = (x - mean) * invstd * weight + bias, an image of the branch.
void pre_norm_apply_cpu(const PreNormArgs& args, const Plane& x, const Plane& out, int threads);

// `grad` is the gradient of that output. Makes d_weight and d_bias (c), and out = the gradient of x + `around`. The
// statistics are x's own (`own`) or given.
void pre_norm_backward_cpu(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
                           const Plane& out, void* d_weight, void* d_bias, int threads);

// out = x + path * branch, path (n) or null for 1. out may be branch where the types are one.
void pre_norm_join_cpu(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path,
                       const Plane& out, int threads);

}  // namespace wavemix
