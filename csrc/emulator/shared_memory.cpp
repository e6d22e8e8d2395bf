// Checks of shared memory: bounds, races, values never written, asynchronous copies not waited for.
#include "emulator/engine.h"

namespace wavemix::emulator {

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

}  // namespace wavemix::emulator
