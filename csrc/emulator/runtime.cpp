// The CUDA runtime, as far as launchers use it.
#include <cuda_runtime_api.h>

#include <utility>

namespace {
constexpr int kDevices = 2;  // two, so that a forgotten device guard shows
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t record(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}
}  // namespace

cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return record(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t CUDARTAPI cudaPeekAtLastError() { return last_error; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unrecognized error code";
  }
}
