// Runs CUDA kernels on the CPU, one operating-system thread for each CUDA thread, so that ThreadSanitizer sees what CUDA
// promises about memory and nothing else. Internal: kernels and drivers include <cuda_runtime.h>, which says how to use it.
//
// Threads block one another through atomics and futexes in functions that ThreadSanitizer does not instrument; the
// happens-before edges are stated beside them, by Barrier::arrive and Barrier::wait, only where CUDA gives them:
//   __syncthreads, named barriers, cooperative groups' sync, __syncwarp   order the memory of those who take part;
//   shuffles, votes, mma, ldmatrix, movmatrix                             exchange values and order nothing;
//   launch                                                               the caller before every thread, these before its return.
// Every block has threads of its own, started by the caller: two blocks of a grid are never ordered, although blocks of an
// ordinary launch run one after the other. The blocks of a cluster, and all blocks of a cooperative grid, run together.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
#define CUDA_HOST_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace cuda_host {

// Ends the process with a message that names the thread that speaks.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Where a barrier stands in the source, and what it is.
struct Site {
  const char* name;
  const char* file;
  int line;
};
// Notes that the site was reached. Whether its barrier orders memory: yes, unless CUDA_HOST_SKIP_BARRIER=file.cu:line (no
// folders) takes it out. Threads then still meet there, so that nothing hangs, but ThreadSanitizer sees no order.
bool orders_memory(const Site& site);

// A barrier whose participants may be told once (start) or at every arrival, and of whom some may leave for good.
class Barrier {
 public:
  void start(uint32_t expected);
  // Returns the phase to wait for. `expected` 0: as told by start. `orders`: whether memory is ordered.
  uint32_t arrive(bool orders, uint32_t expected = 0);
  void wait(uint32_t phase, bool orders, const Site& site);
  // Arrives and waits, at a place in the source.
  void meet(const Site& site, uint32_t expected = 0);
  void leave();

 private:
  // expected (16 bits), arrived (16 bits), phase (32 bits): one word, so that arrivals and departures cannot cross.
  alignas(8) uint64_t state_ = 0;
  // One address per phase for the edges: a slow waiter must not pick up arrivals of the next phase.
  char edges_[4] = {};
};

// Values that the lanes of a mask hand to each other.
class Rendezvous {
 public:
  static constexpr int kWords = 6;
  uint32_t mask = 0;
  // Hands over this lane's words and waits for the others; what get() returns stays until the lane's next exchange.
  void exchange(int lane, const uint64_t* words, int count, bool orders, const Site& site);
  uint64_t get(int from, int word, int lane) const;

 private:
  Barrier barrier_;
  // Two sets in turn: whoever writes a set again has met everyone once more since it was read.
  uint64_t words_[2][32][kWords];
  const char* operation_[2][32];
  uint32_t phase_[32];
};

struct Warp {
  static constexpr int kMasks = 16;
  Rendezvous rendezvous[kMasks];
  Rendezvous& of(uint32_t mask, int lane, const char* name);
};

struct Block;

// Blocks that run together: one block, a cluster, or a cooperative grid.
struct Group {
  std::vector<Block*> blocks;
  Barrier barrier;
  dim3 cluster{1, 1, 1};  // blocks of a cluster
  bool cooperative = false;
};

struct Block {
  Group* group = nullptr;
  uint3 index{};
  unsigned rank_in_cluster = 0, rank_in_grid = 0, threads = 0;
  std::vector<Block*> cluster;
  Barrier* cluster_barrier = nullptr;
  Barrier barrier, named[16];
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;  // static objects, then the dynamic part
  size_t shared_bytes = 0;
  uint32_t unfinished = 0;  // threads
  char end = 0;             // address of the edges from every thread to the last
};

// A copy of 16 bytes that cp.async has started.
struct AsyncCopy {
  uint32_t* to;
  const uint32_t* from;  // nullptr: zeros
};

struct Thread {
  Block* block = nullptr;
  unsigned rank = 0;  // in the block
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> committed;
  int lane() const { return int(rank % 32); }
  Warp& warp() const { return block->warps[rank / 32]; }
};
extern thread_local Thread* current;
Thread& self();  // dies outside a kernel

// Reserves static shared memory for one type; called before main, once for each type.
size_t reserve_static_shared(size_t bytes);
unsigned char* static_shared(size_t offset);
unsigned char* dynamic_shared();
// The address in block `rank` of the cluster that corresponds to one in this block's shared memory.
void* map_shared_rank(const void* address, unsigned rank);

void block_barrier(const Site& site);
void cluster_barrier(const Site& site);
void grid_barrier(const Site& site);
// Meets the lanes of `mask` with `count` words each.
const Rendezvous& meet(uint32_t mask, const uint64_t* words, int count, bool orders, const Site& site);

void async_copy(void* shared, const void* global, bool valid);
void async_commit();
void async_wait(unsigned groups);

// The device that the runtime's functions report.
struct Device {
  int major = 9, minor = 0, multiprocessors = 2, blocks_per_multiprocessor = 1;
  size_t shared_per_block() const { return major >= 9 ? 232448 : major == 8 && minor > 0 ? 101376 : 166912; }
};
extern Device device;

using Body = void (*)(void* context);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* context);

}  // namespace cuda_host
