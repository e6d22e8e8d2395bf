// The compiled core's Python face: each family adds its functions.
#include "bindings/common.h"
#include "cpu/isa.h"

#if WAVEMIX_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

WAVEMIX_MODULE(WAVEMIX_MODULE_NAME,
               "Compiled kernels of wavemix_kernels; called with checked arguments by wavemix_kernels.ops.") {
  using namespace wavemix::bindings;
  m.attr("HAS_CPU", static_cast<bool>(WAVEMIX_WITH_CPU));
  m.attr("HAS_CUDA", static_cast<bool>(WAVEMIX_WITH_CUDA));
  m.attr("BUILD_NOTE", WAVEMIX_BUILD_NOTE);
  bind_haar(m);
  bind_reduce_haar(m);
  bind_patm(m);
  bind_patm_whole(m);
#if WAVEMIX_WITH_CPU
#ifdef _OPENMP
  m.attr("OPENMP", true);
#else
  m.attr("OPENMP", false);
#endif
  m.attr("CPU_ISAS", wavemix::cpu_isas_built());
  m.attr("CPU_ISAS_HERE", wavemix::cpu_isas_here());
  m.def("cpu_isa", &wavemix::cpu_isa_name, {});
  bind_conv1x1(m);
  bind_deconv(m);
  bind_dwt(m);
  bind_haar_blocks(m);
  bind_mlp(m);
  bind_norm(m);
#endif
#if WAVEMIX_WITH_CUDA
  m.attr("CUDA_VERSION", CUDART_VERSION);
  m.def("cuda_driver_version",
        [] {
          int version = 0;  // of the newest CUDA that the driver serves, as CUDA_VERSION; 0 without a driver
          return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
        },
        {});
  m.attr("CUDA_ARCHS", WAVEMIX_CUDA_ARCHS);
#endif
}
