// What the factored plan's kernels are handed: one call of one chunk, for memories that all start from the same weights and
// keep what each sequence wrote as pairs (docs/factored.md). Raw pointers, as in memory.h.
//
// A layer of a sequence and head computes  gamma x W - (a . (x U^T)) E  from the shared weights W, the inputs U and the errors
// E of the pairs, their weights a and the product of all retention, gamma. Every matrix is in the state dtype, contiguous
// rows; sizes of rows are multiples of kFactoredMultiple, so that kernels read and write whole vectors where the matrix lies.
#pragma once

#include "memory.h"

namespace hope {

constexpr int64_t kFactoredMultiple = 16;
constexpr int kMaxInputs = 2;  // distinct inputs of layers: the keys and the hidden features

// Pairs that were written together, `count` of each sequence and head.
struct PairBlock {
  int64_t count;
  int64_t stride;         // pairs between those of one sequence and head and the next: `count`, or more of a larger tensor
  int64_t turned_stride;  // elements between rows of transposed matrices, the count rounded up
  // [B, heads, count, features] of contiguous [B, heads, stride, features].
  const void *inputs[kMaxInputs], *errors[kMaxWeights];
  // [B, heads, features, turned_stride]; null where a call has no use for them.
  const void *turned_inputs[kMaxInputs], *turned_errors[kMaxWeights];
  // Gradients, contiguous; null where not wanted. Backward only.
  void *grad_inputs[kMaxInputs], *grad_errors[kMaxWeights];
};

// Tokens that read the weights as they are and, if `writes`, become pairs.
struct FactoredChunk {
  Form form;
  Activation activation;
  Objective objective;
  int32_t residual;
  DType dtype;  // float32 or float64, of everything
  int32_t writes, threads;
  int64_t batch, rows, heads, dim, hidden;
  TokenView x, target;  // keys (or queries) [B, rows, heads, D] and, if they are written, values
  const void* weights[kMaxWeights];         // [heads, in, out]
  const void* turned_weights[kMaxWeights];  // [heads, out, in]: the last one to write, all for the backward
  const void *scale, *decay;                // a [B, heads, pairs of all blocks], gamma [B, heads] or null for 1
  const PairBlock* blocks;
  int64_t block_count;
  // What the forward leaves for the backward, `kept_bytes` for each sequence and head; null where none is to come.
  void* kept;
  int64_t kept_bytes;
};

// The chunk's own pairs lie in [B, heads, stride, features], like those of a block.
struct FactoredResult {
  TokenView output;
  int64_t stride;
  void* hidden;               // inputs of the last layer; the pairs' other inputs are the keys
  void* errors[kMaxWeights];
};

// Upstream gradients (contiguous [B, heads, rows, features]; null where there are none) and results. Those of scale and decay
// are added to.
struct FactoredGradients {
  TokenView grad_output;
  const void* grad_hidden;
  const void* grad_errors[kMaxWeights];

  TokenView x, target;
  void* weights[kMaxWeights];  // [heads, in, out]
  void *scale, *decay;
};

}  // namespace hope
