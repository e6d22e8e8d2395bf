// One level of a separable wavelet transform with any filters, of images or of lines, and its transpose.
#pragma once

#include "wavemix/haar.h"
#include "wavemix/types.h"

namespace wavemix {

// Samples past the ends of a line of n as weighted sums of those within. `before` positions -before ... -1 come first,
// then `after` positions n ... n + after - 1; position number i has the terms begin[i] ... begin[i + 1] - 1.
struct DwtBorder {
  int64_t before = 0, after = 0;
  const int64_t* begin = nullptr;
  const int64_t* index = nullptr;
  const double* weight = nullptr;
};

// One axis: coefficient k = 0 ... count - 1 is the sum over t of filter[t] * sample[start + spacing (stride k +
// dilation t)], with the samples past the ends as `border` says; start <= 0. A stride of 2 goes with a dilation of 1.
struct DwtAxis {
  int64_t size = 0, count = 0, start = 0, taps = 0;
  int64_t stride = 2, dilation = 1, spacing = 1;
  const void* low = nullptr;  // filters in the arithmetic type
  const void* high = nullptr;
  DwtBorder border;

  // Coefficients that one sample can reach: how many steps of `stride` the filter spans.
  int64_t reach() const { return taps == 0 ? 0 : dilation * (taps - 1) / stride + 1; }
};

// Bands: LL, LH (high along h), HL (high along w), HH. Analysis writes ll and high; synthesis, its exact transpose,
// writes the image, and where high.data is null takes zeros for the three bands. Synthesis adds what falls outside the
// image to the samples that `border` names, and drops it where there are none.
// A transform along one axis has taps = 0 in the other, whose size and count are equal, and one band, high.
struct DwtArgs {
  DType image_dtype = DType::f32, ll_dtype = DType::f32, high_dtype = DType::f32;
  int64_t n = 0, c = 0;
  DwtAxis h, w;
  Plane image;
  Plane ll;
  Bands high;
  bool add = false;  // synthesis along both axes adds to the image instead
};

// Quads a b / c d of a level's real bands and their complex numbers ((a - d) + i (b + c)) / sqrt(2) and
// ((a + d) + i (b - c)) / sqrt(2), an orthonormal map. Quads are h x w.
struct QuadsArgs {
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  // The four samples of a quad lie in one image of bands or, `trees`, in the bands of the four pairs of trees along H
  // and W. Along an axis that the band is a high-pass of, the second tree's sample comes first then.
  bool trees = false;
  Bands corner[4];
  Plane low;  // (n, c, 2h, 2w), band LL
  void* z = nullptr;
  int64_t z_stride[6] = {0, 0, 0, 0, 0, 0};  // n, c, orientation (15, 45, 75, 105, 135, 165 degrees), h, w, part
};

// double where a dtype is f64, else float; each output is rounded once.
void dwt_analysis_cpu(const DwtArgs& args, int threads);
void dwt_synthesis_cpu(const DwtArgs& args, int threads);
void quads_to_complex_cpu(const QuadsArgs& args, int threads);
void quads_from_complex_cpu(const QuadsArgs& args, int threads);

}  // namespace wavemix
