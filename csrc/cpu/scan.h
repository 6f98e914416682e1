// Walks one task, a (sequence, head) pair, through its chunks: forward, and backward segment by segment.
//
// Memory of a task: the state, one chunk of activations and, in the backward, the states of at most K chunks (K the
// checkpoint interval): a segment's states are rebuilt from its checkpoint, then its chunks are walked in reverse.
#pragma once

#include "chunk_backward.h"
#include "convert.h"

namespace hope::cpu::HOPE_ISA {

constexpr idx kReadRows = 128;  // queries read at once where no write bounds their number

// Where the tokens and the chunks of one task lie.
struct Place {
  Sequence seq;
  idx sequence, head, chunks;

  Place(const ScanProblem& problem, idx s, idx n) : sequence(s), head(n) {
    if (problem.sequences) {
      seq = problem.sequences[s];
      // Values are the caller's: keep every access inside the tensors whatever they are.
      seq.row = max(0, min(seq.row, problem.batch - 1));
      seq.start = max(0, min(seq.start, problem.tokens));
      seq.length = max(0, min(seq.length, problem.tokens - seq.start));
      seq.pending = max(0, min(seq.pending, problem.pending_capacity));
      seq.chunk_row = max(0, min(seq.chunk_row, problem.chunks));
      const idx complete = (seq.pending + seq.length) / problem.chunk_size;
      chunks = problem.k.data ? min(complete, problem.chunks - seq.chunk_row) : 0;
    } else {
      seq = Sequence{s, 0, problem.tokens, problem.pending_capacity, s * problem.chunks, problem.first_chunk};
      chunks = problem.chunks;
    }
  }
  idx end() const { return seq.pending + seq.length; }
};

template <class T>
class Task {
 public:
  Task(const ScanProblem& problem, const Net& net, const Team& team, Place place)
      : problem_(problem), net_(net), team_(team), place_(place) {}

  // Lays out the scratch this problem's tasks need; every task of a call uses the same layout.
  void layout(Arena& arena, bool backward) {
    const bool writes = problem_.chunks > 0 && problem_.k.data;
    const bool reads = problem_.q.data;
    const idx keys = writes ? net_.chunk : 0;
    const idx longest = problem_.tokens;
    const idx queries = !reads ? 0 : writes ? net_.chunk : min(longest, kReadRows);
    capacity_ = keys * (net_.self() ? 2 : 1) + min(queries, max(longest, 1));
    acts_.layout(arena, net_, capacity_, keys, backward);
    if (backward) {
      adjoints_.layout(arena, net_, capacity_, keys);
      adjoint_state_ = make_state<T>(arena, net_);
      slots_ = writes ? min(problem_.checkpoint_interval, most_chunks() + 1) : 1;
      for (idx i = 0; i < slots_; ++i) {
        const State<T> slot = make_state<T>(arena, net_);
        if (i == 0) state_ = slot;
        if (i == 1) second_slot_ = slot;
      }
      keeps_ = slots_ > 1 && Kept<T>::worthwhile(net_);
      if (keeps_) {
        kept_ = arena.array<Kept<T>>(slots_ - 1);
        Kept<T> unused;
        for (idx i = 0; i + 1 < slots_; ++i) {
          if (kept_) kept_[i] = Kept<T>{};
          (kept_ ? kept_[i] : unused).layout(arena, net_, acts_, adjoints_, keys);
        }
      }
    } else {
      state_ = make_state<T>(arena, net_);
    }
  }

  void forward(const ForwardResult& result) {
    State<T> state = place_.chunks == 0 && !result.weights[0] ? initial_view() : load_initial();
    for (idx c = 0; c < place_.chunks; ++c) {
      if (c > 0 && c % problem_.checkpoint_interval == 0) save_checkpoint(result, state, c);
      write_chunk(state, c, result.output);
    }
    if (place_.chunks > 0 && place_.chunks % problem_.checkpoint_interval == 0)
      save_checkpoint(result, state, place_.chunks);
    read_tail(state, result.output);
    for (int i = 0; i < net_.weights; ++i) {
      if (result.weights[i]) store_matrix(team_, state_rows(result.weights[i], i, place_.sequence), state.w[i]);
      if (result.momentum[i]) store_matrix(team_, state_rows(result.momentum[i], i, place_.sequence), state.s[i]);
    }
  }

