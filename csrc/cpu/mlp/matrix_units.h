// The pointwise MLP by matrix units: see matrix_units.cpp. choose.h says when.
#pragma once

#include "wavemix/mlp.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void mlp_matrix_units_forward(const MlpArgs& args, const Matrix& out, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
