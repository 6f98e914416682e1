// One token of every sequence through all levels of a Continuum Memory System: `MemoryLevel.step` and `PlainLevel` of
// hope_kernels/layers/level.py, in one call. Memories are read and written by the scan (scan.h), as problems of one token and
// of one chunk; here are the targets, keys and gates of a token and what is kept of them.
#pragma once

#include "../step.h"
#include "scan.h"
#include "shared_products.h"

namespace hope::cpu::HOPE_ISA {

using ScanForward = Status (*)(const ScanProblem&, const ForwardResult&);

// Numbers of any dtype from `from[first]` on in the state dtype, and back, rounded.
template <class T>
void widen(DType dtype, const void* from, idx first, T* to, idx n) {
  with_token_element<T>(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* source = static_cast<const typename E::Memory*>(from) + first;
    for (idx i = 0; i < n; ++i) to[i] = T(E::read(source[i]));
  });
}
template <class T>
void narrow(DType dtype, const T* from, void* to, idx first, idx n) {
  with_token_element<T>(dtype, [&](auto element) {
    using E = decltype(element);
    auto* target = static_cast<typename E::Memory*>(to) + first;
    for (idx i = 0; i < n; ++i) target[i] = E::write(from[i]);
  });
}

template <class T>
T sigmoid(T z) {
  const T e = std::exp(-std::abs(z));
  return z < 0 ? e / (1 + e) : 1 / (1 + e);
}
// As torch.nn.functional.softplus: the identity beyond 20.
template <class T>
T softplus(T z) {
  return z > 20 ? z : std::log1p(std::exp(z));
}

template <class T>
class Step {
 public:
  Step(const StepProblem& problem, int threads, ScanForward scan)
      : p_(problem), threads_(threads), scan_(scan), width_(problem.heads * problem.dim) {}

  void layout(Arena& arena) {
    idx chunk = 1, hidden = width_;
    for (idx l = 0; l < p_.level_count; ++l) {
      chunk = max(chunk, p_.levels[l].chunk_size);
      if (p_.levels[l].chunk_size == 0) hidden = max(hidden, p_.levels[l].hidden);
    }
    x_ = TokenRows<T>::make(arena, p_.batch, width_);
    y_ = TokenRows<T>::make(arena, p_.batch, width_);
    gates_ = TokenRows<T>::make(arena, p_.batch, 3 * p_.heads);
    for (TokenRows<T>& z : hidden_) z = TokenRows<T>::make(arena, p_.batch, hidden);
    keys_ = arena.array<char>(p_.batch * width_ * element_size(p_.dtype));
    for (idx l = 0; l < p_.level_count; ++l)
      outputs_[l] = p_.independent || l < 2 ? arena.array<char>(p_.batch * width_ * element_size(p_.dtype)) : outputs_[l - 2];
    for (T*& c : per_token_) c = arena.array<T>(p_.batch * p_.heads * chunk);
    for (T*& c : per_chunk_) c = arena.array<T>(p_.batch * p_.heads);
  }

  Status run() {
    const void* x = p_.x;
    idx row = p_.x_row;
    for (idx l = 0; l < p_.level_count; ++l) {
      const StepLevel& level = p_.levels[l];
      void* output = !p_.independent && l + 1 == p_.level_count ? p_.output : outputs_[l];
      for (idx b = 0; b < p_.batch; ++b) {
        widen(p_.dtype, x, b * row, x_.at(b), width_);
        x_.pad(b);
      }
      if (level.chunk_size == 0) {
        plain(level, output);
      } else {
        const Status status = written(level, output);
        if (status.code != StatusCode::ok) return status;
      }
      if (!p_.independent) x = output, row = width_;
    }
    if (p_.independent) mix();
    for (idx b = 0; b < p_.batch; ++b) p_.positions[b] = seen(b) + 1;
    return {};
  }

 private:
  static constexpr T kNormEps = T(1e-6);

