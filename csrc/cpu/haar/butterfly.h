// The butterfly of one 2x2 block, and the sizes of the levels. Included by the per-ISA units only.
#pragma once

#include "cpu/common/convert.h"
#include "cpu/common/parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// `edge` times a sample. Zero padding must give zero for NaN and infinity too.
template <class A>
static inline A scaled(A edge, A value) {
  return edge == A(0) ? A(0) : edge * value;
}

template <class A>
struct Quad {
  A a, b, c, d;
};
template <class A>
static inline Quad<A> butterfly(A a, A b, A c, A d) {
  const A half = A(0.5);
  const A p = a + b, q = a - b, r = c + d, s = c - d;
  return {half * (p + r), half * (p - r), half * (q + s), half * (q - s)};
}

template <class T>
constexpr bool vectorises_in_place() {
  return true;
}
// f16 needs the conversion instructions, which load_row and store_row spell out.
template <>
constexpr bool vectorises_in_place<f16>() {
  return false;
}

template <class A, class T>
static inline void load_pair(const T* p, A& even, A& odd) {
  even = load(p[0]);
  odd = load(p[1]);
}
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// Two bf16 are the halves of one 32-bit word and a float is a bf16 with zeros below: no shuffle needed.
static inline void load_pair(const bf16* p, float& even, float& odd) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  even = bits_to_float(word << 16);
  odd = bits_to_float(word & 0xffff0000u);
}
#endif

// The sizes of every level.
struct Pyramid {
  int64_t h[kMaxHaarLevels + 1], w[kMaxHaarLevels + 1];
  explicit Pyramid(const HaarArgs& args) {
    h[0] = args.h;
    w[0] = args.w;
    for (int l = 1; l <= args.levels; ++l) {
      h[l] = half_up(h[l - 1]);
      w[l] = half_up(w[l - 1]);
    }
  }
};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
