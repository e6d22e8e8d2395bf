// One translation unit of kernels is compiled once per instruction set (CMakeLists.txt gives the flags and
// WAVEMIX_ISA); this header names the variants and picks one at run time. No -march=native: a wheel built
// here runs on any CPU of the family.
//
// The per-ISA units must not instantiate shared templates or inline functions (std::vector and the like): the
// linker would keep one copy for all, perhaps the one with instructions this CPU lacks.
#pragma once

#include "wavemix/haar.h"

namespace wavemix {

struct CpuKernels {
  void (*haar_analysis)(const HaarArgs& args, int threads);
  void (*haar_synthesis)(const HaarArgs& args, int threads);
};

#define WAVEMIX_DECLARE_ISA(isa)   \
  namespace isa {                  \
  extern const CpuKernels kernels; \
  }
WAVEMIX_DECLARE_ISA(baseline)
WAVEMIX_DECLARE_ISA(avx2)
WAVEMIX_DECLARE_ISA(avx512)
#undef WAVEMIX_DECLARE_ISA

// The best variant this CPU runs, unless the variable WAVEMIX_KERNELS_CPU_ISA names a lower one.
const CpuKernels& cpu_kernels();
const char* cpu_isa_name();

// Asks for huge pages behind a large output that is about to be written for the first time: page faults
// cost as much as the copy itself (7 against 30 GB/s seen). Advice only; where it is refused nothing changes.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace wavemix
