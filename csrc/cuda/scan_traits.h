// Compile-time plan of the resident scan: who holds which part of the state, and where the chunk lies in shared memory.
#pragma once

#include <cstdint>

#include "memory.h"

namespace hope::cuda {

constexpr int kWarp = 32;
constexpr int kSlice = 16;  // tokens of one tensor-core tile: chunks are walked in slices of this many

// One block holds one (sequence, head). Warp w owns hidden units w * kUnits .. and keeps their columns of W_in and rows of
// W_out in registers, both transposed (W_in^T [units, D], W_out^T [D, units]): packed to 16 bits, an accumulator of X^T is
// the B fragment of X. A glu's two input matrices are one W_in^T [2 units, D] whose rows change between them by eights: a
// tile of 16 rows holds the gates of eight units and, below, what they gate.
template <DType kType_, int kDim_, int kHidden_, bool kMomentum_, Form kForm_ = Form::mlp>
struct ScanTraits {
  static constexpr DType kType = kType_;
  static constexpr int kDim = kDim_, kHidden = kHidden_;
  static constexpr bool kMomentum = kMomentum_;
  static constexpr Form kForm = kForm_;
  static constexpr int kInputs = kForm == Form::glu ? 2 : 1;  // matrices that take tokens
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kUnits = kHidden / kWarps;
  static constexpr int kUnitTiles = kUnits / 8, kDimTiles = kDim / 8;
  static constexpr int kInTiles = kInputs * kUnitTiles;  // of W_in^T, 8 rows each; kInputs neighbours for a tile of units
  static constexpr int kStateRegisters = (kInputs + 1) * kDim * kHidden / kThreads;

  // Rows of tokens in shared memory: eight rows, 16 bytes of each, fall into all 32 banks once.
  static constexpr int kPitch = kDim + 8;
  // Registers a thread keeps of one slice of keys, packed, in units of 16 bytes: hidden values, then what the errors of the
  // hidden values are multiplied by to become those of W_in.
  static constexpr int kKeptHidden = (kUnitTiles + 1) / 2, kKept = kKeptHidden + kInTiles / 2;

  static_assert(kType == DType::bfloat16 || kType == DType::float16, "tensor cores multiply 16-bit numbers");
  static_assert(kDim % 16 == 0, "a product over D takes 16 of its values at once");
  static_assert(kForm != Form::linear, "the state is spread over hidden units");
  static_assert(kInputs * kUnits % 16 == 0, "a warp's rows of W_in^T are those of 16x16 tiles");
  static_assert(kPitch * 2 % 16 == 0 && kPitch * 2 / 16 % 2 == 1,
                "a row starts at a multiple of 16 bytes, and an odd multiple keeps eight rows in different banks");
  static_assert(kDim * kHidden * 4 <= 2 * kWarps * kDimTiles * kWarp * 16,
                "one matrix is staged in the shared memory of the partial sums");
  static_assert(kStateRegisters <= 128, "the state, its products and their operands share 255 registers of a thread");
};

// Shared memory of one block: where its parts start, in bytes.
struct ScanLayout {
  int partial = 0, partial_bytes = 0;  // two sets of partial sums: a set is rewritten only after the next one's barrier
  int kept = 0;                        // what threads keep of the chunk's keys
  int tokens = 0, tensor_bytes = 0;    // tensors of tokens in shared memory
  int stage_bytes = 0;
  int bytes = 0;
};

// `rows`: tokens of a chunk in whole slices.
template <class Traits>
ScanLayout scan_layout(int rows, int stages, bool writes, bool reads) {
  ScanLayout layout;
  layout.partial = 0;
  layout.partial_bytes = Traits::kWarps * Traits::kDimTiles * kWarp * 16;
  layout.kept = layout.partial + 2 * layout.partial_bytes;
  layout.tokens = layout.kept + (writes ? rows / kSlice * Traits::kKept * Traits::kThreads * 16 : 0);
  layout.tensor_bytes = rows * Traits::kPitch * 2;
  layout.stage_bytes = layout.tensor_bytes * ((writes ? 2 : 0) + (reads ? 1 : 0));
  layout.bytes = layout.tokens + stages * layout.stage_bytes;
  return layout;
}

}  // namespace hope::cuda
