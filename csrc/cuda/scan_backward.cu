// The backward scan's host side: what is covered, what it needs, and which kernel it is started with. What that does is in
// backward_scan.h.
#include "backward_launch.h"
#include "scan.h"

namespace hope::cuda {
namespace {

constexpr char kNoRegisters[] =
    "the CUDA scan's backward has no registers for momentum or dgd at this size: dim at most 64, hidden at most 128";

// Why the class of a problem that has a forward has no backward.
Status supports_class(const ScanProblem& p) {
  if (p.form == Form::glu && (p.dim > 64 || p.hidden > 128))
    return refused("the CUDA scan's backward keeps the adjoint of a glu in the registers of one block: dim at most 64, "
                   "hidden at most 128");
  if (p.form == Form::mlp && clustered(p) && (p.momentum_step || p.rule == Rule::dgd)) return refused(kNoRegisters);
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
  return with_backward_traits(problem, [&](auto traits) {
    using Traits = decltype(traits);
    if (!kFits<Traits>)
      return refused(Traits::kForm == Form::glu
                         ? "the CUDA scan's backward has no registers for momentum at this size: of a glu dim at most 32"
                         : kNoRegisters);
    const BackwardParams params = make_backward_params<Traits>(problem, result, device);
    return params.layout.bytes ? Status{}
                               : refused("the CUDA scan's backward keeps a chunk in shared memory: chunk_size is too large");
  });
}

int64_t backward_workspace(const ScanProblem& problem, const BackwardResult& result, const Device& device) {
  int64_t bytes = 0;
  with_backward_traits(problem, [&](auto traits) {
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
  return with_backward_kind(problem, [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (Kind::kRule == Rule::gd && !Kind::kCluster)
      if (problem.momentum_step) return start_backward<Kind, true>(problem, result, device, workspace, stream);
    return start_backward<Kind, false>(problem, result, device, workspace, stream);
  });
}

}  // namespace hope::cuda
