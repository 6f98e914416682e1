// Moves token rows and weight matrices between caller memory (any dtype, any strides) and scratch panels (T).
#pragma once

#include "../memory.h"
#include "matrix.h"

namespace hope::cpu::HOPE_ISA {

template <class To, class From>
HOPE_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

HOPE_INLINE float from_bfloat16(uint16_t x) { return bits_of<float>(uint32_t(x) << 16); }

// Round to nearest even; NaN stays NaN.
HOPE_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

HOPE_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
  // The half's exponent re-biased by an exact multiplication, which also normalises subnormals.
  uint32_t u = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
  u = (x & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : u;
  return bits_of<float>(u | uint32_t(x & 0x8000u) << 16);
}

HOPE_INLINE uint16_t to_float16(float x) {
  const uint32_t u = bits_of<uint32_t>(x), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of the smallest subnormal, nearest even.
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = half > 0x7c00u || magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(half | (u >> 16 & 0x8000u));
}

template <DType kType>
struct Element;
template <>
struct Element<DType::float32> {
  using Memory = float;
  static HOPE_INLINE float read(float x) { return x; }
  template <class T>
  static HOPE_INLINE float write(T x) { return float(x); }
};
template <>
struct Element<DType::float64> {
  using Memory = double;
  static HOPE_INLINE double read(double x) { return x; }
  template <class T>
  static HOPE_INLINE double write(T x) { return double(x); }
};
template <>
struct Element<DType::bfloat16> {
  using Memory = uint16_t;
  static HOPE_INLINE float read(uint16_t x) { return from_bfloat16(x); }
  template <class T>
  static HOPE_INLINE uint16_t write(T x) { return to_bfloat16(float(x)); }
};
template <>
struct Element<DType::float16> {
  using Memory = uint16_t;
  static HOPE_INLINE float read(uint16_t x) { return from_float16(x); }
  template <class T>
  static HOPE_INLINE uint16_t write(T x) { return to_float16(float(x)); }
};

// Calls body(Element<dtype>{}).
template <class F>
HOPE_INLINE void with_element(DType dtype, F&& body) {
  switch (dtype) {
    case DType::float32: return body(Element<DType::float32>{});
    case DType::float64: return body(Element<DType::float64>{});
    case DType::bfloat16: return body(Element<DType::bfloat16>{});
    case DType::float16: return body(Element<DType::float16>{});
  }
}

// Rows [0, to.rows) of `to` = token rows at `from`, `stride` elements apart. Padding becomes 0.
template <class T>
void load_rows(const Team& team, const Mat<T>& to, const void* from, DType dtype, idx stride) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* source = static_cast<const typename E::Memory*>(from);
    team.blocks(to.rows, to.axis, [&](idx p, idx r0, idx r1) {
      const idx valid = to.axis.valid(p);
      for (idx r = r0; r < r1; ++r) {
        T* o = to.at(p, r);
        const auto* s = source + r * stride + p * to.axis.width;
        for (idx c = 0; c < valid; ++c) o[c] = T(E::read(s[c]));
        for (idx c = valid; c < to.axis.width; ++c) o[c] = T(0);
      }
    });
  });
}

template <class T>
void store_rows(const Team& team, void* to, DType dtype, idx stride, const Mat<T>& from) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    auto* target = static_cast<typename E::Memory*>(to);
    team.blocks(from.rows, from.axis, [&](idx p, idx r0, idx r1) {
      const idx valid = from.axis.valid(p);
      for (idx r = r0; r < r1; ++r) {
        const T* s = from.at(p, r);
        auto* o = target + r * stride + p * from.axis.width;
        for (idx c = 0; c < valid; ++c) o[c] = E::write(s[c]);
      }
    });
  });
}

inline idx element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline void zero_rows(void* to, DType dtype, idx stride, idx rows, idx n) {
  const idx size = element_size(dtype);
  for (idx r = 0; r < rows; ++r) std::memset(static_cast<char*>(to) + r * stride * size, 0, size_t(n * size));
}

inline const void* offset(const void* data, DType dtype, idx elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}
inline void* offset(void* data, DType dtype, idx elements) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// `to` [in, out] = the matrix of one sequence and head of a view. A transposed view (unit stride along `in`) is read in
// square blocks, so that both sides stay within a few cache lines.
template <class T>
void load_matrix(const Team& team, const Mat<T>& to, const MatrixView& view, idx sequence, idx head) {
  with_element(view.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* source =
        static_cast<const typename E::Memory*>(view.data) + sequence * view.sequence + head * view.head;
    constexpr idx kBlock = 16;
    team.blocks(to.rows, to.axis, [&](idx p, idx r0, idx r1) {
      const idx valid = to.axis.valid(p), column = p * to.axis.width;
      if (view.out == 1) {
        for (idx r = r0; r < r1; ++r) {
          T* o = to.at(p, r);
          const auto* s = source + r * view.in + column;
          for (idx c = 0; c < valid; ++c) o[c] = T(E::read(s[c]));
        }
      } else {
        for (idx rb = r0; rb < r1; rb += kBlock)
          for (idx cb = 0; cb < valid; cb += kBlock)
            for (idx c = cb; c < min(valid, cb + kBlock); ++c)
              for (idx r = rb; r < min(r1, rb + kBlock); ++r)
                to.at(p, r)[c] = T(E::read(source[r * view.in + (column + c) * view.out]));
      }
      if (valid < to.axis.width)
        for (idx r = r0; r < r1; ++r)
          std::memset(to.at(p, r) + valid, 0, size_t(to.axis.width - valid) * sizeof(T));
    });
  });
}

// Contiguous [in, out] in the state dtype.
template <class T>
void store_matrix(const Team& team, T* to, const Mat<T>& from) {
  team.blocks(from.rows, from.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r)
      std::memcpy(to + r * from.axis.n + p * from.axis.width, from.at(p, r),
                  size_t(from.axis.valid(p)) * sizeof(T));
  });
}

template <class T>
void load_contiguous(const Team& team, const Mat<T>& to, const T* from) {
  MatrixView view;
  view.data = const_cast<T*>(from);
  view.dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  view.in = to.axis.n;
  view.out = 1;
  load_matrix(team, to, view, 0, 0);
}

}  // namespace hope::cpu::HOPE_ISA
