// The gradients of phase_aggregate: of amplitudes, phases, taps, affine maps and PATM's third branch, from one read of
// grad, z and theta; both branches are one launch. With d the gradient of an output and u a wave,
//     d_u[j] = sum over taps t of w[t] d[j + 3 - t],    d_w[t] = sum over j of u[j] d[j + 3 - t]:
// both want the same seven d around a wave, so d slides through registers and every wave is made exactly once, beyond
// no end of a segment. A pair of channels takes 28 taps, 28 sums for their gradients and 14 of d: one pair a thread,
// which leaves room for enough warps to hide latency. Lanes still read whole sectors of neighbouring channels.
//
// The sums (taps, affine maps) stay in registers over all lines and images of a thread, then go through shared memory
// to one row of the workspace per block.
#include "cuda/patm/phase.cuh"

namespace wavemix::phase::backward {

constexpr int P = 1;      // pairs per thread
constexpr int N = 2 * P;  // its channels
// Steps that the loads of gradients and waves are ahead of their use; waves are six steps behind gradients, so this
// divides 6, and a place of both rings is a register that the compiler knows. fp64 has no registers for more than one.
template <class T>
constexpr int kStepsAhead = sizeof(T) == 2 ? 3 : 8 / static_cast<int>(sizeof(T));
// Steps after which the window moves, once for all of them. Unrolled, fp32's would spill.
template <class T>
constexpr int kStepsOfTurn = sizeof(T) == 2 ? 3 : 1;

struct Branch {
  Walk z, theta, grad, d_z, d_theta;
  const void *scale, *shift, *taps, *a, *b, *center;
  void* partial;
};

struct Params {
  Dealt dealt;
  Branch branch[kBranches];
  Walk d_c;  // written by the first branch
  const void* a_c;
};

// A thread's part of a branch's gradient; sums[half][channel of the pair][tap] in `taps`.
template <class A>
struct Sums {
  A pre[N] = {}, pre_theta[N] = {};
  Taps<A, P> taps = {};
};

template <class A>
struct Maps {  // the thread's channels
  A scale[N], shift[N], center[N];
};

// The gradient of an output is grad * a + b, and of the third branch grad * a_c + b; both by [half].
template <class A>
struct Weights {
  A a[2], b[2], a_c[2];
};

template <class T, bool wide, int b>
__device__ inline void walk_line(const Params& p, const Maps<Arithmetic<T>>& map, const Weights<Arithmetic<T>>& weight,
                                 const Taps<Arithmetic<T>, P>& taps, Sums<Arithmetic<T>>& sums, int64_t image,
                                 uint32_t line, int begin, int pair) {
  using A = Arithmetic<T>;
  const Dealt& d = p.dealt;
  const Branch& branch = p.branch[b];
  const int length = d.length[b];
  const int end = begin + d.segment[b] < length ? begin + d.segment[b] : length;
  const int first = begin - kReach;
  const T* z = at<const T>(branch.z, image, line, begin, 2 * pair);
  const T* theta = at<const T>(branch.theta, image, line, begin, 2 * pair);
  const T* grad = at<const T>(branch.grad, image, line, first > 0 ? first : 0, pair);
  T* d_z = at<T>(branch.d_z, image, line, begin, 2 * pair);
  T* d_theta = at<T>(branch.d_theta, image, line, begin, 2 * pair);
  T* d_c = b == 0 && p.d_c.data != nullptr ? at<T>(p.d_c, image, line, begin, pair) : nullptr;

  constexpr int kAheadOfUse = kStepsAhead<T>;
  Packet<T, P, wide> next_grad[2][kAheadOfUse];
  Packet<T, N, wide> next_z[kAheadOfUse], next_theta[kAheadOfUse];
  const auto load_gradient = [&](int position, int slot) {
    if (position < 0 || position >= length) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) next_grad[half][slot].load(grad + half * d.pairs);
    grad += branch.grad.step;
  };
  const auto load_wave = [&](int slot) {
    next_z[slot].load(z);
    next_theta[slot].load(theta);
    z += branch.z.step;
    theta += branch.theta.step;
  };
#pragma unroll
  for (int slot = 0; slot < kAheadOfUse; ++slot) {
    load_gradient(first + slot, slot);
    if (begin + slot < end) load_wave(slot);
  }
  constexpr int kSteps = kStepsOfTurn<T>;
  static_assert(kSteps == 1 || kSteps == kAheadOfUse, "a step's slot is a constant");
  static_assert(2 * kReach % kAheadOfUse == 0, "the same for gradients and waves");
  A window[2][kPhaseTaps - 1 + kSteps];  // gradients at positions - 3 .. + 3 around the wave, and behind them the next
  const auto take_gradient = [&](int front, int slot, int place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) window[half][place] = A(0);
    if ((place >= 2 * kReach || front >= 0) && front < length) {  // behind the first six, none is before the image
      A g[2][P];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        next_grad[half][slot].unpack(g[half]);
        window[half][place] = g[half][0] * weight.a[half] + weight.b[half];
      }
      if (d_c != nullptr && (place >= 2 * kReach || front >= begin) && front < end) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const A value[P] = {g[half][0] * weight.a_c[half] + weight.b[half]};
          put<wide, T, P>(d_c + half * d.pairs, value);
        }
        d_c += p.d_c.step;
      }
    }
  };
  const auto take_wave = [&](int position, int slot, int place) {
    A amplitude[N], theta_here[N], pre[N], phase[N], sine[N], cosine[N];
    next_z[slot].unpack(amplitude);
    next_theta[slot].unpack(theta_here);
    if (position + kAheadOfUse < end) {
      load_gradient(position + kReach + kAheadOfUse, slot);
      load_wave(slot);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pre[k] = theta_here[k] * map.scale[k] + map.shift[k];
      phase[k] = relu(pre[k]);
    }
    sine_cosine<T>(phase, sine, cosine);
    A of_z[N], of_theta[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A wave[2] = {amplitude[k] * cosine[k], amplitude[k] * sine[k]};
      A d_wave[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < kPhaseTaps; ++t) {
          const A gradient = window[half][place + kPhaseTaps - 1 - t];
          d_wave[half] += taps[half][0][k][t] * gradient;
          sums.taps[half][0][k][t] += wave[half] * gradient;
        }
      }
      of_z[k] = d_wave[0] * cosine[k] + d_wave[1] * sine[k];
      const A turn = amplitude[k] * (d_wave[1] * cosine[k] - d_wave[0] * sine[k]);
      const A d_pre = pre[k] <= A(0) ? A(0) : turn;
      sums.pre[k] += d_pre;
      sums.pre_theta[k] += d_pre * (theta_here[k] - map.center[k]);
      of_theta[k] = d_pre * map.scale[k];
    }
    put<wide, T, N>(d_z, of_z);
    put<wide, T, N>(d_theta, of_theta);
    d_z += branch.d_z.step;
    d_theta += branch.d_theta.step;
  };
