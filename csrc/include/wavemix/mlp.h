// The hidden layer of a pointwise MLP, between two matrix products that the caller makes: dropout(gelu(pre)).
#pragma once

#include <cstdint>

#include "wavemix/haar.h"  // DType

namespace wavemix {

// Rows `stride` elements apart, columns contiguous.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

// gelu is the exact form, x * Phi(x). Which elements dropout keeps follows from (seed, first_row + row, column)
// alone, as csrc/cpu/philox.h defines: not from the number of threads, nor from how rows are cut into calls.
// f64 computes in double, everything else in float; each output is rounded once.
struct GeluDropoutArgs {
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  int64_t first_row = 0;
  double p = 0.0;  // the probability to drop, 0 to 1; kept values are scaled by 1 / (1 - p)
  uint64_t seed = 0;
};

// hidden = dropout(gelu(pre)); hidden may be pre itself.
void gelu_dropout_forward_cpu(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& hidden, int threads);

// In one pass and in place: grad (of the loss by hidden) becomes the gradient by pre, and pre becomes hidden again,
// the same bits as forward wrote, which the second layer's weight gradient needs.
void gelu_dropout_backward_cpu(const GeluDropoutArgs& args, const Matrix& pre, const Matrix& grad, int threads);

// The generator itself, one block: for checks against its published vectors.
void philox4x32_cpu(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]);

}  // namespace wavemix
