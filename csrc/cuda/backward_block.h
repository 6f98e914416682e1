// One block at work on its share of the backward scan of one (sequence, head): where it is, the states of the segment it
// is in, the adjoint of the state, and tokens on their way between global and shared memory. What is computed with them is
// backward_scan.h's.
#pragma once

#include "backward_layout.h"

namespace hope::cuda {

template <class Traits>
class BackwardBlock : protected ForwardScan<Traits> {
  using Forward = ForwardScan<Traits>;

 protected:
  using Forward::begin_phase;
  using typename Forward::Element;
  using typename Forward::Numbers;
  using Forward::params_;
  using Forward::place_;
  using Forward::problem_;
  using Forward::scale_of;
  using Forward::shared_;
  using Forward::state_;  // the state while it is rebuilt, its adjoint while chunks are walked back
  using Forward::sum_;
  using Forward::thread_;
  using Forward::tile;
  using Forward::turn;
  using Forward::weight;
  // Accumulators of a slice and the rows of W_in^T of 16 of this warp's hidden units; of a glu gates and ups in turn. What
  // there is one of for each unit lies in the first of its kInputs tiles.
  using Group = float[2 * Traits::kInputs][4];
  // A slice as operands: a number for each of the warp's hidden units, and one for each of their rows of W_in^T.
  using PackedUnits = uint32_t[Traits::kUnitTiles][2];
  using PackedInputs = uint32_t[Traits::kInTiles][2];
  using PackedGroup = uint32_t[2 * Traits::kInputs][2];  // the same of a group
  using Parts = KeptParts<Traits>;
  static constexpr int kGroups = Traits::kUnitTiles / 2;
  static_assert(Traits::kUnitTiles % 2 == 0, "a group is of 16 units");
  // What is known once for the whole scan is in shared memory: what follows from it, addresses above all, would otherwise be
  // held in registers for the whole scan.
  struct Here {
    BackwardLayout layout;
    BackwardWorkspace workspace;  // this block's part
    float scale;   // of the chunk's write, see write_scale
    bool queries;  // outputs of queries have gradients
    bool live[2];  // a gradient has reached the state after a piece; for even and odd pieces: one is read, the next written
    int piece;        // being walked back
    int first, last;  // states that the piece's segment has up to the piece's own: slots 0, 1, ..
  };

  __device__ __forceinline__ BackwardBlock(const BackwardParams& params, char* shared)
      : Forward(params.rebuild, shared), back_(params), here_(block_shared<Here>()) {}

  // ---- pieces of the sequence ----------------------------------------------------------------------------------------

  // The newest piece, first to be walked back, comes last in the sequence. Those behind the last chunk read one state.
  __device__ __forceinline__ int piece() const { return here_.piece; }
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
    return here_.queries && this->first_query(piece) < this->token_count(piece);
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
  // W_in^T, or W_out, of the chunk's start: rows of kPitch, those of W_in^T in the order of the state's tiles.
  template <bool kOut>
  __device__ __forceinline__ const Element* weights() const {
    return reinterpret_cast<const Element*>(shared_ + here_.layout.weights) +
           (kOut ? Traits::kInputs * Traits::kHidden * Traits::kPitch : 0);
  }
  __device__ __forceinline__ const Element* weights_in() const { return weights<false>(); }
  __device__ __forceinline__ const Element* weights_out() const { return weights<true>(); }
  __device__ __forceinline__ float* row_sums(int which) const {
    return reinterpret_cast<float*>(shared_ + here_.layout.rows) + which * Traits::kWarps * back_.rebuild.rows;
  }
  // Weights of tokens in the write of the state (0) and of the momentum (1), of dgd in those of W_in (0) and W_out (1),
  // divided by the scale.
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

  __device__ __forceinline__ uint4* kept(int slice, int part) const {
    char* memory = here_.layout.kept >= 0
                       ? shared_ + here_.layout.kept
                       : static_cast<char*>(here_.workspace.kept);
    return reinterpret_cast<uint4*>(memory) + (slice * Parts::kCount + part) * Traits::kThreads + thread_;
  }
  // Group i of a part of KeptParts.
  template <int kTiles>
  __device__ __forceinline__ void keep(int slice, int part, int i, const uint32_t (&x)[kTiles][2]) const {
    constexpr int kEach = kTiles / kGroups;
    uint4* to = kept(slice, part);
#pragma unroll
    for (int n = kEach * i; n < kEach * (i + 1); n += 2)
      to[n / 2 * Traits::kThreads] = uint4{x[n][0], x[n][1], x[n + 1][0], x[n + 1][1]};
  }
  template <int kTiles>
  __device__ __forceinline__ void recall(int slice, int part, uint32_t (&x)[kTiles][2]) const {
    const uint4* from = kept(slice, part);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const uint4 y = from[n / 2 * Traits::kThreads];
      x[n][0] = y.x, x[n][1] = y.y, x[n + 1][0] = y.z, x[n + 1][1] = y.w;
    }
  }

