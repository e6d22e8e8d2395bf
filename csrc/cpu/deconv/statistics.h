// BatchNorm's batch statistics of what the transposed convolution writes, kept while it is written. Included by the
// per-ISA units only.
#pragma once

#include <math.h>

#include "cpu/common/operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// Mean and sum of squared differences from it, of each channel. Values of a part (a block of pixels) count by their
// distance to the mean of the parts before; parts are merged as Chan, Golub and LeVeque (1983) do, so no large numbers
// are subtracted. Sums over parts are in double, which costs nothing at this rate.
template <class A>
struct Statistics {
  int64_t channels, ld;
  double count = 0;
  ZeroBuffer<double> mean, squares;
  // The part's center, sums of distances and of their squares, for each column of the products. Columns repeat the
  // channels.
  ZeroBuffer<A> lanes;
  Statistics(int64_t c, int64_t columns) : channels(c), ld(columns), mean(c), squares(c), lanes(3 * columns) {}
  A* lane(int i) const { return lanes.data + i * ld; }
  // A value near the mean, before there is one.
  void center(const A* values) {
    for (int64_t i = 0; i < ld; ++i) lanes.data[i] = values[i % channels];
  }
  void add(const A* values, int64_t places) {
    typedef typename Vector<A>::type V;
    typedef typename Vector<A>::unaligned Memory;
    for (int64_t i = 0; i < ld; i += kLanes<A>) {
      const V center = *reinterpret_cast<Memory*>(lane(0) + i);
      V first{}, second{};
      for (int64_t p = 0; p < places; ++p) {
        const V off = *reinterpret_cast<const Memory*>(values + p * ld + i) - center;
        first += off;
        second += off * off;
      }
      *reinterpret_cast<Memory*>(lane(1) + i) += first;
      *reinterpret_cast<Memory*>(lane(2) + i) += second;
    }
  }
  void merge(double n, const double* other_mean, const double* other_squares) {
    if (n == 0) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double off = other_mean[c] - mean.data[c];
      mean.data[c] += off * (n / (count + n));
      squares.data[c] += other_squares[c] + off * off * (count * n / (count + n));
    }
    count += n;
  }
  // n values of each channel, in `columns` columns, end a part.
  void finish_part(double n, int64_t columns, double* scratch) {
    if (n == 0) return;
    for (int64_t c = 0; c < channels; ++c) {
      double first = 0, second = 0;
      for (int64_t i = c; i < columns; i += channels) {
        first += static_cast<double>(lane(1)[i]);
        second += static_cast<double>(lane(2)[i]);
      }
      scratch[c] = static_cast<double>(lane(0)[c]) + first / n;
      scratch[channels + c] = second - first * first / n;
    }
    merge(n, scratch, scratch + channels);
    lanes.clear(3 * ld);
    for (int64_t i = 0; i < ld; ++i) lanes.data[i] = static_cast<A>(mean.data[i % channels]);
  }

  // Statistics of one thread or share as a line of doubles.
  static int64_t line(int64_t channels) { return 1 + 2 * channels; }
  void save(double* to) const {
    to[0] = count;
    std::memcpy(to + 1, mean.data, static_cast<size_t>(channels) * sizeof(double));
    std::memcpy(to + 1 + channels, squares.data, static_cast<size_t>(channels) * sizeof(double));
  }
  // Merges `lines` of them, in their order, into the batch's mean and biased variance. Nothing has mean and variance
  // NaN.
  static void finish(int64_t channels, const double* saved, int64_t lines, void* mean, void* var) {
    Statistics all(channels, channels);
    for (int64_t i = 0; i < lines; ++i, saved += line(channels)) all.merge(saved[0], saved + 1, saved + 1 + channels);
    for (int64_t c = 0; c < channels; ++c) {
      static_cast<A*>(mean)[c] = all.count > 0 ? static_cast<A>(all.mean.data[c]) : static_cast<A>(NAN);
      static_cast<A*>(var)[c] = static_cast<A>(all.squares.data[c] / all.count);
    }
  }
};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
