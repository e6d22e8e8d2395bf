// Haar transforms by rows of a plane, contiguous or strided. A unit of work is one row of the coarsest level. Included
// by the per-ISA units only.
#pragma once

#include "cpu/haar/butterfly.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {  // for haar.cpp alone

// Two image rows of width w into one row of each band.
template <class A, class In, class Low, class High>
void analyse_rows(const In* __restrict top, const In* __restrict bottom, int64_t w, A edge, Low* __restrict ll,
                  High* __restrict lh, High* __restrict hl, High* __restrict hh) {
  const int64_t pairs = w / 2;
  WAVEMIX_SIMD
  for (int64_t j = 0; j < pairs; ++j) {
    A a, b, c, d;
    load_pair(top + 2 * j, a, b);
    load_pair(bottom + 2 * j, c, d);
    const Quad<A> q = butterfly(a, b, c, d);
    store(ll[j], q.a);
    store(lh[j], q.b);
    store(hl[j], q.c);
    store(hh[j], q.d);
  }
  if (w % 2 != 0) {
    const A a = load(top[w - 1]), c = load(bottom[w - 1]);
    const Quad<A> q = butterfly(a, scaled(edge, a), c, scaled(edge, c));
    store(ll[pairs], q.a);
    store(lh[pairs], q.b);
    store(hl[pairs], q.c);
    store(hh[pairs], q.d);
  }
}

// One row of each band into two image rows of width w.
template <class A, class Low, class High, class Out>
void synthesise_rows(const Low* __restrict ll, const High* __restrict lh, const High* __restrict hl,
                     const High* __restrict hh, int64_t w, A edge, Out* __restrict top, Out* __restrict bottom) {
  const int64_t pairs = w / 2;
  WAVEMIX_SIMD
  for (int64_t j = 0; j < pairs; ++j) {
    const Quad<A> q = butterfly<A>(load(ll[j]), load(lh[j]), load(hl[j]), load(hh[j]));
    store(top[2 * j], q.a);
    store(top[2 * j + 1], q.b);
    store(bottom[2 * j], q.c);
    store(bottom[2 * j + 1], q.d);
  }
  if (w % 2 != 0) {
    const Quad<A> q = butterfly<A>(load(ll[pairs]), load(lh[pairs]), load(hl[pairs]), load(hh[pairs]));
    store(top[w - 1], q.a + scaled(edge, q.b));
    store(bottom[w - 1], q.c + scaled(edge, q.d));
  }
}

template <class T>
struct RowWorker {
  using A = typename Arithmetic<T>::type;
  const HaarArgs& args;
  const Pyramid& size;
  const A edge;
  T* image = nullptr;
  const T* add = nullptr;
  T* ll = nullptr;
  T* high[kMaxHaarLevels] = {};
  T* low[kMaxHaarLevels] = {};
  A* pair[kMaxHaarLevels + 1][2];  // two LL rows of each level (level 0: image rows)
  A* band[4];                      // rows of the bands on their way to or from memory; [3] holds the LL

  static int64_t row_elements(const Pyramid& size) { return (size.w[0] + 15) / 16 * 16; }
  static int64_t scratch_bytes(const HaarArgs& args, const Pyramid& size) {
    return row_elements(size) * (2 * (args.levels + 1) + 4) * static_cast<int64_t>(sizeof(A));
  }

  RowWorker(const HaarArgs& args, const Pyramid& size, Scratch& scratch)
      : args(args), size(size), edge(static_cast<A>(args.edge)) {
    A* next = reinterpret_cast<A*>(scratch.block);
    const int64_t step = row_elements(size);
    for (int l = 0; l <= args.levels; ++l)
      for (int k = 0; k < 2; ++k, next += step) pair[l][k] = next;
    for (int k = 0; k < 4; ++k, next += step) band[k] = next;
  }

  void point_at(int64_t n, int64_t c) {
    image = at(args.image, n, c);
    add = at(args.add, n, c);
    ll = at(args.ll, n, c);
    for (int l = 0; l < args.levels; ++l) {
      const Bands& b = args.high[l];
      high[l] = b.data == nullptr ? nullptr : static_cast<T*>(b.data) + n * b.stride[0] + c * b.stride[1];
      low[l] = at(args.low[l], n, c);
    }
  }
  static T* at(const Plane& p, int64_t n, int64_t c) {
    return p.data == nullptr ? nullptr : static_cast<T*>(p.data) + n * p.stride[0] + c * p.stride[1];
  }

