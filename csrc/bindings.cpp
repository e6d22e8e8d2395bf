// The compiled core's Python face: plain integers in (addresses, sizes, strides), nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "wavemix/deconv.h"
#include "wavemix/haar.h"
#include "wavemix/mlp.h"
#include "wavemix/reduce_haar.h"
#include "wavemix/weight_grad.h"

#if WAVEMIX_WITH_CPU
#include "cpu/isa.h"
#endif
#if WAVEMIX_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

using Ints = std::vector<int64_t>;  // address, then strides in elements; empty for an absent tensor

template <class View>
View view(const Ints& ints, const char* name) {
  constexpr size_t rank = sizeof(View::stride) / sizeof(int64_t);
  View out;
  if (ints.empty()) return out;
  if (ints.size() != rank + 1)
    throw py::value_error(std::string(name) + ": expected an address and " + std::to_string(rank) + " strides, got " +
                          std::to_string(ints.size()) + " integers");
  out.data = reinterpret_cast<void*>(static_cast<uintptr_t>(ints[0]));
  for (size_t i = 0; i < rank; ++i) out.stride[i] = ints[i + 1];
  return out;
}

wavemix::DType dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(wavemix::DType::bf16))
    throw py::value_error("dtype: unknown code " + std::to_string(code));
  return static_cast<wavemix::DType>(code);
}

wavemix::HaarArgs haar_args(int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add,
                            const Ints& ll, const std::vector<Ints>& highs, const std::vector<Ints>& lows) {
  if (levels < 1 || levels > wavemix::kMaxHaarLevels || highs.size() != static_cast<size_t>(levels))
    throw py::value_error("levels: got " + std::to_string(levels) + " with " + std::to_string(highs.size()) +
                          " high bands; one launch takes 1 to " + std::to_string(wavemix::kMaxHaarLevels));
  if (shape.size() != 4) throw py::value_error("shape: expected (n, c, h, w)");
  wavemix::HaarArgs args;
  args.dtype = dtype_of(dtype);
  args.levels = levels;
  args.n = shape[0];
  args.c = shape[1];
  args.h = shape[2];
  args.w = shape[3];
  args.edge = static_cast<float>(edge);
  args.image = view<wavemix::Plane>(image, "image");
  args.add = view<wavemix::Plane>(add, "add");
  args.ll = view<wavemix::Plane>(ll, "ll");
  for (int l = 0; l < levels; ++l) args.high[l] = view<wavemix::Bands>(highs[l], "highs");
  if (lows.size() >= static_cast<size_t>(levels)) throw py::value_error("lows: the last level's LL is ll itself");
  for (size_t l = 0; l < lows.size(); ++l) args.low[l] = view<wavemix::Plane>(lows[l], "lows");
  return args;
}

wavemix::ReduceHaarArgs reduce_haar_args(int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x,
                                         const Ints& weight, const Ints& bias, const std::vector<Ints>& z,
                                         bool allow_tf32) {
  if (levels < 1 || levels > wavemix::kMaxHaarLevels || z.size() != static_cast<size_t>(levels))
    throw py::value_error("levels: got " + std::to_string(levels) + " with " + std::to_string(z.size()) +
                          " outputs; one launch takes 1 to " + std::to_string(wavemix::kMaxHaarLevels));
  if (shape.size() != 4) throw py::value_error("shape: expected (n, c, h, w)");
  if (weight.size() != 3) throw py::value_error("weight: expected an address and 2 strides");
  if (!bias.empty() && bias.size() != 2) throw py::value_error("bias: expected an address and a stride, or nothing");
  wavemix::ReduceHaarArgs args;
  args.dtype = dtype_of(dtype);
  args.levels = levels;
  args.n = shape[0];
  args.c = shape[1];
  args.h = shape[2];
  args.w = shape[3];
  args.o = outputs;
  args.x = view<wavemix::Plane>(x, "x");
  args.weight = reinterpret_cast<const void*>(static_cast<uintptr_t>(weight[0]));
  args.weight_stride[0] = weight[1];
  args.weight_stride[1] = weight[2];
  if (!bias.empty()) {
    args.bias = reinterpret_cast<const void*>(static_cast<uintptr_t>(bias[0]));
    args.bias_stride = bias[1];
  }
  for (int l = 0; l < levels; ++l) args.z[l] = view<wavemix::Plane>(z[l], "z");
  args.allow_tf32 = allow_tf32;
  return args;
}

