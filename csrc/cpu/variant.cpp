// The kernels for one instruction set: CMake compiles this file once per set, with its flags and its HOPE_ISA.
#include "engine.h"
#include "factored.h"
#include "level_update.h"
#include "step.h"

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

Status factored_forward(const FactoredChunk& chunk, const FactoredResult& result) {
  const auto run = [&](auto& task) { task.forward(result); };
  return chunk.dtype == DType::float64 ? run_factored<double>(chunk, false, run) : run_factored<float>(chunk, false, run);
}

Status factored_backward(const FactoredChunk& chunk, const FactoredGradients& gradients) {
  const auto run = [&](auto& task) { task.backward(gradients); };
  return chunk.dtype == DType::float64 ? run_factored<double>(chunk, true, run) : run_factored<float>(chunk, true, run);
}

template <class T>
int64_t kept_bytes(const FactoredChunk& chunk) {
  const Net net = make_factored_net(chunk, {});
  Arena count;
  FactoredTask<T> any(chunk, net, Team{}, 0, 0);
  any.layout(count, false);
  return any.kept_bytes() * FactoredTask<T>::piece_count(chunk);
}

int64_t factored_kept_bytes(const FactoredChunk& chunk) {
  return chunk.dtype == DType::float64 ? kept_bytes<double>(chunk) : kept_bytes<float>(chunk);
}

template <class T>
void transpose_all(const MatrixView& from, idx matrices, idx rows, idx columns, T* to, idx stride, int threads) {
  const Team team{matrices < threads ? threads : 1};
  auto one = [&](int64_t m) {
    const T* source = static_cast<const T*>(from.data) + m * from.head;
    transpose(team, in_place<T>(to + m * columns * stride, 0, columns, rows, stride),
              in_place<T>(source, 0, rows, columns, from.in));
  };
  if (team.threads > 1) {
    for (idx m = 0; m < matrices; ++m) one(m);
  } else {
    parallel_for(
        threads, matrices, [](void* context, int64_t m) { (*static_cast<decltype(one)*>(context))(m); }, &one);
  }
}

void transpose_matrices(const MatrixView& from, int64_t matrices, int64_t rows, int64_t columns, void* to, int64_t stride,
                        int threads) {
  if (from.dtype == DType::float64)
    transpose_all(from, matrices, rows, columns, static_cast<double*>(to), stride, threads);
  else
    transpose_all(from, matrices, rows, columns, static_cast<float*>(to), stride, threads);
}

// Calls body with a step in the problem's state dtype.
template <class F>
auto with_step(const StepProblem& problem, int threads, F&& body) {
  if (problem.dtype == DType::float64) {
    Step<double> step(problem, threads, scan_forward);
    return body(step);
  }
  Step<float> step(problem, threads, scan_forward);
  return body(step);
}

int64_t step_workspace(const StepProblem& problem) {
  return with_step(problem, 1, [](auto& step) {
    Arena count;
    step.layout(count);
    return int64_t(count.used());
  });
}

Status step(const StepProblem& problem, void* workspace, int threads) {
  return with_step(problem, threads, [&](auto& step) {
    Arena arena(workspace);
    step.layout(arena);
    return step.run();
  });
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
const Variant kVariant = {HOPE_TEXT(HOPE_ISA), scan_forward, scan_backward, factored_kept_bytes, factored_forward,
                          factored_backward, transpose_matrices, step_workspace, step, level_update, multiply_add};

}  // namespace hope::cpu::HOPE_ISA
