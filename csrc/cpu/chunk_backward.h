// The adjoint of one chunk: given dL/d(state after it) and dL/d(outputs read in it), dL/d(state before it), tokens and
// coefficients. The forward of the chunk is recomputed from its state: the first derivatives of the inner errors, hence
// act'', enter here.
//
// FLOPs per token of an mlp with objective l2: 36 D H. The outer weight gradients of the read, of the network at the keys
// and of the errors all add up in the adjoint of the chunk's state, in place.
#pragma once

#include "chunk.h"

namespace hope::cpu::HOPE_ISA {

// Gradients of one chunk's coefficients; null where they are not wanted.
template <class T>
struct CoefficientGradients {
  T *step = nullptr, *retention = nullptr, *momentum_step = nullptr;
  T *decay = nullptr, *carry = nullptr, *momentum_decay = nullptr;
};

template <class T>
struct Adjoints {
  Mat<T> d_x;               // [rows, D]
  Mat<T> d_out;             // dL/df at all rows; the caller fills in the queries' rows
  Mat<T> d_target;          // dL/dv [keys, D] unless `self`
  Mat<T> d_delta;           // [keys, D]
  Mat<T> d_hidden;          // [rows, H]
  Mat<T> d_z[2];            // [rows, H]
  Mat<T> d_error[2];        // [keys, H]
  Mat<T> d_error_hidden;    // [keys, H]
  Mat<T> through_momentum;  // U GS of one layer
  Mat<T> d_product;         // of one layer (dgd)
  Mat<T> extra_z[2];        // what the write adds to d_z at the keys
  Mat<T> turned;            // transposed adjoints and weights
  T* partial;               // one number per row of a weight

  void layout(Arena& arena, const Net& net, idx rows, idx keys, bool turns = true) {
    const Axis &d = net.dim_axis, &h = net.hidden_axis;
    const idx widest = max(net.dim, net.hidden);
    d_x = arena.matrix<T>(rows, d);
    d_out = arena.matrix<T>(rows, d);
    // Any weight or adjoint transposed: [D, H], [H, D] or [D, D], whichever padding makes largest.
    const bool wide = net.hidden * d.width * d.panels > net.dim * h.width * h.panels;
    if (turns) turned = wide ? arena.matrix<T>(net.hidden, d) : arena.matrix<T>(net.dim, h);
    if (net.has_hidden()) {
      d_hidden = arena.matrix<T>(rows, h);
      for (int i = 0; i < net.inputs; ++i) d_z[i] = arena.matrix<T>(rows, h);
    }
    if (keys == 0) return;
    if (!net.self()) d_target = arena.matrix<T>(keys, d);
    d_delta = arena.matrix<T>(keys, d);
    partial = arena.array<T>(widest);
    if (net.momentum) through_momentum = arena.matrix<T>(keys, make_axis<T>(widest));
    if (net.delta()) d_product = arena.matrix<T>(keys, d);
    if (!net.has_hidden()) {
      d_error[0] = d_delta;
      return;
    }
    d_error_hidden = arena.matrix<T>(keys, h);
    for (int i = 0; i < net.inputs; ++i) {
      d_error[i] = arena.matrix<T>(keys, h);
      extra_z[i] = arena.matrix<T>(keys, h);
    }
  }
};

// What the backward of a chunk would otherwise recompute: the forward's intermediates, computed where they are kept, while
// the states of a segment are rebuilt (queries excepted) or, for the last segment, by the forward.
template <class T>
struct Kept {
  Mat<T> delta, product, z[2], gate, hidden, slope, curve, error_hidden;

  // Whether the intermediates of a chunk are no larger than a few states: scratch stays proportional to the state.
  static bool worthwhile(const Net& net) { return net.chunk <= 2 * net.dim; }

  void layout(Arena& arena, const Net& net, idx rows, idx keys) {
    const Axis &d = net.dim_axis, &h = net.hidden_axis;
    delta = arena.matrix<T>(keys, d);
    if (net.delta()) product = arena.matrix<T>(keys, d);
    if (!net.has_hidden()) return;
    hidden = arena.matrix<T>(rows, h);
    slope = arena.matrix<T>(rows, h);
    curve = arena.matrix<T>(keys, h);
    error_hidden = arena.matrix<T>(keys, h);
    if (net.delta()) z[0] = arena.matrix<T>(rows, h);
    if (net.form != Form::glu) return;
    z[1] = arena.matrix<T>(rows, h);
    gate = arena.matrix<T>(rows, h);
  }

