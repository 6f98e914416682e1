// Delta gradient descent over one chunk: gradient descent with corrected errors, and its adjoint.
//
// Per layer with inputs U [C, in], weights W [in, out], errors E [C, out] and product Z = U W (rows are tokens):
//   n_t = |u_t|^2,  eta'_t = eta_t / (1 + eta_t n_t),  L_ts = eta'_s <u_s, u_t> P_ts for s < t,
//   (I + L) R = E + diag(g) Z,   W' = gamma W - U^T diag(p) R,   p = eta' * A,
// with products of the retentions alpha: g_t = prod_{s<t}, A_t = prod_{s>t}, P_ts = prod_{s<j<t}, gamma = all of them.
// They are built, and differentiated, as products of one more factor each: never quotients, so alpha may be exactly 0.
#pragma once

#include "network.h"

namespace hope::cpu::HOPE_ISA {

template <class T>
class DeltaRule {
 public:
  void layout(Arena& arena, const Net& net, bool backward) {
    count_ = net.chunk;
    axis_ = make_axis<T>(count_);
    dots_ = net.dots();
    const idx widest = max(net.dim, net.hidden);
    gram_ = arena.matrix<T>(count_, axis_);
    lower_ = arena.matrix<T>(count_, axis_);
    between_ = arena.matrix<T>(count_, axis_);
    // Holds U^T and, in the backward, R^T: [in or out, C].
    turned_ = arena.matrix<T>(widest, axis_);
    eta_ = arena.array<T>(count_);
    before_ = arena.array<T>(count_);
    after_ = arena.array<T>(count_);
    weight_ = arena.array<T>(count_);
    residual_ = arena.matrix<T>(count_, make_axis<T>(widest));
    if (!backward) return;
    d_lower_ = arena.matrix<T>(count_, axis_);
    d_between_ = arena.matrix<T>(count_, axis_);
    d_eta_ = arena.array<T>(count_);
    d_before_ = arena.array<T>(count_);
    d_after_ = arena.array<T>(count_);
    d_weight_ = arena.array<T>(count_);
    d_norm_ = arena.array<T>(count_);
    partial_ = arena.array<T>(widest);
    d_residual_ = arena.matrix<T>(count_, make_axis<T>(widest));
  }

  // The products of this chunk's retentions (alpha null: all 1).
  void begin_chunk(const T* eta, const T* alpha) {
    step_ = eta;
    alpha_ = alpha;
    T product = 1;
    for (idx t = 0; t < count_; ++t) {
      before_[t] = product;
      product *= retention(t);
    }
    gamma_ = product;
    product = 1;
    for (idx t = count_ - 1; t >= 0; --t) {
      after_[t] = product;
      product *= retention(t);
    }
    for (idx t = 1; t < count_; ++t) {
      const T a = retention(t - 1);
      each_span(t, [&](idx p, idx, idx n) {
        T* now = between_.at(p, t);
        const T* last = between_.at(p, t - 1);
        for (idx c = 0; c < n; ++c) now[c] = a * last[c];
      });
      element(between_, t, t - 1) = 1;
    }
  }

  // The triangle of the layers that share the inputs u.
  void begin_layer(const Team& team, const Mat<T>& u) {
    inputs_ = u;
    Transposed<T> turned{u, {}};
    if (!dots_) {
      turned.copy = turned_.reshaped(u.axis.n, axis_);
      transpose(team, turned.copy, u);
    }
    gemm_nt(team.exact(), u, turned, gram_);
    for (idx t = 0; t < count_; ++t) {
      eta_[t] = step_[t] / (1 + step_[t] * element(gram_, t, t));
      weight_[t] = eta_[t] * after_[t];
    }
    for (idx t = 1; t < count_; ++t)
      each_span(t, [&](idx p, idx first, idx n) {
        const T *g = gram_.at(p, t), *b = between_.at(p, t);
        T* l = lower_.at(p, t);
        for (idx c = 0; c < n; ++c) l[c] = eta_[first + c] * g[c] * b[c];
      });
  }

