// Two 16-bit numbers in one 32-bit register: what tensor-core instructions take, in bfloat16 or float16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/ptx.h"
#include "memory.h"

namespace hope::cuda {

// The power of two with the exponent of x >= 0, within 2^-100 .. 2^100, and 1 where there is none: 0, infinity, NaN.
__device__ __forceinline__ float power_of_two_below(float x) {
  constexpr float kSmallest = 0x1p-100f, kLargest = 0x1p100f;
  if (!(x > 0.0f && x <= 3.4e38f)) return 1.0f;
  if (x < kSmallest) return kSmallest;
  if (x > kLargest) return kLargest;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7f800000u;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <DType kType>
struct Pair;

template <>
struct Pair<DType::bfloat16> {
  using Element = __nv_bfloat16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    __nv_bfloat162 both;
    memcpy(static_cast<void*>(&both), &bits, sizeof(bits));
    return __bfloat1622float2(both);
  }
  // x += A B.
  static __device__ __forceinline__ void mma(float (&x)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(x, a, b);
  }
};

template <>
struct Pair<DType::float16> {
  using Element = __half;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    __half2 both;
    memcpy(static_cast<void*>(&both), &bits, sizeof(bits));
    return __half22float2(both);
  }
  // x += A B.
  static __device__ __forceinline__ void mma(float (&x)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(x, a, b);
  }
};

}  // namespace hope::cuda
