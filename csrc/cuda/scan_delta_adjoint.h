// The adjoint of what `dgd` solves inside a chunk (scan_delta_rule.h), for one layer with inputs U after the other. With X the
// product of U and the adjoint of the layer's weights after the write, and p_t = e_t prod_{s>t} alpha_s,
//   D = -(I + L)^-T diag(p) X,   dL/dE = D,   dL/d(U W) = diag(before) D,   dL/dL = -D R^T below the diagonal,
//   dL/dp_t = -x_t . r_t,   dL/dbefore_t = d_t . (u_t W),
// and the overlaps' part of dL/dU is M U, M symmetric: dL/dL_ts e_s prod_{s<j<t} alpha_j off the diagonal, and on it what
// reaches |u_t|^2 through e_t, twice.
//
// M takes the place of what solved the system, 16 bits a number. Gradients of coefficients are sums of products, never
// quotients, in float32 and in fixed order: alpha may be exactly 0.
#pragma once

#include "scan_delta_rule.h"

namespace hope::cuda {

template <class Traits>
class DeltaRuleAdjoint : public DeltaRule<Traits> {
  using Base = DeltaRule<Traits>;

 public:
  using typename Base::Element;
  using Base::after;
  using Base::Base;
  using Base::before;
  using Base::overlap;
  using Base::solver;

  // Numbers of each token [rows]: the step e of one system at a time, and gradients. Those of retention have three parts:
  // through the products inside the chunk, through `before` and the decay, and through `after`.
  enum Gradient : int {
    kStepSize = 0,
    kOfBefore = 1,
    kOfAfter = 2,
    kOfRate = 3,
    kOfRetention = 4,
    kThroughBefore = 5,
    kThroughAfter = 6,
    kGradients = 7
  };
  __device__ __forceinline__ float* of(Gradient which) const {
    return Base::template at<float>(layout_.gradients) + which * rows_;
  }

  // The steps of a system whose overlaps are there, and prod_{s<j<t} alpha_j at [s][t], above the diagonal of the overlaps.
  __device__ __forceinline__ void form_between(const float* lr, const float* retention, int span) const {
    const int s = thread_;
    if (s >= rows_) return;
    of(kStepSize)[s] = rate(lr, span, s) * shrink(lr, span, s);
    float product = 1.0f;
    for (int t = s + 1; t < rows_; ++t) {
      overlap(s, t) = product;
      if (retention && t < span) product *= retention[t];
    }
  }

  // From d = dL/dL_ts / scale, s < t: two numbers of M, divided by the scale, and over the overlap d (u_t . u_s).
  __device__ __forceinline__ void add_pair(System system, int t, int s, float d, float scale) const {
    Element* m = solver(system);
    const int pitch = rows_ + 8;
    m[t * pitch + s] = m[s * pitch + t] = Element(d * of(kStepSize)[s] * overlap(s, t));
    overlap(t, s) *= scale * d;
  }

  // The rest of M, and the gradients through a system, of which the weights p and `before` have their own: a thread goes up
  // column s. Over its numbers: what they give to retention t - 1.
  __device__ __forceinline__ void form_gradients(System system, const float* lr, const float* retention, int span,
                                                 float of_weight, float of_before, float scale) const {
    const int s = thread_;
    const float step = of(kStepSize)[s], shrunk = shrink(lr, span, s);
    float of_step = of_weight * after()[s], later = 0.0f;
    for (int t = span - 1; t > s; --t) {
      const float x = overlap(t, s);
      of_step = fmaf(x, overlap(s, t), of_step);
      later = fmaf(step, x, later);
      if (t == s + 1) break;
      overlap(t, s) = later * overlap(s, t - 1);
      if (retention) later *= retention[t - 1];
    }
    solver(system)[s * (rows_ + 8) + s] = Element(-2.0f * of_step * step * step / scale);
    add(system, kOfRate, s, of_step * shrunk * shrunk);
    add(system, kOfAfter, s, of_weight * step);
    add(system, kOfBefore, s, of_before);
  }
  // Retention inside the chunk, from what form_gradients left of each column.
  __device__ __forceinline__ void add_retention(System system, int span) const {
    const int t = thread_ + 1;
    if (t > span) return;
    float sum = 0.0f;
    for (int s = 0; t < span && s < t - 1; ++s) sum += overlap(t, s);
    add(system, kOfRetention, t - 1, sum);
  }
  // Retention through `before` and the decay, by one thread, and through `after`, by another.
  __device__ __forceinline__ void walk_products(const float* retention, int span, float of_decay) const {
    float d = of_decay;
    if (thread_ == 0)
      for (int t = span - 1; t >= 0; --t) {
        of(kThroughBefore)[t] = d * before()[t];
        d = fmaf(d, retention[t], of(kOfBefore)[t]);
      }
    if (thread_ == kWarp) {
      d = 0.0f;
      for (int t = 0; t < span; ++t) {
        of(kThroughAfter)[t] = d * after()[t];
        d = fmaf(d, retention[t], of(kOfAfter)[t]);
      }
    }
  }

 private:
  using Base::layout_;
  using Base::rows_;
  using Base::thread_;

  // The system of the output layer comes first.
  __device__ __forceinline__ void add(System system, Gradient which, int row, float x) const {
    float& to = of(which)[row];
    to = system == kOutSystem ? x : to + x;
  }
  static __device__ __forceinline__ float rate(const float* lr, int span, int s) { return s < span ? lr[s] : 0.0f; }
  __device__ __forceinline__ float shrink(const float* lr, int span, int s) const {
    return 1.0f / fmaf(rate(lr, span, s), overlap(s, s), 1.0f);
  }
};

}  // namespace hope::cuda