  // `a` with these matrices in place of its own.
  Activations<T> within(Activations<T> a) const {
    const auto put = [](Mat<T>& to, const Mat<T>& kept) {
      if (kept) to = kept;
    };
    put(a.delta, delta);
    put(a.product, product);
    put(a.z[0], z[0]);
    put(a.z[1], z[1]);
    put(a.gate, gate);
    put(a.hidden, hidden);
    put(a.slope, slope);
    put(a.curve, curve);
    put(a.error_hidden, error_hidden);
    if (!a.hidden) a.error[0] = a.delta;
    return a;
  }
};

// What a chunk's activations hold when its backward begins.
enum class Known { nothing, keys, all };

// Adjoint of W' = decay W + carry S - U^T diag(step) E, S' = momentum_decay S - U^T diag(momentum_step) E for layer i:
// d_inputs = beta d_inputs + dL/dU, d_errors = dL/dE, the adjoint state g in place.
template <class T>
void gd_adjoint(const Team& team, const Net& net, const Activations<T>& a, const Adjoints<T>& d, int i,
                const Coefficients<T>& coef, const CoefficientGradients<T>& d_coef, const State<T>& state,
                const State<T>& g, const Mat<T>& d_inputs, T beta, const Mat<T>& d_errors, idx keys) {
  const Mat<T> u = layer_inputs(net, a, i, keys), e = layer_errors(net, a, i, keys);
  const Mat<T> we = a.weighted.reshaped(keys, e.axis);
  gemm_nn(team, u, g.w[i], d_errors);
  add_row_dots(team, d_coef.step, T(-1), d_errors, e);
  scale_rows<false>(team, we, T(1), coef.step, e);
  gemm_nt(team, we, transposed(team, net, g.w[i], d.turned), d_inputs, T(-1), beta);
  scale_rows<false>(team, d_errors, T(-1), coef.step, d_errors);
  if (net.momentum) {
    const Mat<T> through = d.through_momentum.reshaped(keys, e.axis);
    gemm_nn(team, u, g.s[i], through);
    add_row_dots(team, d_coef.momentum_step, T(-1), through, e);
    scale_rows<false>(team, we, T(1), coef.momentum_step, e);
    gemm_nt(team, we, transposed(team, net, g.s[i], d.turned), d_inputs, T(-1), T(1));
    scale_rows<true>(team, d_errors, T(-1), coef.momentum_step, through);
    *d_coef.carry += dot(team, g.w[i], state.s[i], d.partial);
    *d_coef.momentum_decay += dot(team, g.s[i], state.s[i], d.partial);
    combine(team, g.s[i], coef.carry, g.w[i], coef.momentum_decay, g.s[i]);
  }
  if (d_coef.decay) {
    *d_coef.decay += dot(team, g.w[i], state.w[i], d.partial);
    scale(team, g.w[i], coef.decay, g.w[i]);
  }
}

// Adjoint of the two error layers of a glu: from d_error of gate and up, d_error_hidden and what reaches z and up directly.
template <class T>
void glu_errors_adjoint(const Team& team, const Activations<T>& a, const Adjoints<T>& d, idx keys) {
  team.blocks(keys, a.error_hidden.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      const T *eh = a.error_hidden.at(p, r), *up = a.z[1].at(p, r), *gate = a.gate.at(p, r), *slope = a.slope.at(p, r),
              *curve = a.curve.at(p, r), *dg = d.d_error[0].at(p, r), *du = d.d_error[1].at(p, r);
      T *deh = d.d_error_hidden.at(p, r), *xz = d.extra_z[0].at(p, r), *xu = d.extra_z[1].at(p, r);
      for (idx c = 0; c < a.error_hidden.axis.width; c += kLanes<T>) {
        const Vec<T> e = load(eh + c), u = load(up + c), s = load(slope + c);
        const Vec<T> g = load(dg + c), h = load(du + c);
        store(deh + c, g * u * s + h * load(gate + c));
        store(xz + c, e * (g * u * load(curve + c) + h * s));
        store(xu + c, g * e * s);
      }
    }
  });
}

// The same for an mlp.
template <class T>
void mlp_errors_adjoint(const Team& team, const Activations<T>& a, const Adjoints<T>& d, idx keys) {
  team.blocks(keys, a.error_hidden.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      const T *eh = a.error_hidden.at(p, r), *slope = a.slope.at(p, r), *curve = a.curve.at(p, r),
              *de = d.d_error[0].at(p, r);
      T *deh = d.d_error_hidden.at(p, r), *xz = d.extra_z[0].at(p, r);
      for (idx c = 0; c < a.error_hidden.axis.width; c += kLanes<T>) {
        const Vec<T> e = load(de + c);
        store(deh + c, e * load(slope + c));
        store(xz + c, e * load(eh + c) * load(curve + c));
      }
    }
  });
}

