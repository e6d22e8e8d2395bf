// The transposed convolution by matrix units: see matrix_units.cpp and matrix_units_backward.cpp. choose.h says when.
#pragma once

#include "wavemix/deconv.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void deconv_matrix_units_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads);
// The weight's gradient, from u and y, the gradient of the output itself.
void deconv_matrix_units_backward_weight(const DeconvArgs& args, void* d_weight, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
