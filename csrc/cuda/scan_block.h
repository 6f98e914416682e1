// One block at work on its share of one (sequence, head): where it is, its tokens, and its part of the state, on the way
// between global memory, shared memory and registers. What is computed with them is forward_scan.h's.
#pragma once

#include <cuda_runtime.h>

#include "activation.h"
#include "cuda/ptx.h"
#include "scan_place.h"
#include "scan_state.h"
#include "scan_sum.h"

namespace hope::cuda {

// Tensors of tokens in shared memory, in this order; kQueries is left out where nothing is read.
enum Tensor : int { kQueries = 0, kKeys = 1, kValues = 2, kTensors = 3 };

struct ForwardParams {
  ScanProblem problem;
  ForwardResult result;
  TokenView tokens[kTensors], pending[kTensors];  // those of the problem
  ScanLayout layout;
  Sigmoidal sigmoidal;  // of the problem's activation
  void* workspace;      // of ParkedState, for the momentum
  int64_t checkpoints;  // of one sequence, without a table
  int span;             // tokens of a chunk, or of a piece that is only read
  int rows;             // the same in whole slices
  int blocks;           // of a cluster
  int stages;           // 2: the next chunk's tokens are loaded while one is computed
  bool shared_read;     // queries are the keys: what a chunk's keys read is its output
  bool vectors;         // token rows are whole and aligned: they move 16 bytes at a time
};

template <class Traits>
class ScanBlock {
 public:
  using Element = typename Pair<Traits::kType>::Element;

  __device__ __forceinline__ ScanBlock(const ForwardParams& params, char* shared)
      : params_(params),
        problem_(params.problem),
        shared_(shared),
        place_(block_shared<Place>()),
        sum_(shared, params.layout, params.blocks) {}

 protected:
  // A part of the work begins: what follows from the thread's number, addresses above all, is computed once for each part
  // rather than held in registers for the whole scan.
  __device__ __forceinline__ void begin_phase() { thread_ = opaque(threadIdx.x); }

  // ---- pieces of the sequence: its chunks, then what follows them and is only read ----------------------------------

  __device__ __forceinline__ bool writes(int piece) const { return piece < place_.chunks; }
  __device__ __forceinline__ bool reads() const { return problem_.q.data != nullptr; }
  // Whether queries go through the memory, which those of a chunk need not where they are its keys.
  __device__ __forceinline__ bool reads_alone(int piece) const {
    return reads() && !(params_.shared_read && writes(piece));
  }
  // Tokens of a piece: rows [0, count) of its tensors in shared memory; queries from row first_query on.
  __device__ __forceinline__ int token_count(int piece) const {
    return int(min(place_.end - int64_t(piece) * params_.span, int64_t(params_.span)));
  }
  __device__ __forceinline__ int first_query(int piece) const {
    return int(clamped(place_.seq.pending - int64_t(piece) * params_.span, 0, params_.span));
  }

  // ---- hidden units of this block -----------------------------------------------------------------------------------

  __device__ __forceinline__ int blocks() const { return Traits::kCluster ? params_.blocks : 1; }
  __device__ __forceinline__ int rank() const { return int(blockIdx.x) % blocks(); }
  __device__ __forceinline__ int first_unit() const { return rank() * Traits::kHidden; }
  __device__ __forceinline__ int units() const {
    return int(clamped(problem_.hidden - first_unit(), 0, Traits::kHidden));
  }

  // ---- shared memory ------------------------------------------------------------------------------------------------

  __device__ __forceinline__ Element* tensor(int stage, int t) const {
    const int place = reads() ? t : t - 1;
    return reinterpret_cast<Element*>(shared_ + params_.layout.tokens + stage * params_.layout.stage_bytes +
                                      place * params_.layout.tensor_bytes);
  }
  // What this thread keeps of a slice of keys; no other thread looks at it.
  __device__ __forceinline__ uint4* kept(int slice) const {
    return reinterpret_cast<uint4*>(shared_ + params_.layout.kept) + slice * Traits::kKept * Traits::kThreads + thread_;
  }
  // Address this lane gives for the 16x16 tile of a slice of `rows` that starts at a column.
  __device__ __forceinline__ const Element* tile(const Element* rows, int slice, int column) const {
    const int lane = thread_ % kWarp;
    return rows + (slice * kSlice + lane % 16) * Traits::kPitch + column + lane / 16 * 8;
  }

  // ---- tokens -------------------------------------------------------------------------------------------------------

