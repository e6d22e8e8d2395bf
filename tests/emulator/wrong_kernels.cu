// Kernels that are wrong on purpose, each with its right twin: the emulator, and the executor of their PTX (tests/ptx),
// must reject the one and pass the other.
// Right ones write output[i] = input[i] + input[(i + 1) % count].
#include <map>
#include <stdexcept>

#include "cuda/common/mma.cuh"
#include "kernels.h"

namespace wavemix::test {
namespace {

constexpr int kThreads = 64;  // two warps, one block
struct Given {
  const float* input;
  float* output;
  int count;
};
using Kernel = void (*)(Given);

std::map<std::string, std::pair<Kernel, Kernel>>& kernels() {
  static std::map<std::string, std::pair<Kernel, Kernel>> all;
  return all;
}

// Begins the body of a kernel and of its twin, `i` the thread, and enters both in the table.
#define KERNEL(name)                                                                                 \
  template <bool wrong>                                                                              \
  __device__ void name##_of(const float* input, float* output, int count, int i);                    \
  template <bool wrong>                                                                              \
  __global__ void name(const __grid_constant__ Given given) {                                        \
    name##_of<wrong>(given.input, given.output, given.count, static_cast<int>(threadIdx.x));         \
  }                                                                                                  \
  const bool name##_entered = kernels().emplace(#name, std::pair{&name<false>, &name<true>}).second; \
  template <bool wrong>                                                                              \
  __device__ void name##_of([[maybe_unused]] const float* input, float* output, [[maybe_unused]] int count, int i)

KERNEL(global_out_of_bounds) {
  const int next = wrong ? i + 1 : (i + 1) % count;  // the last thread reads one past the end
  output[i] = input[i] + input[next];
}

KERNEL(global_misaligned) {
  const int first = i / 4 * 4, part = i % 4;
  const float4 own = *reinterpret_cast<const float4*>(input + first);
  const float mine = part == 0 ? own.x : part == 1 ? own.y : part == 2 ? own.z : own.w;
  float next = input[(i + 1) % count];
  if (wrong) {  // a whole word at an odd element: the device would trap
    const float4 odd = *reinterpret_cast<const float4*>(input + first + 1 - 4 * (first > 0));
    next = part == 0 ? odd.x : part == 1 ? odd.y : part == 2 ? odd.z : odd.w;
  }
  output[i] = mine + next;
}

KERNEL(shared_out_of_bounds) {
  WAVEMIX_SHARED(float, tile, kThreads);
  tile[i] = input[i];
  __syncthreads();
  output[i] = tile[i] + tile[wrong ? i + 1 : (i + 1) % count];
}

KERNEL(missing_barrier) {
  WAVEMIX_SHARED(float, tile, kThreads);
  tile[i] = 0;
  __syncthreads();
  tile[i] = input[i];
  if (!wrong) __syncthreads();
  output[i] = tile[i] + tile[(i + 1) % count];
}

KERNEL(missing_read_barrier) {
  WAVEMIX_SHARED(float, tile, kThreads);
  tile[i] = input[i];
  __syncthreads();
  const float sum = tile[i] + tile[(i + 1) % count];
  if (!wrong) __syncthreads();  // the neighbour may not have read yet
  tile[i] = sum;
  output[i] = tile[i];
}

// Within a warp a __syncwarp is enough, and necessary.
KERNEL(missing_warp_barrier) {
  WAVEMIX_DYNAMIC_SHARED(float, tile);
  const int base = i / 32 * 32;
  tile[i] = input[i];
  if (!wrong) __syncwarp();
  const float next = tile[base + (i + 1) % 32];
  output[i] = input[i] + (i % 32 == 31 ? input[(i + 1) % count] : next);
}

KERNEL(uninitialised_shared) {
  WAVEMIX_SHARED(float, tile, kThreads);
  if (!wrong || i > 0) tile[i] = input[i];
  __syncthreads();
  output[i] = input[i] + tile[(i + 1) % count];
}

KERNEL(divergent_barrier) {
  output[i] = input[i] + input[(i + 1) % count];
  if (wrong && i >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

KERNEL(early_return) {
  output[i] = input[i] + input[(i + 1) % count];
  if (wrong && i == count - 1) return;
  __syncthreads();
}

KERNEL(divergent_shuffle) {
  const int lane = i % 32;
  float next = 0;
  if (!wrong || lane < 16) next = __shfl_down_sync(0xffffffffu, input[i], 1);
  output[i] = input[i] + (lane == 31 ? input[(i + 1) % count] : next);
}

KERNEL(shuffle_from_outside) {
  const int lane = i % 32;
  float next = input[(i + 1) % count];
  if (lane < 16) next = __shfl_sync(0x0000ffffu, next, wrong ? lane + 16 : lane);
  output[i] = input[i] + next;
}

KERNEL(missing_copy_wait) {
  WAVEMIX_SHARED(float, tile, kThreads);
  if (i % 4 == 0) cp_async<16>(&tile[i], input + i);
  cp_async_commit();
  if (!wrong) cp_async_wait<0>();
  __syncthreads();
  output[i] = tile[i] + tile[(i + 1) % count];
}

// A two-stage pipeline that waits for the older group only, and reads the younger.
KERNEL(copy_wait_too_short) {
  WAVEMIX_SHARED(float, tile, 2 * kThreads);
  for (int stage = 0; stage < 2; ++stage) {
    if (i % 4 == 0) cp_async<16>(&tile[stage * kThreads + i], input + i);
    cp_async_commit();
  }
  cp_async_wait<wrong ? 1 : 0>();
  __syncthreads();
  output[i] = tile[i] + tile[kThreads + (i + 1) % count];
}

KERNEL(missing_copy_barrier) {
  WAVEMIX_SHARED(float, tile, kThreads);
  if (i % 4 == 0) cp_async<16>(&tile[i], input + i);
  cp_async_commit();
  cp_async_wait<0>();
  if (!wrong) __syncthreads();  // a thread's wait covers its own copies only
  output[i] = tile[i] + tile[(i + 1) % count];
}

// A histogram of one bin: only atomic additions may meet.
KERNEL(unordered_sum) {
  WAVEMIX_SHARED(float, sum, 1);
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
KERNEL(order_dependent) {
  output[i] = input[i];
  if (!wrong) __syncthreads();
  const float next = output[(i + 1) % count];
  if (!wrong) __syncthreads();
  output[i] += next;
}

}  // namespace

void run_wrong_kernel(const std::string& name, bool wrong, const float* input, float* output, int count) {
  if (count != kThreads) throw std::invalid_argument("count: got " + std::to_string(count) + ", these kernels take 64");
  const auto& [right_kernel, wrong_kernel] = kernels().at(name);
  const Launch launch{[&] { return name; }, 1, kThreads, kThreads * sizeof(float), nullptr};
  launch(wrong ? wrong_kernel : right_kernel, Given{input, output, count});
}

}  // namespace wavemix::test
