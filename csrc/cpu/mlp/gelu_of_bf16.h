// GELU (the exact, erf form) of what becomes a bf16, and its derivative: gelu.h's form with less of everything, for
// products so fast that GELU is what takes time. Included by the per-ISA units only.
//
// gelu(x) = max(x, 0) - t Q(t) with t = |x| and Q(t) = exp(-t^2/2) R(t). 1/R is a polynomial, a weighted minimax fit on
// [0, 13.2] (2^-13.9); its reciprocal is the processor's (2^-14), and the exponential a polynomial between powers of
// two (2^-17, the argument's rounding included). Together |error| <= 2^-12.9 t Q(t), and for the derivative
// <= 2^-12.9 (Q + t phi): a fifteenth of what rounding to bf16 adds. Beyond 13.2 t Q(t) is no normal number, and the
// derivative stays within 2^-123 of 0 or 1.
#pragma once

#include "cpu/common/matrix_units.h"

#if WAVEMIX_MATRIX_UNITS
namespace wavemix {
namespace WAVEMIX_ISA {

struct Tail {
  __m512 r, e;  // Q = r e
};
static inline Tail tail_of_bf16(__m512 t) {
  const auto at = [](float value) { return _mm512_set1_ps(value); };
  __m512 r = at(-4.91627591e-07f);
  for (const float c : {2.64680467e-05f, -5.97050058e-04f, 7.40931294e-03f, -5.62121060e-02f, 2.76214517e-01f,
                        1.59621491f, 1.99986763f})
    r = _mm512_fmadd_ps(r, t, at(c));
  const __m512 power = _mm512_mul_ps(_mm512_mul_ps(t, t), at(-0.721347520f));  // log2 of exp(-t^2/2)
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(power, whole);
  __m512 e = at(9.5701e-03f);
  for (const float c : {5.591786e-02f, 0.24024745f, 0.69312181f, 0.99999926f}) e = _mm512_fmadd_ps(e, rest, at(c));
  return {_mm512_rcp14_ps(r), _mm512_scalef_ps(e, whole)};
}
// |x|, bounded; a NaN comes through.
static inline __m512 magnitude_of_bf16(__m512 x) { return _mm512_min_ps(_mm512_set1_ps(13.2f), _mm512_abs_ps(x)); }

static inline __m512 gelu_of_bf16(__m512 x) {
  const __m512 t = magnitude_of_bf16(x);
  const Tail q = tail_of_bf16(t);
  return _mm512_fnmadd_ps(_mm512_mul_ps(t, q.r), q.e, _mm512_max_ps(_mm512_setzero_ps(), x));
}
static inline __m512 gelu_of_bf16(__m512 x, __m512& derivative) {
  const __m512 t = magnitude_of_bf16(x), zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  const Tail q = tail_of_bf16(t);
  const __m512 d = _mm512_mul_ps(_mm512_fnmadd_ps(t, _mm512_set1_ps(0.398942280f), q.r), q.e);
  derivative = _mm512_mask_sub_ps(d, _mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), one, d);
  return _mm512_fnmadd_ps(_mm512_mul_ps(t, q.r), q.e, _mm512_max_ps(zero, x));
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
#endif
