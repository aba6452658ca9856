// Fibers and the order in which they run; shared memory, barriers and copies; the few runtime functions of csrc.
//
// Blocks of a cluster run together, clusters one after another. In each round every warp that is not held up runs, in
// random order, until all its lanes wait. Blocks begin late, warps are held up, copies land when chance says so and the
// previous kernel of a dependent launch ends some time: another seed is another schedule, the same one is the same.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include <sys/mman.h>

#include "emulator.h"
#include "products.h"

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

uint3 threadIdx, blockIdx;
dim3 gridDim, blockDim;

namespace emulator {
namespace {

constexpr size_t kPage = 4096, kStackBytes = 128 << 10, kStaticBytes = 48 << 10;
constexpr int kWarpgroup = 128;
constexpr uint32_t kFirstAddress = 1024;  // of shared memory: the system's lie before it
constexpr int kPatience = 300;            // rounds without progress: a deadlock

// Lanes of a warp that do something together.
struct Lanes {
  const char* operation;
  int arrived = 0;
  uint64_t operations = 0;
  alignas(64) Slots in, out;
};

using Warp = std::map<unsigned, Lanes>;  // by their mask

struct Meeting {
  int arrived = 0;
  uint64_t turn = 0;
};

struct Barrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Block {
  uint3 index;
  uint32_t rank;
  uint8_t* memory;
  size_t bytes;
  int alive, delay;
  std::vector<Warp> warps;
  std::map<int, Meeting> meetings;
  std::map<uint32_t, Barrier> barriers;
};

using Group = std::vector<std::function<void()>>;

struct Fiber {
  void* stack_pointer;
  uint3 thread;
  int lane;
  Block* block;
  Warp* warp;
  bool done = false;
  uint64_t cluster_phase = 0;
  Fiber* warpgroup;      // its first
  uint64_t commits = 0;  // groups of products, of which the last are on their way
  Group open;
  std::deque<Group> committed;
  std::vector<std::pair<uint32_t, uint4>> copies;  // its own, on their way
};

struct Flight {
  Block* block;
  Copy copy;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Flight> flights;
  int alive = 0, arrived = 0;
  uint64_t phase = 0;
};

struct Saved {
  uint8_t* first;
  std::vector<uint8_t> bytes;
};

Cluster* cluster;
Fiber* fiber;  // that runs
void* scheduler_stack_pointer;
void (*body)(const void*);
const void* context;
uint64_t progress;
std::mt19937 chance;
bool eager_copies, previous_done = true;
std::vector<Saved> late, untouched;

bool one_in(unsigned n) { return chance() % n == 0; }

// Saves the callee's registers on its stack, leaves the stack pointer in *from, and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void yield() { emulator_switch(&fiber->stack_pointer, scheduler_stack_pointer); }

template <typename Done>
void wait_until(Done done) {
  while (!done()) yield();
}

void end_cluster_phase() {
  if (cluster->alive == 0 || cluster->arrived < cluster->alive) return;
  cluster->arrived = 0;
  ++cluster->phase;
}

void enter() {
  body(context);
  if (!fiber->open.empty() || !fiber->committed.empty()) fail("a thread left with products on their way");
  if (!fiber->copies.empty()) fail("a thread left with copies on their way");
  fiber->done = true;
  ++progress;
  --fiber->block->alive;
  --cluster->alive;
  end_cluster_phase();
  yield();
}

// ---- memory ----

// `bytes` at a multiple of `alignment`, ending as close as that allows before a page without access; all ones, which is
// NaN in every float.
uint8_t* allocate(size_t bytes, size_t alignment) {
  const size_t room = (bytes + alignment + kPage - 1) / kPage * kPage;
  void* map = mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) fail("no memory for %zu bytes", bytes);
  uint8_t* end = static_cast<uint8_t*>(map) + room;
  mprotect(end, kPage, PROT_NONE);
  uint8_t* first = end - (bytes + alignment - 1) / alignment * alignment;
  memset(first, 0xff, end - first);
  return first;
}

// Shared memory of block `rank` of a cluster; the same again in the next cluster, if it is as large.
uint8_t* block_memory(size_t rank, size_t bytes) {
  static std::map<std::pair<size_t, size_t>, uint8_t*> memories;
  uint8_t*& memory = memories[{rank, bytes}];
  if (memory == nullptr) memory = allocate(bytes, 128);
  memset(memory, 0xff, bytes);
  return memory;
}

uint8_t* stack_of(size_t index) {
  static std::vector<uint8_t*> stacks;
  while (stacks.size() <= index)
    stacks.push_back(static_cast<uint8_t*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  return stacks[index];
}

uint8_t* at(const Block& block, uint32_t address, size_t bytes) {
  if (address < kFirstAddress || address - kFirstAddress + bytes > block.bytes)
    fail("shared memory of %zu bytes was touched at %d, %zu bytes", block.bytes, int(address - kFirstAddress), bytes);
  if (address % std::min<size_t>(bytes, 16)) fail("%zu bytes of shared memory were touched at %u", bytes, address);
  return block.memory + (address - kFirstAddress);
}

void complain(int, siginfo_t* info, void*) { fail("%p was touched: past the end of a tensor", info->si_addr); }

// ---- barriers and copies ----

Barrier& barrier_at(Block& block, uint32_t address) {
  at(block, address, 8);
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("a barrier is used before it is initialized");
  return found->second;
}

void settle(Barrier& barrier) {
  ++progress;
  if (barrier.pending < 0) fail("more threads came to a barrier than it awaits");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
}

void land(const Flight& flight) {
  const Copy& copy = flight.copy;
  uint8_t* target = at(*flight.block, copy.target, copy.bytes);
  if (copy.pitch == 0) {
    memcpy(target, copy.source, copy.bytes);
  } else {
    memset(target, 0, copy.bytes);
    for (int row = 0; row < copy.rows; ++row)
      for (int i = 0; i < copy.row_bytes; i += 16) {
        const uint32_t place = copy.target + row * copy.box_bytes + i;
        memcpy(at(*flight.block, copy.swizzled ? swizzled(place) : place, 16),
               copy.source + int64_t(row) * copy.pitch + i, 16);
      }
  }
  Barrier& barrier = barrier_at(*flight.block, copy.barrier);
  barrier.bytes -= copy.bytes;
  settle(barrier);
}

// ---- the previous kernel ----

void begin_previous(bool dependent) {
  previous_done = !dependent;
  if (dependent) {
    for (auto* all : {&late, &untouched})
      for (Saved& saved : *all) memcpy(saved.bytes.data(), saved.first, saved.bytes.size());
    for (Saved& saved : late) memset(saved.first, 0xff, saved.bytes.size());
  } else {
    late.clear();
    untouched.clear();
  }
}

void end_previous() {
  previous_done = true;
  ++progress;
  for (Saved& saved : untouched)
    if (memcmp(saved.first, saved.bytes.data(), saved.bytes.size()))
      fail("an output was written before the previous kernel had finished");
  for (Saved& saved : late) memcpy(saved.first, saved.bytes.data(), saved.bytes.size());
  late.clear();
  untouched.clear();
}

// ---- a cluster's run ----

void prepare_fiber(Fiber& fiber, Block& block, int index, uint8_t* stack) {
  fiber.block = &block;
  fiber.warp = &block.warps[index / kLanes];
  fiber.lane = index % kLanes;
  const unsigned row = index / blockDim.x;
  fiber.thread = {index % blockDim.x, row % blockDim.y, row / blockDim.y};
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 10;  // as if `enter` had just been called
  top[6] = reinterpret_cast<void*>(enter);
  std::fill(top, top + 6, nullptr);
  fiber.stack_pointer = top;
}

void prepare(Cluster& cluster, uint3 first, int size, size_t bytes) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  cluster.blocks.resize(size);
  cluster.fibers.resize(size_t(size) * threads);
  cluster.alive = size * threads;
  for (int rank = 0; rank < size; ++rank) {
    Block& block = cluster.blocks[rank];
    block.index = {first.x + rank, first.y, first.z};
    block.rank = rank;
    block.bytes = bytes > 0 ? bytes : kStaticBytes;
    block.memory = block_memory(rank, block.bytes);
    block.alive = threads;
    block.delay = one_in(2) ? 0 : chance() % 64;
    block.warps.resize(threads / kLanes);
    Fiber* fibers = &cluster.fibers[rank * threads];
    for (int i = 0; i < threads; ++i) {
      prepare_fiber(fibers[i], block, i, stack_of(rank * threads + i));
      fibers[i].warpgroup = &fibers[i / kWarpgroup * kWarpgroup];
    }
  }
}

void run_warp(Fiber* lanes) {
  const bool backwards = one_in(2);
  for (int i = 0; i < kLanes; ++i) {
    Fiber& next = lanes[backwards ? kLanes - 1 - i : i];
    if (next.done) continue;
    fiber = &next;
    threadIdx = next.thread;
    blockIdx = next.block->index;
    emulator_switch(&scheduler_stack_pointer, next.stack_pointer);
    fiber = nullptr;
  }
}

void land_some() {
  std::vector<Flight> flights;
  flights.swap(cluster->flights);
  for (const Flight& flight : flights) {
    if (eager_copies || one_in(3)) land(flight);
    else cluster->flights.push_back(flight);
  }
}

void run_cluster(uint3 first, int size, size_t bytes) {
  Cluster running;
  cluster = &running;
  prepare(running, first, size, bytes);
  std::vector<Fiber*> warps;
  for (size_t i = 0; i < running.fibers.size(); i += kLanes) warps.push_back(&running.fibers[i]);
  const Fiber* held_up = nullptr;
  for (int idle = 0; running.alive > 0;) {
    const uint64_t before = progress;
    std::shuffle(warps.begin(), warps.end(), chance);
    if (one_in(8)) held_up = one_in(3) ? warps[0] : nullptr;
    for (Fiber* lanes : warps)
      if (lanes->block->delay == 0 && (lanes != held_up || idle > 0)) run_warp(lanes);
    for (Block& block : running.blocks) block.delay -= block.delay > 0;
    if (!previous_done && one_in(8)) end_previous();
    land_some();
    idle = progress == before ? idle + 1 : 0;
    if (idle > kPatience) fail("all threads wait, and for nothing that will come");
  }
  if (!running.flights.empty()) fail("a block left with copies on their way");
  for (const Block& block : running.blocks)
    for (const Warp& warp : block.warps)
      for (const auto& [lanes, group] : warp)
        if (group.arrived > 0) fail("some lanes of a warp left, others wait for them at %s", group.operation);
}

}  // namespace

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  fprintf(stderr, "emulator: ");
  vfprintf(stderr, format, values);
  if (fiber != nullptr)
    fprintf(stderr, " (block %u, %u, %u, thread %u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
            threadIdx.y, threadIdx.z);
  fprintf(stderr, "\n");
  _Exit(3);
}

