// Forward scan with the state on chip: one block of eight warps, or a cluster of such blocks, walks one (sequence, head)
// through its chunks.
//
// Roofline, per token of an mlp with objective l2: 14 D H FLOPs, of which the tensor cores do all but the activations;
// 8 D bytes of tokens from and to global memory. The state (2 D H float32) stays in the registers of the block for the whole
// sequence. What limits it: the activations' special functions, and the sum of F over the warps (8 D floats written and read
// through shared memory for each token), beside the issue of tensor-core instructions. In a cluster every block takes all
// tokens through its share of the hidden units; a sum over the blocks costs a barrier of the cluster for every 16 tokens and
// 64 columns, and 4 D bytes for each token read from each of the other blocks.
//
// A chunk: (1) every warp applies its hidden units to a slice of 16 tokens, keys first, then queries; the warps' parts of
// the output are summed in fixed order through shared memory, and become the errors of the keys, laid over the values, or
// the outputs, laid over the queries; (2) every warp forms the errors of its hidden units from its rows of W_out as they were,
// and adds its part of the products to the state. Numbers are rounded to 16 bits only as operands of products. Between the
// two, dgd solves for the errors that the weights are written with (forward_delta_rule.h).
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx.h"
#include "scan_block.h"
#include "scan_delta_rule.h"

namespace hope::cuda {

template <class Traits>
class ForwardScan : protected ScanBlock<Traits> {
  using Block = ScanBlock<Traits>;

 public:
  using Element = typename Block::Element;
  using Numbers = Pair<Traits::kType>;

  using Block::Block;

  __device__ __forceinline__ void run() {
    if (thread_ == 0) block_shared<Place>() = place_of(problem_, blockIdx.x / blocks(), params_.span);
    // With two stages piece i + 1 is loaded while piece i is computed.
    for (int next = 0;; ++next) {
      begin_phase();
      cp_async_wait<0>();
      __syncthreads();  // the place is known; everyone's share of the tokens is there; the stage loaded next is free
      if (next < place_.pieces) load_tokens(next, next & (params_.stages - 1));
      if (next == 0) load_initial();
      if (params_.stages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // everyone's share of the tokens is there
      }
      const int piece = next - (params_.stages - 1);
      if (piece < 0) continue;
      save_state(piece);
      if (piece == place_.pieces) return sum_.leave();
      const int stage = piece & (params_.stages - 1);
      apply(piece, stage);
      __syncthreads();  // the last slice's errors or outputs are complete
      if (writes(piece)) {
        if constexpr (Traits::kDelta)
          write_corrected(piece, stage);
        else
          write(piece, stage);
      }
      begin_phase();
      store_outputs(piece, stage);
    }
  }

 protected:
  using Block::begin_phase;
  using Block::blocks;
  using Block::first_query;
  using Block::kept;
  using Block::load_initial;
  using Block::load_tokens;
  using Block::momentum;
  using Block::of_chunk;
  using Block::of_tokens;
  using Block::params_;
  using Block::place_;
  using Block::problem_;
  using Block::reads_alone;
  using Block::save_state;
  using Block::shared_;
  using Block::state_;
  using Block::store_outputs;
  using Block::sum_;
  using Block::sums_;
  using Block::tensor;
  using Block::thread_;
  using Block::tile;
  using Block::token_count;
  using Block::writes;

  // ---- (1) the memory applied to tokens -----------------------------------------------------------------------------

  // z = X W_in of one slice, this warp's units; of a glu, gates and what they gate in turn.
  __device__ __forceinline__ void project(float (&z)[Traits::kInTiles][4], const Element* rows, int slice) const {
#pragma unroll
    for (int n = 0; n < Traits::kInTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) z[n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < Traits::kDimTiles / 2; ++k) {
      uint32_t a[4];
      ldmatrix(a, tile(rows, slice, 16 * k));
#pragma unroll
      for (int n = 0; n < Traits::kInTiles; ++n) {
        const float(&low)[4] = state_.in[n / 2][2 * k], (&high)[4] = state_.in[n / 2][2 * k + 1];
        const int e = n % 2 * 2;
        Numbers::mma(z[n], a, {Numbers::pack(low[e], low[e + 1]), Numbers::pack(high[e], high[e + 1])});
      }
    }
  }

