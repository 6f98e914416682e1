// Register-blocked matrix products on panels. FLOPs: 2 M N K; a tile of 6 rows x kTileVectors vectors keeps its sums in
// registers for a block of the contraction and reads 6 + kTileVectors values per 6 * kTileVectors multiply-adds.
//
//   gemm_nn   C = beta * Cin + alpha * A B         activations through weights
//   gemm_tn   C = beta * Cin + alpha * A^T B       weight updates
//   gemm_nt   C = beta * Cin + alpha * A B^T       errors through weights: gemm_nn on a transposed copy, or, for the few
//                                                  rows of a tiny chunk, dot products along B's rows
//
// Every element of C is one sum in the order of the contraction index, cut into blocks whose size depends on the
// contraction's length only: it does not depend on M, on N, nor on the threads that share the work.
//
// A team that rounds multiplies in bfloat16 and adds in float32, on processors with an instruction for that. It takes two
// steps of the contraction at once: the operands of a tile are packed into pairs first, B once for all rows.
#pragma once

#include <type_traits>

#include "matrix.h"

namespace hope::cpu::HOPE_ISA {

constexpr idx kContractionBlock = 512;  // 512 rows of a 256-byte panel: 128 KiB, a quarter of a small L2
constexpr idx kRowChunk = 96;           // rows of C per piece of a team
constexpr idx kAheadLength = 32;        // contraction steps that hide the way of a tile of C from memory
template <class T>
constexpr idx kStreamColumns = 4096 / idx(sizeof(T));  // sums of a row that stay in the first cache beside what streams past
constexpr idx kPackedRowChunk = 384;    // the same where each piece packs its panel of B first
constexpr idx kPackedPanels = 4;        // and of A^T, panels
constexpr idx kPackedBlock = 256;       // steps packed at a time: a panel of pairs fills 32 KiB

// Operand A of a tile: element (row i, contraction k) of segment s. An element is a number or, packed, a pair of steps.
template <class E>
struct Strip {
  const E* data;
  idx stride;  // not transposed: between rows i; transposed: between contraction steps k
  idx segments, length, last_length, segment_stride;
};

template <class T, class E, int kRows, int kVectors, bool kTransposed>
void tile(const Strip<E>& a, const E* b, idx ldb, const T* cin, idx ldcin, T* c, idx ldc, T alpha, T beta) {
  using V = Vec<T>;
  constexpr int L = kLanes<T>;
  constexpr bool kAhead = !kTransposed && kRows > kTileRows / 2 && std::is_same_v<E, T>;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero<T>();
  const E* segment = a.data;
  if (beta != T(0)) {  // needed when the sums are done; by a short contraction, in the next tile
    const T* soon = a.length >= kAheadLength ? cin : cin + kRows * ldcin;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) __builtin_prefetch(soon + i * ldcin + j * L, 0, 3);
  }
  for (idx s = 0; s < a.segments; ++s, segment += a.segment_stride) {
    const idx length = s + 1 == a.segments ? a.last_length : a.length;
    const E* ak = segment;
    // The next tile's rows follow in the panel; the hardware's own prefetch does not start for so few.
    const char* ahead = reinterpret_cast<const char*>(segment + kRows * a.stride);
// Two steps per turn: the loop's own instructions would cost several per cent of the multiply-adds.
#pragma GCC unroll 2
    for (idx k = 0; k < length; ++k) {
      if constexpr (kAhead) __builtin_prefetch(ahead + k * (kRows * sizeof(E)), 0, 2);
      decltype(load(b)) bk[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) bk[j] = load(b + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const E x = kTransposed ? ak[i] : ak[i * a.stride];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) multiply_add(sum[i][j], x, bk[j]);
      }
      b += ldb;
      ak += kTransposed ? a.stride : 1;
    }
  }
  if (beta == T(0) && alpha == T(1)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * L, sum[i][j]);
  } else if (beta == T(0)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * L, alpha * sum[i][j]);
  } else if (beta == T(1)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        store(c + i * ldc + j * L, load(cin + i * ldcin + j * L) + alpha * sum[i][j]);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        store(c + i * ldc + j * L, beta * load(cin + i * ldcin + j * L) + alpha * sum[i][j]);
  }
}

