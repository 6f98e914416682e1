// The CPU engine's entry points, and the table each instruction set's build of the kernels provides.
#pragma once

#include "../factored.h"
#include "../level_update.h"
#include "../memory.h"
#include "../step.h"

namespace hope::cpu {

// What one build of the kernels offers.
struct Variant {
  const char* name;
  Status (*scan_forward)(const ScanProblem&, const ForwardResult&);
  Status (*scan_backward)(const ScanProblem&, const BackwardResult&);
  int64_t (*factored_kept_bytes)(const FactoredChunk&);
  Status (*factored_forward)(const FactoredChunk&, const FactoredResult&);
  Status (*factored_backward)(const FactoredChunk&, const FactoredGradients&);
  // See the function of this name below.
  void (*transpose_matrices)(const MatrixView& from, int64_t matrices, int64_t rows, int64_t columns, void* to,
                             int64_t stride, int threads);
  int64_t (*step_workspace)(const StepProblem&);
  Status (*step)(const StepProblem&, void* workspace, int threads);
  // `sums` (one for each piece) and `scales` (one for each level) are scratch.
  void (*level_update)(const LevelUpdateProblem&, float* sums, float* scales, int threads);
  // Runs `rounds` rounds of independent multiply-adds held in registers; returns the floating point operations done.
  double (*multiply_add)(int64_t rounds, float* sink);
};

// Checks the problem, then runs it on the chosen variant.
Status scan_forward(const ScanProblem& problem, const ForwardResult& result);
Status scan_backward(const ScanProblem& problem, const BackwardResult& result);
// Of `chunk.kept`, for each sequence and head; 0 for a chunk that the kernels do not take.
int64_t factored_kept_bytes(const FactoredChunk& chunk);
Status factored_forward(const FactoredChunk& chunk, const FactoredResult& result);
Status factored_backward(const FactoredChunk& chunk, const FactoredGradients& gradients);
// Matrices [rows, columns] of `from` (`head` elements apart, rows `in` apart) into contiguous ones [columns, stride], of which
// `rows` elements of a row are written; columns and stride are multiples of kFactoredMultiple. For what the chunks above read
// transposed.
Status transpose_matrices(const MatrixView& from, int64_t matrices, int64_t rows, int64_t columns, void* to, int64_t stride,
                          int threads);
// Bytes a step needs; nothing in it need survive between calls. 0 for a problem that check_step_problem refuses.
int64_t step_workspace(const StepProblem& problem);
// One token of every sequence through all levels, all pointers to memory of this process.
Status step(const StepProblem& problem, void* workspace, int64_t workspace_bytes, int threads);
Status level_update(const LevelUpdateProblem& problem, int threads);

// The variant in use: the newest the processor has, or the one HOPE_KERNELS_CPU_ISA names (read at first use).
// nullptr, with a message in `problem`, when that names one this processor or build lacks.
const Variant* variant(const char** problem = nullptr);

// Names of the variants this processor can run, newest first; at most `capacity` are written. Returns how many.
int usable_variants(const char** names, int capacity);

// Floating point operations per second of fused multiply-adds held in registers, on `threads` threads.
double fma_peak(int threads);
// Bytes per second (read plus written) of a copy too large for the caches, on `threads` threads.
double copy_bandwidth(int threads);

}  // namespace hope::cpu
