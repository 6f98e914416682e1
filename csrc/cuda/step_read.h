// Reading a memory with the token's key, piece by piece: the units of a piece belong to one warp.
//
// A piece of an mlp is 32 columns of W_in and the 32 rows of W_out behind them: 256 D bytes, read once, 16 bytes a lane.
#pragma once

#include "cuda/step_common.h"
#include "cuda/step_products.h"

namespace hope::cuda::stepping {

// What a warp keeps of the pair of sequence and head it reads or writes.
struct WarpShared {
  float key[kMaxStepDim], hidden[kUnits];
  float delta[kMaxStepDim], error[kUnits];  // written memories: f(key) - v, and its gradient at the hidden units
};
struct ReadShared {
  WarpShared warp[kWarps];
  float part[kWarps][kMaxStepDim];
};

// key = x_n / |x_n|, rounded to the tokens' dtype, into this warp's shared memory.
__device__ void make_key(const StepProblem& p, int64_t pair, float* key) {
  const int64_t b = pair / p.heads;
  const int n = int(pair % p.heads), dim = int(p.dim);
  float square = 0;
  __syncwarp();  // the piece before has been read
  for (int d = lane_id(); d < dim; d += 32) {
    const float x = read(p, block_shared<Stack>().in, b, n, d);
    key[d] = x;
    square = fmaf(x, x, square);
  }
  const float scale = 1.0f / sqrtf(warp_sum(square) + kNormEps);
  for (int d = lane_id(); d < dim; d += 32) key[d] = rounded(p.dtype, key[d] * scale);
  __syncwarp();
}

// z[j] = sum over d of x[d] W[d][unit + j], W [D, hidden], for unit = 4 (lane % 8); the same in the lanes of equal lane % 8.
__device__ __forceinline__ void project_units(float (&z)[4], const float* weights, int64_t hidden, int dim, int units,
                                              const float* x) {
  const int unit = 4 * (lane_id() % 8);
  for (float& one : z) one = 0;
  if (unit < units) {
#pragma unroll 8
    for (int d = lane_id() / 8; d < dim; d += 4) {
      const Four w = load_four(weights + d * hidden + unit);
      for (int j = 0; j < 4; ++j) z[j] = fmaf(x[d], w.x[j], z[j]);
    }
  }
  for (float& one : z) {
    one += __shfl_xor_sync(kAllLanes, one, 8);
    one += __shfl_xor_sync(kAllLanes, one, 16);
  }
}

// Where a pair's piece lies in a weight: [D, H] in front of the hidden units, [inner, D] behind them.
__device__ __forceinline__ int64_t before_units(const StepProblem& p, const StepLevel& level, int64_t pair, int64_t unit) {
  return pair * p.dim * level.hidden + unit;
}
__device__ __forceinline__ int64_t behind_units(const StepProblem& p, const StepLevel& level, int64_t pair, int64_t unit) {
  return (pair * inner_size(p, level) + unit) * p.dim;
}
__device__ __forceinline__ int units_of(const StepProblem& p, const StepLevel& level, int piece) {
  return int(min(int64_t(kUnits), inner_size(p, level) - piece * kUnits));
}

// What a piece adds to f(key) - key: features 4 (lane % key_lanes) .. of it in y, in the lanes below key_lanes. The key is
// in the warp's shared memory. The lanes must meet before the next piece.
__device__ void read_piece(const Arguments& a, const StepLevel& level, int64_t pair, int piece, WarpShared& warp,
                           Four& y) {
  const StepProblem& p = a.p;
  const int lane = lane_id(), dim = int(p.dim), unit0 = piece * kUnits, units = units_of(p, level, piece);
  if (level.form == Form::linear) {
    if (lane < units) warp.hidden[lane] = warp.key[unit0 + lane];
  } else {
    const int64_t at = before_units(p, level, pair, unit0);
    float z[4], slope;
    project_units(z, level.weights[0] + at, level.hidden, dim, units, warp.key);
    for (float& one : z) one = activated(level.activation, one, slope);
    if (level.form == Form::glu) {
      float up[4];
      project_units(up, level.weights[1] + at, level.hidden, dim, units, warp.key);
      for (int j = 0; j < 4; ++j) z[j] *= up[j];
    }
    if (lane < 8)
      for (int j = 0; j < 4; ++j) warp.hidden[4 * lane + j] = z[j];
  }
  __syncwarp();
  const int d = 4 * (lane % a.key_lanes);
  y = {};
  if (d < dim) {
    const float* weights = level.weights[last_weight(level.form)] + behind_units(p, level, pair, unit0) + d;
#pragma unroll 8
    for (int u = lane / a.key_lanes; u < units; u += 32 / a.key_lanes) {
      const Four w = load_four(weights + u * dim);
      const float h = warp.hidden[u];
      for (int j = 0; j < 4; ++j) y.x[j] = fmaf(h, w.x[j], y.x[j]);
    }
  }
  for (int lanes = a.key_lanes; lanes < 32; lanes *= 2)
    for (float& one : y.x) one += __shfl_xor_sync(kAllLanes, one, lanes);
}

// Keeps the key, D features, each by the lane (or thread) that calls.
__device__ __forceinline__ void keep_key(const StepProblem& p, const StepLevel& level, int64_t pair, int d, float x) {
  const int64_t b = pair / p.heads;
  put_number(p.dtype, level.k, kept_at(p, level, b, slot_of(level, b), pair % p.heads) * p.dim + d, x);
}

// A level that is split: pieces are dealt to the warps of all blocks; the sums of each are kept.
__device__ void read_split(const Arguments& a, const StepLevel& level, float* sums, Deal& deal) {
  const StepProblem& p = a.p;
  if (!written(level)) return;
  WarpShared& warp = dynamic_shared<ReadShared>()->warp[warp_id()];
  const int pieces = piece_count(p, level), dim = int(p.dim);
  __syncthreads();  // shared memory is another item's until here
  each_warp(deal, p.batch * p.heads * pieces, [&](int64_t item) {
    const int64_t pair = item / pieces;
    const int piece = int(item % pieces);
    make_key(p, pair, warp.key);
    Four y;
    read_piece(a, level, pair, piece, warp, y);
    const int d = 4 * lane_id();
    if (lane_id() < a.key_lanes && d < dim) {
      if (piece == 0)
        for (int j = 0; j < 4; ++j) y.x[j] += warp.key[d + j];
      store_four(sums + item * dim + d, y);
    }
    if (piece == 0)
      for (int i = lane_id(); i < dim; i += 32) keep_key(p, level, pair, i, warp.key[i]);
  });
}

// A level that is not split: a block reads a pair. Output, key and prediction are kept.
__device__ void read_whole(const Arguments& a, const StepLevel& level, float* sums, int64_t pair) {
  const StepProblem& p = a.p;
  ReadShared& shared = *dynamic_shared<ReadShared>();
  const int pieces = piece_count(p, level), dim = int(p.dim), tid = int(threadIdx.x);
  __syncthreads();  // shared memory is another item's until here
  WarpShared& warp = shared.warp[warp_id()];
  make_key(p, pair, warp.key);
  const float key = tid < dim ? warp.key[tid] : 0.0f;
  float sum = key;
#pragma unroll 1
  for (int first = 0; first < pieces; first += kWarps) {
    if (first + warp_id() < pieces) {
      Four y;
      read_piece(a, level, pair, first + warp_id(), warp, y);
      if (lane_id() < a.key_lanes && 4 * lane_id() < dim) store_four(shared.part[warp_id()] + 4 * lane_id(), y);
    }
    __syncthreads();
    if (tid < dim)
      for (int w = 0; w < min(kWarps, pieces - first); ++w) sum += shared.part[w][tid];
    __syncthreads();
  }
  if (tid >= dim) return;
  const int64_t b = pair / p.heads;
  sums[pair * dim + tid] = sum;
  level.predictions[kept_at(p, level, b, slot_of(level, b), pair % p.heads) * dim + tid] = sum;
  keep_key(p, level, pair, tid, key);
  if (void* output = block_shared<Stack>().output) put_number(p.dtype, output, pair * dim + tid, sum);
}

}  // namespace hope::cuda::stepping
