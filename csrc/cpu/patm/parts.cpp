// PATM by parts on the CPU: waves with their convolutions, the branches' weighted sum. Compiled once per instruction
// set (see isa.h).
//
// A branch is a 7-tap convolution along one axis, so its lines are independent and both axes are one kernel with other
// strides. The waves of a line (a segment of it, for a block of channel pairs) are made once and stay in cache; from
// there every output is 14 multiply-adds of vectors over channels, weights in registers. Memory is read once per pass.

#include <cstring>

#include "cpu/common/operands.h"
#include "cpu/patm/waves.h"
#include "wavemix/patm.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Pixels and channel pairs at work at a time: the waves of a segment stay within the L2 cache (some 130 KB of float),
// the six pixels beyond its ends cost a twentieth.
constexpr int64_t kSegment = 128;
constexpr int64_t kPairs = 64;
// Lines of one image that go to one thread in a piece.
constexpr int64_t kLines = 8;

// How one pass is cut: into units of an image, a block of channel pairs and some neighbouring lines.
struct Plan {
  int64_t n, c, pairs, length, lines;
  int axis, across;  // of Plane::stride
  int64_t blocks, groups, segments, segment;
  explicit Plan(const PhaseArgs& args)
      : n(args.n),
        c(args.c),
        pairs(args.c / 2),
        length(args.along_h ? args.h : args.w),
        lines(args.along_h ? args.w : args.h),
        axis(args.along_h ? 2 : 3),
        across(args.along_h ? 3 : 2) {
    blocks = (pairs + kPairs - 1) / kPairs;
    groups = (lines + kLines - 1) / kLines;
    segments = (length + kSegment - 1) / kSegment;
    segment = (length + segments - 1) / segments;
  }
  int64_t units() const { return n * blocks * groups; }
};
struct Unit {
  int64_t image, block, first_line, last_line;
  int64_t pair, count;  // channel pairs: the first, and how many
  Unit(const Plan& plan, int64_t index) {
    const int64_t group = index % plan.groups;
    block = index / plan.groups % plan.blocks;
    image = index / plan.groups / plan.blocks;
    first_line = group * kLines;
    last_line = smaller(first_line + kLines, plan.lines);
    pair = block * kPairs;
    count = smaller(kPairs, plan.pairs - pair);
  }
};

// One line of a tensor; `pixel(i)` is where the channels of its i-th pixel begin.
template <class T>
struct Line {
  T* origin;
  int64_t step;
  Line(const Plane& plane, const Plan& plan, int64_t image, int64_t line, int64_t channel = 0)
      : origin(static_cast<T*>(plane.data) + image * plane.stride[0] + line * plane.stride[plan.across] + channel),
        step(plane.stride[plan.axis]) {}
  Line(const Line& line, int64_t channel) : origin(line.origin + channel), step(line.step) {}
  T* pixel(int64_t i) const { return origin + i * step; }
};

