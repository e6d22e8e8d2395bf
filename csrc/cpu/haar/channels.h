// Haar transforms of channels_last images by vectors of channels, one quad of pixels at a time, depth first. Included
// by the per-ISA units only.
#pragma once

#include "cpu/haar/butterfly.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {  // for haar.cpp alone

// Channels a channels_last unit handles at a time: the scratch of five levels stays within L1.
constexpr int64_t kChannelChunk = 256;

template <class T>
struct ChannelWorker {
  using A = typename Arithmetic<T>::type;
  const HaarArgs& args;
  const Pyramid& size;
  const A edge;
  int64_t n = 0, c0 = 0, count = 0;  // sample, first channel, channels of the chunk at work
  A* child[kMaxHaarLevels + 1][4];   // the four LL vectors below a node of each level (level 0: pixels)
  A* band;                           // 3 * chunk, interleaved as in memory
  A* coarsest;                       // LL of the coarsest level on its way to or from memory

  static int64_t scratch_bytes(const HaarArgs& args, const Pyramid&) {
    return kChannelChunk * (4 * (args.levels + 1) + 4) * static_cast<int64_t>(sizeof(A));
  }
  ChannelWorker(const HaarArgs& args, const Pyramid& size, Scratch& scratch)
      : args(args), size(size), edge(static_cast<A>(args.edge)) {
    A* next = reinterpret_cast<A*>(scratch.block);
    for (int l = 0; l <= args.levels; ++l)
      for (int k = 0; k < 4; ++k, next += kChannelChunk) child[l][k] = next;
    band = next;
    coarsest = next + 3 * kChannelChunk;
  }
  T* pixel(const Plane& p, int64_t y, int64_t x) const {
    return static_cast<T*>(p.data) + n * p.stride[0] + c0 * p.stride[1] + y * p.stride[2] + x * p.stride[3];
  }
  T* bands(int l, int64_t y, int64_t x) const {
    const Bands& b = args.high[l - 1];
    return static_cast<T*>(b.data) + n * b.stride[0] + c0 * b.stride[1] + y * b.stride[3] + x * b.stride[4];
  }
  bool packed(int l) const { return args.high[l - 1].stride[1] == 3 && args.high[l - 1].stride[2] == 1; }

