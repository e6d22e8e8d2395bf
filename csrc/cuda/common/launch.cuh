// Launching kernels: the one door to the CUDA runtime. Under nvcc it is the runtime, under a host compiler
// the emulator of csrc/emulator, which runs the same kernel sources thread by thread.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulator/emulator.h"
#endif

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>

namespace wavemix {

// `action` says what was tried: a callable, since it is wanted only after a failure.
template <class Action>
void check(cudaError_t status, const Action& action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the failure is reported here; do not leave it for the next caller to trip over
  throw std::runtime_error(action() + " failed: " + cudaGetErrorString(status));
}

// On the current device, which the caller has chosen.
struct Launch {
  std::function<std::string()> what;  // names the kernel in errors
  unsigned blocks = 0;
  unsigned threads = 0;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;

  template <class Parameters>
  void operator()(void (*kernel)(Parameters), const Parameters& parameters) const {
#if defined(__CUDACC__)
    start(reinterpret_cast<const void*>(kernel), const_cast<Parameters*>(&parameters));
#else
    emulator::launch(what(), dim3(blocks), dim3(threads), shared_bytes, [&] { kernel(parameters); });
#endif
  }

#if defined(__CUDACC__)
 private:
  // Apart from the kernel's type, so that it is compiled once.
  void start(const void* kernel, void* parameters) const {
    constexpr size_t kDefaultSharedLimit = 48 * 1024;
    if (shared_bytes > kDefaultSharedLimit) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            [&] { return "asking " + std::to_string(shared_bytes) + " bytes of shared memory for " + what(); });
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelExC(&config, kernel, &parameters), [&] {
      return "launch of " + what() + " (" + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
             " threads)";
    });
  }
#endif
};

}  // namespace wavemix
