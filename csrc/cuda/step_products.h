// Products with weights that all sequences share: targets and gates of a memory's tokens, and the levels that are never
// written.
//
// Each weight is read from memory once for every kBatch sequences, from L2 after the first; inputs lie in shared memory
// as float32. CUDA cores: 2 FLOPs for each weight and sequence are below a GPU's balance up to some ten sequences.
#pragma once

#include "cuda/activation.h"
#include "cuda/step_common.h"

namespace hope::cuda::stepping {

struct ProductShared {
  float scale[8];  // of 8 sequences
  float staged[kStaged];
  float partial[kWarps][128];  // of 8 sequences and 16 columns
};

__device__ __forceinline__ float stable_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }  // as torch's

// Fills staged[b][i] with input(b, i0 + i), zeros for sequences there are not. Between two barriers of the block.
template <int kBatch, class Read>
__device__ __forceinline__ void stage(const StepProblem& p, ProductShared& shared, int64_t b0, int64_t i0, int count,
                                      const Read& input) {
  constexpr int kChunk = kStaged / kBatch;
  __syncthreads();
#pragma unroll 1
  for (int b = 0; b < kBatch; ++b)
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += kThreads)
      shared.staged[b * kChunk + i] = b0 + b < p.batch ? input(b0 + b, int(i0) + i) : 0.0f;
  __syncthreads();
}

// Targets and gates. A warp takes rows of the target projection, or one head's gates; a block kWarps of those.
__device__ __forceinline__ int64_t projection_blocks(const Arguments& a) {
  const int64_t groups = (width_of(a.p) + a.rows_together - 1) / a.rows_together + a.p.heads;
  return (groups + kWarps - 1) / kWarps;
}

template <class T, int kBatch>
__device__ void project(const Arguments& a, const StepLevel& level, int64_t item) {
  constexpr int kRows = 4, kChunk = kStaged / kBatch;
  static_assert(kChunk % 128 == 0, "lane l takes the inputs 4 l .. 4 l + 3 of every 128, wherever a chunk begins");
  const StepProblem& p = a.p;
  ProductShared& shared = *dynamic_shared<ProductShared>();
  const int64_t width = width_of(p), blocks = projection_blocks(a), b0 = item / blocks * kBatch;
  const int64_t group = item % blocks * kWarps + warp_id(), targets = (width + a.rows_together - 1) / a.rows_together;
  const int64_t head = group - targets, first_row = group * a.rows_together;
  const bool gates = head >= 0;
  const T* rows = static_cast<const T*>(gates ? level.gate_weight : level.target);
  int active = 0;
  int64_t row = 0, stride = 0;
  if (!gates) {
    row = first_row, stride = 1;
    active = int(min(int64_t(a.rows_together), width - first_row));
  } else if (head < p.heads) {
    row = head, stride = p.heads;
    active = gate_count(level);
  }
  float sum[kRows * kBatch];
#pragma unroll
  for (float& x : sum) x = 0;
  for (int64_t i0 = 0; i0 < width; i0 += kChunk) {
    const int count = int(min(int64_t(kChunk), width - i0));
    stage<kBatch>(p, shared, b0, i0, count, [&](int64_t b, int i) { return read_input(p, b, i); });
#pragma unroll(kBatch == 1 ? 4 : 1)
    for (int i = 4 * lane_id(); i < count; i += 128) {
      Quad<T> w[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        w[j] = j < active ? *reinterpret_cast<const Quad<T>*>(rows + (row + j * stride) * width + i0 + i) : Quad<T>{};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const Four x = load_four(shared.staged + b * kChunk + i);
#pragma unroll
        for (int j = 0; j < kRows; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[j * kBatch + b] = fmaf(to_float(w[j].x[e]), x.x[e], sum[j * kBatch + b]);
      }
    }
  }
  using Sums = Fold<kRows * kBatch, 1>;
  constexpr int kSame = 32 / (kRows * kBatch);  // lanes that are left with one row of one sequence, the same one
  static_assert(Sums::kLeft == 1 && kSame >= 1, "no lane has more than one");
  const int index = Sums::apply(sum), j = index / kBatch;
  const int64_t b = b0 + index % kBatch;
  float x = sum[0];
  const bool mine = lane_id() % kSame == 0 && j < active && b < p.batch;
  if (!gates) {
    if (mine) {
      const int64_t column = first_row + j;
      put_number(p.dtype, level.v, kept_at(p, level, b, slot_of(level, b), 0) * p.dim + column, x);
    }
    return;
  }
  if (mine) x += number_at(p.dtype, level.gate_bias, j * p.heads + head);
  // The step is in the lane of gate 0 of the same sequence.
  const float lr = float(level.step_bound) * stable_sigmoid(__shfl_sync(kAllLanes, x, index % kBatch * kSame));
  if (!mine) return;
  const int64_t at = kept_at(p, level, b, slot_of(level, b), head);
  if (j == 0)
    level.lr[at] = lr;
  else if (j == 1 && level.retention)
    level.retention[at] = expf(-lr * softplus(x));
  else
    level.momentum_gate[at] = stable_sigmoid(x);
}

// Sums over i of input(b, i) W[i][16 item .. 16 item + 15] for the sequences from b0 on: thread t < 16 kBatch returns that
// of sequence b0 + t / 16 and column t % 16. Weights [in, out] are read along their columns.
template <class T, int kBatch, class Read>
__device__ float columns(const StepProblem& p, ProductShared& shared, const T* weights, int64_t in, int64_t out,
                         int64_t column, int64_t b0, const Read& input) {
  constexpr int kChunk = kStaged / kBatch, kRowsTogether = kThreads / 4;
  static_assert(kChunk % kRowsTogether == 0, "a thread takes the same rows wherever a chunk begins");
  const int quarter = 4 * (lane_id() % 4), row = warp_id() * 8 + lane_id() / 4;
  const bool inside = column + quarter < out;
  const T* mine = weights + column + quarter;
  float sum[4 * kBatch];
#pragma unroll
  for (float& x : sum) x = 0;
  for (int64_t i0 = 0; i0 < in; i0 += kChunk) {
    const int count = int(min(int64_t(kChunk), in - i0));
    stage<kBatch>(p, shared, b0, i0, count, input);
    if (!inside) continue;
#pragma unroll 4
    for (int i = row; i < count; i += kRowsTogether) {
      const auto w = *reinterpret_cast<const Quad<T>*>(mine + (i0 + i) * out);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float x = shared.staged[b * kChunk + i];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[b * 4 + e] = fmaf(to_float(w.x[e]), x, sum[b * 4 + e]);
      }
    }
  }
  using Sums = Fold<4 * kBatch, 4>;
  constexpr int kSame = kBatch == 1 ? 2 : 1;  // lanes left with the same sums
  const int index = Sums::apply(sum);
  if (lane_id() / 4 % kSame == 0)
#pragma unroll
    for (int i = 0; i < Sums::kLeft; ++i)
      shared.partial[warp_id()][(index + i) / 4 * 16 + quarter + (index + i) % 4] = sum[i];
  __syncthreads();
  float total = 0;
  if (int(threadIdx.x) < 16 * kBatch)
    for (int w = 0; w < kWarps; ++w) total += shared.partial[w][threadIdx.x];
  return total;  // the next product meets the block before it writes
}

