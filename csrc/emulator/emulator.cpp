#include "emulator/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace wavemix::emulator {
namespace {

std::string show(const uint3& v) {
  std::ostringstream out;
  out << '(' << v.x << ", " << v.y << ", " << v.z << ')';
  return out.str();
}
std::string show(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}
uint3 unflatten(uint64_t i, const dim3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

// --- Fibers ----------------------------------------------------------------------------------------------

// A stack with an unreadable page below, so that an overflow faults instead of spoiling its neighbour.
class Stack {
 public:
  Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    base_ = mmap(nullptr, kBytes + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::runtime_error("emulator: no memory for a thread's stack");
    if (mprotect(base_, page_, PROT_NONE) != 0)
      throw std::runtime_error("emulator: no guard page for a thread's stack");
  }
  ~Stack() { munmap(base_, kBytes + page_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* bottom() const { return static_cast<char*>(base_) + page_; }
  static constexpr size_t kBytes = 128 * 1024;

 private:
  size_t page_;
  void* base_;
};

// Stacks outlive launches: mapping them costs more than running a small kernel.
Stack& pooled_stack(size_t index) {
  static thread_local std::vector<std::unique_ptr<Stack>> pool;
  while (pool.size() <= index) pool.push_back(std::make_unique<Stack>());
  return *pool[index];
}

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
  // What it waits for.
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

}  // namespace

class SharedMemory {
 public:
  SharedMemory(std::string name, size_t bytes) : name(std::move(name)), data(bytes, 0xff), shadow(bytes) {}
  std::string name;
  std::vector<unsigned char> data;
  std::vector<Shadow> shadow;
};

namespace {

// --- One launch ------------------------------------------------------------------------------------------

class Order {
 public:
  Order() {
    const char* text = std::getenv("WAVEMIX_EMULATOR_ORDER");
    const std::string value = text ? text : "forward";
    if (value == "forward") return;
    if (value == "reverse") {
      reverse_ = true;
      return;
    }
    char* end = nullptr;
    random_.seed(std::strtoull(value.c_str(), &end, 10));
    if (value.empty() || *end != 0)
      throw std::invalid_argument("WAVEMIX_EMULATOR_ORDER: got '" + value + "'; forward, reverse or a seed would work");
    shuffled_ = true;
  }
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
  Engine(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel)
      : what_(what), kernel_(kernel), shared_bytes_(shared_bytes), fibers_(block.x * block.y * block.z) {
    registers().blocks = grid;
    registers().threads = block;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].index = static_cast<int>(i);
      fibers_[i].thread = unflatten(i, block);
      fibers_[i].stack = &pooled_stack(i);
    }
  }

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

thread_local Engine* engine = nullptr;

void enter_fiber() { engine->start(); }

void Engine::resume(Fiber& fiber) {
  current_ = &fiber;
  registers().thread = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack->bottom(), Stack::kBytes);
#endif
  swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  current_ = nullptr;
}

void Engine::start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  kernel_();
  current_->state = State::done;
  yield();
}

void Engine::yield() {
  Fiber& fiber = *current_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                 scheduler_stack_bytes_);
#endif
  swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

std::string Engine::place(const Fiber& fiber) const {
  return what_ + ", block " + show(registers().block) + ", thread " + show(fiber.thread);
}

// The fiber that failed is never resumed; the scheduler throws in its stead, outside any fiber's stack.
void Engine::fail(const std::string& violation) {
  violation_ = place(*current_) + ": " + violation;
  current_->state = State::done;
  yield();
  std::abort();  // not reached
}

void Engine::run() {
  std::vector<uint64_t> blocks;
  const dim3 grid = registers().blocks;
  order_.fill(blocks, size_t{grid.x} * grid.y * grid.z);
  for (uint64_t block : blocks) run_block(block);
}

void Engine::run_block(uint64_t block) {
  registers().block = unflatten(block, registers().blocks);
  block_epoch_ = 1;
  at_barrier_ = done_ = 0;
  warp_epochs_.assign((fibers_.size() + kWarp - 1) / kWarp, 1);
  static_shared_.clear();
  dynamic_shared_ = std::make_unique<SharedMemory>("(dynamic)", shared_bytes_);
  for (Fiber& fiber : fibers_) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack->bottom(), Stack::kBytes);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack->bottom();
    fiber.context.uc_stack.ss_size = Stack::kBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
    fiber.state = State::ready;
    fiber.open_group.clear();
    fiber.groups.clear();
  }
  std::vector<int> turn;
  while (done_ < fibers_.size()) {
    bool progress = false;
    order_.fill(turn, fibers_.size());
    for (int index : turn) {
      Fiber& fiber = fibers_[static_cast<size_t>(index)];
      if (fiber.state != State::ready) continue;
      progress = true;
      resume(fiber);
      if (!violation_.empty()) throw std::runtime_error(violation_);
      if (fiber.state != State::done) continue;
      ++done_;
      if (at_barrier_ > 0)
        throw std::runtime_error(place(fiber) + ": divergent barrier: left the kernel while" + describe_waiting());
    }
    if (!progress)
      throw std::runtime_error(what_ + ", block " + show(registers().block) +
                               ": no thread can go on:" + describe_waiting());
  }
}

