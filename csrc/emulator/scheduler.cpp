// How the threads of a block take turns, and what makes them wait for each other.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "emulator/engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace wavemix::emulator {

thread_local Engine* engine = nullptr;

std::string show(const uint3& v) {
  std::ostringstream out;
  out << '(' << v.x << ", " << v.y << ", " << v.z << ')';
  return out.str();
}
std::string show(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}
static uint3 unflatten(uint64_t i, const dim3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

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

namespace {

// Stacks outlive launches: mapping them costs more than running a small kernel.
Stack& pooled_stack(size_t index) {
  static thread_local std::vector<std::unique_ptr<Stack>> pool;
  while (pool.size() <= index) pool.push_back(std::make_unique<Stack>());
  return *pool[index];
}

void enter_fiber() { engine->start(); }

}  // namespace

Order::Order() {
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
Engine::Engine(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel)
    : what_(what), kernel_(kernel), shared_bytes_(shared_bytes), fibers_(block.x * block.y * block.z) {
  registers().blocks = grid;
  registers().threads = block;
  for (size_t i = 0; i < fibers_.size(); ++i) {
    fibers_[i].index = static_cast<int>(i);
    fibers_[i].thread = unflatten(i, block);
    fibers_[i].stack = &pooled_stack(i);
  }
}

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

}  // namespace wavemix::emulator
