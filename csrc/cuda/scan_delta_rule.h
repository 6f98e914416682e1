// Delta gradient descent (`dgd`) inside a chunk: corrected errors R of (I + L) R = E + diag(before) (U W), for each layer
// with its inputs U (keys, or hidden values of the keys), where
//   L_ts = e_s (u_s . u_t) prod_{s<j<t} alpha_j for s < t,  e_s = lr_s / (1 + lr_s |u_s|^2),  before_t = prod_{s<t} alpha_s.
// The layer is then written like `gd` with R in place of E and the weights e_t prod_{s>t} alpha_s.
//
// The overlaps U U^T of one layer after the other lie in shared memory, C x C float32. The system is solved in blocks of 16
// tokens: R_s = T_s (right side - sum_{t<s} L_st R_t), T_s the inverse of a diagonal block, formed in float32. Products take
// 16-bit operands; the right side and what is subtracted from it are float32, so that rounding touches the correction and
// not the error itself. Products of alpha are products, never quotients: alpha may be exactly 0.
//
// FLOPs per token beside those of `gd`: C (D + H) for the overlaps and C (D + H) for the solution (`glu`: C (D + 2 H)), by
// tensor cores. Beside them every thread of the first C walks down a column of L, and 120 steps of a diagonal block.
#pragma once

#include "pairs.h"
#include "scan_traits.h"

namespace hope::cuda {

// The two systems of a chunk: the layers that take tokens share theirs.
enum System : int { kInSystem = 0, kOutSystem = 1 };

template <class Traits>
class DeltaRule {
 public:
  using Element = typename Pair<Traits::kType>::Element;
  using Numbers = Pair<Traits::kType>;

  __device__ __forceinline__ DeltaRule(char* shared, const DeltaLayout& layout, int rows, unsigned thread)
      : shared_(shared), layout_(layout), rows_(rows), thread_(thread) {}

  // ---- shared memory ------------------------------------------------------------------------------------------------

  // Of each token [rows]: products of retention over earlier ones (one more: over all), over later ones, and the weights of
  // its errors in the write of a layer, their sign included.
  __device__ __forceinline__ float* before() const { return at<float>(layout_.tokens); }
  __device__ __forceinline__ float* after() const { return before() + rows_ + kSlice; }
  __device__ __forceinline__ float* weights(System system) const { return after() + (1 + system) * rows_; }
  // E + diag(before) (U W) of the output layer, and the solution [rows, kPitch].
  __device__ __forceinline__ float2& right(int row, int column) const {
    return *reinterpret_cast<float2*>(at<float>(layout_.right) + row * Traits::kPitch + column);
  }
  __device__ __forceinline__ Element* corrected() const { return at<Element>(layout_.corrected); }
  // u_t . u_s at [t][s], s <= t, of one system at a time. Diagonal blocks of L lie transposed above the diagonal.
  __device__ __forceinline__ float& overlap(int t, int s) const { return at<float>(layout_.overlap)[t * (rows_ + 8) + s]; }
  // What solves a system: -L below the diagonal blocks, T - I in them. For ldmatrix: rows as odd multiples of 16 bytes.
  __device__ __forceinline__ Element* solver(System system) const {
    return at<Element>(layout_.solvers) + system * rows_ * (rows_ + 8);
  }

  // Address this lane gives for 16 rows of it, those of a slice, and the columns of slice t.
  __device__ __forceinline__ const Element* tile(System system, int slice, int t) const {
    const int lane = thread_ % kWarp;
    return solver(system) + (slice * kSlice + lane % 16) * (rows_ + 8) + t * kSlice + lane / 16 * 8;
  }

  // ---- coefficients -------------------------------------------------------------------------------------------------

  // Products of a chunk's retention (null: all ones) over its `span` tokens.
  __device__ __forceinline__ void load_products(const float* retention, int span) const {
    for (int t = thread_; t < rows_ + 1; t += Traits::kThreads) {
      float earlier = 1.0f, later = 1.0f;
      for (int s = 0; retention && s < span; ++s) {
        const float alpha = retention[s];
        if (s < t) earlier *= alpha;
        if (s > t) later *= alpha;
      }
      before()[t] = earlier;
      if (t < rows_) after()[t] = later;
    }
  }
  // Product over the whole chunk.
  __device__ __forceinline__ float decay(int span) const { return before()[span]; }

