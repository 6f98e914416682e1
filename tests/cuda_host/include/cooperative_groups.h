// Stands in front of CUDA's <cooperative_groups.h> in the host layer (see cuda_runtime.h beside it): the thread block, its
// tiles of a warp or less, the cluster with distributed shared memory, and the grid of a cooperative launch.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  void sync(CUDA_HOST_SITE) const { cuda_host::block_barrier({"thread_block.sync", file, line}); }
  unsigned thread_rank() const { return cuda_host::self().rank; }
  unsigned num_threads() const { return cuda_host::self().block->threads; }
  unsigned size() const { return num_threads(); }
  dim3 group_index() const { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  dim3 thread_index() const { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
};
inline thread_block this_thread_block() { return {}; }

template <unsigned kSize>
class thread_block_tile {
  static_assert(kSize >= 1 && kSize <= 32 && (kSize & (kSize - 1)) == 0, "a power of two up to a warp");
  static unsigned mask() {
    const unsigned lanes = kSize == 32 ? 0xffffffffu : (1u << kSize % 32) - 1;
    return lanes << (cuda_host::self().lane() & ~int(kSize - 1));
  }

 public:
  void sync(CUDA_HOST_SITE) const {
    const cuda_host::Site site{"thread_block_tile.sync", file, line};
    cuda_host::meet(mask(), nullptr, 0, cuda_host::orders_memory(site), site);
  }
  unsigned thread_rank() const { return cuda_host::self().rank % kSize; }
  static constexpr unsigned num_threads() { return kSize; }
  static constexpr unsigned size() { return kSize; }
  unsigned meta_group_rank() const { return cuda_host::self().rank / kSize; }
  unsigned meta_group_size() const { return (cuda_host::self().block->threads + kSize - 1) / kSize; }
  template <class T>
  T shfl(T value, int from, CUDA_HOST_SITE) const {
    return __shfl_sync(mask(), value, from, kSize, file, line);
  }
  template <class T>
  T shfl_up(T value, unsigned delta, CUDA_HOST_SITE) const {
    return __shfl_up_sync(mask(), value, delta, kSize, file, line);
  }
  template <class T>
  T shfl_down(T value, unsigned delta, CUDA_HOST_SITE) const {
    return __shfl_down_sync(mask(), value, delta, kSize, file, line);
  }
  template <class T>
  T shfl_xor(T value, int lanes, CUDA_HOST_SITE) const {
    return __shfl_xor_sync(mask(), value, lanes, kSize, file, line);
  }
  unsigned ballot(int predicate, CUDA_HOST_SITE) const {
    return __ballot_sync(mask(), predicate, file, line) >> (cuda_host::self().lane() & ~int(kSize - 1));
  }
  int any(int predicate, CUDA_HOST_SITE) const { return __any_sync(mask(), predicate, file, line); }
  int all(int predicate, CUDA_HOST_SITE) const { return __all_sync(mask(), predicate, file, line); }
};
template <unsigned kSize>
thread_block_tile<kSize> tiled_partition(const thread_block&) {
  return {};
}

class cluster_group {
 public:
  struct arrival_token {
    uint32_t phase;
  };
  static void sync(CUDA_HOST_SITE) { cuda_host::cluster_barrier({"cluster_group.sync", file, line}); }
  static arrival_token barrier_arrive() { return {cuda_host::self().block->cluster_barrier->arrive(true)}; }
  static void barrier_wait(arrival_token&& token, CUDA_HOST_SITE) {
    const cuda_host::Site site{"cluster_group.barrier_wait", file, line};
    cuda_host::self().block->cluster_barrier->wait(token.phase, cuda_host::orders_memory(site), site);
  }
  static unsigned block_rank() { return cuda_host::self().block->rank_in_cluster; }
  static unsigned num_blocks() { return unsigned(cuda_host::self().block->cluster.size()); }
  static unsigned thread_rank() { return block_rank() * cuda_host::self().block->threads + cuda_host::self().rank; }
  static unsigned num_threads() { return num_blocks() * cuda_host::self().block->threads; }
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    return static_cast<T*>(cuda_host::map_shared_rank(address, unsigned(rank)));
  }
};
inline cluster_group this_cluster() { return {}; }

class grid_group {
 public:
  bool is_valid() const { return cuda_host::self().block->group->cooperative; }
  void sync(CUDA_HOST_SITE) const { cuda_host::grid_barrier({"grid_group.sync", file, line}); }
  unsigned long long block_rank() const { return cuda_host::self().block->rank_in_grid; }
  unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  unsigned long long thread_rank() const {
    return block_rank() * cuda_host::self().block->threads + cuda_host::self().rank;
  }
  unsigned long long num_threads() const { return num_blocks() * cuda_host::self().block->threads; }
};
inline grid_group this_grid() { return {}; }

template <class Group>
void sync(const Group& group, CUDA_HOST_SITE) {
  group.sync(file, line);
}

}  // namespace cooperative_groups
