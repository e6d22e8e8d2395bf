// The Python face of the 1x1 convolution with its Haar levels: `weight` is (address, two strides), `bias`
// (address, stride) or empty.
#include "wavemix/reduce_haar.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

ReduceHaarArgs reduce_haar_args(int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x,
                                const Ints& weight, const Ints& bias, const std::vector<Ints>& z, bool allow_tf32) {
  if (levels < 1 || levels > kMaxHaarLevels || z.size() != static_cast<size_t>(levels))
    throw std::invalid_argument("levels: got " + std::to_string(levels) + " with " + std::to_string(z.size()) +
                                " outputs; one launch takes 1 to " + std::to_string(kMaxHaarLevels));
  if (weight.size() != 3) throw std::invalid_argument("weight: expected an address and 2 strides");
  if (!bias.empty() && bias.size() != 2)
    throw std::invalid_argument("bias: expected an address and a stride, or nothing");
  ReduceHaarArgs args;
  args.dtype = dtype_of(dtype);
  args.levels = levels;
  set_shape(args, shape);
  args.o = outputs;
  args.x = view<Plane>(x, "x");
  args.weight = pointer(weight[0]);
  args.weight_stride[0] = weight[1];
  args.weight_stride[1] = weight[2];
  if (!bias.empty()) {
    args.bias = pointer(bias[0]);
    args.bias_stride = bias[1];
  }
  for (int l = 0; l < levels; ++l) args.z[l] = view<Plane>(z[l], "z");
  args.allow_tf32 = allow_tf32;
  return args;
}

#if WAVEMIX_WITH_CPU
void check_contiguous_channels(const ReduceHaarArgs& args, int threads) {
  check_threads(threads);
  if (args.c > 1 && args.x.stride[1] != 1 && args.x.stride[3] != 1)
    throw std::invalid_argument("x: expected contiguous channels or pixels, got strides of " +
                                std::to_string(args.x.stride[1]) + " and " + std::to_string(args.x.stride[3]));
  for (int l = 0; l < args.levels; ++l)
    if (args.z[l].stride[1] != 1)
      throw std::invalid_argument("zs: expected contiguous channels, got a stride of " +
                                  std::to_string(args.z[l].stride[1]));
}
#endif

ReduceHaarGradArgs gradients(const Ints& d_x, const Ints& add, uintptr_t d_weight, uintptr_t d_bias) {
  ReduceHaarGradArgs grads;
  grads.d_x = view<Plane>(d_x, "d_x");
  grads.add = view<Plane>(add, "add");
  grads.d_weight = pointer(d_weight);
  grads.d_bias = pointer(d_bias);
  return grads;
}

#if WAVEMIX_WITH_CUDA
float* floats(int64_t address) { return static_cast<float*>(pointer(address)); }

// Addresses of y, mean, invstd and sums, or nothing.
NormSumArgs norm_sums(const Ints& norm) {
  if (norm.empty()) return {};
  if (norm.size() != 4) throw std::invalid_argument("norm: expected four addresses, or nothing");
  return {pointer(norm[0]), floats(norm[1]), floats(norm[2]), floats(norm[3])};
}
#endif

}  // namespace

void bind_reduce_haar(Module& m) {
#if WAVEMIX_WITH_CPU
  m.def("reduce_haar_cpu",
        [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight,
           const Ints& bias, const std::vector<Ints>& zs, int threads) {
          const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, bias, zs, false);
          check_contiguous_channels(args, threads);
          const Unlocked unlocked;
          reduce_haar_cpu(args, threads);
        },
        {"dtype", "levels", "shape", "outputs", "x", "weight", "bias", "zs", "threads"});
  m.def("reduce_haar_backward_cpu",
        [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight,
           const std::vector<Ints>& zs, const Ints& d_x, const Ints& add, uintptr_t d_weight, uintptr_t d_bias,
           int threads) {
          const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, {}, zs, false);
          check_contiguous_channels(args, threads);
          const auto grads = gradients(d_x, add, d_weight, d_bias);
          const Unlocked unlocked;
          reduce_haar_backward_cpu(args, grads, threads);
        },
        {"dtype", "levels", "shape", "outputs", "x", "weight", "zs", "d_x", "add", "d_weight", "d_bias", "threads"});
#endif
#if WAVEMIX_WITH_CUDA
  m.def("reduce_haar_cuda",
        [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight,
           const Ints& bias, const std::vector<Ints>& z, bool allow_tf32, uintptr_t stream) {
          const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, bias, z, allow_tf32);
          const Unlocked unlocked;
          reduce_haar_cuda(args, pointer(stream));
        },
        {"dtype", "levels", "shape", "outputs", "x", "weight", "bias", "z", "allow_tf32", "stream"});
  m.def("reduce_haar_backward_shared_cuda", &reduce_haar_backward_shared_cuda, {"c", "o", "norm"});
  m.def(
      "norm_reduce_haar_cuda",
      [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight, const Ints& bias,
         const std::vector<Ints>& z, uintptr_t y, int64_t scale, int64_t shift, uintptr_t image, uintptr_t stream) {
        const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, bias, z, false);
        const NormImageArgs norm = {pointer(y), floats(scale), floats(shift), pointer(image)};
        const Unlocked unlocked;
        norm_reduce_haar_cuda(args, norm, pointer(stream));
      },
      {"dtype", "levels", "shape", "outputs", "x", "weight", "bias", "z", "y", "scale", "shift", "image", "stream"});
  m.def("reduce_haar_backward_workspace_cuda",
        [](int dtype, int levels, const Ints& shape, int64_t outputs, bool norm, int multiprocessors,
           int64_t shared_of_multiprocessor) {
          const std::vector<Ints> zs(static_cast<size_t>(levels));
          const auto args = reduce_haar_args(dtype, levels, shape, outputs, {}, {0, 0, 0}, {}, zs, false);
          return reduce_haar_backward_workspace_cuda(args, norm, multiprocessors, shared_of_multiprocessor);
        },
        {"dtype", "levels", "shape", "outputs", "norm", "multiprocessors", "shared_of_multiprocessor"});
  m.def("reduce_haar_backward_cuda",
        [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight,
           const std::vector<Ints>& zs, const Ints& d_x, const Ints& add, uintptr_t d_weight, uintptr_t d_bias,
           const Ints& norm, uintptr_t workspace, int multiprocessors, int64_t shared_of_multiprocessor,
           uintptr_t stream) {
          const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, {}, zs, false);
          const auto grads = gradients(d_x, add, d_weight, d_bias);
          const Unlocked unlocked;
          reduce_haar_backward_cuda(args, grads, norm_sums(norm), pointer(workspace), multiprocessors,
                                    shared_of_multiprocessor, pointer(stream));
        },
        {"dtype", "levels", "shape", "outputs", "x", "weight", "zs", "d_x", "add", "d_weight", "d_bias", "norm",
         "workspace", "multiprocessors", "shared_of_multiprocessor", "stream"});
#endif
}

}  // namespace wavemix::bindings