template <class T, class E>
using TileFunction = void (*)(const Strip<E>&, const E*, idx, const T*, idx, T*, idx, T, T);

template <class T, class E, bool kTransposed>
constexpr TileFunction<T, E> kTiles[kTileRows][4] = {
    {tile<T, E, 1, 1, kTransposed>, tile<T, E, 1, 2, kTransposed>,
     tile<T, E, 1, 3, kTransposed>, tile<T, E, 1, 4, kTransposed>},
    {tile<T, E, 2, 1, kTransposed>, tile<T, E, 2, 2, kTransposed>,
     tile<T, E, 2, 3, kTransposed>, tile<T, E, 2, 4, kTransposed>},
    {tile<T, E, 3, 1, kTransposed>, tile<T, E, 3, 2, kTransposed>,
     tile<T, E, 3, 3, kTransposed>, tile<T, E, 3, 4, kTransposed>},
    {tile<T, E, 4, 1, kTransposed>, tile<T, E, 4, 2, kTransposed>,
     tile<T, E, 4, 3, kTransposed>, tile<T, E, 4, 4, kTransposed>},
    {tile<T, E, 5, 1, kTransposed>, tile<T, E, 5, 2, kTransposed>,
     tile<T, E, 5, 3, kTransposed>, tile<T, E, 5, 4, kTransposed>},
    {tile<T, E, 6, 1, kTransposed>, tile<T, E, 6, 2, kTransposed>,
     tile<T, E, 6, 3, kTransposed>, tile<T, E, 6, 4, kTransposed>},
};

// Runs tiles over rows [0, rows) and `vectors` vectors of one panel of C.
template <class T, bool kTransposed, class E>
void tile_rows(Upcoming* upcoming, const Strip<E>& a, idx row_step, const E* b, idx ldb, const T* cin, idx ldcin, T* c,
               idx ldc, idx rows, idx vectors, T alpha, T beta) {
  const idx count = ceil_div(rows, kTileRows);
  if (count == 0) return;
  // Few rows leave registers for wider tiles, which hide the latency of the multiply-adds.
  const idx wide = rows <= kTileRows / 2 ? 4 : kTileVectors;
  idx row = 0;
  for (idx t = 0; t < count; ++t) {
    const idx height = rows / count + (t < rows % count ? 1 : 0);
    Strip<E> strip = a;
    strip.data += row * row_step;
    for (idx v = 0; v < vectors; v += wide) {
      const idx column = v * kLanes<T>;
      kTiles<T, E, kTransposed>[height - 1][min(wide, vectors - v) - 1](
          strip, b + column, ldb, cin + row * ldcin + column, ldcin, c + row * ldc + column, ldc, alpha, beta);
    }
    row += height;
    if (upcoming) upcoming->step();
  }
}

template <class T>
HOPE_INLINE idx panel_vectors(const Axis& axis, idx panel) {
  return ceil_div(axis.valid(panel), kLanes<T>);
}

template <class T>
constexpr bool rounds_products() {
  return kHasPairs && std::is_same_v<T, float>;
}

constexpr idx kPanelPairs = 64;  // columns of a packed panel

// Pairs that hold any operand A of `rows` rows and columns `axis`, packed along its rows or down its columns.
HOPE_INLINE idx packed_size(idx rows, const Axis& axis) { return axis.panels * kPanelPairs * (rows / 2 + 1); }

// Rows [0, length) of a panel, `vectors` vectors of each, into pairs: row t of `to` takes rows 2 t and 2 t + 1.
HOPE_INLINE void pack_columns(Pair* to, const float* from, idx ld, idx length, idx vectors) {
  for (idx k = 0; k < length; k += 2, to += kPanelPairs, from += 2 * ld)
    for (idx c = 0; c < vectors * kLanes<float>; c += kLanes<float>)
      store(to + c, pair_up(load(from + c), k + 1 < length ? load(from + ld + c) : zero<float>()));
}

