#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if WAVEMIX_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wavemix {

#if WAVEMIX_HAS_avx512
namespace avx512 {
extern const CpuKernels kernels;
}
#endif
#if WAVEMIX_HAS_avx2
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
#if WAVEMIX_HAS_baseline
namespace baseline {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Variant {
  const char* name;
  bool supported;             // by this CPU
  const CpuKernels* kernels;  // null where this build lacks them
};

#if WAVEMIX_HAS_avx512
constexpr const CpuKernels* kAvx512 = &avx512::kernels;
#else
constexpr const CpuKernels* kAvx512 = nullptr;
#endif
#if WAVEMIX_HAS_avx2
constexpr const CpuKernels* kAvx2 = &avx2::kernels;
#else
constexpr const CpuKernels* kAvx2 = nullptr;
#endif
#if WAVEMIX_HAS_baseline
constexpr const CpuKernels* kBaseline = &baseline::kernels;
#else
constexpr const CpuKernels* kBaseline = nullptr;
#endif

// AMX's tiles for bf16, and conversions to it by vectors, for a process that the system has given the tiles' state.
bool has_amx() {
#if WAVEMIX_HAS_AMX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d & (1u << 22)) != 0 && (d & (1u << 24)) != 0;
  if (!tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & (1u << 5)) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Every instruction set that kernels can be built for, best first.
std::vector<Variant> variants() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  const bool avx512 = false, avx2 = false;
#endif
#if WAVEMIX_HAS_AMX
  constexpr const CpuKernels* kAmx = kAvx512;
#else
  constexpr const CpuKernels* kAmx = nullptr;
#endif
  return {{"amx", avx512 && has_amx(), kAmx},
          {"avx512", avx512, kAvx512},
          {"avx2", avx2, kAvx2},
          {"baseline", true, kBaseline}};
}

const Variant& pick() {
  static const Variant chosen = [] {
    const char* asked = std::getenv("WAVEMIX_KERNELS_CPU_ISA");
    if (asked != nullptr && *asked == '\0') asked = nullptr;
    std::string runs;
    for (const Variant& v : variants()) {
      if (!v.supported || v.kernels == nullptr) continue;
      if (asked == nullptr || std::strcmp(asked, v.name) == 0) return v;
      runs += (runs.empty() ? "" : ", ") + std::string(v.name);
    }
    if (asked == nullptr) throw std::runtime_error("this build has no CPU kernels that this CPU runs");
    std::string built;
    for (const char* name : cpu_isas_built()) built += (built.empty() ? "" : ", ") + std::string(name);
    throw std::runtime_error(std::string("WAVEMIX_KERNELS_CPU_ISA=") + asked + ": this build has " + built +
                             ", of which this CPU runs " + runs +
                             "; WAVEMIX_KERNELS_CPU_ISAS=all builds every instruction set");
  }();
  return chosen;
}

}  // namespace

const char* cpu_isa_name() { return pick().name; }

bool cpu_matrix_units() {
  static const bool on = std::strcmp(pick().name, "amx") == 0;
  return on;
}

std::vector<const char*> cpu_isas_built() {
  std::vector<const char*> names;
  for (const Variant& v : variants())
    if (v.kernels != nullptr) names.push_back(v.name);
  return names;
}

std::vector<const char*> cpu_isas_here() {
  std::vector<const char*> names;
  for (const Variant& v : variants())
    if (v.supported) names.push_back(v.name);
  return names;
}

#define KERNEL(name, parameters, arguments) \
  void name##_cpu parameters { pick().kernels->name arguments; }
#include "cpu/kernels.def"

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Below a few huge pages the alignment losses eat the gain, and such blocks are recycled by malloc anyway.
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (data == nullptr || bytes < static_cast<int64_t>(2 * kHuge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace wavemix
