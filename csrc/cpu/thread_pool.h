// The threads of the CPU engine. A call names how many threads it may use; pieces are handed out dynamically, so nothing
// computed may depend on which thread takes which piece.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hope::cpu {

using PieceFunction = void (*)(void* context, int64_t piece);

// Runs function(context, i) for every i in [0, pieces) on at most `threads` threads, the caller's included, and returns when
// all are done. While another thread's call holds the workers, or from inside a piece, the caller runs its pieces alone.
void parallel_for(int threads, int64_t pieces, PieceFunction function, void* context);

// Scratch memory of the calling thread, aligned to 64 bytes and kept for the next call; nullptr when it cannot be had.
void* thread_scratch(size_t bytes);
// Hands the calling thread's scratch back to the system if it is too large to keep.
void trim_thread_scratch();

}  // namespace hope::cpu