// The channels of pixels lie apart, by lines of the image along H: hardware prefetchers give up there, and the latency
// of memory would be most of the time.
constexpr int64_t kAhead = 6;
template <class T>
static inline void prefetch(const Line<const T>& line, int64_t pixel, int64_t channels) {
  const char* const begin = reinterpret_cast<const char*>(line.pixel(pixel));
  for (int64_t i = 0; i < channels * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(begin + i);
}

// Channels as arithmetic values: in place where they are, otherwise a converted copy.
template <class T, class A>
static inline const A* fetch(const T* p, int64_t n, A* buffer) {
  load_row(p, 1, n, buffer);
  return buffer;
}
template <class A>
static inline const A* fetch(const A* p, int64_t, A*) {
  return p;
}

template <class A>
static void deinterleave(const Pairs<A>& b, const A* __restrict z, const A* __restrict cosine, const A* __restrict sine,
                         A* __restrict wave) {
  A* const even = wave;
  A* const odd = wave + b.width;
  WAVEMIX_SIMD
  for (int64_t g = 0; g < b.count; ++g) {
    even[g] = z[2 * g] * cosine[2 * g];
    odd[g] = z[2 * g + 1] * cosine[2 * g + 1];
    even[b.half + g] = z[2 * g] * sine[2 * g];
    odd[b.half + g] = z[2 * g + 1] * sine[2 * g + 1];
  }
}

// The waves of pixels [begin - kReach, end + kReach) of a line. With `keep` the cosines and sines of [begin, end) stay
// there, as [pixel][cos | sin][channel].
template <class T, class A>
static void make_waves(const Pairs<A>& b, const Line<const T>& z, const Line<const T>& theta, int64_t begin,
                       int64_t end, int64_t length, const A* scale, const A* shift, A* waves, A* keep, A* buffer) {
  const int64_t channels = 2 * b.count;
  for (int64_t j = begin - kReach; j < end + kReach; ++j) {
    A* const wave = waves + (j - begin + kReach) * 2 * b.width;
    if (j < 0 || j >= length) {
      std::memset(wave, 0, static_cast<size_t>(2 * b.width) * sizeof(A));
      continue;
    }
    prefetch(theta, j + kAhead, channels);
    prefetch(z, j + kAhead, channels);
    A* const cosine = keep != nullptr && j >= begin && j < end ? keep + (j - begin) * 2 * b.width : buffer;
    A* const sine = cosine + b.width;
    waves_of(fetch(theta.pixel(j), channels, buffer + 2 * b.width), scale, shift, channels, cosine, sine);
    deinterleave(b, fetch(z.pixel(j), channels, buffer + 2 * b.width), cosine, sine, wave);
  }
}

template <class T>
static void forward(const PhaseArgs& args, const Plane& out, const Plane& also, void* sums_, int threads) {
  using A = typename Arithmetic<T>::type;
  A* const sums = static_cast<A*>(sums_);
  for (int64_t i = 0; i < args.n * args.c; ++i) sums[i] = A(0);
  if (args.n * args.c * args.h * args.w == 0) return;
  const Plan plan(args);
  advise<4>(out.data, out.stride, {args.n, args.c, args.h, args.w}, static_cast<int64_t>(sizeof(T)));
  if (args.n * args.c * args.h * args.w < kSerialElements) threads = 1;
  const Pairs<A> widest(smaller(kPairs, plan.pairs));
  const int64_t width = widest.width;
  // Sums of each unit, of out and then of `also`: added up afterwards, in an order that no thread changes.
  const Scratch partial(plan.units() * 2 * width * static_cast<int64_t>(sizeof(double)));
  double* const partials = reinterpret_cast<double*>(partial.block);
  std::memset(partials, 0, static_cast<size_t>(plan.units() * 2 * width) * sizeof(double));
  WAVEMIX_PARALLEL(threads) {
    const int64_t reach = plan.segment + 2 * kReach;
    const Scratch scratch((2 * reach + plan.segment + 2 * kPhaseTaps + 5) * width * static_cast<int64_t>(sizeof(A)));
    A* const waves = reinterpret_cast<A*>(scratch.block);
    A* const result = waves + 2 * reach * width;
    A* const taps = result + plan.segment * width;
    A* const segment_sums = taps + 2 * kPhaseTaps * width;
    A* const buffer = segment_sums + width;
    // The padding of each half is multiplied (by zero) but never written.
    std::memset(waves, 0, static_cast<size_t>(2 * reach * width) * sizeof(A));
    int64_t laid_out = -1;
    WAVEMIX_FOR
    for (int64_t index = 0; index < plan.units(); ++index) {
      const Unit unit(plan, index);
      const Pairs<A> b(unit.count);
      const int64_t channel = 2 * unit.pair, channels = 2 * unit.count;
      if (laid_out != unit.block) {
        lay_out_taps(b, static_cast<const A*>(args.taps), plan.pairs, unit.pair, taps);
        std::memset(waves, 0, static_cast<size_t>(2 * reach * width) * sizeof(A));
        laid_out = unit.block;
      }
      double* const unit_sums = partials + index * 2 * width;
      for (int64_t line = unit.first_line; line < unit.last_line; ++line) {
        const Line<const T> z(args.z, plan, unit.image, line, channel),
            theta(args.theta, plan, unit.image, line, channel);
        const Line<T> to(out, plan, unit.image, line);
        for (int64_t begin = 0; begin < plan.length; begin += plan.segment) {
          const int64_t end = smaller(begin + plan.segment, plan.length);
          make_waves<T, A>(b, z, theta, begin, end, plan.length, static_cast<const A*>(args.scale) + channel,
                           static_cast<const A*>(args.shift) + channel, waves, nullptr, buffer);
          const A* at[kPhaseTaps];
          for (int t = 0; t < kPhaseTaps; ++t) at[t] = waves + t * 2 * b.width;
          convolve(b, at, taps, end - begin, result, segment_sums);
          add_to(unit_sums, segment_sums, b.width);
          for (int64_t j = begin; j < end; ++j) {
            const A* const row = result + (j - begin) * b.width;
            store_row(row, to.pixel(j) + unit.pair, 1, b.count);
            store_row(row + b.half, to.pixel(j) + plan.pairs + unit.pair, 1, b.count);
          }
          if (also.data == nullptr) continue;
          const Line<const T> from(also, plan, unit.image, line, channel);
          for (int64_t i = 0; i < channels; ++i) segment_sums[i] = A(0);
          for (int64_t j = begin; j < end; ++j) {
            const A* const row = fetch(from.pixel(j), channels, buffer);
            WAVEMIX_SIMD
            for (int64_t i = 0; i < channels; ++i) segment_sums[i] += row[i];
          }
          add_to(unit_sums + width, segment_sums, channels);
        }
      }
    }
  }
  for (int64_t image = 0; image < plan.n; ++image)
    for (int64_t block = 0; block < plan.blocks; ++block) {
      double* const first = partials + (image * plan.blocks + block) * plan.groups * 2 * width;
      for (int64_t group = 1; group < plan.groups; ++group)
        for (int64_t i = 0; i < 2 * width; ++i) first[i] += first[group * 2 * width + i];
      const Pairs<A> b(smaller(kPairs, plan.pairs - block * kPairs));
      A* const to = sums + image * plan.c;
      // Outputs g and c/2 + g come from the pair 2g, 2g+1; channels of `also` are their own.
      for (int64_t g = 0; g < b.count; ++g) {
        to[block * kPairs + g] += static_cast<A>(first[g]);
        to[plan.pairs + block * kPairs + g] += static_cast<A>(first[b.half + g]);
      }
      for (int64_t i = 0; i < 2 * b.count; ++i) to[2 * block * kPairs + i] += static_cast<A>(first[width + i]);
    }
}

// d = grad * a + b of pixels [begin - kReach, end + kReach), as [pixel][output].
template <class T, class A>
static void load_gradient(const Pairs<A>& block, const Line<const T>& grad, const Plan& plan, int64_t pair,
                          int64_t begin, int64_t end, const A* a, const A* b, A* d) {
  for (int64_t j = begin - kReach; j < end + kReach; ++j) {
    A* const row = d + (j - begin + kReach) * block.width;
    if (j < 0 || j >= plan.length) {
      std::memset(row, 0, static_cast<size_t>(block.width) * sizeof(A));
      continue;
    }
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t channel = half * plan.pairs + pair;
      prefetch(Line<const T>{grad, channel}, j + kAhead, block.count);
      A* const __restrict to = row + half * block.half;
      load_row(grad.pixel(j) + channel, 1, block.count, to);
      if (a != nullptr) {
        WAVEMIX_SIMD
        for (int64_t g = 0; g < block.count; ++g) to[g] *= a[channel + g];
      }
      if (b != nullptr) {
        WAVEMIX_SIMD
        for (int64_t g = 0; g < block.count; ++g) to[g] += b[channel + g];
      }
    }
  }
}