// One row of A into pairs along the row.
template <class T>
HOPE_INLINE void pack_row(Pair* to, const Mat<T>& a, idx row) {
  constexpr idx L = kLanes<T>;
  for (idx p = 0; p < a.axis.panels; ++p, to += kPanelPairs / 2) {
    const T* from = a.at(p, row);
    const idx valid = a.axis.valid(p);
    for (idx c = 0; c < valid; c += 2 * L)
      store(to + c / 2, pairs_along(load(from + c), c + L < valid ? load(from + c + L) : zero<T>()));
    if (valid % 2 != 0) to[valid / 2] &= 0xffff;  // padding may hold anything
  }
}

// gemm_nn and gemm_tn below, in bfloat16: A is packed as a whole, a panel of B for all rows of a piece.
template <class T>
void packed_nn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& cin, const Mat<T>& c, T alpha, T beta) {
  const idx depth = a.axis.n, stride = a.axis.panels * (kPanelPairs / 2);
  const idx chunk = team.threads > 1 ? kPackedRowChunk : max(1, a.rows), chunks = ceil_div(a.rows, chunk);
  team.blocks(a.rows, make_axis<T>(1), [&](idx, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) pack_row(team.packed + r * stride, a, r);
  });
  team.each(c.axis.panels * chunks, [&](idx piece) {
    const idx p = piece / chunks, first = piece % chunks * chunk, rows = min(chunk, a.rows - first);
    const idx vectors = panel_vectors<T>(c.axis, p);
    alignas(64) Pair packed_b[kPackedBlock / 2 * kPanelPairs];
    for (idx k = 0; k < depth; k += kPackedBlock) {
      const idx length = min(kPackedBlock, depth - k), pairs = ceil_div(length, 2);
      pack_columns(packed_b, b.at(p, k), b.ld, length, vectors);
      const Strip<Pair> strip{team.packed + first * stride + k / 2, stride, 1, pairs, pairs, 0};
      const Mat<T>& from = k == 0 ? cin : c;
      tile_rows<T, false>(team.upcoming, strip, stride, packed_b, kPanelPairs, from.at(p, first), from.ld, c.at(p, first), c.ld, rows,
                          vectors, alpha, k == 0 ? beta : T(1));
    }
  });
}

template <class T>
void packed_tn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& cin, const Mat<T>& c, T alpha, T beta) {
  const idx panel = ceil_div(a.rows, 2) * kPanelPairs;
  const idx group = team.threads > 1 ? kPackedPanels : max(1, a.axis.panels), groups = ceil_div(a.axis.panels, group);
  team.each(a.axis.panels, [&](idx q) {
    pack_columns(team.packed + q * panel, a.at(q, 0), a.ld, a.rows, panel_vectors<T>(a.axis, q));
  });
  team.each(c.axis.panels * groups, [&](idx piece) {
    const idx p = piece / groups, q0 = piece % groups * group, q1 = min(q0 + group, a.axis.panels);
    const idx vectors = panel_vectors<T>(c.axis, p);
    alignas(64) Pair packed_b[kPackedBlock / 2 * kPanelPairs];
    for (idx k = 0; k < a.rows; k += kPackedBlock) {
      const idx length = min(kPackedBlock, a.rows - k), pairs = ceil_div(length, 2);
      pack_columns(packed_b, b.at(p, k), b.ld, length, vectors);
      const Mat<T>& from = k == 0 ? cin : c;
      for (idx q = q0; q < q1; ++q) {
        const idx m = q * a.axis.width;
        const Strip<Pair> strip{team.packed + q * panel + k / 2 * kPanelPairs, kPanelPairs, 1, pairs, pairs, 0};
        tile_rows<T, true>(team.upcoming, strip, 1, packed_b, kPanelPairs, from.at(p, m), from.ld, c.at(p, m), c.ld, a.axis.valid(q),
                           vectors, alpha, k == 0 ? beta : T(1));
      }
    }
  });
}

