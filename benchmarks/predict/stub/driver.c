// A CUDA driver without a GPU, for Triton's own launcher: it answers what that asks, and runs nothing.
#include <cuda.h>

#define EXPORTED __attribute__((visibility("default")))
// The headers give some functions a newer name, which is the one that programs link to.
#define ALWAYS(name, ...) \
  EXPORTED CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

ALWAYS(cuCtxSetCurrent, CUcontext context)
ALWAYS(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)
ALWAYS(cuCtxSetLimit, CUlimit limit, size_t value)
ALWAYS(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
ALWAYS(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
ALWAYS(cuModuleUnload, CUmodule module)
ALWAYS(cuLaunchKernelEx, const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra)

EXPORTED CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "no error in a driver that runs nothing";
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
// What Triton asks for are limits: shared memory, threads of a block, multiprocessors.
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 1024;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values,
                                         CUdeviceptr pointer) {
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  *count = 1;
  return CUDA_SUCCESS;
}
