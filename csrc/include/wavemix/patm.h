// PATM by parts: everything between its projections and its output projection.
#pragma once

#include "wavemix/types.h"

namespace wavemix {

constexpr int kPhaseTaps = 7;

// One branch: with phase = relu(theta * scale + shift) and, per pair of channels 2g, 2g+1,
//     out[g]       = 7 taps over z cos(phase) of both channels
//     out[c/2 + g] = 7 taps over z sin(phase) of both channels
// along W, or along H with `along_h`; zero outside the image. c is even, and channels are contiguous (stride[1] = 1)
// in every Plane here. Vectors of channels and sums are contiguous, in the arithmetic type: double for f64, otherwise
// float. The phase has no upper bound; it is reduced exactly.
struct PhaseArgs {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  bool along_h = false;
  Plane z, theta;
  const void* scale = nullptr;  // (c)
  const void* shift = nullptr;  // (c)
  const void* taps = nullptr;   // (c, 2, 7), of output channel, channel of the pair, tap
};

// sums (n, c): over the image, of out before it is rounded, and of `also` where there is one.
void phase_forward_cpu(const PhaseArgs& args, const Plane& out, const Plane& also, void* sums, int threads);

// The gradient of out is d = grad * a + b.
struct PhaseGradArgs {
  Plane grad;
  const void* a = nullptr;       // (n, c), null for ones
  const void* b = nullptr;       // (n, c), null for zeros
  const void* a_c = nullptr;     // (n, c), with d_c only
  const void* center = nullptr;  // (c), null for zeros
  // Written:
  Plane d_z, d_theta;             // d_theta is scale times the gradient of the phase before relu, here "d_pre"
  Plane d_c;                      // optional: grad * a_c + b, the gradient of PATM's third branch
  void* d_taps = nullptr;         // (c, 2, 7)
  void* sum_pre = nullptr;        // (c): sum of d_pre
  void* sum_pre_theta = nullptr;  // (c): sum of d_pre * (theta - center)
};
void phase_backward_cpu(const PhaseArgs& args, const PhaseGradArgs& grads, int threads);

// On a GPU both branches are one launch: along W, then along H, of one shape and dtype. The workspace holds that many
// elements of the arithmetic type. Launched on `stream` of the current device; every sum is added up in an order that
// depends on shapes and on the device's number of multiprocessors alone.
int64_t phase_workspace_cuda(int64_t n, int64_t c, int64_t h, int64_t w, int multiprocessors, bool backward);
void phase_forward_cuda(const PhaseArgs (&branches)[2], const Plane (&out)[2], const Plane& also, void* sums,
                        void* workspace, int multiprocessors, void* stream);
void phase_backward_cuda(const PhaseArgs (&branches)[2], const PhaseGradArgs (&grads)[2], void* workspace,
                         int multiprocessors, void* stream);
// A batch's statistics of theta, and the sums that phase_backward_cuda gave with that mean as center: (c) each.
struct PhaseStatistics {
  const void *mean = nullptr, *invstd = nullptr;
  const void *sum_pre = nullptr, *sum_pre_theta = nullptr;
};
// Adds what batch statistics contribute, in place. With the sums as averages over all pixels of the batch,
//     d_theta -= scale * (sum_pre + sum_pre_theta * invstd^2 * (theta - mean)), per channel.
void phase_statistics_cuda(const PhaseArgs (&branches)[2], const Plane (&d_theta)[2], const PhaseStatistics (&of)[2],
                           int multiprocessors, void* stream);

// The three branches and their weights a (3, n, c), in the arithmetic type.
struct BranchArgs {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  Plane branch[3];
  const void* a = nullptr;
};
// out = sum of branch[i] * a[i].
void branch_sum_cpu(const BranchArgs& args, const Plane& out, int threads);
// The same again, and d_a (3, n, c): sums over the image of grad * branch[i].
void branch_sum_backward_cpu(const BranchArgs& args, const Plane& grad, const Plane& out, void* d_a, int threads);

}  // namespace wavemix
