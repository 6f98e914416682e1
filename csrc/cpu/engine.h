// The CPU engine's entry points, and the table each instruction set's build of the kernels provides.
#pragma once

#include "../level_update.h"
#include "../memory.h"

namespace hope::cpu {

// What one build of the kernels offers.
struct Variant {
  const char* name;
  Status (*scan_forward)(const ScanProblem&, const ForwardResult&);
  Status (*scan_backward)(const ScanProblem&, const BackwardResult&);
  // `sums` (one for each piece) and `scales` (one for each level) are scratch.
  void (*level_update)(const LevelUpdateProblem&, float* sums, float* scales, int threads);
  // Runs `rounds` rounds of independent multiply-adds held in registers; returns the floating point operations done.
  double (*multiply_add)(int64_t rounds, float* sink);
};

// Checks the problem, then runs it on the chosen variant.
Status scan_forward(const ScanProblem& problem, const ForwardResult& result);
Status scan_backward(const ScanProblem& problem, const BackwardResult& result);
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
