// How a scan is launched: the plan that holds the memory, its shared memory and what the kernel is told. Host code only.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "forward_scan.h"
#include "scan.h"

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

// Blocks that hold a memory together: a power of two, so that they share the work of a sum evenly.
template <class Traits>
int blocks_of(const ScanProblem& problem) {
  int blocks = 1;
  while (blocks < kMaxBlocks && blocks * Traits::kHidden < problem.hidden) blocks *= 2;
  return blocks;
}

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
  params.blocks = blocks_of<Traits>(problem);
  for (params.stages = 2; params.stages > 0; --params.stages) {
    params.layout = scan_layout<Traits>(params.rows, params.stages, writes, problem.q.data, params.blocks);
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

// Calls body(Traits{}) with the smallest plan that holds a memory of this form.
template <DType kType, bool kMomentum, Form kForm, class Body>
Status with_sizes(const ScanProblem& problem, const Body& body) {
  if constexpr (kForm == Form::glu) {
    if (problem.dim <= 32 && problem.hidden <= 128) return body(ScanTraits<kType, 32, 128, kMomentum, kForm>{});
    if (problem.dim <= 64) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, true>{});
    return body(ScanTraits<kType, 128, 64, kMomentum, kForm, true>{});
  } else {
    if (problem.dim > 64 || problem.hidden > 256) return body(ScanTraits<kType, 128, 128, kMomentum, kForm, true>{});
    if (problem.dim <= 32 && problem.hidden <= 128) return body(ScanTraits<kType, 32, 128, kMomentum, kForm>{});
    if (problem.hidden <= 128) return body(ScanTraits<kType, 64, 128, kMomentum, kForm>{});
    return body(ScanTraits<kType, 64, 256, kMomentum, kForm>{});
  }
}
template <Form kForm, class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  const bool momentum = problem.momentum_step != nullptr;
  if (problem.dtype == DType::bfloat16)
    return momentum ? with_sizes<DType::bfloat16, true, kForm>(problem, body)
                    : with_sizes<DType::bfloat16, false, kForm>(problem, body);
  return momentum ? with_sizes<DType::float16, true, kForm>(problem, body)
                  : with_sizes<DType::float16, false, kForm>(problem, body);
}
// The same for every form.
template <class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  return problem.form == Form::glu ? with_traits<Form::glu>(problem, body) : with_traits<Form::mlp>(problem, body);
}

}  // namespace hope::cuda
