// Sine and cosine of phases, which are not negative and have any size; accurate, and in registers alone (the toolkit's
// own long reduction keeps an array in local memory).
//
// x = n pi/2 + r with |r| <= pi/4, a little more through the rounding of x 2/pi. Up to kFastPhase pi/2 is split into
// parts (Cody and Waite). Float: n times the first two has at most 24 bits for n < 2^13, and so have the differences,
// so only the third step rounds, with or without FMA. Double: two explicit FMAs, each of which rounds a value below 1.
// Beyond, x is an integer m times 2^q, and x 2/pi modulo 4 is m times the bits of 2/pi from weight 2^(1 - q) down
// (Payne and Hanek). Only the absolute error of r matters, so a window of 64 bits will do for float (m has 24:
// 2^-37), and one of 128 for double (2^-61).
//
// Polynomials in the form of Cephes' sinf and cosf, and of fdlibm's __kernel_sin and __kernel_cos. |error| is at most
// 1.33 * 2^-24 for float (1.32 of the short reduction; every float from 1e-7 on was tried, with FMA), and 2.5 * 2^-53
// for double, where r errs by up to 1.4 of these units, times a cosine.
//
// Half types, which are rounded to 2^-8 or 2^-11 of their size, take the chip's own functions of |r| <= pi:
// |error| <= 2^-20.5 (PTX ISA, sin.approx and cos.approx, for |r| <= 2 pi). x = n 2 pi + r with 2 pi in two parts: n
// times the first has at most 24 bits for n < 2^11, and so has the difference, so only the second step rounds, a value
// below 4: 2^-23. With the rounding of the result 13.9 * 2^-24.
#pragma once

#include <cmath>

#include "cuda/common/vector.cuh"

namespace wavemix {

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
__device__ constexpr A kFastPhase = 0;
template <>
__device__ constexpr float kFastPhase<float> = 8192.0f;
template <>
__device__ constexpr double kFastPhase<double> = 1048576.0;

__device__ inline void reduce(float x, float& r, uint32_t& quadrant) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 0.636619772f + kRound;
  const float n = shifted - kRound;
  quadrant = bits_as<uint32_t>(shifted);
  r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
}
__device__ inline void reduce(double x, double& r, uint32_t& quadrant) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = fma(x, 0.63661977236758134308, kRound);
  const double n = shifted - kRound;
  quadrant = static_cast<uint32_t>(bits_as<uint64_t>(shifted));
  r = fma(-n, 6.12323399573676603587e-17, fma(-n, 1.57079632679489655800, x));
}

// 64 zero bits, then those of 2/pi: as many as the largest double's window reaches.
static __device__ __constant__ const uint64_t kTwoOverPi[] = {
    0x0000000000000000, 0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041, 0xfe5163abdebbc561,
    0xb7246e3a424dd2e0, 0x06492eea09d1921c, 0xfe1deb1cb129a73e, 0xe88235f52ebb4484, 0xe99c7026b45f7e41,
    0x3991d639835339f4, 0x9c845f8bbdf9283b, 0x1ff897ffde05980f, 0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7,
    0x4f463f669e5fea2d, 0x7527bac7ebe5f17b, 0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08,
};
// Returns 64 of these bits, from `first` on.
__device__ inline uint64_t two_over_pi(uint32_t first) {
  const uint64_t* const word = kTwoOverPi + first / 64;
  return (word[0] << first % 64) | ((word[1] >> 1) >> (63 - first % 64));
}

// `turns` is x 2/pi modulo 4, a fixed-point number whose first two bits are whole.
template <class A>
__device__ inline void reduce_turns(uint64_t turns, A& r, uint32_t& quadrant) {
  quadrant = static_cast<uint32_t>((turns + (uint64_t{1} << 61)) >> 62);
  constexpr double kUnit = 8.5153039502163873e-20;  // pi/2 * 2^-64
  r = static_cast<A>(static_cast<double>(static_cast<int64_t>(turns << 2)) * kUnit);
}

// x > kFastPhase; q is its exponent less the bias, which includes the digits of m.
__device__ inline uint64_t quarter_turns(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  constexpr uint32_t kBias = 150;
  return ((bits & 0x7fffffu) | 0x800000u) * two_over_pi((bits >> 23) - kBias + 62);
}
__device__ inline void reduce_far(float x, float& r, uint32_t& quadrant) {
  reduce_turns(quarter_turns(x), r, quadrant);
  if (bits_as<uint32_t>(x) >> 23 == 255) r = x - x;  // infinity has no rest
}
__device__ inline void reduce_far(double x, double& r, uint32_t& quadrant) {
  const uint64_t bits = bits_as<uint64_t>(x);
  constexpr uint32_t kBias = 1075;
  const uint32_t exponent = static_cast<uint32_t>(bits >> 52);
  const uint64_t m = (bits & 0xfffffffffffffu) | 0x10000000000000u;
  reduce_turns(m * two_over_pi(exponent - kBias + 62) + __umul64hi(m, two_over_pi(exponent - kBias + 126)), r,
               quadrant);
  if (exponent == 2047) r = x - x;
}

