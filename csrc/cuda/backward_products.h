// Products of the backward scan: a slice of tokens with the state, with its adjoint, and what they add to the adjoint.
#pragma once

#include "backward_block.h"

namespace hope::cuda {

template <class Traits>
class BackwardProducts : protected BackwardBlock<Traits> {
  using Block = BackwardBlock<Traits>;

 protected:
  using Block::add_in;
  using Block::add_out;
  using typename Block::Element;
  using typename Block::Group;
  using Block::here_;
  using typename Block::Numbers;
  using typename Block::PackedInputs;
  using typename Block::PackedUnits;
  using Block::params_;
  using Block::partial;
  using Block::problem_;
  using Block::state_;
  using Block::steps;
  using Block::sum_;
  using Block::thread_;
  using Block::tile;
  using Block::turn;
  using Block::weight;

  __device__ __forceinline__ BackwardProducts(const BackwardParams& params, char* shared) : Block(params, shared) {}

  static constexpr int kInputs = Traits::kInputs;
  // Every kStep-th tile.
  template <int kStep>
  static __device__ __forceinline__ void clear(Group& x) {
#pragma unroll
    for (int n = 0; n < 2 * kInputs; n += kStep)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
  }
  // visit(n, e, r): accumulator e of tile n, the first one of its units, which belongs to row g + 8 r of the slice.
  template <class Visit>
  static __device__ __forceinline__ void each_unit(const Visit& visit) {
#pragma unroll
    for (int n = 0; n < 2 * kInputs; n += kInputs)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(n, e, e / 2);
  }
  // The same for all tiles.
  template <class Visit>
  static __device__ __forceinline__ void each_input(const Visit& visit) {
#pragma unroll
    for (int n = 0; n < 2 * kInputs; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(n, e, e / 2);
  }
  // Group i as operands, rows g times w0 and rows g + 8 times w1.
  template <int kTiles>
  static __device__ __forceinline__ void pack(uint32_t (&to)[kTiles][2], int i, const Group& x, float w0 = 1.0f,
                                              float w1 = 1.0f) {
    constexpr int kEach = kTiles / Block::kGroups, kStep = 2 * kInputs / kEach;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      to[kEach * i + n][0] = Numbers::pack(w0 * x[kStep * n][0], w0 * x[kStep * n][1]);
      to[kEach * i + n][1] = Numbers::pack(w1 * x[kStep * n][2], w1 * x[kStep * n][3]);
    }
  }

  // The other way, of products with W_in.
  template <int kTiles>
  static __device__ __forceinline__ void unpack(Group& x, const uint32_t (&from)[kTiles][2], int i) {
#pragma unroll
    for (int n = 0; n < 2 * kInputs; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 y = Numbers::unpack(from[2 * kInputs * i + n][r]);
        x[n][2 * r] = y.x, x[n][2 * r + 1] = y.y;
      }
  }

  template <int kTiles>
  static __device__ __forceinline__ void copy(uint32_t (&to)[kTiles][2], const uint32_t (&from)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) to[n][0] = from[n][0], to[n][1] = from[n][1];
  }

  // Every row times its token's weight in the write of the state (0) or of the momentum (1).
  template <int kTiles>
  __device__ __forceinline__ void weigh(uint32_t (&x)[kTiles][2], int which, int slice) const {
    const Lane lane(thread_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float w = steps(which)[slice * kSlice + lane.group + 8 * r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 y = Numbers::unpack(x[n][r]);
        x[n][r] = Numbers::pack(w * y.x, w * y.y);
      }
    }
  }

  // Rows of W_in^T, or W_out, that this warp has.
  template <bool kOut>
  static constexpr int kRows = (kOut ? 1 : kInputs) * Traits::kUnits;
  // Tiles of a group from one tile of these rows to the next.
  template <bool kOut>
  static constexpr int kEvery = kOut ? kInputs : 1;