  // Some of a part, from a place on, as the B fragments of the slice's columns.
  template <int kTiles>
  __device__ __forceinline__ void recall_turned(int slice, int place, uint32_t (&x)[kTiles][2]) const {
    recall(slice, place, x);
    turn(x);
  }

  static constexpr int64_t kSlotBytes = kStateSize<Traits> * sizeof(Element);

  // This block's part of the workspace.
  __device__ __forceinline__ BackwardWorkspace own_workspace() const {
    const int64_t block = blockIdx.x, states = block * back_.slots;
    const auto part = [](void* memory, int64_t bytes) -> void* { return memory ? static_cast<char*>(memory) + bytes : nullptr; };
    const BackwardWorkspace& all = back_.workspace;
    BackwardWorkspace own;
    own.adjoint = part(all.adjoint, block * ParkedState<Traits>::kBytes);
    own.slots = part(all.slots, states * kSlotBytes);
    own.remainders = part(all.remainders, states * PackedState<Traits>::kBytes);
    own.kept = part(all.kept, block * back_.kept_bytes);
    own.momentum_slots = part(all.momentum_slots, states * ParkedState<Traits>::kBytes);
    own.momentum_adjoint = part(all.momentum_adjoint, block * ParkedState<Traits>::kBytes);
    own.momentum_operand = part(all.momentum_operand, block * PackedState<Traits>::kBytes);
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

  // What dgd solves for the chunk, in the shared memory of the backward: not where the states' rebuilding has it.
  __device__ __forceinline__ DeltaRuleAdjoint<Traits> systems() const {
    return {shared_, here_.layout.delta, back_.rebuild.rows, thread_};
  }

  // One thread says whose turn it is, a barrier before the others look.
  __device__ __forceinline__ void enter(int piece) const {
    here_.piece = piece, here_.last = state_before(piece), here_.first = here_.last - slot_before(piece);
  }

  // ---- states of a segment -------------------------------------------------------------------------------------------

  static __device__ __forceinline__ MatrixView contiguous(const void* data, int64_t which, int64_t rows, int64_t columns) {
    float* matrix = const_cast<float*>(static_cast<const float*>(data)) + which * rows * columns;
    return {matrix, DType::float32, 0, 0, columns, 1};
  }

  __device__ __forceinline__ void load_first(int chunk) {
    const int64_t row = place_.checkpoint_row(problem_, back_.rebuild.checkpoints, chunk), D = problem_.dim,
                  H = problem_.hidden;
    MatrixView weights[Traits::kInputs + 1], speeds[Traits::kInputs + 1];
#pragma unroll
    for (int i = 0; i <= Traits::kInputs; ++i) {
      const int64_t rows = i < Traits::kInputs ? D : H, columns = i < Traits::kInputs ? H : D;
      const auto matrix = [&](const MatrixView& initial, const void* checkpoints) {
        return chunk == 0 ? initial : contiguous(checkpoints, row, rows, columns);
      };
      weights[i] = matrix(problem_.weights[i], back_.result.checkpoints[i]);
      if constexpr (Traits::kMomentum)
        speeds[i] = matrix(problem_.momentum[i], back_.result.checkpoints[kMaxWeights + i]);
    }
    this->load_state(weights, speeds);
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
      if constexpr (Traits::kDelta)
        this->write_corrected(chunk, chunk & (stages - 1));
      else
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
    const int warp = thread_ / kWarp;
    const auto row = [&](int number) { return slot(which) + (number + lane.group) * Traits::kDim + lane.pair; };
    Element* in = row(warp * Traits::kInputs * Traits::kUnits);
    Element* out = row(Traits::kInputs * Traits::kHidden + warp * Traits::kUnits);
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

  // float16 divides what is in proportion to the weights of tokens by this (see ForwardScan).
  __device__ __forceinline__ float write_scale(int piece) const {
    if constexpr (Traits::kMomentum) return fmaxf(scale_of(problem_.step, piece), scale_of(problem_.momentum_step, piece));
    return scale_of(problem_.step, piece);
  }

  // The chunk's first state if it is not there yet, and the tokens of a piece.
  __device__ __forceinline__ void load_piece(int piece) const {
    if (newest(piece) || piece < place_.chunks) {
      constexpr int kParts = Traits::kDim / 8;
      Element* to = reinterpret_cast<Element*>(shared_ + here_.layout.weights);
      const Element* from = slot(slot_before(piece));
      for (int i = thread_; i < (Traits::kInputs + 1) * Traits::kHidden * kParts; i += Traits::kThreads)
        cp_async_16(to + i / kParts * Traits::kPitch + i % kParts * 8, from + i * 8);
    }
    if (written(piece)) {
      if constexpr (Traits::kDelta) {
        systems().load_products(this->retention(piece), back_.rebuild.span);
      } else {
        const float scale = write_scale(piece);
        if (thread_ == 0) here_.scale = scale;
        for (int row = thread_; row < back_.rebuild.rows; row += Traits::kThreads) {
          steps(0)[row] = weight(problem_.step, piece, row, scale);
          if constexpr (Traits::kMomentum) steps(1)[row] = weight(problem_.momentum_step, piece, row, scale);
        }
      }
    }
    // One loop: the code for one tensor is long.
#pragma unroll 1
    for (int t = written(piece) ? 0 : 2; t < (reads(piece) ? 4 : 2); ++t) {
      const TokenTensor& input = back_.inputs[t];
      this->load_tensor(tensor(input.place), input.fresh, input.pending, piece, t < 2 ? 0 : this->first_query(piece),
                        this->token_count(piece));
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // everyone's share is there
  }

  // The gradients of a piece's keys and values where it was written, and of its queries.
  __device__ __forceinline__ void store_gradients(int piece) const {
#pragma unroll 1
    for (int t = written(piece) ? 0 : 2; t < (reads(piece) ? 3 : 2); ++t) {
      const TokenTensor& gradient = back_.gradients[t];
      const float factor = gradient.place == kDDelta ? (subtracts_values() ? -scale() : scale()) : 1.0f;
      store_rows(gradient, piece, t < 2 ? 0 : this->first_query(piece), this->token_count(piece), factor);
    }
  }
  // Rows [first, count) of a piece times a factor.
  __device__ __forceinline__ void store_rows(const TokenTensor& gradient, int piece, int first, int count,
                                             float factor) const {
    const Element* from = tensor(gradient.place);
    const int old = this->first_query(piece);
    for (int i = thread_ + first * (Traits::kDim / 8); i < count * (Traits::kDim / 8); i += Traits::kThreads) {
      const int row = i / (Traits::kDim / 8), column = i % (Traits::kDim / 8) * 8;
      const int64_t j = int64_t(piece) * back_.rebuild.span + row;
      const TokenView& view = row < old ? gradient.pending : gradient.fresh;
      if (!view.data || !sum_.owns(column / 8)) continue;
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
  // With gd the errors of `dot` are the values, and its steps have the other sign.
  __device__ __forceinline__ bool subtracts_values() const {
    return problem_.objective == Objective::l2 || (Traits::kDelta && problem_.objective == Objective::dot);
  }

  // Gradient 0 for tokens [begin, end).
  __device__ __forceinline__ void clear_tokens(const TokenTensor& gradient, int64_t begin, int64_t end) const {
    if (this->rank() > 0) return;  // one block is enough
    for (int64_t j = begin + thread_ / kWarp; j < end; j += Traits::kWarps) {
      const bool old = j < place_.seq.pending;
      const TokenView& view = old ? gradient.pending : gradient.fresh;
      if (!view.data) continue;
      Element* to = static_cast<Element*>(view.data) + (old ? place_.pending(view, j) : place_.fresh(view, j));
      for (int column = thread_ % kWarp; column < problem_.dim; column += kWarp) to[column] = Element(0.0f);
    }
  }
  // Nothing behind the last complete chunk was written, and outputs without a gradient give queries none.
  __device__ __forceinline__ void clear_unwritten() const {
#pragma unroll 1
    for (int t = 0; t < (here_.queries ? 2 : 3); ++t)
      clear_tokens(back_.gradients[t], t < 2 ? place_.chunks * problem_.chunk_size : place_.seq.pending, place_.end);
  }
  // Nothing depends on what this chunk wrote.
  __device__ __forceinline__ void clear_written(int piece) const {
    const BackwardResult& result = back_.result;
    const int64_t begin = int64_t(piece) * back_.rebuild.span;
#pragma unroll 1
    for (int t = 0; t < 2; ++t) clear_tokens(back_.gradients[t], begin, begin + back_.rebuild.span);
    if (this->rank() > 0) return;
    const int64_t row = place_.coefficient_row(problem_, piece);
    for (void* gates : {result.step, Traits::kDelta ? result.retention : result.momentum_step})
      for (int t = thread_; gates && t < back_.rebuild.span; t += Traits::kThreads)
        static_cast<float*>(gates)[row * problem_.chunk_size + t] = 0.0f;
    if (thread_ == 0)
      for (void* factor : {result.decay, result.momentum_carry, result.momentum_decay})
        if (factor) static_cast<float*>(factor)[row] = 0.0f;
  }

  const BackwardParams& back_;
  Here& here_;
};

}  // namespace hope::cuda
