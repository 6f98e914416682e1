// The kernels of the forward scan. The files that include this compile them.
#pragma once

#include "forward_launch.h"

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
  return launch_scan<Traits>("the forward scan", params.problem, params.blocks, params.layout.bytes, stream,
                             scan_forward_kernel<Traits>, params);
}

template <class Kind>
Status start_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                     void* stream) {
  return with_traits<Kind>(problem, [&](auto traits) {
    return start_forward_kernel<decltype(traits)>(problem, result, device, workspace, stream);
  });
}

}  // namespace hope::cuda
