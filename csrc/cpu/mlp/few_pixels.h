// The pointwise MLP where its weights outweigh the image: see few_pixels.cpp. choose.h says when.
#pragma once

#include "wavemix/mlp.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void mlp_few_pixels_forward(const MlpArgs& args, const Matrix& out, int threads);
void mlp_few_pixels_backward(const MlpArgs& args, const MlpGradArgs& grads, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