void together(const char* operation, const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine,
              unsigned lanes) {
  Lanes& group = (*fiber->warp)[lanes];
  const int lane = fiber->lane;
  if ((lanes >> lane & 1) == 0) fail("lane %d came to %s of lanes %x", lane, operation, lanes);
  if (group.arrived > 0 && strcmp(group.operation, operation))
    fail("a warp's lanes came to %s and to %s", group.operation, operation);
  group.operation = operation;
  if (in_bytes > 0) memcpy(group.in[lane], in, in_bytes);
  const uint64_t mine = group.operations;
  ++progress;
  if (++group.arrived == __builtin_popcount(lanes)) {
    combine(group.in, group.out);
    group.arrived = 0;
    ++group.operations;
  } else {
    wait_until([&] { return group.operations != mine; });
  }
  if (out_bytes > 0) memcpy(out, group.out[lane], out_bytes);
}

void arrive(int barrier, int threads) {
  Meeting& meeting = fiber->block->meetings[barrier];
  ++progress;
  if (++meeting.arrived < threads) return;
  meeting.arrived = 0;
  ++meeting.turn;
}

void sync(int barrier, int threads) {
  const Meeting& meeting = fiber->block->meetings[barrier];
  const uint64_t mine = meeting.turn;
  arrive(barrier, threads);
  wait_until([&] { return meeting.turn != mine; });
}

