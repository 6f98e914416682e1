// Scratch matrices, the team of threads that may share the work on one of them, and the arena they are cut from.
//
// Every matrix in scratch is stored in *panels* of at most 256 bytes of consecutive columns: a row of a panel is contiguous
// and the rows of a panel follow each other. A panel is exactly the block of columns a GEMM tile works on, so operands are
// read with unit stride whatever the width of the matrix: no packing, no power-of-two strides. Columns are padded to whole
// vectors; padding may hold anything finite or not and is never contracted over nor stored.
#pragma once

#include "simd.h"
#include "thread_pool.h"

namespace hope::cpu::HOPE_ISA {

// Columns of a matrix: n of them, in panels of `width`.
struct Axis {
  idx n = 0, width = 0, panels = 0;
  HOPE_INLINE idx valid(idx panel) const { return min(width, n - panel * width); }
};

template <class T>
HOPE_INLINE Axis make_axis(idx n) {
  constexpr idx kPanel = 256 / idx(sizeof(T));
  Axis axis;
  axis.n = n;
  axis.width = min(kPanel, max(ceil_div(n, kLanes<T>), 1) * kLanes<T>);
  axis.panels = ceil_div(n, axis.width);
  return axis;
}

template <class T>
struct Mat {
  T* data = nullptr;
  idx ld = 0;            // elements between rows of a panel
  idx panel_stride = 0;  // elements between panels
  idx rows = 0;
  Axis axis;

  HOPE_INLINE T* at(idx panel, idx row) const { return data + panel * panel_stride + row * ld; }
  HOPE_INLINE Mat rows_from(idx first, idx count) const {
    Mat view = *this;
    view.data += first * ld;
    view.rows = count;
    return view;
  }
  // The same memory seen as a matrix of another shape that fits in it.
  HOPE_INLINE Mat reshaped(idx new_rows, Axis new_axis) const {
    return Mat{data, new_axis.width, new_rows * new_axis.width, new_rows, new_axis};
  }
  explicit operator bool() const { return data != nullptr; }
};

// Bump allocator. A first pass over the same layout with no memory behind it counts the bytes.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* array(idx count) {
    used_ = (used_ + 63) & ~size_t(63);
    T* result = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += size_t(count) * sizeof(T);
    return result;
  }
  template <class T>
  Mat<T> matrix(idx rows, Axis axis) {
    T* data = array<T>(rows * axis.width * axis.panels);
    return Mat<T>{data, axis.width, rows * axis.width, rows, axis};
  }
  size_t used() const { return used_ + 64; }
  // Bytes of equal layouts one after the other.
  size_t stride() const { return (used_ + 63) & ~size_t(63); }

 private:
  char* base_;
  size_t used_ = 0;
};

// Rows of memory that are read or written soon, asked for a few cache lines at a time between the tiles of products: a burst
// would wait for the few misses that a core can have under way, and the next loads for the burst.
class Upcoming {
 public:
  // Forgets what was asked for; `steps` calls of step() are to come, or a few more.
  void begin(idx steps) {
    spans_ = current_ = 0;
    column_ = lines_ = each_ = 0;
    steps_ = max(steps, 1);
  }
  // `rows` rows of `bytes` bytes, `stride` bytes apart; what would push the state out of the cache is left to its time.
  void add(const void* first, idx stride, idx bytes, idx rows) {
    const idx lines = rows * ceil_div(bytes, kLine);
    if (rows <= 0 || bytes <= 0 || spans_ == kMost || lines_ + lines > kMostLines) return;
    span_[spans_++] = {static_cast<const char*>(first), stride, bytes, rows};
    lines_ += lines;
    each_ = ceil_div(lines_, steps_);
  }
  HOPE_INLINE void step() {
    for (idx i = 0; i < each_ && current_ < spans_; ++i) {
      Span& span = span_[current_];
      __builtin_prefetch(span.row + column_, 0, 2);
      if ((column_ += kLine) < span.bytes) continue;
      column_ = 0;
      span.row += span.stride;
      if (--span.rows == 0) ++current_;
    }
  }

 private:
  static constexpr int kMost = 8;
  static constexpr idx kLine = 64, kMostLines = 4096;
  struct Span {
    const char* row;
    idx stride, bytes, rows;
  };
  Span span_[kMost];
  int spans_ = 0, current_ = 0;
  idx column_ = 0, lines_ = 0, steps_ = 1, each_ = 0;
};