// An output may be some of the channels of a larger fresh one: it is the larger one that huge pages are for.
static void advise_slice(const Plane& p, const PhaseArgs& args, int64_t element) {
  const int64_t pitch = p.stride[3];
  if (pitch >= args.c && pitch <= 8 * args.c && p.stride[2] == pitch * args.w && p.stride[0] == p.stride[2] * args.h)
    advise_huge_pages(p.data, ((args.n * args.h * args.w - 1) * pitch + args.c) * element);
}

template <class A>
static void interleave(const Pairs<A>& b, const A* __restrict d_wave, A* __restrict d_real, A* __restrict d_imaginary) {
  const A* const even = d_wave;
  const A* const odd = d_wave + b.width;
  WAVEMIX_SIMD
  for (int64_t g = 0; g < b.count; ++g) {
    d_real[2 * g] = even[g];
    d_real[2 * g + 1] = odd[g];
    d_imaginary[2 * g] = even[b.half + g];
    d_imaginary[2 * g + 1] = odd[b.half + g];
  }
}

template <class T>
static void backward(const PhaseArgs& args, const PhaseGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  const Plan plan(args);
  const int64_t element = static_cast<int64_t>(sizeof(T)), elements = args.n * args.c * args.h * args.w;
  const Plane* const written[] = {&grads.d_z, &grads.d_theta, &grads.d_c};
  if (elements > 0)
    for (const Plane* plane : written) advise_slice(*plane, args, element);
  if (elements < kSerialElements) threads = 1;
  const Pairs<A> widest(smaller(kPairs, plan.pairs));
  const int64_t width = widest.width;
  // Sums of each thread: [block][weights | sum_pre | sum_pre_theta].
  const int64_t per_block = (2 * kPhaseTaps + 2) * width, per_thread = plan.blocks * per_block;
  const Scratch total(threads * per_thread * static_cast<int64_t>(sizeof(double)));
  double* const totals = reinterpret_cast<double*>(total.block);
  std::memset(totals, 0, static_cast<size_t>(threads * per_thread) * sizeof(double));
  WAVEMIX_PARALLEL(threads) {
    const int64_t reach = plan.segment + 2 * kReach;
    const Scratch scratch((3 * reach + 4 * plan.segment + 2 * kPhaseTaps + 9) * width *
                          static_cast<int64_t>(sizeof(A)));
    A* const waves = reinterpret_cast<A*>(scratch.block);
    A* const d = waves + 2 * reach * width;
    A* const kept = d + reach * width;
    A* const d_waves = kept + 2 * plan.segment * width;
    A* const taps = d_waves + 2 * plan.segment * width;
    A* const line_sums = taps + 2 * kPhaseTaps * width;
    A* const zeros = line_sums + 2 * width;
    A* const buffer = zeros + width;
    std::memset(zeros, 0, static_cast<size_t>(width) * sizeof(A));
    int64_t laid_out = -1;
    double* const mine = totals + WAVEMIX_THREAD * per_thread;
    WAVEMIX_FOR
    for (int64_t index = 0; index < plan.units(); ++index) {
      const Unit unit(plan, index);
      const Pairs<A> b(unit.count);
      const int64_t channel = 2 * unit.pair, channels = 2 * unit.count;
      if (laid_out != unit.block) {
        lay_out_taps(b, static_cast<const A*>(args.taps), plan.pairs, unit.pair, taps);
        // The padding of each half is multiplied (by zero) but never written.
        std::memset(waves, 0, static_cast<size_t>(3 * reach * width) * sizeof(A));
        laid_out = unit.block;
      }
      double* const block_sums = mine + unit.block * per_block;
      const Channels<A> of = {static_cast<const A*>(args.scale) + channel, static_cast<const A*>(args.shift) + channel,
                              grads.center == nullptr ? zeros : static_cast<const A*>(grads.center) + channel};
      const auto of_image = [&](const void* values) {
        return values == nullptr ? nullptr : static_cast<const A*>(values) + unit.image * plan.c;
      };
      const A *const a = of_image(grads.a), *const add = of_image(grads.b), *const a_c = of_image(grads.a_c);
      for (int64_t line = unit.first_line; line < unit.last_line; ++line) {
        const Line<const T> z(args.z, plan, unit.image, line, channel),
            theta(args.theta, plan, unit.image, line, channel);
        const Line<const T> grad(grads.grad, plan, unit.image, line);
        const Line<T> d_z(grads.d_z, plan, unit.image, line, channel);
        const Line<T> d_theta(grads.d_theta, plan, unit.image, line, channel);
        std::memset(line_sums, 0, static_cast<size_t>(2 * width) * sizeof(A));
        for (int64_t begin = 0; begin < plan.length; begin += plan.segment) {
          const int64_t end = smaller(begin + plan.segment, plan.length);
          make_waves<T, A>(b, z, theta, begin, end, plan.length, of.scale, of.shift, waves, kept, buffer);
          load_gradient<T, A>(b, grad, plan, unit.pair, begin, end, a, add, d);
          const A* at[kPhaseTaps];
          for (int t = 0; t < kPhaseTaps; ++t) at[t] = d + (2 * kReach - t) * b.width;
          taps_gradient(b, at, waves + kReach * 2 * b.width, end - begin, block_sums);
          convolve_transposed(b, at, taps, end - begin, d_waves, 2 * b.width);
          for (int64_t j = begin; j < end; ++j) {
            const A* const cosine = kept + (j - begin) * 2 * b.width;
            A *const d_real = buffer, *const d_imaginary = buffer + width;
            interleave(b, d_waves + (j - begin) * 2 * b.width, d_real, d_imaginary);
            wave_gradient(channels, of, fetch(z.pixel(j), channels, buffer + 2 * width),
                          fetch(theta.pixel(j), channels, buffer + 3 * width), cosine, cosine + b.width, d_real,
                          d_imaginary, line_sums, line_sums + width);
            store_row(d_real, d_z.pixel(j), 1, channels);
            store_row(d_imaginary, d_theta.pixel(j), 1, channels);
          }
          if (grads.d_c.data == nullptr) continue;
          const Line<T> d_c(grads.d_c, plan, unit.image, line, channel);
          for (int64_t j = begin; j < end; ++j) {
            const A* const __restrict g = fetch(grad.pixel(j) + channel, channels, buffer);
            A* const __restrict row = buffer + width;
            WAVEMIX_SIMD
            for (int64_t i = 0; i < channels; ++i) row[i] = g[i] * a_c[channel + i] + add[channel + i];
            store_row(row, d_c.pixel(j), 1, channels);
          }
        }
        add_to(block_sums + 2 * kPhaseTaps * width, line_sums, channels);
        add_to(block_sums + (2 * kPhaseTaps + 1) * width, line_sums + width, channels);
      }
    }
  }
  for (int64_t t = 1; t < threads; ++t)
    for (int64_t i = 0; i < per_thread; ++i) totals[i] += totals[t * per_thread + i];
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t pair = block * kPairs;
    const Pairs<A> b(smaller(kPairs, plan.pairs - pair));
    const double* const sums = totals + block * per_block;
    gather_taps(b, sums, plan.pairs, pair, static_cast<A*>(grads.d_taps));
    for (int64_t i = 0; i < 2 * b.count; ++i) {
      static_cast<A*>(grads.sum_pre)[2 * pair + i] = static_cast<A>(sums[2 * kPhaseTaps * width + i]);
      static_cast<A*>(grads.sum_pre_theta)[2 * pair + i] = static_cast<A>(sums[(2 * kPhaseTaps + 1) * width + i]);
    }
  }
}

