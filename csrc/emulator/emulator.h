// A CUDA device in the host's process: compiles the .cu sources with the host compiler and runs each thread of a block
// as a fiber, one block after another. It finds what a GPU would leave to chance: barriers and warp operations that
// not all threads reach, shared memory read out of bounds, before it is written, or without a barrier after another
// thread's write, asynchronous copies used before they are waited for. Global memory belongs to AddressSanitizer.
//
// The order in which threads run is set by WAVEMIX_EMULATOR_ORDER: "forward" (default), "reverse", or an integer that
// seeds a new shuffle at every turn. wavemix_emulator_launches() returns, one a line, what was launched since it was
// last asked (C linkage, for ctypes): tests read from it which kernel a shape was sent to.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

// Attributes that only device compilers know.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ static_assert(false, "shared memory is declared by WAVEMIX_SHARED, so that it can be checked");

namespace wavemix::emulator {

constexpr int kWarp = 32;

// The place of a barrier or warp operation in the source.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

// Runs `kernel` once per thread. Throws std::runtime_error naming kernel, block and thread at the first violation.
void launch(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

[[noreturn]] void fail(const std::string& violation);  // for the thread that runs now

// --- Threads ---------------------------------------------------------------------------------------------

struct Registers {
  uint3 thread, block;
  dim3 threads, blocks;
};
Registers& registers();

// All threads of the block, at one and the same place.
void block_barrier(Site site);

// All lanes of `mask`, at one and the same place: the last one to arrive runs `operation` on everyone's payload
// (null for lanes outside the mask), then all go on.
using WarpOperation = void (*)(void* const (&payloads)[kWarp]);
void warp_operation(unsigned mask, Site site, const char* name, void* payload, WarpOperation operation);
int lane();
// Orders the warp's shared memory accesses, as far as `mask` names all of its lanes.
void warp_barrier(unsigned mask, Site site);

// --- Shared memory ---------------------------------------------------------------------------------------

class SharedMemory;  // one block's array with its shadow: who wrote and read each byte, and when

enum class Access { read, write, atomic };

// Checks an access to `bytes` bytes and returns where they are.
unsigned char* access(SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element, Access kind);
SharedMemory& shared_memory(const char* name, Site site, size_t bytes);  // static: made at its first use in a block
SharedMemory& dynamic_shared_memory(const char* name);

void copy_async(SharedMemory& memory, ptrdiff_t offset, const void* source, size_t bytes, size_t element);
void commit_copies();
void wait_for_copies(int pending_groups);

template <class T>
class SharedSpan;

// An lvalue of shared memory.
template <class T>
class SharedElement {
 public:
  using Value = std::remove_const_t<T>;
  SharedElement(SharedMemory& memory, ptrdiff_t offset) : memory_(memory), offset_(offset) {}
  operator Value() const {
    Value value;
    std::memcpy(&value, access(memory_, offset_, sizeof(T), sizeof(T), Access::read), sizeof(T));
    return value;
  }
  const SharedElement& operator=(const Value& value) const {
    std::memcpy(access(memory_, offset_, sizeof(T), sizeof(T), Access::write), &value, sizeof(T));
    return *this;
  }
  const SharedElement& operator=(const SharedElement& other) const { return *this = static_cast<Value>(other); }
  template <class U>
  const SharedElement& operator+=(const U& value) const {
    return *this = static_cast<Value>(static_cast<Value>(*this) + value);
  }
  SharedSpan<T> operator&() const { return {memory_, offset_}; }

 private:
  SharedMemory& memory_;
  ptrdiff_t offset_;
};

// Stands for a T* to shared memory: indexable, movable, and reinterpretable by as<U>().
template <class T>
class SharedSpan {
 public:
  SharedSpan(SharedMemory& memory, ptrdiff_t offset) : memory_(&memory), offset_(offset) {}
  SharedElement<T> operator[](ptrdiff_t i) const { return {*memory_, offset_ + i * kSize}; }
  SharedElement<T> operator*() const { return (*this)[0]; }
  SharedSpan operator+(ptrdiff_t i) const { return {*memory_, offset_ + i * kSize}; }
  template <class U>
  SharedSpan<U> as() const {
    return {*memory_, offset_};
  }
  SharedMemory& memory() const { return *memory_; }
  ptrdiff_t offset() const { return offset_; }

 private:
  static constexpr ptrdiff_t kSize = sizeof(T);
  SharedMemory* memory_;
  ptrdiff_t offset_;
};

// --- Shuffles and votes ----------------------------------------------------------------------------------

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane
};

template <class T>
T shuffle(unsigned mask, Site site, const char* name, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T>, "registers only");
  Shuffle<T> mine{value, value, source};
  warp_operation(mask, site, name, &mine, [](void* const(&payloads)[kWarp]) {
    for (void* payload : payloads) {
      if (!payload) continue;
      auto* reader = static_cast<Shuffle<T>*>(payload);
      const auto* writer = static_cast<const Shuffle<T>*>(payloads[reader->source]);
      if (!writer) fail("a shuffle reads lane " + std::to_string(reader->source) + ", which is not in its mask");
      reader->result = writer->value;
    }
  });
  return mine.result;
}

