// The backward scan's launch: host checks, the choice of a plan, the kernel. What the kernel does is in backward_scan.h.
#include "scan.h"

#include <algorithm>

#include "backward_scan.h"
#include "launch.h"
#include "scan_plan.h"

namespace hope::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_backward_kernel(const BackwardParams params) {
  BackwardScan<Traits>(params, dynamic_shared<char>()).run();
}

// Whether registers hold the adjoint of the state and what its products take: beside the largest one there is no room for the
// products with the adjoint of the momentum, the compiler would put some into local memory.
template <class Traits>
constexpr bool kFits = Traits::kHidden <= 128 || !Traits::kMomentum;

// The memories that have a backward.
using BackwardKind = ScanKind<Form::mlp, Rule::gd>;

// What the kernel keeps in static shared memory, which lies in front of the dynamic.
constexpr int64_t kStaticBytes = kPlaceBytes + 256;

// States a task has room for: those of one segment.
int64_t slot_count(const ScanProblem& problem) { return std::min(problem.checkpoint_interval, problem.chunks + 1); }

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
  params.slots = int(slot_count(problem));
  params.kept_bytes = kept_bytes<Traits>(params.rebuild.rows);
  const BackwardResult& r = result;
  params.rebuild.vectors = params.rebuild.vectors && rows_aligned({problem.q, r.grad_output, r.q, r.k, r.v, r.pending_k,
                                                                   r.pending_v});
  if (params.rebuild.stages == 0) return params;
  const bool writes = writes_state(problem);
  // What threads keep of a chunk is read oftener than a second set of partial sums saves barriers.
  for (const bool kept_shared : {true, false})
    for (const int partials : {2, 1}) {
      BackwardLayout layout = backward_layout<Traits>(params.rebuild.rows, writes, params.problem.q.data,
                                                      problem.objective == Objective::self, partials, kept_shared);
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
  const int64_t tasks = params.problem.sequence_count * params.problem.heads, states = tasks * params.slots;
  int64_t used = 0;
  const auto part = [&](void*& pointer, int64_t bytes) {
    pointer = start + used;
    used += bytes;
  };
  BackwardWorkspace& w = params.workspace;
  part(w.adjoint, tasks * ParkedState<Traits>::kBytes);
  part(w.slots, states * (2 * Traits::kHidden * Traits::kDim * 2));
  if (params.result.decay) part(w.remainders, states * PackedState<Traits>::kBytes);
  if (params.layout.kept < 0 && writes_state(params.problem)) part(w.kept, tasks * params.kept_bytes);
  if constexpr (Traits::kMomentum) {
    part(w.momentum, tasks * ParkedState<Traits>::kBytes);
    part(w.momentum_slots, states * ParkedState<Traits>::kBytes);
    part(w.momentum_adjoint, tasks * ParkedState<Traits>::kBytes);
    part(w.momentum_operand, tasks * PackedState<Traits>::kBytes);
  }
  params.rebuild.workspace = w.momentum;
  return used;
}

// Why the class of a problem that has a forward has no backward.
Status supports_class(const ScanProblem& p) {
  if (p.form != Form::mlp) return refused("the CUDA scan's backward computes mlp memories only");
  if (p.rule != Rule::gd) return refused("the CUDA scan's backward computes the rule gd only");
  if (clustered(p))
    return refused("the CUDA scan's backward keeps the adjoint in the registers of one block: dim at most 64, hidden at "
                   "most 256");
  return {};
}

Status supports_gradients(const ScanProblem& p, const BackwardResult& r) {
  for (int i = 0; i < weight_count(p.form); ++i)
    for (const MatrixView& grad : {r.grad_weights[i], r.grad_momentum[i]})
      if (grad.data && grad.dtype != DType::float32 && grad.dtype != p.dtype)
        return refused("the CUDA scan takes gradients of the state in float32 or the dtype of the tokens");
  if (r.segment.data) return refused("the CUDA scan keeps no segment for the backward");
  if (writes_state(p) && p.chunks > p.checkpoint_interval)
    for (int i = 0; i < weight_count(p.form); ++i)
      if (!r.checkpoints[i] || (p.momentum_step && !r.checkpoints[kMaxWeights + i]))
        return {StatusCode::invalid_argument, "the backward scan needs the forward's checkpoints"};
  return {};
}

}  // namespace

Status supports_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device) {
  Status status = supports_forward(problem, {}, device);
  if (status.code == StatusCode::ok) status = supports_class(problem);
  if (status.code == StatusCode::ok) status = supports_gradients(problem, result);
  if (status.code != StatusCode::ok) return status;
  return with_traits<BackwardKind>(problem, [&](auto traits) {
    using Traits = decltype(traits);
    if (!kFits<Traits>)
      return refused("the CUDA scan's backward has no registers for momentum at this size: hidden at most 128");
    const BackwardParams params = make_backward_params<Traits>(problem, result, device);
    return params.layout.bytes ? Status{}
                               : refused("the CUDA scan's backward keeps a chunk in shared memory: chunk_size is too large");
  });
}

int64_t backward_workspace(const ScanProblem& problem, const BackwardResult& result, const Device& device) {
  int64_t bytes = 0;
  with_traits<BackwardKind>(problem, [&](auto traits) {
    BackwardParams params = make_backward_params<decltype(traits)>(problem, result, device);
    bytes = lay_out_workspace<decltype(traits)>(params, nullptr);
    return Status{};
  });
  return bytes;
}

Status scan_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                     void* stream) {
  const Status status = supports_backward(problem, result, device);
  if (status.code != StatusCode::ok) return status;
  const int64_t tasks = problem.sequence_count * problem.heads;
  if (tasks == 0) return {};
  if (!workspace) return {StatusCode::invalid_argument, "the workspace is missing"};
  return with_traits<BackwardKind>(problem, [&](auto traits) {
    using Traits = decltype(traits);
    Status started;
    if constexpr (kFits<Traits>) {
      BackwardParams params = make_backward_params<Traits>(problem, result, device);
      lay_out_workspace<Traits>(params, static_cast<char*>(workspace));
      LaunchShape shape;
      shape.grid = dim3(unsigned(tasks));
      shape.block = dim3(Traits::kThreads);
      shape.shared_bytes = size_t(params.layout.bytes);
      shape.stream = static_cast<cudaStream_t>(stream);
      started = launch("the backward scan", shape, scan_backward_kernel<Traits>, params);
    }
    return started;
  });
}

}  // namespace hope::cuda
