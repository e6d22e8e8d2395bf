// Haar analysis and synthesis: the one signature every compiled backend implements.
#pragma once

#include "wavemix/types.h"

namespace wavemix {

// A 16x16 tile holds four levels, a 32x32 tile five; deeper transforms chain in Python.
constexpr int kMaxHaarLevels = 5;

struct Bands {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};  // n, c, band (LH, HL, HH), h, w
};

// One transform between `image` (n, c, h, w) and its pyramid. Level l = 1..levels has
// h_l = ceil(h_{l-1} / 2) rows (h_0 = h), likewise columns; high[l-1] holds level l, ll the last level.
//
// Odd sizes at any level: analysis reads the missing sample as `edge` times the last one
// (0: zero padding, 1: replication, -1: antisymmetric). Synthesis is analysis' exact transpose: the
// virtual sample's value times `edge` is added to the last one; edge = 0 simply crops, which is
// also the inverse transform. edge = 0 means "nothing", not a product: NaN and infinity stay where they are.
struct HaarArgs {
  DType dtype = DType::f32;
  int levels = 1;
  int64_t n = 0, c = 0, h = 0, w = 0;
  float edge = 0.0f;
  Plane image;  // analysis reads it, synthesis writes it
  Plane add;    // synthesis only, optional (null data): image = synthesis + add
  Plane ll;
  Bands high[kMaxHaarLevels];  // synthesis only: null data stands for a level of zeros
  // The LL of the levels above the last, optional (null data): low[l-1] for level l < levels. Analysis also writes
  // LL_l there; synthesis adds it to LL_l. With it one pass serves a Waveblock, which reads every level's LL.
  Plane low[kMaxHaarLevels];
};

inline int64_t half_up(int64_t size) { return size / 2 + size % 2; }

// f64 computes in double, everything else in float; each output is rounded once.
void haar_analysis_cpu(const HaarArgs& args, int threads);
void haar_synthesis_cpu(const HaarArgs& args, int threads);

// Launched on `stream` of the current device; throws std::runtime_error with CUDA's own words on a failed launch.
void haar_analysis_cuda(const HaarArgs& args, void* stream);
void haar_synthesis_cuda(const HaarArgs& args, void* stream);

}  // namespace wavemix
