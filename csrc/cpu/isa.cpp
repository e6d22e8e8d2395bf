#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wavemix {

namespace baseline {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

namespace {

struct Variant {
  const char* name;
  const CpuKernels& kernels;
  bool supported;
};

const Variant& pick() {
  static const Variant chosen = [] {
#if WAVEMIX_X86_VARIANTS
    __builtin_cpu_init();
    const Variant variants[] = {
        {"avx512", avx512::kernels,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
        {"avx2", avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {"baseline", baseline::kernels, true},
    };
#else
    const Variant variants[] = {{"baseline", baseline::kernels, true}};
#endif
    const char* asked = std::getenv("WAVEMIX_KERNELS_CPU_ISA");
    std::string names;
    for (const Variant& v : variants) {
      if (!v.supported) continue;
      if (asked == nullptr || *asked == '\0' || std::strcmp(asked, v.name) == 0) return v;
      names += names.empty() ? v.name : std::string(", ") + v.name;
    }
    throw std::runtime_error(std::string("WAVEMIX_KERNELS_CPU_ISA=") + asked + ": this CPU and build have " + names);
  }();
  return chosen;
}

}  // namespace

const char* cpu_isa_name() { return pick().name; }

#define KERNEL(name, parameters, arguments) \
  void name##_cpu parameters { pick().kernels.name arguments; }
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
