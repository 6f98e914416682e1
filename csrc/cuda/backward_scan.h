// Backward scan with the adjoint of the state on chip: one block of eight warps walks one (sequence, head) back through its
// chunks.
//
// Roofline, per token of an mlp with objective l2: 40 D H FLOPs, 4 more than the 18 products take since pre-activations of
// keys are formed three times; 10 D H more to rebuild the states. 16 D bytes of tokens and gradients, and 6 H bytes of what
// is kept of a key, written once and read once or twice, where that is not in shared memory. Per chunk 8 D H bytes of state,
// a slot written and read (16 D H where the decay has a gradient); with momentum 52 D H more. Short chunks are bound by that.
//
// Where things live. A block has 64k registers; the float32 adjoint A of the state takes 2 D H of them, half at 64 x 256, so
// that the weights W cannot be there too. Chunks are taken in segments, from one checkpoint to the next. The states of a
// segment are rebuilt by the forward's code, float32 in registers, while A is parked in the workspace; each chunk's first
// state leaves a 16-bit copy, a slot (every product rounds weights to 16 bits anyhow). Then the segment is walked back with A
// in registers and the slot's W in shared memory. Both lie as the forward's state does: a warp has its hidden units, and
// packed to 16 bits the accumulators of A^T are B fragments of A. The adjoint G of the momentum does not fit on chip: it lies
// in the workspace, float32 and as a 16-bit copy for products, and is read and written by the thread that holds its part of A.
//
// One chunk, u the weights of its tokens in the write with the sign of the step (S_in, S_out: with momentum, its adjoint G
// has the same products as A, with weights of its own):
//   (1) z = K W_in, h = act(z), delta = h W_out (+ K) - V                            summed over the warps
//   (2) p = delta W_out^T, e = p act'(z), t = K A_in, n = delta A_out^T; d_step = sum (t e + h n);
//       d_e = u t, d_p = d_e act'(z), d_z = d_e p act''(z) + u n act'(z); d_delta = d_p W_out + (u h) A_out     summed
//   (3) d_z += (d_delta W_out^T) act'(z); d_K = d_z W_in^T + (u e) A_in^T (+ d_delta)  summed
//       A_out <- decay A_out + delta^T d_p + d_delta^T h  (transposed as it is held)
//   (4) A_in <- decay A_in + d_z^T K; then queries, which read the chunk's first state: their part of both.
// Steps walk the chunk in slices of 16 tokens; what (2) leaves for (3) and (3) for (4) is a thread's own, 16 bits a number,
// in shared memory where that has room. All sums have a fixed order.
#pragma once

#include "backward_layout.h"

namespace hope::cuda {

template <class Traits>
class BackwardScan : private ForwardScan<Traits> {
  using Forward = ForwardScan<Traits>;
  using typename Forward::Element;
  using typename Forward::Numbers;
  using Forward::add_in;
  using Forward::add_out;
  using Forward::begin_phase;
  using Forward::of_chunk;
  using Forward::pair_at;
  using Forward::place_;
  using Forward::problem_;
  using Forward::scale_of;
  using Forward::shared_;
  using Forward::state_;  // the state while it is rebuilt, its adjoint while chunks are walked back
  using Forward::thread_;
  using Forward::tile;
  using Forward::turn;
  using Forward::weight;
  using Sum = ScanSum<Traits>;
  using Group = float[2][4];                            // accumulators of a slice and 16 of this warp's hidden units
  using PackedUnits = uint32_t[Traits::kUnitTiles][2];  // a slice and all of them, as operands
  static constexpr int kGroups = Traits::kUnitTiles / 2;
  // What is known once for the whole scan is in shared memory: what follows from it, addresses above all, would otherwise be
  // held in registers for the whole scan.
  struct Here {
    BackwardLayout layout;
    BackwardWorkspace workspace;  // this task's part
    float scale;   // of the chunk's write, see write_scale
    bool live[2];  // a gradient has reached the state after a piece; for even and odd pieces: one is read, the next written
    int first, last;  // states that the piece's segment has up to the piece's own: slots 0, 1, ..
  };

 public:
  __device__ __forceinline__ BackwardScan(const BackwardParams& params, char* shared)
      : Forward(params.rebuild, shared), back_(params), here_(block_shared<Here>()) {}

  __device__ __forceinline__ void run() {
    const BackwardResult& result = back_.result;
    if (thread_ == 0) {
      block_shared<Place>() = place_of(back_.problem, blockIdx.x, back_.rebuild.span);
      here_ = Here{back_.layout, task_workspace(), 1.0f, {}, 0, 0};
      here_.live[0] = here_.live[1] = result.grad_weights[0].data || result.grad_weights[1].data ||
                                      result.grad_momentum[0].data || result.grad_momentum[1].data;
      enter(place_.pieces - 1);
    }
    __syncthreads();  // the place is known
    clear_unwritten();
    load_adjoint();
#pragma unroll 1
    for (int piece = place_.pieces - 1; piece >= 0; --piece) {
      if (first_of_segment(piece)) rebuild();
      if (cuts(piece)) clear_adjoint();
      begin_phase();
      load_piece(piece);
      if (written(piece))
        write_adjoint(piece);
      else if (this->writes(piece))
        clear_written(piece);
      // What reads the chunk's first state: the values of `self`, then the queries.
#pragma unroll 1
      for (int queries = 0; queries < 2; ++queries) {
        const bool scaled = !queries && written(piece);
        if (queries ? reads(piece) : scaled && problem_.objective == Objective::self)
          rows_adjoint(piece, queries, scaled ? scale() : 1.0f);
        if (Traits::kType == DType::float16 && scaled) this->multiply_state(scale());
      }
      __syncthreads();  // the results are complete
      if (thread_ == 0) {
        here_.live[(piece & 1) ^ 1] = live(piece) || reads(piece);
        enter(piece - 1);
      }
      begin_phase();
      if (written(piece)) store_written(piece);
      if (reads(piece))
        store_rows(result.q, result.q, tensor(kRead), piece, this->first_query(piece), this->token_count(piece), 1.0f);
      __syncthreads();  // nobody reads them any more
    }
    store_adjoint();
  }

