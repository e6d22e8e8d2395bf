// PATM from its image to its output: what lies between is an image of one thread at a time, never one of the batch.
#pragma once

#include "wavemix/patm.h"

namespace wavemix {

// Addresses of what wavemix_kernels/ops/patm/weights.py names (Weights, then Affine), in that order: (c, c) and (c) for
// the projections z and thetas, phase = relu(theta * scale + shift) with (c) each, taps (c, 2, 7); fc1 (hidden, c) and
// fc2 (3 c, hidden), rows of one channel beside each other; proj (c, c). Biases of z, theta and proj may be null.
// clang-format off
#define WAVEMIX_PATM_WEIGHTS(X)                                                \
  X(z_h) X(z_h_bias) X(z_w) X(z_w_bias) X(z_c) X(z_c_bias)                     \
  X(theta_h) X(theta_h_bias) X(theta_w) X(theta_w_bias) X(proj) X(proj_bias)   \
  X(taps_h) X(taps_w) X(fc1) X(fc1_bias) X(fc2) X(fc2_bias)                    \
  X(scale_h) X(shift_h) X(scale_w) X(shift_w)
// clang-format on

template <class Address>
struct PatmWeights {
#define WAVEMIX_FIELD(name) Address name = nullptr;
  WAVEMIX_PATM_WEIGHTS(WAVEMIX_FIELD)
#undef WAVEMIX_FIELD
};

// All but x is contiguous and in the arithmetic type: double for f64, otherwise float. c is even, x has contiguous
// channels. The image is x * scale + shift, or x where these are null.
struct PatmArgs : PatmWeights<const void*> {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0, hidden = 0;
  Plane x;
  const void *scale = nullptr, *shift = nullptr;  // (c), or (n, c) with `by_image`
  bool by_image = false;
  // With `residual` the output is x + path * PATM(image); path (n), null for ones.
  bool residual = false;
  const void* path = nullptr;
};

// Mean (c) and biased covariance (c, c) of the image over n, h and w, in double. The statistics of any 1x1 convolution
// W follow: mean W m, variance diag(W C W^T).
void patm_moments_cpu(const PatmArgs& args, double* mean, double* covariance, int threads);

// branch_mean (n, c): the mean over the image of the three branches' sum, from which the branch weights are made.
void patm_forward_cpu(const PatmArgs& args, const Plane& out, void* branch_mean, int threads);

// Gradients by the weights' names, in the arithmetic type; those of the thetas' biases are null. That of shift is the
// sum of d_pre, that of scale the sum of d_pre * (theta - center) (see PhaseGradArgs). Statistics count as constants
// here: patm_add_linear_cpu adds what comes through them.
struct PatmGradArgs : PatmWeights<void*> {
  Plane grad;                         // of the output, as x
  const void* branch_mean = nullptr;  // (n, c)
  const void* center = nullptr;       // (2, c), of theta_h and theta_w; null for zeros
  Plane d_image;                      // in the image's type, or with `wide` in the arithmetic one
  bool wide = false;
};
void patm_backward_cpu(const PatmArgs& args, const PatmGradArgs& grads, int threads);

// out = partial + matrix image + vector, with (c, c) and (c); args give the image alone. partial is in the arithmetic
// type and may be out itself.
void patm_add_linear_cpu(const PatmArgs& args, const Plane& partial, const void* matrix, const void* vector,
                         const Plane& out, int threads);

// On a GPU: half types, c of 64, 96 or 128, pixels at multiples of 16 bytes. z, theta, proj and their biases are in x's
// type; scale, shift, path and everything else in float, as the results but the image. Launched on `stream` of the
// current device; every sum is added up in an order that depends on shapes and `multiprocessors` alone.
//
// Workspaces are in bytes. branch_mean (n, c) is as above, a (3, n, c) the branch weights.
int64_t patm_moments_workspace_cuda(const PatmArgs& args, int multiprocessors);
void patm_moments_cuda(const PatmArgs& args, double* mean, double* covariance, void* workspace, int multiprocessors,
                       void* stream);

// theta_h and theta_w are convolutions of an image with these moments. out (5, 2, c) gets their mean, biased variance
// and inverse deviation, and their norms' affine map, scale and shift. args gives dtype, c, thetas and their biases.
struct PatmStatisticsArgs {
  const double *mean = nullptr, *covariance = nullptr;
  const float *weight[2] = {}, *bias[2] = {};  // (c) of a norm, null for ones and zeros
  double eps[2] = {};
  float* out = nullptr;
};
void patm_statistics_cuda(const PatmArgs& args, const PatmStatisticsArgs& of, void* stream);

int64_t patm_branch_weights_workspace_cuda(const PatmArgs& args, int multiprocessors);
void patm_branch_weights_cuda(const PatmArgs& args, float* branch_mean, float* a, void* workspace, int multiprocessors,
                              void* stream);
// Shared memory that a block of these kernels takes at most, in bytes.
int64_t patm_shared_cuda(int64_t c);
// out = proj(h a[0] + w a[1] + c a[2]), or with `residual` x + path * that.
void patm_mix_cuda(const PatmArgs& args, const float* a, const Plane& out, int multiprocessors, void* stream);

// Backward, first: d_a (3, n, c), and in d_proj the gradients of proj (c, c) and of its bias (c), one behind the other.
// `grad` is the output's, its pixels at multiples of 16 bytes.
int64_t patm_mixed_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors);
void patm_mixed_gradients_cuda(const PatmArgs& args, const Plane& grad, const float* a, float* d_a, float* d_proj,
                               void* workspace, int multiprocessors, void* stream);

