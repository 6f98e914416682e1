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

// x sigmoid(linear x + cubic x^3), which two activations are: silu, and gelu_tanh, 0.5 x (1 + tanh(..)).
struct Sigmoidal {
  float linear, cubic;
};
__host__ __device__ __forceinline__ Sigmoidal sigmoidal_of(Activation activation) {
  constexpr float k = 1.59576912f;
  return activation == Activation::silu ? Sigmoidal{1.0f, 0.0f} : Sigmoidal{k, k * 0.044715f};
}
// What one branch computes.
enum class Branch { sigmoidal, gelu, relu2 };

template <DType kType, Branch kBranch>
struct Act {
  const Sigmoidal& of;  // where constants are operands of an instruction: no register holds them

  // x <- act(x); slope = act'(x).
  __device__ __forceinline__ void operator()(float& x, float& slope) const {
    float curve;
    (*this)(x, slope, curve);
  }
  // The same; curve = act''(x).
  __device__ __forceinline__ void operator()(float& x, float& slope, float& curve) const {
    constexpr float kLimit = 1000.0f;
    const float from_below = x < -kLimit ? -kLimit : x, y = bounded(x, kLimit);
    if constexpr (kBranch == Branch::sigmoidal) {
      const float cy = of.cubic * y, cy2 = cy * y, s = sigmoid<kType>(y * (cy2 + of.linear)), ds = s - s * s;
      const float du = fmaf(3.0f, cy2, of.linear);
      x = from_below * s;
      slope = fmaf(y * ds, du, s);
      curve = ds * fmaf(y, fmaf(fmaf(-2.0f, s, 1.0f) * du, du, 6.0f * cy), du + du);
    } else if constexpr (kBranch == Branch::gelu) {
      // 0.5 erfc(|y| / sqrt 2) by Abramowitz and Stegun 7.1.26, absolute error below 3e-7: its exponential is the density's.
      const float bell = fast_exp2(-0.721347520f * y * y), t = fast_reciprocal(fmaf(0.231641888f, fabsf(y), 1.0f));
      const float high = fmaf(t, fmaf(t, 0.530702715f, -0.726576014f), 0.710706871f);
      const float tail = bell * t * fmaf(t, fmaf(t, high, -0.142248368f), 0.127414796f);
      const float p = y < 0.0f ? tail : 1.0f - tail, density = 0.398942280f * bell;
      x = from_below * p;
      slope = fmaf(y, density, p);
      curve = density * fmaf(-y, y, 2.0f);
    } else {
      const float r = x <= 0.0f ? 0.0f : x;  // NaN passes through
      curve = x <= 0.0f ? 0.0f : 2.0f;
      x = r * r;
      slope = r + r;
    }
  }
};

// Calls body(Act<kType, ..>): one branch for all the numbers `body` goes through. Each is code of every kernel, wherever it
// calls this. `constants`: sigmoidal_of(activation), in the kernel's parameters.
template <DType kType, class Body>
__device__ __forceinline__ void with_activation(Activation activation, const Sigmoidal& constants, const Body& body) {
  switch (activation) {
    case Activation::gelu_tanh:
    case Activation::silu: return body(Act<kType, Branch::sigmoidal>{constants});
    case Activation::gelu: return body(Act<kType, Branch::gelu>{constants});
    case Activation::relu2: return body(Act<kType, Branch::relu2>{constants});
  }
}

}  // namespace hope::cuda