// The write's part of the adjoint: d_x and d_hidden at the keys, d_delta, what reaches the pre-activations directly, and the
// adjoint state through the update and the errors.
template <class T>
void write_adjoint(const Team& team, const Net& net, Activations<T>& a, Adjoints<T>& d, const Coefficients<T>& coef,
                   const CoefficientGradients<T>& d_coef, const State<T>& state, const State<T>& g, Mat<T>* d_products,
                   idx keys) {
  const int last = net.weights - 1;
  const Mat<T> d_x = d.d_x.rows_from(0, keys);
  if (net.delta()) {
    a.rule.begin_chunk(coef.step, coef.retention);
    a.rule.begin_chunk_adjoint();
  }
  for (int i = 0; i < net.weights; ++i) {
    const bool input = i < net.inputs;
    const Mat<T> d_inputs = input ? d_x : d.d_hidden.rows_from(0, keys);
    const Mat<T> d_errors = input ? d.d_error[i] : d.d_delta;
    const bool first = i == 0 || i == net.inputs;  // of the layers with these inputs
    if (!net.delta()) {
      gd_adjoint(team, net, a, d, i, coef, d_coef, state, g, d_inputs, T(first ? 0 : 1), d_errors,
                 keys);
      continue;
    }
    if (first) {
      a.rule.begin_layer(team, layer_inputs(net, a, i, keys));
      a.rule.begin_layer_adjoint();
    }
    a.rule.update_adjoint(team, layer_errors(net, a, i, keys), layer_product(net, a, i, keys), state.w[i], g.w[i],
                          transposed(team, net, g.w[i], d.turned), d_inputs, T(first ? 0 : 1), d_errors, d_products[i]);
    if (i + 1 == net.inputs || i == last) a.rule.end_layer_adjoint(team, d_inputs, d_coef.step);
  }
  if (net.delta()) a.rule.end_chunk_adjoint(d_coef.retention);
  if (!net.has_hidden()) return;
  if (net.form == Form::mlp)
    mlp_errors_adjoint(team, a, d, keys);
  else
    glu_errors_adjoint(team, a, d, keys);
  if (net.delta())
    for (int i = 0; i < net.inputs; ++i) add(team, d.extra_z[i], d_products[i]);
  // error_hidden = delta W_out^T
  gemm_nn(team, d.d_error_hidden, state.w[last], d.d_delta, d.d_delta, T(1), T(1));
  gemm_tn(team, d.d_error_hidden, a.delta, g.w[last]);
}

// d_delta -> d_out at the keys (and values), d_target.
template <class T>
void objective_adjoint(const Team& team, const Net& net, const Adjoints<T>& d, idx keys) {
  const Mat<T> d_out = d.d_out.rows_from(0, keys);
  switch (net.objective) {
    case Objective::l2:
      copy(team, d_out, d.d_delta);
      return scale(team, d.d_target, T(-1), d.d_delta);
    case Objective::self:
      copy(team, d_out, d.d_delta);
      return scale(team, d.d_out.rows_from(keys, keys), T(-1), d.d_delta);
    case Objective::dot:
      fill_zero(team, d_out);
      return scale(team, d.d_target, T(-1), d.d_delta);
    case Objective::error:
      fill_zero(team, d_out);
      return copy(team, d.d_target, d.d_delta);
  }
}

// d_z from d_hidden at all rows, plus what the write adds at the keys.
template <class T>
void activation_adjoint(const Team& team, const Net& net, const Activations<T>& a, const Adjoints<T>& d, idx rows,
                        idx keys) {
  const bool glu = net.form == Form::glu;
  team.blocks(rows, d.d_hidden.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      const T *dh = d.d_hidden.at(p, r), *slope = a.slope.at(p, r);
      const T* up = glu ? a.z[1].at(p, r) : nullptr;
      const T* gate = glu ? a.gate.at(p, r) : nullptr;
      T *dz = d.d_z[0].at(p, r), *du = glu ? d.d_z[1].at(p, r) : nullptr;
      const T* xz = r < keys ? d.extra_z[0].at(p, r) : nullptr;
      const T* xu = r < keys && glu ? d.extra_z[1].at(p, r) : nullptr;
      for (idx c = 0; c < d.d_hidden.axis.width; c += kLanes<T>) {
        const Vec<T> h = load(dh + c), up_or_1 = glu ? load(up + c) : broadcast(T(1));
        const Vec<T> from_hidden = h * up_or_1 * load(slope + c);
        store(dz + c, xz ? from_hidden + load(xz + c) : from_hidden);
        if (glu) store(du + c, xu ? h * load(gate + c) + load(xu + c) : h * load(gate + c));
      }
    }
  });
}

