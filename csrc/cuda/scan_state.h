// The state of one (sequence, head), spread over the registers of a block, and its way from and to global memory.
#pragma once

#include "pairs.h"
#include "scan_traits.h"

namespace hope::cuda {

// This thread's part of W_in^T [units, D] and W_out^T [D, units] of its warp, as accumulators of 16x8 tiles.
template <class Traits>
struct ScanState {
  float in[Traits::kUnitTiles / 2][Traits::kDimTiles][4];
  float out[Traits::kDimTiles / 2][Traits::kUnitTiles][4];
};

// Rows and columns of a thread's accumulators.
struct Lane {
  int group, pair;  // row within 8, first of two columns within 8
  __device__ __forceinline__ Lane() : group(threadIdx.x % kWarp / 4), pair(2 * (threadIdx.x % 4)) {}
  __device__ __forceinline__ int row(int e) const { return group + 8 * (e / 2); }
  __device__ __forceinline__ int column(int e) const { return pair + e % 2; }
};

// Calls visit(value, d, h) for every number of W_in, then W_out, that this thread holds; d and h are feature and hidden unit.
template <class Traits, class Visit>
__device__ __forceinline__ void each_in(ScanState<Traits>& state, const Visit& visit) {
  const Lane lane;
  const int unit = threadIdx.x / kWarp * Traits::kUnits;
#pragma unroll
  for (int i = 0; i < Traits::kUnitTiles / 2; ++i)
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(state.in[i][j][e], 8 * j + lane.column(e), unit + 16 * i + lane.row(e));
}
template <class Traits, class Visit>
__device__ __forceinline__ void each_out(ScanState<Traits>& state, const Visit& visit) {
  const Lane lane;
  const int unit = threadIdx.x / kWarp * Traits::kUnits;
#pragma unroll
  for (int i = 0; i < Traits::kDimTiles / 2; ++i)
#pragma unroll
    for (int j = 0; j < Traits::kUnitTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(state.out[i][j][e], 16 * i + lane.row(e), unit + 8 * j + lane.column(e));
}

__device__ __forceinline__ float load_number(const float* p) { return *p; }
__device__ __forceinline__ float load_number(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load_number(const __half* p) { return __half2float(*p); }

// Matrices of this (sequence, head), of numbers of type From and any strides with which one matrix spans less than 2^31
// elements; zero beyond the memory's sizes.
template <class From, class Traits>
__device__ __forceinline__ void load_state_as(ScanState<Traits>& state, const MatrixView& in, const MatrixView& out,
                                              int64_t sequence, int64_t head, int dim, int hidden) {
  const From* w_in = static_cast<const From*>(in.data) + sequence * in.sequence + head * in.head;
  const From* w_out = static_cast<const From*>(out.data) + sequence * out.sequence + head * out.head;
  const int in_d = int(in.in), in_h = int(in.out), out_h = int(out.in), out_d = int(out.out);
  each_in(state, [&](float& x, int d, int h) {
    x = d < dim && h < hidden ? load_number(w_in + (d * in_d + h * in_h)) : 0.0f;
  });
  each_out(state, [&](float& x, int d, int h) {
    x = d < dim && h < hidden ? load_number(w_out + (h * out_h + d * out_d)) : 0.0f;
  });
}

// Both views have one dtype: float32 or that of the tokens.
template <class Traits>
__device__ __forceinline__ void load_state(ScanState<Traits>& state, const MatrixView& in, const MatrixView& out,
                                           int64_t sequence, int64_t head, int dim, int hidden) {
  using Element = typename Pair<Traits::kType>::Element;
  if (in.dtype == DType::float32)
    load_state_as<float>(state, in, out, sequence, head, dim, hidden);
  else
    load_state_as<Element>(state, in, out, sequence, head, dim, hidden);
}

// To contiguous matrices [in, out] of float32: eight lanes of a warp write eight neighbours, 32 bytes.
template <class Traits>
__device__ __forceinline__ void store_state(ScanState<Traits>& state, float* w_in, float* w_out, int dim, int hidden) {
  each_in(state, [&](float& x, int d, int h) {
    if (d < dim && h < hidden) w_in[d * hidden + h] = x;
  });
  each_out(state, [&](float& x, int d, int h) {
    if (d < dim && h < hidden) w_out[h * dim + d] = x;
  });
}

}  // namespace hope::cuda
