// Kernels take raw pointers, sizes and strides. Torch is met only in Python, so one build serves every
// torch version and building needs none.
#pragma once

#include <cstdint>

namespace wavemix {

enum class DType : int { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

// An image. Strides are in elements; any value is allowed, overlapping reads included.
struct Plane {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};  // n, c, h, w
};

// Rows `stride` elements apart, columns contiguous.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

}  // namespace wavemix
