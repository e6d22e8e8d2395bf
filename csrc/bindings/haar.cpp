// The Python face of the Haar transforms.
#include "wavemix/haar.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

HaarArgs haar_args(int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add,
                   const Ints& ll, const std::vector<Ints>& highs, const std::vector<Ints>& lows) {
  if (levels < 1 || levels > kMaxHaarLevels || highs.size() != static_cast<size_t>(levels))
    throw py::value_error("levels: got " + std::to_string(levels) + " with " + std::to_string(highs.size()) +
                          " high bands; one launch takes 1 to " + std::to_string(kMaxHaarLevels));
  HaarArgs args;
  args.dtype = dtype_of(dtype);
  args.levels = levels;
  set_shape(args, shape);
  args.edge = static_cast<float>(edge);
  args.image = view<Plane>(image, "image");
  args.add = view<Plane>(add, "add");
  args.ll = view<Plane>(ll, "ll");
  for (int l = 0; l < levels; ++l) args.high[l] = view<Bands>(highs[l], "highs");
  if (lows.size() >= static_cast<size_t>(levels)) throw py::value_error("lows: the last level's LL is ll itself");
  for (size_t l = 0; l < lows.size(); ++l) args.low[l] = view<Plane>(lows[l], "lows");
  return args;
}

}  // namespace

void bind_haar(py::module_& m) {
  m.attr("MAX_HAAR_LEVELS") = kMaxHaarLevels;
  // `lows`: the LL of the levels above the last, for the Waveblock's pyramid (haar.h).
  const auto no_lows = py::arg("lows") = std::vector<Ints>();
#if WAVEMIX_WITH_CPU
  m.def(
      "haar_analysis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        py::gil_scoped_release unlocked;
        haar_analysis_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("ll"),
      py::arg("highs"), py::arg("threads"), no_lows);
  m.def(
      "haar_synthesis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        py::gil_scoped_release unlocked;
        haar_synthesis_cpu(args, threads);
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("add"),
      py::arg("ll"), py::arg("highs"), py::arg("threads"), no_lows);
#endif
#if WAVEMIX_WITH_CUDA
  m.def(
      "haar_analysis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        py::gil_scoped_release unlocked;
        haar_analysis_cuda(args, pointer(stream));
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("ll"),
      py::arg("highs"), py::arg("stream"), no_lows);
  m.def(
      "haar_synthesis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        py::gil_scoped_release unlocked;
        haar_synthesis_cuda(args, pointer(stream));
      },
      py::arg("dtype"), py::arg("levels"), py::arg("shape"), py::arg("edge"), py::arg("image"), py::arg("add"),
      py::arg("ll"), py::arg("highs"), py::arg("stream"), no_lows);
#endif
}

}  // namespace wavemix::bindings