// Few rows of C from a B whose rows are long and lie where the caller has them: a product bound by memory, which is fastest
// read row by row. Panels [p0, p1) of C; every sum in the order of a tile's.
template <class T, int kRows>
void stream_rows(const Mat<T>& a, const Mat<T>& b, const Mat<T>& cin, const Mat<T>& c, T alpha, T beta, idx depth, idx block,
                 idx p0, idx p1) {
  constexpr int L = kLanes<T>;
  constexpr idx kSteps = 4;  // rows of B that are read side by side
  const idx first = p0 * c.axis.width, columns = min(c.axis.n, p1 * c.axis.width) - first;
  alignas(64) T sum[kRows][kStreamColumns<T>];
  for (idx k0 = 0; k0 < depth; k0 += block) {
    for (int r = 0; r < kRows; ++r) std::memset(sum[r], 0, size_t(columns) * sizeof(T));
    const idx end = min(depth, k0 + block);
    for (idx k = k0; k < end; k += kSteps) {
      T x[kRows][kSteps];
      const idx steps = min(kSteps, end - k);
      for (int r = 0; r < kRows; ++r)
        for (idx i = 0; i < steps; ++i) x[r][i] = a.at((k + i) / a.axis.width, r)[(k + i) % a.axis.width];
      const T* row = b.data + k * b.ld + first;
      if (steps == kSteps) {
        for (idx col = 0; col < columns; col += L) {
          Vec<T> w[kSteps];
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i) w[i] = load(row + i * b.ld + col);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            Vec<T> s = load(sum[r] + col);
#pragma GCC unroll 4
            for (int i = 0; i < kSteps; ++i) multiply_add(s, x[r][i], w[i]);
            store(sum[r] + col, s);
          }
        }
      } else {
        for (idx i = 0; i < steps; ++i)
          for (idx col = 0; col < columns; col += L)
            for (int r = 0; r < kRows; ++r) {
              Vec<T> s = load(sum[r] + col);
              multiply_add(s, x[r][i], load(row + i * b.ld + col));
              store(sum[r] + col, s);
            }
      }
    }
    const Mat<T>& from = k0 == 0 ? cin : c;
    const T keep = k0 == 0 ? beta : T(1);
    for (int r = 0; r < kRows; ++r)
      for (idx p = p0; p < p1; ++p)
        for (idx col = 0; col < c.axis.valid(p); col += L) {
          const Vec<T> s = load(sum[r] + p * c.axis.width - first + col);
          const Vec<T> product = alpha == T(1) ? s : alpha * s;
          T* to = c.at(p, r) + col;
          if (keep == T(0))
            store(to, product);
          else
            store(to, (keep == T(1) ? load(from.at(p, r) + col) : keep * load(from.at(p, r) + col)) + product);
        }
  }
}

template <class T>
constexpr decltype(&stream_rows<T, 1>) kStreams[] = {stream_rows<T, 1>, stream_rows<T, 2>, stream_rows<T, 3>,
                                                     stream_rows<T, 4>};
constexpr idx kStreamRows = 4;

