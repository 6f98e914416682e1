// The adjoint of a chunk's write by delta gradient descent: the part of BackwardScan that scan_delta_adjoint.h's systems are
// for. As with `gd`, whose names these are, but the layers are written with corrected errors R_in, R_out and weights u_in,
// u_out of their own (signs included), and M_in, M_out are what reaches the inputs through the overlaps:
//   (1) z = K W_in, h = act(z), P = h W_out, delta; overlaps, both systems, R_out          P summed over the warps
//   (2) X = h A_out  summed;  D_out from X, M_out from D_out R_out^T
//   (3) R_in from (delta W_out^T) act'(z) + before z, slice by slice, each warp its units
//   (4) backwards: D_in from K A_in; d_p = D_in act'(z), d_z = D_in p act''(z) + before D_in + (u_out R_out A_out^T) act'(z);
//       d_delta = D_out + d_p W_out  summed;  d_F = d_delta (where the errors depend on it) + before D_out
//   (5) M_in from D_in R_in^T  summed
//   (6) d_z += (d_F W_out^T + M_out h) act'(z); d_K = d_z W_in^T + (u_in R_in) A_in^T + M_in K (+ d_delta)  summed
//       A_out <- decay A_out + delta^T d_p + d_F^T h;  A_in <- decay A_in + d_z^T K
//
// FLOPs per token of an mlp beside those of `gd`: 4 D H, and C (7 D + 6 H) for the overlaps, the solutions and their adjoint.
// What threads keep of a key is 10 H bytes instead of 6 H (of a glu 16 H instead of 10 H).
#pragma once

#include "backward_scan.h"

namespace hope::cuda {

template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::write_adjoint_delta() {
  carry_adjoint(piece(), slot_before(piece()));
  form_delta_and_products();
  form_systems(piece());
  output_errors_adjoint(piece());

  begin_phase();
  const Element* keys = tensor(kChunkKeys);
  overlap_rows(keys, keys, [&](int row, int column, float x) { systems().overlap(row, column) = x; });
  __syncthreads();  // the keys' overlaps are there again
  systems().form_between(of_tokens(problem_.step, piece()), retention(piece()), back_.rebuild.span);
  correct_errors();
  errors_adjoint_delta();
  __syncthreads();  // the adjoint of the last slice's errors is complete, and so are the warps' sums
  overlap_kept<Traits::kInTiles>(
      [&](int s, PackedInputs& x) { recall(s, Parts::kDErrors, x); },
      [&](int s, PackedInputs& x) { recall(s, Parts::kErrors, x); },
      [&](int row, int column, float x) {
        if (column < row) systems().add_pair(kInSystem, row, column, -x, scale());
      });
  coefficients_adjoint(kInSystem, piece());
  if (back_.result.retention) {
    float of_decay = 0.0f;
    for (int w = 0; w < Traits::kWarps; ++w) of_decay += scalar_sums(0)[w];
    systems().walk_products(retention(piece()), back_.rebuild.span, of_decay);
  }

  const float factor = systems().decay(back_.rebuild.span) / scale();
  const auto decay = [&](int, int, float(&x)[4]) { multiply(x, factor); };
  each_out(state_, decay);
  keys_adjoint_delta();
  each_in(state_, decay);
  store_coefficients_delta(piece());
  add_kept_to_in();
}

// (1) The errors of the keys and what the layers make of them; the right side of the output layer's system.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::form_delta_and_products() {
  begin_phase();
  const auto rule = systems();
  const Objective objective = problem_.objective;
  const bool self = objective == Objective::self;
  const float residual = problem_.residual ? 1.0f : 0.0f;
  Element *keys = tensor(kChunkKeys), *targets = tensor(kTargets), *delta = tensor(kDelta), *products = tensor(kProducts);
#pragma unroll 1
  for (int s = 0; s < slices(); ++s) {
    PackedUnits hidden, difference;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      // Of `self` f(k) - f(v) is one product: that of the difference of their hidden values.
      Group h = {};
#pragma unroll 1
      for (int of_keys = self ? 0 : 1; of_keys < 2; ++of_keys) {
        Group x;
        by_weight_in(x, of_keys ? keys : targets, s, i);
        activate(x);
        pack(hidden, i, x);
        each_unit([&](int n, int e, int) { h[n][e] = x[n][e] - h[n][e]; });
      }
      keep(s, Parts::kHidden, i, hidden);
      if (self) pack(difference, i, h);
    }
    sum_parts(
        self ? 2 * s : s, s, true, [&](int p, float(&y)[2][4]) { add_weight_out(y, hidden, p); },
        [&](int row, int column, float x0, float x1) {
          pair_at(products, row, column) = Numbers::pack(x0, x1);
          const float before = rule.before()[row];
          float2 right{before * x0, before * x1};
          if (!self) {
            const float2 k = Numbers::unpack(pair_at(keys, row, column)), v = Numbers::unpack(pair_at(delta, row, column));
            float2 error = v;
            if (objective == Objective::l2) error = float2{fmaf(residual, k.x, x0) - v.x, fmaf(residual, k.y, x1) - v.y};
            if (objective == Objective::dot) error = float2{-v.x, -v.y};
            pair_at(delta, row, column) = Numbers::pack(error.x, error.y);
            right.x += error.x, right.y += error.y;
          }
          rule.right(row, column) = right;
        });
    if (self)
      sum_parts(
          2 * s + 1, s, true, [&](int p, float(&y)[2][4]) { add_weight_out(y, difference, p); },
          [&](int row, int column, float x0, float x1) {
            const float2 k = Numbers::unpack(pair_at(keys, row, column)), v = Numbers::unpack(pair_at(targets, row, column));
            x0 = fmaf(residual, k.x - v.x, x0), x1 = fmaf(residual, k.y - v.y, x1);
            pair_at(delta, row, column) = Numbers::pack(x0, x1);
            float2& right = rule.right(row, column);
            right = float2{right.x + x0, right.y + x1};
          });
  }
}

