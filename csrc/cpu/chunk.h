// One chunk forward: read the state with the queries, form the errors at the keys, write the next state.
//
// FLOPs per token of an mlp with objective l2: 14 D H (10 D H when the queries are the keys). The state (2 D H values) and
// the activations of the chunk (about 4 C H values) stay in the core's own cache between the products.
#pragma once

#include <initializer_list>

#include "delta_rule.h"

namespace hope::cpu::HOPE_ISA {

// Activation matrices of one chunk, shared by the forward and, at the same rows, the backward.
template <class T>
struct Activations {
  Mat<T> x, target;            // inputs [rows, D]; v [keys, D] unless `self`
  Mat<T> z[2];                 // pre-activations of the input layers
  Mat<T> gate, hidden, slope;  // act(z) (glu), inputs of the last layer, act'(z)
  Mat<T> curve;                // act''(z) at the keys, for the backward
  Mat<T> out;                  // f(x) [rows, D]
  Mat<T> product;              // out without the residual, keys only (dgd)
  Mat<T> delta;                // dl/df at the keys
  Mat<T> error_hidden;         // delta W_out^T
  Mat<T> error[2];             // errors of the input layers (linear: delta)
  Mat<T> weighted;             // diag(step) E of one layer
  Mat<T> turned;               // W_out^T
  DeltaRule<T> rule;

  // `keep`: the backward needs what the forward may overwrite. `turns`: products with W_out^T make a copy of it.
  void layout(Arena& arena, const Net& net, idx rows, idx keys, bool keep, bool turns = true) {
    const bool hidden_layer = net.has_hidden(), glu = net.form == Form::glu;
    const Axis &d = net.dim_axis, &h = net.hidden_axis;
    if (keep && hidden_layer && keys > 0) curve = arena.matrix<T>(keys, h);
    keep = keep || net.delta();
    x = arena.matrix<T>(rows, d);
    if (!net.self()) target = arena.matrix<T>(keys, d);
    out = arena.matrix<T>(rows, d);
    delta = arena.matrix<T>(keys, d);
    if (net.delta()) product = arena.matrix<T>(keys, d);
    if (hidden_layer) {
      for (int i = 0; i < net.inputs; ++i) z[i] = arena.matrix<T>(rows, h);
      hidden = glu || keep ? arena.matrix<T>(rows, h) : z[0];
      gate = glu ? keep ? arena.matrix<T>(rows, h) : z[0] : Mat<T>{};
      slope = arena.matrix<T>(keep ? rows : keys, h);
      if (keys > 0) {
        for (int i = 0; i < net.inputs; ++i) error[i] = arena.matrix<T>(keys, h);
        error_hidden = keep ? arena.matrix<T>(keys, h) : error[net.inputs - 1];
      }
      if (turns && (keys > 0 || keep)) turned = arena.matrix<T>(net.dim, h);
    } else {
      z[0] = out;
      error[0] = delta;
    }
    if (keys > 0 && (net.momentum || keep)) weighted = arena.matrix<T>(keys, make_axis<T>(max(net.dim, net.hidden)));
    if (keys > 0 && net.delta()) rule.layout(arena, net, keep);
  }

