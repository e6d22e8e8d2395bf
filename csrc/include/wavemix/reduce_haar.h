// A Waveblock's 1x1 convolution and all its Haar levels in one pass over the image.
#pragma once

#include "wavemix/haar.h"  // kMaxHaarLevels

namespace wavemix {

// r = weight * x + bias over channels, then for each level l = 1..levels the image z[l-1] of 4 * o channels at
// 1/2^l of the size: LL_l of the o channels, then LH_l, HL_l, HH_l of channel 0, of channel 1, and so on.
// r itself never reaches memory. h and w are multiples of 2^levels.
struct ReduceHaarArgs {
  DType dtype = DType::f32;
  int levels = 1;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t o = 0;
  Plane x;
  const void* weight = nullptr;  // (o, c)
  int64_t weight_stride[2] = {0, 0};
  const void* bias = nullptr;  // (o), null for none
  int64_t bias_stride = 0;
  Plane z[kMaxHaarLevels];
  // f32 only: round x and weight to tf32 for the tensor cores. Without it f32 is exact to fp32 sums.
  bool allow_tf32 = false;
};

// The CPU needs contiguous channels (or pixels) of x and contiguous channels of each z; rows may have any stride.
void reduce_haar_cpu(const ReduceHaarArgs& args, int threads);

// The gradients from those of z; d_x and add (optional, added to d_x) in the memory order of x.
struct ReduceHaarGradArgs {
  Plane d_x, add;
  void* d_weight = nullptr;  // (o, c), contiguous, in the images' dtype
  void* d_bias = nullptr;    // (o), or null
};
// `args` as in the forward pass, but z is read: the gradients of Z_1 and on.
void reduce_haar_backward_cpu(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads);

// f64 sums in double, everything else in float; each output is rounded once. Launched on `stream` of the current
// device.
void reduce_haar_cuda(const ReduceHaarArgs& args, void* stream);

// The same of an image that is made on the way: image = y * scale + shift + x, a BatchNorm applied and its residual.
// Half types; x, y and the image dense in channels_last order and aligned to 16 bytes, c a multiple of 8. The image is
// rounded once, and what is stored is what the convolution reads.
struct NormImageArgs {
  const void* y = nullptr;
  const float *scale = nullptr, *shift = nullptr;  // (c)
  void* image = nullptr;
};
void norm_reduce_haar_cuda(const ReduceHaarArgs& args, const NormImageArgs& norm, void* stream);

// Half types, every image aligned to 16 bytes: z in channels_last order, dense but for other channels beside them
// (stride[3] a multiple of 8); x, d_x and add dense, together in that or NCHW order, or, with sums of NormSumArgs, add
// with strides of 0 along h and w, one value for an image; c a multiple of 8, o of 2, up to 256 and 64. Bytes of shared
// memory that a block takes, `norm`: with the sums of NormSumArgs.
int64_t reduce_haar_backward_shared_cuda(int64_t c, int64_t o, bool norm);
// Bytes of device memory for the blocks' sums:
int64_t reduce_haar_backward_workspace_cuda(const ReduceHaarArgs& args, bool norm, int multiprocessors,
                                            int64_t shared_of_multiprocessor);
// With `norm`, x is the image of NormImageArgs, in channels_last order, and sums of d_x come along.
struct NormSumArgs {
  const void* y = nullptr;
  const float *mean = nullptr, *invstd = nullptr;  // (c), of y
  float* sums = nullptr;                           // (2, c): of d_x, and of d_x * (y - mean) * invstd
};
void reduce_haar_backward_cuda(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, const NormSumArgs& norm,
                               void* workspace, int multiprocessors, int64_t shared_of_multiprocessor, void* stream);

}  // namespace wavemix
