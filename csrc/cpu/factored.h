// One chunk of the factored plan: the same passes as chunk.h and chunk_backward.h, with each product by weights replaced by
// one with the shared weights and, for each block of pairs, two with the pairs. Weights and pairs are read where they lie.
//
// FLOPs per token of an mlp with S pairs before it: 4 D H + 4 (D + H) S to read, half as many more to write; nothing of size
// D H is written.
#pragma once

#include "../factored.h"
#include "scan.h"

namespace hope::cpu::HOPE_ISA {

// [rows, columns] in the caller's memory, rows `stride` apart; `columns`, or what follows it in a row, is whole vectors.
template <class T>
Mat<T> in_place(const void* data, idx offset, idx rows, idx columns, idx stride) {
  const Axis axis = make_axis<T>(columns);
  return Mat<T>{data ? static_cast<T*>(const_cast<void*>(data)) + offset : nullptr, stride, axis.width, rows, axis};
}

inline Net make_factored_net(const FactoredChunk& chunk, ScanProblem problem) {
  problem.form = chunk.form;
  problem.activation = chunk.activation;
  problem.objective = chunk.objective;
  problem.rule = Rule::gd;
  problem.residual = chunk.residual;
  problem.dtype = chunk.dtype;
  problem.dim = chunk.dim;
  problem.hidden = chunk.hidden;
  problem.chunk_size = chunk.rows;
  return chunk.dtype == DType::float64 ? make_net<double>(problem) : make_net<float>(problem);
}

// Whether the sequences of a head are read together: few tokens of each, which are done in the time that the shared weights take
// to be read once. Not by how many there are: a sequence's sums are the same alone.
inline bool reads_together(const FactoredChunk& chunk) {
  return !chunk.writes && !chunk.kept && chunk.rows <= kStreamRows && kMemoryRows * chunk.dim * chunk.hidden >= kSharedWork;
}

// A chunk of one head and of one sequence, or of `together` of them.
template <class T>
class FactoredTask {
 public:
  FactoredTask(const FactoredChunk& chunk, const Net& net, const Team& team, idx sequence, idx head, idx together = 1)
      : chunk_(chunk),
        net_(net),
        team_(team),
        sequence_(sequence),
        head_(head),
        task_(sequence * chunk.heads + head),
        together_(together) {}

  // Rows that are computed at once: all that are written, a bounded number where there is only reading.
  static idx piece_rows(const FactoredChunk& chunk) { return chunk.writes ? chunk.rows : min(chunk.rows, kReadRows); }
  static idx piece_count(const FactoredChunk& chunk) { return ceil_div(chunk.rows, max(1, piece_rows(chunk))); }

  void layout(Arena& arena, bool backward) {
    const idx rows = piece_rows(chunk_), keys = chunk_.writes ? rows : 0;
    capacity_ = together_ * rows + (net_.self() ? keys : 0);
    acts_.layout(arena, net_, capacity_, keys, false, false);
    Arena count;
    Kept<T> kept;
    kept.layout(count, net_, capacity_, keys);
    kept_bytes_ = idx(count.stride());
    idx most = 1, padded = 0;
    for (idx j = 0; j < chunk_.block_count; ++j) {
      most = max(most, chunk_.blocks[j].count);
      padded += round_up(chunk_.blocks[j].count);
    }
    scores_ = arena.matrix<T>(capacity_, make_axis<T>(most));
    scale_size_ = padded + 256;  // a pass over scores reads whole panels
    scale_ = arena.array<T>(together_ * scale_size_);
    if (!backward) return;
    adjoints_.layout(arena, net_, capacity_, keys, false);
    d_scores_ = arena.matrix<T>(capacity_, make_axis<T>(most));
    d_scale_ = arena.array<T>(round_up(most) + 256);
    unscaled_ = arena.matrix<T>(capacity_, make_axis<T>(max(net_.dim, net_.hidden)));
    row_sums_ = arena.array<T>(capacity_);
    begun_ = arena.array<const T*>(kMaxWeights + (kMaxInputs + kMaxWeights) * chunk_.block_count);
  }
  idx kept_bytes() const { return kept_bytes_; }

