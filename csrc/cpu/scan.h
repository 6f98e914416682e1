// Walks one task, a (sequence, head) pair, through its chunks: forward, and backward segment by segment.
//
// Memory of a task: the state, one chunk of activations and, in the backward, one record for each chunk of a segment of K
// (the checkpoint interval) but the last: a segment's records are rebuilt from its checkpoint, then its chunks are walked in
// reverse. Those of the last segment may come from the forward, which has walked it anyway.
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

// The state after a chunk of a segment and, where they are no larger than a few states, its intermediates.
template <class T>
struct Record {
  State<T> state;
  Kept<T> kept;
};

template <class T>
class Task {
 public:
  Task(const ScanProblem& problem, const Net& net, const Team& team, Place place, const SegmentMemory& segment)
      : problem_(problem), net_(net), team_(team), place_(place), keeps_(Kept<T>::worthwhile(net)), segment_(segment) {
    if (segment_.data) {
      const idx task = place.sequence * problem.heads + place.head;
      segment_.data = static_cast<char*>(segment_.data) + task * segment_.bytes;
    }
    if (team_.threads == 1) team_.upcoming = &upcoming_;
  }
  Task(const Task&) = delete;

  // Lays out the scratch this problem's tasks need; every task of a call uses the same layout.
  void layout(Arena& arena, bool backward) {
    const bool writes = problem_.chunks > 0 && problem_.k.data;
    const bool reads = problem_.q.data;
    const idx keys = writes ? net_.chunk : 0;
    const idx longest = problem_.tokens;
    const idx queries = !reads ? 0 : writes ? net_.chunk : min(longest, kReadRows);
    capacity_ = keys * (net_.self() ? 2 : 1) + min(queries, max(longest, 1));
    acts_.layout(arena, net_, capacity_, keys, backward || segment_.data);
    state_ = make_state<T>(arena, net_);
    if (net_.rounds)
      team_.packed = arena.array<Pair>(max(packed_size(capacity_, net_.dim_axis), packed_size(capacity_, net_.hidden_axis)));
    if (writes && (backward || segment_.data)) {
      Arena count;
      lay_out_record(count);
      record_bytes_ = idx(count.stride());
    }
    if (backward) {
      adjoints_.layout(arena, net_, capacity_, keys);
      adjoint_state_ = make_state<T>(arena, net_);
      const idx records = writes ? min(problem_.checkpoint_interval - 1, most_chunks()) : 0;
      scratch_records_ = arena.array<char>(records * record_bytes_);
    }
  }

  // Bytes of the records of the last segment.
  idx segment_bytes() const { return record_bytes_ * max(0, last_state() - last_segment()); }

