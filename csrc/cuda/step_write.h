// Writing a memory when its chunk is complete: W <- decay W + carry S - U' diag(step) E, S <- mdecay S - U' diag(mstep) E.
//
// A block takes one piece of one pair: 32 hidden units, the columns of W_in and the rows of W_out that belong to them, which
// nobody else reads or writes. The piece is read once into shared memory and written once: 512 D bytes for an mlp, twice
// that with momentum. Tokens pass through shared memory 32 at a time, the last ones first, because the weight of a token is
// a product over those behind it. Hidden values and their errors are computed anew (4 D H products of a token and pair);
// what they need of other pieces is f(k), which was kept when the token was read. 8 D H FLOPs in all: at C = 64 arithmetic
// decides. The sums stay in registers, which hold those of 64 features, of the weights or of the momentum: for D > 64 and
// with momentum the tokens pass once more.
#pragma once

#include "cuda/step_common.h"
#include "cuda/step_read.h"

namespace hope::cuda::stepping {

constexpr int kTile = 32;         // tokens in shared memory at a time: one for each lane
constexpr int kHalfFeatures = 64; // features that are summed up at a time

// W <- decay W + carry S - sum and S <- momentum_decay S - momentum_sum, of one number each; `speed` is null without
// momentum.
struct Factors {
  float decay, carry, momentum_decay;
};
__device__ __forceinline__ float written_weight(float old, const float* speed, const Factors& f, float sum) {
  return (speed ? fmaf(f.carry, *speed, f.decay * old) : f.decay * old) - sum;
}

struct WriteShared {
  float step[kTile], momentum_step[kTile];
  Factors factors;
  float unused;
};

// Dynamic shared memory behind WriteShared, in floats: k, delta [kTile, pitch]; weights [kUnits, pitch], W_in transposed;
// hidden values and errors [kTile, kUnits]. A row is 4 floats longer than D: lanes that read 16 bytes of 8 rows meet no
// bank twice.
struct WritePlan {
  int pitch, weights, errors;
  __host__ __device__ WritePlan(int64_t dim, Form form)
      : pitch(int(dim) + 4), weights(form == Form::linear ? 0 : last_weight(form) + 1), errors(last_weight(form)) {}
  __host__ __device__ int64_t bytes() const {
    return int64_t(sizeof(WriteShared)) +
           int64_t(sizeof(float)) * ((2 * kTile + weights * kUnits) * pitch + (1 + errors) * kTile * kUnits);
  }
  __device__ float* floats() const {
    return reinterpret_cast<float*>(dynamic_shared<unsigned char>() + sizeof(WriteShared));
  }
  __device__ float* keys() const { return floats(); }
  __device__ float* deltas() const { return keys() + kTile * pitch; }
  __device__ float* weight(int i) const { return deltas() + kTile * pitch + i * kUnits * pitch; }
  __device__ float* hidden() const { return weight(weights); }
  __device__ float* error(int i) const { return hidden() + (1 + i) * kTile * kUnits; }  // of W_in or W_gate, of W_up
};
static_assert(sizeof(WriteShared) % 16 == 0, "what lies behind it is read 16 bytes at a time");

// How far the weights of tokens are known: products over the tokens behind, and beta a of the first of them.
struct Behind {
  float retained = 1, momentum = 1, linked = 0;
};

// The weight of each token of a tile in the write (hope_kernels/memory/coefficients.py), by one warp, a token a lane. Leaves
// in shared memory the factors of the whole chunk as far as it is known: right after the first tile.
__device__ __forceinline__ void weigh_tokens(const StepProblem& p, const StepLevel& level, WriteShared& shared, int64_t b,
                                             int64_t n, int64_t t0, int count, Behind& behind) {
  const int lane = lane_id();
  const bool token = lane < count;
  const int64_t at = kept_at(p, level, b, t0 + (token ? lane : 0), n);
  const float lr = token ? level.lr[at] : 0.0f;
  float retained = token && level.retention ? level.retention[at] : 1.0f;  // becomes the product from this token on
  for (int reach = 1; reach < 32; reach *= 2) {
    const float next = __shfl_down_sync(kAllLanes, retained, unsigned(reach));
    if (lane + reach < 32) retained *= next;
  }
  float after = __shfl_down_sync(kAllLanes, retained, 1u);
  after = (lane < 31 ? after : 1.0f) * behind.retained;
  float weight = after, momentum_step = 0;
  if (level.momentum_gate) {
    const float beta = token ? level.momentum_gate[at] : 1.0f;
    // a_t = A_t + beta_{t+1} a_{t+1}; of the last token here, beta a of the next is known.
    float factor = __shfl_down_sync(kAllLanes, beta, 1u);
    if (lane + 1 == count) weight += behind.linked;
    if (lane + 1 >= count) factor = 0;
    float product = beta;
    for (int reach = 1; reach < 32; reach *= 2) {
      const float next_weight = __shfl_down_sync(kAllLanes, weight, unsigned(reach));
      const float next_factor = __shfl_down_sync(kAllLanes, factor, unsigned(reach));
      const float next_product = __shfl_down_sync(kAllLanes, product, unsigned(reach));
      if (lane + reach < count) weight = fmaf(factor, next_weight, weight), factor *= next_factor;
      if (lane + reach < 32) product *= next_product;
    }
    float momentum_after = __shfl_down_sync(kAllLanes, product, 1u);
    momentum_after = (lane < 31 ? momentum_after : 1.0f) * behind.momentum;
    momentum_step = lr * momentum_after;
    behind.linked = __shfl_sync(kAllLanes, beta * weight, 0);
    behind.momentum *= __shfl_sync(kAllLanes, product, 0);
  }
  behind.retained *= __shfl_sync(kAllLanes, retained, 0);
  shared.step[lane] = lr * weight;
  shared.momentum_step[lane] = momentum_step;
  if (lane == 0) {
    shared.factors = {behind.retained, behind.linked, behind.momentum};
  }
}

// f(k) of feature d of a token, whose numbers are kept at `at`. That of the present token is not among those kept where it
// is split: nobody has added it up yet.
__device__ __forceinline__ float prediction_of(const Arguments& a, const StepLevel& level, const float* sums, int64_t pair,
                                               int64_t token, int d, int64_t at) {
  if (!a.p.split || token + 1 < level.chunk_size) return level.predictions[at];
  const int pieces = sums_kept(a.p, level);
  return add_pieces(sums + pair * pieces * a.p.dim + d, pieces, a.p.dim);
}

// Keys and f(k) - v of the tokens t0 .. t0 + count - 1, zeros behind them.
__device__ void load_tokens(const Arguments& a, const StepLevel& level, const float* sums, const WritePlan& plan,
                            int64_t pair, int64_t t0, int count) {
  const StepProblem& p = a.p;
  const int64_t b = pair / p.heads, n = pair % p.heads;
  const int dim = int(p.dim);
#pragma unroll 1
  for (int e = int(threadIdx.x); e < kTile * dim; e += kThreads) {
    const int t = e / dim, d = e % dim;
    float key = 0, delta = 0;
    if (t < count) {
      const int64_t at = kept_at(p, level, b, t0 + t, n) * dim + d;
      key = number_at(p.dtype, level.k, at);
      delta = prediction_of(a, level, sums, pair, t0 + t, d, at) - number_at(p.dtype, level.v, at);
    }
    plan.keys()[t * plan.pitch + d] = key;
    plan.deltas()[t * plan.pitch + d] = delta;
  }
}

// The piece's weights as they were when the chunk began: [unit][feature] of each.
__device__ void load_weights(const Arguments& a, const StepLevel& level, const WritePlan& plan, int64_t pair, int unit0,
                             int units) {
  const StepProblem& p = a.p;
  const int dim = int(p.dim), last = last_weight(level.form);
  for (int i = 0; i < last; ++i) {
    const float* from = level.weights[i] + before_units(p, level, pair, unit0);
#pragma unroll 2
    for (int e = int(threadIdx.x); e < dim * (kUnits / 4); e += kThreads) {
      const int d = e / (kUnits / 4), u = 4 * (e % (kUnits / 4));
      const Four w = u < units ? load_four(from + d * level.hidden + u) : Four{};
      for (int j = 0; j < 4; ++j) plan.weight(i)[(u + j) * plan.pitch + d] = w.x[j];
    }
  }
  const float* from = level.weights[last] + behind_units(p, level, pair, unit0);
#pragma unroll 2
  for (int e = 4 * int(threadIdx.x); e < kUnits * dim; e += 4 * kThreads) {
    const int u = e / dim, d = e % dim;
    store_four(plan.weight(last) + u * plan.pitch + d, u < units ? load_four(from + e) : Four{});
  }
}

// Hidden values of the tile's tokens and the errors in front of them: a lane has a unit, a warp every eighth token.
__device__ void hidden_and_errors(const Arguments& a, const StepLevel& level, const WritePlan& plan, int unit0, int count) {
  const int dim = int(a.p.dim), unit = lane_id();
  if (level.form == Form::linear) {  // the units are features of the key
#pragma unroll 1
    for (int t = warp_id(); t < count; t += kWarps)
      plan.hidden()[t * kUnits + unit] = unit0 + unit < dim ? plan.keys()[t * plan.pitch + unit0 + unit] : 0.0f;
    return;
  }
  constexpr int kTokens = kTile / kWarps;
  const bool glu = level.form == Form::glu;
  const float* in = plan.weight(0) + unit * plan.pitch;
  const float* up = plan.weight(1) + unit * plan.pitch;
  const float* out = plan.weight(glu ? 2 : 1) + unit * plan.pitch;
  float z[kTokens] = {}, zu[kTokens] = {}, error[kTokens] = {};
#pragma unroll 1
  for (int d = 0; d < dim; d += 4) {
    const Four w = load_four(in + d), wo = load_four(out + d);
    Four wu{};
    if (glu) wu = load_four(up + d);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int at = (warp_id() + i * kWarps) * plan.pitch + d;
      const Four key = load_four(plan.keys() + at);
      z[i] = dot(key, w, z[i]);
      if (glu) zu[i] = dot(key, wu, zu[i]);
      error[i] = dot(load_four(plan.deltas() + at), wo, error[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int at = (warp_id() + i * kWarps) * kUnits + unit;
    float slope;
    const float value = activated(level.activation, z[i], slope);
    plan.hidden()[at] = glu ? value * zu[i] : value;
    plan.error(0)[at] = error[i] * slope * (glu ? zu[i] : 1.0f);
    if (glu) plan.error(1)[at] = error[i] * value;
  }
}

// sum[u][d] += weight u_t x_t over units 2, features 4: one thread's share of U' diag(weight) E, of either weight.
__device__ __forceinline__ void add_outer(float (&sum)[2][4], float weight, const float* units, const Four& features) {
  for (int u = 0; u < 2; ++u) {
    const float left = weight * units[u];
    for (int d = 0; d < 4; ++d) sum[u][d] = fmaf(left, features.x[d], sum[u][d]);
  }
}

// One number of weight i, in the first pass of a write, or of its momentum, in the second.
__device__ __forceinline__ void write_number(const StepLevel& level, int i, int pass, int64_t at, const WriteShared& shared,
                                             float sum) {
  float* const speed = level.momentum[i] ? level.momentum[i] + at : nullptr;
  float* const weight = level.weights[i] + at;
  if (pass == 0)
    *weight = written_weight(*weight, speed, shared.factors, sum);
  else
    *speed = fmaf(shared.factors.momentum_decay, *speed, -sum);
}

// Back to the initial weights and zero momentum, by thread `index` of `threads`.
__device__ void start_again(const Arguments& a, const StepLevel& level, int64_t pair, int unit0, int units, int index,
                            int threads) {
  const StepProblem& p = a.p;
  const int dim = int(p.dim), last = last_weight(level.form);
  const int64_t head = pair % p.heads;
  const auto copy = [&](int i, int64_t from, int64_t to) {
    level.weights[i][to] = number_at(p.dtype, level.initial[i], from);
    if (level.momentum[i]) level.momentum[i][to] = 0;
  };
  for (int i = 0; i < last; ++i)
#pragma unroll 1
    for (int e = index; e < dim * units; e += threads) {
      const int64_t at = e / units * level.hidden + e % units;
      copy(i, before_units(p, level, head, unit0) + at, before_units(p, level, pair, unit0) + at);
    }
#pragma unroll 1
  for (int e = index; e < dim * units; e += threads)
    copy(last, behind_units(p, level, head, unit0) + e, behind_units(p, level, pair, unit0) + e);
}

// Writes a piece with the present token alone, where each token is written, by one warp: W_out is read and written in one
// pass, W_in in two, the second of which finds it in L1 or L2.
__device__ void write_token(const Arguments& a, const StepLevel& level, const float* sums, int64_t pair, int piece) {
  const StepProblem& p = a.p;
  const int64_t b = pair / p.heads, n = pair % p.heads, kept = kept_at(p, level, b, 0, n);
  const int lane = lane_id(), dim = int(p.dim), unit0 = piece * kUnits, units = units_of(p, level, piece);
  const int last = last_weight(level.form);
  if (starts_again(level, b)) return start_again(a, level, pair, unit0, units, lane, 32);
  WarpShared& warp = dynamic_shared<ReadShared>()->warp[warp_id()];
  __syncwarp();  // the piece before has been written
  for (int d = lane; d < dim; d += 32) {
    const int64_t at = kept * dim + d;
    warp.key[d] = number_at(p.dtype, level.k, at);
    warp.delta[d] = prediction_of(a, level, sums, pair, 0, d, at) - number_at(p.dtype, level.v, at);
  }
  __syncwarp();
  const float step = level.lr[kept];
  const float beta = level.momentum_gate ? level.momentum_gate[kept] : 0.0f;
  const Factors factors{level.retention ? level.retention[kept] : 1.0f, beta, beta};
  const bool momentum = level.momentum_gate != nullptr;
  const auto change = [&](int i, int64_t at, const Four& old, float left, const float* right) {
    Four x;
    for (int j = 0; j < 4; ++j) {
      const float sum = step * left * right[j];
      float* const speed = momentum ? level.momentum[i] + at + j : nullptr;
      x.x[j] = written_weight(old.x[j], speed, factors, sum);
      if (speed) *speed = fmaf(factors.momentum_decay, *speed, -sum);
    }
    store_four(level.weights[i] + at, x);
  };

  // Units 4 (lane % 8) .. + 3: hidden values, and the factors of their errors in front of W_in (W_gate) and W_up.
  const int unit = 4 * (lane % 8);
  const int64_t before = before_units(p, level, pair, unit0);
  float slope[4] = {}, up_slope[4] = {};
  if (level.form == Form::linear) {
    if (lane < units) warp.hidden[lane] = warp.key[unit0 + lane];
  } else {
    float z[4], up[4];
    project_units(z, level.weights[0] + before, level.hidden, dim, units, warp.key);
    for (int j = 0; j < 4; ++j) z[j] = activated(level.activation, z[j], slope[j]);
    if (level.form == Form::glu) {
      project_units(up, level.weights[1] + before, level.hidden, dim, units, warp.key);
      for (int j = 0; j < 4; ++j) up_slope[j] = z[j], slope[j] *= up[j], z[j] *= up[j];
    }
    if (lane < 8)
      for (int j = 0; j < 4; ++j) warp.hidden[unit + j] = z[j];
  }
  __syncwarp();

  const int d = 4 * (lane % a.key_lanes), rows = 32 / a.key_lanes;
  const int64_t behind = behind_units(p, level, pair, unit0);
#pragma unroll 2
  for (int first = 0; first < units; first += rows) {
    const int u = first + lane / a.key_lanes;
    const bool mine = d < dim && u < units;
    Four w{};
    if (mine) w = load_four(level.weights[last] + behind + u * dim + d);
    float error = mine ? dot(w, load_four(warp.delta + d), 0.0f) : 0.0f;
    for (int lanes = 1; lanes < a.key_lanes; lanes *= 2) error += __shfl_xor_sync(kAllLanes, error, lanes);
    if (!mine) continue;
    if (d == 0) warp.error[u] = error;
    change(last, behind + u * dim + d, w, warp.hidden[u], warp.delta + d);
  }
  __syncwarp();
  if (level.form == Form::linear || unit >= units) return;
  for (int j = 0; j < 4; ++j) {
    const float error = warp.error[unit + j];
    slope[j] *= error, up_slope[j] *= error;
  }
#pragma unroll 4
  for (int row = lane / 8; row < dim; row += 4) {
    const int64_t at = before + row * level.hidden + unit;
    change(0, at, load_four(level.weights[0] + at), warp.key[row], slope);
    if (level.form == Form::glu) change(1, at, load_four(level.weights[1] + at), warp.key[row], up_slope);
  }
}

// Writes a piece whose chunk is complete.
__device__ void write_piece(const Arguments& a, const StepLevel& level, const float* sums, int64_t pair, int piece) {
  const StepProblem& p = a.p;
  const int64_t b = pair / p.heads, n = pair % p.heads;
  const int dim = int(p.dim), unit0 = piece * kUnits, units = units_of(p, level, piece), last = last_weight(level.form);
  if (starts_again(level, b)) return start_again(a, level, pair, unit0, units, int(threadIdx.x), kThreads);
  const WritePlan plan(p.dim, level.form);
  WriteShared& shared = *dynamic_shared<WriteShared>();
  __syncthreads();  // shared memory is another item's until here
  if (level.form != Form::linear) load_weights(a, level, plan, pair, unit0, units);
  // This thread's share: units 2 pair_of_units .. + 1, features d .. d + 3.
  const int pair_of_units = 2 * (int(threadIdx.x) % (kUnits / 2));
  // First the weights, then the momentum, whose old value the weights take up.
  const int passes = level.momentum_gate ? 2 : 1;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
    for (int first = 0; first < dim; first += kHalfFeatures) {
      const int d = first + 4 * (int(threadIdx.x) / (kUnits / 2));
      const bool mine = d < dim && pair_of_units < units;
      float in[2][4] = {}, up[2][4] = {}, out[2][4] = {};
      Behind behind;
#pragma unroll 1
      for (int64_t t0 = (level.chunk_size - 1) / kTile * kTile; t0 >= 0; t0 -= kTile) {
        const int count = int(min(int64_t(kTile), level.chunk_size - t0));
        __syncthreads();  // the tile before has been added
        load_tokens(a, level, sums, plan, pair, t0, count);
        if (warp_id() == 0) weigh_tokens(p, level, shared, b, n, t0, count, behind);
        __syncthreads();
        hidden_and_errors(a, level, plan, unit0, count);
        __syncthreads();
        if (!mine) continue;
        const float* steps = pass == 0 ? shared.step : shared.momentum_step;
#pragma unroll 1
        for (int t = 0; t < count; ++t) {
          const int at = t * kUnits + pair_of_units;
          const Four key = load_four(plan.keys() + t * plan.pitch + d);
          add_outer(out, steps[t], plan.hidden() + at, load_four(plan.deltas() + t * plan.pitch + d));
          if (last > 0) add_outer(in, steps[t], plan.error(0) + at, key);
          if (last > 1) add_outer(up, steps[t], plan.error(1) + at, key);
        }
      }
      if (!mine) continue;
      const int64_t before = before_units(p, level, pair, unit0) + pair_of_units;
      const auto write_in = [&](int i, const float (&sum)[2][4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int u = 0; u < 2; ++u)
            write_number(level, i, pass, before + (d + j) * level.hidden + u, shared, sum[u][j]);
      };
      if (last > 0) write_in(0, in);
      if (last > 1) write_in(1, up);
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          write_number(level, last, pass, behind_units(p, level, pair, unit0 + pair_of_units + u) + d + j, shared,
                       out[u][j]);
    }
}

}  // namespace hope::cuda::stepping
