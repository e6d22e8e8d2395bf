// Rows of pixels with few channels, in and out of a thread's cache, and how they are shared out. Included by the
// per-ISA units only.
#pragma once

#include "cpu/common/operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// `blocks` of work cut into a fixed number of shares, each one thread's: sums over shares, merged in order, do not
// depend on the number of threads.
struct Shares {
  int64_t blocks, count;
  explicit Shares(int64_t b) : blocks(b), count(b < 32 ? b : 32) {}
  int64_t begin(int64_t share) const { return blocks * share / count; }
};

// Pixels `apart`, their channels beside each other, to pixels without gaps.
template <class T, class A>
static inline void load_pixels(const T* from, int64_t apart, int64_t pixels, int64_t channels, A* to) {
  if (apart == channels) return load_row(from, 1, pixels * channels, to);
  for (int64_t i = 0; i < pixels; ++i) load_row(from + i * apart, 1, channels, to + i * channels);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
