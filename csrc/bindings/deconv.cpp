// The Python face of the transposed convolution: images are (address, four strides), arrays by channel plain
// addresses.
#include "wavemix/deconv.h"

#include "bindings/common.h"
#include "cpu/choose.h"

namespace wavemix::bindings {
namespace {

DeconvArgs deconv_args(int dtype, const Ints& size, const Ints& u, const Ints& y, uintptr_t weight, const Ints& output,
                       const Ints& norm, int threads) {
  if (size.size() != 5) throw std::invalid_argument("size: expected (n, f, o, h, w)");
  check_threads(threads);
  DeconvArgs args;
  args.dtype = dtype_of(dtype);
  args.n = size[0];
  args.f = size[1];
  args.o = size[2];
  args.h = size[3];
  args.w = size[4];
  args.u = view<Plane>(u, "u");
  args.y = view<Plane>(y, "y");
  if ((args.f > 1 && !u.empty() && args.u.stride[1] != 1) || (args.o > 1 && args.y.stride[1] != 1))
    throw std::invalid_argument("u, y: expected contiguous channels, got channel strides of " +
                                std::to_string(args.u.stride[1]) + " and " + std::to_string(args.y.stride[1]));
  args.output = view<Plane>(output, "output");
  if (norm.size() != (output.empty() ? 0 : 4))
    throw std::invalid_argument("norm: expected a, b, mean and d to go with output");
  const void** slots[] = {&args.a, &args.b, &args.mean, &args.d};
  for (size_t i = 0; i < norm.size(); ++i) *slots[i] = pointer(norm[i]);
  args.weight = pointer(weight);
  return args;
}

}  // namespace

void bind_deconv(Module& m) {
  m.attr("DECONV_NARROW", choose::kDeconvFewChannels);
  m.def("deconv_forward_cpu",
        [](int dtype, const Ints& size, const Ints& u, const Ints& y, uintptr_t weight, uintptr_t bias, uintptr_t mean,
           uintptr_t var, const Ints& residual, int threads) {
          auto args = deconv_args(dtype, size, u, y, weight, {}, {}, threads);
          args.residual = view<Plane>(residual, "residual");
          if (!residual.empty() && ((args.o > 1 && args.residual.stride[1] != 1) || mean != 0))
            throw std::invalid_argument("residual: expected contiguous channels, and no statistics beside it");
          const Unlocked unlocked;
          deconv_forward_cpu(args, pointer(bias), pointer(mean), pointer(var), threads);
        },
        {"dtype", "size", "u", "y", "weight", "bias", "mean", "var", "residual", "threads"});
  m.def("deconv_backward_cpu",
        [](int dtype, const Ints& size, const Ints& u, const Ints& grad, uintptr_t weight, const Ints& output,
           const Ints& norm, const Ints& d_u, uintptr_t d_weight, int threads) {
          const auto args = deconv_args(dtype, size, u, grad, weight, output, norm, threads);
          DeconvGradArgs grads;
          grads.d_u = view<Plane>(d_u, "d_u");
          grads.d_weight = pointer(d_weight);
          if (args.f > 1 && !d_u.empty() && grads.d_u.stride[1] != 1)
            throw std::invalid_argument("d_u: expected contiguous channels, got a channel stride of " +
                                        std::to_string(grads.d_u.stride[1]));
          const Unlocked unlocked;
          deconv_backward_cpu(args, grads, threads);
        },
        {"dtype", "size", "u", "grad", "weight", "output", "norm", "d_u", "d_weight", "threads"});
}

}  // namespace wavemix::bindings
