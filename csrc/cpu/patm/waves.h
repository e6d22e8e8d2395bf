// Waves of channels in pairs and the 7-tap convolutions over them. Included by the per-ISA units only.
//
// A wave lies as [channel of the pair][cos parts | sin parts of the pairs], each half padded with zeros to whole
// vectors: what one output vector reads is contiguous, cos for the first half of the outputs and sin for the second.
// Each tap has a pointer of its own, so that pixels of a line and lines of an image are convolved by the same code.
#pragma once

#include "cpu/common/convert.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"
#include "wavemix/patm.h"
// This one uses the above.
#include "cpu/patm/sincos.h"

namespace wavemix {
namespace WAVEMIX_ISA {

constexpr int64_t kReach = kPhaseTaps / 2;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A>
static inline typename Vector<A>::unaligned& vec(A* p) {
  return *reinterpret_cast<typename Vector<A>::unaligned*>(p);
}
template <class A>
static inline typename Vector<A>::type vec(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::unaligned*>(p);
}

template <class A>
struct Pairs {
  int64_t count, half, width;  // pairs, pairs padded, outputs padded
  explicit Pairs(int64_t pairs) : count(pairs), half(round_up(pairs, kLanes<A>)), width(2 * half) {}
};

template <class A>
static inline A before_relu(A theta, A scale, A shift) {
  return theta * scale + shift;
}
// A NaN stays NaN, as in torch.
template <class A>
static inline A relu(A value) {
  return value < A(0) ? A(0) : value;
}

static inline void waves_of(const double* theta, const double* scale, const double* shift, int64_t n, double* cosine,
                            double* sine) {
  for (int64_t i = 0; i < n; ++i) sincos_exact(relu(before_relu(theta[i], scale[i], shift[i])), sine[i], cosine[i]);
}
static inline void waves_of(const float* __restrict theta, const float* __restrict scale, const float* __restrict shift,
                            int64_t n, float* __restrict cosine, float* __restrict sine) {
  // Not negative, so the bits of phases compare as the phases do, and those of NaN are the largest: the sign bit of
  // `beyond` becomes one with the first that is too large.
  uint32_t beyond = 0;
  for (int64_t i = 0; i < n; ++i) {
    cosine[i] = relu(before_relu(theta[i], scale[i], shift[i]));
    beyond |= float_to_bits(kFastPhase) - (float_to_bits(cosine[i]) & 0x7fffffffu);
  }
  if (beyond >> 31 == 0) {
    WAVEMIX_SIMD
    for (int64_t i = 0; i < n; ++i) sincos_fast(cosine[i], sine[i], cosine[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float phase = cosine[i];
      phase <= kFastPhase ? sincos_fast(phase, sine[i], cosine[i]) : sincos_exact(phase, sine[i], cosine[i]);
    }
  }
}

// Weights as [tap][channel of the pair][output], from (c, 2, 7) of `all` pairs; of b's pairs, from `pair` on.
template <class A>
static void lay_out_taps(const Pairs<A>& b, const A* taps, int64_t all, int64_t pair, A* out) {
  std::memset(out, 0, static_cast<size_t>(2 * kPhaseTaps * b.width) * sizeof(A));
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t g = 0; g < b.count; ++g)
      for (int64_t i = 0; i < 2 * kPhaseTaps; ++i)
        out[(i % kPhaseTaps * 2 + i / kPhaseTaps) * b.width + half * b.half + g] =
            taps[(half * all + pair + g) * 2 * kPhaseTaps + i];
}
// The way back, of their gradient.
template <class A>
static void gather_taps(const Pairs<A>& b, const double* sums, int64_t all, int64_t pair, A* taps) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t g = 0; g < b.count; ++g)
      for (int64_t i = 0; i < 2 * kPhaseTaps; ++i)
        taps[(half * all + pair + g) * 2 * kPhaseTaps + i] =
            static_cast<A>(sums[(i % kPhaseTaps * 2 + i / kPhaseTaps) * b.width + half * b.half + g]);
}

