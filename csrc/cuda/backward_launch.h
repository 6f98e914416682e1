// How the backward scan is launched: its shared memory, its workspace and what its kernel is told. Host code only. The kernels
// of each form, with momentum and without, are compiled in a file each.
#pragma once

#include <algorithm>

#include "backward_scan.h"
#include "scan_plan.h"

namespace hope::cuda {

// The memories that have a backward.
template <Form kForm, Rule kRule = Rule::gd, bool kCluster = false>
using BackwardKind = ScanKind<kForm, kRule, kCluster, true>;
// Calls body(BackwardKind{}) with the problem's.
template <class Body>
Status with_backward_kind(const ScanProblem& problem, const Body& body) {
  const bool delta = problem.rule == Rule::dgd;
  if (problem.form == Form::glu)
    return delta ? body(BackwardKind<Form::glu, Rule::dgd>{}) : body(BackwardKind<Form::glu>{});
  if (delta) return body(BackwardKind<Form::mlp, Rule::dgd>{});
  return clustered(problem) ? body(BackwardKind<Form::mlp, Rule::gd, true>{}) : body(BackwardKind<Form::mlp>{});
}
template <class Body>
Status with_backward_traits(const ScanProblem& problem, const Body& body) {
  return with_backward_kind(problem, [&](auto kind) { return with_traits<decltype(kind)>(problem, body); });
}

// Whether registers hold the adjoint of the state and what its products take: beside the largest ones there is no room for
// the products with the adjoint of the momentum, or for the systems of dgd; the compiler would put some into local memory.
template <class Traits>
constexpr bool kFits = Traits::kStateRegisters <= (Traits::kMomentum ? 64 : Traits::kDelta ? 96 : 128);

// What the kernel keeps in static shared memory, which lies in front of the dynamic.
constexpr int64_t kStaticBytes = kPlaceBytes + 256;

// States a block has room for: those of one segment.
inline int64_t slot_count(const ScanProblem& problem) { return std::min(problem.checkpoint_interval, problem.chunks + 1); }

// Sizes and shared memory; the layout's bytes 0 where the chunk does not fit.
template <class Traits>
BackwardParams make_backward_params(const ScanProblem& problem, const BackwardResult& result, const Device& device) {
  BackwardParams params{};
  params.problem = problem;
  if (!result.grad_output.data) params.problem.q = {};
  ScanProblem without_queries = problem;
  without_queries.q = {};
  params.rebuild = make_params<Traits>(without_queries, {}, device);
  params.result = result;
  const BackwardTensor of_values = problem.objective == Objective::self ? kTargets : kDDelta;
  params.inputs[0] = {problem.k, problem.pending_k, kChunkKeys}, params.inputs[1] = {problem.v, problem.pending_v, kTargets};
  params.inputs[2] = {problem.q, problem.q, kRead}, params.inputs[3] = {result.grad_output, result.grad_output, kUpstream};
  params.gradients[0] = {result.k, result.pending_k, kDelta}, params.gradients[1] = {result.v, result.pending_v, of_values};
  params.gradients[2] = {result.q, result.q, kRead};
  params.slots = int(slot_count(problem));
  params.kept_bytes = kept_bytes<Traits>(params.rebuild.rows);
  const BackwardResult& r = result;
  params.rebuild.vectors = params.rebuild.vectors && rows_aligned({problem.q, r.grad_output, r.q, r.k, r.v, r.pending_k,
                                                                   r.pending_v});
  if (params.rebuild.stages == 0) return params;
  const bool writes = writes_state(problem);
  // What threads keep of a chunk is read oftener than a second set of partial sums saves barriers. Several blocks have these
  // barriers at any rate.
  const int blocks = params.rebuild.blocks;
  for (const bool kept_shared : {true, false})
    for (const int partials : {blocks > 1 ? 1 : 2, 1}) {
      BackwardLayout layout = backward_layout<Traits>(params.rebuild.rows, writes, params.problem.q.data,
                                                      problem.objective == Objective::self, blocks, partials, kept_shared);
      layout.bytes = std::max(layout.bytes, params.rebuild.layout.bytes);
      if (layout.bytes + kStaticBytes > device.shared_memory) continue;
      params.layout = layout;
      return params;
    }
  return params;
}

// Lays the workspace out from `start` on; returns its bytes.
template <class Traits>
int64_t lay_out_workspace(BackwardParams& params, char* start) {
  const int64_t blocks = params.problem.sequence_count * params.problem.heads * params.rebuild.blocks;
  const int64_t states = blocks * params.slots;
  int64_t used = 0;
  const auto part = [&](void*& pointer, int64_t bytes) {
    pointer = start + used;
    used += bytes;
  };
  BackwardWorkspace& w = params.workspace;
  part(w.adjoint, blocks * ParkedState<Traits>::kBytes);
  part(w.slots, states * (kStateSize<Traits> * 2));
  if (params.result.decay || params.result.retention) part(w.remainders, states * PackedState<Traits>::kBytes);
  if (params.layout.kept < 0 && writes_state(params.problem)) part(w.kept, blocks * params.kept_bytes);
  if constexpr (Traits::kMomentum) {
    part(w.momentum, blocks * ParkedState<Traits>::kBytes);
    part(w.momentum_slots, states * ParkedState<Traits>::kBytes);
    part(w.momentum_adjoint, blocks * ParkedState<Traits>::kBytes);
    part(w.momentum_operand, blocks * PackedState<Traits>::kBytes);
  }
  params.rebuild.workspace = w.momentum;
  return used;
}

// `problem` is one that supports_backward accepts, of this kind, with or without momentum; every (sequence, head) is a task.
template <class Kind, bool kMomentum>
Status start_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                      void* stream);

}  // namespace hope::cuda
