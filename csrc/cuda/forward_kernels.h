// The kernels of the forward scan. The files that include this compile them.
#pragma once

#include "forward_launch.h"
#include "launch.h"

namespace hope::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_forward_kernel(const ForwardParams params) {
  ForwardScan<Traits>(params, dynamic_shared<char>()).run();
}

template <Form kForm>
Status start_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                     void* stream) {
  return with_traits<kForm>(problem, [&](auto traits) {
    using Traits = decltype(traits);
    ForwardParams params = make_params<Traits>(problem, result, device);
    params.workspace = workspace;
    LaunchShape shape;
    shape.grid = dim3(unsigned(problem.sequence_count * problem.heads * params.blocks));
    shape.cluster = dim3(unsigned(params.blocks));
    shape.block = dim3(Traits::kThreads);
    shape.shared_bytes = size_t(params.layout.bytes);
    shape.stream = static_cast<cudaStream_t>(stream);
    return launch("the forward scan", shape, scan_forward_kernel<Traits>, params);
  });
}

}  // namespace hope::cuda
