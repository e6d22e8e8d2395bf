// phase_aggregate: BatchNorm's affine map, ReLU, sine and cosine, both 7-tap convolutions and the spatial sums, from
// one read of the five images. Both branches are one launch.
//
// The convolution is in scatter form: a wave adds to the seven outputs it reaches, which move up a place in the very
// same instruction, d[k] = w * u + d[k + 1]. So 14 registers a pair of channels slide along instead of the 28 of seven
// waves, no moves in between. Half types are limited by instructions (some 30 of an element's 60 make its sine and
// cosine), fp32 by memory: two pairs a thread leave room for three blocks, and loads two or three pixels ahead hide
// the latency.
#include "cuda/patm/phase.cuh"

namespace wavemix::phase::forward {

constexpr int kMinBlocks = 3;
// Pixels that loads are ahead of their use, as registers allow.
template <class T>
constexpr int kPixelsAhead = sizeof(T) == 2 ? 3 : 8 / static_cast<int>(sizeof(T));
// Whether the summed image is as far ahead: loaded as a pixel's wave is made, and used kReach waves later, when its
// output is complete. Else, for want of registers, it is loaded as that last wave is made.
template <class T>
constexpr bool kAlsoAhead = kPixelsAhead<T> == kReach;

struct Branch {
  Walk z, theta, out;
  const void *scale, *shift, *taps;
};

struct Params {
  Dealt dealt;
  Branch branch[kBranches];
  Walk also;  // summed by the first branch
  void* partial;
};

template <class A, int P>
using Outputs = A[2][P];  // one pixel's: from cosines, from sines

template <class A, int P>
struct Maps {  // the thread's channels
  A scale[2 * P], shift[2 * P];
  Taps<A, P> taps;
};

// One line of a segment: written are [begin, begin + segment), as far as the line goes.
template <class T, int P, bool wide, int b>
__device__ inline void walk_line(const Params& p, const Maps<Arithmetic<T>, P>& map, Outputs<Arithmetic<T>, P>& sums,
                                 int64_t image, uint32_t line, int begin, int pair) {
  using A = Arithmetic<T>;
  constexpr int N = 2 * P;
  const Dealt& d = p.dealt;
  const Branch& branch = p.branch[b];
  const int length = d.length[b];
  const int end = begin + d.segment[b] < length ? begin + d.segment[b] : length;
  const int first = begin > kReach ? begin - kReach : 0, last = end + kReach < length ? end + kReach : length;
  const T* z = at<const T>(branch.z, image, line, first, 2 * pair);
  const T* theta = at<const T>(branch.theta, image, line, first, 2 * pair);
  T* out = at<T>(branch.out, image, line, begin, pair);
  const T* also = b == 0 && p.also.data != nullptr ? at<const T>(p.also, image, line, begin, pair) : nullptr;

  struct Also {
    Packet<T, P, wide> half[2];
  };
  Also next_also[kAlsoAhead<T> ? kReach : 1];
  const auto load_also = [&](int slot) {
    if (also == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) next_also[slot].half[half].load(also + half * d.pairs);
    also += p.also.step;
  };
  const auto emit = [&](const Outputs<A, P>& values, int slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      put<wide, T, P>(out + half * d.pairs, values[half]);
#pragma unroll
      for (int i = 0; i < P; ++i) sums[half][i] += values[half][i];
    }
    out += branch.out.step;
    if (also == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      A x[P];
      next_also[slot].half[half].unpack(x);
#pragma unroll
      for (int i = 0; i < P; ++i) sums[half][i] += x[i];
    }
  };

  constexpr int kAheadOfUse = kPixelsAhead<T>;
  Packet<T, N, wide> next_z[kAheadOfUse], next_theta[kAheadOfUse];
  const auto load_wave = [&](int slot) {
    next_z[slot].load(z);
    next_theta[slot].load(theta);
    z += branch.z.step;
    theta += branch.theta.step;
  };
#pragma unroll
  for (int slot = 0; slot < kAheadOfUse; ++slot)
    if (first + slot < last) load_wave(slot);
  Outputs<A, P> window[kPhaseTaps] = {};  // positions - 3 .. + 3 around the wave
  const auto step = [&](int position, int slot) {
    A amplitude[N], phase[N], sine[N], cosine[N];
    next_z[slot].unpack(amplitude);
    next_theta[slot].unpack(phase);
    if (position + kAheadOfUse < last) load_wave(slot);
    const bool complete = position - kReach >= begin;
    if (!kAlsoAhead<T> && complete) load_also(0);
#pragma unroll
    for (int k = 0; k < N; ++k) phase[k] = relu(phase[k] * map.scale[k] + map.shift[k]);
    sine_cosine<T>(phase, sine, cosine);
#pragma unroll
    for (int i = 0; i < P; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const A(&part)[N] = half == 0 ? cosine : sine;
        const A even = amplitude[2 * i] * part[2 * i], odd = amplitude[2 * i + 1] * part[2 * i + 1];
#pragma unroll
        for (int k = 0; k < kPhaseTaps; ++k) {
          const int tap = kPhaseTaps - 1 - k;
          const A above = k + 1 < kPhaseTaps ? window[k + 1][half][i] : A(0);
          window[k][half][i] = above + even * map.taps[half][i][0][tap] + odd * map.taps[half][i][1][tap];
        }
      }
    }
    if (complete) emit(window[0], kAlsoAhead<T> ? slot : 0);
    if (kAlsoAhead<T> && position >= begin && position < end) load_also(slot);
  };