  void forward(const ForwardResult& result) {
    State<T> state = place_.chunks == 0 && !result.weights[0] ? initial_view() : load_initial();
    const idx first = last_segment(), end = segment_.data ? last_state() : first;
    records_ = static_cast<char*>(segment_.data);
    for (idx c = 0; c < place_.chunks; ++c) {
      if (c > 0 && c % problem_.checkpoint_interval == 0) save_checkpoint(result, state, c);
      const bool recorded = first <= c && c < end;
      const Record<T> next = recorded ? record(c - first) : Record<T>{state_, {}};
      write_chunk(state, next, recorded, c, result.output);
      state = next.state;
    }
    if (has_tail() && place_.chunks > 0 && place_.chunks % problem_.checkpoint_interval == 0)
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
    zero_unwritten(result);
    const idx end = last_state();
    if (end < count) cut_adjoint(count);
    for (idx first = last_segment(); end >= 0 && first >= 0; first -= interval) {
      const idx last = min(first + interval - 1, end);
      if (first == 0)
        load_initial();
      else
        load_checkpoint(result, first);
      const bool saved = segment_.data && first == last_segment();
      records_ = saved ? static_cast<char*>(segment_.data) : scratch_records_;
      for (idx c = first; c < last && !saved; ++c) rebuild_chunk(c - first, c, c + 1 == last ? &result : nullptr);
      for (idx c = last; c >= first; --c) {
        if (c == count)
          read_tail_backward(segment_state(c - first), result);
        else
          backward_chunk(c - first, c, c == last || !keeps_ ? Known::nothing : saved ? Known::all : Known::keys, result);
        cut_adjoint(c);
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

  // The last state that anything is computed with: that after the last chunk only if queries follow it.
  idx last_state() const { return has_tail() ? place_.chunks : place_.chunks - 1; }
  idx last_segment() const {
    return max(0, last_state()) / problem_.checkpoint_interval * problem_.checkpoint_interval;
  }

  Record<T> lay_out_record(Arena& arena) const {
    Record<T> record;
    record.state = make_state<T>(arena, net_);
    if (keeps_) record.kept.layout(arena, net_, capacity_, net_.chunk);
    return record;
  }
  // Of chunk i of the segment.
  Record<T> record(idx i) const {
    Arena arena(records_ + i * record_bytes_);
    return lay_out_record(arena);
  }
  // At the start of chunk i of the segment.
  State<T> segment_state(idx i) const { return i == 0 ? state_ : record(i - 1).state; }

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
    const idx first = problem_.sequences ? place_.seq.chunk_row / interval
                                         : place_.sequence * checkpoints_per_sequence(problem_);
    return first + chunk / interval - 1;
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
    adjoint_is_zero_ = true;
    for (int i = 0; i < net_.weights; ++i) {
      if (result.grad_weights[i].data || result.grad_momentum[i].data) adjoint_is_zero_ = false;
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

  // Truncated backpropagation: nothing flows back into the write of every bptt_chunks-th state.
  void cut_adjoint(idx chunk) {
    const idx index = place_.seq.first_chunk + chunk;
    if (chunk == 0 || problem_.bptt_chunks == 0 || index % problem_.bptt_chunks != 0 || adjoint_is_zero_) return;
    adjoint_is_zero_ = true;
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
    if (old > 0) load_rows(team_, to.rows_from(0, old), pending_token(pending, j), problem_.dtype, pending.token);
    if (count > old)
      load_rows(team_, to.rows_from(old, count - old), new_token(fresh, j + old), problem_.dtype, fresh.token);
  }

  void store_tokens(const TokenView& pending, const TokenView& fresh, idx j, const Mat<T>& from) const {
    const idx old = max(0, min(from.rows, place_.seq.pending - j));
    if (old > 0 && pending.data)
      store_rows(team_, pending_token(pending, j), problem_.dtype, pending.token, from.rows_from(0, old));
    if (from.rows > old && fresh.data)
      store_rows(team_, new_token(fresh, j + old), problem_.dtype, fresh.token, from.rows_from(old, from.rows - old));
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

  // While this chunk's products run, `rows` rows each: begins a list of what is needed next.
  void begin_upcoming(Rows rows) {
    if (!team_.upcoming) return;
    // The tiles of the first products: that is early enough, and all of them are whatever the chunk's size.
    const idx hidden = net_.has_hidden() ? net_.inputs * net_.hidden_axis.panels : 0;
    upcoming_.begin(ceil_div(rows.total(), kTileRows) * (hidden + net_.dim_axis.panels));
  }
  // Puts the tokens of a chunk on that list.
  void ask(const TokenView& view, idx chunk) {
    const idx j = chunk * net_.chunk, first = max(j, place_.seq.pending), size = element_size(problem_.dtype);
    if (team_.upcoming && view.data && chunk >= 0)
      upcoming_.add(new_token(view, first), view.token * size, net_.dim * size, min(j + net_.chunk, place_.end()) - first);
  }
  // What a chunk is written from and, where it is walked back, what its gradients are formed from.
  void ask_inputs(idx chunk, const BackwardResult* back) {
    ask(problem_.k, chunk);
    ask(problem_.v, chunk);
    if (!back || !back->grad_output.data) return;
    ask(problem_.q, chunk);
    ask(back->grad_output, chunk);
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
    if (queries && first < j + C) {
      rows.queries = j + C - first;
      load_rows(team_, acts_.x.rows_from(rows.keys + rows.self, rows.queries), new_token(problem_.q, first), problem_.dtype,
                problem_.q.token);
    }
    return rows;
  }

  // From the rows loaded in acts_: outputs from row first_out on and the state after `from`.
  void compute_chunk(const State<T>& from, const Record<T>& next, bool keep, idx chunk, Rows rows, idx first_out) {
    if (!keep) return chunk_forward<T, 1>(team_, net_, acts_, rows, coefficients(chunk), from, next.state, first_out);
    Activations<T> acts = next.kept.within(acts_);
    chunk_forward<T, 2>(team_, net_, acts, rows, coefficients(chunk), from, next.state, first_out);
  }

  // Reads chunk `chunk` into `output` (if that is wanted) and writes the state after it, which may lie over `state`.
  void write_chunk(const State<T>& state, const Record<T>& next, bool recorded, idx chunk, const TokenView& output) {
    // A recorded chunk's queries are kept in rows of their own.
    const bool reads = output.data, shared = reads && !recorded && shared_read();
    const Rows rows = load_chunk(chunk, reads && !shared);
    begin_upcoming(rows);
    ask_inputs(chunk + 1, nullptr);
    if (reads && !shared) ask(problem_.q, chunk + 1);
    if (reads) ask(output, chunk);
    const bool keys_out = net_.needs_key_output() || shared;
    compute_chunk(state, next, recorded && keeps_, chunk, rows, keys_out ? 0 : rows.keys + rows.self);
    if (!reads) return;
    const idx j = chunk * net_.chunk, first = max(j, place_.seq.pending), count = j + net_.chunk - first;
    if (count <= 0) return;
    const idx row = shared ? first - j : rows.keys + rows.self;
    store_rows(team_, new_token(output, first), problem_.dtype, output.token, acts_.out.rows_from(row, count));
  }

  // The record of chunk `chunk`, the i-th of its segment, from the state before it. `turns`: the next chunk is walked back.
  void rebuild_chunk(idx i, idx chunk, const BackwardResult* turns) {
    const Rows rows = load_chunk(chunk, false);
    begin_upcoming(rows);
    ask_inputs(chunk + 1, turns);
    compute_chunk(segment_state(i), record(i), keeps_, chunk, rows, net_.needs_key_output() ? 0 : rows.total());
  }

  // Whether queries follow the last complete chunk.
  bool has_tail() const {
    return problem_.q.data && max(place_.chunks * net_.chunk, place_.seq.pending) < place_.end();
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
      load_rows(team_, acts_.x.rows_from(0, count), new_token(problem_.q, j), problem_.dtype, problem_.q.token);
      apply_network<T, 0>(team_, net_, state, acts_, rows, 0, 0);
      store_rows(team_, new_token(output, j), problem_.dtype, output.token, acts_.out.rows_from(0, count));
    });
  }

  // Nothing behind the last complete chunk was written: no gradient for its keys and values.
  void zero_unwritten(const BackwardResult& result) {
    const idx begin = place_.chunks * net_.chunk;
    zero_tokens(result.pending_k, result.k, begin, place_.end() - begin);
    zero_tokens(result.pending_v, result.v, begin, place_.end() - begin);
  }

  void read_tail_backward(const State<T>& state, const BackwardResult& result) {
    tail_blocks([&](idx j, idx count) { read_backward(state, j, count, result); });
  }

  // The queries from token j on: gradients of what they read in `state`.
  void read_backward(const State<T>& state, idx j, idx count, const BackwardResult& result) {
    if (!result.grad_output.data) {
      zero_rows(new_token(result.q, j), problem_.dtype, result.q.token, count, net_.dim);
      return;
    }
    Rows rows;
    rows.queries = count;
    load_rows(team_, acts_.x.rows_from(0, count), new_token(problem_.q, j), problem_.dtype, problem_.q.token);
    load_rows(team_, adjoints_.d_out.rows_from(0, count), new_token(result.grad_output, j), problem_.dtype,
              result.grad_output.token);
    chunk_backward(team_, net_, acts_, adjoints_, rows, {}, {}, state, adjoint_state_, Known::nothing);
    store_rows(team_, new_token(result.q, j), problem_.dtype, result.q.token, adjoints_.d_x.rows_from(0, count));
    adjoint_is_zero_ = false;
  }

  void backward_chunk(idx i, idx chunk, Known known, const BackwardResult& result) {
    const idx C = net_.chunk, j = chunk * C, first = max(j, place_.seq.pending);
    const CoefficientGradients<T> d_coef = coefficient_gradients(result, chunk);
    if (adjoint_is_zero_) {
      // Nothing depends on what this chunk wrote.
      zero_tokens(result.pending_k, result.k, j, C);
      zero_tokens(result.pending_v, result.v, j, C);
      if (problem_.q.data && first < j + C) read_backward(segment_state(i), first, j + C - first, result);
      return;
    }
    const bool reads = problem_.q.data && result.grad_output.data;
    const Rows rows = load_chunk(chunk, reads);
    const idx query = rows.keys + rows.self;
    if (rows.queries > 0)
      load_rows(team_, adjoints_.d_out.rows_from(query, rows.queries), new_token(result.grad_output, first), problem_.dtype,
                result.grad_output.token);
    begin_upcoming(rows);
    ask_inputs(chunk - 1, &result);
    for (const TokenView* view : {&result.k, &result.v, &result.q}) ask(*view, chunk);
    Activations<T> acts = known == Known::nothing ? acts_ : record(i).kept.within(acts_);
    chunk_backward(team_, net_, acts, adjoints_, rows, coefficients(chunk), d_coef, segment_state(i), adjoint_state_, known);
    store_tokens(result.pending_k, result.k, j, adjoints_.d_x.rows_from(0, C));
    store_tokens(result.pending_v, result.v, j, net_.self() ? adjoints_.d_x.rows_from(C, C) : adjoints_.d_target);
    if (!problem_.q.data || first >= j + C) return;
    if (rows.queries > 0)
      store_rows(team_, new_token(result.q, first), problem_.dtype, result.q.token,
                 adjoints_.d_x.rows_from(query, rows.queries));
    else
      zero_rows(new_token(result.q, first), problem_.dtype, result.q.token, j + C - first, net_.dim);
  }

  const ScanProblem& problem_;
  const Net& net_;
  Team team_;
  Upcoming upcoming_;
  Place place_;
  Activations<T> acts_;
  Adjoints<T> adjoints_;
  State<T> state_, adjoint_state_;
  const bool keeps_;           // records hold intermediates
  SegmentMemory segment_;      // of this task
  char *scratch_records_ = nullptr, *records_ = nullptr;  // those of the backward, those of the segment in progress
  idx record_bytes_ = 0;
  bool adjoint_is_zero_ = true;  // no gradient has reached the state walked back from: its write needs no adjoint
  idx capacity_ = 1;
};

// A piece of work this large (multiply-adds of one product) is worth sharing between threads; fewer rows take as long as
// kMemoryRows of them, the time to read the weights.
constexpr idx kSharedWork = idx(1) << 22, kMemoryRows = 16;

// Whether `units` pieces of work would leave threads idle while the products of one, of so many rows, are large enough to share.
inline bool shares_products(const Net& net, idx rows, idx units, int threads) {
  const bool large = max(rows, kMemoryRows) * net.dim * net.hidden >= kSharedWork;
  return large && threads > 1 && units % threads != 0 && units < 4 * threads;
}

// Runs body(scratch, unit) for every unit: one after the other, all threads inside its products, or whole units side by side.
template <class F>
Status with_scratch(int threads, bool inside, idx units, size_t bytes, F&& body) {
  int failed = 0;
  auto run = [&](int64_t i) {
    void* memory = thread_scratch(bytes);
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    body(memory, i);
    trim_thread_scratch();
  };
  if (inside) {
    for (idx i = 0; i < units; ++i) run(i);
  } else {
    parallel_for(
        threads, units, [](void* context, int64_t i) { (*static_cast<decltype(run)*>(context))(i); }, &run);
  }
  if (failed) return {StatusCode::out_of_memory, "not enough memory for the scratch space of a chunked scan"};
  return {};
}

// Runs `body(task)` for every (sequence, head).
template <class T, class F>
Status run_tasks(const ScanProblem& problem, bool backward, const SegmentMemory& segment, F&& body) {
  const Net net = make_net<T>(problem);
  const idx tasks = problem.sequence_count * problem.heads;
  const bool writes = problem.chunks > 0 && problem.k.data;
  const idx rows = max(1, min(writes ? problem.chunk_size : kReadRows, problem.tokens));
  const bool inside = shares_products(net, rows, tasks, problem.threads);
  const Team team{inside ? problem.threads : 1};
  Arena count;
  Task<T> any(problem, net, team, Place(problem, 0, 0), segment);
  any.layout(count, backward);
  if (segment.data && (problem.sequences || segment.bytes < any.segment_bytes()))
    return {StatusCode::invalid_argument, "the memory for the last segment is too small, or given with a table"};
  return with_scratch(problem.threads, inside, tasks, count.used(), [&](void* memory, idx i) {
    Arena arena(memory);
    Task<T> task(problem, net, team, Place(problem, i / problem.heads, i % problem.heads), segment);
    task.layout(arena, backward);
    body(task);
  });
}

}  // namespace hope::cpu::HOPE_ISA
