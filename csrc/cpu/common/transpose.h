// A transposition in registers. Included by the per-ISA units only.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// dst[j][i] = src[i][j], for i < rows and j < columns, in blocks of 4 x 4 registers.
template <class A>
static inline void transpose(const A* src, int64_t src_stride, int64_t rows, int64_t columns, A* dst,
                             int64_t dst_stride) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Four r[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&r[k], src + (i + k) * src_stride + j, sizeof(Four));
      const Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                 b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const Four c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
                 d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
      r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
      r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
      r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(dst + (j + k) * dst_stride + i, &r[k], sizeof(Four));
    }
    for (; j < columns; ++j)
      for (int k = 0; k < 4; ++k) dst[j * dst_stride + i + k] = src[(i + k) * src_stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
}

// The same of 16-bit elements, in blocks of 8 x 8.
static inline void transpose_halves(const uint16_t* src, int64_t src_stride, int64_t rows, int64_t columns,
                                    uint16_t* dst, int64_t dst_stride) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  typedef uint32_t Four __attribute__((vector_size(16)));
  typedef uint64_t Two __attribute__((vector_size(16)));
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      Eight r[8];
      Four pairs[8];
      Two quads[8];
      for (int k = 0; k < 8; ++k) std::memcpy(&r[k], src + (i + k) * src_stride + j, sizeof(Eight));
      for (int k = 0; k < 4; ++k) {
        pairs[2 * k] = Four(__builtin_shufflevector(r[2 * k], r[2 * k + 1], 0, 8, 1, 9, 2, 10, 3, 11));
        pairs[2 * k + 1] = Four(__builtin_shufflevector(r[2 * k], r[2 * k + 1], 4, 12, 5, 13, 6, 14, 7, 15));
      }
      for (int k = 0; k < 2; ++k)
        for (int half = 0; half < 2; ++half) {
          const Four low = pairs[4 * k + half], high = pairs[4 * k + 2 + half];
          quads[4 * k + 2 * half] = Two(__builtin_shufflevector(low, high, 0, 4, 1, 5));
          quads[4 * k + 2 * half + 1] = Two(__builtin_shufflevector(low, high, 2, 6, 3, 7));
        }
      for (int k = 0; k < 4; ++k) {
        const Two even = __builtin_shufflevector(quads[k], quads[4 + k], 0, 2);
        const Two odd = __builtin_shufflevector(quads[k], quads[4 + k], 1, 3);
        std::memcpy(dst + (j + 2 * k) * dst_stride + i, &even, sizeof even);
        std::memcpy(dst + (j + 2 * k + 1) * dst_stride + i, &odd, sizeof odd);
      }
    }
    for (; j < columns; ++j)
      for (int k = 0; k < 8; ++k) dst[j * dst_stride + i + k] = src[(i + k) * src_stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
