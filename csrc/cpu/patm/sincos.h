// Sine and cosine of phases, written so that a plain loop over them vectorises. Included by the per-ISA units only.
//
// x = n pi/2 + r with |r| <= pi/4 (a little more through the rounding of x 2/pi). pi/2 is split in three (Cody and
// Waite): n times the first two parts has at most 24 bits for n < 2^13, and so have the differences, so only the third
// step rounds, with or without FMA. Polynomials for r in the form of Cephes' sinf and cosf.
//
// |error| <= 1.32 * 2^-24 for |x| <= kFastPhase (every float was tried, with and without FMA). Larger ones, infinities
// and NaN take the double functions of the C library.
#pragma once

#include <math.h>

#include "cpu/common/convert.h"

namespace wavemix {
namespace WAVEMIX_ISA {

constexpr float kFastPhase = 8192.0f;

// |x| <= kFastPhase.
static inline void sincos_fast(float x, float& sine, float& cosine) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 0.636619772f + kRound;
  const float n = shifted - kRound;
  const uint32_t quadrant = float_to_bits(shifted);
  const float r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
  const float s = r * r;
  float p = -1.9515295891e-4f;
  p = p * s + 8.3321608736e-3f;
  p = p * s - 1.6666654611e-1f;
  const float sin_r = r + r * s * p;
  float q = 2.443315711809948e-5f;
  q = q * s - 1.388731625493765e-3f;
  q = q * s + 4.166664568298827e-2f;
  const float cos_r = 1.0f - (0.5f * s - s * s * q);
  const bool swap = (quadrant & 1u) != 0;
  const uint32_t sin_sign = (quadrant & 2u) << 30, cos_sign = ((quadrant + 1u) & 2u) << 30;
  sine = bits_to_float(float_to_bits(swap ? cos_r : sin_r) ^ sin_sign);
  cosine = bits_to_float(float_to_bits(swap ? sin_r : cos_r) ^ cos_sign);
}

static inline void sincos_exact(double x, double& sine, double& cosine) {
  sine = ::sin(x);
  cosine = ::cos(x);
}
static inline void sincos_exact(float x, float& sine, float& cosine) {
  sine = static_cast<float>(::sin(static_cast<double>(x)));
  cosine = static_cast<float>(::cos(static_cast<double>(x)));
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
