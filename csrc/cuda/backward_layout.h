// Where the backward scan keeps things: its shared memory, its workspace in global memory, and what its kernel is told.
#pragma once

#include "forward_scan.h"
#include "scan_delta_adjoint.h"

namespace hope::cuda {

// Tensors of tokens in shared memory. Results take the place of what is not needed any more.
enum BackwardTensor : int {
  kChunkKeys = 0,
  kDelta = 1,     // values, then the errors of the keys, then the gradient of the keys
  kDDelta = 2,    // the gradient of the errors
  kTargets = 3,   // `self`: the values, then their gradient; otherwise kDelta
  kRead = 4,      // queries, then their gradient
  kUpstream = 5,  // the gradient of the output
  kProducts = 6,   // dgd: products with W_out, then the gradient of what the memory makes of the keys
  kCorrected = 7,  // dgd: the corrected errors of the output layer
  kBackwardTensors = 8
};

// What a thread keeps of a slice of keys: the errors of the products with W_in (dgd: the corrected ones), the adjoint of the
// errors of the hidden units, and the adjoint of the products; of dgd also the hidden values and the adjoint of the errors.
// In units of 16 bytes, two tiles of a slice and eight units: where each begins.
template <class Traits>
struct KeptParts {
  static constexpr int kErrors = 0, kDPassed = Traits::kInTiles / 2, kDInputs = kDPassed + Traits::kUnitTiles / 2,
                       kHidden = kDInputs + Traits::kInTiles / 2, kDErrors = kHidden + Traits::kUnitTiles / 2,
                       kCount = Traits::kDelta ? kDErrors + Traits::kInTiles / 2 : kHidden;
};

// Shared memory of one block while chunks are walked back: where its parts start, in bytes.
struct BackwardLayout {
  int weights = 0;  // 16-bit W_in^T and W_out of the chunk, rows of kPitch; W_in^T in the order of the state's tiles
  int partial = 0, partial_bytes = 0, partials = 0;  // one or two sets of partial sums
  int rows = 0;   // gradients of step and momentum step (dgd: through a write's weights and `before`), by warps: [2][warp][row]
  int steps = 0;  // weights of tokens in the write of state and momentum (dgd: of W_in and W_out): [2][row]
  int scalars = 0;  // of decay, carry and the momentum's decay: [3][warp]
  int tensors[kBackwardTensors] = {};
  int kept = -1;  // what threads keep of the chunk's keys; negative: in the workspace
  int bytes = 0;
  DeltaLayout delta;  // last: before the others it made the largest memory written by gd spill
};

// What the threads of a block keep of a chunk.
template <class Traits>
int64_t kept_bytes(int rows) {
  return int64_t(rows) / kSlice * KeptParts<Traits>::kCount * 16 * Traits::kThreads;
}

// Numbers of the matrices of a state, or of a block's share of them.
template <class Traits>
constexpr int kStateSize = (Traits::kInputs + 1) * Traits::kHidden * Traits::kDim;

template <class Traits>
BackwardLayout backward_layout(int rows, bool writes, bool reads, bool self, int blocks, int partials, bool kept_shared) {
  BackwardLayout layout;
  layout.weights = block_sum_bytes<Traits>(blocks);
  layout.partial = layout.weights + (Traits::kInputs + 1) * Traits::kHidden * Traits::kPitch * 2;
  layout.partials = partials;
  layout.partial_bytes = Traits::kWarps * Traits::kSumBytes;
  layout.rows = layout.partial + partials * layout.partial_bytes;
  const int gates = writes ? (Traits::kMomentum || Traits::kDelta ? 2 : 1) * rows * 4 : 0;
  layout.steps = layout.rows + Traits::kWarps * gates;
  layout.scalars = layout.steps + gates;
  int end = layout.scalars + (writes ? 3 * Traits::kWarps * 4 : 0);
  end = (end + 15) / 16 * 16;
  const bool delta = Traits::kDelta && writes;
  if (delta) {
    layout.delta.gradients = end;
    end = lay_out_delta<Traits>(layout.delta, end + DeltaRuleAdjoint<Traits>::kGradients * rows * 4, rows);
  }
  const bool present[kBackwardTensors] = {writes, writes, writes, writes && self, reads, reads, delta, delta};
  for (int t = 0; t < kBackwardTensors; ++t) {
    layout.tensors[t] = present[t] ? end : 0;
    if (present[t]) end += rows * Traits::kPitch * 2;
  }
  if (!present[kTargets]) layout.tensors[kTargets] = layout.tensors[kDelta];
  layout.delta.corrected = layout.tensors[kCorrected];
  if (writes && kept_shared) {
    layout.kept = end;
    end += int(kept_bytes<Traits>(rows));
  }
  layout.bytes = end;
  return layout;
}

// Memory for 16-bit numbers of a state in the order of the registers, rounded: {x[0], x[1]} and {x[2], x[3]} of each tile.
// A thread sees only its own numbers.
template <class Traits>
class PackedState {
 public:
  static constexpr int64_t kBytes = ParkedState<Traits>::kBytes / 2;

  // `which`: of the states that lie one behind the other.
  __device__ __forceinline__ PackedState(void* workspace, int64_t which)
      : own_(static_cast<uint2*>(workspace) + which * ParkedState<Traits>::kTiles * Traits::kThreads + threadIdx.x) {}

  __device__ __forceinline__ uint2& in(int i, int j) const { return own_[(i * Traits::kDimTiles + j) * Traits::kThreads]; }
  __device__ __forceinline__ uint2& out(int i, int j) const {
    return own_[(ParkedState<Traits>::kInTiles + i * Traits::kUnitTiles + j) * Traits::kThreads];
  }

 private:
  uint2* own_;
};

// Parts of the workspace, each for all blocks; null where not needed.
struct BackwardWorkspace {
  void* adjoint = nullptr;           // ParkedState: while states are rebuilt
  void* slots = nullptr;  // 16-bit W_in^T and W_out, rows of kDim, at the start of each chunk of a segment
  void* remainders = nullptr;        // PackedState: what rounding took from each slot, for the gradient of the decay
  void* kept = nullptr;              // what threads keep of a chunk's keys
  void* momentum = nullptr;          // ParkedState: while states are rebuilt
  void* momentum_slots = nullptr;    // ParkedState: at the start of each chunk of a segment
  void* momentum_adjoint = nullptr;  // ParkedState
  void* momentum_operand = nullptr;  // PackedState: the adjoint as products take it
};

// Tokens in global memory, and where they are while their piece is walked back.
struct TokenTensor {
  TokenView fresh, pending;
  BackwardTensor place;
};

struct BackwardParams {
  TokenTensor inputs[4];     // keys, values, queries, the gradient of outputs
  TokenTensor gradients[3];  // of keys, values, queries
  ForwardParams rebuild;  // of the same problem without queries
  ScanProblem problem;    // without queries where their outputs have no gradient
  BackwardResult result;
  BackwardLayout layout;
  BackwardWorkspace workspace;
  int slots;           // states a block has room for
  int64_t kept_bytes;  // of one block
};

}  // namespace hope::cuda