#pragma unroll
  for (int k = 0; k < 2 * kReach; ++k) {
    take_gradient(first + k, k % kAheadOfUse, k);
    if (first + k + kAheadOfUse < end + kReach) load_gradient(first + k + kAheadOfUse, k % kAheadOfUse);
  }
#pragma unroll 1
  for (int position = begin; position < end; position += kSteps) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (position + k >= end) return;  // with no values of the window to keep
      take_gradient(position + k + kReach, k % kAheadOfUse, 2 * kReach + k);
      take_wave(position + k, k % kAheadOfUse, k);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 2 * kReach; ++k) window[half][k] = window[half][k + kSteps];
      if constexpr (kSteps < kAheadOfUse) rotate(next_grad[half]);
    }
    if constexpr (kSteps < kAheadOfUse) {
      rotate(next_z);
      rotate(next_theta);
    }
  }
}

// All lines of a thread. The branch is known to the compiler, so that strides and lengths are operands in constant
// memory instead of registers.
template <class T, bool wide, int b>
__device__ inline void walk_lines(const Params& p, const Place& place, int pair, Sums<Arithmetic<T>>& sums) {
  using A = Arithmetic<T>;
  const Dealt& d = p.dealt;
  const Branch& branch = p.branch[b];
  Maps<A> map;
  Taps<A, P> taps;
  load_vector(branch.scale, 2 * pair, map.scale);
  load_vector(branch.shift, 2 * pair, map.shift);
#pragma unroll
  for (A& center : map.center) center = A(0);
  if (branch.center != nullptr) load_vector(branch.center, 2 * pair, map.center);
  load_taps<A, P>(branch.taps, d.pairs, pair, taps);
#pragma unroll 1
  for (int64_t image = place.image; image < d.n; image += d.images) {
    Weights<A> weight;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t channel = (image * 2 + half) * d.pairs + pair;
      weight.a[half] = branch.a != nullptr ? __ldg(static_cast<const A*>(branch.a) + channel) : A(1);
      weight.b[half] = branch.b != nullptr ? __ldg(static_cast<const A*>(branch.b) + channel) : A(0);
      weight.a_c[half] = b == 0 && p.d_c.data != nullptr ? __ldg(static_cast<const A*>(p.a_c) + channel) : A(0);
    }
#pragma unroll 1
    for (uint32_t task = d.first_task(place); task < d.tasks[b]; task += d.tasks_of_turn(b)) {
      uint32_t segment = task;
      const uint32_t line = d.lines[b].take(segment);
      walk_line<T, wide, b>(p, map, weight, taps, sums, image, line, static_cast<int>(segment) * d.segment[b], pair);
    }
  }
}

