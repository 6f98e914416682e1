// Picks the kernels for this processor, checks problems, and measures the machine's limits.
#include "engine.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../check.h"
#include "thread_pool.h"

namespace hope::cpu {

#if defined(HOPE_X86_VARIANTS)
namespace avx512bf16 {
extern const Variant kVariant;
}
namespace avx512 {
extern const Variant kVariant;
}
namespace avx2 {
extern const Variant kVariant;
}
#endif
namespace baseline {
extern const Variant kVariant;
}

namespace {

struct Candidate {
  const Variant* variant;
  bool usable;
};

constexpr int kMaxVariants = 4;

// Newest first.
int candidates(Candidate* list) {
  int count = 0;
#if defined(HOPE_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  list[count++] = {&avx512bf16::kVariant, avx512 && __builtin_cpu_supports("avx512bf16")};
  list[count++] = {&avx512::kVariant, avx512};
  list[count++] = {&avx2::kVariant, avx2};
#endif
  list[count++] = {&baseline::kVariant, true};
  return count;
}

struct Choice {
  const Variant* variant = nullptr;
  const char* problem = "";
};

Choice choose() {
  Candidate list[kMaxVariants];
  const int count = candidates(list);
  const char* wanted = std::getenv("HOPE_KERNELS_CPU_ISA");
  for (int i = 0; i < count; ++i) {
    if (wanted && *wanted) {
      if (std::strcmp(wanted, list[i].variant->name) != 0) continue;
      if (!list[i].usable) return {nullptr, "HOPE_KERNELS_CPU_ISA names an instruction set this processor lacks"};
      return {list[i].variant, ""};
    }
    if (list[i].usable) return {list[i].variant, ""};
  }
  return {nullptr, "HOPE_KERNELS_CPU_ISA names no instruction set of this build; want avx512bf16, avx512, avx2 or baseline"};
}

}  // namespace

const Variant* variant(const char** problem) {
  static const Choice choice = choose();
  if (problem) *problem = choice.problem;
  return choice.variant;
}

int usable_variants(const char** names, int capacity) {
  Candidate list[kMaxVariants];
  const int count = candidates(list);
  int found = 0;
  for (int i = 0; i < count && found < capacity; ++i)
    if (list[i].usable) names[found++] = list[i].variant->name;
  return found;
}

namespace {

template <class Result>
Status run(const ScanProblem& problem, const Result& result, Status (*Variant::*pass)(const ScanProblem&, const Result&)) {
  const char* reason = "";
  const Variant* chosen = variant(&reason);
  if (!chosen) return {StatusCode::unsupported, reason};
  if (problem.threads < 1) return {StatusCode::invalid_argument, "threads must be positive"};
  const Status status = check_problem(problem);
  if (status.code != StatusCode::ok) return status;
  if (problem.sequence_count == 0 || problem.heads == 0) return {};
  return (chosen->*pass)(problem, result);
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of several timed runs of `piece` on all threads.
template <class F>
double best_time(int threads, const F& piece) {
  double best = 1e30;
  for (int trial = 0; trial < 7; ++trial) {
    const double start = seconds();
    parallel_for(threads, threads, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, (void*)&piece);
    const double taken = seconds() - start;
    if (taken < best) best = taken;
  }
  return best;
}

}  // namespace

Status scan_forward(const ScanProblem& problem, const ForwardResult& result) {
  return run(problem, result, &Variant::scan_forward);
}

Status scan_backward(const ScanProblem& problem, const BackwardResult& result) {
  return run(problem, result, &Variant::scan_backward);
}

namespace {

Status check_factored(const FactoredChunk& chunk, bool backward) {
  const auto invalid = [](const char* message) { return Status{StatusCode::invalid_argument, message}; };
  if (chunk.threads < 1) return invalid("threads must be positive");
  if (chunk.batch < 0 || chunk.rows < 0 || chunk.heads < 0 || chunk.block_count < 0)
    return invalid("sizes must not be negative");
  if (chunk.dtype != DType::float32 && chunk.dtype != DType::float64)
    return invalid("the factored plan's kernels take float32 and float64");
  if (chunk.dim < 1 || chunk.dim % kFactoredMultiple != 0) return invalid("dim must be a multiple of 16");
  if (chunk.form != Form::linear && (chunk.hidden < 1 || chunk.hidden % kFactoredMultiple != 0))
    return invalid("hidden must be a multiple of 16");
  if (!chunk.x.data || (chunk.writes && !chunk.target.data)) return invalid("tokens are missing");
  for (int i = 0; i < weight_count(chunk.form); ++i)
    if (!chunk.weights[i] || (backward && !chunk.turned_weights[i])) return invalid("a weight is missing");
  for (int64_t j = 0; j < chunk.block_count; ++j)
    if (const PairBlock& block = chunk.blocks[j]; block.count > 0) {
      if (!chunk.scale) return invalid("the pairs' weights are missing");
      for (int i = 0; i < weight_count(chunk.form); ++i)
        if (!block.errors[i] || (backward && !block.turned_errors[i])) return invalid("errors of pairs are missing");
      for (int i = 0; i < (chunk.form == Form::linear ? 1 : kMaxInputs); ++i)
        if (!block.inputs[i] || (backward && !block.turned_inputs[i])) return invalid("inputs of pairs are missing");
    }
  return {};
}

template <class Result>
Status run(const FactoredChunk& chunk, const Result& result, bool backward,
           Status (*Variant::*pass)(const FactoredChunk&, const Result&)) {
  const char* reason = "";
  const Variant* chosen = variant(&reason);
  if (!chosen) return {StatusCode::unsupported, reason};
  const Status status = check_factored(chunk, backward);
  if (status.code != StatusCode::ok) return status;
  if (chunk.batch == 0 || chunk.heads == 0 || chunk.rows == 0) return {};
  return (chosen->*pass)(chunk, result);
}

}  // namespace

int64_t factored_kept_bytes(const FactoredChunk& chunk) {
  const Variant* chosen = variant();
  return chosen && chunk.rows > 0 && chunk.dim > 0 ? chosen->factored_kept_bytes(chunk) : 0;
}

Status factored_forward(const FactoredChunk& chunk, const FactoredResult& result) {
  return run(chunk, result, false, &Variant::factored_forward);
}

Status factored_backward(const FactoredChunk& chunk, const FactoredGradients& gradients) {
  return run(chunk, gradients, true, &Variant::factored_backward);
}

Status transpose_matrices(const MatrixView& from, int64_t matrices, int64_t rows, int64_t columns, void* to, int64_t stride,
                          int threads) {
  const char* reason = "";
  const Variant* chosen = variant(&reason);
  if (!chosen) return {StatusCode::unsupported, reason};
  if (columns % kFactoredMultiple != 0 || stride % kFactoredMultiple != 0 || stride < rows || threads < 1)
    return {StatusCode::invalid_argument, "columns and stride must be multiples of 16, and a row must hold `rows` elements"};
  if (matrices > 0 && rows > 0) chosen->transpose_matrices(from, matrices, rows, columns, to, stride, threads);
  return {};
}

int64_t step_workspace(const StepProblem& problem) {
  const Variant* chosen = variant();
  return chosen && check_step_problem(problem).code == StatusCode::ok ? chosen->step_workspace(problem) : 0;
}

Status step(const StepProblem& problem, void* workspace, int64_t workspace_bytes, int threads) {
  const char* reason = "";
  const Variant* chosen = variant(&reason);
  if (!chosen) return {StatusCode::unsupported, reason};
  const Status status = check_step_problem(problem);
  if (status.code != StatusCode::ok) return status;
  if (threads < 1) return {StatusCode::invalid_argument, "threads must be positive"};
  if (problem.batch == 0) return {};
  if (!problem.x || !problem.output) return {StatusCode::invalid_argument, "x or output is missing"};
  if (!workspace || workspace_bytes < chosen->step_workspace(problem))
    return {StatusCode::invalid_argument, "the workspace is missing or too small"};
  return chosen->step(problem, workspace, threads);
}

Status level_update(const LevelUpdateProblem& problem, int threads) {
  const char* reason = "";
  const Variant* chosen = variant(&reason);
  if (!chosen) return {StatusCode::unsupported, reason};
  const Status status = check(problem);
  if (status.code != StatusCode::ok) return status;
  if (threads < 1) return {StatusCode::invalid_argument, "threads must be positive"};
  if (problem.level_count == 0) return {};
  const size_t sums = size_t(total_pieces(problem)), scales = size_t(problem.level_count);
  const std::unique_ptr<float[]> scratch(new (std::nothrow) float[sums + scales]);
  if (!scratch) return {StatusCode::out_of_memory, "no memory for the sums of squares"};
  chosen->level_update(problem, scratch.get(), scratch.get() + sums, threads);
  return {};
}

double fma_peak(int threads) {
  const Variant* chosen = variant();
  if (!chosen || threads < 1) return 0;
  constexpr int64_t kRounds = 1 << 20;
  double operations = 0;
  auto piece = [&](int64_t i) {
    float sink[2] = {0.999f, 1e-3f};
    const double done = chosen->multiply_add(kRounds, sink);
    if (i == 0) operations = done;
  };
  const double time = best_time(threads, piece);
  return operations * threads / time;
}

double copy_bandwidth(int threads) {
  constexpr size_t kBytes = size_t(64) << 20;  // per thread and side: beyond any share of a last-level cache
  if (threads < 1) return 0;
  std::unique_ptr<char[]> from(new char[kBytes * size_t(threads)]), to(new char[kBytes * size_t(threads)]);
  std::memset(from.get(), 1, kBytes * size_t(threads));
  std::memset(to.get(), 0, kBytes * size_t(threads));
  auto piece = [&](int64_t i) { std::memcpy(to.get() + size_t(i) * kBytes, from.get() + size_t(i) * kBytes, kBytes); };
  return 2.0 * double(kBytes) * threads / best_time(threads, piece);
}

}  // namespace hope::cpu
