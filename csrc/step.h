// What an engine is handed for one token of every sequence through all levels of a Continuum Memory System. What is computed:
// hope_kernels/layers/level.py, `MemoryLevel.step` and `PlainLevel`.
#pragma once

#include "memory.h"

namespace hope {

constexpr int kMaxStepLevels = 16;  // they travel as a kernel's parameters

// One level: a memory per sequence and head, or (chunk_size 0) one network over the full width that is never written.
// B sequences, N heads, D features of a head, H hidden units, C = chunk_size. Everything is contiguous and aligned to 16
// bytes; parameters, keys and targets have the problem's dtype, the rest the state dtype: float, or double for float64.
struct StepLevel {
  Form form;
  Activation activation;
  Rule rule;
  int64_t chunk_size;
  int64_t segment;  // 0, or: after so many tokens the memory starts again from `initial`; a multiple of the chunk size
  int64_t hidden;   // H of a head; of the full width where the level is never written; 0 for linear
  double step_bound;

  // Parameters: [N, in, out] ([in, out] where never written), [N D, N D], [gates N, N D], [gates N] in the order step,
  // retention, momentum.
  const void* initial[kMaxWeights];
  const void *target, *gate_weight, *gate_bias;

  // State, updated in place: [B, N, in, out], [B, C, N, D], [B, C, N]; null where the level has none.
  float *weights[kMaxWeights], *momentum[kMaxWeights];
  void *k, *v;
  float *lr, *retention, *momentum_gate;
  float* predictions;  // [B, C, N, D]: f(k) of the tokens kept, unrounded; the CPU engine needs none
};

struct StepProblem {
  DType dtype;  // of tokens, outputs and parameters
  int32_t independent;  // levels: all read `x` and are mixed, or each reads the one before
  int32_t split;  // CUDA: whether a sequence's head is shared by several blocks: for few of them. Results have the same bits.
  int64_t batch, heads, dim, level_count;
  StepLevel levels[kMaxStepLevels];
  const void* mix;      // independent: [levels], before the softmax
  const void* x;        // [B, N D], rows `x_row` elements apart
  int64_t x_row;
  void* output;         // [B, N D]
  int64_t* positions;   // [B]: tokens each sequence has seen; read and moved on by the engine
};

// Whether the description of a step is consistent in itself: what every engine refuses before it looks at what it can run.
// `x` and `output` are not looked at.
inline Status check_step_problem(const StepProblem& p) {
  const auto invalid = [](const char* message) { return Status{StatusCode::invalid_argument, message}; };
  if (p.level_count < 1 || p.level_count > kMaxStepLevels) return {StatusCode::unsupported, "it takes 1 to 16 levels"};
  if (p.batch < 0) return invalid("the batch size must not be negative");
  if (p.heads < 1 || p.dim < 1) return invalid("heads and features must be positive");
  if (p.batch > 0 && !p.positions) return invalid("positions are missing");
  if (p.independent && !p.mix) return invalid("the shares of independent levels are missing");
  for (int64_t l = 0; l < p.level_count; ++l) {
    const StepLevel& level = p.levels[l];
    if (level.form != Form::linear && level.hidden < 1) return invalid("hidden must be positive");
    if (level.chunk_size < 0 || (level.chunk_size == 0 && l + 1 < p.level_count))
      return invalid("only the last level may be one that is never written");
    if (level.segment < 0 || (level.chunk_size > 0 && level.segment % level.chunk_size != 0))
      return invalid("a segment must be a multiple of the chunk size");
    for (int i = 0; i < weight_count(level.form); ++i)
      if (!level.initial[i]) return invalid("a parameter is missing");
    if (level.chunk_size == 0) continue;
    if (!level.target || !level.gate_weight || !level.gate_bias) return invalid("a parameter is missing");
    if (p.batch == 0) continue;
    if (!level.k || !level.v || !level.lr) return invalid("a part of the state is missing");
    for (int i = 0; i < weight_count(level.form); ++i)
      if (!level.weights[i] || !level.momentum[i] != !level.momentum_gate) return invalid("a part of the state is missing");
  }
  return {};
}

}  // namespace hope
