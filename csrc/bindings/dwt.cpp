// The Python face of the wavelet transforms with any filters.
#include "wavemix/dwt.h"

#include <array>

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

// size, count, start, taps, addresses of low and high, before, after, then of the border's three arrays, stride,
// dilation, spacing.
DwtAxis axis(const Ints& ints, const char* name) {
  if (ints.size() != 14)
    throw std::invalid_argument(std::string(name) + ": expected 14 integers, got " + std::to_string(ints.size()));
  if (ints[2] > 0 || ints[3] < 0 || ints[3] == 1 || (ints[3] == 0 && ints[0] != ints[1]))
    throw std::invalid_argument(std::string(name) +
                                ": expected start <= 0 and 2 taps or more, or none and equal sizes");
  if (ints[11] < 1 || ints[11] > 2 || ints[12] < 1 || ints[13] < 1 || (ints[11] == 2 && ints[12] != 1))
    throw std::invalid_argument(std::string(name) +
                                ": expected stride 2 and dilation 1, or stride 1, and a spacing of 1 up");
  DwtAxis out;
  out.size = ints[0];
  out.count = ints[1];
  out.start = ints[2];
  out.taps = ints[3];
  out.low = pointer(ints[4]);
  out.high = pointer(ints[5]);
  out.border.before = ints[6];
  out.border.after = ints[7];
  out.border.begin = static_cast<const int64_t*>(pointer(ints[8]));
  out.border.index = static_cast<const int64_t*>(pointer(ints[9]));
  out.border.weight = static_cast<const double*>(pointer(ints[10]));
  out.stride = ints[11];
  out.dilation = ints[12];
  out.spacing = ints[13];
  return out;
}

DwtArgs dwt_args(const std::array<int, 3>& dtypes, int64_t n, int64_t c, const Ints& h, const Ints& w,
                 const Ints& image, const Ints& ll, const Ints& high) {
  DwtArgs args;
  args.image_dtype = dtype_of(dtypes[0]);
  args.ll_dtype = dtype_of(dtypes[1]);
  args.high_dtype = dtype_of(dtypes[2]);
  for (const DType dtype : {args.ll_dtype, args.high_dtype})
    if ((dtype == DType::f64) != (args.image_dtype == DType::f64))
      throw std::invalid_argument("dtypes: float64 goes with float64 only");
  args.n = n;
  args.c = c;
  args.h = axis(h, "h");
  args.w = axis(w, "w");
  if (args.h.taps == 0 && args.w.taps == 0) throw std::invalid_argument("h, w: one of them needs filters");
  args.image = view<Plane>(image, "image");
  args.ll = view<Plane>(ll, "ll");
  args.high = view<Bands>(high, "high");
  return args;
}

QuadsArgs quads_args(int dtype, const Ints& size, bool trees, const std::vector<Ints>& corners, const Ints& low,
                     const Ints& z) {
  if (size.size() != 4) throw std::invalid_argument("size: expected n, c, h, w");
  if (corners.size() != 4) throw std::invalid_argument("corners: expected four");
  if (z.size() != 7) throw std::invalid_argument("z: expected an address and 6 strides");
  QuadsArgs args;
  args.dtype = dtype_of(dtype);
  args.n = size[0];
  args.c = size[1];
  args.h = size[2];
  args.w = size[3];
  args.trees = trees;
  for (int i = 0; i < 4; ++i) args.corner[i] = view<Bands>(corners[i], "corners");
  args.low = view<Plane>(low, "low");
  args.z = pointer(z[0]);
  for (int i = 0; i < 6; ++i) args.z_stride[i] = z[i + 1];
  return args;
}

#if WAVEMIX_WITH_CPU
void dwt_synthesis_add(const DwtArgs& args, int threads) {
  if (args.h.taps == 0 || args.w.taps == 0) throw std::invalid_argument("h, w: expected filters along both axes");
  DwtArgs more = args;
  more.add = true;
  dwt_synthesis_cpu(more, threads);
}

template <void (*kernel)(const DwtArgs&, int)>
void dwt(const std::array<int, 3>& dtypes, int64_t n, int64_t c, const Ints& h, const Ints& w, const Ints& image,
         const Ints& ll, const Ints& high, int threads) {
  const DwtArgs args = dwt_args(dtypes, n, c, h, w, image, ll, high);
  check_threads(threads);
  const Unlocked unlocked;
  kernel(args, threads);
}

template <void (*kernel)(const QuadsArgs&, int)>
void quads(int dtype, const Ints& size, bool trees, const std::vector<Ints>& corners, const Ints& low, const Ints& z,
           int threads) {
  const QuadsArgs args = quads_args(dtype, size, trees, corners, low, z);
  check_threads(threads);
  const Unlocked unlocked;
  kernel(args, threads);
}
#endif

}  // namespace

void bind_dwt(Module& m) {
#if WAVEMIX_WITH_CPU
  const std::vector<const char*> names = {"dtypes", "n", "c", "h", "w", "image", "ll", "high", "threads"};
  m.def("dwt_analysis_cpu", &dwt<dwt_analysis_cpu>, names);
  m.def("dwt_synthesis_cpu", &dwt<dwt_synthesis_cpu>, names);
  m.def("dwt_synthesis_add_cpu", &dwt<dwt_synthesis_add>, names);
  const std::vector<const char*> of_quads = {"dtype", "size", "trees", "corners", "low", "z", "threads"};
  m.def("quads_to_complex_cpu", &quads<quads_to_complex_cpu>, of_quads);
  m.def("quads_from_complex_cpu", &quads<quads_from_complex_cpu>, of_quads);
#endif
}

}  // namespace wavemix::bindings