__device__ __forceinline__ int64_t column_tiles(int64_t out) { return (out + 15) / 16; }

// 1 / rms(x) of the sequences from b0 on. Warp w takes sequence b0 + w.
template <int kBatch>
__device__ void root_mean_squares(const StepProblem& p, ProductShared& shared, int64_t b0) {
  static_assert(kBatch <= kWarps, "a warp for each sequence");
  __syncthreads();  // shared memory is another item's until here
  const int64_t b = b0 + warp_id(), width = width_of(p);
  if (warp_id() < kBatch && b < p.batch) {
    float sum = 0;
#pragma unroll 1
    for (int i = lane_id(); i < width; i += 32) {
      const float x = read_input(p, b, i);
      sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) shared.scale[warp_id()] = 1.0f / sqrtf(sum / float(width) + kNormEps);
  }
  // `stage` meets the block before any of it is read.
}

__device__ __forceinline__ float activated(Activation activation, float z, float& slope) {
  slope = 0;
  with_activation<DType::float32>(activation, sigmoidal_of(activation), [&](auto act) { act(z, slope); });
  return z;
}

// A level that is never written: its hidden units, or (`outputs`) its output x + f(x / rms(x)) from them. An item is 16
// columns for kBatch sequences.
template <class T, int kBatch>
__device__ void plain(const Arguments& a, const StepLevel& level, bool outputs, float* sums, int64_t item) {
  const StepProblem& p = a.p;
  ProductShared& shared = *dynamic_shared<ProductShared>();
  const int64_t width = width_of(p), inner = outputs ? (level.form == Form::linear ? width : level.hidden) : width;
  const int64_t size = outputs ? width : level.hidden, tiles = column_tiles(size), b0 = item / tiles * kBatch;
  const int64_t first = item % tiles * 16, b = b0 + threadIdx.x / 16, column = first + threadIdx.x % 16;
  const bool of_tokens = !outputs || level.form == Form::linear;
  if (of_tokens) root_mean_squares<kBatch>(p, shared, b0);
  const auto input = [&](int64_t sequence, int i) {
    if (!of_tokens) return a.hidden[sequence * level.hidden + i];
    return rounded(p.dtype, read_input(p, sequence, i) * shared.scale[sequence - b0]);
  };
  const int weight = outputs ? last_weight(level.form) : 0, weights = !outputs && level.form == Form::glu ? 2 : 1;
  float y = 0;
#pragma unroll 1
  for (int i = 0; i < weights; ++i) {
    float slope;
    const auto from = static_cast<const T*>(level.initial[weight + i]);
    const float x = columns<T, kBatch>(p, shared, from, inner, size, first, b0, input);
    y = outputs ? x : i == 0 ? activated(level.activation, x, slope) : y * x;
  }
  if (int(threadIdx.x) >= 16 * kBatch || b >= p.batch || column >= size) return;
  if (!outputs) {
    a.hidden[b * size + column] = y;
    return;
  }
  y += read_input(p, b, int(column));
  sums[b * size + column] = y;
  if (void* output = block_shared<Stack>().output) put_number(p.dtype, output, b * size + column, y);
}

}  // namespace hope::cuda::stepping
