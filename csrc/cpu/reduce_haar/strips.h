// Strips of an image that pass through a 1x1 convolution and the Haar levels in one thread's cache. Included by the
// per-ISA units only.
#pragma once

#include "wavemix/reduce_haar.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// A strip has this many, if its blocks are small enough: with 64 reduced channels 128 KB of float.
constexpr int64_t kPixels = 512;

struct Strip {
  int64_t n, row, column, rows, columns;
};
struct Strips {
  int64_t rows, columns, down, across, count, pixels;
  explicit Strips(const ReduceHaarArgs& a) {
    const int64_t unit = int64_t{1} << a.levels;
    columns = kPixels / unit / unit * unit;
    columns = columns < unit ? unit : columns;
    columns = a.w < columns ? a.w : columns;
    rows = kPixels / (unit * (columns > 0 ? columns : 1)) * unit;
    rows = rows < unit ? unit : rows;
    rows = a.h < rows ? a.h : rows;
    pixels = rows * columns;
    down = rows > 0 ? (a.h + rows - 1) / rows : 0;
    across = columns > 0 ? (a.w + columns - 1) / columns : 0;
    count = a.n * down * across;
  }
  Strip get(const ReduceHaarArgs& a, int64_t i) const {
    const int64_t row = i / across % down * rows, column = i % across * columns;
    return {i / (down * across), row, column, a.h - row < rows ? a.h - row : rows,
            a.w - column < columns ? a.w - column : columns};
  }
};

template <class T>
static inline T* pixel(const Plane& image, const Strip& s, int64_t row) {
  return static_cast<T*>(image.data) + s.n * image.stride[0] + (s.row + row) * image.stride[2] +
         s.column * image.stride[3];
}

// The Haar transform of a strip from level `first` on: between `image`, the strip's LL of the level before (of the
// first level the reduced image), and its place in the pyramid.
static inline HaarArgs haar_of(const ReduceHaarArgs& args, const Strip& s, int first, const Plane& image,
                               int64_t element) {
  HaarArgs haar;
  haar.dtype = args.dtype;
  haar.levels = args.levels - first + 1;
  haar.n = 1;
  haar.c = args.o;
  haar.h = s.rows >> (first - 1);
  haar.w = s.columns >> (first - 1);
  haar.image = image;
  for (int l = first; l <= args.levels; ++l) {
    const Plane& z = args.z[l - 1];
    char* at = static_cast<char*>(z.data) +
               element * (s.n * z.stride[0] + (s.row >> l) * z.stride[2] + (s.column >> l) * z.stride[3]);
    const Plane low = {at, {z.stride[0], 1, z.stride[2], z.stride[3]}};
    if (l == args.levels) {
      haar.ll = low;
    } else {
      haar.low[l - first] = low;
    }
    haar.high[l - first] = {at + element * args.o, {z.stride[0], 3, 1, z.stride[2], z.stride[3]}};
  }
  return haar;
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
