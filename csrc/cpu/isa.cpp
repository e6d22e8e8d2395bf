#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wavemix {
namespace {

#define WAVEMIX_KERNELS_OF(isa)                                                                                       \
  &isa::haar_kernels, &isa::mlp_kernels, &isa::batch_norm_kernels, &isa::deconv_kernels, &isa::deconv_narrow_kernels, \
      &isa::reduce_haar_kernels, &isa::reduce_haar_narrow_kernels, &isa::patm_kernels, &isa::pre_norm_kernels,        \
      &isa::weight_grad_kernels, &isa::whole_patm_kernels, &isa::whole_patm_backward_kernels

struct Variant {
  const char* name;
  const HaarKernels* haar;
  const MlpKernels* mlp;
  const BatchNormKernels* batch_norm;
  const DeconvKernels* deconv;
  const DeconvKernels* deconv_narrow;
  const ReduceHaarKernels* reduce_haar;
  const ReduceHaarKernels* reduce_haar_narrow;
  const PatmKernels* patm;
  const PreNormKernels* pre_norm;
  const WeightGradKernels* weight_grad;
  const WholePatmKernels* whole_patm;
  const WholePatmBackwardKernels* whole_patm_backward;
  bool supported;
};

const Variant& pick() {
  static const Variant chosen = [] {
#if WAVEMIX_X86_VARIANTS
    __builtin_cpu_init();
    const Variant variants[] = {
        {"avx512", WAVEMIX_KERNELS_OF(avx512),
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
        {"avx2", WAVEMIX_KERNELS_OF(avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {"baseline", WAVEMIX_KERNELS_OF(baseline), true},
    };
#else
    const Variant variants[] = {{"baseline", WAVEMIX_KERNELS_OF(baseline), true}};
#endif
    const char* asked = std::getenv("WAVEMIX_KERNELS_CPU_ISA");
    std::string names;
    for (const Variant& v : variants) {
      if (!v.supported) continue;
      if (asked == nullptr || *asked == '\0' || std::strcmp(asked, v.name) == 0) return v;
      names += names.empty() ? v.name : std::string(", ") + v.name;
    }
    throw std::runtime_error(std::string("WAVEMIX_KERNELS_CPU_ISA=") + asked + ": this CPU and build have " + names);
  }();
  return chosen;
}

// Few channels have kernels of their own; measured with AVX-512 on 2 threads, batch 128, 28x28 in and out of the block.
// Time over minimal filtering's, forward and gradients of input and weight: 0.30, 0.24 and 0.15 at 8 channels, 0.9, 0.9
// and 1.0 at 32, 1.1, 1.2 and 1.6 at 48.
const DeconvKernels& deconv_for(const DeconvArgs& args) {
  return args.f * args.o <= kDeconvNarrow ? *pick().deconv_narrow : *pick().deconv;
}
// Time over that of product first, transform second; forward and gradients: 0.23 and 0.22 at 8 channels, 0.34 and 0.52
// at 16, 0.95 and 0.92 at 32, 1.3 at 64.
const ReduceHaarKernels& reduce_haar_for(const ReduceHaarArgs& args) {
  constexpr int64_t kNarrow = 128;
  return args.levels == 1 && args.c * args.o <= kNarrow ? *pick().reduce_haar_narrow : *pick().reduce_haar;
}

}  // namespace

const char* cpu_isa_name() { return pick().name; }

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Below a few huge pages the alignment losses eat the gain, and such blocks are recycled by malloc anyway.
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (data == nullptr || bytes < static_cast<int64_t>(2 * kHuge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void haar_analysis_cpu(const HaarArgs& args, int threads) { pick().haar->haar_analysis(args, threads); }
void haar_synthesis_cpu(const HaarArgs& args, int threads) { pick().haar->haar_synthesis(args, threads); }

void mlp_forward_cpu(const MlpArgs& args, const Matrix& out, int threads) { pick().mlp->forward(args, out, threads); }
void mlp_backward_cpu(const MlpArgs& args, const MlpGradArgs& grads, int threads) {
  pick().mlp->backward(args, grads, threads);
}
void philox4x32_cpu(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]) {
  pick().mlp->philox4x32(counter, key, words);
}

void deconv_forward_cpu(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads) {
  deconv_for(args).forward(args, bias, mean, var, threads);
}
void deconv_gradients_cpu(const DeconvArgs& args, const DeconvGradients& out, int threads) {
  deconv_for(args).gradients(args, out, threads);
}

void reduce_haar_cpu(const ReduceHaarArgs& args, int threads) { reduce_haar_for(args).forward(args, threads); }
void reduce_haar_backward_cpu(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads) {
  reduce_haar_for(args).backward(args, grads, threads);
}

void batch_norm_stats_cpu(const BatchNormShape& shape, const Plane& y, void* mean, void* var, int threads) {
  pick().batch_norm->stats(shape, y, mean, var, threads);
}
void batch_norm_apply_cpu(const BatchNormShape& shape, const Plane& y, const void* scale, const void* shift,
                          const Plane& residual, const Plane& out, int threads) {
  pick().batch_norm->apply(shape, y, scale, shift, residual, out, threads);
}
void batch_norm_backward_reduce_cpu(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* mean,
                                    const void* invstd, void* sum_g, void* sum_gx, int threads) {
  pick().batch_norm->backward_reduce(shape, g, y, mean, invstd, sum_g, sum_gx, threads);
}
void batch_norm_backward_apply_cpu(const BatchNormShape& shape, const Plane& g, const Plane& y, const void* a,
                                   const void* b, const void* d, const Plane& out, int threads) {
  pick().batch_norm->backward_apply(shape, g, y, a, b, d, out, threads);
}

void pre_norm_apply_cpu(const PreNormArgs& args, const Plane& x, const Plane& out, int threads) {
  pick().pre_norm->apply(args, x, out, threads);
}
void pre_norm_backward_cpu(const PreNormArgs& args, bool own, const Plane& grad, const Plane& x, const Plane& around,
                           const Plane& out, void* d_weight, void* d_bias, int threads) {
  pick().pre_norm->backward(args, own, grad, x, around, out, d_weight, d_bias, threads);
}
void pre_norm_join_cpu(const PreNormShape& shape, const Plane& x, const Plane& branch, const void* path,
                       const Plane& out, int threads) {
  pick().pre_norm->join(shape, x, branch, path, out, threads);
}

void weight_grad_cpu(const WeightGradArgs& args, int threads) { pick().weight_grad->weight_grad(args, threads); }

void phase_forward_cpu(const PhaseArgs& args, const Plane& out, const Plane& also, void* sums, int threads) {
  pick().patm->phase_forward(args, out, also, sums, threads);
}
void phase_backward_cpu(const PhaseArgs& args, const PhaseGradArgs& grads, int threads) {
  pick().patm->phase_backward(args, grads, threads);
}
void branch_sum_cpu(const BranchArgs& args, const Plane& out, int threads) {
  pick().patm->branch_sum(args, out, threads);
}
void branch_sum_backward_cpu(const BranchArgs& args, const Plane& grad, const Plane& out, void* d_a, int threads) {
  pick().patm->branch_sum_backward(args, grad, out, d_a, threads);
}

void patm_moments_cpu(const PatmArgs& args, double* mean, double* covariance, int threads) {
  pick().whole_patm->moments(args, mean, covariance, threads);
}
void patm_forward_cpu(const PatmArgs& args, const Plane& out, void* branch_mean, int threads) {
  pick().whole_patm->forward(args, out, branch_mean, threads);
}
void patm_backward_cpu(const PatmArgs& args, const PatmGradArgs& grads, int threads) {
  pick().whole_patm_backward->backward(args, grads, threads);
}
void patm_add_linear_cpu(const PatmArgs& args, const Plane& partial, const void* matrix, const void* vector,
                         const Plane& out, int threads) {
  pick().whole_patm->add_linear(args, partial, matrix, vector, out, threads);
}

}  // namespace wavemix
