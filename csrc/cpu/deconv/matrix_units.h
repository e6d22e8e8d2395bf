// The transposed convolution by matrix units: see matrix_units.cpp and matrix_units_backward.cpp. choose.h says when.
#pragma once

#include "wavemix/deconv.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// Outputs of one parity of rows and columns are a phase, a 2x2 convolution of u: output row 2y + p reads u's row
// y + a - 1 + p through the kernel's row 3 - 2a - p, and so for columns. The place of a tap of the kernel among all
// phases' taps, a phase's behind each other.
constexpr int kPhases = 4, kTaps = 4;
constexpr int place_of_tap(int ky, int kx) {
  const int py = (3 - ky) % 2, a = (3 - ky) / 2, px = (3 - kx) % 2, b = (3 - kx) / 2;
  return (2 * py + px) * kTaps + 2 * a + b;
}

void deconv_matrix_units_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads);
// The weight's gradient, from u and y, the gradient of the output itself.
void deconv_matrix_units_backward_weight(const DeconvArgs& args, void* d_weight, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
