// The forward scan's host side: what is covered, what it needs, and which kernels it is started with. What they do is in
// forward_scan.h.
#include "check.h"
#include "forward_launch.h"
#include "launch.h"

namespace hope::cuda {
namespace {

// Why the class of the problem is not covered, without regard to the chunk's length.
Status supports_class(const ScanProblem& p, const ForwardResult& r, const Device& device) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (device.architecture < 80) return refused("the CUDA engine needs an sm_80 or newer device");
  if (p.form == Form::linear) return refused("the CUDA scan computes mlp and glu memories only");
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16)
    return refused("the CUDA scan takes bfloat16 or float16 tokens");
  if (p.dim > 128) return refused("the CUDA scan keeps the state in registers: dim at most 128");
  for (int i = 0; i < weight_count(p.form); ++i) {
    const MatrixView& w = p.weights[i];
    if (w.dtype != DType::float32 && w.dtype != p.dtype)
      return refused("the CUDA scan takes weights in float32 or the dtype of the tokens");
    if (p.momentum[i].data && p.momentum[i].dtype != DType::float32)
      return refused("the CUDA scan takes momentum in float32");
  }
  if (r.segment.data) return refused("the CUDA scan keeps no segment for the backward");
  const int64_t tokens = p.tokens + p.pending_capacity;
  if (p.sequence_count * p.heads >= kMost / kMaxBlocks || tokens >= kMost || p.checkpoint_interval >= kMost ||
      p.chunks >= kMost)
    return refused("the CUDA scan counts sequences, tokens and chunks in 31 bits");
  return {};
}

// Sizes that depend on the plan.
Status supports_sizes(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  if (writes_state(problem) && problem.chunk_size > 1024)
    return refused("the CUDA scan keeps a chunk in shared memory: chunk_size is too large");
  return with_traits(problem, [&](auto traits) {
    using Traits = decltype(traits);
    if (problem.hidden > kMaxBlocks * Traits::kHidden)
      return refused("the CUDA scan keeps the state in the registers of a cluster of eight blocks: hidden is too large");
    if (blocks_of<Traits>(problem) > 1 && device.architecture < 90)
      return refused("the state takes the registers of several blocks, which see each other on sm_90 or newer only");
    const ForwardParams params = make_params<Traits>(problem, result, device);
    return params.stages ? Status{} : refused("the CUDA scan keeps a chunk in shared memory: chunk_size is too large");
  });
}

}  // namespace

Status supports_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  Status status = check_problem(problem);
  if (status.code == StatusCode::ok) status = supports_class(problem, result, device);
  return status.code == StatusCode::ok ? supports_sizes(problem, result, device) : status;
}

int64_t forward_workspace(const ScanProblem& problem) {
  int64_t bytes = 0;
  if (problem.momentum_step)
    with_traits(problem, [&](auto traits) {
      using Traits = decltype(traits);
      bytes = ParkedState<Traits>::kBytes * problem.sequence_count * problem.heads * blocks_of<Traits>(problem);
      return Status{};
    });
  return bytes;
}

Status scan_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                    void* stream) {
  const Status status = supports_forward(problem, result, device);
  if (status.code != StatusCode::ok) return status;
  const int64_t tasks = problem.sequence_count * problem.heads;
  if (tasks == 0) return {};
  if (!workspace && forward_workspace(problem) > 0) return {StatusCode::invalid_argument, "the workspace is missing"};
  return with_kind(problem, [&](auto kind) {
    return start_forward<decltype(kind)>(problem, result, device, workspace, stream);
  });
}

Status current_device(Device* device) {
  int number = 0, major = 0, minor = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  if (error != cudaSuccess) return status_of(error, "the current device");
  *device = Device{10 * major + minor, shared};
  return {};
}

}  // namespace hope::cuda
