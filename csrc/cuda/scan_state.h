// The state of one (sequence, head), spread over the registers of a block, and its way from and to global memory.
//
// It goes through shared memory, one matrix at a time: there a thread finds its numbers at distances known when compiling,
// and the block moves whole rows. Straight from the registers, a thread would need an address for every number it holds.
#pragma once

#include "pairs.h"
#include "scan_traits.h"

namespace hope::cuda {

// This thread's part of W_in^T [kInputs * units, D] and W_out^T [D, units] of its warp, as accumulators of 16x8 tiles.
template <class Traits>
struct ScanState {
  float in[Traits::kInTiles / 2][Traits::kDimTiles][4];
  float out[Traits::kDimTiles / 2][Traits::kUnitTiles][4];
};

// Rows and columns of a thread's accumulators.
struct Lane {
  int group, pair;  // row within 8, first of two columns within 8
  __device__ __forceinline__ explicit Lane(unsigned thread) : group(thread % kWarp / 4), pair(2 * (thread % 4)) {}
};

// One matrix of a state in shared memory, [in, out] and whole: W_in [kDim, kHidden] (kOut false; of a glu the one of kInput)
// or W_out [kHidden, kDim].
template <class Traits, bool kOut, int kInput = 0>
class StagedMatrix {
  using Element = typename Pair<Traits::kType>::Element;

 public:
  static constexpr int kRows = kOut ? Traits::kHidden : Traits::kDim, kColumns = kOut ? Traits::kDim : Traits::kHidden;

  __device__ __forceinline__ StagedMatrix(float* shared, unsigned thread) : shared_(shared), thread_(thread) {
    const Lane lane(thread);
    const int unit = thread / kWarp * Traits::kUnits;
    own_ = shared_ + (kOut ? (unit + lane.pair) * kColumns + lane.group : lane.pair * kColumns + unit + lane.group);
  }

  // Between shared memory and this thread's accumulators of tile (i, j).
  __device__ __forceinline__ void get(int i, int j, float (&x)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (holds(e)) x[e] = own_[distance(i, j, e)];
  }
  __device__ __forceinline__ void put(int i, int j, const float (&x)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (holds(e)) own_[distance(i, j, e)] = x[e];
  }
  __device__ __forceinline__ void put(int i, int j, const float4& x) const { put(i, j, {x.x, x.y, x.z, x.w}); }

  // From a matrix of any strides, number `first` of the view's on; zero beyond its size.
  __device__ __forceinline__ void load(const MatrixView& view, int64_t first, int rows, int columns) const {
    const bool wide = view.dtype == DType::float32;
    for (int r = thread_ / kWarp; r < kRows; r += Traits::kWarps)
#pragma unroll 4
      for (int c = thread_ % kWarp; c < kColumns; c += kWarp) {
        const int64_t at = first + r * view.in + c * view.out;
        float x = 0.0f;
        if (r < rows && c < columns)
          x = wide ? static_cast<const float*>(view.data)[at] : float(static_cast<const Element*>(view.data)[at]);
        shared_[r * kColumns + c] = x;
      }
  }
  // To a matrix whose rows begin `pitch` numbers apart.
  __device__ __forceinline__ void store(float* to, int rows, int columns, int pitch) const {
    for (int r = thread_ / kWarp; r < rows; r += Traits::kWarps)
      for (int c = thread_ % kWarp; c < columns; c += kWarp) to[int64_t(r) * pitch + c] = shared_[r * kColumns + c];
  }

 private:
  static constexpr bool kHalves = !kOut && Traits::kInputs == 2;
  // Whether element e of an accumulator belongs to this matrix.
  static constexpr __device__ __forceinline__ bool holds(int e) { return !kHalves || e / 2 == kInput; }
  // Rows of an accumulator of W_in^T are hidden units, of one of W_out^T features.
  static constexpr __device__ __forceinline__ int distance(int i, int j, int e) {
    return (8 * j + e % 2) * kColumns + (kHalves ? 8 * i : 16 * i + e / 2 * 8);
  }

  float *shared_, *own_;
  unsigned thread_;
};

// Memory for a state in the order of the registers: accumulators of one tile lie side by side, one thread beside the other.
// A thread sees only its own numbers.
template <class Traits>
class ParkedState {
 public:
  static constexpr int kInTiles = Traits::kInTiles / 2 * Traits::kDimTiles;
  static constexpr int kTiles = kInTiles + Traits::kDimTiles / 2 * Traits::kUnitTiles;
  static constexpr int64_t kBytes = int64_t(kTiles) * Traits::kThreads * sizeof(float4);

  __device__ __forceinline__ ParkedState(void* workspace, int64_t task)
      : own_(static_cast<float4*>(workspace) + task * kTiles * Traits::kThreads + threadIdx.x) {}

  __device__ __forceinline__ float4& in(int i, int j) const { return own_[(i * Traits::kDimTiles + j) * Traits::kThreads]; }
  __device__ __forceinline__ float4& out(int i, int j) const {
    return own_[(kInTiles + i * Traits::kUnitTiles + j) * Traits::kThreads];
  }

 private:
  float4* own_;
};

__device__ __forceinline__ float4 four(const float (&x)[4], float factor = 1.0f) {
  return float4{factor * x[0], factor * x[1], factor * x[2], factor * x[3]};
}

// Calls visit(i, j, accumulators) for every tile of W_in, of W_out, that this thread holds.
template <class Traits, class Visit>
__device__ __forceinline__ void each_in(ScanState<Traits>& state, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < Traits::kInTiles / 2; ++i)
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles; ++j) visit(i, j, state.in[i][j]);
}
template <class Traits, class Visit>
__device__ __forceinline__ void each_out(ScanState<Traits>& state, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < Traits::kDimTiles / 2; ++i)
#pragma unroll
    for (int j = 0; j < Traits::kUnitTiles; ++j) visit(i, j, state.out[i][j]);
}

}  // namespace hope::cuda
