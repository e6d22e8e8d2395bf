// Pointwise MLP on matrices of pixels: dropout(gelu([x | second * scale + shift] w1^T + b1)) w2^T + b2.
#pragma once

#include "wavemix/types.h"

namespace wavemix {

// gelu is the exact form, x * Phi(x). The hidden elements that dropout keeps follow from (seed, row, column) alone, as
// csrc/cpu/mlp/philox.h defines: not from the number of threads. f64 computes in double, everything else in float, the
// hidden layer included; each output is rounded once. Weights and biases are contiguous, in the dtype of x; scale and
// shift in the arithmetic type. Null: absent.
struct MlpArgs {
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t a = 0, b = 0, k = 0, o = 0;  // columns of x, of second, of the hidden layer, of the output
  Matrix x, second;
  const void* scale = nullptr;  // (b)
  const void* shift = nullptr;  // (b)
  const void* w1 = nullptr;     // (k, a + b)
  const void* b1 = nullptr;     // (k)
  const void* w2 = nullptr;     // (o, k)
  const void* b2 = nullptr;     // (o)
  double p = 0.0;               // the probability to drop, 0 to 1; kept values are scaled by 1 / (1 - p)
  uint64_t seed = 0;
  int64_t first_row = 0;  // row 0's number, where the rows are part of a larger matrix
};

void mlp_forward_cpu(const MlpArgs& args, const Matrix& out, int threads);

// Everything but `grad` is written. The hidden layer is made again, and the output with it where it is wanted.
struct MlpGradArgs {
  Matrix grad;           // of the output
  Matrix d_x, d_second;  // d_second: of second * scale + shift
  Matrix out;            // optional: the output again
  void* d_w1 = nullptr;  // all contiguous, in the dtype of x
  void* d_b1 = nullptr;  // optional
  void* d_w2 = nullptr;
  void* d_b2 = nullptr;  // optional
};
void mlp_backward_cpu(const MlpArgs& args, const MlpGradArgs& grads, int threads);

// The generator itself, one block: for checks against its published vectors.
void philox4x32_cpu(const uint32_t (&counter)[4], const uint32_t (&key)[2], uint32_t (&words)[4]);

}  // namespace wavemix