  void forward(const FactoredResult& result) {
    if (reads_together(chunk_)) return read_together(result);
    load_scale();
    const idx step = piece_rows(chunk_);
    for (idx first = 0; first < chunk_.rows; first += step) forward_rows(first, min(step, chunk_.rows - first), result);
  }

  void backward(const FactoredGradients& grads) {
    load_scale();
    const idx step = piece_rows(chunk_);
    for (idx first = 0; first < chunk_.rows; first += step) backward_rows(first, min(step, chunk_.rows - first), grads);
    finish(grads);
  }

 private:
  static idx round_up(idx n) { return ceil_div(n, kLanes<T>) * kLanes<T>; }

  // ---- where things lie ---------------------------------------------------------------------------------------------

  void* token(const TokenView& view, idx row) const {
    return offset(view.data, chunk_.dtype, sequence_ * view.row + row * view.token + head_ * view.head);
  }
  idx out(int i) const { return net_.out_axis(i).n; }
  int source(int i) const { return i < net_.inputs ? 0 : 1; }
  Mat<T> weight(int i) const {
    return in_place<T>(chunk_.weights[i], head_ * net_.in(i) * out(i), net_.in(i), out(i), out(i));
  }
  Mat<T> turned_weight(int i) const {
    return in_place<T>(chunk_.turned_weights[i], head_ * net_.in(i) * out(i), out(i), net_.in(i), net_.in(i));
  }
  Mat<T> pairs(const void* data, const PairBlock& block, idx stride, idx features) const {
    return in_place<T>(data, task_ * stride * features, block.count, features, features);
  }
  Mat<T> turned_pairs(const void* data, const PairBlock& block, idx features) const {
    return in_place<T>(data, task_ * features * block.turned_stride, features, block.count, block.turned_stride);
  }
  T* own(const FactoredResult& result, void* data, idx features) const {
    return static_cast<T*>(data) + task_ * result.stride * features;
  }
  T decay() const { return chunk_.decay ? static_cast<const T*>(chunk_.decay)[task_] : T(1); }
  Kept<T> kept(idx piece) const {
    Kept<T> result;
    if (!chunk_.kept) return result;
    Arena arena(static_cast<char*>(chunk_.kept) + task_ * chunk_.kept_bytes + piece * kept_bytes_);
    result.layout(arena, net_, capacity_, chunk_.writes ? chunk_.rows : 0);
    return result;
  }

  // The pairs of a block as a product sees them: scores with `keys`, sums of `values`.
  struct Link {
    Mat<T> keys, turned_keys, values, turned_values, grad_keys, grad_values;
  };
  Link inputs_to_errors(const PairBlock& b, int i) const {
    const int s = source(i);
    const idx in = net_.in(i);
    return {pairs(b.inputs[s], b, b.stride, in),           turned_pairs(b.turned_inputs[s], b, in),
            pairs(b.errors[i], b, b.stride, out(i)),       turned_pairs(b.turned_errors[i], b, out(i)),
            pairs(b.grad_inputs[s], b, b.count, in),       pairs(b.grad_errors[i], b, b.count, out(i))};
  }
  // Of the last layer, for the errors' way back.
  Link errors_to_inputs(const PairBlock& b, int i) const {
    const Link link = inputs_to_errors(b, i);
    return {link.values, link.turned_values, link.keys, link.turned_keys, link.grad_values, link.grad_keys};
  }

  // Each block's weights of pairs, behind one another in whole vectors.
  void load_scale() {
    idx total = 0;
    for (idx j = 0; j < chunk_.block_count; ++j) total += chunk_.blocks[j].count;
    const T* from = static_cast<const T*>(chunk_.scale) + task_ * total;
    T* to = scale_;
    for (idx j = 0; j < chunk_.block_count; ++j) {
      const idx n = chunk_.blocks[j].count;
      std::memcpy(to, from, size_t(n) * sizeof(T));
      std::memset(to + n, 0, size_t(round_up(n) - n) * sizeof(T));
      from += n;
      to += round_up(n);
    }
    std::memset(to, 0, 256 * sizeof(T));
  }

