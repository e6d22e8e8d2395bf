// Dropout without a mask in memory: whether an element is kept is a function of (seed, row, column), computed again
// wherever it is needed. Every backend of this package follows this definition, bit for bit:
//
//   For a matrix of `cols` columns, element (row, col) belongs to
//       group = row * ceil(cols / 4) + col / 4   (64 bits)          lane = col % 4
//   where `row` counts from the first row of the whole matrix, so a chunk of rows passes its first row's number.
//       words[0..3] = Philox4x32-10(counter = (group low 32, group high 32, 0, 0), key = (seed low 32, seed high 32))
//   The element is kept if and only if words[lane] < threshold, threshold = round((1 - p) * 2^32) as a 64-bit number
//   ((1 - p) * 2^32 in double, halves to even). A kept value is multiplied by 1 / (1 - p), a dropped one becomes
//   exactly 0, NaN included. p = 0 gives threshold 2^32: everything is kept, no Philox needed. p = 1 gives threshold 0
//   and factor 0.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Included by the per-ISA units only.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {

struct PhiloxWords {
  uint32_t word[4];
};

static inline PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10  // unrolled so that a loop over counters around this one vectorises
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xD2511F53u} * c0, q = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(q);
    c3 = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of groups first .. first + groups - 1, in the order of the columns. Sixteen groups fill AVX-512's lanes.
static inline void philox_words(uint64_t seed, uint64_t first, int64_t groups, uint32_t* __restrict words) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  const uint32_t n = static_cast<uint32_t>(groups);
  WAVEMIX_SIMD
  for (uint32_t i = 0; i < n; ++i) {
    const uint32_t c0 = low + i;  // 32-bit lanes: the carry goes by hand
    const PhiloxWords w = philox4x32(c0, high + (c0 < low ? 1u : 0u), 0, 0, k0, k1);
    words[4 * i] = w.word[0];
    words[4 * i + 1] = w.word[1];
    words[4 * i + 2] = w.word[2];
    words[4 * i + 3] = w.word[3];
  }
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