unsigned ballot(unsigned mask, Site site, const char* name, bool vote);

}  // namespace wavemix::emulator

// --- What CUDA puts in every kernel's scope --------------------------------------------------------------

#define threadIdx (::wavemix::emulator::registers().thread)
#define blockIdx (::wavemix::emulator::registers().block)
#define blockDim (::wavemix::emulator::registers().threads)
#define gridDim (::wavemix::emulator::registers().blocks)

#define WAVEMIX_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(WAVEMIX_SITE) { wavemix::emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, WAVEMIX_SITE) {
  wavemix::emulator::warp_barrier(mask, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, WAVEMIX_SITE) {
  const int base = wavemix::emulator::lane() & ~(width - 1);
  return wavemix::emulator::shuffle(mask, {file, line}, "__shfl_sync", value, base + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, WAVEMIX_SITE) {
  const int lane = wavemix::emulator::lane(), source = lane ^ lane_mask;
  return wavemix::emulator::shuffle(mask, {file, line}, "__shfl_xor_sync", value,
                                    source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, WAVEMIX_SITE) {
  const int lane = wavemix::emulator::lane(), source = lane - static_cast<int>(delta);
  return wavemix::emulator::shuffle(mask, {file, line}, "__shfl_up_sync", value,
                                    source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, WAVEMIX_SITE) {
  const int lane = wavemix::emulator::lane(), source = lane + static_cast<int>(delta);
  return wavemix::emulator::shuffle(mask, {file, line}, "__shfl_down_sync", value,
                                    source < (lane & ~(width - 1)) + width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote, WAVEMIX_SITE) {
  return wavemix::emulator::ballot(mask, {file, line}, "__ballot_sync", vote != 0);
}
inline int __any_sync(unsigned mask, int vote, WAVEMIX_SITE) {
  return wavemix::emulator::ballot(mask, {file, line}, "__any_sync", vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, WAVEMIX_SITE) {
  return wavemix::emulator::ballot(mask, {file, line}, "__all_sync", vote != 0) == mask;
}

template <class T>
T __ldg(const T* source) {
  return *source;
}

template <class T>
void __stwb(T* target, T value) {
  *target = value;
}

// The upper half of a product.
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Blocks and threads run one at a time, so a plain read and write is atomic.
template <class T>
T atomicAdd(T* target, T value) {
  const T old = *target;
  *target = old + value;
  return old;
}
template <class T>
T atomicAdd(wavemix::emulator::SharedSpan<T> target, T value) {
  unsigned char* bytes = wavemix::emulator::access(target.memory(), target.offset(), sizeof(T), sizeof(T),
                                                   wavemix::emulator::Access::atomic);
  T old;
  std::memcpy(&old, bytes, sizeof(T));
  const T sum = old + value;
  std::memcpy(bytes, &sum, sizeof(T));
  return old;
}
