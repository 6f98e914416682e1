// The kernels of the backward scan. The files that include this compile them.
#pragma once

#include "backward_launch.h"

namespace hope::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) scan_backward_kernel(const BackwardParams params) {
  BackwardScan<Traits>(params, dynamic_shared<char>()).run();
}

template <class Traits>
Status start_backward_kernel(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                             void* stream) {
  BackwardParams params = make_backward_params<Traits>(problem, result, device);
  lay_out_workspace<Traits>(params, static_cast<char*>(workspace));
  return launch_scan<Traits>("the backward scan", params.problem, params.rebuild.blocks, params.layout.bytes, stream,
                             scan_backward_kernel<Traits>, params);
}

template <class Kind, bool kMomentum>
Status start_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                      void* stream) {
  return with_types<Kind, kMomentum>(problem, [&](auto traits) {
    Status started;
    if constexpr (kFits<decltype(traits)>)
      started = start_backward_kernel<decltype(traits)>(problem, result, device, workspace, stream);
    return started;
  });
}

}  // namespace hope::cuda
