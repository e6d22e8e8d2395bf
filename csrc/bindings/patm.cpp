// The Python face of the PATM kernels: tensors are (address, four strides), the rest plain addresses.
#include "bindings/patm.h"

#include <array>
#include <tuple>

namespace wavemix::bindings {
namespace {

// z, theta, scale, shift, taps; of the gradients grad, a, b, center, d_z, d_theta, d_taps, sum_pre, sum_pre_theta.
using Branch = std::tuple<Ints, Ints, uintptr_t, uintptr_t, uintptr_t>;
using Gradient = std::tuple<Ints, uintptr_t, uintptr_t, uintptr_t, Ints, Ints, uintptr_t, uintptr_t, uintptr_t>;

PhaseArgs phase_args(int dtype, const Ints& shape, bool along_h, const Branch& branch) {
  const auto& [z, theta, scale, shift, taps] = branch;
  auto args = shaped<PhaseArgs>(dtype, shape);
  args.along_h = along_h;
  args.z = plane(z, "z", shape);
  args.theta = plane(theta, "theta", shape);
  args.scale = pointer(scale);
  args.shift = pointer(shift);
  args.taps = pointer(taps);
  return args;
}

PhaseGradArgs gradient_args(const Ints& shape, const Gradient& ints) {
  const auto& [grad, a, b, center, d_z, d_theta, d_taps, sum_pre, sum_pre_theta] = ints;
  PhaseGradArgs out;
  out.grad = plane(grad, "grad", shape);
  out.a = pointer(a);
  out.b = pointer(b);
  out.center = pointer(center);
  out.d_z = plane(d_z, "d_z", shape);
  out.d_theta = plane(d_theta, "d_theta", shape);
  out.d_taps = pointer(d_taps);
  out.sum_pre = pointer(sum_pre);
  out.sum_pre_theta = pointer(sum_pre_theta);
  return out;
}

// The gradient of z_c, which comes with the branch along W.
void add_third(PhaseGradArgs& grads, const Ints& shape, uintptr_t a_c, const Ints& d_c) {
  grads.a_c = pointer(a_c);
  grads.d_c = plane(d_c, "d_c", shape);
  if (grads.d_c.data != nullptr && (grads.a_c == nullptr || grads.b == nullptr))
    throw std::invalid_argument("d_c: needs a_c and b");
}

#if WAVEMIX_WITH_CPU
BranchArgs branch_args(int dtype, const Ints& shape, const std::vector<Ints>& branches, uintptr_t a) {
  auto args = shaped<BranchArgs>(dtype, shape, false);
  if (branches.size() != 3) throw std::invalid_argument("branches: expected 3, got " + std::to_string(branches.size()));
  for (size_t i = 0; i < 3; ++i) args.branch[i] = plane(branches[i], "branches", shape);
  args.a = pointer(a);
  return args;
}
#endif

#if WAVEMIX_WITH_CUDA
struct Branches {
  PhaseArgs of[2];  // along W, along H
};

Branches both(int dtype, const Ints& shape, const std::array<Branch, 2>& branches) {
  Branches out;
  for (size_t i = 0; i < 2; ++i) {
    out.of[i] = phase_args(dtype, shape, i == 1, branches[i]);
  }
  return out;
}
#endif

}  // namespace

void bind_patm(Module& m) {
#if WAVEMIX_WITH_CPU
  m.def("phase_forward_cpu",
        [](int dtype, const Ints& shape, bool along_h, const Branch& branch, const Ints& out, const Ints& also,
           uintptr_t sums, int threads) {
          const auto args = phase_args(dtype, shape, along_h, branch);
          check_threads(threads);
          const auto to = plane(out, "out", shape), third = plane(also, "also", shape);
          const Unlocked unlocked;
          phase_forward_cpu(args, to, third, pointer(sums), threads);
        },
        {"dtype", "shape", "along_h", "branch", "out", "also", "sums", "threads"});
  m.def("phase_backward_cpu",
        [](int dtype, const Ints& shape, bool along_h, const Branch& branch, const Gradient& gradient, uintptr_t a_c,
           const Ints& d_c, int threads) {
          const auto args = phase_args(dtype, shape, along_h, branch);
          check_threads(threads);
          auto grads = gradient_args(shape, gradient);
          add_third(grads, shape, a_c, d_c);
          const Unlocked unlocked;
          phase_backward_cpu(args, grads, threads);
        },
        {"dtype", "shape", "along_h", "branch", "gradient", "a_c", "d_c", "threads"});
  m.def("branch_sum_cpu",
        [](int dtype, const Ints& shape, const std::vector<Ints>& branches, uintptr_t a, const Ints& out, int threads) {
          check_threads(threads);
          const auto args = branch_args(dtype, shape, branches, a);
          const auto to = plane(out, "out", shape);
          const Unlocked unlocked;
          branch_sum_cpu(args, to, threads);
        },
        {"dtype", "shape", "branches", "a", "out", "threads"});
  m.def("branch_sum_backward_cpu",
        [](int dtype, const Ints& shape, const std::vector<Ints>& branches, uintptr_t a, const Ints& grad,
           const Ints& out, uintptr_t d_a, int threads) {
          check_threads(threads);
          const auto args = branch_args(dtype, shape, branches, a);
          const auto from = plane(grad, "grad", shape), to = plane(out, "out", shape);
          const Unlocked unlocked;
          branch_sum_backward_cpu(args, from, to, pointer(d_a), threads);
        },
        {"dtype", "shape", "branches", "a", "grad", "out", "d_a", "threads"});
#endif

#if WAVEMIX_WITH_CUDA
  m.def("phase_workspace_cuda",
        [](const Ints& shape, int multiprocessors, bool backward) {
          const auto args = shaped<PhaseArgs>(0, shape, false);
          return phase_workspace_cuda(args.n, args.c, args.h, args.w, multiprocessors, backward);
        },
        {"shape", "multiprocessors", "backward"});
  m.def("phase_forward_cuda",
        [](int dtype, const Ints& shape, const std::array<Branch, 2>& branches, const std::array<Ints, 2>& out,
           const Ints& also, uintptr_t sums, uintptr_t workspace, int multiprocessors, uintptr_t stream) {
          const Branches args = both(dtype, shape, branches);
          const Plane to[2] = {plane(out[0], "out", shape), plane(out[1], "out", shape)};
          const auto third = plane(also, "also", shape);
          const Unlocked unlocked;
          phase_forward_cuda(args.of, to, third, pointer(sums), pointer(workspace), multiprocessors, pointer(stream));
        },
        {"dtype", "shape", "branches", "out", "also", "sums", "workspace", "multiprocessors", "stream"});
  m.def(
      "phase_backward_cuda",
      [](int dtype, const Ints& shape, const std::array<Branch, 2>& branches, const std::array<Gradient, 2>& gradients,
         uintptr_t a_c, const Ints& d_c, uintptr_t workspace, int multiprocessors, uintptr_t stream) {
        const Branches args = both(dtype, shape, branches);
        PhaseGradArgs grads[2] = {gradient_args(shape, gradients[0]), gradient_args(shape, gradients[1])};
        add_third(grads[0], shape, a_c, d_c);
        const Unlocked unlocked;
        phase_backward_cuda(args.of, grads, pointer(workspace), multiprocessors, pointer(stream));
      },
      {"dtype", "shape", "branches", "gradients", "a_c", "d_c", "workspace", "multiprocessors", "stream"});
  m.def("phase_statistics_cuda",
        [](int dtype, const Ints& shape, const std::array<Branch, 2>& branches, const std::array<Ints, 2>& d_theta,
           const std::array<std::array<uintptr_t, 4>, 2>& statistics, int multiprocessors, uintptr_t stream) {
          const Branches args = both(dtype, shape, branches);
          const Plane to[2] = {plane(d_theta[0], "d_theta", shape), plane(d_theta[1], "d_theta", shape)};
          PhaseStatistics of[2];
          for (size_t i = 0; i < 2; ++i) {
            const auto& [mean, invstd, sum_pre, sum_pre_theta] = statistics[i];
            of[i] = {pointer(mean), pointer(invstd), pointer(sum_pre), pointer(sum_pre_theta)};
          }
          const Unlocked unlocked;
          phase_statistics_cuda(args.of, to, of, multiprocessors, pointer(stream));
        },
        {"dtype", "shape", "branches", "d_theta", "statistics", "multiprocessors", "stream"});
#endif
}

}  // namespace wavemix::bindings
