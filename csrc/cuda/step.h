// A step through all levels of a Continuum Memory System in one launch. Plain C++: no CUDA header is needed to call it.
#pragma once

#include "../step.h"

namespace hope::cuda {

constexpr int64_t kMaxStepBatch = 256;
constexpr int64_t kMaxStepDim = 128;   // features of a head

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
