// Activations of a memory's hidden layer, their slopes and second derivatives, in float32.
//
// What rounds its results to bfloat16 (relative 2^-9) takes the tanh instruction, relative error 2^-11 and one special-function
// operation for each value; float16 (2^-12) takes exp2 and a reciprocal, accurate to 2^-22. NaN in gives NaN out; the
// arguments are bounded where a huge one would make 0 * infinity.
#pragma once

#include <cmath>
#include <cstdint>

#include "memory.h"

namespace hope::cuda {

// The instructions on a device, the standard library's functions where a host compiler builds this.
__device__ __forceinline__ float fast_tanh(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::tanh(x);
#endif
}

__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

template <DType kType>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (kType == DType::bfloat16) return fmaf(0.5f, fast_tanh(0.5f * x), 0.5f);
  return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * x));
}

__device__ __forceinline__ float bounded(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

template <DType kType, Activation kActivation>
struct Act {
  // x <- act(x); slope = act'(x).
  __device__ __forceinline__ void operator()(float& x, float& slope) const {
    float curve;
    (*this)(x, slope, curve);
  }
  // The same; curve = act''(x).
  __device__ __forceinline__ void operator()(float& x, float& slope, float& curve) const {
    constexpr float kLimit = 1000.0f;
    const float from_below = x < -kLimit ? -kLimit : x, y = bounded(x, kLimit);
    if constexpr (kActivation == Activation::gelu_tanh) {
      // 0.5 x (1 + tanh(u / 2)) = x sigmoid(u), u = k x + kc x^3.
      constexpr float k = 1.59576912f, kc = k * 0.044715f;
      const float y2 = y * y, s = sigmoid<kType>(y * fmaf(kc, y2, k)), ds = s - s * s, du = fmaf(3.0f * kc, y2, k);
      x = from_below * s;
      slope = fmaf(y * ds, du, s);
      curve = ds * fmaf(y, fmaf(fmaf(-2.0f, s, 1.0f) * du, du, 6.0f * kc * y), du + du);
    } else if constexpr (kActivation == Activation::gelu) {
      // 0.5 erfc(|y| / sqrt 2) by Abramowitz and Stegun 7.1.26, absolute error below 3e-7: its exponential is the density's.
      const float bell = fast_exp2(-0.721347520f * y * y), t = fast_reciprocal(fmaf(0.231641888f, fabsf(y), 1.0f));
      const float high = fmaf(t, fmaf(t, 0.530702715f, -0.726576014f), 0.710706871f);
      const float tail = bell * t * fmaf(t, fmaf(t, high, -0.142248368f), 0.127414796f);
      const float p = y < 0.0f ? tail : 1.0f - tail, density = 0.398942280f * bell;
      x = from_below * p;
      slope = fmaf(y, density, p);
      curve = density * fmaf(-y, y, 2.0f);
    } else if constexpr (kActivation == Activation::silu) {
      const float s = sigmoid<kType>(y), ds = s - s * s;
      x = from_below * s;
      slope = fmaf(y, ds, s);
      curve = ds * fmaf(y, fmaf(-2.0f, s, 1.0f), 2.0f);
    } else {
      const float r = x <= 0.0f ? 0.0f : x;  // NaN passes through
      curve = x <= 0.0f ? 0.0f : 2.0f;
      x = r * r;
      slope = r + r;
    }
  }
};

// Calls body(Act<kType, activation>{}): one branch for all the numbers `body` goes through.
template <DType kType, class Body>
__device__ __forceinline__ void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu_tanh: return body(Act<kType, Activation::gelu_tanh>{});
    case Activation::gelu: return body(Act<kType, Activation::gelu>{});
    case Activation::silu: return body(Act<kType, Activation::silu>{});
    case Activation::relu2: return body(Act<kType, Activation::relu2>{});
  }
}

}  // namespace hope::cuda