// Place of a sum of thread (x, y) in a block's row; the rows of a block lie below each other.
// [sum][pair of the block], a sum being one of kSums of one of two: channels of the pair, or halves of the outputs.
template <class A>
__device__ inline void stage(SharedSpan<A> tile, const Sums<A>& sums, int lanes, int x, int y) {
  const SharedSpan<A> row = tile + y * 2 * kSums * lanes + x;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    row[k * lanes] = sums.pre[k];
    row[(2 + k) * lanes] = sums.pre_theta[k];
#pragma unroll
    for (int i = 0; i < 2 * kPhaseTaps; ++i)
      row[(4 + k * 2 * kPhaseTaps + i) * lanes] = sums.taps[k][0][i / kPhaseTaps][i % kPhaseTaps];
  }
}

// A sum's place among those of the branch: sum_pre (c), sum_pre_theta (c), d_taps (c, 2, 7).
__device__ inline int64_t place_of_sum(int sum, int64_t pair, int64_t pairs) {
  if (sum < 4) return (sum / 2) * 2 * pairs + 2 * pair + sum % 2;
  const int of_half = sum - 4, half = of_half / (2 * kPhaseTaps);
  return 4 * pairs + (half * pairs + pair) * 2 * kPhaseTaps + of_half % (2 * kPhaseTaps);
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3) phase_backward(const __grid_constant__ Params p) {
  using A = Arithmetic<T>;
  WAVEMIX_SHARED(A, tile, kThreads * 2 * kSums);
  const Dealt& d = p.dealt;
  const Place place = d.place();
  const int b = place.branch, pair = place.pair + place.x;
  Sums<A> sums;
  if (place.y < d.rows && pair < d.pairs) {
    if (b == 0) {
      walk_lines<T, wide, 0>(p, place, pair, sums);
    } else {
      walk_lines<T, wide, 1>(p, place, pair, sums);
    }
  }
  const int lanes = d.lanes_of_block;
  if (place.y < d.rows) stage(tile, sums, lanes, place.x, place.y);
  __syncthreads();
  const int64_t pairs = d.pairs, row = int64_t{place.image} * d.parts[b] + place.part;
  A* const out = static_cast<A*>(p.branch[b].partial) + row * 2 * pairs * kSums;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kSums * lanes; i += kThreads) {
    A sum = tile[i];
    for (int y = 1; y < d.rows; ++y) sum += tile[y * 2 * kSums * lanes + i];
    const int which = i / lanes, of_pair = place.pair + i - which * lanes;
    if (of_pair < d.pairs) out[place_of_sum(which, of_pair, pairs)] = sum;
  }
}

// --- Contribution of batch statistics --------------------------------------------------------------------

