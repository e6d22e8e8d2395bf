// Dropout without a mask in memory: whether an element is kept is a function of (seed, row, column), computed again
// wherever it is needed. Every backend of this package follows this definition, bit for bit:
//
//   For a matrix of `cols` columns, element (row, col) belongs to
//       group = row * ceil(cols / 8) + col / 8   (64 bits)          lane = col % 8
//   where `row` counts from the first row of the whole matrix, so a chunk of rows passes its first row's number.
//       words[0..3] = Philox4x32-10(counter = (group low 32, group high 32, 0, 0), key = (seed low 32, seed high 32))
//       half = words[lane / 2], its low 16 bits for an even lane, its high ones for an odd one
//   The element is kept if and only if half < threshold, threshold = round((1 - p) * 2^16) ((1 - p) * 2^16 in double,
//   halves to even): p is rounded to a multiple of 2^-16. A kept value is multiplied by 2^16 / threshold, so that its
//   mean is right all the same; a dropped one becomes exactly 0, NaN included. Threshold 2^16: everything is kept, no
//   Philox needed. Threshold 0: factor 0.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Included by the per-ISA units only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace wavemix {
namespace WAVEMIX_ISA {

// Vectors of 64-bit lanes, each with a 32-bit word in its low half: then a round is two multiplications, two shifts
// and two three-way exclusive-ors, and what a product leaves in the high half need not even be cleared, because
// the next multiplication does not look there. (With 32-bit lanes every product has to be taken apart.)
#if defined(__AVX512F__)
typedef uint64_t PhiloxLanes __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint64_t PhiloxLanes __attribute__((vector_size(32)));
#else
typedef uint64_t PhiloxLanes __attribute__((vector_size(16)));
#endif
constexpr int kPhiloxLanes = sizeof(PhiloxLanes) / sizeof(uint64_t);
#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "philox_halves stores four halves as one number of 64 bits");
#endif

static inline PhiloxLanes multiply_low_halves(PhiloxLanes a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<PhiloxLanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<PhiloxLanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<PhiloxLanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * uint64_t{b};
#endif
}

// The counters' words in, the random words out, in the lanes' low halves.
static inline void philox4x32(PhiloxLanes (&c)[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const PhiloxLanes p = multiply_low_halves(c[0], 0xD2511F53u), q = multiply_low_halves(c[2], 0xCD9E8D57u);
    c[0] = (q >> 32) ^ c[1] ^ uint64_t { k0 };
    c[2] = (p >> 32) ^ c[3] ^ uint64_t { k1 };
    c[1] = q;
    c[3] = p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The halves of groups first, first + 1, ... in the order of the columns. `groups` is rounded up to kPhiloxLanes.
static inline void philox_halves(uint64_t seed, uint64_t first, int64_t groups, uint16_t* halves) {
  PhiloxLanes step;
  for (int k = 0; k < kPhiloxLanes; ++k) step[k] = static_cast<uint64_t>(k);
  for (int64_t i = 0; i < groups; i += kPhiloxLanes) {
    const PhiloxLanes group = step + (first + static_cast<uint64_t>(i));
    PhiloxLanes c[4] = {group, group >> 32, step ^ step, step ^ step};
    philox4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    // Two 64-bit halves of each group's 16 bytes, then the groups one after the other.
    const PhiloxLanes a = (c[0] & 0xffffffffu) | (c[1] << 32), b = (c[2] & 0xffffffffu) | (c[3] << 32);
#if defined(__AVX512F__)
    const PhiloxLanes out[2] = {__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
                                __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
#elif defined(__AVX2__)
    const PhiloxLanes out[2] = {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
#else
    const PhiloxLanes out[2] = {__builtin_shufflevector(a, b, 0, 2), __builtin_shufflevector(a, b, 1, 3)};
#endif
    std::memcpy(halves + 8 * i, out, sizeof out);
  }
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
