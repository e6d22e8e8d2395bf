// The Python face of the normalisations' kernels: tensors are (address, four strides), arrays by channel or by image
// plain addresses.
#include "wavemix/norm.h"

#include <array>

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

BatchNormShape batch_norm_shape(int dtype, const Ints& shape, int threads) {
  check_threads(threads);
  BatchNormShape out;
  out.dtype = dtype_of(dtype);
  set_shape(out, shape);
  return out;
}

PreNormShape pre_norm_shape(const std::array<int, 2>& dtypes, const Ints& shape, int threads) {
  PreNormShape out;
  out.around = batch_norm_shape(dtypes[0], shape, threads);
  out.branch = dtype_of(dtypes[1]);
  if (!pre_norm_types(out.around.dtype, out.branch))
    throw std::invalid_argument("dtypes: no kernels for images of type " + std::to_string(dtypes[0]) +
                                " around a branch of type " + std::to_string(dtypes[1]));
  return out;
}

// `norm`: mean, invstd, weight and bias, the last two 0 where absent.
PreNormArgs pre_norm_args(const std::array<int, 2>& dtypes, const Ints& shape, bool by_image,
                          const std::array<uintptr_t, 4>& norm, int threads) {
  PreNormArgs args;
  args.shape = pre_norm_shape(dtypes, shape, threads);
  args.by_image = by_image;
  const void** slots[] = {&args.mean, &args.invstd, &args.weight, &args.bias};
  for (size_t i = 0; i < 4; ++i) *slots[i] = pointer(norm[i]);
  return args;
}

}  // namespace

void bind_norm(Module& m) {
  m.def("batch_norm_stats_cpu",
        [](int dtype, const Ints& shape, const Ints& y, uintptr_t mean, uintptr_t var, int threads) {
          const auto size = batch_norm_shape(dtype, shape, threads);
          const auto image = view<Plane>(y, "y");
          const Unlocked unlocked;
          batch_norm_stats_cpu(size, image, pointer(mean), pointer(var), threads);
        },
        {"dtype", "shape", "y", "mean", "var", "threads"});
  m.def("batch_norm_apply_cpu",
        [](int dtype, const Ints& shape, const Ints& y, uintptr_t scale, uintptr_t shift, const Ints& residual,
           const Ints& out, int threads) {
          const auto size = batch_norm_shape(dtype, shape, threads);
          const auto from = view<Plane>(y, "y"), added = view<Plane>(residual, "residual"),
                     to = view<Plane>(out, "out");
          const Unlocked unlocked;
          batch_norm_apply_cpu(size, from, pointer(scale), pointer(shift), added, to, threads);
        },
        {"dtype", "shape", "y", "scale", "shift", "residual", "out", "threads"});
  m.def("batch_norm_backward_reduce_cpu",
        [](int dtype, const Ints& shape, const Ints& g, const Ints& y, uintptr_t mean, uintptr_t invstd,
           uintptr_t sum_g, uintptr_t sum_gx, int threads) {
          const auto size = batch_norm_shape(dtype, shape, threads);
          const auto gradient = view<Plane>(g, "g"), image = view<Plane>(y, "y");
          const Unlocked unlocked;
          batch_norm_backward_reduce_cpu(size, gradient, image, pointer(mean), pointer(invstd), pointer(sum_g),
                                         pointer(sum_gx), threads);
        },
        {"dtype", "shape", "g", "y", "mean", "invstd", "sum_g", "sum_gx", "threads"});
  m.def("batch_norm_backward_apply_cpu",
        [](int dtype, const Ints& shape, const Ints& g, const Ints& y, uintptr_t a, uintptr_t b, uintptr_t d,
           const Ints& out, int threads) {
          const auto size = batch_norm_shape(dtype, shape, threads);
          const auto gradient = view<Plane>(g, "g"), image = view<Plane>(y, "y"), to = view<Plane>(out, "out");
          const Unlocked unlocked;
          batch_norm_backward_apply_cpu(size, gradient, image, pointer(a), pointer(b), pointer(d), to, threads);
        },
        {"dtype", "shape", "g", "y", "a", "b", "d", "out", "threads"});
  // `dtypes`: of the images around the branch and of the branch's.
  m.def("pre_norm_apply_cpu",
        [](const std::array<int, 2>& dtypes, const Ints& shape, bool by_image, const std::array<uintptr_t, 4>& norm,
           const Ints& x, const Ints& out, int threads) {
          const auto args = pre_norm_args(dtypes, shape, by_image, norm, threads);
          const auto from = view<Plane>(x, "x"), to = view<Plane>(out, "out");
          const Unlocked unlocked;
          pre_norm_apply_cpu(args, from, to, threads);
        },
        {"dtypes", "shape", "by_image", "norm", "x", "out", "threads"});
  m.def("pre_norm_backward_cpu",
        [](const std::array<int, 2>& dtypes, const Ints& shape, bool by_image, const std::array<uintptr_t, 4>& norm,
           bool own, const Ints& grad, const Ints& x, const Ints& around, const Ints& out, uintptr_t d_weight,
           uintptr_t d_bias, int threads) {
          const auto args = pre_norm_args(dtypes, shape, by_image, norm, threads);
          const auto gradient = view<Plane>(grad, "grad"), image = view<Plane>(x, "x"),
                     added = view<Plane>(around, "around"), to = view<Plane>(out, "out");
          const Unlocked unlocked;
          pre_norm_backward_cpu(args, own, gradient, image, added, to, pointer(d_weight), pointer(d_bias), threads);
        },
        {"dtypes", "shape", "by_image", "norm", "own", "grad", "x", "around", "out", "d_weight", "d_bias", "threads"});
  m.def("pre_norm_join_cpu",
        [](const std::array<int, 2>& dtypes, const Ints& shape, const Ints& x, const Ints& branch, uintptr_t path,
           const Ints& out, int threads) {
          const auto size = pre_norm_shape(dtypes, shape, threads);
          const auto around = view<Plane>(x, "x"), added = view<Plane>(branch, "branch"), to = view<Plane>(out, "out");
          const Unlocked unlocked;
          pre_norm_join_cpu(size, around, added, pointer(path), to, threads);
        },
        {"dtypes", "shape", "x", "branch", "path", "out", "threads"});
}

}  // namespace wavemix::bindings