void cluster_arrive() {
  fiber->cluster_phase = cluster->phase;
  ++cluster->arrived;
  ++progress;
  end_cluster_phase();
}

void cluster_wait() {
  wait_until([] { return cluster->phase != fiber->cluster_phase; });
}

uint32_t cluster_rank() { return fiber->block->rank; }

uint8_t* shared_memory(size_t static_bytes) {
  if (static_bytes > kStaticBytes) fail("%zu bytes of static shared memory: there are 48 KB", static_bytes);
  if (static_bytes > 0) fiber->block->bytes = static_bytes;
  return fiber->block->memory;
}

uint32_t shared_address(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - fiber->block->memory + kFirstAddress;
}

uint8_t* shared_at(uint32_t address, size_t bytes) { return at(*fiber->block, address, bytes); }

uint8_t* shared_at(uint32_t address, size_t bytes, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail("block %u of a cluster of %zu", rank, cluster->blocks.size());
  const Block& block = cluster->blocks[rank];
  if (block.delay > 0) fail("the memory of block %u of the cluster was touched before it had begun", rank);
  if (block.alive == 0) fail("the memory of block %u of the cluster was touched after it had left", rank);
  return at(block, address, bytes);
}

void barrier_init(uint32_t barrier, int arrivals) {
  at(*fiber->block, barrier, 8);
  fiber->block->barriers[barrier] = {arrivals, arrivals};
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(*fiber->block, address);
  barrier.bytes += bytes;
  --barrier.pending;
  settle(barrier);
}