// (1) What solves both systems, of which the overlaps of hidden values are left, and the errors that W_out is written with.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::form_systems(int piece) {
  begin_phase();
  const auto rule = systems();
  const float *lr = of_tokens(problem_.step, piece), *alpha = retention(piece);
  const int span = back_.rebuild.span;
  const Element* keys = tensor(kChunkKeys);
  overlap_rows(keys, keys, [&](int row, int column, float x) { rule.overlap(row, column) = x; });
  __syncthreads();  // the keys' overlaps are there
  rule.form_solver(kInSystem, lr, alpha, span);
  const auto hidden = [&](int s, PackedUnits& x) { recall(s, Parts::kHidden, x); };
  overlap_kept<Traits::kUnitTiles>(hidden, hidden, [&](int row, int column, float x) { rule.overlap(row, column) = x; });
  __syncthreads();  // the hidden values' overlaps are there
  rule.form_solver(kOutSystem, lr, alpha, span);
  __syncthreads();  // both systems' solvers and weights are there
  const float *in = rule.weights(kInSystem), *out = rule.weights(kOutSystem);
  const float scale = fmaxf(scale_of(in), scale_of(out));
  if (thread_ == 0) here_.scale = scale;
  for (int row = thread_; row < back_.rebuild.rows; row += Traits::kThreads)
    steps(0)[row] = in[row] / scale, steps(1)[row] = out[row] / scale;
  rule.form_between(lr, alpha, span);
  rule.solve_out();
}

