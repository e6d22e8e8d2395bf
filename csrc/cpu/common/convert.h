// Element types of the CPU kernels and their conversion to the arithmetic type (float for the half types).
// Included by the per-ISA units only; everything lives in their namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "wavemix/types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace wavemix {
namespace WAVEMIX_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// Calls `run` with a value of the element type.
template <class Run>
static void dispatch(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f64:
      return run(double{});
    case DType::f32:
      return run(float{});
    case DType::f16:
      return run(f16{});
    case DType::bf16:
      return run(bf16{});
  }
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double load(const double& x) { return x; }
static inline float load(const float& x) { return x; }
static inline float load(const bf16& x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

static inline void store(double& out, double value) { out = value; }
static inline void store(float& out, float value) { out = value; }
static inline void store(bf16& out, float value) {
  // Round to nearest even; a NaN keeps its sign and gets a quiet payload instead of carrying into infinity.
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

#if defined(__F16C__)
static inline float load(const f16& x) { return _cvtsh_ss(x.bits); }
static inline void store(f16& out, float value) { out.bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline float load(const f16& x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into float's fields the exponent is 112 too small; the product is exact, subnormals included.
  const float value = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(value));
}
static inline void store(f16& out, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns the half's last bit with the float's, and the FPU rounds to even.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}
#endif

// Rows: n elements `stride` apart, to and from contiguous arithmetic values. The contiguous f16 case is
// spelled out because compilers do not vectorise the conversion on their own.
// Conversions are not inlined: they are worth a call, and copies at every place would double the time of a build.
template <class T, class A>
static inline void load_row(const T* src, int64_t stride, int64_t n, A* __restrict dst) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = load(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = load(src[i * stride]);
  }
}
template <class T, class A>
static inline void store_row(const A* __restrict src, T* dst, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) store(dst[i], src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(dst[i * stride], src[i]);
  }
}
__attribute__((noinline, unused)) static void load_row(const bf16* src, int64_t stride, int64_t n,
                                                       float* __restrict dst) {
  load_row<bf16, float>(src, stride, n, dst);
}
__attribute__((noinline, unused)) static void store_row(const float* __restrict src, bf16* dst, int64_t stride,
                                                        int64_t n) {
  store_row<bf16, float>(src, dst, stride, n);
}
#if defined(__F16C__)
__attribute__((noinline, unused)) static void load_row(const f16* src, int64_t stride, int64_t n,
                                                       float* __restrict dst) {
  int64_t i = 0;
  if (stride == 1) {
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
#endif
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = load(src[i * stride]);
}
__attribute__((noinline, unused)) static void store_row(const float* __restrict src, f16* dst, int64_t stride,
                                                        int64_t n) {
  int64_t i = 0;
  if (stride == 1) {
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) store(dst[i * stride], src[i]);
}
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
