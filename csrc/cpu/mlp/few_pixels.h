// The pointwise MLP where its weights outweigh the image: see wide_mlp.cpp. For mlp.cpp, which decides.
#pragma once

#include "wavemix/mlp.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// One input and no dropout; gradients without the output.
bool is_wide(const MlpArgs& args);
void wide_mlp_forward(const MlpArgs& args, const Matrix& out, int threads);
void wide_mlp_backward(const MlpArgs& args, const MlpGradArgs& grads, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
