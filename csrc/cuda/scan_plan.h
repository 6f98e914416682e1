// How a scan is launched, forward and backward: the plan that holds the memory, its shared memory and what the kernel is told.
// Host code only.
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
  // With gd the product of `self` is not the output, and `dot` and `error` make none of the keys.
  const bool makes_outputs = problem.objective == Objective::l2 || problem.rule == Rule::dgd;
  params.shared_read = makes_outputs && q.data && q.data == k.data && q.row == k.row && q.token == k.token &&
                       q.head == k.head;
  const TokenView fresh[kTensors] = {problem.q, problem.k, problem.v};
  const TokenView pending[kTensors] = {problem.q, problem.pending_k, problem.pending_v};
  for (int t = 0; t < kTensors; ++t) params.tokens[t] = fresh[t], params.pending[t] = pending[t];
  return params;
}

// Calls body(Traits{}) with the smallest plan that holds a memory of this form and rule.
template <DType kType, bool kMomentum, Form kForm, Rule kRule, class Body>
Status with_sizes(const ScanProblem& problem, const Body& body) {
  const int64_t D = problem.dim, H = problem.hidden;
  if constexpr (kForm == Form::glu) {
    if (D <= 32 && H <= 128) return body(ScanTraits<kType, 32, 128, kMomentum, kForm, false, kRule>{});
    if (D <= 64) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, true, kRule>{});
    return body(ScanTraits<kType, 128, 64, kMomentum, kForm, true, kRule>{});
  } else {
    if (D > 64 || H > 256) return body(ScanTraits<kType, 128, 128, kMomentum, kForm, true, kRule>{});
    if (D <= 32 && H <= 128) return body(ScanTraits<kType, 32, 128, kMomentum, kForm, false, kRule>{});
    if (H <= 128) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, false, kRule>{});
    return body(ScanTraits<kType, 64, 256, kMomentum, kForm, false, kRule>{});
  }
}
template <Form kForm, Rule kRule, class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  const bool half = problem.dtype == DType::float16;
  if constexpr (kRule == Rule::gd)
    if (problem.momentum_step)
      return half ? with_sizes<DType::float16, true, kForm, kRule>(problem, body)
                  : with_sizes<DType::bfloat16, true, kForm, kRule>(problem, body);
  return half ? with_sizes<DType::float16, false, kForm, kRule>(problem, body)
              : with_sizes<DType::bfloat16, false, kForm, kRule>(problem, body);
}

// A form and a rule as a type.
template <Form kForm_, Rule kRule_>
struct ScanKind {
  static constexpr Form kForm = kForm_;
  static constexpr Rule kRule = kRule_;
};
// Calls body(ScanKind{}) with the problem's.
template <class Body>
Status with_kind(const ScanProblem& problem, const Body& body) {
  if (problem.form == Form::glu)
    return problem.rule == Rule::dgd ? body(ScanKind<Form::glu, Rule::dgd>{}) : body(ScanKind<Form::glu, Rule::gd>{});
  return problem.rule == Rule::dgd ? body(ScanKind<Form::mlp, Rule::dgd>{}) : body(ScanKind<Form::mlp, Rule::gd>{});
}
template <class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  return with_kind(problem, [&](auto kind) { return with_traits<kind.kForm, kind.kRule>(problem, body); });
}

}  // namespace hope::cuda