  // LL and bands of a channel follow each other, in `out` or `in`.
  template <class In, class Out>
  void analyse_joined(const In* __restrict a, const In* __restrict b, const In* __restrict c, const In* __restrict d,
                      Out* __restrict out) const {
    WAVEMIX_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Quad<A> q = butterfly<A>(load(a[i]), load(b[i]), load(c[i]), load(d[i]));
      store(out[4 * i], q.a);
      store(out[4 * i + 1], q.b);
      store(out[4 * i + 2], q.c);
      store(out[4 * i + 3], q.d);
    }
  }
  template <class In, class Out>
  void synthesise_joined(const In* __restrict in, Out* __restrict a, Out* __restrict b, Out* __restrict c,
                         Out* __restrict d) const {
    WAVEMIX_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Quad<A> q = butterfly<A>(load(in[4 * i]), load(in[4 * i + 1]), load(in[4 * i + 2]), load(in[4 * i + 3]));
      store(a[i], q.a);
      store(b[i], q.b);
      store(c[i], q.c);
      store(d[i], q.d);
    }
  }
  void analyse_joined_unit(int64_t y, int64_t x) {
    const T* p = pixel(args.image, 2 * y, 2 * x);
    const T* const pixels[4] = {p, p + args.image.stride[3], p + args.image.stride[2],
                                p + args.image.stride[2] + args.image.stride[3]};
    T* out = pixel(args.ll, y, x);
    if (vectorises_in_place<T>()) {
      analyse_joined(pixels[0], pixels[1], pixels[2], pixels[3], out);
      return;
    }
    A* const* q = child[0];
    for (int k = 0; k < 4; ++k) load_row(pixels[k], 1, count, q[k]);
    analyse_joined(q[0], q[1], q[2], q[3], band);  // and `coarsest`, which follows
    store_row(band, out, 1, 4 * count);
  }
  void synthesise_joined_unit(int64_t y, int64_t x) {
    T* p = pixel(args.image, 2 * y, 2 * x);
    T* const pixels[4] = {p, p + args.image.stride[3], p + args.image.stride[2],
                          p + args.image.stride[2] + args.image.stride[3]};
    const T* in = pixel(args.ll, y, x);
    if (vectorises_in_place<T>()) {
      synthesise_joined(in, pixels[0], pixels[1], pixels[2], pixels[3]);
      return;
    }
    A* const* q = child[0];
    load_row(in, 1, 4 * count, band);
    synthesise_joined(band, q[0], q[1], q[2], q[3]);
    for (int k = 0; k < 4; ++k) store_row(q[k], pixels[k], 1, count);
  }

  template <class In, class Low, class High>
  void analyse_quad(const In* __restrict a, const In* __restrict b, const In* __restrict c, const In* __restrict d,
                    Low* __restrict ll, High* __restrict out) const {
    WAVEMIX_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Quad<A> q = butterfly<A>(load(a[i]), load(b[i]), load(c[i]), load(d[i]));
      store(ll[i], q.a);
      store(out[3 * i], q.b);
      store(out[3 * i + 1], q.c);
      store(out[3 * i + 2], q.d);
    }
  }
  template <class Low, class High, class Out>
  void synthesise_quad(const Low* __restrict ll, const High* __restrict in, Out* __restrict a, Out* __restrict b,
                       Out* __restrict c, Out* __restrict d) const {
    WAVEMIX_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Quad<A> q = butterfly<A>(load(ll[i]), load(in[3 * i]), load(in[3 * i + 1]), load(in[3 * i + 2]));
      store(a[i], q.a);
      store(b[i], q.b);
      store(c[i], q.c);
      store(d[i], q.d);
    }
  }

  template <class In, class Low>
  void write_bands(int l, int64_t y, int64_t x, const In* a, const In* b, const In* c, const In* d, Low* ll) {
    T* out = bands(l, y, x);
    if (vectorises_in_place<T>() && packed(l)) {
      analyse_quad(a, b, c, d, ll, out);
      return;
    }
    analyse_quad(a, b, c, d, ll, band);
    if (packed(l)) {
      store_row(band, out, 1, 3 * count);
    } else {
      const Bands& s = args.high[l - 1];
      for (int64_t i = 0; i < count; ++i)
        for (int k = 0; k < 3; ++k) store(out[i * s.stride[1] + k * s.stride[2]], band[3 * i + k]);
    }
  }
  template <class Low>
  void analyse(int l, int64_t y, int64_t x, Low* ll) {
    const bool row = 2 * y + 1 < size.h[l - 1], column = 2 * x + 1 < size.w[l - 1];
    A* const* q = child[l - 1];
    if (l == 1) {
      const int64_t sh = args.image.stride[2], sw = args.image.stride[3];
      const T* p = pixel(args.image, 2 * y, 2 * x);
      if (vectorises_in_place<T>() && row && column) {
        write_bands(l, y, x, p, p + sw, p + sh, p + sh + sw, ll);
        return;
      }
      load_row(p, 1, count, q[0]);
      if (column) load_row(p + sw, 1, count, q[1]);
      if (row) load_row(p + sh, 1, count, q[2]);
      if (row && column) load_row(p + sh + sw, 1, count, q[3]);
    } else {
      for (int k = 0; k < 4; ++k) {
        if ((k / 2 == 1 && !row) || (k % 2 == 1 && !column)) continue;
        const int64_t cy = 2 * y + k / 2, cx = 2 * x + k % 2;
        analyse(l - 1, cy, cx, q[k]);
        const Plane& p = args.low[l - 2];
        if (p.data != nullptr) store_row(q[k], pixel(p, cy, cx), p.stride[1], count);
      }
    }
    if (!column) {
      extend(q[0], q[1]);
      if (row) extend(q[2], q[3]);
    }
    if (!row) {
      extend(q[0], q[2]);
      extend(q[1], q[3]);
    }
    write_bands(l, y, x, static_cast<const A*>(q[0]), static_cast<const A*>(q[1]), static_cast<const A*>(q[2]),
                static_cast<const A*>(q[3]), ll);
  }
  void extend(const A* last, A* missing) const {
    for (int64_t i = 0; i < count; ++i) missing[i] = scaled(edge, last[i]);
  }
  void fold(A* last, const A* missing) const {
    for (int64_t i = 0; i < count; ++i) last[i] += scaled(edge, missing[i]);
  }
  void analyse_unit(int64_t y, int64_t x) {
    const int L = args.levels;
    T* out = pixel(args.ll, y, x);
    if (vectorises_in_place<T>()) {
      analyse(L, y, x, out);
    } else {
      analyse(L, y, x, coarsest);
      store_row(coarsest, out, 1, count);
    }
  }

  template <class Low, class Out>
  void read_bands(int l, int64_t y, int64_t x, const Low* ll, Out* a, Out* b, Out* c, Out* d) {
    const Bands& s = args.high[l - 1];
    if (s.data == nullptr) {
      for (int64_t i = 0; i < 3 * count; ++i) band[i] = A(0);
    } else {
      const T* in = bands(l, y, x);
      if (vectorises_in_place<T>() && packed(l)) {
        synthesise_quad(ll, in, a, b, c, d);
        return;
      }
      if (packed(l)) {
        load_row(in, 1, 3 * count, band);
      } else {
        for (int64_t i = 0; i < count; ++i)
          for (int k = 0; k < 3; ++k) band[3 * i + k] = load(in[i * s.stride[1] + k * s.stride[2]]);
      }
    }
    synthesise_quad(ll, static_cast<const A*>(band), a, b, c, d);
  }
  template <class Low>
  void synthesise(int l, int64_t y, int64_t x, const Low* ll) {
    const bool row = 2 * y + 1 < size.h[l - 1], column = 2 * x + 1 < size.w[l - 1];
    if (l == 1 && vectorises_in_place<T>() && row && column && args.add.data == nullptr) {
      const int64_t sh = args.image.stride[2], sw = args.image.stride[3];
      T* p = pixel(args.image, 2 * y, 2 * x);
      read_bands(l, y, x, ll, p, p + sw, p + sh, p + sh + sw);
      return;
    }
    A* const* q = child[l - 1];
    read_bands(l, y, x, ll, q[0], q[1], q[2], q[3]);
    if (!row) {
      fold(q[0], q[2]);
      fold(q[1], q[3]);
    }
    if (!column) {
      fold(q[0], q[1]);
      if (row) fold(q[2], q[3]);
    }
    for (int k = 0; k < 4; ++k) {
      if ((k / 2 == 1 && !row) || (k % 2 == 1 && !column)) continue;
      const int64_t cy = 2 * y + k / 2, cx = 2 * x + k % 2;
      const Plane& p = l > 1 ? args.low[l - 2] : args.add;
      if (p.data != nullptr) {
        load_row(static_cast<const T*>(pixel(p, cy, cx)), p.stride[1], count, band);
        WAVEMIX_SIMD
        for (int64_t i = 0; i < count; ++i) q[k][i] += band[i];
      }
      if (l > 1) {
        synthesise(l - 1, cy, cx, static_cast<const A*>(q[k]));
        continue;
      }
      store_row(q[k], pixel(args.image, cy, cx), 1, count);
    }
  }
  void synthesise_unit(int64_t y, int64_t x) {
    const int L = args.levels;
    const T* in = pixel(args.ll, y, x);
    if (vectorises_in_place<T>()) {
      synthesise(L, y, x, in);
    } else {
      load_row(in, 1, count, coarsest);
      synthesise(L, y, x, static_cast<const A*>(coarsest));
    }
  }
};

}  // namespace
}  // namespace WAVEMIX_ISA
}  // namespace wavemix
