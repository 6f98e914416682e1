// What the parts of the step's kernel share: its arguments, numbers in the dtype of tokens, sums over a warp's lanes, and
// how a level's input is read. The kernel and the order of its parts are in step.cu.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/ptx.h"
#include "cuda/step.h"

namespace hope::cuda::stepping {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnits = 32;      // hidden units (linear: features) that are summed up together: a *piece* of a memory
constexpr int kStaged = 4096;   // inputs of a shared-weight product in shared memory at a time
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kNormEps = 1e-6f;

// The problem as the kernel sees it, with where each level's output goes.
//
// A level's output is kept as float32 sums [B, N, pieces, D], not rounded: of a memory that is split each piece's own (the
// first with the key, which is the residual), else one. Whoever reads adds them in order and rounds to the tokens' dtype, so
// that the bits do not depend on whether it was split.
struct Arguments {
  StepProblem p;
  float* sums[kMaxStepLevels];
  float* hidden;          // [B, H] of the level that is never written
  int32_t key_lanes;      // lanes for D / 4 features, a power of two
  int32_t rows_together;  // rows of a projection that a warp takes at a time, 1 to 4
};

// ------------------------------------------------------------------------------------------------------------- numbers

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};
using Four = Quad<float>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Single numbers of the tokens' dtype, which is looked at as the kernel runs: only products with shared weights, which read
// many, are compiled for each dtype.
__device__ __forceinline__ float number_at(DType dtype, const void* numbers, int64_t i) {
  if (dtype == DType::bfloat16) return to_float(static_cast<const __nv_bfloat16*>(numbers)[i]);
  if (dtype == DType::float16) return to_float(static_cast<const __half*>(numbers)[i]);
  return static_cast<const float*>(numbers)[i];
}
__device__ __forceinline__ void put_number(DType dtype, void* numbers, int64_t i, float x) {
  if (dtype == DType::bfloat16)
    static_cast<__nv_bfloat16*>(numbers)[i] = __float2bfloat16_rn(x);
  else if (dtype == DType::float16)
    static_cast<__half*>(numbers)[i] = __float2half_rn(x);
  else
    static_cast<float*>(numbers)[i] = x;
}
__device__ __forceinline__ float rounded(DType dtype, float x) {
  if (dtype == DType::bfloat16) return to_float(__float2bfloat16_rn(x));
  return dtype == DType::float16 ? to_float(__float2half_rn(x)) : x;
}

__device__ __forceinline__ Four load_four(const float* from) { return *reinterpret_cast<const Four*>(from); }
__device__ __forceinline__ void store_four(float* to, const Four& x) { *reinterpret_cast<Four*>(to) = x; }
__device__ __forceinline__ float dot(const Four& a, const Four& b, float sum) {
  for (int j = 0; j < 4; ++j) sum = fmaf(a.x[j], b.x[j], sum);
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------- sums

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }

// The sum over all lanes, the same in each.
__device__ __forceinline__ float warp_sum(float x) {
  for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// Sums each of kCount (a power of two) values over the lanes that differ in the bits 16 .. kLastBit of their number. While
// more than one is left, a lane hands half of its values to its partner and keeps the other half: the values kLeft from the
// returned index on are complete, in x[0 .. kLeft - 1]. The tree over the lanes is the same for every kCount.
template <int kCount, int kLastBit>
struct Fold {
  static constexpr int left(int live, int bit) { return bit < kLastBit ? live : left(live > 1 ? live / 2 : 1, bit / 2); }
  static constexpr int kLeft = left(kCount, 16);

  template <int kLive, int kBit>
  static __device__ __forceinline__ int fold(float* x) {
    if constexpr (kBit < kLastBit) {
      return 0;
    } else if constexpr (kLive == 1) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], kBit);
      return fold<1, kBit / 2>(x);
    } else {
      constexpr int kHalf = kLive / 2;
      const bool upper = (lane_id() & kBit) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float send = upper ? x[i] : x[i + kHalf], keep = upper ? x[i + kHalf] : x[i];
        x[i] = keep + __shfl_xor_sync(kAllLanes, send, kBit);
      }
      return (upper ? kHalf : 0) + fold<kHalf, kBit / 2>(x);
    }
  }
  static __device__ __forceinline__ int apply(float (&x)[kCount]) { return fold<kCount, 16>(x); }
};

// --------------------------------------------------------------------------------------------------------------- levels

