// What every compiled backend is handed: one plain-data description of a chunked memory scan, its results and its status.
// Raw pointers, sizes and element strides only, so that no backend depends on a tensor library.
//
// A *task* is one (sequence, head) pair: a small network with its own weights that is read by every token and written once
// per complete chunk. Token j of a sequence counts its pending tokens first, then its new ones; local chunk c holds tokens
// cC .. cC+C-1 and is written only if all of them are there.
#pragma once

#include <cstdint>

namespace hope {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Form : int32_t { linear = 0, mlp = 1, glu = 2 };
enum class Activation : int32_t { gelu_tanh = 0, gelu = 1, silu = 2, relu2 = 3 };
enum class Objective : int32_t { l2 = 0, dot = 1, error = 2, self = 3 };
enum class Rule : int32_t { gd = 0, dgd = 1 };

constexpr int kMaxWeights = 3;

// Tokens [rows, tokens, heads, dim]: element strides of the first three dimensions (0 allowed for what is only read), the
// last dimension is contiguous. `data == nullptr` means absent.
struct TokenView {
  void* data = nullptr;
  int64_t row = 0, token = 0, head = 0;
};

// Matrices [sequences, heads, in, out] with element strides for all four dimensions (sequence stride 0: shared by all).
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t sequence = 0, head = 0, in = 0, out = 0;
};

// One row of the optional sequence table, int64 each.
struct Sequence {
  int64_t row;          // batch row its new tokens lie in
  int64_t start;        // first new token in that row
  int64_t length;       // number of new tokens
  int64_t pending;      // number of pending tokens in front of them
  int64_t chunk_row;    // first row of its chunks in the coefficient arrays
  int64_t first_chunk;  // index, from the start of the stream, of its local chunk 0
};

struct ScanProblem {
  // Vocabulary of the memory.
  Form form;
  Activation activation;
  Objective objective;
  Rule rule;
  int32_t residual;
  DType dtype;  // of tokens and outputs; the state is float64 for float64 and float32 otherwise

  // Sizes.
  int64_t batch, tokens, heads, dim, hidden;
  int64_t sequence_count;    // S
  int64_t pending_capacity;  // P
  int64_t chunk_size;        // C
  int64_t chunks;            // uniform: complete chunks of each sequence; with a table: total chunk rows
  int64_t first_chunk;       // uniform only
  int64_t bptt_chunks;       // 0: the adjoint of the state is never cut
  int64_t checkpoint_interval;
  int32_t threads;

  TokenView q, k, v, pending_k, pending_v;
  // Coefficients in the state dtype, contiguous: per token [M, heads, C], per chunk [M, heads], M the number of chunk rows.
  const void *step, *retention, *decay, *momentum_step, *momentum_carry, *momentum_decay;
  MatrixView weights[kMaxWeights];
  MatrixView momentum[kMaxWeights];  // absent with momentum coefficients present: zeros
  const Sequence* sequences;         // nullptr: sequence s is batch row s
};

// What the forward leaves for the backward of the last segment, so that nothing of it is rebuilt: `bytes` for each task,
// whose layout is the engine's own. Uniform problems only; null where not wanted.
struct SegmentMemory {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Results of a forward scan. Weights, momentum [S, heads, in, out] and checkpoints [rows, heads, in, out] are contiguous, in
// the state dtype; null where not wanted. Checkpoint row s * checkpoints_per_sequence + j - 1 (with a table: chunk_row /
// interval + j - 1) holds the state at the start of local chunk j * interval, j >= 1, if anything is computed with it.
struct ForwardResult {
  TokenView output;
  void* weights[kMaxWeights];
  void* momentum[kMaxWeights];
  void* checkpoints[2 * kMaxWeights];  // weights first, then momentum (at kMaxWeights)
  SegmentMemory segment;
};

// Upstream gradients and results of a backward scan; null where absent or not wanted.
struct BackwardResult {
  const void* checkpoints[2 * kMaxWeights];
  SegmentMemory segment;
  TokenView grad_output;
  MatrixView grad_weights[kMaxWeights], grad_momentum[kMaxWeights];

  TokenView q, k, v, pending_k, pending_v;
  void *step, *retention, *decay, *momentum_step, *momentum_carry, *momentum_decay;
  void* weights[kMaxWeights];
  void* momentum[kMaxWeights];
};

enum class StatusCode : int32_t { ok = 0, invalid_argument = 1, out_of_memory = 2, unsupported = 3, device_error = 4 };

struct Status {
  StatusCode code = StatusCode::ok;
  const char* message = "";  // static text, or the thread's until its next call
};

// Uniform problems: checkpoints of one sequence.
inline int64_t checkpoints_per_sequence(const ScanProblem& problem) {
  const int64_t tokens = problem.pending_capacity + problem.tokens;
  return tokens > 0 ? (tokens - 1) / problem.chunk_size / problem.checkpoint_interval : 0;
}

inline int weight_count(Form form) { return form == Form::linear ? 1 : form == Form::mlp ? 2 : 3; }

}  // namespace hope