std::string Engine::describe_waiting() const {
  constexpr int kShown = 4;
  std::ostringstream out;
  int waiting = 0;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state != State::at_barrier && fiber.state != State::at_warp_operation) continue;
    if (++waiting > kShown) continue;
    out << (waiting > 1 ? ";" : "") << " thread " << show(fiber.thread) << " waits at " << fiber.name << " ("
        << show(fiber.site);
    if (fiber.state == State::at_warp_operation) out << ", mask 0x" << std::hex << fiber.mask << std::dec;
    out << ')';
  }
  if (waiting > kShown) out << "; and " << waiting - kShown << " more";
  return out.str();
}

void Engine::block_barrier(Site site) {
  Fiber& fiber = *current_;
  if (done_ > 0)
    fail("divergent barrier: reached " + show(site) + " after " + std::to_string(done_) + " threads left the kernel");
  fiber.state = State::at_barrier;
  fiber.site = site;
  fiber.name = "__syncthreads";
  for (const Fiber& other : fibers_) {
    if (other.state == State::at_barrier && !(other.site == site))
      fail("divergent barrier: reached " + show(site) + " while" + describe_waiting());
  }
  if (++at_barrier_ < fibers_.size()) return yield();
  at_barrier_ = 0;
  ++block_epoch_;
  for (Fiber& other : fibers_) other.state = State::ready;
}

void Engine::warp_operation(unsigned mask, Site site, const char* name, void* payload, WarpOperation operation) {
  Fiber& fiber = *current_;
  const int first = fiber.index / kWarp * kWarp;
  if (!(mask >> (fiber.index % kWarp) & 1u)) fail(std::string(name) + ": the calling lane is not in its own mask");
  fiber.state = State::at_warp_operation;
  fiber.site = site;
  fiber.name = name;
  fiber.mask = mask;
  fiber.payload = payload;
  void* payloads[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const size_t index = static_cast<size_t>(first + lane);
    if (index >= fibers_.size() || fibers_[index].state == State::done)
      fail(std::string(name) + " (" + show(site) + "): lane " + std::to_string(lane) + " of its mask " +
           (index >= fibers_.size() ? "does not exist" : "has left the kernel"));
    const Fiber& other = fibers_[index];
    const bool together = other.state == State::at_warp_operation && other.site == site && other.mask == mask &&
                          std::strcmp(other.name, name) == 0;
    if (!together) return yield();
    payloads[lane] = other.payload;
  }
  operation(payloads);
  for (int lane = 0; lane < kWarp; ++lane)
    if (payloads[lane]) fibers_[static_cast<size_t>(first + lane)].state = State::ready;
}

void Engine::order_warp(unsigned mask) {
  const size_t first = static_cast<size_t>(current_->index / kWarp * kWarp);
  const size_t lanes = std::min<size_t>(kWarp, fibers_.size() - first);
  for (size_t lane = 0; lane < lanes; ++lane)
    if (!(mask >> lane & 1u)) return;  // a part of a warp: too little to order all of its accesses
  ++warp_epoch(*current_);
}

// --- Shared memory ---------------------------------------------------------------------------------------

void Engine::check_bounds(const SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element,
                          const char* verb) {
  if (offset >= 0 && static_cast<size_t>(offset) + bytes <= memory.data.size()) {
    if (offset % static_cast<ptrdiff_t>(std::min<size_t>(bytes, 16)) == 0 || (bytes & (bytes - 1)) != 0) return;
    fail("shared array '" + memory.name + "': " + verb + " " + std::to_string(bytes) + " bytes at byte " +
         std::to_string(offset) + ", which is not aligned to them");
  }
  const ptrdiff_t size = static_cast<ptrdiff_t>(element);
  fail("shared array '" + memory.name + "': " + verb + " element " + std::to_string(offset / size) +
       " out of bounds, it has " + std::to_string(memory.data.size() / element));
}

unsigned char* Engine::access(SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element, Access kind) {
  const char* verb = kind == Access::read ? "read of" : kind == Access::write ? "write to" : "atomic on";
  check_bounds(memory, offset, bytes, element, verb);
  const int thread = current_->index;
  const uint32_t block = block_epoch_, warp = warp_epoch(*current_);
  auto describe = [&] {
    return "shared array '" + memory.name + "': " + verb + " element " +
           std::to_string(offset / static_cast<ptrdiff_t>(element));
  };
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& byte = memory.shadow[static_cast<size_t>(offset) + i];
    if (byte.in_flight) fail(describe() + " while an asynchronous copy to it has not been waited for");
    if (kind != Access::write && !byte.initialised) fail(describe() + ", which was never written");
    auto order_after = [&](const Trace& trace, const char* other) {
      if (!trace.conflicts(thread, block, warp)) return;
      fail(describe() + " races with a " + other + " by thread " +
           show(fibers_[static_cast<size_t>(trace.thread)].thread) +
           (trace.several_threads || trace.several_warps ? " and others" : "") + ": no barrier between them");
    };
    if (kind != Access::read) order_after(byte.read, "read");
    order_after(byte.written, "write");
    if (kind != Access::atomic) order_after(byte.atomic, "atomic");
    (kind == Access::read ? byte.read : kind == Access::write ? byte.written : byte.atomic).note(thread, block, warp);
    byte.initialised = true;
  }
  return memory.data.data() + offset;
}