  // ---- products -----------------------------------------------------------------------------------------------------

  void form_scores(const Mat<T>& to, const Mat<T>& x, const Link& link) {
    if (link.turned_keys)
      gemm_nn(team_, x, link.turned_keys, to);
    else
      gemm_nt_dots(team_, x, link.keys, to, T(1), T(0));
  }

  // outs[i] = gamma x bases[i] - sum over blocks of (a . (x keys^T)) values, `link(block, i)` for each i: layers that read x.
  template <class F>
  void product(const Mat<T>& x, int count, const Mat<T>* bases, const Mat<T>* outs, const F& link) {
    for (int i = 0; i < count; ++i) gemm_nn(team_, x, bases[i], outs[i], decay(), T(0));
    add_pairs(x, count, outs, link);
  }
  template <class F>
  void add_pairs(const Mat<T>& x, int count, const Mat<T>* outs, const F& link) {
    const T* scale = scale_;
    for (idx j = 0; j < chunk_.block_count; ++j) {
      const PairBlock& block = chunk_.blocks[j];
      if (block.count == 0) continue;
      const Mat<T> scores = scores_.reshaped(x.rows, make_axis<T>(block.count));
      form_scores(scores, x, link(block, 0));
      team_.blocks(scores.rows, scores.axis, [&](idx p, idx r0, idx r1) {
        for (idx r = r0; r < r1; ++r)
          for (idx c = 0; c < scores.axis.valid(p); c += kLanes<T>) {
            T* at = scores.at(p, r) + c;
            store(at, load(at) * load(scale + p * scores.axis.width + c));
          }
      });
      for (int i = 0; i < count; ++i) gemm_nn(team_, scores, link(block, i).values, outs[i], T(-1), T(1));
      scale += round_up(block.count);
    }
  }

  // Adjoint of product(): adds to d_x and to the gradients of pairs, scale and decay, but not to those of the bases, whose
  // transposes are `turned`.
  template <class F>
  void product_adjoint(const FactoredGradients& grads, const Mat<T>& x, const Mat<T>& d_x, int count, const Mat<T>* d_outs,
                       const Mat<T>* turned, const F& link) {
    for (int i = 0; i < count; ++i) {
      if (!grads.decay) {
        gemm_nn(team_, d_outs[i], turned[i], d_x, decay(), T(1));
        continue;
      }
      const Mat<T> unscaled = unscaled_.reshaped(x.rows, x.axis);
      gemm_nn(team_, d_outs[i], turned[i], unscaled);
      static_cast<T*>(grads.decay)[task_] += dot(team_, x, unscaled, row_sums_);
      add_scaled(d_x, decay(), unscaled);
    }
    const T* scale = scale_;
    T* d_scale = grads.scale ? static_cast<T*>(grads.scale) : nullptr;
    idx total = 0, before = 0;
    for (idx j = 0; j < chunk_.block_count; ++j) total += chunk_.blocks[j].count;
    for (idx j = 0; j < chunk_.block_count; ++j) {
      const PairBlock& block = chunk_.blocks[j];
      if (block.count == 0) continue;
      const Axis axis = make_axis<T>(block.count);
      const Mat<T> scores = scores_.reshaped(x.rows, axis), d_scores = d_scores_.reshaped(x.rows, axis);
      form_scores(scores, x, link(block, 0));
      for (int i = 0; i < count; ++i)
        gemm_nn(team_, d_outs[i], link(block, i).turned_values, d_scores, T(-1), T(i == 0 ? 0 : 1));
      scores_adjoint(scores, d_scores, scale);
      if (d_scale)
        for (idx c = 0; c < block.count; ++c) d_scale[task_ * total + before + c] += d_scale_[c];
      for (int i = 0; i < count; ++i)
        if (const Mat<T> to = link(block, i).grad_values) gemm_tn(team_, scores, d_outs[i], to, T(-1), begun(to));
      const Link first = link(block, 0);
      if (first.grad_keys) gemm_tn(team_, d_scores, x, first.grad_keys, T(1), begun(first.grad_keys));
      gemm_nn(team_, d_scores, first.keys, d_x, T(1), T(1));
      scale += round_up(block.count);
      before += block.count;
    }
  }

