// A CUDA runtime without a GPU: launches are handed to a callback, and nothing runs. The .cu files are compiled by nvcc
// as for a card (-cudart none) and linked with this, so geometry, template arguments and parameters are the host
// code's.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

// name (mangled), blocks, threads, dynamic shared memory, addresses of the arguments
using Callback = void (*)(const char*, unsigned, unsigned, size_t, void**);
Callback callback = nullptr;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> table;
  return table;
}

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Where launches go; null: nowhere, they return at once.
EXPORTED void wavemix_predict_callback(Callback function) { callback = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}
// What a kernel's host function calls; ours are launched by cudaLaunchKernelExC alone.
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetLastError(void) { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no error in a runtime that runs nothing"; }
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (callback)
    callback(names().at(function).c_str(), volume(config->gridDim), volume(config->blockDim), config->dynamicSmemBytes,
             arguments);
  return cudaSuccess;
}

}  // extern "C"
