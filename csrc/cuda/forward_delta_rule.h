// The write of a chunk by delta gradient descent: the part of ForwardScan that scan_delta_rule.h's systems are for. Every
// block forms the keys' overlaps for itself; those of hidden values are sums over all hidden units. The errors that W_out is
// written with are solved for by every block, those of W_in by each warp for its units, in registers.
#pragma once

#include "forward_scan.h"

namespace hope::cuda {

// Calls visit(s, t) for the slices t <= s in turn, from pair number `first` on, `count` of them at most.
template <class Traits>
template <class Visit>
__device__ __forceinline__ void ForwardScan<Traits>::each_pair(int first, int step, int count, const Visit& visit) const {
  const int slices = params_.rows / kSlice;
  int number = 0, left = count;
  for (int s = 0; s < slices; ++s)
    for (int t = 0; t <= s; ++t, ++number)
      if (number >= first && (number - first) % step == 0 && left > 0) visit(s, t), --left;
}

// From the hidden values of a slice of keys: what H W_out gives to the right side of the output layer's system, to outputs
// that are asked for with the keys, and, but for `self`, the errors over the values.
template <class Traits>
__device__ __forceinline__ void ForwardScan<Traits>::read_keys(const float (&h)[Traits::kInTiles][4], int stage, int slice) {
  const Objective objective = problem_.objective;
  const float residual = problem_.residual ? 1.0f : 0.0f;
  add_up(h, slice, true, [&](int row, int column, float x0, float x1) {
    uint32_t& place = pair_at(tensor(stage, kValues), row, column);
    const float2 k = Numbers::unpack(pair_at(tensor(stage, kKeys), row, column)), v = Numbers::unpack(place);
    const float before = delta_rule().before()[row];
    float2 right{before * x0, before * x1}, error = v;
    x0 = fmaf(residual, k.x, x0), x1 = fmaf(residual, k.y, x1);
    if (params_.shared_read) pair_at(tensor(stage, kQueries), row, column) = Numbers::pack(x0, x1);
    if (objective != Objective::self) {
      if (objective == Objective::l2) error = float2{x0 - v.x, x1 - v.y};
      if (objective == Objective::dot) error = float2{-v.x, -v.y};
      right.x += error.x, right.y += error.y;
      place = Numbers::pack(error.x, error.y);
    }
    delta_rule().right(row, column) = right;
  });
}

// X Y^T of rows in shared memory, a warp one pair of slices in turn: put(row of x, row of y, number).
template <class Traits>
template <class Put>
__device__ __forceinline__ void ForwardScan<Traits>::overlap_rows(const Element* left, const Element* right,
                                                                  const Put& put) const {
  const Lane lane(thread_);
  each_pair(thread_ / kWarp, Traits::kWarps, params_.rows, [&](int s, int t) {
    float x[2][4] = {};
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles / 2; ++j) {
      uint32_t a[4], b[4];
      ldmatrix(a, tile(left, s, 16 * j));
      ldmatrix(b, tile(right, t, 16 * j));
      Numbers::mma(x[0], a, {b[0], b[2]});
      Numbers::mma(x[1], a, {b[1], b[3]});
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        put(s * kSlice + lane.group + e / 2 * 8, t * kSlice + 8 * n + lane.pair + e % 2, x[n][e]);
  });
}
// K K^T.
template <class Traits>
__device__ __forceinline__ void ForwardScan<Traits>::overlap_keys(const Element* k) const {
  overlap_rows(k, k, [&](int row, int column, float x) { delta_rule().overlap(row, column) = x; });
}

// This warp's part of X Y^T of a pair of slices, from its units of both.
template <class Traits>
template <int kTiles>
__device__ __forceinline__ void ForwardScan<Traits>::overlap_units(const uint32_t (&left)[kTiles][2],
                                                                   const uint32_t (&right)[kTiles][2], float4* part) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < kTiles; m += 2)
      if (m + 1 < kTiles)
        Numbers::mma(x, {left[m][0], left[m][1], left[m + 1][0], left[m + 1][1]}, {right[m][n], right[m + 1][n]});
      else
        Numbers::mma(x, {left[m][0], left[m][1], 0, 0}, {right[m][n], 0});
    part[n * kWarp] = float4{x[0], x[1], x[2], x[3]};
  }
}