void barrier_arrive_at(uint32_t address, uint32_t rank) {
  shared_at(address, 8, rank);
  Barrier& barrier = barrier_at(cluster->blocks[rank], address);
  --barrier.pending;
  settle(barrier);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  const Barrier& barrier = barrier_at(*fiber->block, address);
  wait_until([&] { return (barrier.phase & 1) != parity; });
}

void copy(const Copy& copy) { emulator::copy(copy, fiber->block->rank); }

void copy(const Copy& copy, uint32_t rank) {
  const uint32_t alignment = copy.pitch == 0 ? 16 : copy.swizzled ? 1024 : 128;
  if (copy.target % alignment || reinterpret_cast<uintptr_t>(copy.source) % 16 || copy.bytes % 16)
    fail("a copy of %u bytes from %p to %u: not aligned", copy.bytes, copy.source, copy.target);
  memset(shared_at(copy.target, copy.bytes, rank), 0xff, copy.bytes);
  cluster->flights.push_back({&cluster->blocks[rank], copy});
  ++progress;
}

void send(uint32_t target, const void* source, uint32_t bytes, uint32_t address, uint32_t rank) {
  memcpy(shared_at(target, bytes, rank), source, bytes);
  Barrier& barrier = barrier_at(cluster->blocks[rank], address);
  barrier.bytes -= bytes;
  settle(barrier);
}

void copy_mine(uint32_t target, uint4 value) {
  memset(shared_at(target, 16), 0xff, 16);
  fiber->copies.emplace_back(target, value);
}

void wait_for_mine() {
  for (const auto& [target, value] : fiber->copies) memcpy(shared_at(target, 16), &value, 16);
  fiber->copies.clear();
}

void later(std::function<void()> product) { fiber->open.push_back(std::move(product)); }

void commit_products() {
  fiber->committed.push_back(std::move(fiber->open));
  fiber->open.clear();
  ++fiber->commits;
}

// A product is one of all four warps: it begins when all have asked for it, and all of it is done when a wait ends.
void wait_products(size_t pending) {
  if (fiber->commits <= pending) return;
  const uint64_t done = fiber->commits - pending;
  Fiber *const first = fiber->warpgroup, *const end = first + kWarpgroup;
  wait_until([&] { return std::all_of(first, end, [&](const Fiber& each) { return each.commits >= done; }); });
  for (Fiber* each = first; each < end; ++each)
    for (; each->commits - each->committed.size() < done; each->committed.pop_front())
      for (const auto& product : each->committed.front()) product();
}

void wait_for_previous_kernel() {
  wait_until([] { return previous_done; });
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(const void*), const void* arguments) {
  int size = 1;
  bool dependent = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) size = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) dependent = true;
  }
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (gridDim.x * gridDim.y * gridDim.z == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (threads % kLanes || gridDim.x % size || size > 8) return cudaErrorInvalidConfiguration;
  body = kernel;
  context = arguments;
  begin_previous(dependent);
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; x += size) run_cluster({x, y, z}, size, config.dynamicSmemBytes);
  if (!previous_done) fail("the kernel ended without having waited for the previous one");
  return cudaSuccess;
}

}  // namespace emulator

// ---- for device.py ----

LOWBIT_EXPORT void emulator_start(unsigned seed, bool eager_copies) {
  emulator::chance.seed(seed);
  emulator::eager_copies = eager_copies;
  struct sigaction action = {};
  action.sa_sigaction = emulator::complain;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
}

LOWBIT_EXPORT void* emulator_allocate(size_t bytes, size_t alignment) { return emulator::allocate(bytes, alignment); }

// Memory that the previous kernel writes until the next launch, if dependent, has waited for it.
LOWBIT_EXPORT void emulator_late(uint8_t* first, size_t bytes) {
  emulator::late.push_back({first, std::vector<uint8_t>(bytes)});
}

// Memory that the next launch, if dependent, must not write before its wait.
LOWBIT_EXPORT void emulator_untouched(uint8_t* first, size_t bytes) {
  emulator::untouched.push_back({first, std::vector<uint8_t>(bytes)});
}

// ---- the CUDA runtime, as far as csrc asks for it ----

extern "C" {
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused by the emulator"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;  // of all, the major compute capability is asked for
  return cudaSuccess;
}
}