  // to += a x, in one rounding however it is compiled for one thread and for several: the same bits.
  void add_scaled(const Mat<T>& to, T a, const Mat<T>& x) {
    team_.blocks(x.rows, x.axis, [&](idx p, idx r0, idx r1) {
      for (idx r = r0; r < r1; ++r)
        for (idx c = 0; c < x.axis.width; c += kLanes<T>) {
          Vec<T> sum = load(to.at(p, r) + c);
          multiply_add(sum, a, load(x.at(p, r) + c));
          store(to.at(p, r) + c, sum);
        }
    });
  }

  // d_scale_ = sums down the columns of scores . d_scores, then both times the scale.
  void scores_adjoint(const Mat<T>& scores, const Mat<T>& d_scores, const T* scale) {
    constexpr idx L = kLanes<T>;
    const idx width = scores.axis.width;
    team_.each(scores.axis.panels, [&](idx p) {
      for (idx c = 0; c < scores.axis.valid(p); c += L) {
        const Vec<T> a = load(scale + p * width + c);
        Vec<T> sum = zero<T>();
        for (idx r = 0; r < scores.rows; ++r) {
          T *s = scores.at(p, r) + c, *d = d_scores.at(p, r) + c;
          sum += load(s) * load(d);
          store(s, a * load(s));
          store(d, a * load(d));
        }
        store(d_scale_ + p * width + c, sum);
      }
    });
  }

  // ---- one block of rows --------------------------------------------------------------------------------------------

  Rows load_tokens(idx first, idx count) {
    Rows rows;
    (chunk_.writes ? rows.keys : rows.queries) = count;
    load_rows(team_, acts_.x.rows_from(0, count), token(chunk_.x, first), chunk_.dtype, chunk_.x.token);
    if (chunk_.writes && net_.self()) {
      rows.self = count;
      load_rows(team_, acts_.x.rows_from(count, count), token(chunk_.target, first), chunk_.dtype, chunk_.target.token);
    }
    return rows;
  }

  void forward_rows(idx first, idx count, const FactoredResult& result) {
    const Rows rows = load_tokens(first, count);
    const idx total = rows.total(), keys = rows.keys;
    const bool keeps = chunk_.kept;
    Activations<T> a = keeps ? kept(first / piece_rows(chunk_)).within(acts_) : acts_;
    const Mat<T> x = a.x.rows_from(0, total), y = a.out.rows_from(0, total);
    const auto link = [&](const PairBlock& b, int i) { return inputs_to_errors(b, i); };
    const int last = net_.weights - 1;
    const auto last_link = [&](const PairBlock& b, int) { return inputs_to_errors(b, last); };
    const Mat<T> w_last = weight(last);
    if (net_.has_hidden()) {
      Mat<T> bases[kMaxInputs], outs[kMaxInputs];
      for (int i = 0; i < net_.inputs; ++i) {
        bases[i] = weight(i);
        outs[i] = a.z[i].rows_from(0, total);
      }
      product(x, net_.inputs, bases, outs, link);
      const Mat<T> hidden = a.hidden.rows_from(0, total);
      if (keeps)
        activate_rows<2>(a, hidden, total, keys);
      else
        activate_rows<1>(a, hidden, keys, 0);
      product(hidden, 1, &w_last, &y, last_link);
      if (keys > 0) store_matrix(team_, own(result, result.hidden, net_.hidden), a.hidden.rows_from(0, keys));
    } else {
      product(x, 1, &w_last, &y, last_link);
    }
    if (net_.residual) add(team_, y, x);
    if (result.output.data)
      store_rows(team_, token(result.output, first), chunk_.dtype, result.output.token, a.out.rows_from(0, count));
    if (keys == 0) return;
    if (!net_.self())
      load_rows(team_, a.target.rows_from(0, keys), token(chunk_.target, first), chunk_.dtype, chunk_.target.token);
    form_delta(team_, net_, a, keys);
    store_matrix(team_, own(result, result.errors[last], net_.dim), a.delta.rows_from(0, keys));
    if (!net_.has_hidden()) return;
    const Mat<T> delta = a.delta.rows_from(0, keys), error = a.error_hidden.rows_from(0, keys);
    if (chunk_.turned_weights[last])
      gemm_nn(team_, delta, turned_weight(last), error, decay(), T(0));
    else
      gemm_nt_dots(team_, delta, w_last, error, decay(), T(0));
    add_pairs(delta, 1, &error, [&](const PairBlock& b, int) { return errors_to_inputs(b, last); });
    form_errors(team_, net_, a, keys);
    for (int i = 0; i < net_.inputs; ++i)
      store_matrix(team_, own(result, result.errors[i], net_.hidden), a.error[i].rows_from(0, keys));
  }

