// One token of every sequence through all levels of a Continuum Memory System, in one launch. Plain C++: no CUDA header is
// needed to call it. What is computed: hope_kernels/layers/level.py, `MemoryLevel.step` and `PlainLevel`.
#pragma once

#include "../memory.h"

namespace hope::cuda {

constexpr int kMaxStepLevels = 16;     // they travel as a kernel's parameters
constexpr int64_t kMaxStepBatch = 256;
constexpr int64_t kMaxStepDim = 128;   // features of a head

// One level: a memory per sequence and head, or (chunk_size 0) one network over the full width that is never written.
// B sequences, N heads, D features of a head, H hidden units, C = chunk_size. Everything is contiguous and aligned to 16
// bytes; parameters, keys and targets have the problem's dtype, the rest is float32.
struct StepLevel {
  Form form;
  Activation activation;
  int64_t chunk_size;
  int64_t segment;  // 0, or: after so many tokens the memory starts again from `initial`; a multiple of the chunk size
  int64_t hidden;   // H of a head; of the full width where the level is never written; 0 for linear
  float step_bound;

  // Parameters: [N, in, out] ([in, out] where never written), [N D, N D], [gates N, N D], [gates N] in the order step,
  // retention, momentum.
  const void* initial[kMaxWeights];
  const void *target, *gate_weight, *gate_bias;

  // State, updated in place: [B, N, in, out], [B, C, N, D], [B, C, N]; null where the level has none.
  float *weights[kMaxWeights], *momentum[kMaxWeights];
  void *k, *v;
  float *lr, *retention, *momentum_gate;
  float* predictions;  // [B, C, N, D]: f(k) of the tokens kept, unrounded
};

struct StepProblem {
  DType dtype;  // of tokens, outputs and parameters: float32, bfloat16 or float16
  int32_t independent;  // levels: all read `x` and are mixed, or each reads the one before
  int32_t split;  // whether a sequence's head is shared by several blocks: for few of them. Results have the same bits.
  int64_t batch, heads, dim, level_count;
  StepLevel levels[kMaxStepLevels];
  const void* mix;      // independent: [levels], before the softmax
  const void* x;        // [B, N D], rows `x_row` elements apart
  int64_t x_row;
  void* output;         // [B, N D]
  int64_t* positions;   // [B]: tokens each sequence has seen; read and moved on by the kernel
};

// Ok, or why the kernel does not compute this. Looks at everything but x and output.
Status check_step(const StepProblem& problem);

// Bytes of shared memory that one block takes.
int64_t step_shared_memory(const StepProblem& problem);

// Bytes of device memory a step needs; nothing in it need survive between calls.
int64_t step_workspace(const StepProblem& problem);

// Starts the step on `stream` (a cudaStream_t) of `device`. All pointers are device pointers. Which levels are due is
// decided on the device, so that one captured graph serves every token.
Status step(const StepProblem& problem, void* workspace, int64_t workspace_bytes, int device, void* stream);

}  // namespace hope::cuda