  void backward(const BackwardResult& result) {
    load_adjoint(result);
    const idx interval = problem_.checkpoint_interval, count = place_.chunks;
    for (idx segment = count / interval; segment >= 0; --segment) {
      const idx first = segment * interval, last = min(first + interval - 1, count);
      if (segment == 0)
        load_initial();
      else
        load_checkpoint(result, first);
      for (idx c = first; c < last; ++c) rebuild_chunk(c - first, c);
      for (idx c = last; c >= first; --c) {
        if (c == count)
          read_tail_backward(slot(c - first), result);
        else
          backward_chunk(c - first, c, c < last, result);
        const idx index = place_.seq.first_chunk + c;
        if (c > 0 && problem_.bptt_chunks > 0 && index % problem_.bptt_chunks == 0) clear_adjoint();
      }
    }
    for (int i = 0; i < net_.weights; ++i) {
      store_matrix(team_, state_rows(result.weights[i], i, place_.sequence), adjoint_state_.w[i]);
      if (result.momentum[i])
        store_matrix(team_, state_rows(result.momentum[i], i, place_.sequence), adjoint_state_.s[i]);
    }
  }

 private:
  // ---- states -------------------------------------------------------------------------------------------------------

  // An upper bound of the chunks of any task of this call.
  idx most_chunks() const {
    return problem_.sequences ? (problem_.tokens + problem_.pending_capacity) / net_.chunk : problem_.chunks;
  }

  // Slots are laid out one after the other, equally far apart.
  State<T> slot(idx i) const {
    State<T> result = state_;
    if (i == 0) return result;
    const idx step = second_slot_.w[0].data - state_.w[0].data;
    for (int j = 0; j < net_.weights; ++j) {
      result.w[j].data += i * step;
      if (net_.momentum) result.s[j].data += i * step;
    }
    return result;
  }

  // Contiguous [rows, heads, in, out] in the state dtype: the matrix of this task's head.
  T* state_rows(void* data, int i, idx row) const {
    return static_cast<T*>(data) + (row * problem_.heads + place_.head) * net_.in(i) * net_.out_axis(i).n;
  }
  const T* state_rows(const void* data, int i, idx row) const {
    return state_rows(const_cast<void*>(data), i, row);
  }

  State<T> load_initial() {
    for (int i = 0; i < net_.weights; ++i) {
      load_matrix(team_, state_.w[i], problem_.weights[i], place_.sequence, place_.head);
      if (!net_.momentum) continue;
      if (problem_.momentum[i].data)
        load_matrix(team_, state_.s[i], problem_.momentum[i], place_.sequence, place_.head);
      else
        fill_zero(team_, state_.s[i]);
    }
    return state_;
  }

  // For a call that writes nothing: the weights where they lie, if a product can read them there.
  State<T> initial_view() {
    State<T> state = state_;
    for (int i = 0; i < net_.weights; ++i) {
      const MatrixView& view = problem_.weights[i];
      const Axis& axis = net_.out_axis(i);
      const bool same = view.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32);
      if (same && view.out == 1 && axis.n % kLanes<T> == 0) {
        T* data = static_cast<T*>(view.data) + place_.sequence * view.sequence + place_.head * view.head;
        state.w[i] = Mat<T>{data, view.in, axis.width, net_.in(i), axis};
      } else {
        load_matrix(team_, state.w[i], view, place_.sequence, place_.head);
      }
    }
    return state;
  }

  idx checkpoint_row(idx chunk) const {
    const idx interval = problem_.checkpoint_interval;
    return place_.seq.chunk_row / interval + chunk / interval - 1;
  }

  void save_checkpoint(const ForwardResult& result, const State<T>& state, idx chunk) {
    const idx row = checkpoint_row(chunk);
    for (int i = 0; i < net_.weights; ++i) {
      if (result.checkpoints[i]) store_matrix(team_, state_rows(result.checkpoints[i], i, row), state.w[i]);
      if (result.checkpoints[kMaxWeights + i])
        store_matrix(team_, state_rows(result.checkpoints[kMaxWeights + i], i, row), state.s[i]);
    }
  }

  void load_checkpoint(const BackwardResult& result, idx chunk) {
    const idx row = checkpoint_row(chunk);
    for (int i = 0; i < net_.weights; ++i) {
      load_contiguous(team_, state_.w[i], state_rows(result.checkpoints[i], i, row));
      if (net_.momentum) load_contiguous(team_, state_.s[i], state_rows(result.checkpoints[kMaxWeights + i], i, row));
    }
  }