// C = beta * Cin + alpha * A[:, 0:depth] B[0:depth, :], rows of A; depth defaults to all columns of A.
template <class T>
void gemm_nn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& cin, const Mat<T>& c, T alpha, T beta,
             idx depth = -1) {
  if constexpr (rounds_products<T>())
    if (team.packed) return packed_nn(team, a, b, cin, c, alpha, beta);
  if (depth < 0) depth = a.axis.n;
  const idx width = a.axis.width, block = max(1, kContractionBlock / width) * width;
  if (1 <= a.rows && a.rows <= kStreamRows && b.ld > b.axis.width && b.panel_stride == b.axis.width) {
    const idx group = max(1, kStreamColumns<T> / c.axis.width);
    return team.each(ceil_div(c.axis.panels, group), [&](idx g) {
      kStreams<T>[a.rows - 1](a, b, cin, c, alpha, beta, depth, block, g * group, min(c.axis.panels, (g + 1) * group));
    });
  }
  const idx chunk = team.threads > 1 ? kRowChunk : max(1, a.rows);
  const idx chunks = ceil_div(a.rows, chunk);
  team.each(c.axis.panels * chunks, [&](idx piece) {
    const idx p = piece / chunks, first = piece % chunks * chunk, rows = min(chunk, a.rows - first);
    for (idx k = 0; k < depth; k += block) {
      const idx length = min(block, depth - k), segments = ceil_div(length, width);
      Strip<T> strip{a.at(k / width, first), a.ld, segments, width, length - (segments - 1) * width, a.panel_stride};
      const Mat<T>& from = k == 0 ? cin : c;
      tile_rows<T, false>(team.upcoming, strip, a.ld, b.at(p, k), b.ld, from.at(p, first), from.ld, c.at(p, first), c.ld, rows,
                          panel_vectors<T>(c.axis, p), alpha, k == 0 ? beta : T(1));
    }
  });
}

template <class T>
HOPE_INLINE void gemm_nn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& c, T alpha = 1, T beta = 0) {
  gemm_nn(team, a, b, c, c, alpha, beta);
}

// Rows [m0, m1) of one panel of C = beta * Cin + alpha * A^T B for kDepth rows of A and B, the write of a tiny chunk: one pass
// over C, which is bound by its memory, with B in registers.
template <class T, int kDepth>
void outer_products(const T* a, idx lda, const T* b, idx ldb, const T* cin, idx ldcin, T* c, idx ldc, idx rows, idx vectors,
                    T alpha, T beta) {
  constexpr int L = kLanes<T>;
  for (idx v = 0; v < vectors; v += 4) {
    const int width = int(min(4, vectors - v));
    Vec<T> bk[kDepth][4];
#pragma GCC unroll 4
    for (int k = 0; k < kDepth; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) bk[k][j] = j < width ? alpha * load(b + k * ldb + (v + j) * L) : zero<T>();
    for (idx m = 0; m < rows; ++m) {
      const T* from = cin + m * ldcin + v * L;
      T* to = c + m * ldc + v * L;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (j >= width) break;
        Vec<T> sum = beta == T(0) ? zero<T>() : beta * load(from + j * L);
#pragma GCC unroll 4
        for (int k = 0; k < kDepth; ++k) sum += a[k * lda + m] * bk[k][j];
        store(to + j * L, sum);
      }
    }
  }
}

template <class T>
constexpr decltype(&outer_products<T, 1>) kOuterProducts[] = {outer_products<T, 1>, outer_products<T, 2>,
                                                              outer_products<T, 3>, outer_products<T, 4>};
constexpr idx kOuterDepth = 4;

// C = beta * Cin + alpha * A[:, first:first + count]^T B; rows of C are those columns of A (count < 0: all of them).
template <class T>
void gemm_tn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& cin, const Mat<T>& c, T alpha, T beta,
             idx first = 0, idx count = -1) {
  if constexpr (rounds_products<T>())
    if (team.packed) return packed_tn(team, a, b, cin, c, alpha, beta);
  if (count < 0) count = a.axis.n;
  const idx width = a.axis.width, panel0 = first / width, panel1 = ceil_div(first + count, width);
  const idx panels = panel1 - panel0;
  team.each(c.axis.panels * panels, [&](idx piece) {
    const idx p = piece / panels, q = panel0 + piece % panels;
    const idx m0 = max(first, q * width), m1 = min(first + count, (q + 1) * width);
    if (1 <= a.rows && a.rows <= kOuterDepth)
      return kOuterProducts<T>[a.rows - 1](a.at(q, 0) + (m0 - q * width), a.ld, b.at(p, 0), b.ld, cin.at(p, m0 - first),
                                           cin.ld, c.at(p, m0 - first), c.ld, m1 - m0, panel_vectors<T>(c.axis, p),
                                           alpha, beta);
    for (idx k = 0; k < a.rows; k += kContractionBlock) {
      const idx length = min(kContractionBlock, a.rows - k);
      Strip<T> strip{a.at(q, k) + (m0 - q * width), a.ld, 1, length, length, 0};
      const Mat<T>& from = k == 0 ? cin : c;
      tile_rows<T, true>(team.upcoming, strip, 1, b.at(p, k), b.ld, from.at(p, m0 - first), from.ld, c.at(p, m0 - first), c.ld,
                         m1 - m0, panel_vectors<T>(c.axis, p), alpha, k == 0 ? beta : T(1));
    }
  });
}

