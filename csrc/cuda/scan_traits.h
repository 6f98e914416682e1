// Compile-time plan of the resident scan: who holds which part of the state, and where the chunk lies in shared memory.
#pragma once

#include <cstdint>

#include "memory.h"

namespace hope::cuda {

constexpr int kWarp = 32;
constexpr int kMaxBlocks = 8;  // of a cluster, on every device that has clusters
constexpr int kSlice = 16;  // tokens of one tensor-core tile: chunks are walked in slices of this many

// One block holds one (sequence, head), or the blocks of a cluster (kCluster) hold kHidden units of it each. Warp w of a
// block owns units w * kUnits .. and keeps their columns of W_in and rows of W_out in registers, both transposed
// (W_in^T [units, D], W_out^T [D, units]): packed to 16 bits, an accumulator of X^T is the B fragment of X. A glu has its two
// input matrices in one W_in^T [2 units, D] whose rows change between them by eights: a tile of 16 rows holds the gates of
// eight units and, below, what they gate.
template <DType kType_, int kDim_, int kHidden_, bool kMomentum_, Form kForm_ = Form::mlp, bool kCluster_ = false,
          Rule kRule_ = Rule::gd>
struct ScanTraits {
  static constexpr DType kType = kType_;
  static constexpr int kDim = kDim_, kHidden = kHidden_;
  static constexpr bool kMomentum = kMomentum_;
  static constexpr Form kForm = kForm_;
  static constexpr bool kCluster = kCluster_;  // also where a launch has one block to a cluster
  static constexpr bool kDelta = kRule_ == Rule::dgd;
  static constexpr int kInputs = kForm == Form::glu ? 2 : 1;  // matrices that take tokens
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kUnits = kHidden / kWarps;
  static constexpr int kUnitTiles = kUnits / 8, kDimTiles = kDim / 8;
  static constexpr int kInTiles = kInputs * kUnitTiles;  // of W_in^T, 8 rows each; kInputs neighbours for a tile of units
  // Tiles of D that are summed over the hidden units at once: the warps' parts of more would take too much shared memory.
  static constexpr int kSumTiles = kDimTiles < 8 ? kDimTiles : 8, kSums = kDimTiles / kSumTiles;
  static constexpr int kSumBytes = kSumTiles * kWarp * 16;  // a part of such a sum
  // Whether there are always two sums one after the other: then all work begins with the first set of what is there twice.
  static constexpr bool kSumsInPairs = kSums % 2 == 0 && !kDelta;
  static constexpr int kStateRegisters = (kInputs + 1) * kDim * kHidden / kThreads;

  // Rows of tokens in shared memory: eight rows, 16 bytes of each, fall into all 32 banks once.
  static constexpr int kPitch = kDim + 8;
  // Registers a thread keeps of one slice of keys, packed, in units of 16 bytes: hidden values, then what the errors of the
  // hidden values are multiplied by to become those of W_in (dgd: what both are made of, the products with W_in).
  static constexpr int kKeptHidden = (kUnitTiles + 1) / 2, kKept = kKeptHidden + kInTiles / 2;

  static_assert(kType == DType::bfloat16 || kType == DType::float16, "tensor cores multiply 16-bit numbers");
  static_assert(kDim % 16 == 0, "a product over D takes 16 of its values at once");
  static_assert(!(kDelta && kMomentum), "dgd has no momentum");
  static_assert(kForm != Form::linear, "the state is spread over hidden units");
  static_assert(kInputs * kUnits % 16 == 0, "a warp's rows of W_in^T are those of 16x16 tiles");
  static_assert(kPitch * 2 % 16 == 0 && kPitch * 2 / 16 % 2 == 1,
                "a row starts at a multiple of 16 bytes, and an odd multiple keeps eight rows in different banks");
  static_assert(kDimTiles % kSumTiles == 0 && (!kCluster || kSumTiles == kMaxBlocks), "blocks share the tiles of a sum");
  static_assert(kDim * kHidden * 4 <= 2 * kWarps * kSumBytes,
                "one matrix is staged in the shared memory of the partial sums");
  static_assert(kStateRegisters <= 128, "the state, its products and their operands share 255 registers of a thread");
};

// Of dgd, in shared memory (scan_delta_rule.h): where its parts start. In the forward the corrected errors lie where the parts
// of sums were, of which the chunk needs no more when they are formed.
struct DeltaLayout {
  int tokens = 0, right = 0, corrected = 0, overlap = 0, solvers = 0;
  int gradients = 0;  // in the backward, see scan_delta_adjoint.h
};

// Lays out all but the corrected errors and the gradients from `start`, a multiple of 16, on; returns the end.
template <class Traits>
constexpr int lay_out_delta(DeltaLayout& layout, int start, int rows) {
  layout.tokens = start;
  layout.right = layout.tokens + (4 * rows + kSlice) * 4;
  layout.overlap = layout.right + rows * Traits::kPitch * 4;
  layout.solvers = layout.overlap + rows * (rows + 8) * 4;
  return layout.solvers + 2 * rows * (rows + 8) * 2;
}

// Shared memory of one block: where its parts start, in bytes.
struct ScanLayout {
  int partial = 0;                     // two sets of the warps' parts of a sum, behind those of block_sum_bytes
  int kept = 0;                        // what threads keep of the chunk's keys
  DeltaLayout delta;
  int tokens = 0, tensor_bytes = 0;    // tensors of tokens in shared memory
  int stage_bytes = 0;
  int bytes = 0;
};

// Two sets of a block's part of a sum over the cluster. They lie in front of all else, forward and backward: between walking
// chunks back and rebuilding their states no block writes where another one still reads a sum.
template <class Traits>
constexpr int block_sum_bytes(int blocks) {
  return blocks > 1 ? 2 * Traits::kSumBytes : 0;
}

// `rows`: tokens of a chunk in whole slices; `blocks` of a cluster.
template <class Traits>
ScanLayout scan_layout(int rows, int stages, bool writes, bool reads, int blocks) {
  ScanLayout layout;
  layout.partial = block_sum_bytes<Traits>(blocks);
  layout.kept = layout.partial + 2 * Traits::kWarps * Traits::kSumBytes;
  layout.tensor_bytes = rows * Traits::kPitch * 2;
  layout.tokens = layout.kept + (writes ? rows / kSlice * Traits::kKept * Traits::kThreads * 16 : 0);
  layout.delta.corrected = layout.partial;
  if (Traits::kDelta && writes) layout.tokens = lay_out_delta<Traits>(layout.delta, layout.tokens, rows);
  layout.stage_bytes = layout.tensor_bytes * ((writes ? 2 : 0) + (reads ? 1 : 0));
  layout.bytes = layout.tokens + stages * layout.stage_bytes;
  return layout;
}

}  // namespace hope::cuda