  // A few tokens of each sequence: products with shared weights for all of them, with pairs for each.
  void read_together(const FactoredResult& result) {
    const idx rows = chunk_.rows, total = together_ * rows;
    const Mat<T> x = acts_.x.rows_from(0, total), y = acts_.out.rows_from(0, total), hidden = acts_.hidden.rows_from(0, total);
    const auto each = [&](const auto& body) {
      team_.each(together_, [&](idx i) { body(FactoredTask(*this, i), i * rows); });
    };
    each([&](FactoredTask one, idx row) {
      one.load_scale();
      load_rows(one.team_, x.rows_from(row, rows), one.token(chunk_.x, 0), chunk_.dtype, chunk_.x.token);
    });
    const auto product = [&](const Mat<T>& inputs, int first, int count, const Mat<T>* outs) {
      for (int i = 0; i < count; ++i) gemm_nn(team_, inputs, weight(first + i), outs[i]);
      each([&](FactoredTask one, idx row) {
        Mat<T> own[kMaxInputs];
        for (int i = 0; i < count; ++i) {
          own[i] = outs[i].rows_from(row, rows);
          if (chunk_.decay) scale(one.team_, own[i], one.decay(), own[i]);
        }
        one.add_pairs(inputs.rows_from(row, rows), count, own,
                      [&](const PairBlock& b, int i) { return one.inputs_to_errors(b, first + i); });
      });
    };
    if (net_.has_hidden()) {
      Mat<T> z[kMaxInputs];
      for (int i = 0; i < net_.inputs; ++i) z[i] = acts_.z[i].rows_from(0, total);
      product(x, 0, net_.inputs, z);
      activate_rows<1>(acts_, hidden, 0, 0);
    }
    product(net_.has_hidden() ? hidden : x, net_.weights - 1, 1, &y);
    if (net_.residual) add(team_, y, x);
    each([&](FactoredTask one, idx row) {
      store_rows(one.team_, one.token(result.output, 0), chunk_.dtype, result.output.token, y.rows_from(row, rows));
    });
  }

  template <int kOrder>
  void activate_rows(const Activations<T>& a, const Mat<T>& hidden, idx sloped, idx curved) {
    if (net_.form == Form::mlp)
      activate_mlp<T, kOrder>(team_, net_.activation, a.z[0], hidden, a.slope, a.curve, sloped, curved);
    else
      activate_glu<T, kOrder>(team_, net_.activation, a.z[0], a.z[1], a.gate, hidden, a.slope, a.curve, sloped, curved);
  }

  void load_or_zero(const Mat<T>& to, const void* from) {
    if (!from) return fill_zero(team_, to);
    load_contiguous(team_, to, static_cast<const T*>(from) + task_ * chunk_.rows * to.axis.n);
  }