#if WAVEMIX_WITH_CPU
void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
}

wavemix::Matrix matrix(const Ints& ints, const char* name) {
  if (ints.size() != 2)
    throw py::value_error(std::string(name) + ": expected an address and a row stride, got " +
                          std::to_string(ints.size()) + " integers");
  return {reinterpret_cast<void*>(static_cast<uintptr_t>(ints[0])), ints[1]};
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

wavemix::MlpArgs mlp_args(int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p,
                          uint64_t seed, int64_t first_row, int threads) {
  if (size.size() != 5) throw py::value_error("size: expected (rows, a, b, k, o)");
  if (tensors.size() != 6) throw py::value_error("tensors: expected scale, shift, w1, b1, w2 and b2");
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error("p: expected a probability, 0 to 1, got " + std::to_string(p));
  check_threads(threads);
  wavemix::MlpArgs args;
  args.dtype = dtype_of(dtype);
  args.rows = size[0];
  args.a = size[1];
  args.b = size[2];
  args.k = size[3];
  args.o = size[4];
  args.x = matrix(x, "x");
  args.second = matrix(second, "second");
  const void** slots[] = {&args.scale, &args.shift, &args.w1, &args.b1, &args.w2, &args.b2};
  for (size_t i = 0; i < 6; ++i) *slots[i] = reinterpret_cast<const void*>(static_cast<uintptr_t>(tensors[i]));
  args.p = p;
  args.seed = seed;
  args.first_row = first_row;
  return args;
}

wavemix::DeconvArgs deconv_args(int dtype, const Ints& size, const Ints& u, const Ints& y, uintptr_t weight,
                                const Ints& output, const Ints& norm, int threads) {
  if (size.size() != 5) throw py::value_error("size: expected (n, f, o, h, w)");
  check_threads(threads);
  wavemix::DeconvArgs args;
  args.dtype = dtype_of(dtype);
  args.n = size[0];
  args.f = size[1];
  args.o = size[2];
  args.h = size[3];
  args.w = size[4];
  args.u = view<wavemix::Plane>(u, "u");
  args.y = view<wavemix::Plane>(y, "y");
  if ((args.f > 1 && !u.empty() && args.u.stride[1] != 1) || (args.o > 1 && args.y.stride[1] != 1))
    throw py::value_error("u, y: expected contiguous channels, got channel strides of " +
                          std::to_string(args.u.stride[1]) + " and " + std::to_string(args.y.stride[1]));
  args.output = view<wavemix::Plane>(output, "output");
  if (norm.size() != (output.empty() ? 0 : 4))
    throw py::value_error("norm: expected a, b, mean and d to go with output");
  const void** slots[] = {&args.a, &args.b, &args.mean, &args.d};
  for (size_t i = 0; i < norm.size(); ++i) *slots[i] = pointer(static_cast<uintptr_t>(norm[i]));
  args.weight = pointer(weight);
  return args;
}

void check_contiguous_channels(const wavemix::ReduceHaarArgs& args, int threads) {
  check_threads(threads);
  if (args.c > 1 && args.x.stride[1] != 1 && args.x.stride[3] != 1)
    throw py::value_error("x: expected contiguous channels or pixels, got strides of " +
                          std::to_string(args.x.stride[1]) + " and " + std::to_string(args.x.stride[3]));
  for (int l = 0; l < args.levels; ++l)
    if (args.z[l].stride[1] != 1)
      throw py::value_error("zs: expected contiguous channels, got a stride of " + std::to_string(args.z[l].stride[1]));
}
#endif

}  // namespace

void bind_patm(py::module_& m);  // bindings_patm.cpp
void bind_norm(py::module_& m);  // bindings_norm.cpp

