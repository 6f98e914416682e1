// Products of a few rows, one per sequence, with weights that all sequences share, read where they lie in the tokens' dtype:
// bound by that one pass over them. A sum has one order, whatever the number of rows and threads.
#pragma once

#include <type_traits>

#include "convert.h"

namespace hope::cpu::HOPE_ISA {

// One row per sequence: n numbers, with zeros behind them up to a whole vector.
template <class T>
struct TokenRows {
  T* data = nullptr;
  idx rows = 0, n = 0, stride = 0;

  static TokenRows make(Arena& arena, idx rows, idx n) {
    const idx stride = ceil_div(n, kLanes<T>) * kLanes<T>;
    return {arena.array<T>(rows * stride), rows, n, stride};
  }
  HOPE_INLINE T* at(idx row) const { return data + row * stride; }
  void pad(idx row) const {
    for (idx i = n; i < stride; ++i) at(row)[i] = 0;
  }
};

// As with_element, for tokens whose state has type T.
template <class T, class F>
HOPE_INLINE void with_token_element(DType dtype, F&& body) {
  if constexpr (sizeof(T) == 8)
    body(Element<DType::float64>{});
  else if (dtype == DType::bfloat16)
    body(Element<DType::bfloat16>{});
  else if (dtype == DType::float16)
    body(Element<DType::float16>{});
  else
    body(Element<DType::float32>{});
}

// Multiply-adds that are worth waking threads for.
constexpr idx kThreadedWork = idx(1) << 17;
// Rows multiplied at a time: a block of weights is read (and widened) once for so many.
constexpr int kRowsTogether = 4;

// `n` numbers at `from` in the state dtype: where they lie if they are so already and whole vectors can be read, else in `room`,
// zeros behind them up to `width`.
template <class T, class E>
HOPE_INLINE const T* widened(const typename E::Memory* from, idx n, idx width, T* room) {
  if constexpr (std::is_same_v<typename E::Memory, T>)
    if (n == width) return from;
  for (idx i = 0; i < n; ++i) room[i] = T(E::read(from[i]));
  for (idx i = n; i < width; ++i) room[i] = 0;
  return room;
}

// Calls body(first row, number of rows as a constant) over all rows.
template <class F>
HOPE_INLINE void row_groups(idx rows, F&& body) {
  idx b = 0;
  for (; b + kRowsTogether <= rows; b += kRowsTogether) body(b, std::integral_constant<int, kRowsTogether>{});
  for (; b < rows; ++b) body(b, std::integral_constant<int, 1>{});
}

// y[b][j] = bias[j] + sum_i x[b][i] W[j][i], as torch.nn.Linear keeps W: [y.n, x.n]. `bias` may be absent.
template <class T>
void multiply_transposed(int threads, DType dtype, const TokenRows<T>& x, const void* weight, const void* bias,
                         const TokenRows<T>& y) {
  constexpr idx kOutputs = 4, kPiece = 16, kBlock = 256;
  const Team team{x.rows * x.n * y.n < kThreadedWork ? 1 : threads};
  with_token_element<T>(dtype, [&](auto element) {
    using E = decltype(element);
    using Memory = typename E::Memory;
    const auto* w = static_cast<const Memory*>(weight);
    const auto* offsets = static_cast<const Memory*>(bias);
    team.each(ceil_div(y.n, kPiece), [&](idx piece) {
      for (idx j = piece * kPiece; j < min(y.n, (piece + 1) * kPiece); j += kOutputs) {
        const idx count = min(kOutputs, y.n - j);
        row_groups(x.rows, [&](idx b, auto together) {
          constexpr int kRows = decltype(together)::value;
          Vec<T> sum[kRows][kOutputs] = {};
          for (idx i = 0; i < x.n; i += kBlock) {
            const idx valid = min(kBlock, x.n - i), width = ceil_div(valid, kLanes<T>) * kLanes<T>;
            alignas(64) T room[kOutputs][kBlock];
            const T* rows[kOutputs];
            for (idx o = 0; o < kOutputs; ++o)  // beyond the last output: the last one again, not stored
              rows[o] = widened<T, E>(w + (j + min(o, count - 1)) * x.n + i, valid, width, room[o]);
            for (idx c = 0; c < width; c += kLanes<T>) {
              Vec<T> weights[kOutputs];
#pragma GCC unroll 4
              for (idx o = 0; o < kOutputs; ++o) weights[o] = load(rows[o] + c);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) {
                const Vec<T> input = load(x.at(b + r) + i + c);
#pragma GCC unroll 4
                for (idx o = 0; o < kOutputs; ++o) sum[r][o] += input * weights[o];
              }
            }
          }
          for (int r = 0; r < kRows; ++r)
            for (idx o = 0; o < count; ++o)
              y.at(b + r)[j + o] = sum_lanes<T>(sum[r][o]) + (offsets ? T(E::read(offsets[j + o])) : T(0));
        });
      }
    });
  });
}

// y[b][j] = sum_i x[b][i] W[i][j], W [x.n, y.n]: several rows of W at a time, along them.
template <class T>
void multiply(int threads, DType dtype, const TokenRows<T>& x, const void* weight, const TokenRows<T>& y) {
  constexpr idx kDepth = 8, kMostColumns = 512, kFewestColumns = 64;
  const Team team{x.rows * x.n * y.n < kThreadedWork ? 1 : threads};
  const idx share = ceil_div(ceil_div(y.n, team.threads), kFewestColumns) * kFewestColumns;
  const idx columns = min(kMostColumns, share);
  with_token_element<T>(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* w = static_cast<const typename E::Memory*>(weight);
    team.each(ceil_div(y.n, columns), [&](idx piece) {
      const idx j = piece * columns, valid = min(columns, y.n - j), width = ceil_div(valid, kLanes<T>) * kLanes<T>;
      alignas(64) T room[kDepth][kMostColumns];
      row_groups(x.rows, [&](idx b, auto together) {
        constexpr int kRows = decltype(together)::value;
        for (int r = 0; r < kRows; ++r) std::memset(y.at(b + r) + j, 0, size_t(width) * sizeof(T));
        const auto add = [&](idx i, auto depth) {
          constexpr idx kRowsOfW = decltype(depth)::value;
          const T* rows[kRowsOfW];
          for (idx d = 0; d < kRowsOfW; ++d) rows[d] = widened<T, E>(w + (i + d) * y.n + j, valid, width, room[d]);
          for (idx c = 0; c < width; c += kLanes<T>) {
            Vec<T> sum[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r] = load(y.at(b + r) + j + c);
#pragma GCC unroll 8
            for (idx d = 0; d < kRowsOfW; ++d) {
              const Vec<T> weights = load(rows[d] + c);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) multiply_add(sum[r], x.at(b + r)[i + d], weights);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) store(y.at(b + r) + j + c, sum[r]);
          }
        };
        idx i = 0;
        for (; i + kDepth <= x.n; i += kDepth) add(i, std::integral_constant<idx, kDepth>{});
        for (; i < x.n; ++i) add(i, std::integral_constant<idx, 1>{});
      });
    });
  });
}

}  // namespace hope::cpu::HOPE_ISA
