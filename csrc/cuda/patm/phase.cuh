// Shared by the kernels of phase_aggregate: the dealing out of images to threads, loads made ahead, waves, and sums of
// partial sums.
//
// A thread owns some pairs of channels and walks along the convolved axis, with everything it convolves in registers:
// each value is read once, and nobody waits for anybody. Lanes lie along the channels, neighbours in memory; the other
// lines of a block come below. Where an image alone would not fill the chip its lines are cut into segments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/patm/sincos.cuh"
#include "wavemix/patm.h"

// Launches are cut so that no block number reaches this; the emulator's build lowers it to exercise the cutting.
#ifndef WAVEMIX_MAX_BLOCKS
#define WAVEMIX_MAX_BLOCKS ::wavemix::Divisor::kMaxDividend
#endif

namespace wavemix::phase {

constexpr int kThreads = 128;
constexpr int kReach = kPhaseTaps / 2;
constexpr int kBranches = 2;  // along W, then along H
// Blocks of a multiprocessor: fewer leave it idle; more than the upper number make partial sums and nothing else.
constexpr int64_t kFewBlocks = 2, kManyBlocks = 16;
// Six waves beyond a segment's ends are made a second time: a quarter of this many.
constexpr int64_t kShortestSegment = 24;

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// --- Dealing out -----------------------------------------------------------------------------------------

// A block has `lanes` threads along the channels and `rows` lines at a time, of the tasks (lines of each segment) of
// one branch of one image; `parts` blocks share them.
struct Plan {
  int64_t lanes = 1, rows = 1, chunks = 1;
  int64_t segment[kBranches] = {}, lines[kBranches] = {}, tasks[kBranches] = {}, parts[kBranches] = {};
  int64_t images = 0;  // side by side; the same blocks go on to the next ones

  int64_t parts_of_image() const { return parts[0] + parts[1]; }

  // `per_image`: sums belong to an image, so that no block may go on to another.
  Plan(const PhaseArgs& args, int pairs_of_thread, int multiprocessors, bool per_image) {
    const int64_t few = kFewBlocks * multiprocessors;
    const int64_t many = std::min<int64_t>(kManyBlocks * multiprocessors, WAVEMIX_MAX_BLOCKS);
    const int64_t groups = ceil_div(args.c / 2, pairs_of_thread);
    const int64_t length[kBranches] = {args.w, args.h};
    for (int b = 0; b < kBranches; ++b) {
      lines[b] = length[1 - b];
      segment[b] = length[b];
      tasks[b] = lines[b];
    }
    choose_lanes(groups);
    const int64_t blocks = args.n * chunks * parts_of_image();
    if (blocks < few) {
      for (int b = 0; b < kBranches; ++b) {
        const int64_t most = std::max<int64_t>(length[b] / kShortestSegment, 1);
        segment[b] = ceil_div(length[b], std::min(ceil_div(few, blocks), most));
        tasks[b] = lines[b] * ceil_div(length[b], segment[b]);
      }
      choose_lanes(groups);
    }
    images = args.n;
    const int64_t most = std::max<int64_t>(many / (kBranches * chunks * (per_image ? args.n : 1)), 1);
    for (int64_t& count : parts) count = evenly(count, most);
    if (!per_image) images = evenly(args.n, std::max<int64_t>(many / (chunks * parts_of_image()), 1));
  }

 private:
  // At most `most` shares of `count`, the fewest that take no more turns.
  static int64_t evenly(int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, std::min(count, most))); }

  // The fewest blocks, and of those the longest runs in memory.
  void choose_lanes(int64_t groups) {
    int64_t fewest = INT64_MAX;
    for (int64_t candidate = std::min<int64_t>(groups, 32); candidate > 0; --candidate) {
      const int64_t below = kThreads / candidate, across = ceil_div(groups, candidate);
      const int64_t down[kBranches] = {ceil_div(tasks[0], below), ceil_div(tasks[1], below)};
      if (across * (down[0] + down[1]) >= fewest) continue;
      fewest = across * (down[0] + down[1]);
      lanes = candidate;
      rows = below;
      chunks = across;
      std::copy_n(down, kBranches, parts);
    }
  }
};

// A thread's place.
struct Place {
  int branch, part, x, y;
  int pair;  // the block's first thread's
  uint32_t image;
};