// Adjoint of one chunk whose rows are loaded in a.x, a.target and, for the queries, d.d_out. rows.keys == 0: only read.
// On return d.d_x holds the gradients of all rows, d.d_target those of v, and g, dL/d(next state) before, dL/d(state).
// d_coef.step, retention and momentum_step are added to. known: which rows' intermediates are there already (see Kept).
template <class T>
void chunk_backward(const Team& team, const Net& net, Activations<T>& a, Adjoints<T>& d, Rows rows,
                    const Coefficients<T>& coef, const CoefficientGradients<T>& d_coef, const State<T>& state,
                    const State<T>& g, Known known) {
  const idx total = rows.total(), keys = rows.keys, written = keys + rows.self;
  const int last = net.weights - 1;
  const bool writes = keys > 0;
  // Of the outputs only those at the keys (and the values of `self`) matter here.
  if (known == Known::keys) {
    Rows queries;
    queries.queries = rows.queries;
    apply_network<T, 1>(team, net, state, a.from_row(written), queries, queries.total(), queries.total());
  } else if (known == Known::nothing) {
    apply_network<T, 2>(team, net, state, a, rows, total, total);
    if (writes && net.needs_key_output()) {
      const Mat<T> out = a.out.rows_from(0, written), x = a.x.rows_from(0, written);
      gemm_nn(team, net.has_hidden() ? a.hidden.rows_from(0, written) : x, state.w[last], out);
      if (net.delta()) copy(team, a.product, a.out.rows_from(0, keys));
      if (net.residual) add(team, out, x);
    }
    if (writes) form_delta(team, net, a, keys);
  }
  Transposed<T> w_out;
  if (net.has_hidden()) w_out = transposed(team, net, state.w[last], a.turned);

  Mat<T> d_products[kMaxWeights];
  if (writes) {
    if (net.has_hidden() && known == Known::nothing) gemm_nt(team, a.delta, w_out, a.error_hidden);
    form_errors(team, net, a, keys);
    if (net.delta()) {
      for (int i = 0; i < net.inputs && net.has_hidden(); ++i) d_products[i] = d.d_z[i].rows_from(0, keys);
      d_products[last] = d.d_product;
    }
    write_adjoint(team, net, a, d, coef, d_coef, state, g, d_products, keys);
    objective_adjoint(team, net, d, keys);
  }

  // The network at all rows: residual, last layer, activation, input layers.
  const Mat<T> x = a.x.rows_from(0, total), d_x = d.d_x.rows_from(0, total), d_out = d.d_out.rows_from(0, total);
  const Mat<T> rest = d.d_x.rows_from(keys, total - keys);
  if (net.residual) {
    if (writes) add(team, d_x.rows_from(0, keys), d_out.rows_from(0, keys));
    copy(team, rest, d_out.rows_from(keys, total - keys));
  } else {
    fill_zero(team, rest);
  }
  if (writes && net.delta()) add(team, d_out.rows_from(0, keys), d.d_product);
  if (!net.has_hidden()) {
    gemm_tn(team, x, d_out, g.w[0]);
    gemm_nt(team, d_out, transposed(team, net, state.w[0], d.turned), d_x, T(1), T(1));
    return;
  }
  const Mat<T> d_hidden = d.d_hidden.rows_from(0, total);
  fill_zero(team, d_hidden.rows_from(keys, total - keys));
  gemm_tn(team, a.hidden.rows_from(0, total), d_out, g.w[last]);
  gemm_nt(team, d_out, w_out, d_hidden, T(1), T(1));
  activation_adjoint(team, net, a, d, total, keys);
  for (int i = 0; i < net.inputs; ++i) {
    const Mat<T> d_z = d.d_z[i].rows_from(0, total);
    gemm_tn(team, x, d_z, g.w[i]);
    gemm_nt(team, d_z, transposed(team, net, state.w[i], d.turned), d_x, T(1), T(1));
  }
}

}  // namespace hope::cpu::HOPE_ISA