  // to = gamma from - U^T diag(p) R.
  void update(const Team& team, const Mat<T>& errors, const Mat<T>& product, const Mat<T>& from, const Mat<T>& to) {
    const Mat<T> r = corrected(team, errors, product);
    scale_rows<false>(team, r, T(1), weight_, r);
    gemm_tn(team, inputs_, r, from, to, T(-1), gamma_);
  }

  // Adjoint of a chunk: begin_chunk, begin_chunk_adjoint, then for every group of layers that share inputs begin_layer,
  // begin_layer_adjoint, update_adjoint once per layer, end_layer_adjoint; then end_chunk_adjoint.
  void begin_chunk_adjoint() {
    d_gamma_ = 0;
    for (idx t = 0; t < count_; ++t) d_before_[t] = d_after_[t] = 0;
    fill_zero(Team{}, d_between_);
  }
  void begin_layer_adjoint() {
    for (idx t = 0; t < count_; ++t) d_eta_[t] = d_weight_[t] = 0;
    fill_zero(Team{}, d_lower_);
  }

  // Given g = dL/dW' and its transposed form: d_inputs = beta d_inputs + dL/dU (the part through W'),
  // d_errors = dL/dE, d_product = dL/dZ; g becomes dL/dW.
  void update_adjoint(const Team& team, const Mat<T>& errors, const Mat<T>& product, const Mat<T>& w, const Mat<T>& g,
                      const Transposed<T>& g_turned, const Mat<T>& d_inputs, T beta, const Mat<T>& d_errors,
                      const Mat<T>& d_product) {
    const Mat<T> r = corrected(team, errors, product);
    const Mat<T> ug = d_residual_.reshaped(count_, errors.axis);
    gemm_nn(team, inputs_, g, ug);
    add_row_dots(team, d_weight_, T(-1), ug, r);
    scale_rows<false>(team, d_errors, T(1), weight_, r);
    gemm_nt(team, d_errors, g_turned, d_inputs, T(-1), beta);
    d_gamma_ += dot(team, g, w, partial_);
    scale(team, g, gamma_, g);
    scale_rows<false>(team, d_errors, T(-1), weight_, ug);
    solve_transposed(team, d_errors);
    add_row_dots(team, d_before_, T(1), d_errors, product);
    Transposed<T> r_turned{r, {}};
    if (!dots_) {
      r_turned.copy = turned_.reshaped(r.axis.n, axis_);
      transpose(team, r_turned.copy, r);
    }
    gemm_nt(team.exact(), d_errors, r_turned, d_lower_, T(-1), T(1));
    scale_rows<false>(team, d_product, T(1), before_, d_errors);
  }

  // d_inputs += dL/dU through the triangle and the norms; d_step += dL/d eta.
  void end_layer_adjoint(const Team& team, const Mat<T>& d_inputs, T* d_step) {
    for (idx t = 0; t < count_; ++t)
      for (idx p = 0; p < axis_.panels; ++p) {
        const idx first = p * axis_.width, n = max(0, min(t - first, axis_.width));
        T *dl = d_lower_.at(p, t), *db = d_between_.at(p, t);
        const T *gram = gram_.at(p, t), *between = between_.at(p, t);
        for (idx c = 0; c < n; ++c) {
          const T d = dl[c], eta = eta_[first + c];
          db[c] += d * eta * gram[c];
          d_eta_[first + c] += d * gram[c] * between[c];
          dl[c] = d * eta * between[c];
        }
        for (idx c = n; c < axis_.width; ++c) dl[c] = 0;
      }
    gemm_nn(team.exact(), d_lower_, inputs_, d_inputs, d_inputs, T(1), T(1));
    gemm_tn(team.exact(), d_lower_, inputs_, d_inputs, d_inputs, T(1), T(1));
    for (idx t = 0; t < count_; ++t) {
      const T d = d_eta_[t] + d_weight_[t] * after_[t];
      d_after_[t] += d_weight_[t] * eta_[t];
      const T shrink = 1 / (1 + step_[t] * element(gram_, t, t));
      d_step[t] += d * shrink * shrink;
      d_norm_[t] = -2 * d * eta_[t] * eta_[t];
    }
    scale_rows<true>(team, d_inputs, T(1), d_norm_, inputs_);
  }

