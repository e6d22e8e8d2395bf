// The Python face of the Haar transforms along any axes.
#include "wavemix/haar_blocks.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

using Doubles = std::vector<double>;

// An axis: size, count, x stride, y stride, front, tail index; its weights: front, tail. `outer` and `inner`: size,
// x stride, y stride.
HaarBlocksArgs blocks_args(int dtype, uintptr_t x, uintptr_t y, const Ints& band, const std::vector<Ints>& axes,
                           const std::vector<Doubles>& edges, const std::vector<int>& pattern, const Doubles& weight,
                           const std::vector<Ints>& outer, const Ints& inner) {
  HaarBlocksArgs args;
  args.dtype = dtype_of(dtype);
  args.x = pointer(x);
  args.y = pointer(y);
  args.axes = static_cast<int>(axes.size());
  args.present = static_cast<int>(band.size());
  const size_t bands = size_t(1) << axes.size();
  if (axes.empty() || axes.size() > kMaxHaarAxes || edges.size() != axes.size() || pattern.size() != bands ||
      weight.size() != bands || band.empty() || band.size() > bands || outer.size() > kMaxOuterAxes ||
      (!inner.empty() && inner.size() != 3))
    throw std::invalid_argument("haar_blocks: lists of the wrong length");
  for (size_t i = 0; i < axes.size(); ++i) {
    if (axes[i].size() != 6 || edges[i].size() != 2)
      throw std::invalid_argument("axes: expected 6 integers and 2 weights");
    args.axis[i] = {axes[i][0], axes[i][1], axes[i][2], axes[i][3], axes[i][4], axes[i][5], edges[i][0], edges[i][1]};
  }
  for (size_t k = 0; k < bands; ++k) {
    if (pattern[k] < 0 || pattern[k] >= static_cast<int>(bands)) throw std::invalid_argument("pattern: no such band");
    if (k < band.size()) args.band[k] = band[k];
    args.pattern[k] = pattern[k];
    args.weight[k] = weight[k];
  }
  for (size_t i = 0; i < outer.size(); ++i) {
    if (outer[i].size() != 3) throw std::invalid_argument("outer: expected 3 integers");
    args.outer[i] = outer[i][0];
    args.outer_x[i] = outer[i][1];
    args.outer_y[i] = outer[i][2];
  }
  if (!inner.empty()) {
    args.inner = inner[0];
    args.inner_x = inner[1];
    args.inner_y = inner[2];
  } else if (axes.back()[4] != 0) {
    throw std::invalid_argument("axes: samples in front of a row need another axis inside");
  }
  return args;
}

}  // namespace

void bind_haar_blocks(Module& m) {
#if WAVEMIX_WITH_CPU
  m.def("haar_blocks_cpu",
        [](bool analysis, int dtype, uintptr_t x, uintptr_t y, const Ints& band, const std::vector<Ints>& axes,
           const std::vector<Doubles>& edges, const std::vector<int>& pattern, const Doubles& weight,
           const std::vector<Ints>& outer, const Ints& inner, int threads) {
          check_threads(threads);
          const auto args = blocks_args(dtype, x, y, band, axes, edges, pattern, weight, outer, inner);
          const Unlocked unlocked;
          (analysis ? haar_blocks_analysis_cpu : haar_blocks_synthesis_cpu)(args, threads);
        },
        {"analysis", "dtype", "x", "y", "band", "axes", "edges", "pattern", "weight", "outer", "inner", "threads"});
#endif
}

}  // namespace wavemix::bindings
