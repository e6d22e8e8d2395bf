// The part of the CUDA runtime that our host code asks for, without a GPU: launches are handed to a callback. The .cu
// files are compiled by nvcc as for a card (-cudart none) and linked with this, so geometry, template arguments and
// parameters are the host code's.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <map>
#include <string>

std::int64_t wavemix_most_tasks = std::numeric_limits<std::int32_t>::max();  // as csrc has them
std::int64_t wavemix_most_blocks = wavemix_most_tasks;

namespace {

// Mangled name, grid, threads of a block, bytes of dynamic shared memory, addresses of the arguments; returns an error
// message, or null.
using Callback = const char* (*)(const char* kernel, const unsigned* grid, unsigned threads, size_t shared,
                                 void** parameters);
Callback callback = nullptr;
std::string message = "no error";

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, void** parameters) {
  const auto found = names().find(function);
  if (callback == nullptr) return cudaSuccess;
  if (found == names().end()) {
    message = "no such kernel";
    return cudaErrorLaunchFailure;
  }
  const unsigned sizes[3] = {grid.x, grid.y, grid.z};
  const char* error = callback(found->second.c_str(), sizes, block.x * block.y * block.z, shared, parameters);
  message = error == nullptr ? "no error" : error;
  return error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Where launches go; null: nowhere, they return at once.
EXPORTED void wavemix_on_launch(Callback function) { callback = function; }
// The most blocks and tasks of a launch.
EXPORTED void wavemix_most(std::int64_t tasks, std::int64_t blocks) {
  wavemix_most_tasks = tasks;
  wavemix_most_blocks = blocks;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }  // nobody writes <<< >>>
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorLaunchFailure; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters, size_t shared,
                               cudaStream_t) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, shared, parameters);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** parameters) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, parameters);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }

}  // extern "C"