  // From the overlaps, which stay, to what solves the system and the weights of its write. A thread forms
  // column s: row by row the product between s and t is one factor longer.
  __device__ __forceinline__ void form_solver(System system, const float* lr, const float* retention, int span) const {
    Element* solver = this->solver(system);
    const int pitch = rows_ + 8, s = thread_;
    if (s / kWarp * kWarp >= rows_) return;  // a warp has whole blocks of columns, the last one perhaps one too many
    const bool inside = s < rows_;
    const int first = s / kSlice * kSlice;
    if (inside) {
      const float rate = s < span ? lr[s] : 0.0f, step = rate / fmaf(rate, overlap(s, s), 1.0f);
      weights(system)[s] = -step * after()[s];
      float product = step;
      for (int t = s + 1; t < rows_; ++t) {
        const float lower = product * overlap(t, s);
        if (t < first + kSlice)
          overlap(s, t) = lower;
        else
          solver[t * pitch + s] = Element(-lower);
        if (retention && t < span) product *= retention[t];
      }
    }
    __syncwarp();  // the diagonal blocks of L are there
    if (!inside) return;
    // Column s of T: L x = e by forward substitution, the same numbers of L for all columns of the block.
    float x[kSlice];
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum = fmaf(overlap(first + j, first + i), x[j], sum);
      x[i] = first + i < s ? 0.0f : first + i == s ? 1.0f : -sum;
      solver[(first + i) * pitch + s] = Element(first + i > s ? x[i] : 0.0f);
    }
  }

  // ---- solution -----------------------------------------------------------------------------------------------------

  // Rows of a slice, columns of this warp: from the right side to the solution, of which solved(t, b) gives slice t as the
  // B fragments of its columns. The slices before this one are solved; of the transposed system those behind it.
  template <bool kTransposed = false, int kTiles, class Solved>
  __device__ __forceinline__ void solve(System system, int slice, float (&r)[kTiles][4], const Solved& solved) const {
    constexpr int kStep = kTransposed ? -1 : 1;
    const int lane = thread_ % kWarp;
    uint32_t a[4], b[kTiles][2];
    for (int t = kTransposed ? rows_ / kSlice - 1 : 0; t != slice + kStep; t += kStep) {
      if constexpr (kTransposed)
        ldmatrix_transposed(a, solver(system) + (t * kSlice + lane % 8 + lane / 16 * 8) * (rows_ + 8) + slice * kSlice +
                                   lane / 8 % 2 * 8);
      else
        ldmatrix(a, tile(system, slice, t));
      if (t != slice) {
        solved(t, b);
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) b[n][i] = movmatrix(Numbers::pack(r[n][2 * i], r[n][2 * i + 1]));
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Numbers::mma(r[n], a, b[n]);
    }
  }

  // The corrected errors of the output layer.
  __device__ __forceinline__ void solve_out() const {
    solve_rows(corrected(), [&](int row, int column) { return right(row, column); });
  }
  // The output layer's system, or its transposed: x [rows, kPitch] from right(row, column), each warp its columns.
  template <bool kTransposed = false, class Right>
  __device__ __forceinline__ void solve_rows(Element* x, const Right& right) const {
    const int lane = thread_ % kWarp, row = lane / 4, pair = lane % 4 * 2, slices = rows_ / kSlice;
    for (int column = thread_ / kWarp * 8; column < Traits::kDim; column += Traits::kWarps * 8)
      for (int i = 0; i < slices; ++i) {
        const int slice = kTransposed ? slices - 1 - i : i;
        const float2 upper = right(slice * kSlice + row, column + pair);
        const float2 lower = right(slice * kSlice + row + 8, column + pair);
        float r[1][4] = {{upper.x, upper.y, lower.x, lower.y}};
        solve<kTransposed>(kOutSystem, slice, r, [&](int t, uint32_t (&b)[1][2]) {
          ldmatrix_transposed(b[0], x + (t * kSlice + lane % 16) * Traits::kPitch + column);
        });
        uint32_t* to = reinterpret_cast<uint32_t*>(x + (slice * kSlice + row) * Traits::kPitch + column + pair);
        to[0] = Numbers::pack(r[0][0], r[0][1]);
        to[8 * Traits::kPitch / 2] = Numbers::pack(r[0][2], r[0][3]);
        __syncwarp();  // the slice's rows are there for the slices to come
      }
  }

 protected:
  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  char* shared_;
  const DeltaLayout& layout_;
  int rows_;
  unsigned thread_;  // of the block; see ScanBlock::begin_phase
};

}  // namespace hope::cuda