  // --- analysis: LL row r of level l, written to `low`, its bands to memory
  template <class In, class Low>
  void write_bands(int l, int64_t r, const In* top, const In* bottom, Low* low) {
    const Bands& out = args.high[l - 1];
    T* row = high[l - 1] + r * out.stride[3];
    if (vectorises_in_place<T>() && out.stride[4] == 1) {
      analyse_rows(top, bottom, size.w[l - 1], edge, low, row, row + out.stride[2], row + 2 * out.stride[2]);
    } else {
      analyse_rows(top, bottom, size.w[l - 1], edge, low, band[0], band[1], band[2]);
      for (int k = 0; k < 3; ++k) store_row(band[k], row + k * out.stride[2], out.stride[4], size.w[l]);
    }
  }
  template <class Low>
  void analyse(int l, int64_t r, Low* out) {
    A* top = pair[l - 1][0];
    A* bottom = pair[l - 1][1];
    const bool virtual_row = 2 * r + 1 >= size.h[l - 1];
    if (l == 1) {
      const int64_t sh = args.image.stride[2], sw = args.image.stride[3];
      const T* rows = image + 2 * r * sh;
      if (vectorises_in_place<T>() && sw == 1 && !virtual_row) {
        write_bands(l, r, static_cast<const T*>(rows), static_cast<const T*>(rows + sh), out);
        return;
      }
      load_row(rows, sw, size.w[0], top);
      if (!virtual_row) load_row(rows + sh, sw, size.w[0], bottom);
    } else {
      analyse(l - 1, 2 * r, top);
      keep_low(l - 1, 2 * r, top);
      if (!virtual_row) {
        analyse(l - 1, 2 * r + 1, bottom);
        keep_low(l - 1, 2 * r + 1, bottom);
      }
    }
    if (virtual_row)
      for (int64_t j = 0; j < size.w[l - 1]; ++j) bottom[j] = scaled(edge, top[j]);
    write_bands(l, r, static_cast<const A*>(top), static_cast<const A*>(bottom), out);
  }
  void keep_low(int l, int64_t r, const A* row) {
    const Plane& p = args.low[l - 1];
    if (low[l - 1] != nullptr) store_row(row, low[l - 1] + r * p.stride[2], p.stride[3], size.w[l]);
  }
  void add_low(int l, int64_t r, A* row) {
    const Plane& p = args.low[l - 1];
    if (low[l - 1] != nullptr) add_row(low[l - 1] + r * p.stride[2], p.stride[3], size.w[l], row);
  }
  void add_row(const T* src, int64_t stride, int64_t n, A* row) {
    load_row(src, stride, n, band[0]);
    WAVEMIX_SIMD
    for (int64_t j = 0; j < n; ++j) row[j] += band[0][j];
  }
  void analyse_unit(int64_t r) {
    const int L = args.levels;
    T* out = ll + r * args.ll.stride[2];
    if (vectorises_in_place<T>() && args.ll.stride[3] == 1) {
      analyse(L, r, out);
    } else {
      analyse(L, r, band[3]);
      store_row(band[3], out, args.ll.stride[3], size.w[L]);
    }
  }

  // --- synthesis: the two rows below LL row r of level l
  template <class Low, class Out>
  void read_bands(int l, int64_t r, const Low* low, Out* top, Out* bottom) {
    const Bands& in = args.high[l - 1];
    const T* row = high[l - 1] == nullptr ? nullptr : high[l - 1] + r * in.stride[3];
    if (vectorises_in_place<T>() && row != nullptr && in.stride[4] == 1) {
      synthesise_rows(low, row, row + in.stride[2], row + 2 * in.stride[2], size.w[l - 1], edge, top, bottom);
    } else {
      for (int k = 0; k < 3; ++k) {
        if (row != nullptr) {
          load_row(row + k * in.stride[2], in.stride[4], size.w[l], band[k]);
        } else {
          for (int64_t j = 0; j < size.w[l]; ++j) band[k][j] = A(0);
        }
      }
      synthesise_rows(low, static_cast<const A*>(band[0]), static_cast<const A*>(band[1]),
                      static_cast<const A*>(band[2]), size.w[l - 1], edge, top, bottom);
    }
  }
  template <class Low>
  void synthesise(int l, int64_t r, const Low* low) {
    const bool virtual_row = 2 * r + 1 >= size.h[l - 1];
    if (l == 1 && vectorises_in_place<T>() && args.image.stride[3] == 1 && add == nullptr && !virtual_row) {
      T* out = image + 2 * r * args.image.stride[2];
      read_bands(l, r, low, out, out + args.image.stride[2]);
      return;
    }
    A* top = pair[l - 1][0];
    A* bottom = pair[l - 1][1];
    read_bands(l, r, low, top, bottom);
    if (virtual_row && edge != A(0))
      for (int64_t j = 0; j < size.w[l - 1]; ++j) top[j] += edge * bottom[j];
    const int rows = virtual_row ? 1 : 2;
    for (int k = 0; k < rows; ++k) {
      if (l > 1) {
        add_low(l - 1, 2 * r + k, pair[l - 1][k]);
        synthesise(l - 1, 2 * r + k, static_cast<const A*>(pair[l - 1][k]));
      } else {
        write_image(2 * r + k, pair[0][k]);
      }
    }
  }
  void write_image(int64_t y, A* row) {
    if (add != nullptr) add_row(add + y * args.add.stride[2], args.add.stride[3], size.w[0], row);
    store_row(row, image + y * args.image.stride[2], args.image.stride[3], size.w[0]);
  }
  void synthesise_unit(int64_t r) {
    const int L = args.levels;
    const T* in = ll + r * args.ll.stride[2];
    if (vectorises_in_place<T>() && args.ll.stride[3] == 1) {
      synthesise(L, r, in);
    } else {
      load_row(in, args.ll.stride[3], size.w[L], band[3]);
      synthesise(L, r, static_cast<const A*>(band[3]));
    }
  }
};

}  // namespace
}  // namespace WAVEMIX_ISA
}  // namespace wavemix
