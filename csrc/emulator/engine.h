// One launch: its threads as fibers, the order in which they run, and the shadow of its shared memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "emulator/emulator.h"

namespace wavemix::emulator {

std::string show(const uint3& v);
std::string show(const Site& site);

// --- Fibers ----------------------------------------------------------------------------------------------

class Stack;

enum class State { ready, at_barrier, at_warp_operation, done };

struct Copy {
  SharedMemory* memory;
  ptrdiff_t offset;
  const void* source;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  Stack* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
  int index = 0;  // within the block
  uint3 thread = {};
  // The barrier it waits at.
  Site site = {"", 0};
  const char* name = "";
  unsigned mask = 0;
  void* payload = nullptr;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// The accesses of one kind to one byte since the last block barrier, as far as a later access must be ordered after.
struct Trace {
  uint32_t block_epoch = 0, warp_epoch = 0;  // epochs count from 1
  int thread = 0;
  bool several_threads = false, several_warps = false;

  void note(int t, uint32_t block, uint32_t warp) {
    if (block_epoch != block) {
      *this = {block, warp, t, false, false};
    } else if (thread / kWarp != t / kWarp) {
      several_warps = true;
    } else if (warp_epoch != warp) {
      thread = t;
      warp_epoch = warp;
      several_threads = false;
    } else if (thread != t) {
      several_threads = true;
    }
  }
  bool conflicts(int t, uint32_t block, uint32_t warp) const {
    if (block_epoch != block) return false;
    if (several_warps || thread / kWarp != t / kWarp) return true;
    return warp_epoch == warp && (several_threads || thread != t);
  }
};

struct Shadow {
  Trace read, written, atomic;
  bool initialised = false;
  bool in_flight = false;  // an asynchronous copy to it has not been waited for
};

class SharedMemory {
 public:
  SharedMemory(std::string name, size_t bytes) : name(std::move(name)), data(bytes, 0xff), shadow(bytes) {}
  std::string name;
  std::vector<unsigned char> data;
  std::vector<Shadow> shadow;
};

// --- One launch ------------------------------------------------------------------------------------------

class Order {
 public:
  Order();  // as WAVEMIX_EMULATOR_ORDER says
  template <class Index>
  void fill(std::vector<Index>& order, size_t count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), Index{0});
    if (reverse_) std::reverse(order.begin(), order.end());
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
  }

 private:
  bool reverse_ = false, shuffled_ = false;
  std::mt19937_64 random_;
};

class Engine {
 public:
  Engine(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

  void run();
  void start();  // a fiber's body
  void yield();
  [[noreturn]] void fail(const std::string& violation);

  void block_barrier(Site site);
  void warp_operation(unsigned mask, Site site, const char* name, void* payload, WarpOperation operation);
  void order_warp(unsigned mask);
  unsigned char* access(SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element, Access kind);
  SharedMemory& shared(const char* name, Site site, size_t bytes);
  SharedMemory& dynamic_shared(const char* name);
  void copy_async(SharedMemory& memory, ptrdiff_t offset, const void* source, size_t bytes, size_t element);
  Fiber& current() { return *current_; }
  void wait_for_copies(size_t pending);

 private:
  void run_block(uint64_t block);
  void resume(Fiber& fiber);
  void check_bounds(const SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element, const char* verb);
  std::string place(const Fiber& fiber) const;
  std::string describe_waiting() const;
  uint32_t& warp_epoch(const Fiber& fiber) { return warp_epochs_[static_cast<size_t>(fiber.index / kWarp)]; }

  std::string what_;
  const std::function<void()>& kernel_;
  size_t shared_bytes_;
  std::vector<Fiber> fibers_;
  std::vector<uint32_t> warp_epochs_;
  uint32_t block_epoch_ = 1;
  size_t at_barrier_ = 0, done_ = 0;
  std::map<std::string, SharedMemory> static_shared_;
  std::unique_ptr<SharedMemory> dynamic_shared_;
  Fiber* current_ = nullptr;
  std::string violation_;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  Order order_;
};

extern thread_local Engine* engine;  // of the launch under way

}  // namespace wavemix::emulator
