// Kernels that show what the host layer promises, one promise each. They are CUDA like any other: nvcc compiles them too.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace cg = cooperative_groups;

namespace {

using namespace hope::cuda;

constexpr unsigned kAllLanes = 0xffffffffu;

// Eleven numbers a thread.
__global__ void indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* mine = out + 11 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  const unsigned numbers[11] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, blockDim.x,
                                blockDim.y,  blockDim.z,  cg::this_thread_block().thread_rank(),
                                cg::this_thread_block().num_threads()};
  for (int i = 0; i < 11; ++i) mine[i] = numbers[i];
}

// Twelve values a thread, of two warps.
__global__ void lanes(const float* in, float* out) {
  const float x = in[threadIdx.x];
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const auto eight = cg::tiled_partition<8>(cg::this_thread_block());
  float values[12];
  values[0] = __shfl_sync(kAllLanes, x, 5);
  values[1] = __shfl_up_sync(kAllLanes, x, 3u);
  values[2] = __shfl_down_sync(kAllLanes, x, 3u);
  values[3] = __shfl_xor_sync(kAllLanes, x, 9);
  values[4] = __shfl_sync(kAllLanes, x, int(threadIdx.x) + 1, 8);
  values[5] = float(__ballot_sync(kAllLanes, x > 0) >> 8 & 0xffffu);
  values[6] = float(__any_sync(kAllLanes, x > 2) + 2 * __all_sync(kAllLanes, x > -100));
  values[7] = warp.shfl_xor(x, 16);
  values[8] = eight.shfl_down(x, 2);
  values[9] = float(eight.ballot(x > 0));
  values[10] = float(100 * eight.meta_group_rank() + eight.thread_rank());
  // The halves of a warp go different ways, each with its own mask.
  if (threadIdx.x % 32 < 16)
    values[11] = __shfl_xor_sync(0x0000ffffu, x, 1);
  else
    values[11] = __shfl_xor_sync(0xffff0000u, x, 2);
  for (int i = 0; i < 12; ++i) out[threadIdx.x * 12 + i] = values[i];
}

// Registers of each lane after loading four 8x8 matrices in each way; the first matrix through movmatrix last.
__global__ void fragments(const uint16_t* matrices, uint32_t* out) {
  uint16_t* shared = dynamic_shared<uint16_t>();
  for (int i = int(threadIdx.x); i < 4 * 64; i += 32) shared[i] = matrices[i];
  __syncwarp();
  uint32_t r[15];
  uint32_t four[4], two[2], one[1];
  ldmatrix(four, shared + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) r[i] = four[i];
  ldmatrix_transposed(four, shared + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) r[4 + i] = four[i];
  ldmatrix(two, shared + 8 * (threadIdx.x % 16));
  r[8] = two[0], r[9] = two[1];
  ldmatrix_transposed(two, shared + 8 * (threadIdx.x % 16));
  r[10] = two[0], r[11] = two[1];
  ldmatrix(one, shared + 8 * (threadIdx.x % 8));
  r[12] = one[0];
  ldmatrix_transposed(one, shared + 8 * (threadIdx.x % 8));
  r[13] = one[0];
  r[14] = movmatrix(r[0]);
  for (int i = 0; i < 15; ++i) out[threadIdx.x * 15 + i] = r[i];
}

