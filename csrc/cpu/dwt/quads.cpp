// Quads of real bands as the dual-tree transform's complex numbers, and back, on the CPU: one pass. Compiled once per
// instruction set (see isa.h).

#include "cpu/dwt/lines.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Where the two complex numbers of bands LH, HL and HH go among 15, 45, 75, 105, 135, 165 degrees.
constexpr int kOrientation[3][2] = {{0, 5}, {2, 3}, {1, 4}};

// A row's values, `step` apart; a step of 0 is one that the compiler does not know, kept in `far`.
template <class T, int step>
struct Row {
  T* at;
  int64_t far;
  T& operator[](int64_t x) const { return at[x * (step == 0 ? far : step)]; }
};

template <class T>
using Number = typename Arithmetic<T>::type;

template <class T, int corner_step, int z_step>
struct Quads {
  using A = Number<T>;
  using Corner = Row<T, corner_step>;
  using Part = Row<T, z_step>;
  const QuadsArgs& args;

  // a, b, c and d of a band's row of quads. Of trees, those of a high-pass begin with the second one.
  void corners(int band, int64_t n, int64_t c, int64_t y, Corner (&out)[4]) const {
    for (int i = 0; i < 4; ++i) {
      const Bands& from = args.corner[args.trees ? i ^ (2 * (band & 1) + (band >> 1)) : i];
      const int64_t* s = from.stride;
      out[i] = {static_cast<T*>(from.data) + n * s[0] + c * s[1] + band * s[2] + y * s[3], s[4]};
    }
  }
  // Real and imaginary parts of a band's two orientations.
  void parts(int band, int64_t n, int64_t c, int64_t y, Part (&out)[4]) const {
    const int64_t* s = args.z_stride;
    for (int i = 0; i < 4; ++i) {
      const int64_t at = n * s[0] + c * s[1] + kOrientation[band - 1][i / 2] * s[2] + y * s[3] + i % 2 * s[5];
      out[i] = {static_cast<T*>(args.z) + at, s[4]};
    }
  }
  T* low(int64_t n, int64_t c, int64_t y) const {
    const int64_t* s = args.low.stride;
    return static_cast<T*>(args.low.data) + n * s[0] + c * s[1] + y * s[2];
  }

  // The rows of the low-pass, in which two corners take turns.
  template <bool back>
  static void take_turns(Corner even, Corner odd, T* row, int64_t step, int64_t w) {
    WAVEMIX_SIMD
    for (int64_t x = 0; x < w; ++x) {
      T &first = row[2 * x * step], &second = row[(2 * x + 1) * step];
      if constexpr (back) {
        even[x] = first;
        odd[x] = second;
      } else {
        first = even[x];
        second = odd[x];
      }
    }
  }
  template <bool back>
  void low_rows(int64_t n, int64_t c, int64_t y) const {
    Corner corner[4];
    corners(0, n, c, y, corner);
    const int64_t step = args.low.stride[3];
    for (int i = 0; i < 4; i += 2) {
      T* row = low(n, c, 2 * y + i / 2);
      if (step == 1) {
        take_turns<back>(corner[i], corner[i + 1], row, 1, args.w);
      } else {
        take_turns<back>(corner[i], corner[i + 1], row, step, args.w);
      }
    }
  }

  void to_complex(int64_t n, int64_t c, int64_t y) const {
    low_rows<false>(n, c, y);
    Corner corner[4];
    Part part[4];
    for (int band = 1; band < 4; ++band) {
      corners(band, n, c, y, corner);
      parts(band, n, c, y, part);
      const Corner a_row = corner[0], b_row = corner[1], c_row = corner[2], d_row = corner[3];
      const Part one = part[0], one_i = part[1], other = part[2], other_i = part[3];
      WAVEMIX_SIMD
      for (int64_t x = 0; x < args.w; ++x) {
        const A a = load(a_row[x]), b = load(b_row[x]), e = load(c_row[x]), d = load(d_row[x]);
        store(one[x], (a - d) * kRootHalf);
        store(one_i[x], (b + e) * kRootHalf);
        store(other[x], (a + d) * kRootHalf);
        store(other_i[x], (b - e) * kRootHalf);
      }
    }
  }
  void from_complex(int64_t n, int64_t c, int64_t y) const {
    low_rows<true>(n, c, y);
    Corner corner[4];
    Part part[4];
    for (int band = 1; band < 4; ++band) {
      corners(band, n, c, y, corner);
      parts(band, n, c, y, part);
      const Corner a_row = corner[0], b_row = corner[1], c_row = corner[2], d_row = corner[3];
      const Part one_row = part[0], one_i_row = part[1], other_row = part[2], other_i_row = part[3];
      WAVEMIX_SIMD
      for (int64_t x = 0; x < args.w; ++x) {
        const A one = load(one_row[x]), one_i = load(one_i_row[x]);
        const A other = load(other_row[x]), other_i = load(other_i_row[x]);
        store(a_row[x], (one + other) * kRootHalf);
        store(b_row[x], (one_i + other_i) * kRootHalf);
        store(c_row[x], (one_i - other_i) * kRootHalf);
        store(d_row[x], (other - one) * kRootHalf);
      }
    }
  }
  static constexpr A kRootHalf = static_cast<A>(0.70710678118654752440);
};

template <class T, int corner_step, int z_step>
void run(const QuadsArgs& args, bool back, int threads) {
  const Quads<T, corner_step, z_step> quads{args};
  if (4 * args.n * args.c * args.h * args.w < kSerialElements) threads = 1;
  WAVEMIX_PARALLEL(threads) {
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

// With steps that the compiler knows where rows are contiguous: bands of one image or of trees, parts that alternate or
// lie apart.
void run(const QuadsArgs& args, bool back, int threads) {
  if (args.n * args.c * args.h * args.w == 0) return;
  const int64_t z_step = args.z_stride[4];
  int64_t corner_step = args.corner[0].stride[4];
  for (const Bands& one : args.corner)
    if (one.stride[4] != corner_step) corner_step = 0;
  dispatch(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (corner_step == 2 && z_step == 2) {
      run<T, 2, 2>(args, back, threads);
    } else if (corner_step == 2 && z_step == 1) {
      run<T, 2, 1>(args, back, threads);
    } else if (corner_step == 1 && z_step == 2) {
      run<T, 1, 2>(args, back, threads);
    } else if (corner_step == 1 && z_step == 1) {
      run<T, 1, 1>(args, back, threads);
    } else {
      run<T, 0, 0>(args, back, threads);
    }
  });
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