// H H^T, summed over the hidden units, so many pairs of slices at once as make a sum.
template <class Traits>
__device__ __forceinline__ void ForwardScan<Traits>::overlap_hidden() {
  constexpr int kTogether = Traits::kSumTiles / 2;
  const int slices = params_.rows / kSlice, pairs = slices * (slices + 1) / 2;
  for (int first = 0; first < pairs; first += kTogether) {
    float4* part = sum_.part(sums_);
    each_pair(first, 1, kTogether, [&](int s, int t) {
      uint32_t a[Traits::kUnitTiles][2], b[Traits::kUnitTiles][2];
      load_kept(s, kKeptHidden, a);
      load_kept(t, kKeptHidden, b);
      overlap_units(a, b, part);
      part += 2 * kWarp;
    });
    sum_.finish(sums_++, true, [&](int row, int column, float x0, float x1) {
      const int number = column / kSlice;
      each_pair(first + number, 1, 1, [&](int s, int t) {
        float* to = &delta_rule().overlap(s * kSlice + row, t * kSlice + column % kSlice);
        to[0] = x0, to[1] = x1;
      });
    });
  }
}

template <class Traits>
__device__ __forceinline__ void ForwardScan<Traits>::write_corrected(int piece, int stage) {
  const DeltaRule<Traits> rule = delta_rule();
  const Element *k = tensor(stage, kKeys), *delta = tensor(stage, kValues);
  overlap_keys(k);
  __syncthreads();  // the keys' overlaps are there
  const float *lr = of_tokens(problem_.step, piece), *alpha = retention(piece);
  rule.form_solver(kInSystem, lr, alpha, params_.span);
  overlap_hidden();
  __syncthreads();  // the hidden values' overlaps are there
  rule.form_solver(kOutSystem, lr, alpha, params_.span);
  __syncthreads();  // both systems' solvers and weights are there
  rule.solve_out();
  __syncthreads();  // the errors that W_out is written with are there

  const Lane lane(thread_);
  Turned turned;
  turn_out(turned);
  const float *weights_in = rule.weights(kInSystem), *weights_out = rule.weights(kOutSystem);
  const float decay = rule.decay(params_.span), scale_in = scale_of(weights_in), scale_out = scale_of(weights_out);
  multiply_state(decay / scale_in, decay / scale_out);
  for (int s = 0; s < params_.rows / kSlice; ++s) {
    const int row = s * kSlice + lane.group;
    uint32_t errors[Traits::kInTiles][2], hidden[Traits::kUnitTiles][2];
    {
      float r[Traits::kInTiles][4];
      right_of_inputs(r, turned, delta, s);
      rule.solve(kInSystem, s, r, [&](int t, uint32_t (&b)[Traits::kInTiles][2]) { load_kept(t, kKeptErrors, b); });
      pack(errors, r);
      turn(errors);
      store_kept(s, kKeptErrors, errors);
      pack(errors, r, weights_in[row] / scale_in, weights_in[row + 8] / scale_in);
    }
    load_kept(s, kKeptHidden, hidden);
    weigh(hidden, weights_out[row] / scale_out, weights_out[row + 8] / scale_out);
    add_slice(errors, hidden, k, rule.corrected(), s);
  }
  if constexpr (Traits::kType == DType::float16) multiply_state(scale_in, scale_out);
}

// E + diag(before) (K W_in) of one slice, this warp's units; E = (delta W_out^T) * act'(z), of a glu through its product.
template <class Traits>
__device__ __forceinline__ void ForwardScan<Traits>::right_of_inputs(float (&r)[Traits::kInTiles][4],
                                                                     const Turned& turned, const Element* delta,
                                                                     int slice) const {
  constexpr int kInputs = Traits::kInputs;
  const Lane lane(thread_);
  const float* before = delta_rule().before() + slice * kSlice + lane.group;
  float e[Traits::kUnitTiles][4];
  multiply_back(e, turned, delta, slice);
  uint32_t products[Traits::kInTiles][2];
  load_kept(slice, kKeptErrors, products);
  with_activation<Traits::kType>(problem_.activation, params_.sigmoidal, [&](auto activate) {
#pragma unroll
    for (int n = 0; n < Traits::kUnitTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto product = [&](int input) {
          const float2 pair = Numbers::unpack(products[kInputs * n + input][i / 2]);
          return i % 2 ? pair.y : pair.x;
        };
        const float z = product(0), b = before[i / 2 * 8];
        float h = z, slope;
        activate(h, slope);
        if constexpr (Traits::kForm == Form::glu) {
          const float up = product(1);
          r[2 * n + 1][i] = fmaf(e[n][i], h, b * up);
          slope *= up;
        }
        r[kInputs * n][i] = fmaf(e[n][i], slope, b * z);
      }
  });
}

}  // namespace hope::cuda