// --- The weighted sum of the branches --------------------------------------------------------------------------------

template <class T, bool with_gradient>
static void branch_sum(const BranchArgs& args, const Plane& grad, const Plane& out, void* d_a, int threads) {
  using A = typename Arithmetic<T>::type;
  const int64_t of_a = args.n * args.c, groups = (args.h + kLines - 1) / kLines, units = args.n * groups;
  if (args.n * args.c * args.h * args.w > 0)
    advise<4>(out.data, out.stride, {args.n, args.c, args.h, args.w}, static_cast<int64_t>(sizeof(T)));
  if (of_a * args.h * args.w < kSerialElements) threads = 1;
  const int64_t padded = round_up(args.c, 16);
  const Scratch partial(1 + (with_gradient ? units * 3 * padded * static_cast<int64_t>(sizeof(double)) : 0));
  WAVEMIX_PARALLEL(threads) {
    const Scratch scratch(padded * static_cast<int64_t>(8 * sizeof(A)));
    A* const buffers = reinterpret_cast<A*>(scratch.block);
    A* const row_sums = buffers + 5 * padded;
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t image = unit / groups, first = unit % groups * kLines;
      const A* const a0 = static_cast<const A*>(args.a) + image * args.c;
      const A *const a1 = a0 + of_a, *const a2 = a1 + of_a;
      double* const totals = reinterpret_cast<double*>(partial.block) + unit * 3 * padded;
      if (with_gradient) std::memset(totals, 0, static_cast<size_t>(3 * padded) * sizeof(double));
      for (int64_t y = first; y < smaller(first + kLines, args.h); ++y) {
        for (int64_t i = 0; i < 3 * padded; ++i) row_sums[i] = A(0);
        for (int64_t x = 0; x < args.w; ++x) {
          const auto at = [&](const Plane& p) {
            return static_cast<T*>(p.data) + image * p.stride[0] + y * p.stride[2] + x * p.stride[3];
          };
          const A* const __restrict b0 = fetch(static_cast<const T*>(at(args.branch[0])), args.c, buffers);
          const A* const __restrict b1 = fetch(static_cast<const T*>(at(args.branch[1])), args.c, buffers + padded);
          const A* const __restrict b2 = fetch(static_cast<const T*>(at(args.branch[2])), args.c, buffers + 2 * padded);
          A* const __restrict m = buffers + 3 * padded;
          WAVEMIX_SIMD
          for (int64_t i = 0; i < args.c; ++i) m[i] = b0[i] * a0[i] + b1[i] * a1[i] + b2[i] * a2[i];
          store_row(m, at(out), 1, args.c);
          if (!with_gradient) continue;
          const A* const __restrict g = fetch(static_cast<const T*>(at(grad)), args.c, buffers + 4 * padded);
          A* const __restrict sums = row_sums;
          WAVEMIX_SIMD
          for (int64_t i = 0; i < args.c; ++i) {
            sums[i] += g[i] * b0[i];
            sums[padded + i] += g[i] * b1[i];
            sums[2 * padded + i] += g[i] * b2[i];
          }
        }
        if (with_gradient) add_to(totals, row_sums, 3 * padded);
      }
    }
  }
  if (!with_gradient) return;
  for (int64_t image = 0; image < args.n; ++image)
    for (int64_t k = 0; k < 3; ++k)
      for (int64_t i = 0; i < args.c; ++i) {
        const double* const sums =
            reinterpret_cast<const double*>(partial.block) + (image * groups * 3 + k) * padded + i;
        double sum = 0.0;
        for (int64_t group = 0; group < groups; ++group) sum += sums[group * 3 * padded];
        static_cast<A*>(d_a)[k * of_a + image * args.c + i] = static_cast<A>(sum);
      }
}

}  // namespace

void phase_forward(const PhaseArgs& args, const Plane& out, const Plane& also, void* sums, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, out, also, sums, threads); });
}
void phase_backward(const PhaseArgs& args, const PhaseGradArgs& grads, int threads) {
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}
void branch_sum(const BranchArgs& args, const Plane& out, int threads) {
  dispatch(args.dtype, [&](auto element) { branch_sum<decltype(element), false>(args, {}, out, nullptr, threads); });
}
void branch_sum_backward(const BranchArgs& args, const Plane& grad, const Plane& out, void* d_a, int threads) {
  dispatch(args.dtype, [&](auto element) { branch_sum<decltype(element), true>(args, grad, out, d_a, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