  // This warp's part of H W_out of one slice, kSumTiles tiles from `first` on. h[n] holds rows g and g + 8 of unit tile n.
  __device__ __forceinline__ void multiply_out(const uint32_t (&h)[Traits::kUnitTiles][2], int first, float4* part) const {
#pragma unroll
    for (int j = first; j < first + Traits::kSumTiles; ++j) {
      float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int m = 0; m < Traits::kUnitTiles; m += 2) {
        const auto packed = [&](int n) {
          const float(&w)[4] = state_.out[j / 2][n];
          return Numbers::pack(w[j % 2 * 2], w[j % 2 * 2 + 1]);
        };
        if (m + 1 < Traits::kUnitTiles)
          Numbers::mma(y, {h[m][0], h[m][1], h[m + 1][0], h[m + 1][1]}, {packed(m), packed(m + 1)});
        else  // the product takes sixteen units at once
          Numbers::mma(y, {h[m][0], h[m][1], 0, 0}, {packed(m), 0});
      }
      part[(j - first) * kWarp] = float4{y[0], y[1], y[2], y[3]};
    }
  }

  static __device__ __forceinline__ uint32_t& pair_at(Element* rows, int row, int column) {
    return *reinterpret_cast<uint32_t*>(rows + row * Traits::kPitch + column);
  }

  // A power of two near the largest of a chunk's weights. float16 has few small numbers: its weights are rounded divided by
  // this, and what is added to the state is multiplied by it. bfloat16 has float32's range and needs no scale.
  __device__ __forceinline__ float scale_of(const void* steps, int piece) const {
    if constexpr (Traits::kType == DType::bfloat16) return 1.0f;
    return scale_of(of_tokens(steps, piece));
  }
  __device__ __forceinline__ float scale_of(const float* weights) const {
    if constexpr (Traits::kType == DType::bfloat16) return 1.0f;
    float most = 0.0f;
    for (int t = thread_ % kWarp; t < params_.span; t += kWarp) most = fmaxf(most, fabsf(weights[t]));
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    return power_of_two_below(most);
  }
  // Weight of a row's error in a write, the sign of the step and of the objective's error included; 0 beyond the chunk.
  __device__ __forceinline__ float weight(const void* steps, int piece, int row, float scale) const {
    const float sign = problem_.objective == Objective::dot ? 1.0f : -1.0f;
    return row < params_.span ? sign * of_tokens(steps, piece)[row] / scale : 0.0f;
  }