// X Y^T, summed over the units of the warps, of slices that left and right load: finish(row of x, row of y, number).
template <class Traits>
template <int kTiles, class Left, class Right, class Finish>
__device__ __forceinline__ void BackwardScan<Traits>::overlap_kept(const Left& left, const Right& right,
                                                                   const Finish& finish) {
  begin_phase();
  constexpr int kTogether = Traits::kDimTiles / 2;  // pairs of slices that make a sum
  const int pairs = slices() * (slices() + 1) / 2;
#pragma unroll 1
  for (int number = 0; number * kTogether < pairs; ++number) {
    sum_tiles(
        number, true,
        [&](float4* own) {
          each_pair(number * kTogether, 1, kTogether, [&](int s, int t) {
            uint32_t x[kTiles][2], y[kTiles][2];
            left(s, x);
            right(t, y);
            overlap_units(x, y, own);
            own += 2 * kWarp;
          });
        },
        [&](int row, int column, float x0, float x1) {
          each_pair(number * kTogether + column / kSlice, 1, 1, [&](int s, int t) {
            finish(s * kSlice + row, t * kSlice + column % kSlice, x0);
            finish(s * kSlice + row, t * kSlice + column % kSlice + 1, x1);
          });
        });
  }
}

// (2) The adjoint of the errors that W_out is written with, and the gradients through their system.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::output_errors_adjoint(int piece) {
  begin_phase();
  const auto rule = systems();
  const StateTiles adjoint{state_};
#pragma unroll 1
  for (int s = 0; s < slices(); ++s) {
    PackedUnits hidden;
    recall(s, Parts::kHidden, hidden);
    sum_parts(
        s, true, [&](int p, float(&y)[2][4]) { add_adjoint_out(y, hidden, p, adjoint); },
        [&](int row, int column, float x0, float x1) { rule.right(row, column) = float2{x0, x1}; });
  }
  begin_phase();
  // No barrier: the columns that a warp solves for are those it has summed.
  static_assert(Traits::kDimTiles <= Traits::kWarps, "a warp sums a tile of each slice, and solves for its columns");
  Element* d_errors = tensor(kDDelta);
  rule.template solve_rows<true>(d_errors, [&](int row, int column) {
    const float2 x = rule.right(row, column);
    const float w = steps(1)[row];
    return float2{w * x.x, w * x.y};
  });
  __syncthreads();  // the adjoint of the corrected errors is there
  begin_phase();
  Element *corrected = rule.corrected(), *products = tensor(kProducts);
  for (int row = thread_ / kWarp; row < back_.rebuild.rows; row += Traits::kWarps) {
    float d_weight = 0.0f, d_before = 0.0f;
    for (int column = thread_ % kWarp * 2; column < Traits::kDim; column += 2 * kWarp) {
      const float2 x = rule.right(row, column), r = Numbers::unpack(pair_at(corrected, row, column));
      const float2 d = Numbers::unpack(pair_at(d_errors, row, column)), y = Numbers::unpack(pair_at(products, row, column));
      d_weight = fmaf(x.x, r.x, fmaf(x.y, r.y, d_weight));
      d_before = fmaf(d.x, y.x, fmaf(d.y, y.y, d_before));
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      d_weight += __shfl_xor_sync(0xffffffffu, d_weight, distance);
      d_before += __shfl_xor_sync(0xffffffffu, d_before, distance);
    }
    if (thread_ % kWarp == 0) row_sums(0)[row] = d_weight, row_sums(1)[row] = d_before;
  }
  overlap_rows(d_errors, corrected, [&](int row, int column, float x) {
    if (column < row) rule.add_pair(kOutSystem, row, column, -x, scale());
  });
  coefficients_adjoint(kOutSystem, piece);
  __syncthreads();  // nobody reads what the overlaps' columns left any more
}

// Gradients of coefficients through a system whose pairs are done.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::coefficients_adjoint(System system, int piece) {
  __syncthreads();  // the pairs of the system are done, and so are the sums of rows
  begin_phase();
  const auto rule = systems();
  const int rows = back_.rebuild.rows, parts = system == kInSystem ? Traits::kWarps : 1, row = thread_;
  if (row < rows) {
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int w = 0; w < parts; ++w) sums[i] += row_sums(i)[w * rows + row];
    rule.form_gradients(system, of_tokens(problem_.step, piece), retention(piece), back_.rebuild.span, -sums[0],
                        scale() * sums[1], scale());
  }
  __syncthreads();  // the gradients through the system are there
  rule.add_retention(system, back_.rebuild.span);
}

