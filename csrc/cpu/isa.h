// CPU kernels are compiled once per instruction set (CMakeLists.txt gives the flags and WAVEMIX_ISA); the best variant
// of a build is picked at run time. No -march=native: what is built here runs on any CPU that has the set.
//
// The per-ISA units must not instantiate shared templates or inline functions (std::vector and the like): the
// linker would keep one copy for all, perhaps the one with instructions this CPU lacks.
#pragma once

#include <vector>

#include "wavemix/conv1x1.h"
#include "wavemix/deconv.h"
#include "wavemix/dwt.h"
#include "wavemix/haar.h"
#include "wavemix/haar_blocks.h"
#include "wavemix/mlp.h"
#include "wavemix/norm.h"
#include "wavemix/patm.h"
#include "wavemix/patm_whole.h"
#include "wavemix/reduce_haar.h"

namespace wavemix {

// One instruction set's kernels.
struct CpuKernels {
#define KERNEL(name, parameters, arguments) void(*name) parameters;
#include "cpu/kernels.def"
};

#if defined(WAVEMIX_ISA)
namespace WAVEMIX_ISA {
#define KERNEL(name, parameters, arguments) void name parameters;
#include "cpu/kernels.def"
}  // namespace WAVEMIX_ISA
#endif

// The best variant of this build that this CPU runs, unless the variable WAVEMIX_KERNELS_CPU_ISA names a lower one.
// Throws std::runtime_error where there is none, as every kernel then does.
const char* cpu_isa_name();

// Whether products of bf16 may go by AMX: its tiles are there, the system lets this process use them, and the variant
// is "amx". All other kernels of that one are avx512's.
bool cpu_matrix_units();

// Best first: what this build has, and what this CPU could run.
std::vector<const char*> cpu_isas_built();
std::vector<const char*> cpu_isas_here();

// Asks for huge pages behind a large output that is about to be written for the first time: page faults cost more
// than the copy itself (docs/develop/tuning.md, Huge pages). Advice only; where it is refused nothing changes.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace wavemix