struct StatisticsBranch {
  Walk theta, d_theta;
  const void* scale;
  PhaseStatistics of;
};
struct StatisticsParams {
  Dealt dealt;
  StatisticsBranch branch[kBranches];
  double of_a_pixel;  // 1 / pixels of the batch
};

constexpr int kAhead = 4;  // pixels on their way at a time: 8 words a thread keep the memory busy

template <class T, int pairs_of_thread, bool wide>
__global__ void __launch_bounds__(kThreads) phase_statistics(const __grid_constant__ StatisticsParams p) {
  using A = Arithmetic<T>;
  constexpr int V = 2 * pairs_of_thread;
  const Dealt& d = p.dealt;
  const Place place = d.place();
  const int b = place.branch, pair = place.pair + place.x * pairs_of_thread;
  if (place.y >= d.rows || pair >= d.pairs) return;
  const StatisticsBranch& branch = p.branch[b];
  A rise[V], offset[V];  // d_theta += theta * rise + offset
  {
    A scale[V], mean[V], invstd[V];
    load_vector(branch.scale, 2 * pair, scale);
    load_vector(branch.of.mean, 2 * pair, mean);
    load_vector(branch.of.invstd, 2 * pair, invstd);
    load_vector(branch.of.sum_pre_theta, 2 * pair, rise);
    load_vector(branch.of.sum_pre, 2 * pair, offset);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A factor = -scale[k] * static_cast<A>(p.of_a_pixel);
      rise[k] *= factor * (invstd[k] * invstd[k]);
      offset[k] = offset[k] * factor - rise[k] * mean[k];
    }
  }
#pragma unroll 1
  for (int64_t image = place.image; image < d.n; image += d.images) {
#pragma unroll 1
    for (uint32_t task = d.first_task(place); task < d.tasks[b]; task += d.tasks_of_turn(b)) {
      uint32_t segment = task;
      const uint32_t line = d.lines[b].take(segment);
      const int begin = static_cast<int>(segment) * d.segment[b];
      const int end = begin + d.segment[b] < d.length[b] ? begin + d.segment[b] : d.length[b];
      const T* theta = at<const T>(branch.theta, image, line, begin, 2 * pair);
      T* d_theta = at<T>(branch.d_theta, image, line, begin, 2 * pair);
#pragma unroll 1
      for (int position = begin; position < end; position += kAhead) {
        Packet<T, V, wide> x[kAhead], g[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (position + i >= end) break;
          x[i].load(theta + i * branch.theta.step);
          g[i].load_own(d_theta + i * branch.d_theta.step);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (position + i >= end) break;
          A of_x[V], of_g[V];
          x[i].unpack(of_x);
          g[i].unpack(of_g);
#pragma unroll
          for (int k = 0; k < V; ++k) of_g[k] += of_x[k] * rise[k] + offset[k];
          put<wide, T, V>(d_theta + i * branch.d_theta.step, of_g);
        }
        theta += kAhead * branch.theta.step;
        d_theta += kAhead * branch.d_theta.step;
      }
    }
  }
}

// --- Launches --------------------------------------------------------------------------------------------

inline Rows rows_of_gradients(const PhaseArgs& args, const PhaseGradArgs& grads, const void* workspace, int64_t rows) {
  const int64_t c = args.c;
  return {workspace, rows, kSums * c, {grads.sum_pre, grads.sum_pre_theta, grads.d_taps}, {c, 2 * c, kSums * c}};
}