#pragma unroll 1
  for (int position = first; position < last; position += kAheadOfUse) {
#pragma unroll
    for (int slot = 0; slot < kAheadOfUse; ++slot)
      if (position + slot < last) step(position + slot, slot);
  }
  // No further wave reaches these outputs. The first one's slot comes to the front.
  if (kAlsoAhead<T> && end == last)
    for (int turn = (last - first) % kReach; turn > 0; --turn) rotate(next_also);
#pragma unroll
  for (int k = 1; k <= kReach; ++k) {
    const int position = last - 1 - kReach + k;
    if (position < begin || position >= end) continue;
    if (!kAlsoAhead<T>) load_also(0);
    emit(window[k], kAlsoAhead<T> ? k - 1 : 0);
  }
}

// All lines of a thread. The branch is known to the compiler, so that strides and lengths are operands in constant
// memory instead of registers.
template <class T, int P, bool wide, int b>
__device__ inline void walk_lines(const Params& p, const Place& place, int pair, Outputs<Arithmetic<T>, P>& sums) {
  const Dealt& d = p.dealt;
  const Branch& branch = p.branch[b];
  Maps<Arithmetic<T>, P> map;
  load_vector(branch.scale, 2 * pair, map.scale);
  load_vector(branch.shift, 2 * pair, map.shift);
  load_taps<Arithmetic<T>, P>(branch.taps, d.pairs, pair, map.taps);
#pragma unroll 1
  for (uint32_t task = d.first_task(place); task < d.tasks[b]; task += d.tasks_of_turn(b)) {
    uint32_t segment = task;
    const uint32_t line = d.lines[b].take(segment);
    walk_line<T, P, wide, b>(p, map, sums, d.first_image + place.image, line, static_cast<int>(segment) * d.segment[b],
                             pair);
  }
}

template <class T, int P, bool wide>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kMinBlocks)
    phase_forward(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  constexpr int N = 2 * P;
  WAVEMIX_SHARED(A, tile, kThreads * N);  // [row][half][pair]
  const Dealt& d = p.dealt;
  const Place place = d.place();
  const int b = place.branch, pair = place.pair + place.x * P;
  Outputs<A, P> sums = {};
  if (place.y < d.rows && pair < d.pairs) {
    if (b == 0) {
      walk_lines<T, P, wide, 0>(p, place, pair, sums);
    } else {
      walk_lines<T, P, wide, 1>(p, place, pair, sums);
    }
  }
  const int width = d.pairs_of_block;  // pairs in one half
  if (place.y < d.rows) {
#pragma unroll
    for (int i = 0; i < N; ++i) tile[(place.y * 2 + i / P) * width + place.x * P + i % P] = sums[i / P][i % P];
  }
  __syncthreads();
  const int64_t row = place.part + (b == 0 ? 0 : d.parts[0]), image = d.first_image + place.image;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += kThreads) {
    A sum = tile[i];
    for (int y = 1; y < d.rows; ++y) sum += tile[y * 2 * width + i];
    const int half = i < width ? 0 : 1, g = place.pair + i - half * width;
    if (g < d.pairs) static_cast<A*>(p.partial)[((row * d.n + image) * 2 + half) * d.pairs + g] = sum;
  }
}

// --- Sums of partial sums --------------------------------------------------------------------------------

constexpr int kColumns = 8;  // a sector of memory; below each other the threads share the rows
constexpr int kRowsAtATime = kThreads / kColumns;

struct SumParams {
  Rows rows[kBranches];
  uint32_t blocks[kBranches];
};

