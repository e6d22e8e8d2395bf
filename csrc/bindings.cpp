// The compiled core's Python face: plain integers in (addresses, sizes, strides), nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "wavemix/haar.h"

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

wavemix::HaarArgs haar_args(int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add,
                            const Ints& ll, const std::vector<Ints>& highs, const std::vector<Ints>& lows) {
  if (levels < 1 || levels > wavemix::kMaxHaarLevels || highs.size() != static_cast<size_t>(levels))
    throw py::value_error("levels: got " + std::to_string(levels) + " with " + std::to_string(highs.size()) +
                          " high bands; one launch takes 1 to " + std::to_string(wavemix::kMaxHaarLevels));
  if (shape.size() != 4) throw py::value_error("shape: expected (n, c, h, w)");
  if (dtype < 0 || dtype > static_cast<int>(wavemix::DType::bf16))
    throw py::value_error("dtype: unknown code " + std::to_string(dtype));
  wavemix::HaarArgs args;
  args.dtype = static_cast<wavemix::DType>(dtype);
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

}  // namespace

PYBIND11_MODULE(WAVEMIX_MODULE_NAME, m) {
  m.doc() = "Compiled kernels of wavemix_kernels; called with checked arguments by wavemix_kernels.ops.";
  m.attr("MAX_HAAR_LEVELS") = wavemix::kMaxHaarLevels;
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
#endif
}
