// Sums over the hidden units of a memory: over the warps of a block through its shared memory, and over the blocks of a
// cluster through each other's. Always in the same order: warp 0 first, block 0 first.
//
// A sum is of kSumTiles tiles of 16x8 numbers. Traffic per sum and block: 512 kWarps kSumTiles bytes of shared memory
// written and read; with several blocks 512 kSumTiles read from each of them, or a share of that where one block needs it.
#pragma once

#include "cuda/ptx.h"
#include "scan_traits.h"

namespace hope::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;  // of such code the host launches single blocks only
#else
constexpr bool kClusters = true;
#endif

template <class Traits>
class ScanSum {
 public:
  static constexpr int kNumbers = Traits::kSumTiles * kWarp;  // float4: [tile][lane] accumulators

  // `shared`: where the layout's offsets count from, and the blocks' sums lie.
  __device__ __forceinline__ ScanSum(char* shared, const ScanLayout& layout, int blocks)
      : partial_(reinterpret_cast<float4*>(shared + layout.partial)),
        block_sums_(reinterpret_cast<float4*>(shared)),
        blocks_(blocks) {}

  // Where this lane puts its accumulators of tile j, at [j * kWarp], of sum number `count`. There are two sets of all this:
  // one is filled while the other, of the sum before, is read. So the sums of a block are numbered one after the other.
  __device__ __forceinline__ float4* part(int count) const {
    return partial_ + ((count & 1) * Traits::kWarps + threadIdx.x / kWarp) * kNumbers + threadIdx.x % kWarp;
  }

  // Adds up sum number `count` when everyone has put in a part, and calls finish(row, column, x0, x1) for pairs of columns,
  // row < 16 and column < 8 kSumTiles: for all of them in every block (`everywhere`) or in the block that owns them.
  template <class Finish>
  __device__ __forceinline__ void finish(int count, bool everywhere, const Finish& finish) const {
    __syncthreads();  // every warp's part is there; the set before this one is free
    add_up(partial_ + (count & 1) * Traits::kWarps * kNumbers, count, everywhere, finish);
  }
  // The same of parts that are all there, [warp][tile][lane] accumulators. In a cluster nobody reads them any more.
  template <class Finish>
  __device__ __forceinline__ void add_up(const float4* parts, int count, bool everywhere, const Finish& finish) const {
    over_warps(parts, [&](int i, const float4& x) {
      if (together())
        block_sums_[(count & 1) * kNumbers + i] = x;
      else
        in_pairs(i, x, finish);
    });
    if constexpr (Traits::kCluster && kClusters) {
      if (blocks_ == 1) return;
      cluster_sync();  // every block's sum is there; the set before this one is free
      const int own = blockIdx.x % blocks_, share = kNumbers / blocks_;
      const int first = everywhere ? 0 : own * share, end = everywhere ? kNumbers : first + share;
      for (int i = first + threadIdx.x; i < end; i += Traits::kThreads) {
        const float4* sum = block_sums_ + (count & 1) * kNumbers + i;
        float4 x = cluster_load(sum, 0);
        for (int block = 1; block < blocks_; ++block) add(x, cluster_load(sum, block));
        in_pairs(i, x, finish);
      }
    }
  }

  // Adds up the parts of the warps, [warp][tile][lane] accumulators, and calls use(i, sum) for this thread's share of them.
  template <class Use>
  static __device__ __forceinline__ void over_warps(const float4* parts, const Use& use) {
    for (int i = threadIdx.x; i < kNumbers; i += Traits::kThreads) {
      float4 x = parts[i];
#pragma unroll
      for (int w = 1; w < Traits::kWarps; ++w) add(x, parts[w * kNumbers + i]);
      use(i, x);
    }
  }
  // Accumulators number i of such a sum: finish(row, column, x0, x1) for their two pairs of columns.
  template <class Finish>
  static __device__ __forceinline__ void in_pairs(int i, const float4& x, const Finish& finish) {
    const int row = i % kWarp / 4, column = i / kWarp * 8 + i % 4 * 2;
    finish(row, column, x.x, x.y);
    finish(row + 8, column, x.z, x.w);
  }

  // A number of each warp, that of warp w at x[w * pitch], added up over all warps of all blocks. Other blocks' are seen
  // behind a barrier of the cluster, and must stay until the next one.
  __device__ __forceinline__ float total(const float* x, int pitch) const {
    float sum = 0.0f;
    for (int block = 0; block < (together() ? blocks_ : 1); ++block)
      for (int w = 0; w < Traits::kWarps; ++w) sum += together() ? cluster_load(x + w * pitch, block) : x[w * pitch];
    return sum;
  }

  // Whether the memory is spread over several blocks.
  __device__ __forceinline__ bool together() const { return Traits::kCluster && kClusters && blocks_ > 1; }
  // Whether this block owns tile j of a result.
  __device__ __forceinline__ bool owns(int j) const {
    return !together() || j % Traits::kSumTiles * blocks_ / Traits::kSumTiles == int(blockIdx.x % blocks_);
  }

  // Waits until no block reads this one's memory any more.
  __device__ __forceinline__ void leave() const {
    if constexpr (Traits::kCluster && kClusters)
      if (blocks_ > 1) cluster_sync();  // nobody leaves while its memory is read
  }

 private:
  static __device__ __forceinline__ void add(float4& x, const float4& y) { x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w; }

  float4 *partial_, *block_sums_;
  int blocks_;
};

}  // namespace hope::cuda