template <class T>
HOPE_INLINE void gemm_tn(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& c, T alpha = 1, T beta = 1) {
  gemm_tn(team, a, b, c, c, alpha, beta);
}

// to [columns of from, rows of from] = from^T, in square blocks of registers.
template <class T>
void transpose(const Team& team, const Mat<T>& to, const Mat<T>& from) {
  constexpr int L = kLanes<T>;
  team.each(from.axis.panels, [&](idx p) {
    const idx valid = from.axis.valid(p), row0 = p * from.axis.width;
    for (idx r = 0; r < from.rows; r += L) {
      const idx rows = min(L, from.rows - r);
      T* target = to.at(r / to.axis.width, row0) + r % to.axis.width;
      for (idx c = 0; c < valid; c += L) {
        Vec<T> block[L];
        for (int i = 0; i < L; ++i) block[i] = i < rows ? load(from.at(p, r + i) + c) : zero<T>();
        transpose_block<T>(block);
        const idx columns = min(L, valid - c);
        for (int i = 0; i < columns; ++i) store(target + (c + i) * to.ld, block[i]);
      }
    }
  });
}

// C = beta * C + alpha * A B^T by dot products along the rows of B, which are read once per row of A.
template <class T>
void gemm_nt_dots(const Team& team, const Mat<T>& a, const Mat<T>& b, const Mat<T>& c, T alpha, T beta) {
  constexpr int L = kLanes<T>;
  team.each(ceil_div(b.rows, L), [&](idx block) {
    const idx n0 = block * L, count = min(L, b.rows - n0);
    for (idx i = 0; i < a.rows; ++i) {
      Vec<T> sum[L];
      for (int n = 0; n < L; ++n) sum[n] = zero<T>();
      T tail[L] = {};
      for (idx p = 0; p < a.axis.panels; ++p) {
        const T* x = a.at(p, i);
        const T* y = b.at(p, n0);
        const idx valid = a.axis.valid(p);
        idx k = 0;
        if (count == L) {
          for (; k + L <= valid; k += L) {
            const Vec<T> xv = load(x + k);
#pragma GCC unroll 16
            for (int n = 0; n < L; ++n) sum[n] += xv * load(y + n * b.ld + k);
          }
        } else {
          for (; k + L <= valid; k += L)
            for (idx n = 0; n < count; ++n) sum[n] += load(x + k) * load(y + n * b.ld + k);
        }
        for (; k < valid; ++k)
          for (idx n = 0; n < count; ++n) tail[n] += x[k] * y[n * b.ld + k];
      }
      T* o = c.at(n0 / c.axis.width, i) + n0 % c.axis.width;
      const Vec<T> total = alpha * (sum_each<T>(sum) + load(tail));
      store(o, beta == T(0) ? total : total + beta * load(o));
    }
  });
}

// A product with B^T that is used more than once shares one transposed copy of B.
template <class T>
struct Transposed {
  Mat<T> original, copy;  // copy absent: dot products along the original's rows
};

template <class T>
HOPE_INLINE void gemm_nt(const Team& team, const Mat<T>& a, const Transposed<T>& b, const Mat<T>& c, T alpha = 1,
                         T beta = 0) {
  if (b.copy)
    gemm_nn(team, a, b.copy, c, c, alpha, beta);
  else
    gemm_nt_dots(team, a, b.original, c, alpha, beta);
}

}  // namespace hope::cpu::HOPE_ISA