// |r| <= pi/4.
__device__ inline void sine_cosine_near(float r, float& sine, float& cosine) {
  const float s = r * r;
  float p = -1.9515295891e-4f;
  p = p * s + 8.3321608736e-3f;
  p = p * s - 1.6666654611e-1f;
  sine = r + r * s * p;
  float q = 2.443315711809948e-5f;
  q = q * s - 1.388731625493765e-3f;
  q = q * s + 4.166664568298827e-2f;
  cosine = 1.0f - (0.5f * s - s * s * q);
}
__device__ inline void sine_cosine_near(double r, double& sine, double& cosine) {
  const double s = r * r;
  double p = 1.58969099521155010221e-10;
  p = p * s - 2.50507602534068634195e-08;
  p = p * s + 2.75573137070700676789e-06;
  p = p * s - 1.98412698298579493134e-04;
  p = p * s + 8.33333333332248946124e-03;
  p = p * s - 1.66666666666666324348e-01;
  sine = r + r * s * p;
  double q = -1.13596475577881948265e-11;
  q = q * s + 2.08757232129817482790e-09;
  q = q * s - 2.75573143513906633035e-07;
  q = q * s + 2.48015872894767294178e-05;
  q = q * s - 1.38888888888741095749e-03;
  q = q * s + 4.16666666666666019037e-02;
  cosine = 1.0 - (0.5 * s - s * s * q);
}

// --- Half types ------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
// |r| <= 2 pi.
__device__ inline float sine_of_chip(float r) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(r));
  return y;
}
__device__ inline float cosine_of_chip(float r) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(r));
  return y;
}
// max(x, 0); NaN stays.
__device__ inline float positive(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float positive(float x) { return x < 0.0f ? 0.0f : x; }
// The emulator errs as much as a chip may, always upwards, so that sums do not cancel it. Out of range it gives NaN.
inline float as_wrong_as_allowed(double r, double exact) {
  return std::fabs(r) <= 6.283185307179586 ? static_cast<float>(exact + std::exp2(-20.5)) : std::nanf("");
}
inline float sine_of_chip(float r) { return as_wrong_as_allowed(r, std::sin(double{r})); }
inline float cosine_of_chip(float r) { return as_wrong_as_allowed(r, std::cos(double{r})); }
#endif

__device__ inline float reduce_to_circle(float x) {
  constexpr float kRound = 12582912.0f;  // as in `reduce`
  const float n = (x * 0.159154943f + kRound) - kRound;
  return (x - n * 6.283203125f) + n * 1.78178204e-5f;
}
// x > kFastPhase. All 64 bits of quarter turns, with a sign, are one turn.
__device__ inline float reduce_far_to_circle(float x) {
  constexpr double kUnit = 3.4061215800865545e-19;  // 2 pi * 2^-64
  const float r = static_cast<float>(static_cast<double>(static_cast<int64_t>(quarter_turns(x))) * kUnit);
  return bits_as<uint32_t>(x) >> 23 == 255 ? x - x : r;
}

// Sine and cosine of phases that are rounded products, without a long reduction: its code, for each phase of a thread,
// is larger than all else. With FMA the first step below is exact up to 2^11 turns, and rounds |r| + 2.9 2^-20 x from
// there to 2^22 turns: less than x has been rounded by. Beyond, x has no digit below half a turn, and any angle will
// do.
template <int N>
__device__ inline void sine_cosine_of_chip(const float (&x)[N], float (&sine)[N], float (&cosine)[N]) {
  constexpr float kRound = 12582912.0f;  // as in `reduce`
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float n = fmaf(x[k], 0.159154943f, kRound) - kRound;
    const float r = fmaf(n, 1.78178204e-5f, fmaf(n, -6.283203125f, x[k]));
    sine[k] = sine_of_chip(r);
    cosine[k] = cosine_of_chip(r);
  }
}

// --- All types -------------------------------------------------------------------------------------------

// T is the type of the elements. x is not negative. Infinity and NaN become NaN.
template <class T, int N>
__device__ inline void sine_cosine(const Arithmetic<T> (&x)[N], Arithmetic<T> (&sine)[N], Arithmetic<T> (&cosine)[N]) {
  using A = Arithmetic<T>;
  constexpr bool of_chip = sizeof(T) == 2;
  A r[N];
  uint32_t quadrant[N];
  bool far = false;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (of_chip) {
      r[k] = reduce_to_circle(x[k]);
    } else {
      reduce(x[k], r[k], quadrant[k]);
    }
    far |= x[k] > kFastPhase<A>;
  }
  if (far) {  // one branch for all: it is next to never taken
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(x[k] > kFastPhase<A>)) continue;
      if constexpr (of_chip) {
        r[k] = reduce_far_to_circle(x[k]);
      } else {
        reduce_far(x[k], r[k], quadrant[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (of_chip) {
      sine[k] = sine_of_chip(r[k]);
      cosine[k] = cosine_of_chip(r[k]);
    } else {
      A of_r[2];
      sine_cosine_near(r[k], of_r[0], of_r[1]);
      const bool swap = (quadrant[k] & 1u) != 0;
      const A s = swap ? of_r[1] : of_r[0], c = swap ? of_r[0] : of_r[1];
      sine[k] = (quadrant[k] & 2u) != 0 ? -s : s;
      cosine[k] = ((quadrant[k] + 1u) & 2u) != 0 ? -c : c;
    }
  }
}

}  // namespace wavemix