template <class A>
__global__ void __launch_bounds__(kThreads) phase_sum_rows(const __grid_constant__ SumParams p) {
  WAVEMIX_SHARED(A, tile, kThreads);
  const int b = blockIdx.x < p.blocks[0] ? 0 : 1;
  const Rows& of = p.rows[b];
  const int x = static_cast<int>(threadIdx.x) % kColumns, y = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = int64_t{blockIdx.x - (b == 0 ? 0u : p.blocks[0])} * kColumns + x;
  A sum = A(0);
  if (column < of.width) {
    const A* const source = static_cast<const A*>(of.workspace) + column;
#pragma unroll 8
    for (int64_t row = y; row < of.rows; row += kRowsAtATime) sum += __ldg(source + row * of.width);
  }
  tile[threadIdx.x] = sum;
  __syncthreads();
  if (y > 0 || column >= of.width) return;
  for (int i = 1; i < kRowsAtATime; ++i) sum += tile[i * kColumns + x];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int64_t first = piece == 0 ? 0 : of.end[piece == 0 ? 0 : piece - 1];
    if (column >= first && column < of.end[piece]) static_cast<A*>(of.piece[piece])[column - first] = sum;
  }
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int P, bool wide>
void launch(const PhaseArgs (&branches)[kBranches], const Plane (&out)[kBranches], const Plane& also, void* sums,
            void* workspace, int multiprocessors, void* stream) {
  const PhaseArgs& args = branches[0];
  const Plan plan(args, P, multiprocessors, true);
  Params p = {};
  p.dealt = dealt(plan, args, P);
  for (int b = 0; b < kBranches; ++b) {
    const PhaseArgs& of = branches[b];
    p.branch[b] = {walk(of.z, b == 1), walk(of.theta, b == 1), walk(out[b], b == 1), of.scale, of.shift, of.taps};
  }
  p.also = walk(also, false);
  p.partial = workspace;
  Launch launch = prepared("phase_forward", args.dtype, wide, stream);
  const int64_t per_image = plan.chunks * plan.parts_of_image();
  const int64_t images = std::max<int64_t>(WAVEMIX_MAX_BLOCKS / per_image, 1);
  for (int64_t first = 0; first < args.n; first += images) {
    p.dealt.first_image = first;
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - first) * per_image);
    launch(phase_forward<T, P, wide>, p);
  }
  const int64_t width = args.n * args.c;
  sum_rows(args.dtype, {{workspace, plan.parts_of_image(), width, {sums}, {width, width, width}}, {}}, stream);
}

}  // namespace wavemix::phase::forward

namespace wavemix::phase {

void sum_rows(DType dtype, const Rows (&rows)[kBranches], void* stream) {
  using namespace forward;
  SumParams p = {};
  for (int b = 0; b < kBranches; ++b) {
    p.rows[b] = rows[b];
    p.blocks[b] = static_cast<uint32_t>(ceil_div(rows[b].width, kColumns));
  }
  if (p.blocks[0] + p.blocks[1] == 0) return;
  Launch launch;
  launch.what = [=] { return std::string("phase_sum_rows (") + name_of(dtype) + ")"; };
  launch.blocks = p.blocks[0] + p.blocks[1];
  launch.threads = kThreads;
  launch.stream = static_cast<cudaStream_t>(stream);
  if (dtype == DType::f64) {
    launch(phase_sum_rows<double>, p);
  } else {
    launch(phase_sum_rows<float>, p);
  }
}

}  // namespace wavemix::phase

namespace wavemix {

int64_t phase_workspace_cuda(int64_t n, int64_t c, int64_t h, int64_t w, int multiprocessors, bool backward) {
  PhaseArgs args;
  args.n = n;
  args.c = c;
  args.h = h;
  args.w = w;
  phase::check_args(args);
  if (phase::is_empty(args)) return 0;
  if (backward) {
    const phase::Plan plan(args, 1, multiprocessors, false);
    return plan.images * plan.parts_of_image() * phase::kSums * c;
  }
  // A call's form depends on its addresses, too.
  const auto parts = [&](int pairs) { return phase::Plan(args, pairs, multiprocessors, true).parts_of_image(); };
  return std::max(parts(1), parts(2)) * n * c;
}

void phase_forward_cuda(const PhaseArgs (&branches)[2], const Plane (&out)[2], const Plane& also, void* sums,
                        void* workspace, int multiprocessors, void* stream) {
  using namespace phase;
  using namespace phase::forward;
  const PhaseArgs& args = branches[0];
  check_args(args);
  if (is_empty(args)) {  // sums over nothing
    const int64_t width = args.n * args.c;
    return sum_rows(args.dtype, {{nullptr, 0, width, {sums}, {width, width, width}}, {}}, stream);
  }
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int P = sizeof(T) == 8 ? 1 : 2;
    bool wide = args.c % (2 * P) == 0 && words_fit<T>(also, args, P);
    for (int b = 0; b < kBranches; ++b)
      wide = wide && words_fit<T>(branches[b].z, args, 2 * P) && words_fit<T>(branches[b].theta, args, 2 * P) &&
             words_fit<T>(out[b], args, P);
    if (wide) {
      launch<T, P, true>(branches, out, also, sums, workspace, multiprocessors, stream);
    } else {
      launch<T, 1, false>(branches, out, also, sums, workspace, multiprocessors, stream);
    }
  });
}

}  // namespace wavemix
