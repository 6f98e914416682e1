// The forward scan's launch: host checks, the choice of a plan, the kernel. What the kernel does is in forward_scan.h.
#include "scan.h"

#include "check.h"
#include "forward_scan.h"
#include "launch.h"
#include "scan_plan.h"

namespace hope::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_forward_kernel(const ForwardParams params) {
  ForwardScan<Traits>(params, dynamic_shared<char>()).run();
}

// Why the class of the problem is not covered, without regard to the chunk's length.
Status supports_class(const ScanProblem& p, const ForwardResult& r, const Device& device) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (device.architecture < 80) return refused("the CUDA engine needs an sm_80 or newer device");
  if (p.form != Form::mlp) return refused("the CUDA scan computes mlp memories only");
  if (p.rule != Rule::gd) return refused("the CUDA scan computes the rule gd only");
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16)
    return refused("the CUDA scan takes bfloat16 or float16 tokens");
  if (p.dim > 64) return refused("the CUDA scan keeps the state in the registers of one block: dim at most 64");
  if (p.hidden > 256) return refused("the CUDA scan keeps the state in the registers of one block: hidden at most 256");
  for (int i = 0; i < weight_count(p.form); ++i) {
    const MatrixView& w = p.weights[i];
    if (w.dtype != DType::float32 && w.dtype != p.dtype)
      return refused("the CUDA scan takes weights in float32 or the dtype of the tokens");
    if (p.momentum[i].data && p.momentum[i].dtype != DType::float32)
      return refused("the CUDA scan takes momentum in float32");
  }
  if (r.segment.data) return refused("the CUDA scan keeps no segment for the backward");
  const int64_t tokens = p.tokens + p.pending_capacity;
  if (p.sequence_count * p.heads >= kMost || tokens >= kMost || p.checkpoint_interval >= kMost || p.chunks >= kMost)
    return refused("the CUDA scan counts sequences, tokens and chunks in 31 bits");
  return {};
}

Status supports_chunk(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  if (writes_state(problem) && problem.chunk_size > 1024)
    return refused("the CUDA scan keeps a chunk in shared memory: chunk_size is too large");
  return with_traits(problem, [&](auto traits) {
    const ForwardParams params = make_params<decltype(traits)>(problem, result, device);
    return params.stages ? Status{} : refused("the CUDA scan keeps a chunk in shared memory: chunk_size is too large");
  });
}

}  // namespace

Status supports_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  Status status = check_problem(problem);
  if (status.code == StatusCode::ok) status = supports_class(problem, result, device);
  return status.code == StatusCode::ok ? supports_chunk(problem, result, device) : status;
}

int64_t forward_workspace(const ScanProblem& problem) {
  int64_t bytes = 0;
  if (problem.momentum_step)
    with_traits(problem, [&](auto traits) {
      bytes = ParkedState<decltype(traits)>::kBytes * problem.sequence_count * problem.heads;
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
  return with_traits(problem, [&](auto traits) {
    using Traits = decltype(traits);
    ForwardParams params = make_params<Traits>(problem, result, device);
    params.workspace = workspace;
    LaunchShape shape;
    shape.grid = dim3(unsigned(tasks));
    shape.block = dim3(Traits::kThreads);
    shape.shared_bytes = size_t(params.layout.bytes);
    shape.stream = static_cast<cudaStream_t>(stream);
    return launch("the forward scan", shape, scan_forward_kernel<Traits>, params);
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