// out[pixel][output] of `count` pixels, and their sums; tap t of the first reads the wave at[t].
template <class A>
static void convolve(const Pairs<A>& b, const A* const (&at)[kPhaseTaps], const A* taps, int64_t count, A* out,
                     A* sums) {
  using V = typename Vector<A>::type;
  for (int64_t o = 0; o < b.width; o += kLanes<A>) {
    V weight[2 * kPhaseTaps];
    for (int i = 0; i < 2 * kPhaseTaps; ++i) weight[i] = vec(taps + i * b.width + o);
    V total = {};
    for (int64_t j = 0; j < count; ++j) {
      const int64_t wave = j * 2 * b.width + o;
      // Two chains: one addition's latency hides behind the other's.
      V even = weight[0] * vec(at[0] + wave), odd = weight[1] * vec(at[0] + wave + b.width);
      for (int t = 1; t < kPhaseTaps; ++t) {
        even += weight[2 * t] * vec(at[t] + wave);
        odd += weight[2 * t + 1] * vec(at[t] + wave + b.width);
      }
      even += odd;
      total += even;
      vec(out + j * b.width + o) = even;
    }
    vec(sums + o) = total;
  }
}

// Gradient of the waves of `count` pixels, `step` apart, from that of the outputs: what tap t of some output made of
// the first wave has its gradient at[t].
template <class A>
static void convolve_transposed(const Pairs<A>& b, const A* const (&at)[kPhaseTaps], const A* taps, int64_t count,
                                A* d_waves, int64_t step) {
  using V = typename Vector<A>::type;
  for (int64_t o = 0; o < b.width; o += kLanes<A>) {
    V weight[2 * kPhaseTaps];
    for (int i = 0; i < 2 * kPhaseTaps; ++i) weight[i] = vec(taps + i * b.width + o);
    for (int64_t j = 0; j < count; ++j) {
      V even = {}, odd = {};
      for (int t = 0; t < kPhaseTaps; ++t) {
        const V g = vec(at[t] + j * b.width + o);
        even += weight[2 * t] * g;
        odd += weight[2 * t + 1] * g;
      }
      vec(d_waves + j * step + o) = even;
      vec(d_waves + j * step + b.width + o) = odd;
    }
  }
}

// Adds the gradient of the weights, [tap][channel of the pair][output], over `count` waves; `at` as above. Sums over
// these are in the arithmetic type, those over calls in double: a line is short, an image is not.
template <class A>
static void taps_gradient(const Pairs<A>& b, const A* const (&at)[kPhaseTaps], const A* waves, int64_t count,
                          double* d_taps) {
  using V = typename Vector<A>::type;
  for (int64_t o = 0; o < b.width; o += kLanes<A>) {
    V sum[2 * kPhaseTaps] = {};
    for (int64_t j = 0; j < count; ++j) {
      const V even = vec(waves + j * 2 * b.width + o), odd = vec(waves + (j * 2 + 1) * b.width + o);
      for (int t = 0; t < kPhaseTaps; ++t) {
        const V g = vec(at[t] + j * b.width + o);
        sum[2 * t] += g * even;
        sum[2 * t + 1] += g * odd;
      }
    }
    for (int i = 0; i < 2 * kPhaseTaps; ++i)
      for (int64_t l = 0; l < kLanes<A>; ++l) d_taps[i * b.width + o + l] += static_cast<double>(sum[i][l]);
  }
}

template <class A>
struct Channels {
  const A *scale, *shift, *center;
};

// One pixel's channels: d_real and d_imaginary, the gradients of z cos and z sin, become those of z and theta.
template <class A>
static inline void wave_gradient(int64_t n, const Channels<A>& of, const A* __restrict z, const A* __restrict theta,
                                 const A* __restrict cosine, const A* __restrict sine, A* __restrict d_real,
                                 A* __restrict d_imaginary, A* __restrict sum_pre, A* __restrict sum_pre_theta) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const A re = d_real[i], im = d_imaginary[i];
    const A turn = z[i] * (im * cosine[i] - re * sine[i]);
    const A d_pre = before_relu(theta[i], of.scale[i], of.shift[i]) <= A(0) ? A(0) : turn;
    sum_pre[i] += d_pre;
    sum_pre_theta[i] += d_pre * (theta[i] - of.center[i]);
    d_real[i] = re * cosine[i] + im * sine[i];
    d_imaginary[i] = d_pre * of.scale[i];
  }
}

template <class A>
static inline void add_to(double* __restrict sums, const A* __restrict values, int64_t n) {
  WAVEMIX_SIMD
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(values[i]);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