  void backward_rows(idx first, idx count, const FactoredGradients& grads) {
    const Rows rows = load_tokens(first, count);
    const idx total = rows.total();
    bool writes = false;  // whether a gradient reaches what was written
    for (int i = 0; i < net_.weights; ++i) writes |= grads.grad_errors[i] != nullptr;
    writes = chunk_.writes && (writes || grads.grad_hidden);
    const idx keys = writes ? rows.keys : 0;
    const Activations<T> a = kept(first / piece_rows(chunk_)).within(acts_);
    Adjoints<T>& d = adjoints_;
    const int last = net_.weights - 1;
    const Mat<T> x = a.x.rows_from(0, total), d_x = d.d_x.rows_from(0, total), d_out = d.d_out.rows_from(0, total);
    const Mat<T> w_last = weight(last), turned_last = turned_weight(last);
    const auto link = [&](const PairBlock& b, int i) { return inputs_to_errors(b, i); };
    const auto last_link = [&](const PairBlock& b, int) { return inputs_to_errors(b, last); };

    fill_zero(team_, d_out);
    if (net_.has_hidden()) fill_zero(team_, d.d_hidden.rows_from(0, total));
    if (writes) {
      load_or_zero(d.d_delta, grads.grad_errors[last]);
      if (net_.has_hidden()) {
        load_or_zero(d.d_hidden.rows_from(0, keys), grads.grad_hidden);
        for (int i = 0; i < net_.inputs; ++i) load_or_zero(d.d_error[i], grads.grad_errors[i]);
        if (net_.form == Form::mlp)
          mlp_errors_adjoint(team_, a, d, keys);
        else
          glu_errors_adjoint(team_, a, d, keys);
        const Mat<T> delta = a.delta.rows_from(0, keys), d_error = d.d_error_hidden.rows_from(0, keys);
        product_adjoint(grads, delta, d.d_delta, 1, &d_error, &w_last,
                        [&](const PairBlock& b, int) { return errors_to_inputs(b, last); });
        add_weight_gradient(grads, last, d_error, delta);
      }
      objective_adjoint(team_, net_, d, keys);
    }
    if (grads.grad_output.data) {
      const Mat<T> read = d.d_x.rows_from(0, count);
      load_rows(team_, read, token(grads.grad_output, first), chunk_.dtype, grads.grad_output.token);
      add(team_, d.d_out.rows_from(0, count), read);
    }
    if (net_.residual)
      copy(team_, d_x, d_out);
    else
      fill_zero(team_, d_x);
    if (!net_.has_hidden()) {
      product_adjoint(grads, x, d_x, 1, &d_out, &turned_last, last_link);
      add_weight_gradient(grads, last, x, d_out);
    } else {
      const Mat<T> hidden = a.hidden.rows_from(0, total), d_hidden = d.d_hidden.rows_from(0, total);
      product_adjoint(grads, hidden, d_hidden, 1, &d_out, &turned_last, last_link);
      add_weight_gradient(grads, last, hidden, d_out);
      activation_adjoint(team_, net_, a, d, total, keys);
      Mat<T> turned[kMaxInputs], d_z[kMaxInputs];
      for (int i = 0; i < net_.inputs; ++i) {
        turned[i] = turned_weight(i);
        d_z[i] = d.d_z[i].rows_from(0, total);
      }
      product_adjoint(grads, x, d_x, net_.inputs, d_z, turned, link);
      for (int i = 0; i < net_.inputs; ++i) add_weight_gradient(grads, i, x, d_z[i]);
    }
    if (grads.x.data) store_rows(team_, token(grads.x, first), chunk_.dtype, grads.x.token, d.d_x.rows_from(0, count));
    if (!chunk_.writes || !grads.target.data) return;
    if (!writes)
      return zero_rows(token(grads.target, first), chunk_.dtype, grads.target.token, count, net_.dim);
    store_rows(team_, token(grads.target, first), chunk_.dtype, grads.target.token,
               net_.self() ? d.d_x.rows_from(count, count) : d.d_target.rows_from(0, count));
  }

