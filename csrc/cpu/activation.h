// Activations of a memory's hidden layer with their first and second derivatives, a vector at a time.
//
// float: 2^t by range reduction and a polynomial; sigmoid and tanh from it with both tails accurate; the normal
// distribution function as exp(-y^2) erfcx(y) with a polynomial erfcx. double: the standard library's functions.
// Error of the float versions over all finite inputs, against the exact function at the same float: act, act' and act''
// within 4e-7 max(1, |exact|). NaN in gives NaN out.
#pragma once

#include <cmath>

#include "../memory.h"
#include "simd.h"

namespace hope::cpu::HOPE_ISA {

// 2^t for |t| <= 125, relative error 1.1e-7 (t itself is rounded: add 4e-8 |t|).
HOPE_INLINE vfloat exp2_bounded(vfloat t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vfloat shifted = t + kRound;
  const vfloat f = t - (shifted - kRound);
  vfloat p = 1.3221359e-3f * f + 9.6716977e-3f;
  p = p * f + 5.5508835e-2f;
  p = p * f + 2.4022238e-1f;
  p = p * f + 6.9314686e-1f;
  p = p * f + 1.0f;
  return (vfloat)((vuint32)p + ((vuint32)shifted << 23));  // unsigned: what padding holds may overflow
}

// s = sigmoid(x / log2(e)), c = 1 - s, each to full relative accuracy; x comes scaled by log2(e). Beyond |x| = 125 both stay
// at the values they have there: 2^-125 and 1.
HOPE_INLINE void sigmoid2(vfloat x, vfloat& s, vfloat& c) {
  const vfloat e = exp2_bounded(at_most<float>(at_least<float>(-x, -125.0f), 125.0f));
  s = reciprocal(1 + e);
  c = e * s;
}

HOPE_INLINE void sigmoid2(vdouble x, vdouble& s, vdouble& c) {
  for (int i = 0; i < kLanes<double>; ++i) {
    const double e = std::exp(-std::abs(x[i]) * 0.69314718055994530942), large = 1 / (1 + e);
    s[i] = x[i] > 0 ? large : e * large;
    c[i] = x[i] > 0 ? e * large : large;
  }
}

// erfcx(y) = t * sum_i kErfcx[i] t^i with t = 1 / (1 + 0.4 y), y >= 0: relative error 2.3e-8.
constexpr float kErfcx[11] = {2.256758362e-01f, 2.256760746e-01f,  2.076080590e-01f, 1.718023419e-01f,
                              1.186341196e-01f, 8.522816002e-02f,  -4.974414781e-02f, 1.414354742e-01f,
                              -2.387362123e-01f, 1.419267058e-01f, -2.950643376e-02f};

// P = standard normal distribution function at x, p = its density.
HOPE_INLINE void normal(vfloat x, vfloat& P, vfloat& p) {
  const vfloat y = absolute(x) * 0.707106781f;
  const vfloat t2 = x * x * -0.721347520f;  // -x^2 / 2 in powers of 2
  const vfloat e = exp2_bounded(at_least<float>(t2, -125.0f));
  const vfloat t = reciprocal(1 + 0.4f * y);
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
    constexpr T k = T(1.59576912160573071176), cubic = k * T(0.044715), log2e = T(1.44269504088896340736);
    const Vec<T> low = at_least<T>(x, T(-1000)), y = at_most<T>(low, T(1000)), y2 = y * y;
    Vec<T> s, c;
    sigmoid2(y * (k * log2e + cubic * log2e * y2), s, c);
    a = low * s;
    if constexpr (kOrder >= 1) {
      const Vec<T> u1 = k + 3 * cubic * y2, sc = s * c, slope = sc * u1;
      d1 = s + y * slope;
      if constexpr (kOrder >= 2) d2 = slope * (2 + y * (u1 * (c - s))) + sc * (6 * cubic * y2);
    }
  }
};

template <class T>
struct Act<T, Activation::gelu> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    const Vec<T> low = at_least<T>(x, T(-40)), y = at_most<T>(low, T(40));
    Vec<T> P, p;
    normal(y, P, p);
    a = low * P;
    if constexpr (kOrder >= 1) d1 = P + y * p;
    if constexpr (kOrder >= 2) d2 = p * (2 - y * y);
  }
};

template <class T>
struct Act<T, Activation::silu> {
  template <int kOrder>
  static HOPE_INLINE void eval(Vec<T> x, Vec<T>& a, Vec<T>& d1, Vec<T>& d2) {
    const Vec<T> low = at_least<T>(x, T(-1000)), y = at_most<T>(low, T(1000));
    Vec<T> s, c;
    sigmoid2(y * T(1.44269504088896340736), s, c);
    a = low * s;
    if constexpr (kOrder >= 1) d1 = s + y * (s * c);
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
