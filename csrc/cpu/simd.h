// The SIMD vocabulary of the CPU kernels, on compiler vector extensions (GCC, Clang): one vector type per element type,
// as wide as the instruction set this file is compiled for. The same source serves every processor; the few intrinsics
// below only spell instructions the compiler does not find by itself.
//
// Everything that ends up in kernels lives in the namespace of its instruction set (HOPE_ISA): the same source is compiled
// once per set, and no inline function may be shared between objects built with different flags.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef HOPE_ISA
#error "HOPE_ISA names the instruction set the kernels are compiled for"
#endif

#define HOPE_INLINE inline __attribute__((always_inline))

namespace hope::cpu::HOPE_ISA {

using idx = int64_t;

#if defined(__AVX512F__)
#define HOPE_VECTOR_BYTES 64
constexpr int kTileVectors = 4;  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX__)
#define HOPE_VECTOR_BYTES 32
constexpr int kTileVectors = 2;  // 6 x 2 accumulators of 16 registers
#elif defined(__aarch64__)
#define HOPE_VECTOR_BYTES 16
constexpr int kTileVectors = 4;
#else
#define HOPE_VECTOR_BYTES 16
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

typedef float vfloat __attribute__((vector_size(HOPE_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(HOPE_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(HOPE_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(HOPE_VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(HOPE_VECTOR_BYTES)));
typedef float vfloat_u __attribute__((vector_size(HOPE_VECTOR_BYTES), aligned(4), may_alias));
typedef double vdouble_u __attribute__((vector_size(HOPE_VECTOR_BYTES), aligned(8), may_alias));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = vfloat;
  using Unaligned = vfloat_u;
  using Mask = vint32;
};
template <>
struct Simd<double> {
  using V = vdouble;
  using Unaligned = vdouble_u;
  using Mask = vint64;
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int kLanes = HOPE_VECTOR_BYTES / int(sizeof(T));

template <class T>
HOPE_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
HOPE_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
template <class T>
HOPE_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, signed zeros included: compiles to a bare broadcast
}
template <class T>
HOPE_INLINE Vec<T> zero() {
  return Vec<T>{};
}

HOPE_INLINE vfloat select(vint32 mask, vfloat a, vfloat b) { return mask ? a : b; }
HOPE_INLINE vdouble select(vint64 mask, vdouble a, vdouble b) { return mask ? a : b; }

HOPE_INLINE vfloat absolute(vfloat x) { return (vfloat)((vint32)x & 0x7fffffff); }
HOPE_INLINE vdouble absolute(vdouble x) { return (vdouble)((vint64)x & 0x7fffffffffffffffLL); }

// Bounds that let NaN through.
template <class T>
HOPE_INLINE Vec<T> at_least(Vec<T> x, T bound) {
#if defined(__AVX512F__)
  // Of two operands, one of them NaN, the instruction returns the second.
  if constexpr (sizeof(T) == 4) return (vfloat)_mm512_max_ps((__m512)broadcast(bound), (__m512)x);
#endif
  return select(x < bound, broadcast(bound), x);
}
template <class T>
HOPE_INLINE Vec<T> at_most(Vec<T> x, T bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vfloat)_mm512_min_ps((__m512)broadcast(bound), (__m512)x);
#endif
  return select(x > bound, broadcast(bound), x);
}

// 1 / x for normal x whose reciprocal is normal, relative error 1.2e-7.
HOPE_INLINE vfloat reciprocal(vfloat x) {
#if defined(__AVX512F__)
  // An estimate to 14 bits and a Newton step take a third of a division's time.
  const vfloat estimate = (vfloat)_mm512_rcp14_ps((__m512)x);
  return estimate + estimate * (1 - x * estimate);
#else
  return 1 / x;
#endif
}

// Two consecutive steps of a contraction in bfloat16, the first in the low half: what one instruction multiplies and adds in
// each lane, at twice float's rate. Only where the processor has it; kernels ask kHasPairs.
using Pair = uint32_t;
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
// a, b rounded to bfloat16, the pair (a[i], b[i]) in lane i.
HOPE_INLINE vint32 pair_up(vfloat a, vfloat b) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kOrder = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vint32)_mm512_permutexvar_epi16((__m512i)kOrder, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
// a then b rounded to bfloat16, in memory order: the pairs (a[0], a[1]) .. (b[14], b[15]).
HOPE_INLINE vint32 pairs_along(vfloat a, vfloat b) { return (vint32)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
#else
constexpr bool kHasPairs = false;
HOPE_INLINE vint32 pair_up(vfloat a, vfloat) { return (vint32)a; }
HOPE_INLINE vint32 pairs_along(vfloat a, vfloat) { return (vint32)a; }
#endif
HOPE_INLINE vint32 load(const Pair* p) {
  vint32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
HOPE_INLINE void store(Pair* p, vint32 v) { std::memcpy(p, &v, sizeof v); }

// sum += x * b in every lane; of pairs, both products.
HOPE_INLINE void multiply_add(vfloat& sum, float x, vfloat b) { sum += x * b; }
HOPE_INLINE void multiply_add(vdouble& sum, double x, vdouble b) { sum += x * b; }
HOPE_INLINE void multiply_add(vfloat& sum, Pair x, vint32 b) {
#if defined(__AVX512BF16__)
  sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)b);
#else
  (void)sum, (void)x, (void)b;
#endif
}

// Sum of all lanes, always in the same order.
template <class T>
HOPE_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Interleaves blocks of `kBlock` lanes of a and b: the low result takes the blocks at even positions of a and b, the high
// result those at odd positions. log2(lanes) such stages transpose a square block of vectors.
template <class T, int kBlock, bool kHigh>
HOPE_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  Vec<T> out;
  for (int i = 0; i < n; ++i) {
    const int block = i / kBlock, from = (block & ~1) + (kHigh ? 1 : 0);
    out[i] = (block & 1) ? b[from * kBlock + i % kBlock] : a[from * kBlock + i % kBlock];
  }
  return out;
#else
  typename Simd<T>::Mask index;
  for (int i = 0; i < n; ++i) {
    const int block = i / kBlock, from = (block & ~1) + (kHigh ? 1 : 0);
    index[i] = ((block & 1) ? n : 0) + from * kBlock + i % kBlock;
  }
  return __builtin_shuffle(a, b, index);
#endif
}

template <class T, int kBlock>
HOPE_INLINE void transpose_stage(Vec<T>* v) {
  if constexpr (kBlock < kLanes<T>) {
    Vec<T> w[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & kBlock) continue;
      w[i] = interleave<T, kBlock, false>(v[i], v[i + kBlock]);
      w[i + kBlock] = interleave<T, kBlock, true>(v[i], v[i + kBlock]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) v[i] = w[i];
    transpose_stage<T, kBlock * 2>(v);
  }
}

// Transposes a square block of lanes x lanes elements held in lanes vectors.
template <class T>
HOPE_INLINE void transpose_block(Vec<T>* v) {
  transpose_stage<T, 1>(v);
}

template <class T, int kBlock>
HOPE_INLINE void reduce_stage(Vec<T>* v) {
  if constexpr (kBlock < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * kBlock)
      v[i] = interleave<T, kBlock, false>(v[i], v[i + kBlock]) + interleave<T, kBlock, true>(v[i], v[i + kBlock]);
    reduce_stage<T, kBlock * 2>(v);
  }
}

// Lane i of the result is the sum over the lanes of v[i]; v is used up.
template <class T>
HOPE_INLINE Vec<T> sum_each(Vec<T>* v) {
  reduce_stage<T, 1>(v);
  return v[0];
}

HOPE_INLINE idx min(idx a, idx b) { return a < b ? a : b; }
HOPE_INLINE idx max(idx a, idx b) { return a > b ? a : b; }
HOPE_INLINE idx ceil_div(idx a, idx b) { return (a + b - 1) / b; }

}  // namespace hope::cpu::HOPE_ISA
