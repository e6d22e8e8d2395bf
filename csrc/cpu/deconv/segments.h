// Products whose left operand's rows overlap: a stencil over pixels with few channels, whose results are made two at a
// time so that their channels fill a vector. Included by the per-ISA units only.
#pragma once

#include "cpu/common/operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// The right operand of a pass: for each pixel that a tap reads, `depth` channels times the columns of a pair of
// results. A tap belongs to one or both of a pair; where the vectors of the other's columns would be zeros, they are
// left out.
struct Segment {
  int64_t row, shift;  // in the left operand: a row of pixels, and the distance behind a place
  int64_t right;       // where its weights are
  int from, to;        // vectors of the panel
};
template <class A>
struct Weights {
  int64_t depth, pixels, columns;
  Panels panels;
  Buffer<A> memory;
  Buffer<Segment> segments;
  // Element (row, pixel, channel, column), or none; `rows` of `pixels` with d channels each.
  template <class Has, class At>
  Weights(int64_t rows, int64_t p, int64_t d, int64_t c, const Has& has, const At& at)
      : depth(d),
        pixels(rows * p),
        columns(c),
        panels(padded<A>(c) / kLanes<A>),
        memory(pixels * d * padded<A>(c)),
        segments(panels.count * pixels) {
    A* out = memory.data;
    for (int64_t i = 0; i < panels.count * pixels; ++i) {
      const int64_t panel = i / pixels, row = i % pixels / p, pixel = i % p;
      const int64_t begin = panels.begin(panel) * kLanes<A>, end = panels.begin(panel + 1) * kLanes<A>;
      const auto present = [&](int64_t j) { return j < c && has(row, pixel, j); };
      int64_t from = begin, to = end;
      while (from < end && !present(from)) ++from;
      while (to > from && !present(to - 1)) --to;
      from = from / kLanes<A> * kLanes<A>;
      to = to <= from ? from : round_up(to, kLanes<A>);
      segments.data[i] = {row, pixel * d, out - memory.data, static_cast<int>((from - begin) / kLanes<A>),
                          static_cast<int>((to - begin) / kLanes<A>)};
      for (int64_t k = 0; k < d; ++k)
        for (int64_t j = from; j < to; ++j) *out++ = present(j) ? static_cast<A>(at(row, pixel, k, j)) : A(0);
    }
  }
};

template <class A, int vectors, int from, int to>
static inline void add_segment(const A* left, int64_t apart, const A* right, int64_t depth,
                               typename Vector<A>::type (&sum)[kGemmRows][vectors]) {
  typedef typename Vector<A>::type V;
  for (int64_t k = 0; k < depth; ++k) {
    V row[to - from];
#pragma GCC unroll 3
    for (int j = 0; j < to - from; ++j)
      row[j] = *reinterpret_cast<const typename Vector<A>::unaligned*>(right + (k * (to - from) + j) * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kGemmRows; ++i) {
      const V factor = left[i * apart + k] - V{};
#pragma GCC unroll 3
      for (int j = from; j < to; ++j) sum[i][j] += factor * row[j - from];
    }
  }
}

// kGemmRows places of a panel; as gemm_tile, but all segments while the sums stay in registers.
template <class A, int vectors>
static inline void tile(const A* const* left, int64_t place, int64_t apart, const Weights<A>& weights,
                        const Segment* segments, const A* bias, A* out, int64_t ld) {
  typedef typename Vector<A>::type V;
  typedef typename Vector<A>::unaligned Memory;
  V sum[kGemmRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) sum[i][j] = *reinterpret_cast<const Memory*>(bias + j * kLanes<A>);
  }
  for (const Segment* s = segments; s < segments + weights.pixels; ++s) {
    const A* a = left[s->row] + s->shift + place;
    const A* b = weights.memory.data + s->right;
    const int range = s->from * 4 + s->to;
    if (range == vectors) add_segment<A, vectors, 0, vectors>(a, apart, b, weights.depth, sum);
    if constexpr (vectors > 1) {
      if (range == 1) add_segment<A, vectors, 0, 1>(a, apart, b, weights.depth, sum);
      if (range == 4 + vectors) add_segment<A, vectors, 1, vectors>(a, apart, b, weights.depth, sum);
    }
    if constexpr (vectors > 2) {
      if (range == 2) add_segment<A, vectors, 0, 2>(a, apart, b, weights.depth, sum);
      if (range == 4 + 2) add_segment<A, vectors, 1, 2>(a, apart, b, weights.depth, sum);
      if (range == 8 + 3) add_segment<A, vectors, 2, 3>(a, apart, b, weights.depth, sum);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) *reinterpret_cast<Memory*>(out + i * ld + j * kLanes<A>) = sum[i][j];
  }
}

// out (places x columns) = bias + the sum of the segments' products; the left operand's places lie `apart`.
template <class A>
static void products(int64_t places, const A* const* left, int64_t apart, const Weights<A>& weights, const A* bias,
                     A* out) {
  const int64_t ld = padded<A>(weights.columns);
  const Panels& panels = weights.panels;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t at = panels.begin(p) * kLanes<A>;
    const Segment* segments = weights.segments.data + p * weights.pixels;
    for (int64_t i = 0; i < places; i += kGemmRows) {
      A* to = out + i * ld + at;
      switch (panels.begin(p + 1) - panels.begin(p)) {
        case 1:
          tile<A, 1>(left, i * apart, apart, weights, segments, bias + at, to, ld);
          break;
        case 2:
          tile<A, 2>(left, i * apart, apart, weights, segments, bias + at, to, ld);
          break;
        default:
          tile<A, 3>(left, i * apart, apart, weights, segments, bias + at, to, ld);
      }
    }
  }
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
