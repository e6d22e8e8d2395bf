// Host entry points of the test kernels.
#pragma once

#include <string>

namespace wavemix::test {

// Runs the kernel `name` of wrong_kernels.cu, in its wrong or its right form, on `count` floats.
void run_wrong_kernel(const std::string& name, bool wrong, const float* input, float* output, int count);

// d (16 x 16 fp32) = a (16 x k) * b (k x 16), all row major: k = 16 for fp16 and bf16, 8 for tf32.
void matmul_f16(const void* a, const void* b, float* d);
void matmul_bf16(const void* a, const void* b, float* d);
void matmul_tf32(const void* a, const void* b, float* d);

}  // namespace wavemix::test