__device__ __forceinline__ int64_t width_of(const StepProblem& p) { return p.heads * p.dim; }
__host__ __device__ inline bool written(const StepLevel& level) { return level.chunk_size > 0; }
// Number of the weight behind the hidden units; those before it are in front of them.
__host__ __device__ inline int last_weight(Form form) { return form == Form::linear ? 0 : form == Form::mlp ? 1 : 2; }
// Units whose products with the last weight are added up: hidden ones, or the inputs of a linear memory.
__host__ __device__ inline int64_t inner_size(const StepProblem& p, const StepLevel& level) {
  return level.form == Form::linear ? p.dim : level.hidden;
}
__host__ __device__ inline int piece_count(const StepProblem& p, const StepLevel& level) {
  return int((inner_size(p, level) + kUnits - 1) / kUnits);
}
__host__ __device__ inline int sums_kept(const StepProblem& p, const StepLevel& level) {
  return written(level) && p.split ? piece_count(p, level) : 1;
}
__device__ __forceinline__ int gate_count(const StepLevel& level) {
  return 1 + (level.retention != nullptr) + (level.momentum_gate != nullptr);
}

// What a level reads: the call's tokens, or the sums of a level.
struct Input {
  const void* tokens;
  int64_t row;
  const float* sums;
  int pieces;
};

// What the kernel keeps in shared memory from beginning to end: where each sequence stood when the step began, the levels
// and the stage. From the kernel's parameters the compiler reads all pointers of a level ahead of time, which costs a
// hundred registers; what lives through all phases would cost each of them some.
struct Stack {
  int64_t at[kMaxStepBatch];
  int due[kMaxStepLevels];  // whether any sequence completes a chunk of the level
  StepLevel levels[kMaxStepLevels];
  Input in;      // of the present stage
  void* output;  // the layer's, where the present stage hands it over itself, else null
};

__device__ __forceinline__ int slot_of(const StepLevel& level, int64_t b) {
  return int(block_shared<Stack>().at[b] % level.chunk_size);
}
__device__ __forceinline__ bool is_due(const StepLevel& level, int64_t b) {
  return slot_of(level, b) + 1 == level.chunk_size;
}
__device__ __forceinline__ bool starts_again(const StepLevel& level, int64_t b) {
  return level.segment > 0 && (block_shared<Stack>().at[b] + 1) % level.segment == 0;
}
// Element [b, slot, n, 0] of an array [B, C, N, tail].
__device__ __forceinline__ int64_t kept_at(const StepProblem& p, const StepLevel& level, int64_t b, int64_t slot,
                                           int64_t n) {
  return (b * level.chunk_size + slot) * p.heads + n;
}

__device__ __forceinline__ float add_pieces(const float* sums, int pieces, int64_t stride) {
  float sum = sums[0];
#pragma unroll 1
  for (int i = 1; i < pieces; ++i) sum += sums[i * stride];
  return sum;
}

// Feature d of head n of sequence b, a number of the tokens' dtype.
__device__ __forceinline__ float read(const StepProblem& p, const Input& in, int64_t b, int n, int d) {
  if (in.tokens) return number_at(p.dtype, in.tokens, b * in.row + n * p.dim + d);
  return rounded(p.dtype, add_pieces(in.sums + (b * p.heads + n) * in.pieces * p.dim + d, in.pieces, p.dim));
}
__device__ __forceinline__ float read(const StepProblem& p, const Input& in, int64_t b, int i) {
  return read(p, in, b, i / int(p.dim), i % int(p.dim));
}

// Feature i of the present stage's input, all heads counted.
__device__ __forceinline__ float read_input(const StepProblem& p, int64_t b, int i) {
  return read(p, block_shared<Stack>().in, b, i);
}

// Items of a phase are dealt to the blocks in turn; every kind of item goes on where the one before stopped.
struct Deal {
  int64_t next = 0;
  __device__ int64_t first(int64_t items) {
    const int64_t block = (int64_t(blockIdx.x) + gridDim.x - next % gridDim.x) % gridDim.x;
    next += items;
    return block;
  }
};

// Calls body(item) for this block's share of `items`.
template <class Body>
__device__ __forceinline__ void each(Deal& deal, int64_t items, const Body& body) {
  for (int64_t item = deal.first(items); item < items; item += gridDim.x) body(item);
}
// The same for this warp's share.
template <class Body>
__device__ __forceinline__ void each_warp(Deal& deal, int64_t items, const Body& body) {
  const int64_t blocks = gridDim.x;
  for (int64_t item = deal.first(min(items, blocks)) + blocks * warp_id(); item < items; item += blocks * kWarps) body(item);
}

}  // namespace hope::cuda::stepping
