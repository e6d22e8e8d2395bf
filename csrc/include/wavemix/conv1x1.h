// The weight's gradient of a 1x1 convolution on matrices of pixels: transpose(grad) image.
#pragma once

#include "wavemix/types.h"

namespace wavemix {

struct Conv1x1GradArgs {
  DType dtype = DType::f32;
  int64_t rows = 0;      // pixels
  int64_t o = 0, c = 0;  // columns of grad and of image
  Matrix grad, image;
  void* out = nullptr;  // (o, c), contiguous
};

// Summed in double for f64, in float for the others, and rounded once.
void conv1x1_backward_weight_cpu(const Conv1x1GradArgs& args, int threads);

}  // namespace wavemix
