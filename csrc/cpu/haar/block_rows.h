// Haar's sums and differences of a block's rows, from memory to memory. Included by haar_blocks.cpp alone.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/haar/butterfly.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Calls `run` with each number below n as a constant. A loop would keep the arrays that it indexes in memory, and the
// loop around it would not be vectorised.
template <class Run, int... k>
static inline __attribute__((always_inline)) void each(const Run& run, std::integer_sequence<int, k...>) {
  (run(std::integral_constant<int, k>{}), ...);
}
#define WAVEMIX_EACH(n, k, ...) \
  each([&](auto k) __attribute__((always_inline)) __VA_ARGS__, std::make_integer_sequence<int, n> {})

// Sums and differences along every axis whose bit is `bit` or above.
template <int bit, int bands, class A>
static inline __attribute__((always_inline)) void butterflies(A (&v)[bands]) {
  if constexpr (bit < bands) {
    WAVEMIX_EACH(bands, k, {
      if constexpr ((k & bit) == 0) {
        const A p = v[k], q = v[k | bit];
        v[k] = p + q;
        v[k | bit] = p - q;
      }
    });
    butterflies<2 * bit>(v);
  }
}

// Where a block's rows lie: `x` its samples, `y` its bands by the differences they take. `paired`: neighbours in a row
// of samples are a pair. What is read is never written.
template <class T, int rows, bool paired>
struct BlockRows {
  using A = typename Arithmetic<T>::type;
  static constexpr int bands = paired ? 2 * rows : rows, first = paired ? 2 : 1;
  T* x[rows];
  T* y[bands];
  A weight[bands];
  int64_t x_step, y_step[bands];  // to the next block

  void advance() {
    WAVEMIX_EACH(rows, r, { x[r] += x_step; });
    WAVEMIX_EACH(bands, k, { y[k] += y_step[k]; });
  }

  void analyse(int64_t count) const {
    const BlockRows here = *this;  // in registers
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) {
      A v[bands];
      WAVEMIX_EACH(rows, r, {
        if constexpr (paired) {
          A a, b;
          load_pair(here.x[r] + 2 * j, a, b);
          v[2 * r] = a + b;
          v[2 * r + 1] = a - b;
        } else {
          v[r] = load(here.x[r][j]);
        }
      });
      butterflies<first>(v);
      WAVEMIX_EACH(bands, k, { store(here.y[k][j], here.weight[k] * v[k]); });
    }
  }

  void synthesise(int64_t count) const {
    const BlockRows here = *this;
    WAVEMIX_SIMD
    for (int64_t j = 0; j < count; ++j) {
      A v[bands];
      WAVEMIX_EACH(bands, k, { v[k] = here.weight[k] * load(here.y[k][j]); });
      butterflies<first>(v);
      WAVEMIX_EACH(rows, r, {
        if constexpr (paired) {
          store(here.x[r][2 * j], v[2 * r] + v[2 * r + 1]);
          store(here.x[r][2 * j + 1], v[2 * r] - v[2 * r + 1]);
        } else {
          store(here.x[r][j], v[r]);
        }
      });
    }
  }

  // The last coefficient of a row of odd size, whose second sample is `edge` times sample `source`.
  void analyse_last(int64_t size, A edge, int64_t source) const {
    if constexpr (paired) {
      A v[bands];
      WAVEMIX_EACH(rows, r, {
        const A a = load(x[r][size - 1]), b = edge == A(0) ? A(0) : edge * load(x[r][source]);
        v[2 * r] = a + b;
        v[2 * r + 1] = a - b;
      });
      butterflies<first>(v);
      WAVEMIX_EACH(bands, k, { store(y[k][size / 2], weight[k] * v[k]); });
    }
  }
  void synthesise_last(int64_t size) const {
    if constexpr (paired) {
      A v[bands];
      WAVEMIX_EACH(bands, k, { v[k] = weight[k] * load(y[k][size / 2]); });
      butterflies<first>(v);
      WAVEMIX_EACH(rows, r, { store(x[r][size - 1], v[2 * r] + v[2 * r + 1]); });
    }
  }
};

}  // namespace
}  // namespace WAVEMIX_ISA
}  // namespace wavemix