  idx seen(idx b) const { return max(0, p_.positions[b]); }
  idx slot(const StepLevel& level, idx b) const { return seen(b) % level.chunk_size; }
  bool due(const StepLevel& level, idx b) const { return slot(level, b) + 1 == level.chunk_size; }
  bool starts_again(const StepLevel& level, idx b) const { return level.segment > 0 && (seen(b) + 1) % level.segment == 0; }
  static T* state(float* numbers) { return static_cast<T*>(static_cast<void*>(numbers)); }

  // Calls body(first, count) over the longest runs of sequences for which `which` holds.
  template <class Which, class F>
  Status runs(const Which& which, F&& body) const {
    for (idx b = 0; b < p_.batch;) {
      idx end = b;
      while (end < p_.batch && which(end)) ++end;
      if (end > b) {
        const Status status = body(b, end - b);
        if (status.code != StatusCode::ok) return status;
      }
      b = end + 1;
    }
    return {};
  }

  // x_ + f(x_ / rms(x_)), with one network over the full width.
  void plain(const StepLevel& level, void* output) {
    for (idx b = 0; b < p_.batch; ++b) {
      T* normed = y_.at(b);
      const T scale = 1 / std::sqrt(dot_span(x_.at(b), x_.at(b), width_) / T(width_) + kNormEps);
      for (idx i = 0; i < width_; ++i) normed[i] = x_.at(b)[i] * scale;
      narrow(p_.dtype, normed, keys_, 0, width_);
      widen(p_.dtype, keys_, 0, normed, width_);
      y_.pad(b);
    }
    TokenRows<T> inputs = y_;
    if (level.form != Form::linear) {
      const int count = level.form == Form::glu ? 2 : 1;
      TokenRows<T> z[2] = {hidden_[0], hidden_[1]};
      for (TokenRows<T>& rows : z) rows.n = level.hidden;
      for (int i = 0; i < count; ++i) multiply(threads_, p_.dtype, y_, level.initial[i], z[i]);
      with_activation<T>(level.activation, [&](auto activation) {
        for (idx b = 0; b < p_.batch; ++b)
          for (idx c = 0; c < level.hidden; c += kLanes<T>) {
            Vec<T> h, unused;
            activation.template eval<0>(load(z[0].at(b) + c), h, unused, unused);
            store(z[0].at(b) + c, count == 2 ? h * load(z[1].at(b) + c) : h);
          }
      });
      inputs = z[0];
    }
    TokenRows<T> out = level.form == Form::linear ? hidden_[0] : y_;
    out.n = width_;
    multiply(threads_, p_.dtype, inputs, level.initial[weight_count(level.form) - 1], out);
    for (idx b = 0; b < p_.batch; ++b) {
      for (idx i = 0; i < width_; ++i) x_.at(b)[i] += out.at(b)[i];
      narrow(p_.dtype, x_.at(b), output, b * width_, width_);
    }
  }

  // What scans of a level's memories have in common, for `rows` sequences from `first` on.
  ScanProblem problem(const StepLevel& level, idx first, idx rows) const {
    ScanProblem scan{};
    scan.form = level.form, scan.activation = level.activation, scan.objective = Objective::l2, scan.rule = level.rule;
    scan.residual = 1;
    scan.dtype = p_.dtype;
    scan.batch = scan.sequence_count = rows;
    scan.tokens = scan.chunk_size = scan.checkpoint_interval = 1;
    scan.heads = p_.heads, scan.dim = p_.dim, scan.hidden = level.form == Form::linear ? p_.dim : level.hidden;
    scan.threads = threads_;
    for (int i = 0; i < weight_count(level.form); ++i) scan.weights[i] = matrices(level, i, level.weights[i], first);
    return scan;
  }
  idx in(const StepLevel& level, int i) const {
    return level.form != Form::linear && i + 1 == weight_count(level.form) ? level.hidden : p_.dim;
  }
  idx out(const StepLevel& level, int i) const {
    return level.form == Form::linear || i + 1 == weight_count(level.form) ? p_.dim : level.hidden;
  }
  MatrixView matrices(const StepLevel& level, int i, float* numbers, idx first) const {
    const idx size = in(level, i) * out(level, i);
    return {state(numbers) + first * p_.heads * size, sizeof(T) == 8 ? DType::float64 : DType::float32, p_.heads * size, size,
            out(level, i), 1};
  }
  // [rows, tokens, N, D] of the tokens' dtype, from sequence `first` on.
  TokenView tokens(void* data, idx first, idx count) const {
    return {offset(data, p_.dtype, first * count * width_), count * width_, width_, p_.dim};
  }

