// Quads of real bands as the dual-tree transform's complex numbers, and back, on the CPU: one pass. Compiled once per
// instruction set (see isa.h).

#include "cpu/dwt/lines.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Where the two complex numbers of bands LH, HL and HH go among 15, 45, 75, 105, 135, 165 degrees.
constexpr int kOrientation[3][2] = {{0, 5}, {2, 3}, {1, 4}};

// A row of 2n samples is two of n, of even and of odd ones.
template <class A>
static inline void split(const A* __restrict row, int64_t n, A* __restrict even, A* __restrict odd) {
  for (int64_t x = 0; x < n; ++x) {
    even[x] = row[2 * x];
    odd[x] = row[2 * x + 1];
  }
}
template <class A>
static inline void join(const A* __restrict even, const A* __restrict odd, int64_t n, A* __restrict row) {
  for (int64_t x = 0; x < n; ++x) {
    row[2 * x] = even[x];
    row[2 * x + 1] = odd[x];
  }
}

template <class A>
struct Quads {
  const QuadsArgs& args;
  A *first[4], *second[4], *pair;  // rows of w samples, and one of 2w

  static int64_t scratch_bytes(const QuadsArgs& args) {
    return Quads(args, nullptr).line_up(nullptr) * static_cast<int64_t>(sizeof(A));
  }
  Quads(const QuadsArgs& args, A* block) : args(args) { line_up(block); }
  int64_t line_up(A* block) {
    Rows<A> rows(block);
    for (A*& row : first) row = rows.take(args.w);
    for (A*& row : second) row = rows.take(args.w);
    pair = rows.take(2 * args.w);
    return rows.used;
  }

  // Which of the corners is a, b, c, d of a band.
  int place(int band, int corner) const { return args.trees ? corner ^ (2 * (band & 1) + (band >> 1)) : corner; }
  int64_t offset(int at, int band, int64_t n, int64_t c, int64_t y) const {
    const int64_t* s = args.corner[at].stride;
    return n * s[0] + c * s[1] + band * s[2] + y * s[3];
  }
  // Whether corners `even` and the next one alternate in memory.
  bool alternate(int even) const {
    const Bands &a = args.corner[even], &b = args.corner[even + 1];
    const int64_t bytes = Elements(args.dtype, nullptr).bytes();
    return !args.trees && a.stride[4] == 2 && static_cast<char*>(b.data) == static_cast<char*>(a.data) + bytes;
  }
  void load(int band, int64_t n, int64_t c, int64_t y, A* const* to) const {
    for (int i = 0; i < 4; i += 2)
      if (alternate(i)) {
        load_line(Elements(args.dtype, args.corner[i].data), offset(i, band, n, c, y), 1, 2 * args.w, pair);
        split(pair, args.w, to[i], to[i + 1]);
      } else {
        for (int k = i; k < i + 2; ++k) {
          const int at = place(band, k);
          load_line(Elements(args.dtype, args.corner[at].data), offset(at, band, n, c, y), args.corner[at].stride[4],
                    args.w, to[k]);
        }
      }
  }
  void store(int band, int64_t n, int64_t c, int64_t y, A* const* from) const {
    for (int i = 0; i < 4; i += 2)
      if (alternate(i)) {
        join(from[i], from[i + 1], args.w, pair);
        store_line(pair, Elements(args.dtype, args.corner[i].data), offset(i, band, n, c, y), 1, 2 * args.w);
      } else {
        for (int k = i; k < i + 2; ++k) {
          const int at = place(band, k);
          store_line(from[k], Elements(args.dtype, args.corner[at].data), offset(at, band, n, c, y),
                     args.corner[at].stride[4], args.w);
        }
      }
  }
  int64_t offset(int orientation, int64_t n, int64_t c, int64_t y) const {
    const int64_t* s = args.z_stride;
    return n * s[0] + c * s[1] + orientation * s[2] + y * s[3];
  }
  bool parts_alternate() const { return args.z_stride[4] == 2 && args.z_stride[5] == 1; }
  void load_z(int orientation, int64_t n, int64_t c, int64_t y, A* const* to) const {
    const Elements z(args.dtype, args.z);
    const int64_t at = offset(orientation, n, c, y);
    if (parts_alternate()) {
      load_line(z, at, 1, 2 * args.w, pair);
      split(pair, args.w, to[0], to[1]);
    } else {
      for (int part = 0; part < 2; ++part)
        load_line(z, at + part * args.z_stride[5], args.z_stride[4], args.w, to[part]);
    }
  }
  void store_z(int orientation, int64_t n, int64_t c, int64_t y, A* const* from) const {
    const Elements z(args.dtype, args.z);
    const int64_t at = offset(orientation, n, c, y);
    if (parts_alternate()) {
      join(from[0], from[1], args.w, pair);
      store_line(pair, z, at, 1, 2 * args.w);
    } else {
      for (int part = 0; part < 2; ++part)
        store_line(from[part], z, at + part * args.z_stride[5], args.z_stride[4], args.w);
    }
  }
  int64_t low_row(int64_t n, int64_t c, int64_t y) const {
    const int64_t* s = args.low.stride;
    return n * s[0] + c * s[1] + y * s[2];
  }

