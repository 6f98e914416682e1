// The forward scan's launch: host checks, the choice of a plan, the kernel. What the kernel does is in forward_scan.h.
#include "scan.h"

#include "check.h"
#include "forward_scan.h"
#include "launch.h"

namespace hope::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_forward_kernel(const ForwardParams params) {
  ForwardScan<Traits>(params, dynamic_shared<char>()).run();
}

// Tokens of a piece where nothing is written: enough to hide the latency of loading the next one.
constexpr int kReadSpan = 64;

Status refused(const char* reason) { return {StatusCode::unsupported, reason}; }

bool writes_state(const ScanProblem& problem) { return problem.k.data && problem.chunks > 0; }

// Whether every token row starts at a multiple of 16 bytes.
bool rows_aligned(const ScanProblem& p, const ForwardResult& r) {
  for (const TokenView& view : {p.q, p.k, p.v, p.pending_k, p.pending_v, r.output})
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
  params.vectors = problem.dim == Traits::kDim && rows_aligned(problem, result);
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
  if (problem.form == Form::glu) {
    if (problem.dim <= 32) return body(ScanTraits<kType, 32, 128, kMomentum, Form::glu>{});
    return body(ScanTraits<kType, 64, 128, kMomentum, Form::glu>{});
  }
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

// Why the class of the problem is not covered, without regard to the chunk's length.
Status supports_class(const ScanProblem& p, const ForwardResult& r, const Device& device) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (device.architecture < 80) return refused("the CUDA engine needs an sm_80 or newer device");
  if (p.form == Form::linear) return refused("the CUDA scan computes mlp and glu memories only");
  if (p.rule != Rule::gd) return refused("the CUDA scan computes the rule gd only");
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16)
    return refused("the CUDA scan takes bfloat16 or float16 tokens");
  if (p.dim > 64) return refused("the CUDA scan keeps the state in the registers of one block: dim at most 64");
  if (p.form == Form::glu && p.hidden > 128)
    return refused("the CUDA scan keeps the state in the registers of one block: hidden of a glu at most 128");
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
