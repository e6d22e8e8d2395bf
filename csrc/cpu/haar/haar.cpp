// Haar analysis and synthesis on the CPU. Compiled once per instruction set (see isa.h).
//
// Memory is everything here: a level is three additions an element. So all levels run in one pass: a unit of
// work is one row of the coarsest level (2^L image rows), the LL rows in between stay in the L1 cache as
// float, each input element is read once and each coefficient written once.

#include "cpu/common/convert.h"
#include "cpu/common/parallel.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Channels a channels_last unit handles at a time: the scratch of five levels stays within L1.
constexpr int64_t kChannelChunk = 256;

template <class A, class T>
static inline void load_pair(const T* p, A& even, A& odd) {
  even = load(p[0]);
  odd = load(p[1]);
}
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// Two bf16 are the halves of one 32-bit word and a float is a bf16 with zeros below: no shuffle needed.
static inline void load_pair(const bf16* p, float& even, float& odd) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  even = bits_to_float(word << 16);
  odd = bits_to_float(word & 0xffff0000u);
}
#endif

// `edge` times a sample. Zero padding must give zero for NaN and infinity too.
template <class A>
static inline A scaled(A edge, A value) {
  return edge == A(0) ? A(0) : edge * value;
}

template <class A>
struct Quad {
  A a, b, c, d;
};
template <class A>
static inline Quad<A> butterfly(A a, A b, A c, A d) {
  const A half = A(0.5);
  const A p = a + b, q = a - b, r = c + d, s = c - d;
  return {half * (p + r), half * (p - r), half * (q + s), half * (q - s)};
}

// --- Row form: contiguous or strided rows of a plane ----------------------------------------------------

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
constexpr bool vectorises_in_place() {
  return true;
}
// f16 needs the conversion instructions, which load_row and store_row spell out.
template <>
constexpr bool vectorises_in_place<f16>() {
  return false;
}

// The sizes of every level and one thread's scratch memory.
struct Pyramid {
  int64_t h[kMaxHaarLevels + 1], w[kMaxHaarLevels + 1];
  explicit Pyramid(const HaarArgs& args) {
    h[0] = args.h;
    w[0] = args.w;
    for (int l = 1; l <= args.levels; ++l) {
      h[l] = half_up(h[l - 1]);
      w[l] = half_up(w[l - 1]);
    }
  }
};

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

// --- channels_last form: vectors of channels, one quad of pixels at a time, depth first ----------------

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

// --- Drivers --------------------------------------------------------------------------------------------

enum class Direction { analysis, synthesis };

template <class T, Direction direction>
void run_rows(const HaarArgs& args, const Pyramid& size, int threads) {
  const int64_t rows = size.h[args.levels], units = args.n * args.c * rows;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(RowWorker<T>::scratch_bytes(args, size));
    RowWorker<T> worker(args, size, scratch);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t plane = unit / rows;
      worker.point_at(plane / args.c, plane % args.c);
      if (direction == Direction::analysis) {
        worker.analyse_unit(unit % rows);
      } else {
        worker.synthesise_unit(unit % rows);
      }
    }
  }
}

template <class T, Direction direction>
void run_channels_last(const HaarArgs& args, const Pyramid& size, int threads) {
  const int64_t rows = size.h[args.levels], columns = size.w[args.levels];
  const int64_t chunks = (args.c + kChannelChunk - 1) / kChannelChunk;
  const int64_t units = args.n * rows * chunks * columns;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(ChannelWorker<T>::scratch_bytes(args, size));
    ChannelWorker<T> worker(args, size, scratch);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t x = unit % columns, rest = unit / columns;
      worker.c0 = rest % chunks * kChannelChunk;
      worker.count = args.c - worker.c0 < kChannelChunk ? args.c - worker.c0 : kChannelChunk;
      worker.n = rest / chunks / rows;
      if (direction == Direction::analysis) {
        worker.analyse_unit(rest / chunks % rows, x);
      } else {
        worker.synthesise_unit(rest / chunks % rows, x);
      }
    }
  }
}

template <class T, Direction direction>
void run(const HaarArgs& args, int threads) {
  if (args.n == 0 || args.c == 0 || args.h == 0 || args.w == 0) return;
  const Pyramid size(args);
  const int64_t element = static_cast<int64_t>(sizeof(T));
  const int L = args.levels;
  if (direction == Direction::analysis) {
    const int64_t low[4] = {args.n, args.c, size.h[L], size.w[L]};
    advise(args.ll.data, args.ll.stride, low, element);
    for (int l = 1; l <= L; ++l) {
      const int64_t high[5] = {args.n, args.c, 3, size.h[l], size.w[l]};
      advise(args.high[l - 1].data, args.high[l - 1].stride, high, element);
      const int64_t kept[4] = {args.n, args.c, size.h[l], size.w[l]};
      advise(args.low[l - 1].data, args.low[l - 1].stride, kept, element);
    }
  } else {
    const int64_t full[4] = {args.n, args.c, args.h, args.w};
    advise(args.image.data, args.image.stride, full, element);
  }
  if (args.n * args.c * args.h * args.w < kSerialElements) threads = 1;
  const bool channels_last =
      args.c > 1 && args.image.stride[1] == 1 && args.image.stride[3] != 1 && args.ll.stride[1] == 1;
  if (channels_last) {
    run_channels_last<T, direction>(args, size, threads);
  } else {
    run_rows<T, direction>(args, size, threads);
  }
}

template <Direction direction>
void dispatch(const HaarArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f64:
      return run<double, direction>(args, threads);
    case DType::f32:
      return run<float, direction>(args, threads);
    case DType::f16:
      return run<f16, direction>(args, threads);
    case DType::bf16:
      return run<bf16, direction>(args, threads);
  }
}

}  // namespace

extern const HaarKernels haar_kernels = {dispatch<Direction::analysis>, dispatch<Direction::synthesis>};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