// The product of fragments made by the caller, [lane][register].
__global__ void product(int type, const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i], sum[i] = d[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
  if (type == 0) mma_bf16(sum, left, right);
  if (type == 1) mma_f16(sum, left, right);
  if (type == 2) {
    for (int i = 0; i < 4; ++i) left[i] = to_tf32(__uint_as_float(left[i]));
    for (int i = 0; i < 2; ++i) right[i] = to_tf32(__uint_as_float(right[i]));
    mma_tf32(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

constexpr int kThreads = 96;
struct Numbers {
  int x[kThreads];
};

// Each thread reads what another wrote, and writes where another read: out[i] = kThreads - 1 - i.
__global__ void reversed(int* out) {
  Numbers& shared = block_shared<Numbers>();
  const int i = int(threadIdx.x);
  shared.x[i] = i;
  __syncthreads();
  const int other = shared.x[kThreads - 1 - i];
  __syncthreads();
  shared.x[i] = 2 * other;
  __syncthreads();
  out[i] = shared.x[kThreads - 1 - i] / 2 + other - i;
}

// The same within each warp.
__global__ void reversed_in_warp(int* out) {
  int* shared = dynamic_shared<int>();
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const int i = int(threadIdx.x);
  shared[i] = i;
  __syncwarp();
  const int other = shared[i ^ 31];
  warp.sync();
  shared[i] = other;
  out[i] = other;
}

// A shuffle exchanges values and orders no memory: this kernel has a race, on purpose.
__global__ void shuffle_as_barrier(int* out) {
  int* shared = dynamic_shared<int>();
  const int i = int(threadIdx.x);
  shared[i] = i;
  const int one = __shfl_xor_sync(kAllLanes, 1, 1);
  out[i] = shared[i ^ one];
}

// Blocks of a grid are not ordered: this kernel has a race, on purpose.
__global__ void blocks_in_order(int* out) {
  if (threadIdx.x == 0) out[0] = int(blockIdx.x);
}

// Two warps: one makes, the other takes, and only the taker waits. out[i] = i, i + 1, i + 2, i + 3 in turn.
__global__ void handed_over(int* out) {
  Numbers& shared = block_shared<Numbers>();
  const int lane = int(threadIdx.x % 32);
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) named_barrier_sync(2, 64);
      shared.x[lane] = lane + round;
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      out[32 * round + lane] = shared.x[31 - lane] - 31 + 2 * lane;
      if (round < 3) named_barrier_arrive(2, 64);
    }
  }
}

// Half the threads leave early; the others still meet. out[i] = i.
__global__ void early_leavers(int* out) {
  Numbers& shared = block_shared<Numbers>();
  const int i = int(threadIdx.x), half = kThreads / 2;
  if (i >= half) return;
  shared.x[i] = i;
  __syncthreads();
  out[i] = shared.x[half - 1 - i] - half + 1 + 2 * i;
}

// One warp waits for a second that never comes: this kernel hangs, on purpose.
__global__ void left_alone() { named_barrier_sync(3, 64); }

