// PATM from its image to its output: what lies between is an image of one thread at a time, never one of the batch.
#pragma once

#include "wavemix/patm.h"

namespace wavemix {

// One branch: z = z_weight image + z_bias, phase = relu((theta_weight image + theta_bias) * scale + shift). The phases'
// BatchNorm is the affine map, of given statistics or of those that follow from patm_moments_cpu.
struct PatmBranch {
  const void *z = nullptr, *z_bias = nullptr;          // (c, c); (c) or null
  const void *theta = nullptr, *theta_bias = nullptr;  // (c, c); (c) or null
  const void *scale = nullptr, *shift = nullptr;       // (c)
  const void* taps = nullptr;                          // (c, 2, 7)
};

// All but x is contiguous and in the arithmetic type: double for f64, otherwise float. c is even, x has contiguous
// channels. The image is x * scale + shift, or x where these are null.
struct PatmArgs {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  Plane x;
  const void *scale = nullptr, *shift = nullptr;  // (c), or (n, c) with `by_image`
  bool by_image = false;
  PatmBranch branch[2];                                    // along W, along H
  const void *channel = nullptr, *channel_bias = nullptr;  // (c, c); (c) or null: the third branch
  // The branch weights' MLP.
  int64_t hidden = 0;
  const void *fc1 = nullptr, *fc1_bias = nullptr;    // (hidden, c), (hidden)
  const void *fc2 = nullptr, *fc2_bias = nullptr;    // (3 c, hidden), (3 c): rows of one channel beside each other
  const void *proj = nullptr, *proj_bias = nullptr;  // (c, c); (c) or null
  // With `residual` the output is x + path * PATM(image); path (n), null for ones.
  bool residual = false;
  const void* path = nullptr;
};

// Of the image over n, h and w: mean (c) and biased covariance (c, c), in double. The statistics of any 1x1
// convolution of it follow: mean W m, variance diag(W C W^T).
void patm_moments_cpu(const PatmArgs& args, double* mean, double* covariance, int threads);

// branch_mean (n, c): what the branch weights come of, the mean over the image of the three branches' sum.
void patm_forward_cpu(const PatmArgs& args, const Plane& out, void* branch_mean, int threads);

struct PatmBranchGrads {
  const void* center = nullptr;                       // (c), what sum_pre_theta takes theta from
  void *z = nullptr, *z_bias = nullptr;               // (c, c), (c)
  void* theta = nullptr;                              // (c, c)
  void* taps = nullptr;                               // (c, 2, 7)
  void *sum_pre = nullptr, *sum_pre_theta = nullptr;  // (c): as in PhaseGradArgs
};
// Statistics count as constants here: patm_add_linear_cpu adds what comes through them.
struct PatmGradArgs {
  Plane grad;                         // of the output, as x
  const void* branch_mean = nullptr;  // (n, c)
  // Written, in the arithmetic type; d_image in the image's, or with `wide` in that.
  Plane d_image;
  bool wide = false;
  PatmBranchGrads branch[2];
  void *channel = nullptr, *channel_bias = nullptr;
  void *fc1 = nullptr, *fc1_bias = nullptr, *fc2 = nullptr, *fc2_bias = nullptr;
  void *proj = nullptr, *proj_bias = nullptr;
};
void patm_backward_cpu(const PatmArgs& args, const PatmGradArgs& grads, int threads);

// out = partial + matrix image + vector, with (c, c) and (c); of args the image alone. partial is in the arithmetic
// type and may be out itself.
void patm_add_linear_cpu(const PatmArgs& args, const Plane& partial, const void* matrix, const void* vector,
                         const Plane& out, int threads);

}  // namespace wavemix