  // Starts loading the tokens of a piece, zeros around them: queries, and keys and values if it is a chunk.
  __device__ __forceinline__ void load_tokens(int piece, int stage) const {
    const int count = token_count(piece), end = writes(piece) ? kTensors : kKeys;
#pragma unroll 1
    for (int t = reads_alone(piece) ? kQueries : kKeys; t < end; ++t)
      load_tensor(tensor(stage, t), params_.tokens[t], params_.pending[t], piece, t == kQueries ? first_query(piece) : 0,
                  count);
    cp_async_commit();
  }
  // Rows [first, count) of one tensor, zeros in its other rows; the caller closes the group of copies.
  __device__ __forceinline__ void load_tensor(Element* to, const TokenView& fresh, const TokenView& pending, int piece,
                                              int first, int count) const {
    const auto token = [&](int row) {
      const int64_t j = int64_t(piece) * params_.span + row;
      return j < place_.seq.pending ? static_cast<const Element*>(pending.data) + place_.pending(pending, j)
                                    : static_cast<const Element*>(fresh.data) + place_.fresh(fresh, j);
    };
    if (params_.vectors) {
      constexpr int kParts = Traits::kDim / 8;
      for (int i = thread_; i < params_.rows * kParts; i += Traits::kThreads) {
        const int row = i / kParts, column = i % kParts * 8;
        const bool inside = first <= row && row < count;
        cp_async_16(to + row * Traits::kPitch + column, inside ? token(row) + column : fresh.data, inside);
      }
    } else {
      for (int i = thread_; i < params_.rows * Traits::kDim; i += Traits::kThreads) {
        const int row = i / Traits::kDim, column = i % Traits::kDim;
        const bool inside = first <= row && row < count && column < problem_.dim;
        to[row * Traits::kPitch + column] = inside ? token(row)[column] : Element(0.0f);
      }
    }
  }

  __device__ __forceinline__ void store_outputs(int piece, int stage) const {
    const TokenView& output = params_.result.output;
    if (!output.data) return;
    const int first = first_query(piece), count = token_count(piece);
    const Element* from = tensor(stage, kQueries);
    const auto token = [&](int row) {
      return static_cast<Element*>(output.data) + place_.fresh(output, int64_t(piece) * params_.span + row);
    };
    if (params_.vectors) {
      constexpr int kParts = Traits::kDim / 8;
      for (int i = thread_ + first * kParts; i < count * kParts; i += Traits::kThreads) {
        const int row = i / kParts, column = i % kParts * 8;
        if (!sum_.owns(column / 8)) continue;
        *reinterpret_cast<uint4*>(token(row) + column) =
            *reinterpret_cast<const uint4*>(from + row * Traits::kPitch + column);
      }
    } else {
      for (int i = thread_ + first * Traits::kDim; i < count * Traits::kDim; i += Traits::kThreads) {
        const int row = i / Traits::kDim, column = i % Traits::kDim;
        if (column < problem_.dim && sum_.owns(column / 8)) token(row)[column] = from[row * Traits::kPitch + column];
      }
    }
  }

  // ---- state --------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int64_t final_row() const { return place_.sequence * problem_.heads + place_.head; }
  // The momentum does not fit on chip beside the weights: it is read and written once for each chunk, through L2.
  __device__ __forceinline__ ParkedState<Traits> momentum() const { return {params_.workspace, blockIdx.x}; }

  // The state is staged where partial sums lie at other times.
  __device__ __forceinline__ float* staging() const { return reinterpret_cast<float*>(shared_ + params_.layout.partial); }

  // This block's units of a matrix of this (sequence, head), staged for all to see; the block moves on together from `use`.
  template <bool kOut, int kInput = 0, class Use>
  __device__ __forceinline__ void load_matrix(const MatrixView& view, const Use& use) const {
    const StagedMatrix<Traits, kOut, kInput> staged(staging(), thread_);
    const int rows = kOut ? units() : problem_.dim, columns = kOut ? problem_.dim : units();
    const int64_t first = place_.sequence * view.sequence + place_.head * view.head +
                          (Traits::kCluster ? first_unit() * (kOut ? view.in : view.out) : 0);
    staged.load(view, first, view.data ? rows : 0, columns);
    __syncthreads();  // the matrix is staged
    use(staged);
    __syncthreads();  // nobody reads it any more
  }
  // The other way: `fill` stages this thread's numbers.
  template <bool kOut, int kInput = 0, class Fill>
  __device__ __forceinline__ void store_matrix(void* matrices, int64_t row, const Fill& fill) const {
    if (!matrices) return;
    const StagedMatrix<Traits, kOut, kInput> staged(staging(), thread_);
    const int rows = kOut ? units() : problem_.dim, columns = kOut ? problem_.dim : units();
    const int64_t first = row * problem_.dim * problem_.hidden + first_unit() * (kOut ? problem_.dim : 1);
    fill(staged);
    __syncthreads();  // the matrix is staged
    staged.store(static_cast<float*>(matrices) + first, rows, columns, kOut ? problem_.dim : problem_.hidden);
    __syncthreads();  // nobody reads it any more
  }