  // x = X W_in (kOut false) or X W_out^T of one slice and group i.
  template <bool kOut>
  __device__ __forceinline__ void by_weight(Group& x, const Element* rows, int slice, int i) const {
    constexpr int kStep = kEvery<kOut>, kTiles = 2 * kInputs / kStep;
    clear<kStep>(x);
    const int lane = thread_ % kWarp;
    const Element* own = this->template weights<kOut>() +
                         (thread_ / kWarp * kRows<kOut> + lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Traits::kDimTiles / 2; ++k) {
      uint32_t a[4], b[4];
      ldmatrix(a, tile(rows, slice, 16 * k));
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        ldmatrix(b, own + 8 * (kTiles * i + n) * Traits::kPitch + 16 * k);
        Numbers::mma(x[kStep * n], a, {b[0], b[1]});
        Numbers::mma(x[kStep * (n + 1)], a, {b[2], b[3]});
      }
    }
  }

  // The adjoint as operands: what PackedState holds of the momentum's.
  struct StateTiles {
    const ScanState<Traits>& state;
    static __device__ __forceinline__ uint2 both(const float (&x)[4]) {
      return uint2{Numbers::pack(x[0], x[1]), Numbers::pack(x[2], x[3])};
    }
    __device__ __forceinline__ uint2 in(int i, int j) const { return both(state.in[i][j]); }
    __device__ __forceinline__ uint2 out(int i, int j) const { return both(state.out[i][j]); }
  };

  // x = X A_in (kOut false) or X A_out^T.
  template <bool kOut, class Tiles>
  __device__ __forceinline__ void by_adjoint(Group& x, const Element* rows, int slice, int i, const Tiles& tiles) const {
    constexpr int kStep = kEvery<kOut>, kTiles = 2 * kInputs / kStep;
    clear<kStep>(x);
#pragma unroll
    for (int k = 0; k < Traits::kDimTiles / 2; ++k) {
      uint32_t a[4];
      ldmatrix(a, tile(rows, slice, 16 * k));
      if constexpr (kOut) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint2 both = tiles.out(k, kTiles * i + n);
          Numbers::mma(x[kStep * n], a, {movmatrix(both.x), movmatrix(both.y)});
        }
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          const int m = (kTiles * i + n) / 2;
          const uint2 low = tiles.in(m, 2 * k), high = tiles.in(m, 2 * k + 1);
          Numbers::mma(x[n], a, {low.x, high.x});
          Numbers::mma(x[n + 1], a, {low.y, high.y});
        }
      }
    }
  }

  // y += U W_out (kOut) or U W_in^T for the 16 features from 16 p on: this warp's part of it.
  template <bool kOut, int kTiles>
  __device__ __forceinline__ void add_weight(float (&y)[2][4], const uint32_t (&u)[kTiles][2], int p) const {
#pragma unroll
    for (int m = 0; m < kTiles / 2; ++m) {
      const uint32_t a[4] = {u[2 * m][0], u[2 * m][1], u[2 * m + 1][0], u[2 * m + 1][1]};
      uint32_t b[4];
      ldmatrix_transposed(b, tile(this->template weights<kOut>(), thread_ / kWarp * (kRows<kOut> / 16) + m, 16 * p));
      Numbers::mma(y[0], a, {b[0], b[1]});
      Numbers::mma(y[1], a, {b[2], b[3]});
    }
  }
  // y += U A_out (kOut) or U A_in^T.
  template <bool kOut, int kTiles, class Tiles>
  __device__ __forceinline__ void add_adjoint(float (&y)[2][4], const uint32_t (&u)[kTiles][2], int p,
                                              const Tiles& tiles) const {
#pragma unroll
    for (int m = 0; m < kTiles / 2; ++m) {
      const uint32_t a[4] = {u[2 * m][0], u[2 * m][1], u[2 * m + 1][0], u[2 * m + 1][1]};
      if constexpr (kOut) {
        const uint2 low = tiles.out(p, 2 * m), high = tiles.out(p, 2 * m + 1);
        Numbers::mma(y[0], a, {low.x, high.x});
        Numbers::mma(y[1], a, {low.y, high.y});
      } else {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const uint2 both = tiles.in(m, 2 * p + q);
          Numbers::mma(y[q], a, {movmatrix(both.x), movmatrix(both.y)});
        }
      }
    }
  }

  // Sums over the warps, of all blocks, what each puts into its accumulators, those of tile j at [j * kWarp]; the sets take
  // turns by `number`. finish(row, column, sum0, sum1): row < 16, column < 8 kSumTiles; in every block (`everywhere`) or in
  // the one that owns the numbers.
  template <class Put, class Finish>
  __device__ __forceinline__ void sum_tiles(int number, bool everywhere, const Put& put, const Finish& finish) {
    if (here_.layout.partials == 1 && !sum_.together()) __syncthreads();  // the sums before these were read, as in a cluster
    float4* sums = partial(number);
    put(sums + thread_ / kWarp * (Traits::kSumTiles * kWarp) + thread_ % kWarp);
    __syncthreads();  // every warp's part of this sum is there; with two sets the other one is free
    sum_.add_up(sums, number, everywhere, finish);
  }
  // The same of a slice, to which terms(p, y) adds for each 16 features: finish(row of the chunk, column, sum0, sum1).
  template <class Terms, class Finish>
  __device__ __forceinline__ void sum_parts(int slice, bool everywhere, const Terms& terms, const Finish& finish) {
    sum_parts(slice, slice, everywhere, terms, finish);
  }
  template <class Terms, class Finish>
  __device__ __forceinline__ void sum_parts(int number, int slice, bool everywhere, const Terms& terms,
                                            const Finish& finish) {
    static_assert(!Traits::kCluster || Traits::kSumsInPairs, "numbers begin anew with each part of a chunk");
#pragma unroll
    for (int part = 0; part < Traits::kSums; ++part) {
      if (part > 0) this->begin_phase();
      sum_tiles(
          Traits::kSums * number + part, everywhere,
          [&](float4* own) {
#pragma unroll
            for (int p = 0; p < Traits::kSumTiles / 2; ++p) {
              float y[2][4] = {};
              terms(part * (Traits::kSumTiles / 2) + p, y);
              own[2 * p * kWarp] = four(y[0]);
              own[(2 * p + 1) * kWarp] = four(y[1]);
            }
          },
          [&](int row, int column, float x0, float x1) {
            finish(slice * kSlice + row, part * (8 * Traits::kSumTiles) + column, x0, x1);
          });
    }
  }

  // A_out += Y^T H of one slice, as it is held: H turned.
  __device__ __forceinline__ void add_to_out(PackedUnits& hidden, const Element* rows, int slice) {
    turn(hidden);
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) add_out(state_.out[p], hidden, rows, slice, p);
  }
  // A_in += D_z^T X of one slice.
  __device__ __forceinline__ void add_to_in(PackedInputs& d_inputs, const Element* rows, int slice) {
    turn(d_inputs);
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles / 2; ++j) {
      uint32_t b[4];
      ldmatrix_transposed(b, tile(rows, slice, 16 * j));
#pragma unroll
      for (int i = 0; i < Traits::kInTiles / 2; ++i) add_in(state_.in[i], d_inputs[2 * i], d_inputs[2 * i + 1], j, b);
    }
  }

  // h: products with W_in <- hidden values. And derivatives of these, as far as they are asked for: slopes, by each of their
  // products; curves, the first slope's by each of them: act''(z), of a glu act''(gate) up and act'(gate). The other slope of
  // a glu, act(gate), depends on the gate alone.
  template <class... Derivatives>
  __device__ __forceinline__ void activate(Group& h, Derivatives&... derivatives) const {
    constexpr int kDerivatives = sizeof...(Derivatives);
    with_activation<Traits::kType>(problem_.activation, params_.sigmoidal, [&](auto act) {
      each_unit([&](int n, int e, int) {
        if constexpr (kDerivatives == 0) {
          float slope;
          act(h[n][e], slope);
        } else {
          act(h[n][e], derivatives[n][e]...);
        }
      });
    });
    if constexpr (Traits::kForm == Form::glu) gate(h, derivatives...);
  }
  // Those of a glu, from act(gate) and its derivatives.
  static __device__ __forceinline__ void gate(Group& h) {
    each_unit([&](int n, int e, int) { h[n][e] *= h[n + 1][e]; });
  }
  static __device__ __forceinline__ void gate(Group& h, Group& slopes) {
    each_unit([&](int n, int e, int) {
      slopes[n][e] *= h[n + 1][e];
      slopes[n + 1][e] = h[n][e];
    });
    gate(h);
  }
  static __device__ __forceinline__ void gate(Group& h, Group& slopes, Group& curves) {
    each_unit([&](int n, int e, int) {
      curves[n][e] *= h[n + 1][e];
      curves[n + 1][e] = slopes[n][e];
    });
    gate(h, slopes);
  }

  // x: a number y of each unit <- of(tile, accumulator, y) for each of its products.
  template <class Of>
  static __device__ __forceinline__ void spread(Group& x, const Of& of) {
    each_unit([&](int n, int e, int) {
      const float y = x[n][e];
#pragma unroll
      for (int m = n; m < n + kInputs; ++m) x[m][e] = of(m, e, y);
    });
  }
  // x: of each product <- summed over those of a unit, times their slopes; curves <- the matrix of second derivatives, which
  // they are, times x.
  static __device__ __forceinline__ void bend(Group& curves, Group& x, const Group& slopes) {
    each_unit([&](int n, int e, int) {
      if constexpr (Traits::kForm == Form::glu) {
        const float gate = x[n][e], up = x[n + 1][e];
        curves[n][e] = fmaf(curves[n][e], gate, curves[n + 1][e] * up);
        curves[n + 1][e] *= gate;
        x[n][e] = fmaf(gate, slopes[n][e], up * slopes[n + 1][e]);
      } else {
        curves[n][e] *= x[n][e], x[n][e] *= slopes[n][e];
      }
    });
  }

  // The same by name, as a class that is derived from this one calls them.
  __device__ __forceinline__ void by_weight_in(Group& x, const Element* rows, int slice, int i) const {
    by_weight<false>(x, rows, slice, i);
  }
  __device__ __forceinline__ void by_weight_out(Group& x, const Element* rows, int slice, int i) const {
    by_weight<true>(x, rows, slice, i);
  }
  template <class Tiles>
  __device__ __forceinline__ void by_adjoint_in(Group& x, const Element* rows, int slice, int i, const Tiles& tiles) const {
    by_adjoint<false>(x, rows, slice, i, tiles);
  }
  template <class Tiles>
  __device__ __forceinline__ void by_adjoint_out(Group& x, const Element* rows, int slice, int i, const Tiles& tiles) const {
    by_adjoint<true>(x, rows, slice, i, tiles);
  }
  __device__ __forceinline__ void add_weight_in(float (&y)[2][4], const PackedInputs& u, int p) const {
    add_weight<false>(y, u, p);
  }
  __device__ __forceinline__ void add_weight_out(float (&y)[2][4], const PackedUnits& u, int p) const {
    add_weight<true>(y, u, p);
  }
  template <class Tiles>
  __device__ __forceinline__ void add_adjoint_in(float (&y)[2][4], const PackedInputs& u, int p, const Tiles& tiles) const {
    add_adjoint<false>(y, u, p, tiles);
  }
  template <class Tiles>
  __device__ __forceinline__ void add_adjoint_out(float (&y)[2][4], const PackedUnits& u, int p, const Tiles& tiles) const {
    add_adjoint<true>(y, u, p, tiles);
  }
};

}  // namespace hope::cuda