  Status written(const StepLevel& level, void* output) {
    keep_token(level);
    // A chunk of one token is read and written in one pass.
    if (level.chunk_size == 1) {
      const Status status = write(level, 0, p_.batch, output);
      if (status.code != StatusCode::ok) return status;
    } else {
      ScanProblem scan = problem(level, 0, p_.batch);
      ForwardResult result{};
      scan.q = tokens(keys_, 0, 1);
      result.output = tokens(output, 0, 1);
      Status status = scan_(scan, result);
      if (status.code != StatusCode::ok) return status;
      status = runs([&](idx b) { return due(level, b); },
                    [&](idx first, idx rows) { return write(level, first, rows, nullptr); });
      if (status.code != StatusCode::ok) return status;
    }
    for (idx b = 0; b < p_.batch; ++b)
      if (starts_again(level, b)) start_again(level, b);
    return {};
  }

  // Key, target and gates of the token in x_: kept, and the keys in keys_ as well.
  void keep_token(const StepLevel& level) {
    const idx heads = p_.heads, dim = p_.dim, size = element_size(p_.dtype);
    float* const gates[3] = {level.lr, level.retention, level.momentum_gate};
    TokenRows<T> z = gates_;
    z.n = heads * (1 + (gates[1] != nullptr) + (gates[2] != nullptr));
    multiply_transposed(threads_, p_.dtype, x_, level.target, nullptr, y_);
    multiply_transposed(threads_, p_.dtype, x_, level.gate_weight, level.gate_bias, z);
    for (idx b = 0; b < p_.batch; ++b) {
      const idx kept = b * level.chunk_size + slot(level, b);
      narrow(p_.dtype, y_.at(b), level.v, kept * width_, width_);
      for (idx n = 0; n < heads; ++n) {
        const T *x = x_.at(b) + n * dim, scale = 1 / std::sqrt(dot_span(x, x, dim) + kNormEps);
        for (idx d = 0; d < dim; ++d) y_.at(b)[n * dim + d] = x[d] * scale;
        const T* raw = z.at(b) + n;
        const T lr = T(level.step_bound) * sigmoid(*raw);
        state(gates[0])[kept * heads + n] = lr;
        if (gates[1]) state(gates[1])[kept * heads + n] = std::exp(-lr * softplus(*(raw += heads)));
        if (gates[2]) state(gates[2])[kept * heads + n] = sigmoid(*(raw += heads));
      }
      narrow(p_.dtype, y_.at(b), keys_, b * width_, width_);
      std::memcpy(offset(level.k, p_.dtype, kept * width_), offset(keys_, p_.dtype, b * width_), size_t(width_ * size));
    }
  }

  // Writes the chunk kept of `rows` sequences from `first` on, all of which have completed it. `output`, or null: what their
  // keys read.
  Status write(const StepLevel& level, idx first, idx rows, void* output) {
    ScanProblem scan = problem(level, first, rows);
    ForwardResult result{};
    scan.tokens = scan.chunk_size = level.chunk_size;
    scan.chunks = 1;
    scan.k = tokens(level.k, first, level.chunk_size);
    scan.v = tokens(level.v, first, level.chunk_size);
    if (output) {
      scan.q = scan.k;
      result.output = tokens(output, first, level.chunk_size);
    }
    set_coefficients(level, first, rows, scan);
    for (int i = 0; i < weight_count(level.form); ++i) {
      result.weights[i] = scan.weights[i].data;  // a task has read its matrices before it writes them
      if (!level.momentum[i]) continue;
      scan.momentum[i] = matrices(level, i, level.momentum[i], first);
      result.momentum[i] = scan.momentum[i].data;
    }
    return scan_(scan, result);
  }