  // d_alpha += dL/d alpha (nullptr: alpha is not an input).
  void end_chunk_adjoint(T* d_alpha) {
    if (!d_alpha) return;
    T d = d_gamma_;
    for (idx t = count_ - 1; t >= 0; --t) {
      d_alpha[t] += d * before_[t];
      d = d * retention(t) + d_before_[t];
    }
    d = 0;
    for (idx t = 0; t + 1 < count_; ++t) {
      d += d_after_[t];
      d_alpha[t + 1] += d * after_[t + 1];
      d *= retention(t + 1);
    }
    for (idx t = count_ - 1; t >= 2; --t) {
      const T a = retention(t - 1);
      T total = 0;
      each_span(t - 1, [&](idx p, idx, idx n) {
        const T *now = d_between_.at(p, t), *last = between_.at(p, t - 1);
        T* d_last = d_between_.at(p, t - 1);
        total += dot_span(now, last, n);
        for (idx c = 0; c < n; ++c) d_last[c] += a * now[c];
      });
      d_alpha[t - 1] += total;
    }
  }

 private:
  static constexpr idx kSolveBlock = 32;  // divides every panel width but those of single panels

  T retention(idx t) const { return alpha_ ? alpha_[t] : T(1); }
  T& element(const Mat<T>& m, idx row, idx column) const {
    return m.at(column / axis_.width, row)[column % axis_.width];
  }
  // Calls body(panel, first column, number of columns) over columns [0, end).
  template <class F>
  void each_span(idx end, F&& body) const {
    for (idx p = 0, first = 0; first < end; ++p, first += axis_.width) body(p, first, min(axis_.width, end - first));
  }

  // R of a layer.
  Mat<T> corrected(const Team& team, const Mat<T>& errors, const Mat<T>& product) {
    const Mat<T> r = residual_.reshaped(count_, errors.axis);
    copy(team, r, errors);
    scale_rows<true>(team, r, T(1), before_, product);
    for (idx b = 0; b < count_; b += kSolveBlock) {
      const idx rows = min(kSolveBlock, count_ - b);
      const Mat<T> block = r.rows_from(b, rows);
      if (b > 0) gemm_nn(team.exact(), lower_.rows_from(b, rows), r, block, block, T(-1), T(1), b);
      team.each(r.axis.panels, [&](idx p) {
        for (idx t = b + 1; t < b + rows; ++t)
          for (idx s = b; s < t; ++s) subtract_row(r, p, t, element(lower_, t, s), s);
      });
    }
    return r;
  }

  // x <- (I + L)^-T x.
  void solve_transposed(const Team& team, const Mat<T>& x) {
    for (idx b = (count_ - 1) / kSolveBlock * kSolveBlock; b >= 0; b -= kSolveBlock) {
      const idx rows = min(kSolveBlock, count_ - b), rest = b + rows;
      const Mat<T> block = x.rows_from(b, rows);
      if (rest < count_)
        gemm_tn(team.exact(), lower_.rows_from(rest, count_ - rest), x.rows_from(rest, count_ - rest), block, block, T(-1), T(1),
                b, rows);
      team.each(x.axis.panels, [&](idx p) {
        for (idx t = rest - 1; t > b; --t)
          for (idx s = b; s < t; ++s) subtract_row(x, p, s, element(lower_, t, s), t);
      });
    }
  }

  HOPE_INLINE void subtract_row(const Mat<T>& m, idx panel, idx to, T factor, idx from) const {
    T* o = m.at(panel, to);
    const T* x = m.at(panel, from);
    for (idx c = 0; c < m.axis.width; c += kLanes<T>) store(o + c, load(o + c) - factor * load(x + c));
  }

  idx count_ = 0;
  Axis axis_;  // tokens of the chunk, as columns
  bool dots_ = false;
  Mat<T> gram_, lower_, between_, turned_, residual_, inputs_;
  T *eta_, *before_, *after_, *weight_;  // eta', g, A, p
  const T *step_ = nullptr, *alpha_ = nullptr;
  T gamma_ = 1;

  Mat<T> d_lower_, d_between_, d_residual_;
  T *d_eta_, *d_before_, *d_after_, *d_weight_, *d_norm_, *partial_;
  T d_gamma_ = 0;
};

}  // namespace hope::cpu::HOPE_ISA
