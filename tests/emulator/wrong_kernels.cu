// Kernels that are wrong on purpose, each with its right twin: the emulator must reject the one and pass the other.
// Right ones write output[i] = input[i] + input[(i + 1) % count].
#include <map>
#include <stdexcept>

#include "cuda/common/mma.cuh"
#include "kernels.h"

namespace wavemix::test {
namespace {

constexpr int kThreads = 64;  // two warps, one block

template <bool wrong>
__global__ void global_out_of_bounds(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x);
  const int next = wrong ? i + 1 : (i + 1) % count;  // the last thread reads one past the end
  output[i] = input[i] + input[next];
}

template <bool wrong>
__global__ void global_misaligned(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x) / 4 * 4, part = static_cast<int>(threadIdx.x) % 4;
  const float4 own = *reinterpret_cast<const float4*>(input + i);
  const float mine = part == 0 ? own.x : part == 1 ? own.y : part == 2 ? own.z : own.w;
  // A whole word at an odd element: the device would trap.
  const float next =
      wrong ? reinterpret_cast<const float4*>(input + i + 1 - 4 * (i > 0))->x : input[(i + part + 1) % count];
  output[i + part] = mine + next;
}

template <bool wrong>
__global__ void shared_out_of_bounds(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = input[i];
  __syncthreads();
  output[i] = tile[i] + tile[wrong ? i + 1 : (i + 1) % count];
}

template <bool wrong>
__global__ void missing_barrier(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = 0;
  __syncthreads();
  tile[i] = input[i];
  if (!wrong) __syncthreads();
  output[i] = tile[i] + tile[(i + 1) % count];
}

template <bool wrong>
__global__ void missing_read_barrier(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = input[i];
  __syncthreads();
  const float sum = tile[i] + tile[(i + 1) % count];
  if (!wrong) __syncthreads();  // the neighbour may not have read yet
  tile[i] = sum;
  output[i] = tile[i];
}

// Within a warp a __syncwarp is enough, and necessary.
template <bool wrong>
__global__ void missing_warp_barrier(const float* input, float* output, int count) {
  WAVEMIX_DYNAMIC_SHARED(float, tile);
  const int i = static_cast<int>(threadIdx.x), base = i / 32 * 32;
  tile[i] = input[i];
  if (!wrong) __syncwarp();
  const float next = tile[base + (i + 1) % 32];
  output[i] = input[i] + (i % 32 == 31 ? input[(i + 1) % count] : next);
}

template <bool wrong>
__global__ void uninitialised_shared(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (!wrong || i > 0) tile[i] = input[i];
  __syncthreads();
  output[i] = input[i] + tile[(i + 1) % count];
}

template <bool wrong>
__global__ void divergent_barrier(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x);
  output[i] = input[i] + input[(i + 1) % count];
  if (wrong && i >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool wrong>
__global__ void early_return(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x);
  output[i] = input[i] + input[(i + 1) % count];
  if (wrong && i == count - 1) return;
  __syncthreads();
}

template <bool wrong>
__global__ void divergent_shuffle(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  float next = 0;
  if (!wrong || lane < 16) next = __shfl_down_sync(0xffffffffu, input[i], 1);
  output[i] = input[i] + (lane == 31 ? input[(i + 1) % count] : next);
}

template <bool wrong>
__global__ void shuffle_from_outside(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  float next = input[(i + 1) % count];
  if (lane < 16) next = __shfl_sync(0x0000ffffu, next, wrong ? lane + 16 : lane);
  output[i] = input[i] + next;
}

template <bool wrong>
__global__ void missing_copy_wait(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) cp_async<16>(&tile[i], input + i);
  cp_async_commit();
  if (!wrong) cp_async_wait<0>();
  __syncthreads();
  output[i] = tile[i] + tile[(i + 1) % count];
}

// A two-stage pipeline that waits for the older group only, and reads the younger.
template <bool wrong>
__global__ void copy_wait_too_short(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, 2 * kThreads);
  const int i = static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    if (i % 4 == 0) cp_async<16>(&tile[stage * kThreads + i], input + i);
    cp_async_commit();
  }
  if (wrong) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  __syncthreads();
  output[i] = tile[i] + tile[kThreads + (i + 1) % count];
}

template <bool wrong>
__global__ void missing_copy_barrier(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, tile, kThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) cp_async<16>(&tile[i], input + i);
  cp_async_commit();
  cp_async_wait<0>();
  if (!wrong) __syncthreads();  // a thread's wait covers its own copies only
  output[i] = tile[i] + tile[(i + 1) % count];
}

// A histogram of one bin: only atomic additions may meet.
template <bool wrong>
__global__ void unordered_sum(const float* input, float* output, int count) {
  WAVEMIX_SHARED(float, sum, 1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) sum[0] = 0;
  __syncthreads();
  if (wrong) {
    sum[0] += 1;
  } else {
    atomicAdd(&sum[0], 1.0f);
  }
  __syncthreads();
  output[i] = input[i] + input[(i + 1) % count] + (sum[0] - static_cast<float>(count));
}

// Not checked access by access: the result depends on the order of the threads, which the emulator can vary.
template <bool wrong>
__global__ void order_dependent(const float* input, float* output, int count) {
  const int i = static_cast<int>(threadIdx.x);
  output[i] = input[i];
  if (!wrong) __syncthreads();
  const float next = output[(i + 1) % count];
  if (!wrong) __syncthreads();
  output[i] += next;
}

using Kernel = void (*)(const float*, float*, int);
#define WAVEMIX_PAIR(name)             \
  {                                    \
    #name, { name<false>, name<true> } \
  }
const std::map<std::string, std::pair<Kernel, Kernel>> kKernels = {
    WAVEMIX_PAIR(global_out_of_bounds), WAVEMIX_PAIR(global_misaligned),    WAVEMIX_PAIR(shared_out_of_bounds),
    WAVEMIX_PAIR(missing_barrier),      WAVEMIX_PAIR(missing_read_barrier), WAVEMIX_PAIR(missing_warp_barrier),
    WAVEMIX_PAIR(uninitialised_shared), WAVEMIX_PAIR(divergent_barrier),    WAVEMIX_PAIR(early_return),
    WAVEMIX_PAIR(divergent_shuffle),    WAVEMIX_PAIR(shuffle_from_outside), WAVEMIX_PAIR(missing_copy_wait),
    WAVEMIX_PAIR(copy_wait_too_short),  WAVEMIX_PAIR(missing_copy_barrier), WAVEMIX_PAIR(unordered_sum),
    WAVEMIX_PAIR(order_dependent),
};

}  // namespace

void run_wrong_kernel(const std::string& name, bool wrong, const float* input, float* output, int count) {
  if (count != kThreads) throw std::invalid_argument("count: got " + std::to_string(count) + ", these kernels take 64");
  const auto& [right_kernel, wrong_kernel] = kKernels.at(name);
  const Launch launch{name, 1, kThreads, kThreads * sizeof(float), nullptr};
  launch(wrong ? wrong_kernel : right_kernel, input, output, count);
}

}  // namespace wavemix::test