SharedMemory& Engine::shared(const char* name, Site site, size_t bytes) {
  return static_shared_.try_emplace(show(site) + name, name, bytes).first->second;
}

SharedMemory& Engine::dynamic_shared(const char* name) {
  dynamic_shared_->name = name;
  return *dynamic_shared_;
}

void Engine::copy_async(SharedMemory& memory, ptrdiff_t offset, const void* source, size_t bytes, size_t element) {
  access(memory, offset, bytes, element, Access::write);
  for (size_t i = 0; i < bytes; ++i) memory.shadow[static_cast<size_t>(offset) + i].in_flight = true;
  current_->open_group.push_back({&memory, offset, source, bytes});
}

// The bytes land here and not before: whoever does not wait finds nothing.
void Engine::wait_for_copies(size_t pending) {
  Fiber& fiber = *current_;
  while (fiber.groups.size() > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      for (size_t i = 0; i < copy.bytes; ++i)
        copy.memory->shadow[static_cast<size_t>(copy.offset) + i].in_flight = false;
      std::memcpy(access(*copy.memory, copy.offset, copy.bytes, copy.bytes, Access::write), copy.source, copy.bytes);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace

namespace {
thread_local std::string launches;
}

Registers& registers() {
  static thread_local Registers all;
  return all;
}

void launch(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  constexpr size_t kMaxThreads = 1024, kMaxShared = 227 * 1024;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (size_t{grid.x} * grid.y * grid.z == 0 || threads == 0 || threads > kMaxThreads || shared_bytes > kMaxShared)
    throw std::runtime_error(what + ": invalid launch: grid " + show({grid.x, grid.y, grid.z}) + ", block " +
                             show({block.x, block.y, block.z}) + ", " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  struct Scope {
    explicit Scope(Engine* now) { engine = now; }
    ~Scope() { engine = nullptr; }
  };
  launches += what + '\n';
  Engine now(what, grid, block, shared_bytes, kernel);
  Scope scope(&now);
  now.run();
}

void fail(const std::string& violation) { engine->fail(violation); }
void block_barrier(Site site) { engine->block_barrier(site); }
void warp_operation(unsigned mask, Site site, const char* name, void* payload, WarpOperation operation) {
  engine->warp_operation(mask, site, name, payload, operation);
}
int lane() { return engine->current().index % kWarp; }

void warp_barrier(unsigned mask, Site site) {
  engine->warp_operation(mask, site, "__syncwarp", &mask, [](void* const(&payloads)[kWarp]) {
    for (void* payload : payloads)
      if (payload) return engine->order_warp(*static_cast<unsigned*>(payload));
  });
}

unsigned ballot(unsigned mask, Site site, const char* name, bool vote) {
  struct Vote {
    bool mine;
    unsigned all;
  } vote_of_lane{vote, 0};
  engine->warp_operation(mask, site, name, &vote_of_lane, [](void* const(&payloads)[kWarp]) {
    unsigned all = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (payloads[lane] && static_cast<Vote*>(payloads[lane])->mine) all |= 1u << lane;
    for (void* payload : payloads)
      if (payload) static_cast<Vote*>(payload)->all = all;
  });
  return vote_of_lane.all;
}

unsigned char* access(SharedMemory& memory, ptrdiff_t offset, size_t bytes, size_t element, Access kind) {
  return engine->access(memory, offset, bytes, element, kind);
}
SharedMemory& shared_memory(const char* name, Site site, size_t bytes) { return engine->shared(name, site, bytes); }
SharedMemory& dynamic_shared_memory(const char* name) { return engine->dynamic_shared(name); }
void copy_async(SharedMemory& memory, ptrdiff_t offset, const void* source, size_t bytes, size_t element) {
  engine->copy_async(memory, offset, source, bytes, element);
}
void commit_copies() {
  Fiber& fiber = engine->current();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}
void wait_for_copies(int pending_groups) { engine->wait_for_copies(static_cast<size_t>(pending_groups)); }

}  // namespace wavemix::emulator

extern "C" __attribute__((visibility("default"))) const char* wavemix_emulator_launches() {
  static thread_local std::string answer;
  answer = std::exchange(wavemix::emulator::launches, {});
  return answer.c_str();
}

// --- The CUDA runtime, as far as launchers use it ----------------------------------------------------------

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
