// The normalisation in front of a residual branch and the sum behind it, on images (n, c, h, w) of any strides.
//
// Images around the branch (x, what is added to it, their gradients) are of one type, images of the branch of another
// or the same: half where the former are f32 under autocast. Statistics and affine parameters are of the arithmetic
// type, double for f64 and float for the others; each result is rounded once.
#pragma once

#include <cstdint>

#include "wavemix/batch_norm.h"

namespace wavemix {

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
  const void* mean = nullptr;  // what x was normalised by
  const void* invstd = nullptr;
  const void* weight = nullptr;  // (c) or null
  const void* bias = nullptr;    // (c) or null
};

// out = (x - mean) * invstd * weight + bias, an image of the branch.
void pre_norm_apply_cpu(const PreNormArgs& args, const Plane& x, const Plane& out, int threads);

// From the gradient of that output: d_weight and d_bias (c), and out = the gradient of x + `around`, where the
// statistics are x's own (`own`) or given.
void pre_norm_backward_cpu(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
                           const Plane& out, void* d_weight, void* d_bias, int threads);

// out = x + path * branch, path (n) or null for 1. out may be branch where the types are one.
void pre_norm_join_cpu(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path,
                       const Plane& out, int threads);

}  // namespace wavemix