template <class T, bool wide>
void launch_backward(const PhaseArgs (&branches)[kBranches], const PhaseGradArgs (&grads)[kBranches], void* workspace,
                     int multiprocessors, void* stream) {
  const PhaseArgs& args = branches[0];
  const Plan plan(args, P, multiprocessors, false);
  Params p = {};
  p.dealt = dealt(plan, args, P);
  Rows rows[kBranches] = {};
  Arithmetic<T>* partial = static_cast<Arithmetic<T>*>(workspace);
  for (int b = 0; b < kBranches; ++b) {
    const PhaseArgs& of = branches[b];
    const PhaseGradArgs& g = grads[b];
    p.branch[b] = {walk(of.z, b == 1),
                   walk(of.theta, b == 1),
                   walk(g.grad, b == 1),
                   walk(g.d_z, b == 1),
                   walk(g.d_theta, b == 1),
                   of.scale,
                   of.shift,
                   of.taps,
                   g.a,
                   g.b,
                   g.center,
                   partial};
    rows[b] = rows_of_gradients(args, g, partial, plan.images * plan.parts[b]);
    partial += rows[b].rows * rows[b].width;
  }
  p.d_c = walk(grads[0].d_c, false);
  p.a_c = grads[0].a_c;
  Launch launch = prepared("phase_backward", args.dtype, wide, stream);
  launch.blocks = static_cast<unsigned>(plan.images * plan.parts_of_image() * plan.chunks);
  launch(phase_backward<T, wide>, p);
  sum_rows(args.dtype, rows, stream);
}

template <class T, int pairs_of_thread, bool wide>
void launch_statistics(const PhaseArgs (&branches)[kBranches], const Plane (&d_theta)[kBranches],
                       const PhaseStatistics (&of)[kBranches], int multiprocessors, void* stream) {
  const PhaseArgs& args = branches[0];
  const Plan plan(args, pairs_of_thread, multiprocessors, false);
  StatisticsParams p = {};
  p.dealt = dealt(plan, args, pairs_of_thread);
  for (int b = 0; b < kBranches; ++b)
    p.branch[b] = {walk(branches[b].theta, b == 1), walk(d_theta[b], b == 1), branches[b].scale, of[b]};
  p.of_a_pixel = 1.0 / (static_cast<double>(args.n) * static_cast<double>(args.h) * static_cast<double>(args.w));
  Launch launch = prepared("phase_statistics", args.dtype, wide, stream);
  launch.blocks = static_cast<unsigned>(plan.images * plan.parts_of_image() * plan.chunks);
  launch(phase_statistics<T, pairs_of_thread, wide>, p);
}

}  // namespace wavemix::phase::backward

namespace wavemix {

void phase_backward_cuda(const PhaseArgs (&branches)[2], const PhaseGradArgs (&grads)[2], void* workspace,
                         int multiprocessors, void* stream) {
  using namespace phase;
  using namespace phase::backward;
  const PhaseArgs& args = branches[0];
  check_args(args);
  if (is_empty(args)) {  // sums over nothing
    return sum_rows(args.dtype,
                    {rows_of_gradients(args, grads[0], nullptr, 0), rows_of_gradients(args, grads[1], nullptr, 0)},
                    stream);
  }
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool wide = words_fit<T>(grads[0].d_c, args, P);
    for (int b = 0; b < kBranches; ++b)
      wide = wide && words_fit<T>(branches[b].z, args, N) && words_fit<T>(branches[b].theta, args, N) &&
             words_fit<T>(grads[b].grad, args, P) && words_fit<T>(grads[b].d_z, args, N) &&
             words_fit<T>(grads[b].d_theta, args, N);
    if (wide) {
      launch_backward<T, true>(branches, grads, workspace, multiprocessors, stream);
    } else {
      launch_backward<T, false>(branches, grads, workspace, multiprocessors, stream);
    }
  });
}

void phase_statistics_cuda(const PhaseArgs (&branches)[2], const Plane (&d_theta)[2], const PhaseStatistics (&of)[2],
                           int multiprocessors, void* stream) {
  using namespace phase;
  using namespace phase::backward;
  const PhaseArgs& args = branches[0];
  check_args(args);
  if (is_empty(args)) return;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kVectorBytes / static_cast<int>(sizeof(T));
    bool wide = args.c % V == 0;
    for (int b = 0; b < kBranches; ++b)
      wide = wide && words_fit<T>(branches[b].theta, args, V) && words_fit<T>(d_theta[b], args, V);
    if (wide) {
      launch_statistics<T, V / 2, true>(branches, d_theta, of, multiprocessors, stream);
    } else {
      launch_statistics<T, 1, false>(branches, d_theta, of, multiprocessors, stream);
    }
  });
}

}  // namespace wavemix
