// Stands in front of CUDA's own <cuda_runtime.h>, so that g++ compiles a .cu file unmodified and runs its kernels on the CPU.
//
//   g++ -x c++ -std=c++17 -O1 -I tests/cuda_host/include -I csrc -isystem "$CUDA/include"
//       my_driver.cpp csrc/cuda/my_kernels.cu tests/cuda_host/execution.cpp -pthread [-fsanitize=thread -g]
//
// tests/cuda_host/build.py does that. What a .cu file must keep to:
//   * include <cuda_runtime.h>, <cooperative_groups.h>, <cuda_bf16.h>, <cuda_fp16.h> and "cuda/ptx.h", and no other CUDA header;
//   * take shared memory from dynamic_shared<T>() and block_shared<T>() and PTX from the functions of "cuda/ptx.h";
//   * launch with cudaLaunchKernelEx (hope::cuda::launch in "cuda/launch.h" does), never with <<< >>>.
// Types, enumerations and the 16-bit floating point numbers are those of the CUDA toolkit's headers. Launches return when the
// kernel is done, streams are ignored, host and device share memory. Shared memory starts as NaN. A kernel that hangs ends
// the process after CUDA_HOST_PATIENCE seconds (default 60) and says which barrier it waits at.
//
// Finding missing barriers: build with -fsanitize=thread and run. To see that it would be found: CUDA_HOST_SKIP_BARRIER=
// file.cu:line takes its order away from the barrier at that line, without compiling anew; CUDA_HOST_BARRIERS=path writes the
// sites that were reached, one "file.cu:line name" a line, when the process ends.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_host/execution.h"

#undef __shared__
#define __shared__ _Pragma("GCC error \"shared memory comes from dynamic_shared<T>() and block_shared<T>()\"")
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
// Nothing is gained here by forcing it, and compiling takes half as long again.
#undef __forceinline__
#define __forceinline__ inline

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::block_barrier({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
  const cuda_host::Site site{"__syncwarp", file, line};
  cuda_host::meet(mask, nullptr, 0, cuda_host::orders_memory(site), site);
}

namespace cuda_host {

template <class T>
uint64_t to_word(const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "lanes exchange plain values of up to 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// `source(first lane of the segment, lane)` is the lane to read; outside the segment a lane keeps its own value.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const Site& site, Source source) {
  const int lane = self().lane(), first = lane & ~(width - 1);
  const uint64_t word = to_word(value);
  const Rendezvous& met = meet(mask, &word, 1, false, site);
  const int from = source(first, lane);
  if (from < first || from >= first + width) return value;
  if (!(mask >> from & 1)) die("%s at %s:%d reads lane %d, which is not in the mask", site.name, site.file, site.line, from);
  return from_word<T>(met.get(from, 0, lane));
}
inline unsigned votes(unsigned mask, bool predicate, const Site& site) {
  const uint64_t word = predicate;
  const int lane = self().lane();
  const Rendezvous& met = meet(mask, &word, 1, false, site);
  unsigned all = 0;
  for (int from = 0; from < 32; ++from)
    if (mask >> from & 1) all |= unsigned(met.get(from, 0, lane)) << from;
  return all;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, width, {"__shfl_sync", file, line},
                            [=](int first, int) { return first + (from & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, width, {"__shfl_up_sync", file, line},
                            [=](int, int lane) { return lane - int(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, width, {"__shfl_down_sync", file, line},
                            [=](int, int lane) { return lane + int(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, width, {"__shfl_xor_sync", file, line},
                            [=](int, int lane) { return lane ^ lanes; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::votes(mask, predicate, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::votes(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::votes(mask, predicate, {"__all_sync", file, line}) == mask;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline float __uint_as_float(unsigned bits) { return cuda_host::from_word<float>(bits); }
inline unsigned __float_as_uint(float x) { return unsigned(cuda_host::to_word(x)); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  return cuda_host::launch(
      *config, reinterpret_cast<const void*>(kernel),
      [](void* context) {
        Call& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return ::cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return ::cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t dynamic_shared) {
  return ::cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads,
                                                         dynamic_shared);
}