// (3) The errors that W_in is written with.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::correct_errors() {
  begin_phase();
  const Lane lane(thread_);
  const auto rule = systems();
#pragma unroll 1
  for (int s = 0; s < slices(); ++s) {
    const float* before = rule.before() + s * kSlice + lane.group;
    PackedInputs errors;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Group h, products, slopes, error;
      by_weight_in(h, tensor(kChunkKeys), s, i);
      each_input([&](int n, int e, int) { products[n][e] = h[n][e]; });
      activate(h, slopes);
      by_weight_out(error, tensor(kDelta), s, i);
      spread(error, [&](int n, int e, float y) { return fmaf(y, slopes[n][e], before[e / 2 * 8] * products[n][e]); });
      rule.solve(kInSystem, s, error, [&](int t, PackedGroup& x) { recall_turned(t, Parts::kErrors + i * kInputs, x); });
      pack(errors, i, error);
      keep(s, Parts::kErrors, i, errors);
    }
  }
}

// (4) The adjoint of these, of the errors of the hidden units, and of delta, all divided by the scale.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::errors_adjoint_delta() {
  begin_phase();
  const Lane lane(thread_);
  const StateTiles adjoint{state_};
  const auto rule = systems();
  const bool predicted = predicts();
#pragma unroll 1
  for (int s = slices() - 1; s >= 0; --s) {
    const Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta);
    Element *d_delta = tensor(kDDelta), *d_outputs = tensor(kProducts);
    const int first = s * kSlice + lane.group;
    const float *in = steps(0) + first, *out = steps(1) + first, *before = rule.before() + first;
    float d_weight[2] = {0.0f, 0.0f}, d_before[2] = {0.0f, 0.0f};
    PackedInputs d_errors, d_inputs;
    PackedUnits d_passed;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Group x;
      by_adjoint_in(x, keys, s, i, adjoint);
      {
        PackedGroup packed;
        Group corrected;
        recall(s, Parts::kErrors + i * kInputs, packed);
        unpack(corrected, packed, 0);
        each_input([&](int n, int e, int r) {
          d_weight[r] = fmaf(x[n][e], corrected[n][e], d_weight[r]);
          x[n][e] *= in[8 * r];
        });
      }
      rule.template solve<true>(kInSystem, s, x,
                                [&](int t, PackedGroup& y) { recall_turned(t, Parts::kDErrors + i * kInputs, y); });
      pack(d_errors, i, x);
      keep(s, Parts::kDErrors, i, d_errors);
      Group h, slopes, curves;
      by_weight_in(h, keys, s, i);
      each_input([&](int n, int e, int r) { d_before[r] = fmaf(x[n][e], h[n][e], d_before[r]); });
      activate(h, slopes, curves);
      by_weight_out(h, delta, s, i);
      spread(h, [&](int n, int e, float y) {
        curves[n][e] *= y;
        return before[e / 2 * 8] * x[n][e];
      });
      Group& direct = h;
      bend(curves, x, slopes);
      pack(d_passed, i, x);
      each_input([&](int n, int e, int) { direct[n][e] += curves[n][e]; });
      by_adjoint_out(x, rule.corrected(), s, i, adjoint);
      each_unit([&](int n, int e, int r) { x[n][e] *= out[8 * r]; });
      spread(x, [&](int n, int e, float y) { return fmaf(y, slopes[n][e], direct[n][e]); });
      pack(d_inputs, i, x);
      keep(s, Parts::kDPassed, i, d_passed);
      keep(s, Parts::kDInputs, i, d_inputs);
    }
    sum_rows(0, s, d_weight);
    sum_rows(1, s, d_before);
    sum_parts(
        s, true, [&](int p, float(&y)[2][4]) { add_weight_out(y, d_passed, p); },
        [&](int row, int column, float x0, float x1) {
          uint32_t& place = pair_at(d_delta, row, column);
          const float2 d = Numbers::unpack(place);
          const float b = rule.before()[row], from_errors = predicted ? 1.0f : 0.0f;
          x0 += d.x, x1 += d.y;
          place = Numbers::pack(x0, x1);
          pair_at(d_outputs, row, column) = Numbers::pack(fmaf(b, d.x, from_errors * x0), fmaf(b, d.y, from_errors * x1));
        });
  }
}

