// Launches a kernel and turns what the CUDA runtime answers into a status. Host code only.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <utility>

#include "../memory.h"

namespace hope::cuda {

// Ok, or what failed and the runtime's words; the message lasts until this thread's next failure.
inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the next call must not find this error again
  thread_local char message[256];
  std::snprintf(message, sizeof(message), "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
  return {StatusCode::device_error, message};
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks run together, so that the grid may meet at a barrier
  dim3 cluster{1, 1, 1};     // blocks that run together and see each other's shared memory; sm_90 and up
};

// Runs kernel(arguments...) on the stream; does not wait for it.
template <class... Parameters, class... Arguments>
Status launch(const char* what, const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kDefaultSharedBytes = 48 << 10;  // more must be asked for
  if (shape.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error != cudaSuccess) return status_of(error, what);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster.x;
    attributes[config.numAttrs].val.clusterDim.y = shape.cluster.y;
    attributes[config.numAttrs++].val.clusterDim.z = shape.cluster.z;
  }
  return status_of(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace hope::cuda
