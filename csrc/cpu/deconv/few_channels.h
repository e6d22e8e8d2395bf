// The transposed convolution for few channels: see few_channels.cpp. choose.h says when.
#pragma once

#include "wavemix/deconv.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void deconv_few_channels_forward(const DeconvArgs& args, const void* bias, void* mean, void* var, int threads);
void deconv_few_channels_backward(const DeconvArgs& args, const DeconvGradArgs& grads, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