  void load_adjoint(const BackwardResult& result) {
    for (int i = 0; i < net_.weights; ++i) {
      if (result.grad_weights[i].data)
        load_matrix(team_, adjoint_state_.w[i], result.grad_weights[i], place_.sequence, place_.head);
      else
        fill_zero(team_, adjoint_state_.w[i]);
      if (!net_.momentum) continue;
      if (result.grad_momentum[i].data)
        load_matrix(team_, adjoint_state_.s[i], result.grad_momentum[i], place_.sequence, place_.head);
      else
        fill_zero(team_, adjoint_state_.s[i]);
    }
  }

  void clear_adjoint() {
    for (int i = 0; i < net_.weights; ++i) {
      fill_zero(team_, adjoint_state_.w[i]);
      if (net_.momentum) fill_zero(team_, adjoint_state_.s[i]);
    }
  }

  // ---- tokens -------------------------------------------------------------------------------------------------------

  // Memory of token j (pending tokens counted) and the element stride between tokens.
  void* new_token(const TokenView& view, idx j) const {
    const Sequence& s = place_.seq;
    return offset(view.data, problem_.dtype,
                  s.row * view.row + (s.start + j - s.pending) * view.token + place_.head * view.head);
  }
  void* pending_token(const TokenView& view, idx j) const {
    return offset(view.data, problem_.dtype, place_.sequence * view.row + j * view.token + place_.head * view.head);
  }

  void load_tokens(const Mat<T>& to, const TokenView& pending, const TokenView& fresh, idx j, idx count) const {
    const idx old = max(0, min(count, place_.seq.pending - j));
    if (old > 0) load_rows(to.rows_from(0, old), pending_token(pending, j), problem_.dtype, pending.token);
    if (count > old)
      load_rows(to.rows_from(old, count - old), new_token(fresh, j + old), problem_.dtype, fresh.token);
  }

  void store_tokens(const TokenView& pending, const TokenView& fresh, idx j, const Mat<T>& from) const {
    const idx old = max(0, min(from.rows, place_.seq.pending - j));
    if (old > 0 && pending.data)
      store_rows(pending_token(pending, j), problem_.dtype, pending.token, from.rows_from(0, old));
    if (from.rows > old && fresh.data)
      store_rows(new_token(fresh, j + old), problem_.dtype, fresh.token, from.rows_from(old, from.rows - old));
  }

  void zero_tokens(const TokenView& pending, const TokenView& fresh, idx j, idx count) const {
    const idx old = max(0, min(count, place_.seq.pending - j));
    if (old > 0 && pending.data)
      zero_rows(pending_token(pending, j), problem_.dtype, pending.token, old, net_.dim);
    if (count > old && fresh.data)
      zero_rows(new_token(fresh, j + old), problem_.dtype, fresh.token, count - old, net_.dim);
  }

  Coefficients<T> coefficients(idx chunk) const {
    Coefficients<T> coef;
    const idx row = (place_.seq.chunk_row + chunk) * problem_.heads + place_.head;
    auto tokens = [&](const void* p) { return p ? static_cast<const T*>(p) + row * net_.chunk : nullptr; };
    auto scalar = [&](const void* p, T absent) { return p ? static_cast<const T*>(p)[row] : absent; };
    coef.step = tokens(problem_.step);
    coef.retention = tokens(problem_.retention);
    coef.momentum_step = tokens(problem_.momentum_step);
    coef.decay = scalar(problem_.decay, T(1));
    coef.carry = scalar(problem_.momentum_carry, T(0));
    coef.momentum_decay = scalar(problem_.momentum_decay, T(0));
    return coef;
  }

  CoefficientGradients<T> coefficient_gradients(const BackwardResult& result, idx chunk) const {
    CoefficientGradients<T> d;
    const idx row = (place_.seq.chunk_row + chunk) * problem_.heads + place_.head;
    auto tokens = [&](void* p) {
      T* found = p ? static_cast<T*>(p) + row * net_.chunk : nullptr;
      for (idx t = 0; found && t < net_.chunk; ++t) found[t] = 0;
      return found;
    };
    auto scalar = [&](void* p) {
      T* found = p ? static_cast<T*>(p) + row : nullptr;
      if (found) *found = 0;
      return found;
    };
    d.step = tokens(result.step);
    d.retention = tokens(result.retention);
    d.momentum_step = tokens(result.momentum_step);
    d.decay = scalar(result.decay);
    d.carry = scalar(result.momentum_carry);
    d.momentum_decay = scalar(result.momentum_decay);
    return d;
  }