  // dL/dW_i += gamma inputs^T errors.
  void add_weight_gradient(const FactoredGradients& grads, int i, const Mat<T>& inputs, const Mat<T>& errors) {
    if (!grads.weights[i]) return;
    const Mat<T> to = in_place<T>(grads.weights[i], head_ * net_.in(i) * out(i), net_.in(i), out(i), out(i));
    gemm_tn(team_, inputs, errors, to, decay(), sequence_ > 0 ? T(1) : begun(to));
  }

  // 0 for a gradient that nothing has been added to yet (it may hold anything), 1 from then on.
  T begun(const Mat<T>& gradient) {
    for (int i = 0; i < begun_count_; ++i)
      if (begun_[i] == gradient.data) return T(1);
    begun_[begun_count_++] = gradient.data;
    return T(0);
  }

  // What has got nothing is 0.
  void finish(const FactoredGradients& grads) {
    const auto zero = [&](const Mat<T>& m) {
      if (m && begun(m) == T(0))
        for (idx r = 0; r < m.rows; ++r) std::memset(m.data + r * m.ld, 0, size_t(m.axis.n) * sizeof(T));
    };
    for (idx j = 0; j < chunk_.block_count; ++j)
      for (int i = 0; i < net_.weights; ++i) {
        const Link link = inputs_to_errors(chunk_.blocks[j], i);
        zero(link.grad_keys);
        zero(link.grad_values);
      }
    for (int i = 0; i < net_.weights && sequence_ == 0; ++i)
      zero(in_place<T>(grads.weights[i], head_ * net_.in(i) * out(i), net_.in(i), out(i), out(i)));
  }

  // The i-th of several sequences, by a thread alone.
  FactoredTask(const FactoredTask& all, idx i) : FactoredTask(all) {
    team_ = Team{};
    sequence_ += i;
    task_ += i * chunk_.heads;
    scale_ += i * scale_size_;
    scores_.data += i * chunk_.rows * scores_.axis.width * scores_.axis.panels;
  }
  FactoredTask(const FactoredTask&) = default;

  const FactoredChunk& chunk_;
  const Net& net_;
  Team team_;
  idx sequence_;
  const idx head_;
  idx task_;
  const idx together_;
  idx scale_size_ = 0;
  Activations<T> acts_;
  Adjoints<T> adjoints_;
  Mat<T> scores_, d_scores_, unscaled_;
  const T** begun_ = nullptr;  // gradients that are there
  int begun_count_ = 0;
  T *scale_ = nullptr, *d_scale_ = nullptr, *row_sums_ = nullptr;
  idx capacity_ = 1, kept_bytes_ = 0;
};

// Runs body(task) for every (sequence, head), or for groups of sequences that are read together. Gradients of a head's weights
// are the sum over the sequences: in a backward those of a head follow one another, in their order.
template <class T, class F>
Status run_factored(const FactoredChunk& chunk, bool backward, F&& body) {
  const Net net = make_factored_net(chunk, {});
  const bool together = !backward && reads_together(chunk);
  const idx group = backward ? chunk.batch : together ? min(chunk.batch, kReadRows / chunk.rows) : 1;
  const idx units = chunk.heads * ceil_div(chunk.batch, group), width = together ? group : 1;
  const bool inside = shares_products(net, chunk.rows, units, chunk.threads);
  const Team team{inside ? chunk.threads : 1};
  Arena count;
  FactoredTask<T> any(chunk, net, team, 0, 0, width);
  any.layout(count, backward);
  if ((backward || chunk.kept) && chunk.kept_bytes < any.kept_bytes() * FactoredTask<T>::piece_count(chunk))
    return {StatusCode::invalid_argument, "the memory for a backward is too small"};
  return with_scratch(chunk.threads, inside, units, count.used(), [&](void* memory, idx unit) {
    const idx head = unit % chunk.heads, first = unit / chunk.heads * group, end = min(chunk.batch, first + group);
    for (idx s = first; s < end; s += width) {
      Arena arena(memory);
      FactoredTask<T> task(chunk, net, team, s, head, min(width, end - s));
      task.layout(arena, backward);
      body(task);
    }
  });
}

}  // namespace hope::cpu::HOPE_ISA