// A Plan as a kernel reads it.
struct Dealt {
  int pairs, rows;
  int64_t n, first_image;  // this launch begins here
  uint32_t images;         // side by side
  int parts[kBranches], segment[kBranches], length[kBranches];
  uint32_t tasks[kBranches];
  Divisor lanes, lines[kBranches];
  // A block is counted off along these extents, fastest first.
  Divisor chunks, parts_of_image;
  int lanes_of_block, pairs_of_block;

  __device__ Place place() const {
    Place place;
    uint32_t block = blockIdx.x;
    place.pair = static_cast<int>(chunks.take(block)) * pairs_of_block;
    place.part = static_cast<int>(parts_of_image.take(block));
    place.image = block;
    place.branch = place.part >= parts[0] ? 1 : 0;
    if (place.branch == 1) place.part -= parts[0];
    uint32_t rest = threadIdx.x;
    place.x = static_cast<int>(lanes.take(rest));
    place.y = static_cast<int>(rest);
    return place;
  }
  // A thread's tasks of an image; a task's segment and line are task / lines and task % lines.
  __device__ uint32_t first_task(const Place& place) const {
    return static_cast<uint32_t>(place.part * rows + place.y);
  }
  __device__ uint32_t tasks_of_turn(int b) const { return static_cast<uint32_t>(parts[b] * rows); }
};

inline Dealt dealt(const Plan& plan, const PhaseArgs& args, int pairs_of_thread) {
  Dealt d = {};
  d.pairs = static_cast<int>(args.c / 2);
  d.rows = static_cast<int>(plan.rows);
  d.n = args.n;
  d.images = static_cast<uint32_t>(std::min<int64_t>(plan.images, UINT32_MAX));
  const int64_t length[kBranches] = {args.w, args.h};
  for (int b = 0; b < kBranches; ++b) {
    d.parts[b] = static_cast<int>(plan.parts[b]);
    d.segment[b] = static_cast<int>(plan.segment[b]);
    d.length[b] = static_cast<int>(length[b]);
    d.tasks[b] = static_cast<uint32_t>(plan.tasks[b]);
    d.lines[b] = Divisor(static_cast<uint32_t>(plan.lines[b]));
  }
  d.lanes_of_block = static_cast<int>(plan.lanes);
  d.pairs_of_block = d.lanes_of_block * pairs_of_thread;
  d.lanes = Divisor(static_cast<uint32_t>(plan.lanes));
  d.chunks = Divisor(static_cast<uint32_t>(plan.chunks));
  d.parts_of_image = Divisor(static_cast<uint32_t>(plan.parts_of_image()));
  return d;
}

// An image seen along a branch.
struct Walk {
  void* data;
  int64_t image, line, step;
};
inline Walk walk(const Plane& plane, bool along_h) {
  return {plane.data, plane.stride[0], plane.stride[along_h ? 3 : 2], plane.stride[along_h ? 2 : 3]};
}
template <class T>
__device__ inline T* at(const Walk& walk, int64_t image, int64_t line, int64_t position, int channel) {
  return static_cast<T*>(walk.data) + image * walk.image + line * walk.line + position * walk.step + channel;
}

// --- Loads made ahead ------------------------------------------------------------------------------------

// N neighbouring elements, as memory has them: waiting, they occupy no more registers than that.
template <class T, int N, bool wide>
struct Packet {
  using V = Vector<T, wide ? N : 1>;
  static constexpr int kWords = N / V::kPerWord;
  typename V::Word word[kWords];

  __device__ void load(const T* source) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = __ldg(reinterpret_cast<const typename V::Word*>(source) + w);
  }
  // For memory that this kernel also writes.
  __device__ void load_own(const T* source) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = reinterpret_cast<const typename V::Word*>(source)[w];
  }
  __device__ void unpack(Arithmetic<T> (&x)[N]) const {
    T elements[N];
    memcpy(static_cast<void*>(elements), word, sizeof(word));
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = widen(elements[k]);
  }
};

template <class Slot, int slots>
__device__ inline void rotate(Slot (&ring)[slots]) {
  const Slot first = ring[0];
#pragma unroll
  for (int k = 0; k + 1 < slots; ++k) ring[k] = ring[k + 1];
  ring[slots - 1] = first;
}