  void to_complex(int64_t n, int64_t c, int64_t y) const {
    const Elements low(args.dtype, args.low.data);
    load(0, n, c, y, first);
    for (int i = 0; i < 2; ++i) {
      join(first[2 * i], first[2 * i + 1], args.w, pair);
      store_line(pair, low, low_row(n, c, 2 * y + i), args.low.stride[3], 2 * args.w);
    }
    for (int band = 1; band < 4; ++band) {
      load(band, n, c, y, first);
      rotate(first, second);
      store_z(kOrientation[band - 1][0], n, c, y, second);
      store_z(kOrientation[band - 1][1], n, c, y, second + 2);
    }
  }
  void from_complex(int64_t n, int64_t c, int64_t y) const {
    const Elements low(args.dtype, args.low.data);
    for (int i = 0; i < 2; ++i) {
      load_line(low, low_row(n, c, 2 * y + i), args.low.stride[3], 2 * args.w, pair);
      split(pair, args.w, first[2 * i], first[2 * i + 1]);
    }
    store(0, n, c, y, first);
    for (int band = 1; band < 4; ++band) {
      load_z(kOrientation[band - 1][0], n, c, y, second);
      load_z(kOrientation[band - 1][1], n, c, y, second + 2);
      rotate_back(second, first);
      store(band, n, c, y, first);
    }
  }
  static constexpr double kRootHalf = 0.70710678118654752440;
  void rotate(A* const* corner, A* const* z) const {
    const A* __restrict a = corner[0], * __restrict b = corner[1], * __restrict c = corner[2], * __restrict d = corner[3];
    A* __restrict one = z[0], * __restrict one_i = z[1], * __restrict other = z[2], * __restrict other_i = z[3];
    constexpr A half = static_cast<A>(kRootHalf);
    for (int64_t x = 0; x < args.w; ++x) {
      one[x] = (a[x] - d[x]) * half;
      one_i[x] = (b[x] + c[x]) * half;
      other[x] = (a[x] + d[x]) * half;
      other_i[x] = (b[x] - c[x]) * half;
    }
  }
  void rotate_back(A* const* z, A* const* corner) const {
    const A* __restrict one = z[0], * __restrict one_i = z[1], * __restrict other = z[2], * __restrict other_i = z[3];
    A* __restrict a = corner[0], * __restrict b = corner[1], * __restrict c = corner[2], * __restrict d = corner[3];
    constexpr A half = static_cast<A>(kRootHalf);
    for (int64_t x = 0; x < args.w; ++x) {
      a[x] = (one[x] + other[x]) * half;
      b[x] = (one_i[x] + other_i[x]) * half;
      c[x] = (one_i[x] - other_i[x]) * half;
      d[x] = (other[x] - one[x]) * half;
    }
  }
};

template <class A>
void run(const QuadsArgs& args, bool back, int threads) {
  if (4 * args.n * args.c * args.h * args.w < kSerialElements) threads = 1;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(Quads<A>::scratch_bytes(args));
    const Quads<A> quads(args, reinterpret_cast<A*>(scratch.block));
    WAVEMIX_FOR
    for (int64_t row = 0; row < args.n * args.c * args.h; ++row) {
      const int64_t plane = row / args.h, n = plane / args.c, c = plane % args.c;
      if (back) {
        quads.from_complex(n, c, row % args.h);
      } else {
        quads.to_complex(n, c, row % args.h);
      }
    }
  }
}

void run(const QuadsArgs& args, bool back, int threads) {
  if (args.n * args.c * args.h * args.w == 0) return;
  if (args.dtype == DType::f64) {
    run<double>(args, back, threads);
  } else {
    run<float>(args, back, threads);
  }
}

}  // namespace

void quads_to_complex(const QuadsArgs& args, int threads) {
  const int64_t z[6] = {args.n, args.c, 6, args.h, args.w, 2}, low[4] = {args.n, args.c, 2 * args.h, 2 * args.w};
  const int64_t bytes = Elements(args.dtype, nullptr).bytes();
  advise(args.z, args.z_stride, z, bytes);
  advise(args.low.data, args.low.stride, low, bytes);
  run(args, false, threads);
}

void quads_from_complex(const QuadsArgs& args, int threads) {
  const int64_t of_tree[5] = {args.n, args.c, 4, args.h, args.w}, bytes = Elements(args.dtype, nullptr).bytes();
  const int64_t of_image[5] = {args.n, args.c, 4, args.h, 4 * args.w};  // quads' rows by twos
  if (args.trees) {
    for (const Bands& one : args.corner) advise(one.data, one.stride, of_tree, bytes);
  } else {
    const int64_t* s = args.corner[0].stride;
    const int64_t stride[5] = {s[0], s[1], s[2], s[3], 1};
    advise(args.corner[0].data, stride, of_image, bytes);
  }
  run(args, true, threads);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