// Two stages of copies of 16 bytes; zeros stand for what lies behind `valid`.
__global__ void copied(const int* in, int valid, int rounds, int* out) {
  int* shared = dynamic_shared<int>();  // [2][4 * 32]
  const int i = int(threadIdx.x);
  const auto start = [&](int round) {
    const int first = round * 128 + 4 * i;
    if (round < rounds) cp_async_16(shared + round % 2 * 128 + 4 * i, in + first, first < valid);
    cp_async_commit();
  };
  start(0);
  for (int round = 0; round < rounds; ++round) {
    start(round + 1);
    cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[round * 128 + 32 * j + i] = shared[round % 2 * 128 + (32 * j + i) % 128];
    __syncthreads();
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Blocks of a cluster read each other's shared memory. out[block][i] = 100 * (next block of the cluster) + i.
__global__ void neighbours(int* out) {
  int* shared = dynamic_shared<int>();
  const auto cluster = cg::this_cluster();
  const int i = int(threadIdx.x), rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  shared[i] = 100 * rank + i;
  cluster.sync();
  out[blockIdx.x * blockDim.x + i] = cluster.map_shared_rank(shared, (rank + 1) % blocks)[i];
  cluster.sync();  // nobody leaves while its memory is read
}
#else
__global__ void neighbours(int*) {}
#endif

// Every block sums what all blocks wrote.
__global__ void over_the_grid(int* partial, int* out) {
  if (threadIdx.x == 0) partial[blockIdx.x] = int(blockIdx.x) + 1;
  cg::this_grid().sync();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

LaunchShape shape(unsigned blocks, unsigned threads, size_t shared_bytes = 0) {
  LaunchShape one;
  one.grid = blocks;
  one.block = threads;
  one.shared_bytes = shared_bytes;
  return one;
}

bool ok(const hope::Status& status) { return status.code == hope::StatusCode::ok; }

template <class F>
bool all(int count, const F& right) {
  for (int i = 0; i < count; ++i)
    if (!right(i)) return false;
  return true;
}

}  // namespace

extern "C" {

int run_indices(const unsigned* grid, const unsigned* block, unsigned* out) {
  LaunchShape one;
  one.grid = dim3(grid[0], grid[1], grid[2]);
  one.block = dim3(block[0], block[1], block[2]);
  return !ok(launch("indices", one, indices, out));
}
int run_lanes(const float* in, float* out) { return !ok(launch("lanes", shape(1, 64), lanes, in, out)); }
int run_fragments(const uint16_t* in, uint32_t* out) {
  return !ok(launch("fragments", shape(1, 32, 512), fragments, in, out));
}
int run_product(int type, const uint32_t* a, const uint32_t* b, float* d) {
  return !ok(launch("product", shape(1, 32), product, type, a, b, d));
}
// 0 when the launch was refused, with its message.
int run_refused(int cooperative, int blocks, int cluster, size_t shared_bytes, char* message, size_t capacity) {
  LaunchShape one = shape(unsigned(blocks), 32, shared_bytes);
  one.cooperative = cooperative != 0;
  one.cluster = dim3(unsigned(cluster), 1, 1);
  int partial[64], out[64 * 32];
  const hope::Status status = launch("refused", one, over_the_grid, partial, out);
  std::strncpy(message, status.message, capacity - 1);
  return ok(status);
}

int run_case(const char* name) {
  static int out[1024], partial[64], in[1024];
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  bool right = false;
  if (is("block")) {
    right = ok(launch(name, shape(1, kThreads), reversed, out)) && all(kThreads, [](int i) { return out[i] == kThreads - 1 - i; });
  } else if (is("warp")) {
    right = ok(launch(name, shape(1, 64, 256), reversed_in_warp, out)) && all(64, [](int i) { return out[i] == (i ^ 31); });
  } else if (is("shuffle")) {
    right = ok(launch(name, shape(1, 32, 128), shuffle_as_barrier, out));
  } else if (is("blocks")) {
    right = ok(launch(name, shape(2, 32), blocks_in_order, out));
  } else if (is("named")) {
    right = ok(launch(name, shape(1, 64), handed_over, out)) &&
            all(128, [](int i) { return out[i] == i % 32 + i / 32; });
  } else if (is("leavers")) {
    right = ok(launch(name, shape(1, kThreads), early_leavers, out)) && all(kThreads / 2, [](int i) { return out[i] == i; });
  } else if (is("alone")) {
    right = ok(launch(name, shape(1, 32), left_alone));
  } else if (is("copies")) {
    for (int i = 0; i < 1024; ++i) in[i] = i + 1;
    right = ok(launch(name, shape(1, 32, 1024), copied, in, 400, 4, out)) &&
            all(512, [](int i) { return out[i] == (i < 400 ? i + 1 : 0); });
  } else if (is("cluster")) {
    LaunchShape one = shape(4, 32, 128);
    one.cluster = dim3(2, 1, 1);
    right = ok(launch(name, one, neighbours, out)) &&
            all(128, [](int i) { return out[i] == 100 * (1 - i / 32 % 2) + i % 32; });
  } else if (is("grid")) {
    LaunchShape one = shape(2, 32);
    one.cooperative = true;
    right = ok(launch(name, one, over_the_grid, partial, out)) && all(64, [](int i) { return out[i] == 3; });
  }
  return right ? 0 : 1;
}

}  // extern "C"