 private:
  // ---- pieces of the sequence ----------------------------------------------------------------------------------------

  // The newest piece, first to be walked back, comes last in the sequence. Those behind the last chunk read one state.
  __device__ __forceinline__ bool newest(int piece) const { return piece == place_.pieces - 1; }
  __device__ __forceinline__ int state_before(int piece) const { return min(piece, place_.chunks); }
  __device__ __forceinline__ int slot_before(int piece) const {
    return state_before(piece) % int(problem_.checkpoint_interval);
  }
  __device__ __forceinline__ bool first_of_segment(int piece) const {
    return newest(piece) || (piece < place_.chunks && (piece + 1) % int(problem_.checkpoint_interval) == 0);
  }
  // Whether a piece's queries have outputs with a gradient.
  __device__ __forceinline__ bool reads(int piece) const {
    return back_.problem.q.data && this->first_query(piece) < this->token_count(piece);
  }
  // Truncated backpropagation: nothing flows back into the write of every bptt_chunks-th state.
  __device__ __forceinline__ bool cuts(int piece) const {
    return this->writes(piece) && problem_.bptt_chunks > 0 &&
           (place_.seq.first_chunk + piece + 1) % problem_.bptt_chunks == 0;
  }
  // Whether a gradient has reached the state after a piece: only then what it wrote has any.
  __device__ __forceinline__ bool live(int piece) const { return here_.live[piece & 1] && !cuts(piece); }
  __device__ __forceinline__ bool written(int piece) const { return this->writes(piece) && live(piece); }
  // Whether the errors depend on what the memory makes of the keys.
  __device__ __forceinline__ bool predicts() const {
    return problem_.objective == Objective::l2 || problem_.objective == Objective::self;
  }
  __device__ __forceinline__ int slices() const { return back_.rebuild.rows / kSlice; }

  // ---- memory --------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ Element* tensor(BackwardTensor t) const {
    return reinterpret_cast<Element*>(shared_ + here_.layout.tensors[t]);
  }
  // W_in^T, or W_out, of the chunk's start: [kHidden] rows of kPitch.
  template <bool kOut>
  __device__ __forceinline__ const Element* weights() const {
    return reinterpret_cast<const Element*>(shared_ + here_.layout.weights) + (kOut ? Traits::kHidden * Traits::kPitch : 0);
  }
  __device__ __forceinline__ float* row_sums(int which) const {
    return reinterpret_cast<float*>(shared_ + here_.layout.rows) + which * Traits::kWarps * back_.rebuild.rows;
  }
  // Weights of tokens in the write of the state (0) and of the momentum (1), divided by the scale.
  __device__ __forceinline__ float* steps(int which) const {
    return reinterpret_cast<float*>(shared_ + here_.layout.steps) + which * back_.rebuild.rows;
  }
  __device__ __forceinline__ float scale() const { return Traits::kType == DType::float16 ? here_.scale : 1.0f; }
  __device__ __forceinline__ float* scalar_sums(int which) const {
    return reinterpret_cast<float*>(shared_ + here_.layout.scalars) + which * Traits::kWarps;
  }
  // Sets of partial sums take turns from slice to slice.
  __device__ __forceinline__ float4* partial(int slice) const {
    const int set = slice & (here_.layout.partials - 1);
    return reinterpret_cast<float4*>(shared_ + here_.layout.partial + set * here_.layout.partial_bytes);
  }

