// One translation unit of kernels is compiled once per instruction set (CMakeLists.txt gives the flags and
// WAVEMIX_ISA); this header names the variants and picks one at run time. No -march=native: a wheel built
// here runs on any CPU of the family.
//
// The per-ISA units must not instantiate shared templates or inline functions (std::vector and the like): the
// linker would keep one copy for all, perhaps the one with instructions this CPU lacks.
#pragma once

#include "wavemix/conv1x1.h"
#include "wavemix/deconv.h"
#include "wavemix/haar.h"
#include "wavemix/mlp.h"
#include "wavemix/norm.h"
#include "wavemix/patm.h"
#include "wavemix/patm_whole.h"
#include "wavemix/reduce_haar.h"

namespace wavemix {

struct HaarKernels {
  void (*haar_analysis)(const HaarArgs& args, int threads);
  void (*haar_synthesis)(const HaarArgs& args, int threads);
};

struct MlpKernels {
  void (*forward)(const MlpArgs& args, const Matrix& out, int threads);
  void (*backward)(const MlpArgs& args, const MlpGradArgs& grads, int threads);
  void (*philox4x32)(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]);
};

struct BatchNormKernels {
  void (*stats)(const BatchNormShape& shape, const Plane& y, void* mean, void* var, int threads);
  void (*apply)(const BatchNormShape& shape, const Plane& y, const void* scale, const void* shift,
                const Plane& residual, const Plane& out, int threads);
  void (*backward_reduce)(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* mean,
                          const void* invstd, void* sum_g, void* sum_gx, int threads);
  void (*backward_apply)(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* a, const void* b,
                         const void* d, const Plane& out, int threads);
};

struct DeconvKernels {
  void (*forward)(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads);
  void (*gradients)(const DeconvArgs& args, const DeconvGradients& out, int threads);
};

struct ReduceHaarKernels {
  void (*forward)(const ReduceHaarArgs& args, int threads);
  void (*backward)(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads);
};

struct PatmKernels {
  void (*phase_forward)(const PhaseArgs& args, const Plane& out, const Plane& also, void* sums, int threads);
  void (*phase_backward)(const PhaseArgs& args, const PhaseGradArgs& grads, int threads);
  void (*branch_sum)(const BranchArgs& args, const Plane& out, int threads);
  void (*branch_sum_backward)(const BranchArgs& args, const Plane& grad, const Plane& out, void* d_a, int threads);
};

struct WholePatmKernels {
  void (*moments)(const PatmArgs& args, double* mean, double* covariance, int threads);
  void (*forward)(const PatmArgs& args, const Plane& out, void* branch_mean, int threads);
  void (*add_linear)(const PatmArgs& args, const Plane& partial, const void* matrix, const void* vector,
                     const Plane& out, int threads);
};
struct WholePatmBackwardKernels {
  void (*backward)(const PatmArgs& args, const PatmGradArgs& grads, int threads);
};

struct PreNormKernels {
  void (*apply)(const PreNormArgs& args, const Plane& x, const Plane& out, int threads);
  void (*backward)(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
                   const Plane& out, void* d_weight, void* d_bias, int threads);
  void (*join)(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path, const Plane& out,
               int threads);
};

struct WeightGradKernels {
  void (*weight_grad)(const WeightGradArgs& args, int threads);
};

#define WAVEMIX_DECLARE_ISA(isa)                                     \
  namespace isa {                                                    \
  extern const HaarKernels haar_kernels;                             \
  extern const MlpKernels mlp_kernels;                               \
  extern const BatchNormKernels batch_norm_kernels;                  \
  extern const DeconvKernels deconv_kernels;                         \
  extern const DeconvKernels deconv_narrow_kernels;                  \
  extern const ReduceHaarKernels reduce_haar_kernels;                \
  extern const ReduceHaarKernels reduce_haar_narrow_kernels;         \
  extern const PatmKernels patm_kernels;                             \
  extern const PreNormKernels pre_norm_kernels;                      \
  extern const WeightGradKernels weight_grad_kernels;                \
  extern const WholePatmKernels whole_patm_kernels;                  \
  extern const WholePatmBackwardKernels whole_patm_backward_kernels; \
  }
WAVEMIX_DECLARE_ISA(baseline)
WAVEMIX_DECLARE_ISA(avx2)
WAVEMIX_DECLARE_ISA(avx512)
#undef WAVEMIX_DECLARE_ISA

// The best variant this CPU runs, unless the variable WAVEMIX_KERNELS_CPU_ISA names a lower one.
const char* cpu_isa_name();

// Asks for huge pages behind a large output that is about to be written for the first time: page faults
// cost as much as the copy itself (7 against 30 GB/s seen). Advice only; where it is refused nothing changes.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace wavemix