PYBIND11_MODULE(WAVEMIX_MODULE_NAME, m) {
  m.doc() = "Compiled kernels of wavemix_kernels; called with checked arguments by wavemix_kernels.ops.";
  m.attr("MAX_HAAR_LEVELS") = wavemix::kMaxHaarLevels;
  m.attr("DECONV_NARROW") = wavemix::kDeconvNarrow;
  m.attr("HAS_CPU") = static_cast<bool>(WAVEMIX_WITH_CPU);
  m.attr("HAS_CUDA") = static_cast<bool>(WAVEMIX_WITH_CUDA);
  m.attr("BUILD_NOTE") = WAVEMIX_BUILD_NOTE;

  // `lows`: the LL of the levels above the last, for the Waveblock's pyramid (haar.h).
  const auto no_lows = py::arg("lows") = std::vector<Ints>();
#if WAVEMIX_WITH_CPU
  m.def("cpu_isa", &wavemix::cpu_isa_name);
  m.def(
      "haar_analysis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        py::gil_scoped_release unlocked;
        wavemix::haar_analysis_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("ll"),
      py::arg("highs"), py::arg("threads"), no_lows);
  m.def(
      "haar_synthesis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        py::gil_scoped_release unlocked;
        wavemix::haar_synthesis_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("add"),
      py::arg("ll"), py::arg("highs"), py::arg("threads"), no_lows);
  // Matrices are (address, row stride), images (address, strides); arrays by channel are plain addresses.
  m.def(
      "mlp_forward_cpu",
      [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
         int64_t first_row, const Ints& out, int threads) {
        const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
        const auto to = matrix(out, "out");
        py::gil_scoped_release unlocked;
        wavemix::mlp_forward_cpu(args, to, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("x"), py::arg("second"), py::arg("tensors"), py::arg("p"),
      py::arg("seed"), py::arg("first_row"), py::arg("out"), py::arg("threads"));
  m.def(
      "mlp_backward_cpu",
      [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
         int64_t first_row, const Ints& grad, const Ints& d_x, const Ints& d_second, const Ints& out,
         const Ints& d_tensors, int threads) {
        const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
        if (d_tensors.size() != 4) throw py::value_error("d_tensors: expected those of w1, b1, w2 and b2");
        wavemix::MlpGradArgs grads;
        grads.grad = matrix(grad, "grad");
        grads.d_x = matrix(d_x, "d_x");
        grads.d_second = matrix(d_second, "d_second");
        grads.out = matrix(out, "out");
        void** slots[] = {&grads.d_w1, &grads.d_b1, &grads.d_w2, &grads.d_b2};
        for (size_t i = 0; i < 4; ++i) *slots[i] = pointer(static_cast<uintptr_t>(d_tensors[i]));
        py::gil_scoped_release unlocked;
        wavemix::mlp_backward_cpu(args, grads, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("x"), py::arg("second"), py::arg("tensors"), py::arg("p"),
      py::arg("seed"), py::arg("first_row"), py::arg("grad"), py::arg("d_x"), py::arg("d_second"), py::arg("out"),
      py::arg("d_tensors"), py::arg("threads"));
  m.def(
      "weight_grad_cpu",
      [](int dtype, const Ints& size, const Ints& grad, const Ints& image, uintptr_t out, int threads) {
        if (size.size() != 3) throw py::value_error("size: expected (rows, o, c)");
        check_threads(threads);
        wavemix::WeightGradArgs args;
        args.dtype = dtype_of(dtype);
        args.rows = size[0];
        args.o = size[1];
        args.c = size[2];
        args.grad = matrix(grad, "grad");
        args.image = matrix(image, "image");
        args.out = pointer(out);
        py::gil_scoped_release unlocked;
        wavemix::weight_grad_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("grad"), py::arg("image"), py::arg("out"), py::arg("threads"));
  m.def(
      "deconv_forward_cpu",
      [](int dtype, const Ints& size, const Ints& u, const Ints& y, uintptr_t weight, uintptr_t bias, uintptr_t mean,
         uintptr_t var, const Ints& residual, int threads) {
        auto args = deconv_args(dtype, size, u, y, weight, {}, {}, threads);
        args.residual = view<wavemix::Plane>(residual, "residual");
        if (!residual.empty() && ((args.o > 1 && args.residual.stride[1] != 1) || mean != 0))
          throw py::value_error("residual: expected contiguous channels, and no statistics beside it");
        py::gil_scoped_release unlocked;
        wavemix::deconv_forward_cpu(args, pointer(bias), pointer(mean), pointer(var), threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("u"), py::arg("y"), py::arg("weight"), py::arg("bias"),
      py::arg("mean"), py::arg("var"), py::arg("residual"), py::arg("threads"));
  // `output` and `norm`: the plane and the arrays a, b, mean, d of wavemix/deconv.h, or both empty. `u` is needed for
  // the gradient of the weight alone, `weight` for that of u alone; a gradient not wanted is empty, or 0.
  m.def(
      "deconv_gradients_cpu",
      [](int dtype, const Ints& size, const Ints& u, const Ints& grad, uintptr_t weight, const Ints& output,
         const Ints& norm, const Ints& d_u, uintptr_t d_weight, int threads) {
        const auto args = deconv_args(dtype, size, u, grad, weight, output, norm, threads);
        wavemix::DeconvGradients out;
        out.u = view<wavemix::Plane>(d_u, "d_u");
        out.weight = pointer(d_weight);
        if (args.f > 1 && !d_u.empty() && out.u.stride[1] != 1)
          throw py::value_error("d_u: expected contiguous channels, got a channel stride of " +
                                std::to_string(out.u.stride[1]));
        py::gil_scoped_release unlocked;
        wavemix::deconv_gradients_cpu(args, out, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("u"), py::arg("grad"), py::arg("weight"), py::arg("output"),
      py::arg("norm"), py::arg("d_u"), py::arg("d_weight"), py::arg("threads"));
  m.def(
      "reduce_haar_cpu",
      [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight, const Ints& bias,
         const std::vector<Ints>& zs, int threads) {
        const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, bias, zs, false);
        check_contiguous_channels(args, threads);
        py::gil_scoped_release unlocked;
        wavemix::reduce_haar_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("outputs"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("zs"), py::arg("threads"));
  m.def(
      "reduce_haar_backward_cpu",
      [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight,
         const std::vector<Ints>& zs, const Ints& d_x, const Ints& add, uintptr_t d_weight, uintptr_t d_bias,
         int threads) {
        const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, {}, zs, false);
        check_contiguous_channels(args, threads);
        wavemix::ReduceHaarGradArgs grads;
        grads.d_x = view<wavemix::Plane>(d_x, "d_x");
        grads.add = view<wavemix::Plane>(add, "add");
        grads.d_weight = pointer(d_weight);
        grads.d_bias = pointer(d_bias);
        py::gil_scoped_release unlocked;
        wavemix::reduce_haar_backward_cpu(args, grads, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("outputs"), py::arg("x"), py::arg("weight"),
      py::arg("zs"), py::arg("d_x"), py::arg("add"), py::arg("d_weight"), py::arg("d_bias"), py::arg("threads"));
  m.def(
      "philox4x32_cpu",
      [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
        if (counter.size() != 4 || key.size() != 2)
          throw py::value_error("philox4x32_cpu: expected 4 counter and 2 key words, got " +
                                std::to_string(counter.size()) + " and " + std::to_string(key.size()));
        uint32_t words[4];
        wavemix::philox4x32_cpu({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]}, words);
        return std::vector<uint32_t>(words, words + 4);
      },
      py::arg("counter"), py::arg("key"));
#endif
  bind_patm(m);
#if WAVEMIX_WITH_CPU
  bind_norm(m);
#endif

#if WAVEMIX_WITH_CUDA
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.attr("CUDA_ARCHS") = WAVEMIX_CUDA_ARCHS;
  m.def(
      "haar_analysis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, int device, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        py::gil_scoped_release unlocked;
        wavemix::haar_analysis_cuda(args, device, reinterpret_cast<void*>(stream));
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("ll"),
      py::arg("highs"), py::arg("device"), py::arg("stream"), no_lows);
  m.def(
      "haar_synthesis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, int device, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        py::gil_scoped_release unlocked;
        wavemix::haar_synthesis_cuda(args, device, reinterpret_cast<void*>(stream));
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("add"),
      py::arg("ll"), py::arg("highs"), py::arg("device"), py::arg("stream"), no_lows);
  // `weight` is (address, two strides), `bias` (address, stride) or empty.
  m.def(
      "reduce_haar_cuda",
      [](int dtype, int levels, const Ints& shape, int64_t outputs, const Ints& x, const Ints& weight, const Ints& bias,
         const std::vector<Ints>& z, bool allow_tf32, int device, uintptr_t stream) {
        const auto args = reduce_haar_args(dtype, levels, shape, outputs, x, weight, bias, z, allow_tf32);
        py::gil_scoped_release unlocked;
        wavemix::reduce_haar_cuda(args, device, reinterpret_cast<void*>(stream));
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("outputs"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("z"), py::arg("allow_tf32"), py::arg("device"), py::arg("stream"));
#endif
}