  __device__ __forceinline__ uint4* kept(int slice, KeptPart part) const {
    constexpr int kCount = Traits::kUnitTiles / 2 * Traits::kThreads;
    char* memory = here_.layout.kept >= 0
                       ? shared_ + here_.layout.kept
                       : static_cast<char*>(here_.workspace.kept);
    return reinterpret_cast<uint4*>(memory) + (slice * kKeptParts + part) * kCount + thread_;
  }
  __device__ __forceinline__ void keep(int slice, KeptPart part, int i, const PackedUnits& x) const {
    kept(slice, part)[i * Traits::kThreads] = uint4{x[2 * i][0], x[2 * i][1], x[2 * i + 1][0], x[2 * i + 1][1]};
  }
  __device__ __forceinline__ void recall(int slice, KeptPart part, PackedUnits& x) const {
    const uint4* from = kept(slice, part);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4 y = from[i * Traits::kThreads];
      x[2 * i][0] = y.x, x[2 * i][1] = y.y, x[2 * i + 1][0] = y.z, x[2 * i + 1][1] = y.w;
    }
  }

  static constexpr int64_t kSlotBytes = 2 * Traits::kHidden * Traits::kDim * sizeof(Element);

  // This task's part of the workspace.
  __device__ __forceinline__ BackwardWorkspace task_workspace() const {
    const int64_t task = blockIdx.x, states = task * back_.slots;
    const auto part = [](void* memory, int64_t bytes) -> void* { return memory ? static_cast<char*>(memory) + bytes : nullptr; };
    const BackwardWorkspace& all = back_.workspace;
    BackwardWorkspace own;
    own.adjoint = part(all.adjoint, task * ParkedState<Traits>::kBytes);
    own.slots = part(all.slots, states * kSlotBytes);
    own.remainders = part(all.remainders, states * PackedState<Traits>::kBytes);
    own.kept = part(all.kept, task * back_.kept_bytes);
    own.momentum_slots = part(all.momentum_slots, states * ParkedState<Traits>::kBytes);
    own.momentum_adjoint = part(all.momentum_adjoint, task * ParkedState<Traits>::kBytes);
    own.momentum_operand = part(all.momentum_operand, task * PackedState<Traits>::kBytes);
    return own;
  }
  __device__ __forceinline__ Element* slot(int which) const {
    return reinterpret_cast<Element*>(static_cast<char*>(here_.workspace.slots) + which * kSlotBytes);
  }
  __device__ __forceinline__ ParkedState<Traits> parked() const { return {here_.workspace.adjoint, 0}; }
  __device__ __forceinline__ PackedState<Traits> remainder(int which) const { return {here_.workspace.remainders, which}; }
  __device__ __forceinline__ ParkedState<Traits> momentum_slot(int which) const {
    return {here_.workspace.momentum_slots, which};
  }
  __device__ __forceinline__ ParkedState<Traits> momentum_adjoint() const { return {here_.workspace.momentum_adjoint, 0}; }
  __device__ __forceinline__ PackedState<Traits> momentum_operand() const { return {here_.workspace.momentum_operand, 0}; }

  // One thread says whose turn it is, a barrier before the others look.
  __device__ __forceinline__ void enter(int piece) const {
    here_.last = state_before(piece), here_.first = here_.last - slot_before(piece);
  }

  // ---- states of a segment -------------------------------------------------------------------------------------------

  static __device__ __forceinline__ MatrixView contiguous(const void* data, int64_t which, int64_t rows, int64_t columns) {
    float* matrix = const_cast<float*>(static_cast<const float*>(data)) + which * rows * columns;
    return {matrix, DType::float32, 0, 0, columns, 1};
  }

  __device__ __forceinline__ void load_first(int chunk) {
    if (chunk == 0) return this->load_initial();
    const int64_t row = place_.checkpoint_row(problem_, back_.rebuild.checkpoints, chunk), D = problem_.dim,
                  H = problem_.hidden;
    const void* const* saved = back_.result.checkpoints;
    const MatrixView weights[2] = {contiguous(saved[0], row, D, H), contiguous(saved[1], row, H, D)};
    if constexpr (Traits::kMomentum) {
      const MatrixView speeds[2] = {contiguous(saved[kMaxWeights], row, D, H), contiguous(saved[kMaxWeights + 1], row, H, D)};
      this->load_state(weights, speeds);
    } else {
      this->load_state(weights, nullptr);
    }
  }

  // The states at the start of the segment's chunks into slots 0, 1, ..
  __device__ __forceinline__ void rebuild() {
    begin_phase();
    {
      const ParkedState<Traits> away = parked();
      each_in(state_, [&](int i, int j, float(&x)[4]) { away.in(i, j) = four(x); });
      each_out(state_, [&](int i, int j, float(&x)[4]) { away.out(i, j) = four(x); });
    }
    const int stages = back_.rebuild.stages;
#pragma unroll 1
    for (int next = here_.first;; ++next) {
      cp_async_wait<0>();
      __syncthreads();  // everyone's share of the tokens is there; the stage loaded next is free
      if (next < here_.last) this->load_tokens(next, next & (stages - 1));
      if (next == here_.first) load_first(next);
      if (stages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // everyone's share of the tokens is there
      }
      const int chunk = next - (stages - 1);
      if (chunk < here_.first) continue;
      begin_phase();
      save_slot(chunk - here_.first);
      if (chunk == here_.last) break;
      this->apply(chunk, chunk & (stages - 1));
      __syncthreads();  // the last slice's errors are complete
      this->write(chunk, chunk & (stages - 1));
    }
    const ParkedState<Traits> away = parked();
    each_in(state_, [&](int i, int j, float(&x)[4]) { take(x, away.in(i, j)); });
    each_out(state_, [&](int i, int j, float(&x)[4]) { take(x, away.out(i, j)); });
    __syncthreads();  // the slots are there for all
  }
  static __device__ __forceinline__ void take(float (&x)[4], const float4& y) { x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w; }

  __device__ __forceinline__ void save_slot(int which) {
    const Lane lane(thread_);
    const int unit = thread_ / kWarp * Traits::kUnits + lane.group;
    Element* in = slot(which) + unit * Traits::kDim + lane.pair;
    Element* out = in + Traits::kHidden * Traits::kDim;
    const auto put = [](Element* to, uint32_t pair) { *reinterpret_cast<uint32_t*>(to) = pair; };
    const bool exact = here_.workspace.remainders;
    const PackedState<Traits> rest = remainder(which);
    each_in(state_, [&](int i, int j, float(&x)[4]) {
      const uint2 rounded = packed(four(x));
      put(in + 16 * i * Traits::kDim + 8 * j, rounded.x);
      put(in + (16 * i + 8) * Traits::kDim + 8 * j, rounded.y);
      if (exact) rest.in(i, j) = lost(x, rounded);
    });
    each_out(state_, [&](int i, int j, float(&x)[4]) {
      const uint2 rounded = packed(four(x));
      put(out + 8 * j * Traits::kDim + 16 * i, movmatrix(rounded.x));
      put(out + 8 * j * Traits::kDim + 16 * i + 8, movmatrix(rounded.y));
      if (exact) rest.out(i, j) = lost(x, rounded);
    });
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> speed = this->momentum(), to = momentum_slot(which);
      each_in(state_, [&](int i, int j, float(&)[4]) { to.in(i, j) = speed.in(i, j); });
      each_out(state_, [&](int i, int j, float(&)[4]) { to.out(i, j) = speed.out(i, j); });
    }
  }
  // What rounding takes from a tile.
  static __device__ __forceinline__ uint2 lost(const float (&x)[4], const uint2& rounded) {
    const float4 kept = unpacked(rounded);
    return packed(float4{x[0] - kept.x, x[1] - kept.y, x[2] - kept.z, x[3] - kept.w});
  }
  static __device__ __forceinline__ uint2 packed(const float4& x) {
    return uint2{Numbers::pack(x.x, x.y), Numbers::pack(x.z, x.w)};
  }
  static __device__ __forceinline__ float4 unpacked(const uint2& x) {
    const float2 low = Numbers::unpack(x.x), high = Numbers::unpack(x.y);
    return float4{low.x, low.y, high.x, high.y};
  }

  // ---- the adjoint of the state --------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_adjoint() {
    begin_phase();
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> speed = momentum_adjoint();
      this->load_matrices(back_.result.grad_momentum);
      each_in(state_, [&](int i, int j, float(&x)[4]) { speed.in(i, j) = four(x); });
      each_out(state_, [&](int i, int j, float(&x)[4]) { speed.out(i, j) = four(x); });
    }
    this->load_matrices(back_.result.grad_weights);
  }

  __device__ __forceinline__ void store_adjoint() {
    begin_phase();
    const int64_t row = this->final_row();
    const auto held = [](int, int, const float(&x)[4]) { return four(x); };
    this->store_matrices(back_.result.weights, row, held, held);
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> speed = momentum_adjoint();
      this->store_matrices(
          back_.result.momentum, row, [&](int i, int j, const float(&)[4]) { return speed.in(i, j); },
          [&](int i, int j, const float(&)[4]) { return speed.out(i, j); });
    }
  }

  __device__ __forceinline__ void clear_adjoint() {
    const auto clear = [](int, int, float(&x)[4]) { x[0] = x[1] = x[2] = x[3] = 0.0f; };
    each_in(state_, clear);
    each_out(state_, clear);
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> speed = momentum_adjoint();
      each_in(state_, [&](int i, int j, float(&)[4]) { speed.in(i, j) = float4{0.0f, 0.0f, 0.0f, 0.0f}; });
      each_out(state_, [&](int i, int j, float(&)[4]) { speed.out(i, j) = float4{0.0f, 0.0f, 0.0f, 0.0f}; });
    }
  }

  // ---- tokens --------------------------------------------------------------------------------------------------------

  // The chunk's first state if it is not there yet, and the tokens of a piece.
  __device__ __forceinline__ void load_piece(int piece) const {
    if (newest(piece) || piece < place_.chunks) {
      constexpr int kParts = Traits::kDim / 8;
      Element* to = reinterpret_cast<Element*>(shared_ + here_.layout.weights);
      const Element* from = slot(slot_before(piece));
      for (int i = thread_; i < 2 * Traits::kHidden * kParts; i += Traits::kThreads)
        cp_async_16(to + i / kParts * Traits::kPitch + i % kParts * 8, from + i * 8);
    }
    const int count = this->token_count(piece);
    const ScanProblem& p = back_.problem;
    if (written(piece)) {
      const float scale = write_scale(piece);
      if (thread_ == 0) here_.scale = scale;
      for (int row = thread_; row < back_.rebuild.rows; row += Traits::kThreads) {
        steps(0)[row] = weight(problem_.step, piece, row, scale);
        if constexpr (Traits::kMomentum) steps(1)[row] = weight(problem_.momentum_step, piece, row, scale);
      }
      this->load_tensor(tensor(kChunkKeys), p.k, p.pending_k, piece, 0, count);
      this->load_tensor(tensor(kTargets), p.v, p.pending_v, piece, 0, count);
    }
    if (reads(piece)) {
      const int first = this->first_query(piece);
      this->load_tensor(tensor(kRead), p.q, p.q, piece, first, count);
      this->load_tensor(tensor(kUpstream), back_.result.grad_output, back_.result.grad_output, piece, first, count);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // everyone's share is there
  }

  // Rows [first, count) of a piece times a factor.
  __device__ __forceinline__ void store_rows(const TokenView& fresh, const TokenView& pending, const Element* from, int piece,
                                             int first, int count, float factor) const {
    const int old = this->first_query(piece);
    for (int i = thread_ + first * (Traits::kDim / 8); i < count * (Traits::kDim / 8); i += Traits::kThreads) {
      const int row = i / (Traits::kDim / 8), column = i % (Traits::kDim / 8) * 8;
      const int64_t j = int64_t(piece) * back_.rebuild.span + row;
      const TokenView& view = row < old ? pending : fresh;
      if (!view.data) continue;
      Element* to = static_cast<Element*>(view.data) +
                    (row < old ? place_.pending(view, j) : place_.fresh(view, j)) + column;
      uint4 x = *reinterpret_cast<const uint4*>(from + row * Traits::kPitch + column);
      const auto times = [&](uint32_t& pair) {
        const float2 y = Numbers::unpack(pair);
        pair = Numbers::pack(factor * y.x, factor * y.y);
      };
      times(x.x), times(x.y), times(x.z), times(x.w);
      if (back_.rebuild.vectors) {
        *reinterpret_cast<uint4*>(to) = x;
      } else {
        const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (column + e < problem_.dim) {
            const float2 y = Numbers::unpack(pairs[e / 2]);
            to[e] = Element(e % 2 ? y.y : y.x);
          }
      }
    }
  }
  __device__ __forceinline__ void store_written(int piece) const {
    const BackwardResult& result = back_.result;
    const int count = back_.rebuild.span;
    store_rows(result.k, result.pending_k, tensor(kDelta), piece, 0, count, 1.0f);
    if (problem_.objective == Objective::self)
      store_rows(result.v, result.pending_v, tensor(kTargets), piece, 0, count, 1.0f);
    else
      store_rows(result.v, result.pending_v, tensor(kDDelta), piece, 0, count,
                 problem_.objective == Objective::l2 ? -scale() : scale());
  }

  // Gradient 0 for tokens [begin, end).
  __device__ __forceinline__ void clear_tokens(const TokenView& fresh, const TokenView& pending, int64_t begin,
                                               int64_t end) const {
    for (int64_t j = begin + thread_ / kWarp; j < end; j += Traits::kWarps) {
      const bool old = j < place_.seq.pending;
      const TokenView& view = old ? pending : fresh;
      if (!view.data) continue;
      Element* to = static_cast<Element*>(view.data) + (old ? place_.pending(view, j) : place_.fresh(view, j));
      for (int column = thread_ % kWarp; column < problem_.dim; column += kWarp) to[column] = Element(0.0f);
    }
  }
  // Nothing behind the last complete chunk was written, and outputs without a gradient give queries none.
  __device__ __forceinline__ void clear_unwritten() const {
    const BackwardResult& result = back_.result;
    const int64_t begin = place_.chunks * problem_.chunk_size;
    clear_tokens(result.k, result.pending_k, begin, place_.end);
    clear_tokens(result.v, result.pending_v, begin, place_.end);
    if (!back_.problem.q.data) clear_tokens(result.q, result.q, place_.seq.pending, place_.end);
  }
  // Nothing depends on what this chunk wrote.
  __device__ __forceinline__ void clear_written(int piece) const {
    const BackwardResult& result = back_.result;
    const int64_t begin = int64_t(piece) * back_.rebuild.span;
    clear_tokens(result.k, result.pending_k, begin, begin + back_.rebuild.span);
    clear_tokens(result.v, result.pending_v, begin, begin + back_.rebuild.span);
    const int64_t row = place_.coefficient_row(problem_, piece);
    for (void* gates : {result.step, result.momentum_step})
      for (int t = thread_; gates && t < back_.rebuild.span; t += Traits::kThreads)
        static_cast<float*>(gates)[row * problem_.chunk_size + t] = 0.0f;
    if (thread_ == 0)
      for (void* factor : {result.decay, result.momentum_carry, result.momentum_decay})
        if (factor) static_cast<float*>(factor)[row] = 0.0f;
  }

  // ---- products ------------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ void clear(Group& x) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
  }
  // visit(n, e, r): accumulator e of tile n, which belongs to row g + 8 r of the slice.
  template <class Visit>
  static __device__ __forceinline__ void each_unit(const Visit& visit) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(n, e, e / 2);
  }
  // Group i as operands, rows g times w0 and rows g + 8 times w1.
  static __device__ __forceinline__ void pack(PackedUnits& to, int i, const Group& x, float w0 = 1.0f, float w1 = 1.0f) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      to[2 * i + n][0] = Numbers::pack(w0 * x[n][0], w0 * x[n][1]);
      to[2 * i + n][1] = Numbers::pack(w1 * x[n][2], w1 * x[n][3]);
    }
  }

  static __device__ __forceinline__ void copy(PackedUnits& to, const PackedUnits& from) {
#pragma unroll
    for (int n = 0; n < Traits::kUnitTiles; ++n) to[n][0] = from[n][0], to[n][1] = from[n][1];
  }

  // Every row times its token's weight in the write of the state (0) or of the momentum (1).
  __device__ __forceinline__ void weigh(PackedUnits& x, int which, int slice) const {
    const Lane lane(thread_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float w = steps(which)[slice * kSlice + lane.group + 8 * r];
#pragma unroll
      for (int n = 0; n < Traits::kUnitTiles; ++n) {
        const float2 y = Numbers::unpack(x[n][r]);
        x[n][r] = Numbers::pack(w * y.x, w * y.y);
      }
    }
  }

  // x = X W_in (kOut false) or X W_out^T of one slice and group i.
  template <bool kOut>
  __device__ __forceinline__ void by_weight(Group& x, const Element* rows, int slice, int i) const {
    clear(x);
    const int lane = thread_ % kWarp;
    const Element* own = weights<kOut>() +
                         (thread_ / kWarp * Traits::kUnits + lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Traits::kDimTiles / 2; ++k) {
      uint32_t a[4], b[4];
      ldmatrix(a, tile(rows, slice, 16 * k));
      ldmatrix(b, own + 16 * i * Traits::kPitch + 16 * k);
      Numbers::mma(x[0], a, {b[0], b[1]});
      Numbers::mma(x[1], a, {b[2], b[3]});
    }
  }

  // The adjoint as operands: what PackedState holds of the momentum's.
  struct StateTiles {
    const ScanState<Traits>& state;
    static __device__ __forceinline__ uint2 both(const float (&x)[4]) {
      return uint2{Numbers::pack(x[0], x[1]), Numbers::pack(x[2], x[3])};
    }
    __device__ __forceinline__ uint2 in(int i, int j) const { return both(state.in[i][j]); }
    __device__ __forceinline__ uint2 out(int i, int j) const { return both(state.out[i][j]); }
  };

  // x = X A_in (kOut false) or X A_out^T.
  template <bool kOut, class Tiles>
  __device__ __forceinline__ void by_adjoint(Group& x, const Element* rows, int slice, int i, const Tiles& tiles) const {
    clear(x);
#pragma unroll
    for (int k = 0; k < Traits::kDimTiles / 2; ++k) {
      uint32_t a[4];
      ldmatrix(a, tile(rows, slice, 16 * k));
      if constexpr (kOut) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint2 both = tiles.out(k, 2 * i + n);
          Numbers::mma(x[n], a, {movmatrix(both.x), movmatrix(both.y)});
        }
      } else {
        const uint2 low = tiles.in(i, 2 * k), high = tiles.in(i, 2 * k + 1);
        Numbers::mma(x[0], a, {low.x, high.x});
        Numbers::mma(x[1], a, {low.y, high.y});
      }
    }
  }

  // y += U W_out (kOut) or U W_in^T for the 16 features from 16 p on: this warp's part of it.
  template <bool kOut>
  __device__ __forceinline__ void add_weight(float (&y)[2][4], const PackedUnits& u, int p) const {
#pragma unroll
    for (int m = 0; m < Traits::kUnitTiles / 2; ++m) {
      const uint32_t a[4] = {u[2 * m][0], u[2 * m][1], u[2 * m + 1][0], u[2 * m + 1][1]};
      uint32_t b[4];
      ldmatrix_transposed(b, tile(weights<kOut>(), thread_ / kWarp * (Traits::kUnits / 16) + m, 16 * p));
      Numbers::mma(y[0], a, {b[0], b[1]});
      Numbers::mma(y[1], a, {b[2], b[3]});
    }
  }
  // y += U A_out (kOut) or U A_in^T.
  template <bool kOut, class Tiles>
  __device__ __forceinline__ void add_adjoint(float (&y)[2][4], const PackedUnits& u, int p, const Tiles& tiles) const {
#pragma unroll
    for (int m = 0; m < Traits::kUnitTiles / 2; ++m) {
      const uint32_t a[4] = {u[2 * m][0], u[2 * m][1], u[2 * m + 1][0], u[2 * m + 1][1]};
      if constexpr (kOut) {
        const uint2 low = tiles.out(p, 2 * m), high = tiles.out(p, 2 * m + 1);
        Numbers::mma(y[0], a, {low.x, high.x});
        Numbers::mma(y[1], a, {low.y, high.y});
      } else {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const uint2 both = tiles.in(m, 2 * p + q);
          Numbers::mma(y[q], a, {movmatrix(both.x), movmatrix(both.y)});
        }
      }
    }
  }

  // Sums over the warps what terms(p, y) adds for each 16 features, and calls finish(row, column, sum0, sum1).
  template <class Terms, class Finish>
  __device__ __forceinline__ void sum_parts(int slice, const Terms& terms, const Finish& finish) {
    if (here_.layout.partials == 1) __syncthreads();  // the sums before these were read
    float4* sums = partial(slice);
    float4* own = sums + thread_ / kWarp * (Traits::kDimTiles * kWarp) + thread_ % kWarp;
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) {
      float y[2][4] = {};
      terms(p, y);
      own[2 * p * kWarp] = four(y[0]);
      own[(2 * p + 1) * kWarp] = four(y[1]);
    }
    __syncthreads();  // every warp's part of this slice is there; with two sets the other one is free
    Sum::over_warps(sums, [&](int i, const float4& sum) {
      Sum::in_pairs(i, sum, [&](int row, int column, float x0, float x1) { finish(slice * kSlice + row, column, x0, x1); });
    });
  }

  // A_out += Y^T H of one slice, as it is held: H turned.
  __device__ __forceinline__ void add_to_out(PackedUnits& hidden, const Element* rows, int slice) {
    turn(hidden);
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) add_out(state_.out[p], hidden, rows, slice, p);
  }
  // A_in += D_z^T X of one slice.
  __device__ __forceinline__ void add_to_in(PackedUnits& d_inputs, const Element* rows, int slice) {
    turn(d_inputs);
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles / 2; ++j) {
      uint32_t b[4];
      ldmatrix_transposed(b, tile(rows, slice, 16 * j));
#pragma unroll
      for (int i = 0; i < Traits::kUnitTiles / 2; ++i) add_in(state_.in[i], d_inputs[2 * i], d_inputs[2 * i + 1], j, b);
    }
  }

  // z <- act(z), slope = act'(z), curve = act''(z), as far as they are asked for.
  template <class... More>
  __device__ __forceinline__ void activate(Group& z, More&... more) const {
    with_activation<Traits::kType>(problem_.activation, [&](auto act) {
      each_unit([&](int n, int e, int) {
        if constexpr (sizeof...(More) == 0) {
          float slope;
          act(z[n][e], slope);
        } else {
          act(z[n][e], more[n][e]...);
        }
      });
    });
  }

  // ---- reads ---------------------------------------------------------------------------------------------------------

  // The adjoint of f(x) for the queries, or of -f(x) for the values: their gradient takes their place. What reaches f(x) is
  // divided by the scale.
  __device__ __forceinline__ void rows_adjoint(int piece, bool queries, float scale) {
    begin_phase();
    Element* rows = tensor(queries ? kRead : kTargets);
    Element* upstream = tensor(queries ? kUpstream : kDDelta);
    const int first = queries ? this->first_query(piece) / kSlice : 0, count = this->token_count(piece);
    const int end = queries ? (count + kSlice - 1) / kSlice : slices();
    const float sign = queries ? 1.0f : -1.0f, residual = problem_.residual ? sign * scale : 0.0f;
    __syncthreads();  // the sums before these were read
#pragma unroll 1
    for (int s = first; s < end; ++s) {
      PackedUnits hidden, d_inputs;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Group h, slope, d_hidden;
        by_weight<false>(h, rows, s, i);
        activate(h, slope);
        pack(hidden, i, h, sign, sign);
        by_weight<true>(d_hidden, upstream, s, i);
        each_unit([&](int n, int e, int) { d_hidden[n][e] *= sign * slope[n][e]; });
        pack(d_inputs, i, d_hidden);
      }
      add_to_out(hidden, upstream, s);
      PackedUnits turned;
      copy(turned, d_inputs);
      add_to_in(turned, rows, s);
      sum_parts(
          s, [&](int p, float(&y)[2][4]) { add_weight<false>(y, d_inputs, p); },
          [&](int row, int column, float x0, float x1) {
            const float2 up = Numbers::unpack(pair_at(upstream, row, column));
            pair_at(rows, row, column) = Numbers::pack(fmaf(residual, up.x, scale * x0), fmaf(residual, up.y, scale * x1));
          });
    }
  }

  // ---- writes --------------------------------------------------------------------------------------------------------

  // float16 divides what is in proportion to the weights of tokens by this (see ForwardScan).
  __device__ __forceinline__ float write_scale(int piece) const {
    if constexpr (Traits::kMomentum) return fmaxf(scale_of(problem_.step, piece), scale_of(problem_.momentum_step, piece));
    return scale_of(problem_.step, piece);
  }

  __device__ __forceinline__ void write_adjoint(int piece) {
    carry_adjoint(piece, slot_before(piece));
    if (predicts()) form_delta();
    __syncthreads();  // the last slice's errors are complete
    errors_adjoint();
    __syncthreads();  // their adjoint is complete, and so are the sums of coefficients
    begin_phase();
    store_coefficients(piece);
    const auto decay = [&](int, int, float(&x)[4]) { multiply(x, of_chunk(problem_.decay, piece, 1.0f) / scale()); };
    each_out(state_, decay);
    keys_adjoint();
    each_in(state_, decay);
    begin_phase();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedUnits d_inputs;
      recall(s, kDInputs, d_inputs);
      add_to_in(d_inputs, tensor(kChunkKeys), s);
    }
  }
  static __device__ __forceinline__ void multiply(float (&x)[4], float factor) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= factor;
  }

  // The gradients of decay, carry and the momentum's decay, and the adjoint of the momentum through them.
  __device__ __forceinline__ void carry_adjoint(int piece, int which) {
    float sums[3] = {0.0f, 0.0f, 0.0f};
    const auto dot = [](const float (&x)[4], const float4& y) { return x[0] * y.x + x[1] * y.y + x[2] * y.z + x[3] * y.w; };
    if (here_.workspace.remainders) {
      // A sum of many numbers of either sign: what rounding took from the slot would be seen in it.
      const Lane lane(thread_);
      const int unit = thread_ / kWarp * Traits::kUnits;
      const auto in = reinterpret_cast<const uint32_t*>(weights<false>() + (unit + lane.group) * Traits::kPitch + lane.pair);
      const Element* out = weights<true>() + (unit + lane.pair) * Traits::kPitch + lane.group;
      const PackedState<Traits> rest = remainder(which);
      each_in(state_, [&](int i, int j, float(&x)[4]) {
        const int at = (16 * i * Traits::kPitch + 8 * j) / 2;
        sums[0] += dot(x, unpacked(uint2{in[at], in[at + 4 * Traits::kPitch]})) + dot(x, unpacked(rest.in(i, j)));
      });
      each_out(state_, [&](int i, int j, float(&x)[4]) {
        const Element* w = out + 8 * j * Traits::kPitch + 16 * i;
        const float4 rounded{float(w[0]), float(w[Traits::kPitch]), float(w[8]), float(w[Traits::kPitch + 8])};
        sums[0] += dot(x, rounded) + dot(x, unpacked(rest.out(i, j)));
      });
    }
    if constexpr (Traits::kMomentum) {
      const float carry = of_chunk(problem_.momentum_carry, piece, 0.0f);
      const float decay = of_chunk(problem_.momentum_decay, piece, 0.0f);
      const auto step = [&](float(&x)[4], float4& adjoint, uint2& operand, const float4& speed) {
        const float4 old = adjoint;
        sums[1] += dot(x, speed);
        sums[2] += old.x * speed.x + old.y * speed.y + old.z * speed.z + old.w * speed.w;
        operand = packed(old);
        adjoint = float4{fmaf(carry, x[0], decay * old.x), fmaf(carry, x[1], decay * old.y),
                         fmaf(carry, x[2], decay * old.z), fmaf(carry, x[3], decay * old.w)};
      };
      const ParkedState<Traits> adjoint = momentum_adjoint(), slot = momentum_slot(which);
      const PackedState<Traits> operand = momentum_operand();
      each_in(state_, [&](int i, int j, float(&x)[4]) { step(x, adjoint.in(i, j), operand.in(i, j), slot.in(i, j)); });
      each_out(state_, [&](int i, int j, float(&x)[4]) { step(x, adjoint.out(i, j), operand.out(i, j), slot.out(i, j)); });
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (thread_ % kWarp == 0) scalar_sums(i)[thread_ / kWarp] = sums[i];
    }
  }

  // (1) The errors of the keys.
  __device__ __forceinline__ void form_delta() {
    begin_phase();
    const bool self = problem_.objective == Objective::self;
    const float residual = problem_.residual ? 1.0f : 0.0f, of_target = self ? residual : 1.0f;
    Element *keys = tensor(kChunkKeys), *targets = tensor(kTargets), *delta = tensor(kDelta);
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedUnits hidden;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Group h;
        by_weight<false>(h, keys, s, i);
        activate(h);
        if (self) {
          // f(k) - f(v) is one product: that of the difference of their hidden values.
          Group of_targets;
          by_weight<false>(of_targets, targets, s, i);
          activate(of_targets);
          each_unit([&](int n, int e, int) { h[n][e] -= of_targets[n][e]; });
        }
        pack(hidden, i, h);
      }
      sum_parts(
          s, [&](int p, float(&y)[2][4]) { add_weight<true>(y, hidden, p); },
          [&](int row, int column, float x0, float x1) {
            const float2 k = Numbers::unpack(pair_at(keys, row, column)), v = Numbers::unpack(pair_at(targets, row, column));
            pair_at(delta, row, column) =
                Numbers::pack(fmaf(-of_target, v.x, fmaf(residual, k.x, x0)), fmaf(-of_target, v.y, fmaf(residual, k.y, x1)));
          });
    }
  }

  // (2) The write and the errors of the hidden units: the adjoint of delta, divided by the scale like all that follows.
  __device__ __forceinline__ void errors_adjoint() {
    begin_phase();
    const Lane lane(thread_);
    const StateTiles adjoint{state_};
    const PackedState<Traits> speed = momentum_operand();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      const Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta);
      Element* d_delta = tensor(kDDelta);
      float of_step[2], of_momentum[2], d_step[2] = {0.0f, 0.0f}, d_momentum_step[2] = {0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        of_step[r] = steps(0)[s * kSlice + lane.group + 8 * r];
        if constexpr (Traits::kMomentum) of_momentum[r] = steps(1)[s * kSlice + lane.group + 8 * r];
      }
      PackedUnits errors, d_passed, d_inputs, hidden;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Group h, slope, curve, error, x;
        by_weight<false>(h, keys, s, i);
        activate(h, slope, curve);
        by_weight<true>(error, delta, s, i);
        each_unit([&](int n, int e, int) { curve[n][e] *= error[n][e], error[n][e] *= slope[n][e]; });
        // With momentum they are multiplied by either weight when they are used.
        if constexpr (Traits::kMomentum)
          pack(errors, i, error);
        else
          pack(errors, i, error, of_step[0], of_step[1]);
        by_adjoint<false>(x, keys, s, i, adjoint);
        each_unit([&](int n, int e, int r) {
          d_step[r] = fmaf(x[n][e], error[n][e], d_step[r]);
          x[n][e] *= of_step[r];
        });
        if constexpr (Traits::kMomentum) {
          Group y;
          by_adjoint<false>(y, keys, s, i, speed);
          each_unit([&](int n, int e, int r) {
            d_momentum_step[r] = fmaf(y[n][e], error[n][e], d_momentum_step[r]);
            x[n][e] = fmaf(of_momentum[r], y[n][e], x[n][e]);
          });
        }
        each_unit([&](int n, int e, int) { curve[n][e] *= x[n][e], x[n][e] *= slope[n][e]; });
        pack(d_passed, i, x);
        by_adjoint<true>(x, delta, s, i, adjoint);
        each_unit([&](int n, int e, int r) {
          d_step[r] = fmaf(h[n][e], x[n][e], d_step[r]);
          x[n][e] *= of_step[r];
        });
        if constexpr (Traits::kMomentum) {
          Group y;
          by_adjoint<true>(y, delta, s, i, speed);
          each_unit([&](int n, int e, int r) {
            d_momentum_step[r] = fmaf(h[n][e], y[n][e], d_momentum_step[r]);
            x[n][e] = fmaf(of_momentum[r], y[n][e], x[n][e]);
          });
          pack(hidden, i, h);
        } else {
          pack(hidden, i, h, of_step[0], of_step[1]);
        }
        each_unit([&](int n, int e, int) { x[n][e] = fmaf(x[n][e], slope[n][e], curve[n][e]); });
        pack(d_inputs, i, x);
        keep(s, kErrors, i, errors);
        keep(s, kDPassed, i, d_passed);
        keep(s, kDInputs, i, d_inputs);
      }
      sum_rows(0, s, d_step);
      PackedUnits hidden_momentum;
      if constexpr (Traits::kMomentum) {
        sum_rows(1, s, d_momentum_step);
        copy(hidden_momentum, hidden);
        weigh(hidden_momentum, 1, s);
        weigh(hidden, 0, s);
      }
      sum_parts(
          s,
          [&](int p, float(&y)[2][4]) {
            add_weight<true>(y, d_passed, p);
            add_adjoint<true>(y, hidden, p, adjoint);
            if constexpr (Traits::kMomentum) add_adjoint<true>(y, hidden_momentum, p, speed);
          },
          [&](int row, int column, float x0, float x1) { pair_at(d_delta, row, column) = Numbers::pack(x0, x1); });
    }
  }

  // This warp's part of a number per token, of rows g and g + 8.
  __device__ __forceinline__ void sum_rows(int which, int slice, float (&x)[2]) const {
    const Lane lane(thread_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] += __shfl_xor_sync(0xffffffffu, x[r], 1);
      x[r] += __shfl_xor_sync(0xffffffffu, x[r], 2);
      if (lane.pair == 0)
        row_sums(which)[thread_ / kWarp * back_.rebuild.rows + slice * kSlice + lane.group + 8 * r] = x[r];
    }
  }

  __device__ __forceinline__ void store_coefficients(int piece) const {
    const BackwardResult& result = back_.result;
    const int64_t row = place_.coefficient_row(problem_, piece);
    const float sign = problem_.objective == Objective::dot ? 1.0f : -1.0f;
    const auto store = [&](void* gates, int which) {
      if (!gates) return;
      for (int t = thread_; t < back_.rebuild.span; t += Traits::kThreads) {
        float sum = 0.0f;
        for (int w = 0; w < Traits::kWarps; ++w) sum += row_sums(which)[w * back_.rebuild.rows + t];
        static_cast<float*>(gates)[row * problem_.chunk_size + t] = sign * sum;
      }
    };
    store(result.step, 0);
    if constexpr (Traits::kMomentum) store(result.momentum_step, 1);
    if (thread_ < 3) {
      void* factor = thread_ == 0 ? result.decay : thread_ == 1 ? result.momentum_carry : result.momentum_decay;
      float sum = 0.0f;
      for (int w = 0; w < Traits::kWarps; ++w) sum += scalar_sums(thread_)[w];
      if (factor) static_cast<float*>(factor)[row] = sum;
    }
  }

  // (3) The layers at the keys: their gradient over delta, and the adjoint of W_out.
  __device__ __forceinline__ void keys_adjoint() {
    begin_phase();
    Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta), *d_delta = tensor(kDDelta);
    const StateTiles adjoint{state_};
    const bool predicted = predicts();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedUnits d_inputs;
      recall(s, kDInputs, d_inputs);
      if (predicted) {
        PackedUnits hidden;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          Group h, slope, x;
          by_weight<false>(h, keys, s, i);
          activate(h, slope);
          pack(hidden, i, h);
          by_weight<true>(x, d_delta, s, i);
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float2 direct = Numbers::unpack(d_inputs[2 * i + n][r]);
              x[n][2 * r] = fmaf(x[n][2 * r], slope[n][2 * r], direct.x);
              x[n][2 * r + 1] = fmaf(x[n][2 * r + 1], slope[n][2 * r + 1], direct.y);
            }
          pack(d_inputs, i, x);
          keep(s, kDInputs, i, d_inputs);
        }
        add_to_out(hidden, d_delta, s);
      }
      {
        PackedUnits d_passed;
        recall(s, kDPassed, d_passed);
        add_to_out(d_passed, delta, s);
      }
      PackedUnits errors, errors_momentum;
      recall(s, kErrors, errors);
      if constexpr (Traits::kMomentum) {
        copy(errors_momentum, errors);
        weigh(errors_momentum, 1, s);
        weigh(errors, 0, s);
      }
      sum_parts(
          s,
          [&](int p, float(&y)[2][4]) {
            add_weight<false>(y, d_inputs, p);
            add_adjoint<false>(y, errors, p, adjoint);
            if constexpr (Traits::kMomentum) add_adjoint<false>(y, errors_momentum, p, momentum_operand());
          },
          [&](int row, int column, float x0, float x1) {
            const float2 d = Numbers::unpack(pair_at(d_delta, row, column));
            const float residual = predicted && problem_.residual ? 1.0f : 0.0f;
            x0 = fmaf(residual, d.x, x0), x1 = fmaf(residual, d.y, x1);
            pair_at(delta, row, column) = Numbers::pack(scale() * x0, scale() * x1);
          });
    }
  }

  const BackwardParams& back_;
  Here& here_;
};

}  // namespace hope::cuda
