#include "emulator/emulator.h"

#include <stdexcept>

#include "emulator/engine.h"

namespace wavemix::emulator {

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
