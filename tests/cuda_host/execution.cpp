// The host layer's threads, barriers and the few functions of the CUDA runtime that the kernels' launch code calls.
#include "cuda_host/execution.h"

#include <cuda_runtime.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace cuda_host {

thread_local Thread* current = nullptr;
Device device;

void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_host: ");
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current)
    std::fprintf(stderr, " [block %u %u %u, thread %u %u %u]", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                 threadIdx.z);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(70);
}

Thread& self() {
  if (!current) die("a device function was called outside a kernel");
  return *current;
}

namespace {

int patience() {
  const char* seconds = std::getenv("CUDA_HOST_PATIENCE");
  return seconds ? std::atoi(seconds) : 60;
}
const int kPatience = patience();

// Sleeps while *word is `value`; a raw system call, in which ThreadSanitizer sees no order. False when it took too long.
CUDA_HOST_UNSEEN bool sleep_while(uint32_t* word, uint32_t value) {
  const timespec second{1, 0};
  for (int waited = 0; __atomic_load_n(word, __ATOMIC_SEQ_CST) == value;) {
    if (waited >= kPatience) return false;
    if (syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &second, nullptr, 0) == -1 && errno == ETIMEDOUT) ++waited;
  }
  return true;
}
CUDA_HOST_UNSEEN void wake_all(uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// The sites that were reached. Filled without locks, which would order threads.
constexpr int kMaxSites = 512;
Site reached[kMaxSites];
uint32_t reached_state[kMaxSites];  // 0 free, 1 being filled, 2 filled

CUDA_HOST_UNSEEN void note(const Site& site) {
  for (int i = 0; i < kMaxSites; ++i) {
    uint32_t state = 0;
    if (__atomic_compare_exchange_n(&reached_state[i], &state, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
      reached[i] = site;
      __atomic_store_n(&reached_state[i], 2, __ATOMIC_SEQ_CST);
      return;
    }
    while (__atomic_load_n(&reached_state[i], __ATOMIC_SEQ_CST) != 2) {
    }
    if (reached[i].line == site.line && reached[i].file == site.file) return;
  }
}

const char* without_folders(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

struct Settings {
  std::string skip_file;
  int skip_line = 0;
  const char* report = std::getenv("CUDA_HOST_BARRIERS");
  Settings() {
    const char* skip = std::getenv("CUDA_HOST_SKIP_BARRIER");
    if (!skip) return;
    const char* colon = std::strrchr(skip, ':');
    if (!colon) die("CUDA_HOST_SKIP_BARRIER=%s: want file.cu:line", skip);
    skip_file.assign(skip, colon);
    skip_line = std::atoi(colon + 1);
  }
  ~Settings() {
    if (!report) return;
    FILE* file = std::fopen(report, "w");
    if (!file) return;
    for (int i = 0; i < kMaxSites && reached_state[i] == 2; ++i)
      std::fprintf(file, "%s:%d %s\n", without_folders(reached[i].file), reached[i].line, reached[i].name);
    std::fclose(file);
  }
};
const Settings settings;

}  // namespace

bool orders_memory(const Site& site) {
  if (settings.report) note(site);
  return settings.skip_line != site.line || without_folders(site.file) != settings.skip_file;
}

namespace {
constexpr uint64_t kOneArrived = uint64_t(1) << 32, kOneExpected = uint64_t(1) << 48;
uint32_t phase_of(uint64_t state) { return uint32_t(state); }
uint32_t arrived_of(uint64_t state) { return uint32_t(state >> 32 & 0xffff); }
uint32_t expected_of(uint64_t state) { return uint32_t(state >> 48); }
// The state in which the last arrival or departure leaves a barrier.
uint64_t completed(uint64_t state) {
  return uint64_t(expected_of(state)) << 48 | uint64_t(phase_of(state) + 1);
}
// The futex of a barrier: its phase, the lower half of the word on a little-endian machine.
uint32_t* phase_word(uint64_t* state) { return reinterpret_cast<uint32_t*>(state); }
}  // namespace

void Barrier::start(uint32_t expected) { state_ = uint64_t(expected) << 48; }

namespace {
CUDA_HOST_UNSEEN uint32_t count_arrival(uint64_t* word, uint32_t expected) {
  uint64_t state = __atomic_load_n(word, __ATOMIC_SEQ_CST), next;
  do {
    uint64_t with = state;
    if (expected) {
      if (arrived_of(state) > 0 && expected_of(state) != expected)
        die("threads meet at a barrier of %u threads and of %u", expected_of(state), expected);
      with = uint64_t(expected) << 48 | (state & (kOneExpected - 1));
    }
    next = with + kOneArrived;
    if (arrived_of(next) == expected_of(next)) next = completed(next);
  } while (!__atomic_compare_exchange_n(word, &state, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  if (phase_of(next) != phase_of(state)) wake_all(phase_word(word));
  return phase_of(state);
}
CUDA_HOST_UNSEEN uint32_t present_phase(uint64_t* word) { return phase_of(__atomic_load_n(word, __ATOMIC_SEQ_CST)); }
CUDA_HOST_UNSEEN void count_departure(uint64_t* word) {
  uint64_t state = __atomic_load_n(word, __ATOMIC_SEQ_CST), next;
  do {
    next = state - kOneExpected;
    if (arrived_of(next) > 0 && arrived_of(next) == expected_of(next)) next = completed(next);
  } while (!__atomic_compare_exchange_n(word, &state, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  if (phase_of(next) != phase_of(state)) wake_all(phase_word(word));
}
}  // namespace

uint32_t Barrier::arrive(bool orders, uint32_t expected) {
  // The phase cannot move on before this thread has arrived, so the edge is stated first.
  if (orders) __tsan_release(&edges_[present_phase(&state_) % 4]);
  return count_arrival(&state_, expected);
}

void Barrier::wait(uint32_t phase, bool orders, const Site& site) {
  if (!sleep_while(phase_word(&state_), phase))
    die("waits for ever at %s, %s:%d: not all threads arrive", site.name, site.file, site.line);
  if (orders) __tsan_acquire(&edges_[phase % 4]);
}

void Barrier::meet(const Site& site, uint32_t expected) {
  const bool orders = orders_memory(site);
  wait(arrive(orders, expected), orders, site);
}

void Barrier::leave() { count_departure(&state_); }

Rendezvous& Warp::of(uint32_t mask, int lane, const char* name) {
  if (!(mask >> lane & 1)) die("%s: lane %d is not in its own mask %08x", name, lane, mask);
  for (Rendezvous& one : rendezvous) {
    struct Claim {
      CUDA_HOST_UNSEEN static bool mask(uint32_t* word, uint32_t mask) {
        uint32_t free = 0;
        return __atomic_compare_exchange_n(word, &free, mask, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) || free == mask;
      }
    };
    if (Claim::mask(&one.mask, mask)) return one;
  }
  die("%s: a warp uses more than %d different masks", name, kMasks);
}

namespace {
CUDA_HOST_UNSEEN void put_words(uint64_t* to, const char** operation, const char* name, const uint64_t* from, int count) {
  for (int i = 0; i < count; ++i) __atomic_store_n(to + i, from[i], __ATOMIC_RELAXED);
  __atomic_store_n(operation, name, __ATOMIC_RELAXED);
}
CUDA_HOST_UNSEEN const char* read_name(const char* const* operation) { return __atomic_load_n(operation, __ATOMIC_RELAXED); }
CUDA_HOST_UNSEEN uint64_t read_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
}  // namespace

void Rendezvous::exchange(int lane, const uint64_t* words, int count, bool orders, const Site& site) {
  const uint32_t set = present_phase(reinterpret_cast<uint64_t*>(&barrier_)) % 2;
  put_words(words_[set][lane], &operation_[set][lane], site.name, words, count);
  const uint32_t phase = barrier_.arrive(orders, uint32_t(__builtin_popcount(mask)));
  barrier_.wait(phase, orders, site);
  phase_[lane] = phase;
  const int first = __builtin_ctz(mask);
  const char* other = read_name(&operation_[set][first]);
  if (other != site.name && std::strcmp(other, site.name) != 0)
    die("lane %d is in %s (%s:%d) while lane %d is in %s", lane, site.name, site.file, site.line, first, other);
}

uint64_t Rendezvous::get(int from, int word, int lane) const { return read_word(&words_[phase_[lane] % 2][from][word]); }

const Rendezvous& meet(uint32_t mask, const uint64_t* words, int count, bool orders, const Site& site) {
  Thread& thread = self();
  const unsigned lanes = thread.block->threads - thread.rank / 32 * 32;
  // A full mask in a last warp of fewer lanes stands for those there are, as on the device.
  if (lanes < 32 && mask == 0xffffffffu && count < Rendezvous::kWords) mask = (1u << lanes) - 1;
  Rendezvous& rendezvous = thread.warp().of(mask, thread.lane(), site.name);
  rendezvous.exchange(thread.lane(), words, count, orders, site);
  return rendezvous;
}

void block_barrier(const Site& site) { self().block->barrier.meet(site); }
void cluster_barrier(const Site& site) { self().block->cluster_barrier->meet(site); }

void grid_barrier(const Site& site) {
  Group& group = *self().block->group;
  if (!group.cooperative) die("%s at %s:%d: the launch is not cooperative", site.name, site.file, site.line);
  group.barrier.meet(site);
}

// Shared memory of a block: the static objects of every type in the program, then the dynamic part.
namespace {
size_t static_bytes = 0;
constexpr size_t kSharedAlignment = 128;
size_t rounded(size_t bytes) { return (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment; }
}  // namespace

size_t reserve_static_shared(size_t bytes) {
  const size_t offset = static_bytes;
  static_bytes += rounded(bytes);
  return offset;
}
unsigned char* static_shared(size_t offset) { return self().block->shared + offset; }
unsigned char* dynamic_shared() { return self().block->shared + static_bytes; }

void* map_shared_rank(const void* address, unsigned rank) {
  const Block& block = *self().block;
  const auto offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < 0 || size_t(offset) >= block.shared_bytes) die("map_shared_rank: not an address in this block's shared memory");
  if (rank >= block.cluster.size()) die("map_shared_rank: block %u of a cluster of %zu", rank, block.cluster.size());
  return block.cluster[rank]->shared + offset;
}

namespace {
// Word by word: memcpy and memset of a few bytes become instructions that ThreadSanitizer does not see.
void store_words(uint32_t* to, const uint32_t* from, uint32_t otherwise) {
  for (int i = 0; i < 4; ++i) to[i] = from ? from[i] : otherwise;
}
}  // namespace

void async_copy(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t*>(shared);
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16))
    die("cp_async_16: an address that is not aligned to 16 bytes");
  // The copy may happen at any time until it is waited for: write now, what nobody may yet read, and once more then.
  store_words(to, nullptr, ~0u);
  self().open.push_back({to, valid ? static_cast<const uint32_t*>(global) : nullptr});
}
void async_commit() {
  self().committed.push_back(std::move(self().open));
  self().open.clear();
}
void async_wait(unsigned groups) {
  auto& committed = self().committed;
  while (committed.size() > groups) {
    for (const AsyncCopy& copy : committed.front()) store_words(copy.to, copy.from, 0);
    committed.erase(committed.begin());
  }
}

namespace {

struct Launch {
  Body body;
  void* context;
  dim3 grid, block;
  char end = 0;  // address of the edges from every thread to the launch's return
};

// Threads of one group of blocks.
struct Run {
  Launch* launch;
  uint32_t unfinished;
};

struct Start {
  Run* run;
  Thread thread;
};

// A block's shared memory ends with its last thread: what another block of the cluster then reads is no longer there.
CUDA_HOST_UNSEEN bool last_of(uint32_t* unfinished) { return __atomic_sub_fetch(unfinished, 1, __ATOMIC_SEQ_CST) == 0; }
void leave(Block& block) {
  if (block.cluster.size() == 1) return;
  __tsan_release(&block.end);
  if (!last_of(&block.unfinished)) return;
  __tsan_acquire(&block.end);
  std::memset(block.shared, 0xff, block.shared_bytes);
}

CUDA_HOST_UNSEEN void finish(uint32_t* unfinished) {
  if (__atomic_sub_fetch(unfinished, 1, __ATOMIC_SEQ_CST) == 0) wake_all(unfinished);
}
CUDA_HOST_UNSEEN uint32_t count_unfinished(uint32_t* unfinished) { return __atomic_load_n(unfinished, __ATOMIC_SEQ_CST); }

void* run_thread(void* argument) {
  Start& start = *static_cast<Start*>(argument);
  Thread& thread = start.thread;
  Block& block = *thread.block;
  Run& run = *start.run;
  Launch& launch = *run.launch;
  current = &thread;
  blockIdx = block.index;
  gridDim = launch.grid;
  blockDim = launch.block;
  threadIdx = {thread.rank % launch.block.x, thread.rank / launch.block.x % launch.block.y,
               thread.rank / launch.block.x / launch.block.y};
  launch.body(launch.context);
  leave(block);
  block.barrier.leave();
  block.cluster_barrier->leave();
  current = nullptr;
  __tsan_release(&launch.end);
  finish(&run.unfinished);
  return nullptr;
}

std::map<const void*, int> dynamic_shared_limits;
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t fail(cudaError_t error) { return last_error = error; }
constexpr int kDefaultSharedLimit = 49152;
constexpr unsigned kPortableCluster = 8;

int launches = 0;

unsigned count(const dim3& size) { return size.x * size.y * size.z; }

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* context) {
  if (current) die("a kernel launches a kernel");
  Launch launch{body, context, config.gridDim, config.blockDim};
  dim3 cluster{1, 1, 1};
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative)
      cooperative = attribute.val.cooperative != 0;
    else if (attribute.id == cudaLaunchAttributeClusterDimension)
      cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
    else
      die("launch attribute %d is not known to the host layer", int(attribute.id));
  }
  const unsigned threads = count(launch.block), blocks = count(launch.grid), together = count(cluster);
  const auto limit = dynamic_shared_limits.find(kernel);
  const int shared_limit = limit == dynamic_shared_limits.end() ? kDefaultSharedLimit : limit->second;
  if (blocks == 0 || threads == 0 || threads > 1024 || launch.grid.y > 65535 || launch.grid.z > 65535)
    return fail(cudaErrorInvalidConfiguration);
  if (config.dynamicSmemBytes > size_t(shared_limit)) return fail(cudaErrorInvalidValue);
  if (together == 0 || launch.grid.x % cluster.x || launch.grid.y % cluster.y || launch.grid.z % cluster.z)
    return fail(cudaErrorInvalidConfiguration);
  if (together > 1 && (device.major < 9 || together > kPortableCluster)) return fail(cudaErrorInvalidClusterSize);
  if (cooperative && int(blocks) > device.multiprocessors * device.blocks_per_multiprocessor)
    return fail(cudaErrorCooperativeLaunchTooLarge);

  // Everything lives until the launch returns: memory used again by a later block would order it behind an earlier one.
  std::deque<Block> all(blocks);
  std::deque<Group> groups;
  std::deque<Barrier> cluster_barriers;
  std::deque<std::vector<Start>> starts;
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> memory;
  std::deque<Run> runs;
  const size_t shared_bytes = rounded(static_bytes + config.dynamicSmemBytes + 1);

  // Cluster by cluster; a cooperative grid is one group of all its clusters.
  std::vector<std::vector<Block*>> clusters;
  std::map<unsigned, size_t> cluster_of;
  for (unsigned rank = 0; rank < blocks; ++rank) {
    Block& block = all[rank];
    block.index = {rank % launch.grid.x, rank / launch.grid.x % launch.grid.y, rank / launch.grid.x / launch.grid.y};
    block.rank_in_grid = rank;
    block.threads = block.unfinished = threads;
    const unsigned key = (block.index.z / cluster.z * launch.grid.y + block.index.y / cluster.y) * launch.grid.x +
                         block.index.x / cluster.x;
    const auto found = cluster_of.try_emplace(key, clusters.size()).first;
    if (found->second == clusters.size()) clusters.emplace_back();
    block.rank_in_cluster = unsigned(clusters[found->second].size());
    clusters[found->second].push_back(&block);
  }
  for (const std::vector<Block*>& members : clusters) {
    if (groups.empty() || !cooperative) groups.emplace_back();
    Barrier& barrier = cluster_barriers.emplace_back();
    barrier.start(unsigned(members.size()) * threads);
    for (Block* block : members) {
      block->group = &groups.back();
      block->cluster = members;
      block->cluster_barrier = &barrier;
      groups.back().blocks.push_back(block);
    }
  }

  ++launches;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, size_t(512) << 10);
  for (Group& group : groups) {
    group.cooperative = cooperative;
    group.cluster = cluster;
    group.barrier.start(unsigned(group.blocks.size()) * threads);
    Run& run = runs.emplace_back(Run{&launch, unsigned(group.blocks.size()) * threads});
    std::vector<Start>& start = starts.emplace_back(run.unfinished);
    for (size_t b = 0; b < group.blocks.size(); ++b) {
      Block& block = *group.blocks[b];
      block.barrier.start(threads);
      block.warps.resize((threads + 31) / 32);
      block.shared = static_cast<unsigned char*>(std::aligned_alloc(kSharedAlignment, shared_bytes));
      if (!block.shared) die("no memory for shared memory");
      memory.emplace_back(block.shared, &std::free);
      std::memset(block.shared, 0xff, shared_bytes);
      block.shared_bytes = shared_bytes;
      for (unsigned rank = 0; rank < threads; ++rank) {
        Start& one = start[b * threads + rank];
        one.run = &run;
        one.thread.block = &block;
        one.thread.rank = rank;
      }
    }
    for (Start& one : start) {
      pthread_t thread;
      if (pthread_create(&thread, &attributes, run_thread, &one) != 0) die("cannot start thread %zu", size_t(&one - &start[0]));
    }
    // A kernel that hangs is reported by its own threads.
    for (uint32_t left = count_unfinished(&run.unfinished); left > 0; left = count_unfinished(&run.unfinished))
      sleep_while(&run.unfinished, left);
  }
  pthread_attr_destroy(&attributes);
  __tsan_acquire(&launch.end);
  return cudaSuccess;
}

}  // namespace cuda_host

using cuda_host::device;
using cuda_host::fail;

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    default: return "an error unknown to the host layer";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) { return number == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* number) {
  *number = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(device.shared_per_block()); break;
    default: cuda_host::die("device attribute %d is not known to the host layer", int(attribute));
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > device.shared_per_block())
    return fail(cudaErrorInvalidValue);
  cuda_host::dynamic_shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 10 * device.major + device.minor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = device.blocks_per_multiprocessor;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// For tests: the device to pretend, and how many kernels have run.
__attribute__((visibility("default"))) void cuda_host_set_device(int major, int minor, int multiprocessors, int blocks_per_multiprocessor) {
  device = {major, minor, multiprocessors, blocks_per_multiprocessor};
}
__attribute__((visibility("default"))) int cuda_host_launches() { return cuda_host::launches; }

}  // extern "C"
