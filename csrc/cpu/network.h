// The memory as a network: its shape, the state of one task, the coefficients of one chunk, and the elementwise passes
// between its products. Rows of every activation matrix are tokens: first the keys of a chunk, then (objective `self`) its
// values, then its queries, so that one product serves them all.
#pragma once

#include "../memory.h"
#include "activation.h"
#include "gemm.h"

namespace hope::cpu::HOPE_ISA {

// Chunks of up to this many tokens multiply by transposed weights with dot products instead of transposing a copy.
constexpr idx kDotRows = 4;

// From chunks of this many tokens on, products are faster in bfloat16, with the time to pack the weights for them.
constexpr idx kPackedRows = 8;

struct Net {
  Form form;
  Activation activation;
  Objective objective;
  Rule rule;
  bool residual, momentum;
  bool rounds;  // products round their operands to bfloat16; the same for every call of a stream
  idx dim, hidden, chunk;
  int weights;  // number of weight matrices
  int inputs;   // how many of them are applied to the memory's input: the last of `mlp` and `glu` is not
  Axis dim_axis, hidden_axis;

  bool has_hidden() const { return form != Form::linear; }
  bool delta() const { return rule == Rule::dgd; }
  bool self() const { return objective == Objective::self; }
  bool dots() const { return chunk <= kDotRows; }
  // Whether the memory's output at the keys enters the write.
  bool needs_key_output() const { return delta() || objective == Objective::l2 || self(); }
  idx in(int i) const { return i < inputs ? dim : hidden; }
  const Axis& out_axis(int i) const { return has_hidden() && i < inputs ? hidden_axis : dim_axis; }
};

template <class T>
Net make_net(const ScanProblem& problem) {
  Net net;
  net.form = problem.form;
  net.activation = problem.activation;
  net.objective = problem.objective;
  net.rule = problem.rule;
  net.residual = problem.residual != 0;
  net.momentum = problem.momentum_step != nullptr;
  net.rounds = kHasPairs && problem.dtype == DType::bfloat16 && problem.chunk_size >= kPackedRows;
  net.dim = problem.dim;
  net.hidden = problem.form == Form::linear ? problem.dim : problem.hidden;
  net.chunk = problem.chunk_size;
  net.weights = weight_count(problem.form);
  net.inputs = problem.form == Form::linear ? 1 : net.weights - 1;
  net.dim_axis = make_axis<T>(net.dim);
  net.hidden_axis = make_axis<T>(net.hidden);
  return net;
}

template <class T>
struct State {
  Mat<T> w[kMaxWeights];
  Mat<T> s[kMaxWeights];  // momentum
};

template <class T>
State<T> make_state(Arena& arena, const Net& net) {
  State<T> state;
  for (int i = 0; i < net.weights; ++i) state.w[i] = arena.matrix<T>(net.in(i), net.out_axis(i));
  if (net.momentum)
    for (int i = 0; i < net.weights; ++i) state.s[i] = arena.matrix<T>(net.in(i), net.out_axis(i));
  return state;
}

// What the rules take from outside: per token `step`, `retention` (dgd), `momentum_step`; per chunk the scalars
//   gd            W' = decay W - U^T diag(step) E
//   gd, momentum  W' = decay W + carry S - U^T diag(step) E,   S' = momentum_decay S - U^T diag(momentum_step) E
//   dgd           step = eta, retention = alpha (null: 1); see delta_rule.h
template <class T>
struct Coefficients {
  const T *step = nullptr, *retention = nullptr, *momentum_step = nullptr;
  T decay = 1, carry = 0, momentum_decay = 0;
};

// Rows of the activation matrices of one chunk.
struct Rows {
  idx keys = 0, self = 0, queries = 0;
  idx total() const { return keys + self + queries; }
};

// act(z), slope = act'(z) over the first `sloped` rows, curve = act''(z) (kOrder 2) over the first `curved` of them. Each
// vector of act(z) goes to finish(panel, row, column, act); z may be what it writes.
template <class T, int kOrder, class F>
void activate(const Team& team, Activation activation, const Mat<T>& z, const Mat<T>& slope, const Mat<T>& curve, idx sloped,
              idx curved, const F& finish) {
  with_activation<T>(activation, [&](auto act) {
    using A = decltype(act);
    team.blocks(z.rows, z.axis, [&](idx p, idx r0, idx r1) {
      for (idx r = r0; r < r1; ++r) {
        const T* zs = z.at(p, r);
        T* d1s = r < sloped ? slope.at(p, r) : nullptr;
        T* d2s = kOrder >= 2 && r < curved ? curve.at(p, r) : nullptr;
        for (idx c = 0; c < z.axis.width; c += kLanes<T>) {
          Vec<T> a, d1, d2;
          if (d2s) {
            A::template eval<kOrder>(load(zs + c), a, d1, d2);
            store(d2s + c, d2);
            store(d1s + c, d1);
          } else if (d1s) {
            A::template eval<1>(load(zs + c), a, d1, d2);
            store(d1s + c, d1);
          } else {
            A::template eval<0>(load(zs + c), a, d1, d2);
          }
          finish(p, r, c, a);
        }
      }
    });
  });
}

// hidden = act(z).
template <class T, int kOrder>
void activate_mlp(const Team& team, Activation activation, const Mat<T>& z, const Mat<T>& hidden, const Mat<T>& slope,
                  const Mat<T>& curve, idx sloped, idx curved) {
  activate<T, kOrder>(team, activation, z.rows_from(0, hidden.rows), slope, curve, sloped, curved,
                      [&](idx p, idx r, idx c, Vec<T> a) { store(hidden.at(p, r) + c, a); });
}

// gate = act(z), hidden = gate * up.
template <class T, int kOrder>
void activate_glu(const Team& team, Activation activation, const Mat<T>& z, const Mat<T>& up, const Mat<T>& gate,
                  const Mat<T>& hidden, const Mat<T>& slope, const Mat<T>& curve, idx sloped, idx curved) {
  activate<T, kOrder>(team, activation, z.rows_from(0, hidden.rows), slope, curve, sloped, curved,
                      [&](idx p, idx r, idx c, Vec<T> a) {
                        store(gate.at(p, r) + c, a);
                        store(hidden.at(p, r) + c, a * load(up.at(p, r) + c));
                      });
}

// Row t of out = w[t] * x * y, with w absent for 1.
template <class T>
void multiply(const Team& team, const Mat<T>& out, const Mat<T>& x, const Mat<T>& y, const T* w = nullptr) {
  team.blocks(out.rows, out.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      T* o = out.at(p, r);
      const T *xs = x.at(p, r), *ys = y.at(p, r);
      const T a = w ? w[r] : T(1);
      for (idx c = 0; c < out.axis.width; c += kLanes<T>) store(o + c, a * load(xs + c) * load(ys + c));
    }
  });
}

// Errors of the two input layers of a glu: gate = eh * up * slope, up = eh * act. Either may be eh itself only if it is
// written last: error_up may be eh.
template <class T>
void glu_errors(const Team& team, const Mat<T>& eh, const Mat<T>& up, const Mat<T>& gate, const Mat<T>& slope,
                const Mat<T>& error_gate, const Mat<T>& error_up) {
  team.blocks(error_gate.rows, error_gate.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      const T *es = eh.at(p, r), *us = up.at(p, r), *gs = gate.at(p, r), *d1s = slope.at(p, r);
      T *og = error_gate.at(p, r), *ou = error_up.at(p, r);
      for (idx c = 0; c < error_gate.axis.width; c += kLanes<T>) {
        const Vec<T> e = load(es + c), u = load(us + c), g = load(gs + c), d1 = load(d1s + c);
        store(og + c, e * u * d1);
        store(ou + c, e * g);
      }
    }
  });
}

}  // namespace hope::cpu::HOPE_ISA
