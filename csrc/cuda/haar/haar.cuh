// Shared by analysis and synthesis: the parameters of a launch, the weights of one level, and the choice of layout
// and access width.
//
// Two families of kernels, each in forms of 16-, 8- and 4-byte accesses and a narrow one (single elements, any
// strides):
//   rows      a thread owns 2V neighbouring columns; lanes go along the row        (NCHW, and anything unusual)
//   channels  a thread owns V neighbouring channels; lanes go along the channels   (channels_last)
// V columns of level-1 coefficients come out of 2V columns of the image, so both sides move whole 16-byte words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/vector.cuh"
#include "wavemix/haar.h"

// Launches are cut so that no task number reaches this; the emulator's build lowers it to exercise the cutting.
#ifndef WAVEMIX_MAX_TASKS
#define WAVEMIX_MAX_TASKS ::wavemix::Divisor::kMaxDividend
#endif

namespace wavemix::haar {

constexpr unsigned kThreads = 128;
// Saying how many blocks must fit keeps ptxas from spilling a register or two to reach the next step of occupancy;
// three (170 registers a thread) leave room for the largest kernel.
constexpr unsigned kMinBlocks = 3;
constexpr int kWarp = 32;

// --- Parameters ------------------------------------------------------------------------------------------

struct Level {
  void* high;  // synthesis: null stands for zeros
  int64_t stride[5];
  // The last level has the transform's own LL. Other levels have null, or an image that analysis also writes and
  // synthesis adds; level 0 is the image, to which synthesis adds `add`.
  void* ll;
  int64_t ll_stride[4];
  int h, w;
};

struct Params {
  void* image;
  int64_t image_stride[4];
  Level level[kMaxHaarLevels + 1];
  int levels;
  int c;
  float edge;
  uint32_t tasks;  // one per thread, groups of lanes whole
  // A group of lanes covers one tile of the coarsest level; `group_shift` is log2 of its lanes.
  int group_shift;
  // A task's group is counted off along these extents, fastest first.
  Divisor inner, middle, outer;
};

// The LL of one level as the caller holds it: `add` at level 0, `ll` at the last.
template <class Args>
auto& ll_of(Args& args, int level) {
  return level == 0 ? args.add : level == args.levels ? args.ll : args.low[level - 1];
}

inline Params make_params(const HaarArgs& args) {
  Params p = {};
  p.image = args.image.data;
  std::copy_n(args.image.stride, 4, p.image_stride);
  p.levels = args.levels;
  p.c = static_cast<int>(args.c);
  p.edge = args.edge;
  int64_t h = args.h, w = args.w;
  for (int l = 0; l <= args.levels; ++l, h = half_up(h), w = half_up(w)) {
    Level& level = p.level[l];
    level.ll = ll_of(args, l).data;
    std::copy_n(ll_of(args, l).stride, 4, level.ll_stride);
    level.h = static_cast<int>(h);
    level.w = static_cast<int>(w);
    if (l == 0) continue;
    level.high = args.high[l - 1].data;
    std::copy_n(args.high[l - 1].stride, 5, level.stride);
  }
  return p;
}

// --- One level's weights ---------------------------------------------------------------------------------

// Along one axis a pair (first, second) has low = low * first + second, high = high * first - second.
// A virtual second sample counts as zero and its `edge` moves into the first one's weights. Synthesis uses the very
// same weights, so it is analysis' transpose by construction.
template <class A>
struct PairWeights {
  A low, high;
  __device__ PairWeights(bool second_exists, float edge, A scale)
      : low(second_exists ? scale : scale * (1 + static_cast<A>(edge))),
        high(second_exists ? scale : scale * (1 - static_cast<A>(edge))) {}
};

// --- Rows kernels: what a thread holds -------------------------------------------------------------------

template <int V>
constexpr int kColumnLevels = V == 8   ? 4
                              : V == 4 ? 3
                              : V == 2 ? 2
                                       : 1;  // log2 of a thread's 2V columns

// A thread's columns at `level`; on coarser levels it shares one with its neighbours.
__host__ __device__ constexpr int width(int V, int level) { return (2 * V >> level) > 1 ? 2 * V >> level : 1; }

// --- Host: layout, width, cutting ------------------------------------------------------------------------

enum class Layout { rows, channels };

struct Form {
  Layout layout;
  int bytes;  // of an access; an element's: the narrow form, whatever the strides
};

// An axis of one element is never stepped along: stride 0 restricts nothing, whatever it came with.
inline HaarArgs normalised(HaarArgs args) {
  auto settle = [](int64_t* stride, int64_t size) {
    if (size == 1) *stride = 0;
  };
  auto plane = [&](Plane& p, int64_t h, int64_t w) {
    settle(&p.stride[0], args.n);
    settle(&p.stride[1], args.c);
    settle(&p.stride[2], h);
    settle(&p.stride[3], w);
  };
  int64_t h = args.h, w = args.w;
  plane(args.image, h, w);
  for (int l = 0; l <= args.levels; ++l, h = half_up(h), w = half_up(w)) {
    plane(ll_of(args, l), h, w);
    if (l == 0) continue;
    int64_t* stride = args.high[l - 1].stride;
    settle(&stride[0], args.n);
    settle(&stride[1], args.c);
    settle(&stride[3], h);
    settle(&stride[4], w);
  }
  return args;
}

template <class... Strides>
bool word_aligned(const void* data, size_t element, int64_t per_word, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % (element * static_cast<size_t>(per_word)) == 0 &&
         ((strides % per_word == 0) && ...);
}

template <class T, int V>
bool rows_fit(const HaarArgs& args) {
  auto plane_fits = [](const Plane& p, int64_t per_word) {
    return !p.data || per_word == 1 ||
           (p.stride[3] == 1 && word_aligned(p.data, sizeof(T), per_word, p.stride[0], p.stride[1], p.stride[2]));
  };
  if (args.w % (2 * V) != 0 || !plane_fits(args.image, V) || !plane_fits(args.add, V)) return false;
  for (int l = 1; l <= args.levels; ++l) {
    const int64_t per_word = std::max<int64_t>((2 * V) >> l, 1);
    if (!plane_fits(ll_of(args, l), per_word)) return false;
    const Bands& high = args.high[l - 1];
    const int64_t* s = high.stride;
    if (high.data && per_word > 1 &&
        !(s[4] == 1 && word_aligned(high.data, sizeof(T), per_word, s[0], s[1], s[2], s[3])))
      return false;
  }
  return true;
}

template <class T, int V>
bool channels_fit(const HaarArgs& args) {
  auto plane_fits = [](const Plane& p) {
    return !p.data || (p.stride[1] == 1 && word_aligned(p.data, sizeof(T), V, p.stride[0], p.stride[2], p.stride[3]));
  };
  if (args.c % V != 0 || !plane_fits(args.image)) return false;
  for (int l = 0; l <= args.levels; ++l)
    if (!plane_fits(ll_of(args, l))) return false;
  return std::all_of(args.high, args.high + args.levels, [](const Bands& high) {
    const int64_t* s = high.stride;
    return !high.data || (s[1] == 3 && s[2] == 1 && word_aligned(high.data, sizeof(T), V, s[0], s[3], s[4]));
  });
}

// Elements of an access: the most that sizes, strides and addresses allow. Accesses of 4 bytes at least: below, a form
// of its own saves nothing.
template <class T, int V, class Run>
void with_vector(const HaarArgs& args, Layout layout, const Run& run) {
  if constexpr (V > 1) {
    if (layout == Layout::rows ? rows_fit<T, V>(args) : channels_fit<T, V>(args)) {
      run(std::integral_constant<int, V>{});
    } else {
      constexpr int kNext = V / 2 * sizeof(T) >= 4 ? V / 2 : 1;
      with_vector<T, kNext>(args, layout, run);
    }
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

template <class A>
A* advance(A* data, int64_t elements, DType dtype) {
  constexpr int64_t kSize[] = {8, 4, 2, 2};
  return data ? static_cast<A*>(static_cast<char*>(data) + elements * kSize[static_cast<int>(dtype)]) : nullptr;
}

// The part of a transform from `begin` on along axis 0..3 (n, c, h, w), `count` long. Along h and w `begin` must be
// a multiple of 2^levels: the parts then share no coefficient.
inline HaarArgs part(HaarArgs args, int axis, int64_t begin, int64_t count) {
  (axis == 0 ? args.n : axis == 1 ? args.c : axis == 2 ? args.h : args.w) = count;
  auto plane = [&](Plane& p, int level) {
    p.data = advance(p.data, (axis < 2 ? begin : begin >> level) * p.stride[axis], args.dtype);
  };
  plane(args.image, 0);
  for (int l = 0; l <= args.levels; ++l) plane(ll_of(args, l), l);
  for (int l = 1; l <= args.levels; ++l) {
    Bands& high = args.high[l - 1];
    const int64_t steps = axis < 2 ? begin : begin >> l;
    high.data = advance(high.data, steps * high.stride[axis < 2 ? axis : axis + 1], args.dtype);
  }
  return args;
}

// Calls launch(part) on parts whose task numbers and coordinates fit 32 bits. `tasks` counts in double: a product
// of extents may pass 2^63, and only its magnitude matters.
template <class Tasks, class LaunchPart>
void for_each_part(const HaarArgs& args, const Tasks& tasks, const LaunchPart& launch) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;
  constexpr int64_t kUnit = 32;  // whole tiles at every level, whole words along channels and columns
  const int64_t extent[4] = {args.n, args.c, args.h, args.w};
  const int64_t longest = *std::max_element(extent, extent + 4);
  if (longest <= kMaxExtent && tasks(args) <= static_cast<double>(WAVEMIX_MAX_TASKS)) return launch(args);
  int axis = 0;
  int64_t most = 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t units = i == 0 ? extent[i] : extent[i] / kUnit;
    // The batch first: its parts are the furthest apart. A single axis too long for a coordinate must go at once.
    if (units > 1 && (most == 0 || (i > 0 && extent[i] > kMaxExtent))) {
      axis = i;
      most = units;
    }
  }
  if (most == 0) return launch(args);  // a single unit is always small enough
  const int64_t begin = most / 2 * (axis == 0 ? 1 : kUnit);
  for_each_part(part(args, axis, 0, begin), tasks, launch);
  for_each_part(part(args, axis, begin, extent[axis] - begin), tasks, launch);
}

inline int ceil_log2(int64_t value) {
  int bits = 0;
  while ((int64_t{1} << bits) < value) ++bits;
  return bits;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Counts a launch's tasks: `group` lanes per tile, tiles along inner, middle, outer extents, then the rest.
struct Grid {
  int group_shift;
  int64_t inner, middle, outer, rest;

  double tasks() const {
    return static_cast<double>(inner) * static_cast<double>(middle) * static_cast<double>(outer) *
           static_cast<double>(rest) * static_cast<double>(1 << group_shift);
  }
  void fill(Params& p) const {
    p.group_shift = group_shift;
    p.inner = Divisor(static_cast<uint32_t>(inner));
    p.middle = Divisor(static_cast<uint32_t>(middle));
    p.outer = Divisor(static_cast<uint32_t>(outer));
    p.tasks = static_cast<uint32_t>((inner * middle * outer * rest) << group_shift);
  }
};

inline Launch make_launch(const char* direction, const HaarArgs& args, const Form& form, uint32_t tasks, void* stream) {
  Launch launch;
  launch.what = [direction, form, dtype = args.dtype, levels = args.levels] {
    return std::string("haar_") + direction + (form.layout == Layout::rows ? "_rows (" : "_channels (") +
           std::to_string(form.bytes) + " bytes, " + name_of(dtype) + ", " + std::to_string(levels) + " levels)";
  };
  launch.blocks = (tasks + kThreads - 1) / kThreads;
  launch.threads = kThreads;
  launch.stream = static_cast<cudaStream_t>(stream);
  return launch;
}

// Runs `run(zero, elements per access, form)` with the C++ type of args.dtype and the kernels' form for these strides.
template <class Run>
void with_form(const HaarArgs& args, const Run& run) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    // Lanes follow the image's unit stride; with none, the rows kernels take it element by element.
    const bool last = args.image.stride[3] != 1 && args.image.stride[1] == 1;
    const Layout layout = last ? Layout::channels : Layout::rows;
    with_vector<T, kVectorBytes / static_cast<int>(sizeof(T))>(args, layout, [&](auto per_access) {
      run(zero, per_access, Form{layout, per_access * static_cast<int>(sizeof(T))});
    });
  };
  switch (args.dtype) {
    case DType::f64:
      return typed(double{});
    case DType::f32:
      return typed(float{});
    case DType::f16:
      return typed(__half{});
    case DType::bf16:
      return typed(__nv_bfloat16{});
  }
  throw std::invalid_argument("dtype: unknown code " + std::to_string(static_cast<int>(args.dtype)) +
                              "; 0 to 3 (float64, float32, float16, bfloat16) would work");
}

inline void check_args(const HaarArgs& args) {
  if (args.levels < 1 || args.levels > kMaxHaarLevels)
    throw std::invalid_argument("levels: got " + std::to_string(args.levels) + "; one launch takes 1 to " +
                                std::to_string(kMaxHaarLevels));
}

inline bool is_empty(const HaarArgs& args) { return args.n == 0 || args.c == 0 || args.h == 0 || args.w == 0; }

}  // namespace wavemix::haar
