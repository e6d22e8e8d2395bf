// GELU (the exact, erf form) and its derivative, written so that plain loops over them vectorise: no branch, no
// table, no libm call for float. Included by the per-ISA units only.
//
// With t = |x|, the normal density phi and the upper tail Q(t) = 1 - Phi(t):
//     gelu(x)  = x Phi(x)             = max(x, 0) - t Q(t)
//     gelu'(x) = Phi(x) + x phi(x)    = x > 0 ? 1 - D(t) : D(t),  D = Q(t) - t phi(t)
// Q(t) = exp(-t^2/2) R(t), where R (half of the scaled complementary error function) is smooth and never small, so
// the left tail keeps its relative accuracy down to the subnormals, and one exponential serves Q and phi.
//
// 1/R is close to a line: 1/R(t) = sqrt(2 pi) t + N(t)/M(t). Hence R = M / (sqrt(2 pi) t M + N), all terms positive:
// no cancellation, and for large t the error of M cancels in the quotient. N and M are a weighted minimax fit on
// [0, 14.5], refitted while the coefficients were rounded to float one by one; R's relative error is 2^-29.9.
//
// |error| <= 4.25 * 2^-24 * max(|gelu(x)|, 2^-126) (4.1 with FMA), and <= 4.5 * 2^-24 * (Phi + |x| phi) for the
// derivative: every float was tried. The floor 2^-126, where results become subnormal, stands for two roundings to
// multiples of 2^-149. gelu(-inf) = 0, gelu(inf) = inf, a NaN stays one.
#pragma once

#include <math.h>

#include "cpu/common/convert.h"

namespace wavemix {
namespace WAVEMIX_ISA {

constexpr float kSqrtTwoPi = 2.50662827f;
constexpr float kInverseSqrtTwoPi = 0.398942280f;

// exp(-t^2/2) = 2^exponent * (1 + tail), the 1 left out so that a product S * exp is S + S * tail, one rounding less.
struct Gaussian {
  float tail;
  int32_t exponent;
};

// 0 <= t <= 14.5.
static inline Gaussian gaussian(float t) {
  // t^2 would be rounded, and exp turns an absolute error of its argument (100 * 2^-24) into a relative one. The
  // upper 12 bits of t have an exact square; what is left is small.
  const float head = bits_to_float(float_to_bits(t) & 0xfffff000u);
  const float high = 0.5f * head * head;
  const float low = 0.5f * ((t - head) * (t + head));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = kRound - 1.44269504f * high;
  const float n = shifted - kRound;
  // ln 2 = 45426/65536 + the rest: n times the first is exact, and so is its difference to `high`.
  const float r = (-high - n * 0.693145751953125f) - (n * 1.42860682e-6f + low);
  float q = 0.00139510015f;
  q = q * r + 0.00837198645f;
  q = q * r + 0.0416661985f;
  q = q * r + 0.166664913f;
  q = q * r + 0.5f;
  return {r + r * r * q, static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(kRound))};
}

// value * exp(-t^2/2). Scaled in two steps: 2^exponent itself may lie below the smallest float.
static inline float times(float value, const Gaussian& g) {
  const int32_t half = g.exponent >> 1;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(g.exponent - half + 127) << 23);
  return (value + value * g.tail) * first * second;
}

// R = m / denominator and t R = tm / denominator. Horner's last steps are arranged for few roundings where t is
// small (t M is one sum, and so is the denominator).
struct Ratio {
  float m, tm, denominator;
};
static inline Ratio ratio(float t) {
  float m = 0.00245087151f;
  m = m * t + 0.0294870902f;
  m = m * t + 0.169372112f;
  m = m * t + 0.562859654f;
  m = m * t + 1.08247757f;
  float n = 0.00614408357f;
  n = n * t + 0.073880367f;
  n = n * t + 0.412975371f;
  n = n * t + 1.25409591f;
  const float rise = t * m;
  const float tm = t + t * rise;
  return {1.0f + rise, tm, 2.0f + (t * n + kSqrtTwoPi * tm)};
}

// |x| up to where t Q(t) is zero in float; written so that a NaN comes through.
static inline float bounded_magnitude(float x) {
  const float t = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  return 14.5f < t ? 14.5f : t;
}

static inline float gelu(float x) {
  const float t = bounded_magnitude(x);
  const Ratio r = ratio(t);
  return (x > 0.0f ? x : 0.0f) - times(r.tm / r.denominator, gaussian(t));
}
// Returns the same value, and the derivative.
static inline float gelu(float x, float& derivative) {
  const float t = bounded_magnitude(x);
  const Ratio r = ratio(t);
  const Gaussian g = gaussian(t);
  const float d = times(r.m / r.denominator - kInverseSqrtTwoPi * t, g);
  derivative = x > 0.0f ? 1.0f - d : d;
  return (x > 0.0f ? x : 0.0f) - times(r.tm / r.denominator, g);
}

// double uses the C library's erfc: this type is for checks, not for speed.
static inline double bounded_magnitude(double x) {
  const double t = ::fabs(x);
  return 39.0 < t ? 39.0 : t;
}
static inline double gelu(double x) {
  const double t = bounded_magnitude(x);
  return (x > 0.0 ? x : 0.0) - t * (0.5 * ::erfc(t * 0.70710678118654752440));
}
static inline double gelu(double x, double& derivative) {
  const double t = bounded_magnitude(x);
  const double tail = 0.5 * ::erfc(t * 0.70710678118654752440);
  const double d = tail - t * (0.39894228040143267794 * ::exp(-0.5 * t * t));
  derivative = x > 0.0 ? 1.0 - d : d;
  return (x > 0.0 ? x : 0.0) - t * tail;
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