template <bool wide, class T, int N>
__device__ inline void put(T* target, const Arithmetic<T> (&x)[N]) {
  if constexpr (wide) {
    store<T, N>(target, x);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Arithmetic<T> one[1] = {x[k]};
      store<T, 1>(target + k, one);
    }
  }
}

// --- Waves -----------------------------------------------------------------------------------------------

// A NaN stays NaN, as in torch.
template <class A>
__device__ inline A relu(A value) {
  return value < A(0) ? A(0) : value;
}

// Taps of P pairs of channels, for both of a pair's outputs: [cos, sin][pair][channel of the pair][tap].
template <class A, int P>
using Taps = A[2][P][2][kPhaseTaps];

template <class A, int P>
__device__ inline void load_taps(const void* taps, int pairs, int pair, Taps<A, P>& out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const A* const source = static_cast<const A*>(taps) + (half * pairs + pair) * int64_t{2 * kPhaseTaps};
#pragma unroll
    for (int i = 0; i < P * 2 * kPhaseTaps; ++i)
      out[half][i / (2 * kPhaseTaps)][i / kPhaseTaps % 2][i % kPhaseTaps] = __ldg(source + i);
  }
}

template <class A, int N>
__device__ inline void load_vector(const void* values, int64_t first, A (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = __ldg(static_cast<const A*>(values) + first + k);
}

// --- Sums of partial sums --------------------------------------------------------------------------------

// Backward has these sums per channel, in this order: d_pre, d_pre * (theta - center), the taps' gradients.
constexpr int kSums = 2 + 2 * kPhaseTaps;

// Rows of a workspace, one after the other, into up to three vectors that follow each other in a row.
constexpr int kPieces = 3;
struct Rows {
  const void* workspace;
  int64_t rows, width;
  void* piece[kPieces];
  int64_t end[kPieces];
};
// Adds up `rows` of both branches, in an order that depends on shapes alone.
void sum_rows(DType dtype, const Rows (&rows)[kBranches], void* stream);

// --- Host: layout ----------------------------------------------------------------------------------------

// Whether each pixel's channels can be read (by V) or written in words.
template <class T>
bool words_fit(const Plane& p, const PhaseArgs& args, int64_t per_word) {
  const auto whole = [&](int64_t stride, int64_t size) { return size == 1 || stride % per_word == 0; };
  return p.data == nullptr || (reinterpret_cast<uintptr_t>(p.data) % (sizeof(T) * static_cast<size_t>(per_word)) == 0 &&
                               whole(p.stride[0], args.n) && whole(p.stride[2], args.h) && whole(p.stride[3], args.w));
}

inline void check_args(const PhaseArgs& args) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;
  const int64_t longest = std::max({args.c, args.h, args.w});
  if (longest > kMaxExtent)
    throw std::invalid_argument("z: an axis has " + std::to_string(longest) + " elements; up to " +
                                std::to_string(kMaxExtent) + " would work");
  if (args.h * args.w > kMaxExtent)
    throw std::invalid_argument("z: an image has " + std::to_string(args.h) + " x " + std::to_string(args.w) +
                                " pixels; up to " + std::to_string(kMaxExtent) + " would work");
  if (args.c % 2 != 0)
    throw std::invalid_argument("z: got " + std::to_string(args.c) + " channels; an even number would work");
}

inline bool is_empty(const PhaseArgs& args) { return args.n == 0 || args.c == 0 || args.h == 0 || args.w == 0; }

inline Launch prepared(const char* what, DType dtype, bool wide, void* stream) {
  Launch launch;
  launch.what = [=] { return std::string(what) + (wide ? " (wide, " : " (narrow, ") + name_of(dtype) + ")"; };
  launch.threads = kThreads;
  launch.stream = static_cast<cudaStream_t>(stream);
  return launch;
}

// Calls run(zero) with a zero of the C++ type.
template <class Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f64:
      return run(double{});
    case DType::f32:
      return run(float{});
    case DType::f16:
      return run(__half{});
    case DType::bf16:
      return run(__nv_bfloat16{});
  }
  throw std::invalid_argument("dtype: unknown code " + std::to_string(static_cast<int>(dtype)) +
                              "; 0 to 3 (float64, float32, float16, bfloat16) would work");
}

}  // namespace wavemix::phase
