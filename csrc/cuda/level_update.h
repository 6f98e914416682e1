// The update of many tensors of many levels in one launch. Plain C++: no CUDA header is needed to call it.
#pragma once

#include "../level_update.h"

namespace hope::cuda {

// Bytes of device memory that an update of so many tensors, levels and pieces needs: the tables, and a sum for each piece.
// Nothing in it need survive between calls.
int64_t level_update_workspace(int64_t tensors, int64_t levels, int64_t pieces);

// Starts the update on `stream` (a cudaStream_t) of `device`. Pointers in the tables and `norms` are device pointers; the
// tables themselves lie in host memory and may be freed when the call returns.
Status level_update(const LevelUpdateProblem& problem, void* workspace, int64_t workspace_bytes, int device, void* stream);

}  // namespace hope::cuda