  // The queries are the keys: their read shares the keys' forward pass.
  bool shared_read() const {
    const TokenView &q = problem_.q, &k = problem_.k;
    return q.data == k.data && q.row == k.row && q.token == k.token && q.head == k.head;
  }

  // ---- chunks -------------------------------------------------------------------------------------------------------

  // Asks for token rows of a later chunk: they come from main memory, and a chunk of work hides that.
  void prefetch(const TokenView& view, idx j, idx count) const {
    const idx first = max(j, place_.seq.pending), end = min(j + count, place_.end());
    const idx bytes = net_.dim * element_size(problem_.dtype);
    if (!view.data) return;
    for (idx t = first; t < end; ++t) {
      const char* row = static_cast<const char*>(new_token(view, t));
      for (idx b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
    }
  }

  // Loads keys, values and, with `queries`, the queries of a complete chunk.
  Rows load_chunk(idx chunk, bool queries) {
    const idx C = net_.chunk, j = chunk * C;
    Rows rows;
    rows.keys = C;
    rows.self = net_.self() ? C : 0;
    load_tokens(acts_.x.rows_from(0, C), problem_.pending_k, problem_.k, j, C);
    load_tokens(net_.self() ? acts_.x.rows_from(C, C) : acts_.target, problem_.pending_v, problem_.v, j, C);
    const idx first = max(j, place_.seq.pending);
    prefetch(problem_.k, j + C, C);
    prefetch(problem_.v, j + C, C);
    if (queries) prefetch(problem_.q, j + C, C);
    if (queries && first < j + C) {
      rows.queries = j + C - first;
      load_rows(acts_.x.rows_from(rows.keys + rows.self, rows.queries), new_token(problem_.q, first), problem_.dtype,
                problem_.q.token);
    }
    return rows;
  }

  // Reads chunk `chunk` into `output` (if that is wanted) and writes the state after it over the state before it.
  void write_chunk(const State<T>& state, idx chunk, const TokenView& output) {
    const bool reads = output.data, shared = reads && shared_read();
    const Rows rows = load_chunk(chunk, reads && !shared);
    const bool keys_out = net_.needs_key_output() || shared;
    chunk_forward<T, 1>(team_, net_, acts_, rows, coefficients(chunk), state, state, keys_out ? 0 : rows.keys + rows.self);
    if (!reads) return;
    const idx j = chunk * net_.chunk, first = max(j, place_.seq.pending), count = j + net_.chunk - first;
    if (count <= 0) return;
    const idx row = shared ? first - j : rows.keys + rows.self;
    store_rows(new_token(output, first), problem_.dtype, output.token, acts_.out.rows_from(row, count));
  }

  // The state after chunk `chunk`, from the slot of the state before it into the next slot.
  void rebuild_chunk(idx i, idx chunk) {
    const Rows rows = load_chunk(chunk, false);
    const idx first_out = net_.needs_key_output() ? 0 : rows.total();
    if (!keeps_) {
      chunk_forward<T, 1>(team_, net_, acts_, rows, coefficients(chunk), slot(i), slot(i + 1), first_out);
      return;
    }
    const Mat<T>& curve = adjoints_.curve;
    chunk_forward<T, 2>(team_, net_, acts_, rows, coefficients(chunk), slot(i), slot(i + 1), first_out, curve);
    kept_[i].save(team_, net_, acts_, adjoints_, rows.keys);
  }

  // Calls body(first token, number of tokens) over the tokens behind the last complete chunk.
  template <class F>
  void tail_blocks(F&& body) {
    const idx begin = max(place_.chunks * net_.chunk, place_.seq.pending), end = place_.end();
    for (idx j = begin; j < end; j += capacity_) body(j, min(capacity_, end - j));
  }

  void read_tail(const State<T>& state, const TokenView& output) {
    if (!output.data) return;
    tail_blocks([&](idx j, idx count) {
      Rows rows;
      rows.queries = count;
      load_rows(acts_.x.rows_from(0, count), new_token(problem_.q, j), problem_.dtype, problem_.q.token);
      apply_network<T, 0>(team_, net_, state, acts_, rows, 0, 0);
      store_rows(new_token(output, j), problem_.dtype, output.token, acts_.out.rows_from(0, count));
    });
  }

  // Nothing behind the last complete chunk was written: no gradient for its keys and values.
  void read_tail_backward(const State<T>& state, const BackwardResult& result) {
    const idx begin = place_.chunks * net_.chunk;
    zero_tokens(result.pending_k, result.k, begin, place_.end() - begin);
    zero_tokens(result.pending_v, result.v, begin, place_.end() - begin);
    if (!problem_.q.data) return;
    tail_blocks([&](idx j, idx count) {
      if (!result.grad_output.data) {
        zero_rows(new_token(result.q, j), problem_.dtype, result.q.token, count, net_.dim);
        return;
      }
      Rows rows;
      rows.queries = count;
      load_rows(acts_.x.rows_from(0, count), new_token(problem_.q, j), problem_.dtype, problem_.q.token);
      load_rows(adjoints_.d_out.rows_from(0, count), new_token(result.grad_output, j), problem_.dtype,
                result.grad_output.token);
      chunk_backward(team_, net_, acts_, adjoints_, rows, {}, {}, state, adjoint_state_, false);
      store_rows(new_token(result.q, j), problem_.dtype, result.q.token, adjoints_.d_x.rows_from(0, count));
    });
  }

  void backward_chunk(idx i, idx chunk, bool rebuilt, const BackwardResult& result) {
    const bool known = rebuilt && keeps_;
    const bool reads = problem_.q.data && result.grad_output.data;
    const Rows rows = load_chunk(chunk, reads);
    const idx C = net_.chunk, j = chunk * C, first = max(j, place_.seq.pending), query = rows.keys + rows.self;
    if (rows.queries > 0)
      load_rows(adjoints_.d_out.rows_from(query, rows.queries), new_token(result.grad_output, first), problem_.dtype,
                result.grad_output.token);
    if (known) kept_[i].restore(team_, net_, acts_, adjoints_, rows.keys);
    chunk_backward(team_, net_, acts_, adjoints_, rows, coefficients(chunk), coefficient_gradients(result, chunk), slot(i),
                   adjoint_state_, known);
    store_tokens(result.pending_k, result.k, j, adjoints_.d_x.rows_from(0, C));
    store_tokens(result.pending_v, result.v, j, net_.self() ? adjoints_.d_x.rows_from(C, C) : adjoints_.d_target);
    if (!problem_.q.data || first >= j + C) return;
    if (rows.queries > 0)
      store_rows(new_token(result.q, first), problem_.dtype, result.q.token,
                 adjoints_.d_x.rows_from(query, rows.queries));
    else
      zero_rows(new_token(result.q, first), problem_.dtype, result.q.token, j + C - first, net_.dim);
  }

  const ScanProblem& problem_;
  const Net& net_;
  Team team_;
  Place place_;
  Activations<T> acts_;
  Adjoints<T> adjoints_;
  State<T> state_, second_slot_, adjoint_state_;
  // Intermediates of the chunks a segment rebuilds, one per slot but the last.
  Kept<T>* kept_ = nullptr;
  bool keeps_ = false;
  idx slots_ = 1, capacity_ = 1;
};

// A piece of work this large (multiply-adds of one product) is worth sharing between threads.
constexpr idx kSharedWork = idx(1) << 22;

// Runs `body(task)` for every (sequence, head): whole tasks side by side, or, where that would leave threads idle and the
// products are large, one task after the other with all threads inside its products.
template <class T, class F>
Status run_tasks(const ScanProblem& problem, bool backward, F&& body) {
  const Net net = make_net<T>(problem);
  const idx tasks = problem.sequence_count * problem.heads;
  const idx rows = max(1, min(problem.chunk_size, problem.tokens));
  const bool large = rows * net.dim * net.hidden >= kSharedWork;
  const bool inside = large && problem.threads > 1 && tasks % problem.threads != 0 && tasks < 4 * problem.threads;
  const Team team{inside ? problem.threads : 1};
  Arena count;
  Task<T>(problem, net, team, Place(problem, 0, 0)).layout(count, backward);
  const size_t bytes = count.used();
  int failed = 0;
  auto run = [&](int64_t i) {
    void* memory = thread_scratch(bytes);
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    Arena arena(memory);
    Task<T> task(problem, net, team, Place(problem, i / problem.heads, i % problem.heads));
    task.layout(arena, backward);
    body(task);
    trim_thread_scratch();
  };
  if (inside) {
    for (idx i = 0; i < tasks; ++i) run(i);
  } else {
    parallel_for(
        problem.threads, tasks, [](void* context, int64_t i) { (*static_cast<decltype(run)*>(context))(i); }, &run);
  }
  if (failed) return {StatusCode::out_of_memory, "not enough memory for the scratch space of a chunked scan"};
  return {};
}

}  // namespace hope::cpu::HOPE_ISA