  // The closed form of a chunk from its gates: hope_kernels/memory/coefficients.py.
  void set_coefficients(const StepLevel& level, idx first, idx rows, ScanProblem& scan) {
    const idx C = level.chunk_size, heads = p_.heads;
    const bool delta = level.rule == Rule::dgd, momentum = level.momentum_gate != nullptr;
    for (idx b = 0; b < rows; ++b)
      for (idx n = 0; n < heads; ++n) {
        const idx row = b * heads + n, gate = (first + b) * C * heads + n;
        T decay = 1, weight = 0, carried = 1, later = 0;  // of the tokens behind t, and the momentum gate of the next one
        for (idx t = C - 1; t >= 0; --t) {
          const T lr = state(level.lr)[gate + t * heads];
          const T alpha = level.retention ? state(level.retention)[gate + t * heads] : T(1);
          if (delta) {
            per_token_[0][row * C + t] = lr;
            per_token_[1][row * C + t] = alpha;
            continue;
          }
          weight = momentum ? decay + later * weight : decay;
          per_token_[0][row * C + t] = lr * weight;
          decay *= alpha;
          if (!momentum) continue;
          per_token_[1][row * C + t] = lr * carried;
          later = state(level.momentum_gate)[gate + t * heads];
          carried *= later;
        }
        per_chunk_[0][row] = decay;
        per_chunk_[1][row] = later * weight;
        per_chunk_[2][row] = carried;
      }
    scan.step = per_token_[0];
    if (delta) {
      scan.retention = level.retention ? per_token_[1] : nullptr;
    } else {
      scan.decay = level.retention ? per_chunk_[0] : nullptr;
      if (momentum) scan.momentum_step = per_token_[1], scan.momentum_carry = per_chunk_[1], scan.momentum_decay = per_chunk_[2];
    }
  }

  void start_again(const StepLevel& level, idx b) {
    for (int i = 0; i < weight_count(level.form); ++i) {
      const idx size = p_.heads * in(level, i) * out(level, i);
      widen(p_.dtype, level.initial[i], 0, state(level.weights[i]) + b * size, size);
      if (level.momentum[i]) std::memset(state(level.momentum[i]) + b * size, 0, size_t(size) * sizeof(T));
    }
  }

  // The output from those of all levels, in the shares softmax(mix).
  void mix() {
    T share[kMaxStepLevels], total = 0;
    widen(p_.dtype, p_.mix, 0, share, p_.level_count);
    T largest = share[0];
    for (idx l = 1; l < p_.level_count; ++l) largest = share[l] > largest ? share[l] : largest;
    for (idx l = 0; l < p_.level_count; ++l) total += share[l] = std::exp(share[l] - largest);
    for (idx b = 0; b < p_.batch; ++b) {
      for (idx l = 0; l < p_.level_count; ++l) {
        widen(p_.dtype, outputs_[l], b * width_, x_.at(b), width_);
        for (idx i = 0; i < width_; ++i) y_.at(b)[i] = (l ? y_.at(b)[i] : T(0)) + share[l] / total * x_.at(b)[i];
      }
      narrow(p_.dtype, y_.at(b), p_.output, b * width_, width_);
    }
  }

  const StepProblem& p_;
  const int threads_;
  const ScanForward scan_;
  const idx width_;
  TokenRows<T> x_, y_, gates_, hidden_[2];
  void *keys_ = nullptr, *outputs_[kMaxStepLevels] = {};
  T *per_token_[2] = {}, *per_chunk_[3] = {};
};

}  // namespace hope::cpu::HOPE_ISA
