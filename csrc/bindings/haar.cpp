// The Python face of the Haar transforms.
#include "wavemix/haar.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

HaarArgs haar_args(int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add,
                   const Ints& ll, const std::vector<Ints>& highs, const std::vector<Ints>& lows) {
  if (levels < 1 || levels > kMaxHaarLevels || highs.size() != static_cast<size_t>(levels))
    throw std::invalid_argument("levels: got " + std::to_string(levels) + " with " + std::to_string(highs.size()) +
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
  if (lows.size() >= static_cast<size_t>(levels)) throw std::invalid_argument("lows: the last level's LL is ll itself");
  for (size_t l = 0; l < lows.size(); ++l) args.low[l] = view<Plane>(lows[l], "lows");
  return args;
}

}  // namespace

void bind_haar(Module& m) {
  m.attr("MAX_HAAR_LEVELS", kMaxHaarLevels);
  // `lows`, which may be left out: the LL of the levels above the last, for the Waveblock's pyramid (haar.h).
#if WAVEMIX_WITH_CPU
  m.def(
      "haar_analysis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        const Unlocked unlocked;
        haar_analysis_cpu(args, threads);
      },
      {"dtype", "levels", "shape", "edge", "image", "ll", "highs", "threads", "lows"}, 1);
  m.def(
      "haar_synthesis_cpu",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, int threads, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        const Unlocked unlocked;
        haar_synthesis_cpu(args, threads);
      },
      {"dtype", "levels", "shape", "edge", "image", "add", "ll", "highs", "threads", "lows"}, 1);
#endif
#if WAVEMIX_WITH_CUDA
  m.def(
      "haar_analysis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& ll,
         const std::vector<Ints>& highs, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, {}, ll, highs, lows);
        const Unlocked unlocked;
        haar_analysis_cuda(args, pointer(stream));
      },
      {"dtype", "levels", "shape", "edge", "image", "ll", "highs", "stream", "lows"}, 1);
  m.def(
      "haar_synthesis_cuda",
      [](int dtype, int levels, const Ints& shape, double edge, const Ints& image, const Ints& add, const Ints& ll,
         const std::vector<Ints>& highs, uintptr_t stream, const std::vector<Ints>& lows) {
        const auto args = haar_args(dtype, levels, shape, edge, image, add, ll, highs, lows);
        const Unlocked unlocked;
        haar_synthesis_cuda(args, pointer(stream));
      },
      {"dtype", "levels", "shape", "edge", "image", "add", "ll", "highs", "stream", "lows"}, 1);
#endif
}

}  // namespace wavemix::bindings
