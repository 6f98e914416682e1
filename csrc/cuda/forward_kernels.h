// The kernels of the forward scan. The files that include this compile them.
#pragma once

#include "forward_launch.h"
#include "launch.h"

namespace hope::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_forward_kernel(const ForwardParams params) {
  ForwardScan<Traits>(params, dynamic_shared<char>()).run();
}

template <class Traits>
Status start_forward_kernel(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                            void* stream) {
  ForwardParams params = make_params<Traits>(problem, result, device);
  params.workspace = workspace;
  if (params.blocks > 1) {
    // PTX of an older architecture runs on a newer device, but it knows nothing of clusters.
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, scan_forward_kernel<Traits>);
    if (error != cudaSuccess) return status_of(error, "the forward scan");
    if (attributes.ptxVersion < 90)
      return refused("the state takes the registers of several blocks, and the kernels were not built for sm_90");
  }
  LaunchShape shape;
  shape.grid = dim3(unsigned(problem.sequence_count * problem.heads * params.blocks));
  shape.cluster = dim3(unsigned(params.blocks));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = size_t(params.layout.bytes);
  shape.stream = static_cast<cudaStream_t>(stream);
  return launch("the forward scan", shape, scan_forward_kernel<Traits>, params);
}

template <class Kind>
Status start_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                     void* stream) {
  return with_traits<Kind>(problem, [&](auto traits) {
    return start_forward_kernel<decltype(traits)>(problem, result, device, workspace, stream);
  });
}

}  // namespace hope::cuda