// The threads that work on one task. Alone (threads == 1) everything is a plain loop. Pieces write disjoint outputs and sums
// run over fixed pieces in a fixed order: results do not depend on the number of threads.
struct Team {
  int threads = 1;
  Pair* packed = nullptr;  // where given, products round their operands to bfloat16, and pack one of them here
  Upcoming* upcoming = nullptr;  // of one thread alone: what products ask for on the way
  Team exact() const { return Team{threads}; }
  template <class F>
  HOPE_INLINE void each(idx pieces, const F& piece) const {
    if (threads <= 1 || pieces < 2) {
      for (idx i = 0; i < pieces; ++i) piece(i);
    } else {
      parallel_for(
          threads, pieces, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, (void*)&piece);
    }
  }
  // Calls body(panel, first row, end row) over blocks that cover `rows` rows of every panel.
  template <class F>
  HOPE_INLINE void blocks(idx rows, const Axis& axis, const F& body) const {
    if (threads <= 1) {
      for (idx p = 0; p < axis.panels; ++p) body(p, idx(0), rows);
    } else {
      constexpr idx kRows = 64;
      const idx pieces = ceil_div(rows, kRows);
      auto piece = [&](idx i) {
        const idx first = i % pieces * kRows;
        body(i / pieces, first, min(rows, first + kRows));
      };
      each(pieces * axis.panels, piece);
    }
  }
};

template <class T>
HOPE_INLINE void fill_zero(const Team& team, const Mat<T>& m) {
  team.blocks(m.rows, m.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) std::memset(m.at(p, r), 0, size_t(m.axis.width) * sizeof(T));
  });
}

template <class T>
HOPE_INLINE void copy(const Team& team, const Mat<T>& to, const Mat<T>& from) {
  team.blocks(from.rows, from.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) std::memcpy(to.at(p, r), from.at(p, r), size_t(from.axis.width) * sizeof(T));
  });
}

// to = a * x + b * y, elementwise; x or y may be `to`.
template <class T>
HOPE_INLINE void combine(const Team& team, const Mat<T>& to, T a, const Mat<T>& x, T b, const Mat<T>& y) {
  team.blocks(to.rows, to.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      T* o = to.at(p, r);
      const T *xs = x.at(p, r), *ys = y.at(p, r);
      for (idx c = 0; c < to.axis.width; c += kLanes<T>) store(o + c, a * load(xs + c) + b * load(ys + c));
    }
  });
}

template <class T>
HOPE_INLINE void add(const Team& team, const Mat<T>& to, const Mat<T>& x) {
  team.blocks(x.rows, to.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      T* o = to.at(p, r);
      const T* xs = x.at(p, r);
      for (idx c = 0; c < to.axis.width; c += kLanes<T>) store(o + c, load(o + c) + load(xs + c));
    }
  });
}

template <class T>
HOPE_INLINE void scale(const Team& team, const Mat<T>& to, T a, const Mat<T>& x) {
  team.blocks(to.rows, to.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      T* o = to.at(p, r);
      const T* xs = x.at(p, r);
      for (idx c = 0; c < to.axis.width; c += kLanes<T>) store(o + c, a * load(xs + c));
    }
  });
}

// Row t of `to` = factor * w[t] * row t of x (+ what was there, with kAdd).
template <bool kAdd, class T>
HOPE_INLINE void scale_rows(const Team& team, const Mat<T>& to, T factor, const T* w, const Mat<T>& x) {
  team.blocks(x.rows, x.axis, [&](idx p, idx r0, idx r1) {
    for (idx r = r0; r < r1; ++r) {
      T* o = to.at(p, r);
      const T* xs = x.at(p, r);
      const T a = factor * w[r];
      for (idx c = 0; c < x.axis.width; c += kLanes<T>) {
        if constexpr (kAdd)
          store(o + c, load(o + c) + a * load(xs + c));
        else
          store(o + c, a * load(xs + c));
      }
    }
  });
}

// <x, y> over `n` elements.
template <class T>
HOPE_INLINE T dot_span(const T* x, const T* y, idx n) {
  Vec<T> sum = zero<T>();
  idx c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) sum += load(x + c) * load(y + c);
  T total = sum_lanes<T>(sum);
  for (; c < n; ++c) total += x[c] * y[c];
  return total;
}

// out[t] += factor * <row t of x, row t of y>.
template <class T>
HOPE_INLINE void add_row_dots(const Team& team, T* out, T factor, const Mat<T>& x, const Mat<T>& y) {
  constexpr idx kRows = 64;
  team.each(ceil_div(x.rows, kRows), [&](idx block) {
    for (idx r = block * kRows; r < min(x.rows, (block + 1) * kRows); ++r) {
      T total = 0;
      for (idx p = 0; p < x.axis.panels; ++p) total += dot_span(x.at(p, r), y.at(p, r), x.axis.valid(p));
      out[r] += factor * total;
    }
  });
}

// <x, y> over whole matrices; `partial` holds one number per row.
template <class T>
HOPE_INLINE T dot(const Team& team, const Mat<T>& x, const Mat<T>& y, T* partial) {
  for (idx r = 0; r < x.rows; ++r) partial[r] = 0;
  add_row_dots(team, partial, T(1), x, y);
  T total = 0;
  for (idx r = 0; r < x.rows; ++r) total += partial[r];
  return total;
}

}  // namespace hope::cpu::HOPE_ISA
