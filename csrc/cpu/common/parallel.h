// Shared by all CPU kernels: OpenMP by macros (the code also compiles without it), scratch memory, and the advice
// on huge pages for outputs. Included by the per-ISA units only.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "cpu/isa.h"

#if defined(_OPENMP)
#include <omp.h>
#define WAVEMIX_PRAGMA(text) _Pragma(#text)
#define WAVEMIX_PARALLEL(threads) WAVEMIX_PRAGMA(omp parallel num_threads(threads))
#define WAVEMIX_FOR WAVEMIX_PRAGMA(omp for schedule(static))
#define WAVEMIX_SIMD WAVEMIX_PRAGMA(omp simd)
#define WAVEMIX_SIMD_SUM(...) WAVEMIX_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define WAVEMIX_THREAD omp_get_thread_num()
#else
#define WAVEMIX_PARALLEL(threads)
#define WAVEMIX_FOR
#define WAVEMIX_SIMD
#define WAVEMIX_SIMD_SUM(...)
#define WAVEMIX_THREAD 0
#endif

namespace wavemix {
namespace WAVEMIX_ISA {

// Fewer elements than this finish before a second thread has woken up.
constexpr int64_t kSerialElements = 1 << 15;

struct Scratch {
  char* block;
  explicit Scratch(int64_t bytes) : block(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    if (block == nullptr) std::abort();  // kilobytes; an exception may not leave a parallel region
  }
  ~Scratch() { std::free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// The span of a dense-enough output that is worth huge pages; a sparse view is left alone.
template <int rank>
static inline void advise(void* data, const int64_t (&stride)[rank], const int64_t (&extent)[rank], int64_t element) {
  int64_t span = 1, count = 1;
  for (int i = 0; i < rank; ++i) {
    if (stride[i] < 0) return;
    span += (extent[i] - 1) * stride[i];
    count *= extent[i];
  }
  if (span <= 2 * count) advise_huge_pages(data, span * element);
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
