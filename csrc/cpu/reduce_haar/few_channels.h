// The 1x1 convolution and one Haar level for few channels (few_channels.cpp; choose.h says when), and what it shares
// with reduce_haar.cpp. Included by the per-ISA units only.
#pragma once

#include "cpu/common/parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void reduce_haar_few_channels(const ReduceHaarArgs& args, int threads);
void reduce_haar_few_channels_backward(const ReduceHaarArgs& args, const ReduceHaarGradArgs& grads, int threads);

static inline bool pixels_inner(const ReduceHaarArgs& args) { return args.c > 1 && args.x.stride[1] != 1; }

static inline int threads_for(const ReduceHaarArgs& args, int threads) {
  return args.n * args.h * args.w * args.c < kSerialElements ? 1 : threads;
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