  // The hidden values of a slice, over the first of the kInputs products they are made of: act(z), of a glu act(gate) up.
  __device__ __forceinline__ void activate_slice(float (&z)[Traits::kInTiles][4]) const {
    with_activation<Traits::kType>(problem_.activation, params_.sigmoidal, [&](auto activate) {
#pragma unroll
      for (int n = 0; n < Traits::kInTiles; n += Traits::kInputs)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float slope;
          activate(z[n][e], slope);
          if constexpr (Traits::kForm == Form::glu) z[n][e] *= z[n + 1][e];
        }
    });
  }

  // The same for keys, of which is kept for the write: their hidden values, and what their errors are multiplied by on the
  // way to the products of W_in (the slope; of a glu, slope times up, and act(gate)). Without momentum both are kept
  // already multiplied by their tokens' weights: one rounding fewer.
  __device__ __forceinline__ void activate_keys(float (&z)[Traits::kInTiles][4], int piece, int slice, float scale) const {
    if constexpr (Traits::kDelta) {
      uint32_t products[Traits::kInTiles][2], hidden[Traits::kUnitTiles][2];
      pack(products, z);
      store_kept(slice, kKeptErrors, products);
      activate_slice(z);
      pack<Traits::kInputs>(hidden, z);
      return store_kept(slice, kKeptHidden, hidden);
    }
    const Lane lane(thread_);
    float w[2] = {1.0f, 1.0f};
    if constexpr (!Traits::kMomentum) {
      w[0] = weight(problem_.step, piece, slice * kSlice + lane.group, scale);
      w[1] = weight(problem_.step, piece, slice * kSlice + lane.group + 8, scale);
    }
    uint32_t hidden[Traits::kUnitTiles][2], factors[Traits::kInTiles][2];
    with_activation<Traits::kType>(problem_.activation, params_.sigmoidal, [&](auto activate) {
#pragma unroll
      for (int n = 0; n < Traits::kUnitTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          constexpr int kInputs = Traits::kInputs;
          float &z0 = z[kInputs * n][2 * r], &z1 = z[kInputs * n][2 * r + 1], slope0, slope1;
          activate(z0, slope0);
          activate(z1, slope1);
          if constexpr (Traits::kForm == Form::glu) {
            const float up0 = z[2 * n + 1][2 * r], up1 = z[2 * n + 1][2 * r + 1];
            factors[2 * n + 1][r] = Numbers::pack(w[r] * z0, w[r] * z1);
            z0 *= up0, z1 *= up1, slope0 *= up0, slope1 *= up1;
          }
          hidden[n][r] = Numbers::pack(w[r] * z0, w[r] * z1);
          factors[kInputs * n][r] = Numbers::pack(w[r] * slope0, w[r] * slope1);
        }
    });
    store_kept(slice, kKeptHidden, hidden);
    store_kept(slice, kKeptErrors, factors);
  }

  // Where the two things that are kept of a slice begin: hidden values, and factors of the errors (later: errors).
  static constexpr int kKeptHidden = 0, kKeptErrors = Traits::kKeptHidden;
  template <int kTiles>
  __device__ __forceinline__ void store_kept(int slice, int first, const uint32_t (&x)[kTiles][2]) const {
    uint4* to = kept(slice) + first * Traits::kThreads;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const int next = n + 1 < kTiles ? n + 1 : n;  // an odd number leaves half of the last place unused
      to[n / 2 * Traits::kThreads] = uint4{x[n][0], x[n][1], x[next][0], x[next][1]};
    }
  }
  template <int kTiles>
  __device__ __forceinline__ void load_kept(int slice, int first, uint32_t (&x)[kTiles][2]) const {
    const uint4* from = kept(slice) + first * Traits::kThreads;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const uint4 y = from[n / 2 * Traits::kThreads];
      x[n][0] = y.x, x[n][1] = y.y;
      if (n + 1 < kTiles) x[n + 1][0] = y.z, x[n + 1][1] = y.w;
    }
  }

  // Keys: what the write needs of them, and their errors over the values. Queries: their outputs over themselves.
  __device__ __forceinline__ void apply(int piece, int stage) {
    begin_phase();
    const Objective objective = problem_.objective;
    const bool self = objective == Objective::self;
    const int key_slices = writes(piece) ? params_.rows / kSlice : 0;
    // Queries of slices that hold only pending tokens were read by an earlier call.
    const int first = first_query(piece), count = token_count(piece);
    const int first_slice = first / kSlice;
    const int query_slices = reads_alone(piece) && first < count ? (count + kSlice - 1) / kSlice - first_slice : 0;
    const float scale = key_slices > 0 ? scale_of(problem_.step, piece) : 1.0f;
    // Barriers between pieces free both sets of a block's own sums: no register has to count those of other pieces. Of a
    // cluster's sums the second set may still be read.
    if constexpr (!Traits::kCluster || Traits::kSumsInPairs) sums_ = 0;
    if constexpr (Traits::kDelta)
      if (key_slices > 0) delta_rule().load_products(retention(piece), params_.span);
    for (int i = 0; i < key_slices + query_slices; ++i) {
      const bool is_key = i < key_slices;
      const int slice = is_key ? i : i - key_slices + first_slice;
      float h[Traits::kInTiles][4];
      project(h, is_key ? tensor(stage, kKeys) : tensor(stage, kQueries), slice);
      if (is_key)
        activate_keys(h, piece, slice, scale);
      else
        activate_slice(h);
      const float residual = problem_.residual ? 1.0f : 0.0f;
      const bool shared_read = is_key && params_.shared_read;
      Element* from = is_key ? tensor(stage, kKeys) : tensor(stage, kQueries);
      Element* to = is_key ? tensor(stage, kValues) : tensor(stage, kQueries);
      if constexpr (Traits::kDelta) {
        if (is_key) read_keys(h, stage, slice);
        if (is_key && !self) continue;
      }
      // The errors of `dot` and `error` do not depend on the memory.
      if (is_key && (objective == Objective::dot || objective == Objective::error)) continue;
      if (is_key && self) {
        // f(k) - f(v) is one product: that of the difference of their hidden values.
        float target[Traits::kInTiles][4];
        project(target, tensor(stage, kValues), slice);
        activate_slice(target);
#pragma unroll
        for (int n = 0; n < Traits::kInTiles; n += Traits::kInputs)
#pragma unroll
          for (int e = 0; e < 4; ++e) h[n][e] -= target[n][e];
      }
      // Every block needs all errors of the keys; an output is one block's to store.
      add_up(h, slice, is_key, [&](int row, int column, float x0, float x1) {
        const float2 x = Numbers::unpack(pair_at(from, row, column));
        uint32_t& place = pair_at(to, row, column);
        x0 = fmaf(residual, x.x, x0), x1 = fmaf(residual, x.y, x1);
        if (shared_read && !Traits::kDelta) pair_at(tensor(stage, kQueries), row, column) = Numbers::pack(x0, x1);
        if (is_key) {
          const float2 v = Numbers::unpack(place);
          const float of_target = self ? residual : 1.0f;
          x0 = fmaf(-of_target, v.x, x0), x1 = fmaf(-of_target, v.y, x1);
          if constexpr (Traits::kDelta) {
            float2& right = delta_rule().right(row, column);
            right = float2{right.x + x0, right.y + x1};
          }
        }
        place = Numbers::pack(x0, x1);
      });
    }
  }

  // H W_out of a slice, summed over all hidden units: finish(row, column, x0, x1) for pairs of columns.
  template <class Finish>
  __device__ __forceinline__ void add_up(const float (&h)[Traits::kInTiles][4], int slice, bool everywhere,
                                         const Finish& finish) {
    uint32_t hidden[Traits::kUnitTiles][2];
    pack<Traits::kInputs>(hidden, h);
#pragma unroll
    for (int first = 0; first < Traits::kDimTiles; first += Traits::kSumTiles) {
      multiply_out(hidden, first, sum_.part(sums_));
      sum_.finish(sums_++, everywhere, [&](int row, int column, float x0, float x1) {
        finish(slice * kSlice + row, first * 8 + column, x0, x1);
      });
    }
  }

  // ---- (2) the state after the chunk --------------------------------------------------------------------------------

  // Every kEvery-th tile of x, its rows g times w0 and g + 8 times w1.
  template <int kEvery = 1, int kTiles>
  static __device__ __forceinline__ void pack(uint32_t (&to)[kTiles][2], const float (&x)[kEvery * kTiles][4],
                                              float w0 = 1.0f, float w1 = 1.0f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      to[n][0] = Numbers::pack(w0 * x[kEvery * n][0], w0 * x[kEvery * n][1]);
      to[n][1] = Numbers::pack(w1 * x[kEvery * n][2], w1 * x[kEvery * n][3]);
    }
  }
  // The same, every row times its token's weight.
  template <int kTiles>
  __device__ __forceinline__ void pack_weighted(uint32_t (&to)[kTiles][2], const float (&x)[kTiles][4], const void* steps,
                                                int piece, int slice, float scale) const {
    const Lane lane(thread_);
    pack(to, x, weight(steps, piece, slice * kSlice + lane.group, scale),
         weight(steps, piece, slice * kSlice + lane.group + 8, scale));
  }
  __device__ __forceinline__ void weigh(uint32_t (&x)[Traits::kUnitTiles][2], const void* steps, int piece, int slice,
                                        float scale) const {
    const Lane lane(thread_);
    weigh(x, weight(steps, piece, slice * kSlice + lane.group, scale),
          weight(steps, piece, slice * kSlice + lane.group + 8, scale));
  }
  static __device__ __forceinline__ void weigh(uint32_t (&x)[Traits::kUnitTiles][2], float w0, float w1) {
    float wide[Traits::kUnitTiles][4];
#pragma unroll
    for (int n = 0; n < Traits::kUnitTiles; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 y = Numbers::unpack(x[n][r]);
        wide[n][2 * r] = y.x, wide[n][2 * r + 1] = y.y;
      }
    pack(x, wide, w0, w1);
  }
  template <int kTiles>
  static __device__ __forceinline__ void turn(uint32_t (&x)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) x[n][r] = movmatrix(x[n][r]);
  }

  // in[d] += E^T K of one slice for 16 units: e = two unit tiles of E, turned.
  template <int kTiles>
  __device__ __forceinline__ void add_in(float (&in)[kTiles][4], const uint32_t (&e0)[2],
                                         const uint32_t (&e1)[2], int k, const uint32_t (&b)[4]) const {
    const uint32_t a[4] = {e0[0], e1[0], e0[1], e1[1]};
    Numbers::mma(in[2 * k], a, {b[0], b[1]});
    Numbers::mma(in[2 * k + 1], a, {b[2], b[3]});
  }

  __device__ __forceinline__ void multiply_state(float factor) { multiply_state(factor, factor); }
  __device__ __forceinline__ void multiply_state(float in, float out) {
    each_in(state_, [&](int, int, float(&x)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= in;
    });
    each_out(state_, [&](int, int, float(&x)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= out;
    });
  }

  // W_out as it is now: the B fragments of its transpose.
  using Turned = uint32_t[Traits::kDimTiles / 2][Traits::kUnitTiles][2];
  __device__ __forceinline__ void turn_out(Turned& turned) const {
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) {
#pragma unroll
      for (int n = 0; n < Traits::kUnitTiles; ++n) {
        const float(&w)[4] = state_.out[p][n];
        turned[p][n][0] = Numbers::pack(w[0], w[1]);
        turned[p][n][1] = Numbers::pack(w[2], w[3]);
      }
      turn(turned[p]);
    }
  }
  // e = delta W_out^T of one slice, this warp's units.
  __device__ __forceinline__ void multiply_back(float (&e)[Traits::kUnitTiles][4], const Turned& turned,
                                                const Element* delta, int slice) const {
#pragma unroll
    for (int n = 0; n < Traits::kUnitTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[n][i] = 0.0f;
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) {
      uint32_t a[4];
      ldmatrix(a, tile(delta, slice, 16 * p));
#pragma unroll
      for (int n = 0; n < Traits::kUnitTiles; ++n) Numbers::mma(e[n], a, turned[p][n]);
    }
  }

  __device__ __forceinline__ void write(int piece, int stage) {
    begin_phase();
    const int slices = params_.rows / kSlice;
    const Element *k = tensor(stage, kKeys), *delta = tensor(stage, kValues);
    Turned turned;
    turn_out(turned);
    const float decay = of_chunk(problem_.decay, piece, 1.0f);
    const float scale = scale_of(problem_.step, piece);
    const float speed_scale = Traits::kMomentum ? scale_of(problem_.momentum_step, piece) : 1.0f;
    multiply_state(decay / scale);
    for (int s = 0; s < slices; ++s) {
      // E = (delta W_out^T) * act'(z), rows g and g + 8 of each unit tile; of a glu, those of both input matrices.
      uint32_t errors[Traits::kInTiles][2];
      {
        float e[Traits::kUnitTiles][4];
        multiply_back(e, turned, delta, s);
        load_kept(s, kKeptErrors, errors);
        float each[Traits::kInTiles][4];
#pragma unroll
        for (int n = 0; n < Traits::kInTiles; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float2 factor = Numbers::unpack(errors[n][r]);
            each[n][2 * r] = e[n / Traits::kInputs][2 * r] * factor.x;
            each[n][2 * r + 1] = e[n / Traits::kInputs][2 * r + 1] * factor.y;
          }
        if constexpr (Traits::kMomentum) {
          // Those of the momentum's write take the place of the factors.
          pack_weighted(errors, each, problem_.momentum_step, piece, s, speed_scale);
          store_kept(s, kKeptErrors, errors);
          pack_weighted(errors, each, problem_.step, piece, s, scale);
        } else {
          pack(errors, each);
        }
      }
      uint32_t hidden[Traits::kUnitTiles][2];
      load_kept(s, kKeptHidden, hidden);
      if constexpr (Traits::kMomentum) weigh(hidden, problem_.step, piece, s, scale);
      add_slice(errors, hidden, k, delta, s);
    }
    if constexpr (Traits::kType == DType::float16) multiply_state(scale);
    if constexpr (Traits::kMomentum) write_momentum(piece, k, delta, slices, speed_scale);
  }

  // What one slice adds to the state: W_in += K^T E, W_out += H^T delta, errors and hidden values weighted.
  __device__ __forceinline__ void add_slice(uint32_t (&errors)[Traits::kInTiles][2],
                                            uint32_t (&hidden)[Traits::kUnitTiles][2], const Element* k,
                                            const Element* delta, int slice) {
    turn(errors);
#pragma unroll
    for (int j = 0; j < Traits::kDimTiles / 2; ++j) {
      uint32_t b[4];
      ldmatrix_transposed(b, tile(k, slice, 16 * j));
#pragma unroll
      for (int i = 0; i < Traits::kInTiles / 2; ++i) add_in(state_.in[i], errors[2 * i], errors[2 * i + 1], j, b);
    }
    turn(hidden);
#pragma unroll
    for (int p = 0; p < Traits::kDimTiles / 2; ++p) add_out(state_.out[p], hidden, delta, slice, p);
  }

  // out[n] += delta^T H of one slice for 16 features: hidden values turned.
  __device__ __forceinline__ void add_out(float (&out)[Traits::kUnitTiles][4], const uint32_t (&hidden)[Traits::kUnitTiles][2],
                                          const Element* delta, int slice, int p) const {
    uint32_t m[4];
    ldmatrix_transposed(m, tile(delta, slice, 16 * p));
    const uint32_t a[4] = {m[0], m[2], m[1], m[3]};
#pragma unroll
    for (int n = 0; n < Traits::kUnitTiles; ++n) Numbers::mma(out[n], a, hidden[n]);
  }

  // W += carry S;  S <- momentum_decay S - U^T diag(momentum_step) E, a few tiles at a time.
  __device__ __forceinline__ void write_momentum(int piece, const Element* k, const Element* delta, int slices, float scale) {
    constexpr int kTogether = 4;  // tiles of W_in: more do not fit beside the state
    const ParkedState<Traits> parked = momentum();
    const float carry = of_chunk(problem_.momentum_carry, piece, 0.0f);
    const float decay = of_chunk(problem_.momentum_decay, piece, 0.0f);
    const auto begin = [&](float(&w)[4], float(&speed)[4], const float4& s) {
      const float old[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = fmaf(carry, old[e], w[e]);
        speed[e] = decay / scale * old[e];
      }
    };
#pragma unroll
    for (int i = 0; i < Traits::kInTiles / 2; ++i)
#pragma unroll
      for (int first = 0; first < Traits::kDimTiles; first += kTogether) {
        float speed[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) begin(state_.in[i][first + j], speed[j], parked.in(i, first + j));
        for (int s = 0; s < slices; ++s) {
          uint32_t errors[2][2];
          load_kept(s, kKeptErrors + i, errors);
          turn(errors);
#pragma unroll
          for (int j = 0; j < kTogether / 2; ++j) {
            uint32_t b[4];
            ldmatrix_transposed(b, tile(k, s, 8 * first + 16 * j));
            add_in(speed, errors[0], errors[1], j, b);
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) parked.in(i, first + j) = four(speed[j], scale);
      }
#pragma unroll
    for (int i = 0; i < Traits::kDimTiles / 2; ++i) {
      float speed[Traits::kUnitTiles][4];
#pragma unroll
      for (int j = 0; j < Traits::kUnitTiles; ++j) begin(state_.out[i][j], speed[j], parked.out(i, j));
      for (int s = 0; s < slices; ++s) {
        uint32_t hidden[Traits::kUnitTiles][2];
        load_kept(s, kKeptHidden, hidden);
        weigh(hidden, problem_.momentum_step, piece, s, scale);
        turn(hidden);
        add_out(speed, hidden, delta, s, i);
      }
#pragma unroll
      for (int j = 0; j < Traits::kUnitTiles; ++j) parked.out(i, j) = four(speed[j], scale);
    }
  }

  // ---- (2) for dgd --------------------------------------------------------------------------------------------------

  __device__ __forceinline__ DeltaRule<Traits> delta_rule() const {
    return {shared_, params_.layout.delta, params_.rows, thread_};
  }
  // Retention of a chunk's tokens; null: all ones.
  __device__ __forceinline__ const float* retention(int piece) const {
    return problem_.retention ? of_tokens(problem_.retention, piece) : nullptr;
  }

  // In forward_delta_rule.h.
  template <class Visit>
  __device__ __forceinline__ void each_pair(int first, int step, int count, const Visit& visit) const;
  __device__ __forceinline__ void read_keys(const float (&h)[Traits::kInTiles][4], int stage, int slice);
  template <class Put>
  __device__ __forceinline__ void overlap_rows(const Element* left, const Element* right, const Put& put) const;
  __device__ __forceinline__ void overlap_keys(const Element* k) const;
  template <int kTiles>
  static __device__ __forceinline__ void overlap_units(const uint32_t (&left)[kTiles][2], const uint32_t (&right)[kTiles][2],
                                                       float4* part);
  __device__ __forceinline__ void overlap_hidden();
  __device__ __forceinline__ void right_of_inputs(float (&r)[Traits::kInTiles][4], const Turned& turned,
                                                  const Element* delta, int slice) const;
  __device__ __forceinline__ void write_corrected(int piece, int stage);
};

}  // namespace hope::cuda

#include "forward_delta_rule.h"