// (6) The layers at the keys: their gradient over delta, and the adjoint of W_out.
template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::keys_adjoint_delta() {
  begin_phase();
  const auto rule = systems();
  Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta), *d_delta = tensor(kDDelta), *d_outputs = tensor(kProducts);
  const StateTiles adjoint{state_};
  const float residual = predicts() && problem_.residual ? 1.0f : 0.0f;
#pragma unroll 1
  for (int s = 0; s < slices(); ++s) {
    PackedInputs d_inputs;
    PackedUnits hidden;
    recall(s, Parts::kDInputs, d_inputs);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Group x;
      by_weight_out(x, d_outputs, s, i);
      for (int t = 0; t < slices(); ++t) {
        uint32_t a[4], b[2][2];
        ldmatrix(a, rule.tile(kOutSystem, s, t));
        recall_turned(t, Parts::kHidden + i, b);
        Numbers::mma(x[0], a, b[0]);
        Numbers::mma(x[kInputs], a, b[1]);
      }
      Group h, slopes, direct;
      by_weight_in(h, keys, s, i);
      activate(h, slopes);
      pack(hidden, i, h);
      unpack(direct, d_inputs, i);
      spread(x, [&](int n, int e, float y) { return fmaf(y, slopes[n][e], direct[n][e]); });
      pack(d_inputs, i, x);
      keep(s, Parts::kDInputs, i, d_inputs);
    }
    add_to_out(hidden, d_outputs, s);
    {
      PackedUnits d_passed;
      recall(s, Parts::kDPassed, d_passed);
      add_to_out(d_passed, delta, s);
    }
    PackedInputs errors;
    recall(s, Parts::kErrors, errors);
    weigh(errors, 0, s);
    sum_parts(
        s, false,
        [&](int p, float(&y)[2][4]) {
          add_weight_in(y, d_inputs, p);
          add_adjoint_in(y, errors, p, adjoint);
          // The warps share the slices that M_in brings together.
          for (int t = thread_ / kWarp; t < slices(); t += Traits::kWarps) {
            uint32_t a[4], b[4];
            ldmatrix(a, rule.tile(kInSystem, s, t));
            ldmatrix_transposed(b, tile(keys, t, 16 * p));
            Numbers::mma(y[0], a, {b[0], b[1]});
            Numbers::mma(y[1], a, {b[2], b[3]});
          }
        },
        [&](int row, int column, float x0, float x1) {
          const float2 d = Numbers::unpack(pair_at(d_delta, row, column));
          x0 = fmaf(residual, d.x, x0), x1 = fmaf(residual, d.y, x1);
          pair_at(delta, row, column) = Numbers::pack(scale() * x0, scale() * x1);
        });
  }
}

template <class Traits>
__device__ __forceinline__ void BackwardScan<Traits>::store_coefficients_delta(int piece) const {
  using Systems = DeltaRuleAdjoint<Traits>;
  const auto rule = systems();
  const BackwardResult& result = back_.result;
  const int64_t first = place_.coefficient_row(problem_, piece) * problem_.chunk_size;
  const int t = thread_;
  if (t >= back_.rebuild.span) return;
  if (result.step) static_cast<float*>(result.step)[first + t] = rule.of(Systems::kOfRate)[t];
  if (result.retention)
    static_cast<float*>(result.retention)[first + t] =
        rule.of(Systems::kOfRetention)[t] + rule.of(Systems::kThroughBefore)[t] + rule.of(Systems::kThroughAfter)[t];
}

}  // namespace hope::cuda