// Second, from `d_mean` (n, c), the gradient of the branches' sum at each pixel through the branch weights:
// `gradients` (n, h, w, 5, c) of z_h, z_w, z_c, theta_h, theta_w in x's type, z_c's channels in pairs (0, c / 2), (1, c
// / 2 + 1), ...; `sums` (2, 18, c), for the branch along W, then along H: of the taps (c, 2, 7), then over all pixels
// of d_pre, of d_pre * (theta - center), of z's gradient and, along W alone, of z_c's (see PatmGradArgs).
struct PatmWaveGradArgs {
  Plane grad;
  const float* a = nullptr;
  const float* d_mean = nullptr;
  const float* center = nullptr;  // (2, c), null for zeros
  void* gradients = nullptr;
  float* sums = nullptr;
};
int64_t patm_wave_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors);
void patm_wave_gradients_cuda(const PatmArgs& args, const PatmWaveGradArgs& grads, void* workspace, int multiprocessors,
                              void* stream);

// Third, what comes through batch statistics, from `sums` of d_pre (c) and behind them of d_pre * (theta - center): the
// thetas' weights' gradients get d_theta (2, c, c), the image's `size` matrix^T image + vector, with (c), matrix (c, c)
// in x's type and vector (c). invstd (2, c) is of the thetas, mean and covariance of the image.
struct PatmThroughArgs {
  const double *mean = nullptr, *covariance = nullptr;
  const float *sums = nullptr, *invstd = nullptr;
  int64_t sums_stride = 0;  // from theta_h's to theta_w's
  void* matrix = nullptr;
  float *vector = nullptr, *size = nullptr, *d_theta = nullptr;
};
void patm_through_statistics_cuda(const PatmArgs& args, const PatmThroughArgs& of, void* stream);

// Last, from these `gradients`: d_image = the projections' weights, transposed, by them; d_weights (5, c, c) in the
// order of `gradients`. To both is added what comes through batch statistics, where `matrix` is not null.
struct PatmImageGradArgs {
  const void *gradients = nullptr, *matrix = nullptr;
  const float *vector = nullptr, *size = nullptr, *d_theta = nullptr;
  Plane d_image;
  float* d_weights = nullptr;
};
int64_t patm_image_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors);
void patm_image_gradients_cuda(const PatmArgs& args, const PatmImageGradArgs& grads, void* workspace,
                               int multiprocessors, void* stream);

}  // namespace wavemix
