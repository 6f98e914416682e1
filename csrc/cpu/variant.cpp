// The kernels for one instruction set: CMake compiles this file once per set, with its flags and its HOPE_ISA.
#include "engine.h"
#include "level_update.h"
#include "scan.h"

namespace hope::cpu::HOPE_ISA {
namespace {

template <class T>
Status forward(const ScanProblem& problem, const ForwardResult& result) {
  return run_tasks<T>(problem, false, result.segment, [&](Task<T>& task) { task.forward(result); });
}

template <class T>
Status backward(const ScanProblem& problem, const BackwardResult& result) {
  return run_tasks<T>(problem, true, result.segment, [&](Task<T>& task) { task.backward(result); });
}

Status scan_forward(const ScanProblem& problem, const ForwardResult& result) {
  return problem.dtype == DType::float64 ? forward<double>(problem, result) : forward<float>(problem, result);
}

Status scan_backward(const ScanProblem& problem, const BackwardResult& result) {
  return problem.dtype == DType::float64 ? backward<double>(problem, result) : backward<float>(problem, result);
}

double multiply_add(int64_t rounds, float* sink) {
  constexpr int kChains = 12;  // enough to hide the latency, few enough to stay in registers everywhere
  vfloat sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = broadcast(float(i));
  vfloat a = broadcast(sink[0]), b = broadcast(sink[1]);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * a + b;
    asm volatile("" : : : "memory");
  }
  vfloat total = sum[0];
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) total += sum[i];
  sink[0] = sum_lanes<float>(total);
  return 2.0 * kChains * kLanes<float> * double(rounds);
}

}  // namespace

#define HOPE_TEXT_(x) #x
#define HOPE_TEXT(x) HOPE_TEXT_(x)
extern const Variant kVariant;
const Variant kVariant = {HOPE_TEXT(HOPE_ISA), scan_forward, scan_backward, level_update, multiply_add};

}  // namespace hope::cpu::HOPE_ISA