  // The same matrices from row `first` on: what the network's layers read and write.
  Activations from_row(idx first) const {
    Activations view = *this;
    for (Mat<T>* m : {&view.x, &view.z[0], &view.z[1], &view.gate, &view.hidden, &view.slope, &view.out})
      if (m->data) m->data += first * m->ld;
    return view;
  }
};

// f(x) for rows [0, rows.total()) from x: z, hidden, slope, out. Rows of `out` before the first one that is wanted are not
// computed. kOrder 2 leaves act'' at the keys in a.curve.
template <class T, int kOrder>
void apply_network(const Team& team, const Net& net, const State<T>& state, const Activations<T>& a, Rows rows,
                   idx first_out, idx sloped) {
  const idx total = rows.total();
  const Mat<T> x = a.x.rows_from(0, total);
  const int last = net.weights - 1;
  for (int i = 0; i < net.inputs && net.has_hidden(); ++i) gemm_nn(team, x, state.w[i], a.z[i].rows_from(0, total));
  if (net.form == Form::mlp)
    activate_mlp<T, kOrder>(team, net.activation, a.z[0], a.hidden.rows_from(0, total), a.slope, a.curve, sloped,
                            rows.keys);
  if (net.form == Form::glu)
    activate_glu<T, kOrder>(team, net.activation, a.z[0], a.z[1], a.gate, a.hidden.rows_from(0, total), a.slope, a.curve,
                            sloped, rows.keys);
  const idx count = total - first_out;
  if (count <= 0) return;
  const Mat<T> out = a.out.rows_from(first_out, count), xs = a.x.rows_from(first_out, count);
  gemm_nn(team, net.has_hidden() ? a.hidden.rows_from(first_out, count) : xs, state.w[last], out);
  if (net.delta() && first_out == 0) copy(team, a.product.rows_from(0, rows.keys), a.out.rows_from(0, rows.keys));
  if (net.residual) add(team, out, xs);
}

// delta at the keys from out and the targets.
template <class T>
void form_delta(const Team& team, const Net& net, const Activations<T>& a, idx keys) {
  const Mat<T> delta = a.delta.rows_from(0, keys), out = a.out.rows_from(0, keys);
  switch (net.objective) {
    case Objective::l2: return combine(team, delta, T(1), out, T(-1), a.target);
    case Objective::self: return combine(team, delta, T(1), out, T(-1), a.out.rows_from(keys, keys));
    case Objective::dot: return scale(team, delta, T(-1), a.target);
    case Objective::error: return copy(team, delta, a.target.rows_from(0, keys));
  }
}

template <class T>
Transposed<T> transposed(const Team& team, const Net& net, const Mat<T>& m, const Mat<T>& memory) {
  if (net.dots()) return {m, {}};
  Transposed<T> result{m, memory.reshaped(m.axis.n, make_axis<T>(m.rows))};
  transpose(team, result.copy, m);
  return result;
}

// Errors of the input layers from error_hidden; those of an mlp come multiplied by `weights` where these are given.
template <class T>
void form_errors(const Team& team, const Net& net, const Activations<T>& a, idx keys, const T* weights = nullptr) {
  const Mat<T> eh = a.error_hidden.rows_from(0, keys);
  if (net.form == Form::mlp)
    multiply(team, a.error[0].rows_from(0, keys), eh, a.slope, weights);
  else if (net.form == Form::glu)
    glu_errors(team, eh, a.z[1], a.gate, a.slope, a.error[0].rows_from(0, keys), a.error[1]);
}

// Inputs and errors of layer i at the keys.
template <class T>
Mat<T> layer_inputs(const Net& net, const Activations<T>& a, int i, idx keys) {
  return (i < net.inputs ? a.x : a.hidden).rows_from(0, keys);
}
template <class T>
Mat<T> layer_errors(const Net& net, const Activations<T>& a, int i, idx keys) {
  return (i < net.inputs ? a.error[i] : a.delta).rows_from(0, keys);
}
template <class T>
Mat<T> layer_product(const Net& net, const Activations<T>& a, int i, idx keys) {
  return (net.has_hidden() && i < net.inputs ? a.z[i] : a.product).rows_from(0, keys);
}

// Plain gradient descent of an mlp needs the input layer's errors only multiplied by their steps: one pass fewer.
inline bool weighs_errors_early(const Net& net) { return net.form == Form::mlp && !net.delta() && !net.momentum; }

// The state after the chunk, from the errors; `to` may be `from`.
template <class T>
void write_state(const Team& team, const Net& net, Activations<T>& a, const Coefficients<T>& coef, const State<T>& from,
                 const State<T>& to, idx keys) {
  if (net.delta()) a.rule.begin_chunk(coef.step, coef.retention);
  for (int i = 0; i < net.weights; ++i) {
    const Mat<T> u = layer_inputs(net, a, i, keys), e = layer_errors(net, a, i, keys);
    if (net.delta()) {
      if (i == 0 || i == net.inputs) a.rule.begin_layer(team, u);
      a.rule.update(team, e, layer_product(net, a, i, keys), from.w[i], to.w[i]);
      continue;
    }
    const bool weighted = i < net.inputs && weighs_errors_early(net);
    const Mat<T> we = a.weighted && !weighted ? a.weighted.reshaped(keys, e.axis) : e;
    if (!weighted) scale_rows<false>(team, we, T(1), coef.step, e);
    if (!net.momentum) {
      gemm_tn(team, u, we, from.w[i], to.w[i], T(-1), coef.decay);
      continue;
    }
    combine(team, to.w[i], coef.decay, from.w[i], coef.carry, from.s[i]);
    gemm_tn(team, u, we, to.w[i], to.w[i], T(-1), T(1));
    scale_rows<false>(team, we, T(1), coef.momentum_step, e);
    gemm_tn(team, u, we, from.s[i], to.s[i], T(-1), coef.momentum_decay);
  }
}

// One complete chunk whose rows are loaded in a.x and a.target: f at the rows from first_out on, then the next state.
// kOrder 2 leaves what the backward needs of the keys (see Kept).
template <class T, int kOrder>
void chunk_forward(const Team& team, const Net& net, Activations<T>& a, Rows rows, const Coefficients<T>& coef,
                   const State<T>& from, const State<T>& to, idx first_out) {
  apply_network<T, kOrder>(team, net, from, a, rows, first_out, kOrder == 2 ? rows.total() : rows.keys);
  form_delta(team, net, a, rows.keys);
  if (net.has_hidden()) {
    gemm_nt(team, a.delta, transposed(team, net, from.w[net.weights - 1], a.turned), a.error_hidden);
    form_errors(team, net, a, rows.keys, weighs_errors_early(net) ? coef.step : nullptr);
  }
  write_state(team, net, a, coef, from, to, rows.keys);
}

}  // namespace hope::cpu::HOPE_ISA
