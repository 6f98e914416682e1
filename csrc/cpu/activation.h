// Activations of a memory's hidden layer with their first and second derivatives, a vector at a time.
//
// float: exp by range reduction and a polynomial; sigmoid and tanh from exp(-|x|), so that both tails keep their relative
// accuracy; the normal distribution function as exp(-y^2) erfcx(y) with a polynomial erfcx. double: the standard library's
// functions. Maximum error of the float versions over all finite inputs, against the exact function at the same float:
// act and act' within 4e-7 * max(1, |act|), act'' within 2e-6. NaN in gives NaN out.
#pragma once

#include <cmath>

#include "../memory.h"
#include "simd.h"

namespace hope::cpu::HOPE_ISA {

// exp(x) for x <= 0 (0 below the smallest normal float).
HOPE_INLINE vfloat exp_nonpositive(vfloat x) {
  constexpr float kLog2e = 1.44269502f, kLog2eLow = 1.92596298e-8f, kRound = 12582912.0f;  // 1.5 * 2^23
  const vint32 tiny = x < -87.0f;
  const vfloat clamped = select(tiny, broadcast(-87.0f), x);
  const vfloat shifted = clamped * kLog2e + kRound;
  const vfloat n = shifted - kRound;
  const vfloat f = (clamped * kLog2e - n) + clamped * kLog2eLow;
  vfloat p = 1.5370976e-4f * f + 1.3399868e-3f;
  p = p * f + 9.6183727e-3f;
  p = p * f + 5.5503290e-2f;
  p = p * f + 2.4022649e-1f;
  p = p * f + 6.9314721e-1f;
  p = p * f + 1.0f;
  const vint32 power = ((vint32)shifted << 23) + (vint32)broadcast(1.0f);
  return select(tiny, vfloat{}, p * (vfloat)power);
}

HOPE_INLINE vdouble exp_nonpositive(vdouble x) {
  vdouble out;
  for (int i = 0; i < kLanes<double>; ++i) out[i] = std::exp(x[i]);
  return out;
}

// s = sigmoid(x), c = 1 - s, each to full relative accuracy.
template <class V>
HOPE_INLINE void sigmoid(V x, V& s, V& c) {
  const V e = exp_nonpositive(-absolute(x));
  const V large = 1 / (1 + e), small = e * large;
  const auto positive = x > 0;
  s = select(positive, large, small);
  c = select(positive, small, large);
}

// erfcx(y) = t * sum_i kErfcx[i] t^i with t = 1 / (1 + 0.4 y), y >= 0: relative error 2.3e-8.
constexpr float kErfcx[11] = {2.256758362e-01f, 2.256760746e-01f,  2.076080590e-01f, 1.718023419e-01f,
                              1.186341196e-01f, 8.522816002e-02f,  -4.974414781e-02f, 1.414354742e-01f,
                              -2.387362123e-01f, 1.419267058e-01f, -2.950643376e-02f};

// P = standard normal distribution function at x, p = its density.
HOPE_INLINE void normal(vfloat x, vfloat& P, vfloat& p) {
  const vfloat y = absolute(x) * 0.707106781f;
  const vfloat e = exp_nonpositive(-0.5f * x * x);
  const vfloat t = 1 / (1 + 0.4f * y);
  vfloat q = broadcast(kErfcx[10]);
#pragma GCC unroll 10
  for (int i = 9; i >= 0; --i) q = q * t + kErfcx[i];
  const vfloat tail = 0.5f * e * (q * t);
  P = select(x > 0, 1 - tail, tail);
  p = e * 0.398942280f;
}

HOPE_INLINE void normal(vdouble x, vdouble& P, vdouble& p) {
  for (int i = 0; i < kLanes<double>; ++i) {
    P[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    p[i] = std::exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
}

template <class T, Activation kActivation>
struct Act;

// x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the same function as 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
template <class T>
struct Act<T, Activation::gelu_tanh> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    constexpr T k = T(1.59576912160573071176), cubic = T(0.044715);
    // Far out the sigmoid is 0 or 1: the clamp keeps its argument's powers finite.
    const Vec<T> y = select(x > T(40), broadcast(T(40)), select(x < T(-40), broadcast(T(-40)), x));
    const Vec<T> y2 = y * y;
    Vec<T> s, c;
    sigmoid<Vec<T>>(y * (k + k * cubic * y2), s, c);
    a = x * s;
    if constexpr (kOrder >= 1) {
      const Vec<T> u1 = k + 3 * k * cubic * y2, slope = s * c * u1;
      d1 = s + y * slope;
      if constexpr (kOrder >= 2) d2 = slope * (2 + y * u1 * (c - s)) + y * s * c * (6 * k * cubic * y);
    }
  }
};

template <class T>
struct Act<T, Activation::gelu> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    const Vec<T> y = select(x > T(40), broadcast(T(40)), select(x < T(-40), broadcast(T(-40)), x));
    Vec<T> P, p;
    normal(y, P, p);
    a = x * P;
    if constexpr (kOrder >= 1) d1 = P + y * p;
    if constexpr (kOrder >= 2) d2 = p * (2 - y * y);
  }
};

template <class T>
struct Act<T, Activation::silu> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    // exp(-745) is the smallest positive double.
    const Vec<T> y = select(x > T(800), broadcast(T(800)), select(x < T(-800), broadcast(T(-800)), x));
    Vec<T> s, c;
    sigmoid<Vec<T>>(y, s, c);
    a = x * s;
    if constexpr (kOrder >= 1) d1 = s + y * s * c;
    if constexpr (kOrder >= 2) d2 = s * c * (2 + y * (c - s));
  }
};

template <class T>
struct Act<T, Activation::relu2> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    const auto off = x <= 0;  // false for NaN, which passes through
    const Vec<T> r = select(off, zero<T>(), x);
    a = r * r;
    if constexpr (kOrder >= 1) d1 = r + r;
    if constexpr (kOrder >= 2) d2 = select(off, zero<T>(), broadcast(T(2)));
  }
};

// Calls body(Act<T, activation>{}).
template <class T, class F>
HOPE_INLINE void with_activation(Activation activation, F&& body) {
  switch (activation) {
    case Activation::gelu_tanh: return body(Act<T, Activation::gelu_tanh>{});
    case Activation::gelu: return body(Act<T, Activation::gelu>{});
    case Activation::silu: return body(Act<T, Activation::silu>{});
    case Activation::relu2: return body(Act<T, Activation::relu2>{});
  }
}

}  // namespace hope::cpu::HOPE_ISA
