// Shared memory under one spelling: plain __shared__ arrays and pointers under nvcc, checked ones in the emulator.
//
//   WAVEMIX_SHARED(float, tile, 256);          tile[i], &tile[i], tile + i
//   WAVEMIX_DYNAMIC_SHARED(float, tile);       sized by Launch::shared_bytes; one per kernel
//   SharedSpan<float> part = tile + 16;        what a function takes
//   shared_cast<uint4>(part)[0]                one wide access
#pragma once

#include "cuda/common/launch.cuh"

#if defined(__CUDACC__)

// 16-byte alignment lets any array be read by whole words, ldmatrix and cp.async.
#define WAVEMIX_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define WAVEMIX_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char wavemix_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(wavemix_dynamic_)

namespace wavemix {
template <class T>
using SharedSpan = T*;
template <class U, class T>
__device__ inline U* shared_cast(T* span) {
  return reinterpret_cast<U*>(span);
}
}  // namespace wavemix

#else

#define WAVEMIX_SHARED(T, name, count) \
  const ::wavemix::SharedSpan<T> name( \
      ::wavemix::emulator::shared_memory(#name, {__FILE__, __LINE__}, sizeof(T) * static_cast<size_t>(count)), 0)
#define WAVEMIX_DYNAMIC_SHARED(T, name) \
  const ::wavemix::SharedSpan<T> name(::wavemix::emulator::dynamic_shared_memory(#name), 0)

namespace wavemix {
template <class T>
using SharedSpan = emulator::SharedSpan<T>;
template <class U, class T>
SharedSpan<U> shared_cast(SharedSpan<T> span) {
  return span.template as<U>();
}
}  // namespace wavemix

#endif
