// Where the tokens and the chunks of one (sequence, head) lie.
#pragma once

#include <cuda_runtime.h>

#include "memory.h"

namespace hope::cuda {

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct Place {
  Sequence seq;
  int64_t sequence, head, end;  // end: number of tokens, pending ones counted
  int chunks;                   // complete ones, which are written
  int pieces;                   // these and the pieces of what follows them and is only read

  // Element offset of token j (pending tokens counted) among the new, or the pending, tokens.
  __device__ __forceinline__ int64_t fresh(const TokenView& view, int64_t j) const {
    return seq.row * view.row + (seq.start + j - seq.pending) * view.token + head * view.head;
  }
  __device__ __forceinline__ int64_t pending(const TokenView& view, int64_t j) const {
    return sequence * view.row + j * view.token + head * view.head;
  }

  // Row of a chunk's coefficients.
  __device__ __forceinline__ int64_t coefficient_row(const ScanProblem& problem, int chunk) const {
    return (seq.chunk_row + chunk) * problem.heads + head;
  }
  // Row of the state at the start of a chunk that is a multiple of the interval; `each`: checkpoints of one sequence.
  __device__ __forceinline__ int64_t checkpoint_row(const ScanProblem& problem, int64_t each, int chunk) const {
    const int interval = int(problem.checkpoint_interval);
    const int64_t first = problem.sequences ? seq.chunk_row / interval : sequence * each;
    return (first + chunk / interval - 1) * problem.heads + head;
  }
};

// `span`: tokens of a piece, the chunk size where there are chunks.
__device__ __forceinline__ Place place_of(const ScanProblem& problem, int64_t task, int64_t span) {
  Place place;
  place.sequence = task / problem.heads;
  place.head = task % problem.heads;
  Sequence& seq = place.seq;
  if (problem.sequences) {
    // Values are the caller's: keep every access inside the tensors whatever they are.
    seq = problem.sequences[place.sequence];
    seq.row = clamped(seq.row, 0, problem.batch - 1);
    seq.start = clamped(seq.start, 0, problem.tokens);
    seq.length = clamped(seq.length, 0, problem.tokens - seq.start);
    seq.pending = clamped(seq.pending, 0, problem.pending_capacity);
    seq.chunk_row = clamped(seq.chunk_row, 0, problem.chunks);
  } else {
    const int64_t s = place.sequence;
    seq = Sequence{s, 0, problem.tokens, problem.pending_capacity, s * problem.chunks, problem.first_chunk};
  }
  place.end = seq.pending + seq.length;
  const int64_t room = problem.sequences ? problem.chunks - seq.chunk_row : problem.chunks;
  const int64_t chunks = problem.k.data ? min(place.end / span, room) : 0, written = chunks * span;
  const bool tail = problem.q.data && max(written, seq.pending) < place.end;  // queries follow the last chunk
  place.chunks = int(chunks);
  place.pieces = int(chunks + (tail ? (place.end - written + span - 1) / span : 0));
  return place;
}

}  // namespace hope::cuda
