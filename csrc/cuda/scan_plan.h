// How a scan is launched, forward and backward: the plan that holds the memory, its shared memory and what the kernel is told.
// Host code only.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "forward_scan.h"

namespace hope::cuda {

// Tokens of a piece where nothing is written: enough to hide the latency of loading the next one.
constexpr int kReadSpan = 64;

inline Status refused(const char* reason) { return {StatusCode::unsupported, reason}; }

inline bool writes_state(const ScanProblem& problem) { return problem.k.data && problem.chunks > 0; }

// Whether every token row starts at a multiple of 16 bytes.
inline bool rows_aligned(std::initializer_list<TokenView> views) {
  for (const TokenView& view : views)
    if (view.data && (reinterpret_cast<uintptr_t>(view.data) % 16 || view.row % 8 || view.token % 8 || view.head % 8))
      return false;
  return true;
}

// The Place lies in front of the dynamic shared memory, which is aligned to 128.
constexpr int64_t kPlaceBytes = (int64_t(sizeof(Place)) + 127) / 128 * 128;

// Sizes, stages and shared memory; stages 0 where the chunk does not fit.
template <class Traits>
ForwardParams make_params(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  ForwardParams params{};
  params.problem = problem;
  params.result = result;
  params.checkpoints = problem.sequences ? 0 : checkpoints_per_sequence(problem);
  const bool writes = writes_state(problem);
  params.span = writes ? int(problem.chunk_size) : kReadSpan;
  params.rows = (params.span + kSlice - 1) / kSlice * kSlice;
  for (params.stages = 2; params.stages > 0; --params.stages) {
    params.layout = scan_layout<Traits>(params.rows, params.stages, writes, problem.q.data);
    if (params.layout.bytes + kPlaceBytes <= device.shared_memory) break;
  }
  params.vectors =
      problem.dim == Traits::kDim &&
      rows_aligned({problem.q, problem.k, problem.v, problem.pending_k, problem.pending_v, result.output});
  const TokenView &q = problem.q, &k = problem.k;
  // The product of `self` is not the output, and `dot` and `error` make none of the keys.
  params.shared_read = problem.objective == Objective::l2 && q.data && q.data == k.data && q.row == k.row &&
                       q.token == k.token && q.head == k.head;
  const TokenView fresh[kTensors] = {problem.q, problem.k, problem.v};
  const TokenView pending[kTensors] = {problem.q, problem.pending_k, problem.pending_v};
  for (int t = 0; t < kTensors; ++t) params.tokens[t] = fresh[t], params.pending[t] = pending[t];
  return params;
}

// Calls body(Traits{}) with the smallest plan that holds the memory.
template <DType kType, bool kMomentum, class Body>
Status with_sizes(const ScanProblem& problem, const Body& body) {
  if (problem.dim <= 32 && problem.hidden <= 128) return body(ScanTraits<kType, 32, 128, kMomentum>{});
  if (problem.hidden <= 128) return body(ScanTraits<kType, 64, 128, kMomentum>{});
  return body(ScanTraits<kType, 64, 256, kMomentum>{});
}
template <class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  const bool momentum = problem.momentum_step != nullptr;
  if (problem.dtype == DType::bfloat16)
    return momentum ? with_sizes<DType::bfloat16, true>(problem, body) : with_sizes<DType::bfloat16, false>(problem, body);
  return momentum ? with_sizes<DType::float16, true>(problem, body) : with_sizes<DType::float16, false>(problem, body);
}

}  // namespace hope::cuda