  // All matrices into the registers of the state.
  __device__ __forceinline__ void load_matrices(const MatrixView* views) {
    begin_phase();
    const auto get_in = [&](const auto& staged) {
      each_in(state_, [&](int i, int j, float(&x)[4]) { staged.get(i, j, x); });
    };
    load_matrix<false>(views[0], get_in);
    if constexpr (Traits::kInputs == 2) load_matrix<false, 1>(views[1], get_in);
    load_matrix<true>(views[Traits::kInputs], [&](const auto& staged) {
      each_out(state_, [&](int i, int j, float(&x)[4]) { staged.get(i, j, x); });
    });
  }
  // The other way, from in(i, j, registers) and out(i, j, registers).
  template <class In, class Out>
  __device__ __forceinline__ void store_matrices(void* const* to, int64_t row, const In& in, const Out& out) {
    begin_phase();
    const auto put_in = [&](const auto& staged) {
      each_in(state_, [&](int i, int j, float(&x)[4]) { staged.put(i, j, in(i, j, x)); });
    };
    store_matrix<false>(to[0], row, put_in);
    if constexpr (Traits::kInputs == 2) store_matrix<false, 1>(to[1], row, put_in);
    store_matrix<true>(to[Traits::kInputs], row, [&](const auto& staged) {
      each_out(state_, [&](int i, int j, float(&x)[4]) { staged.put(i, j, out(i, j, x)); });
    });
  }

  __device__ __forceinline__ void load_initial() { load_state(problem_.weights, problem_.momentum); }
  __device__ __forceinline__ void load_state(const MatrixView* weights, const MatrixView* speeds) {
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> parked = momentum();
      load_matrices(speeds);
      each_in(state_, [&](int i, int j, float(&x)[4]) { parked.in(i, j) = four(x); });
      each_out(state_, [&](int i, int j, float(&x)[4]) { parked.out(i, j) = four(x); });
    }
    load_matrices(weights);
  }

  // Stores the state before a piece where a checkpoint or, behind the last piece, the result wants it.
  __device__ __forceinline__ void save_state(int piece) {
    const bool last = piece == place_.pieces;
    const bool checkpoint = !last && piece > 0 && piece <= place_.chunks &&
                            piece % int(problem_.checkpoint_interval) == 0 && params_.result.checkpoints[0];
    if (!checkpoint && !(last && params_.result.weights[0])) return;
    const int64_t row = checkpoint ? place_.checkpoint_row(problem_, params_.checkpoints, piece) : final_row();
    const auto held = [](int, int, const float(&x)[4]) { return four(x); };
    store_matrices(checkpoint ? params_.result.checkpoints : params_.result.weights, row, held, held);
    if constexpr (Traits::kMomentum) {
      const ParkedState<Traits> parked = momentum();
      store_matrices(
          checkpoint ? params_.result.checkpoints + kMaxWeights : params_.result.momentum, row,
          [&](int i, int j, const float(&)[4]) { return parked.in(i, j); },
          [&](int i, int j, const float(&)[4]) { return parked.out(i, j); });
    }
  }

  // ---- coefficients -------------------------------------------------------------------------------------------------

  __device__ __forceinline__ const float* of_tokens(const void* steps, int piece) const {
    return static_cast<const float*>(steps) + place_.coefficient_row(problem_, piece) * problem_.chunk_size;
  }
  __device__ __forceinline__ float of_chunk(const void* coefficients, int piece, float absent) const {
    return coefficients ? static_cast<const float*>(coefficients)[place_.coefficient_row(problem_, piece)] : absent;
  }

  const ForwardParams& params_;
  const ScanProblem& problem_;
  char* const shared_;
  const Place& place_;  // in shared memory: registers are for the state
  const ScanSum<Traits> sum_;
  unsigned thread_ = threadIdx.x;  // of the block; see begin_phase
  int sums_ = 0;  // formed so far
  ScanState<Traits> state_;
};

}  // namespace hope::cuda
