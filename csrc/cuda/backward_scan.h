// Backward scan with the adjoint of the state on chip: one block of eight warps, or a cluster of such blocks, walks one
// (sequence, head) back through its chunks.
//
// Roofline, per token of an mlp with objective l2: 40 D H FLOPs, 4 more than the 18 products take since pre-activations of
// keys are formed three times; 10 D H more to rebuild the states. 16 D bytes of tokens and gradients, and 6 H bytes of what
// is kept of a key, written once and read once or twice, where that is not in shared memory. Per chunk 8 D H bytes of state,
// a slot written and read (16 D H where the decay has a gradient); with momentum 52 D H more. Short chunks are bound by that.
// Of a glu 60 D H FLOPs, 14 D H to rebuild, 10 H bytes of a key, and half as many bytes of state again.
// In a cluster every block takes all tokens through its share of the hidden units, as in the forward. Sums that become errors
// or their adjoint are made in every block, those that become gradients of tokens in one of them. With the rebuilding that is
// 10 barriers of the cluster for every 16 tokens of D = 128 that are written and read.
//
// Where things live. A block has 64k registers; the float32 adjoint A of the state takes 2 D H of them (3 D H of a glu), half
// at 64 x 256, so that the weights W cannot be there too. Chunks are taken in segments, from one checkpoint to the next. The
// states of a segment are rebuilt by the forward's code, float32 in registers, while A is parked in the workspace; each
// chunk's first state leaves a 16-bit copy, a slot (every product rounds weights to 16 bits anyhow). Then the segment is
// walked back with A in registers and the slot's W in shared memory. Both lie as the forward's state does: a warp has its
// hidden units, and packed to 16 bits the accumulators of A^T are B fragments of A. The adjoint G of the momentum does not fit
// on chip: it lies in the workspace, float32 and as a 16-bit copy for products, and is read and written by the thread that
// holds its part of A.
//
// One chunk, u the weights of its tokens in the write with the sign of the step (S_in, S_out: with momentum, its adjoint G
// has the same products as A, with weights of its own):
//   (1) z = K W_in, h = act(z), delta = h W_out (+ K) - V                            summed over the warps
//   (2) p = delta W_out^T, e = p act'(z), t = K A_in, n = delta A_out^T; d_step = sum (t e + h n);
//       d_e = u t, d_p = d_e act'(z), d_z = d_e p act''(z) + u n act'(z); d_delta = d_p W_out + (u h) A_out     summed
//   (3) d_z += (d_delta W_out^T) act'(z); d_K = d_z W_in^T + (u e) A_in^T (+ d_delta)  summed
//       A_out <- decay A_out + delta^T d_p + d_delta^T h  (transposed as it is held)
//   (4) A_in <- decay A_in + d_z^T K; then queries, which read the chunk's first state: their part of both.
// A glu has two of z, e, t, d_e and d_z, for its gates and what they gate, whose W_in and A_in lie in one matrix, tile by tile
// in turn; h = act(gate) up. The slope act'(z) is dh/dz by each of the two, act''(z) the matrix of second derivatives, and d_p
// the sum over both.
// Of dgd (1) to (4) are in backward_delta_rule.h.
// Steps walk the chunk in slices of 16 tokens; what (2) leaves for (3) and (3) for (4) is a thread's own, 16 bits a number,
// in shared memory where that has room. All sums have a fixed order.
#pragma once

#include "backward_products.h"

namespace hope::cuda {

template <class Traits>
class BackwardScan : private BackwardProducts<Traits> {
  using Products = BackwardProducts<Traits>;
  using Products::activate;
  using Products::add_adjoint_in;
  using Products::add_adjoint_out;
  using Products::add_to_in;
  using Products::add_to_out;
  using Products::add_weight_in;
  using Products::add_weight_out;
  using Products::back_;
  using Products::begin_phase;
  using Products::bend;
  using Products::by_adjoint_in;
  using Products::by_adjoint_out;
  using Products::by_weight_in;
  using Products::by_weight_out;
  using Products::clear_adjoint;
  using Products::clear_unwritten;
  using Products::clear_written;
  using Products::copy;
  using Products::cuts;
  using Products::each_input;
  using Products::each_pair;
  using Products::each_unit;
  using typename Products::Element;
  using Products::enter;
  using Products::first_of_segment;
  using typename Products::Group;
  using typename Products::Here;
  using Products::here_;
  using Products::keep;
  using Products::kGroups;
  using Products::kInputs;
  using Products::live;
  using Products::load_adjoint;
  using Products::load_piece;
  using Products::momentum_adjoint;
  using Products::momentum_operand;
  using Products::momentum_slot;
  using typename Products::Numbers;
  using Products::of_chunk;
  using Products::of_tokens;
  using Products::pack;
  using Products::packed;
  using typename Products::PackedGroup;
  using typename Products::PackedInputs;
  using typename Products::PackedUnits;
  using typename Products::Parts;
  using Products::overlap_rows;
  using Products::overlap_units;
  using Products::own_workspace;
  using Products::pair_at;
  using Products::piece;
  using Products::place_;
  using Products::predicts;
  using Products::problem_;
  using Products::reads;
  using Products::rebuild;
  using Products::recall;
  using Products::recall_turned;
  using Products::remainder;
  using Products::retention;
  using Products::row_sums;
  using Products::scalar_sums;
  using Products::scale;
  using Products::scale_of;
  using Products::slices;
  using Products::slot;
  using Products::slot_before;
  using Products::spread;
  using Products::state_;
  using typename Products::StateTiles;
  using Products::steps;
  using Products::store_adjoint;
  using Products::store_gradients;
  using Products::sum_;
  using Products::sum_parts;
  using Products::sum_tiles;
  using Products::systems;
  using Products::tensor;
  using Products::thread_;
  using Products::tile;
  using Products::turn;
  using Products::unpack;
  using Products::unpacked;
  using Products::weigh;
  using Products::weight;
  using Products::written;
  using Products::weights_in;
  using Products::weights_out;

 public:
  __device__ __forceinline__ BackwardScan(const BackwardParams& params, char* shared) : Products(params, shared) {}

  __device__ __forceinline__ void run() {
    const BackwardResult& result = back_.result;
    if (thread_ == 0) {
      block_shared<Place>() = place_of(back_.problem, blockIdx.x / this->blocks(), back_.rebuild.span);
      here_ = Here{back_.layout, own_workspace(), 1.0f, back_.problem.q.data != nullptr, {}, 0, 0, 0};
      bool live = false;
      for (int i = 0; i <= kInputs; ++i) live |= result.grad_weights[i].data || result.grad_momentum[i].data;
      here_.live[0] = here_.live[1] = live;
      enter(place_.pieces - 1);
    }
    __syncthreads();  // the place is known
    clear_unwritten();
    load_adjoint();
#pragma unroll 1
    while (piece() >= 0) {
      if (first_of_segment(piece())) rebuild();
      if (cuts(piece())) clear_adjoint();
      begin_phase();
      load_piece(piece());
      if (written(piece())) {
        if constexpr (Traits::kDelta)
          write_adjoint_delta();
        else
          write_adjoint();
      } else if (this->writes(piece())) {
        clear_written(piece());
      }
      // What reads the chunk's first state: the values of `self`, then the queries.
#pragma unroll 1
      for (int queries = 0; queries < 2; ++queries) {
        const bool scaled = !queries && written(piece());
        if (queries ? reads(piece()) : scaled && problem_.objective == Objective::self)
          rows_adjoint(piece(), queries, scaled ? scale() : 1.0f);
        if (Traits::kType == DType::float16 && scaled) this->multiply_state(scale());
      }
      const int done = piece();
      __syncthreads();  // the results are complete
      if (thread_ == 0) {
        here_.live[(done & 1) ^ 1] = live(done) || reads(done);
        enter(done - 1);
      }
      begin_phase();
      store_gradients(done);
      __syncthreads();  // nobody reads them any more
    }
    store_adjoint();
    sum_.leave();
  }

 private:
  // ---- reads ---------------------------------------------------------------------------------------------------------

  // The adjoint of f(x) for the queries, or of -f(x) for the values: their gradient takes their place. What reaches f(x) is
  // divided by the scale.
  __device__ __forceinline__ void rows_adjoint(int piece, bool queries, float scale) {
    begin_phase();
    Element* rows = tensor(queries ? kRead : kTargets);
    Element* upstream = tensor(queries ? kUpstream : kDDelta);
    const int first = queries ? this->first_query(piece) / kSlice : 0, count = this->token_count(piece);
    const int end = queries ? (count + kSlice - 1) / kSlice : slices();
    const float sign = queries ? 1.0f : -1.0f, residual = problem_.residual ? sign * scale : 0.0f;
    if (!sum_.together()) __syncthreads();  // the sums before these were read, as in a cluster
#pragma unroll 1
    for (int s = first; s < end; ++s) {
      PackedUnits hidden;
      PackedInputs d_inputs;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Group h, slopes, d_hidden;
        by_weight_in(h, rows, s, i);
        activate(h, slopes);
        pack(hidden, i, h, sign, sign);
        by_weight_out(d_hidden, upstream, s, i);
        spread(d_hidden, [&](int n, int e, float y) { return y * (sign * slopes[n][e]); });
        pack(d_inputs, i, d_hidden);
      }
      add_to_out(hidden, upstream, s);
      PackedInputs turned;
      copy(turned, d_inputs);
      add_to_in(turned, rows, s);
      sum_parts(
          s, false, [&](int p, float(&y)[2][4]) { add_weight_in(y, d_inputs, p); },
          [&](int row, int column, float x0, float x1) {
            const float2 up = Numbers::unpack(pair_at(upstream, row, column));
            pair_at(rows, row, column) = Numbers::pack(fmaf(residual, up.x, scale * x0), fmaf(residual, up.y, scale * x1));
          });
    }
  }

  // ---- writes --------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void write_adjoint() {
    carry_adjoint(piece(), slot_before(piece()));
    if (predicts()) form_delta();
    __syncthreads();  // the last slice's errors are complete
    errors_adjoint();
    __syncthreads();  // their adjoint is complete, and so are the sums of coefficients
    begin_phase();
    store_coefficients(piece());
    const auto decay = [&](int, int, float(&x)[4]) { multiply(x, of_chunk(problem_.decay, piece(), 1.0f) / scale()); };
    each_out(state_, decay);
    keys_adjoint();
    each_in(state_, decay);
    add_kept_to_in();
  }
  __device__ __forceinline__ void add_kept_to_in() {
    begin_phase();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedInputs d_inputs;
      recall(s, Parts::kDInputs, d_inputs);
      add_to_in(d_inputs, tensor(kChunkKeys), s);
    }
  }
  static __device__ __forceinline__ void multiply(float (&x)[4], float factor) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= factor;
  }

  // The gradients of decay, carry and the momentum's decay, and the adjoint of the momentum through them.
  __device__ __forceinline__ void carry_adjoint(int piece, int which) {
    float sums[3] = {0.0f, 0.0f, 0.0f};
    const auto dot = [](const float (&x)[4], const float4& y) { return x[0] * y.x + x[1] * y.y + x[2] * y.z + x[3] * y.w; };
    if (here_.workspace.remainders) {
      // A sum of many numbers of either sign: what rounding took from the slot would be seen in it.
      const Lane lane(thread_);
      const int unit = thread_ / kWarp * Traits::kUnits;
      const auto in =
          reinterpret_cast<const uint32_t*>(weights_in() + (kInputs * unit + lane.group) * Traits::kPitch + lane.pair);
      const Element* out = weights_out() + (unit + lane.pair) * Traits::kPitch + lane.group;
      const PackedState<Traits> rest = remainder(which);
      each_in(state_, [&](int i, int j, float(&x)[4]) {
        const int at = (16 * i * Traits::kPitch + 8 * j) / 2;
        sums[0] += dot(x, unpacked(uint2{in[at], in[at + 4 * Traits::kPitch]})) + dot(x, unpacked(rest.in(i, j)));
      });
      each_out(state_, [&](int i, int j, float(&x)[4]) {
        const Element* w = out + 8 * j * Traits::kPitch + 16 * i;
        const float4 rounded{float(w[0]), float(w[Traits::kPitch]), float(w[8]), float(w[Traits::kPitch + 8])};
        sums[0] += dot(x, rounded) + dot(x, unpacked(rest.out(i, j)));
      });
    }
    if constexpr (Traits::kMomentum) {
      const float carry = of_chunk(problem_.momentum_carry, piece, 0.0f);
      const float decay = of_chunk(problem_.momentum_decay, piece, 0.0f);
      const auto step = [&](float(&x)[4], float4& adjoint, uint2& operand, const float4& speed) {
        const float4 old = adjoint;
        sums[1] += dot(x, speed);
        sums[2] += old.x * speed.x + old.y * speed.y + old.z * speed.z + old.w * speed.w;
        operand = packed(old);
        adjoint = float4{fmaf(carry, x[0], decay * old.x), fmaf(carry, x[1], decay * old.y),
                         fmaf(carry, x[2], decay * old.z), fmaf(carry, x[3], decay * old.w)};
      };
      const ParkedState<Traits> adjoint = momentum_adjoint(), slot = momentum_slot(which);
      const PackedState<Traits> operand = momentum_operand();
      each_in(state_, [&](int i, int j, float(&x)[4]) { step(x, adjoint.in(i, j), operand.in(i, j), slot.in(i, j)); });
      each_out(state_, [&](int i, int j, float(&x)[4]) { step(x, adjoint.out(i, j), operand.out(i, j), slot.out(i, j)); });
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (thread_ % kWarp == 0) scalar_sums(i)[thread_ / kWarp] = sums[i];
    }
  }

  // (1) The errors of the keys.
  __device__ __forceinline__ void form_delta() {
    begin_phase();
    const bool self = problem_.objective == Objective::self;
    const float residual = problem_.residual ? 1.0f : 0.0f, of_target = self ? residual : 1.0f;
    Element *keys = tensor(kChunkKeys), *targets = tensor(kTargets), *delta = tensor(kDelta);
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedUnits hidden;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        // Of `self` f(k) - f(v) is one product: that of the difference of their hidden values.
        Group h = {};
#pragma unroll 1
        for (int of_keys = self ? 0 : 1; of_keys < 2; ++of_keys) {
          Group x;
          by_weight_in(x, of_keys ? keys : targets, s, i);
          activate(x);
          each_unit([&](int n, int e, int) { h[n][e] = x[n][e] - h[n][e]; });
        }
        pack(hidden, i, h);
      }
      sum_parts(
          s, true, [&](int p, float(&y)[2][4]) { add_weight_out(y, hidden, p); },
          [&](int row, int column, float x0, float x1) {
            const float2 k = Numbers::unpack(pair_at(keys, row, column)), v = Numbers::unpack(pair_at(targets, row, column));
            pair_at(delta, row, column) =
                Numbers::pack(fmaf(-of_target, v.x, fmaf(residual, k.x, x0)), fmaf(-of_target, v.y, fmaf(residual, k.y, x1)));
          });
    }
  }

  // (2) The write and the errors of the hidden units: the adjoint of delta, divided by the scale like all that follows.
  __device__ __forceinline__ void errors_adjoint() {
    begin_phase();
    const Lane lane(thread_);
    const StateTiles adjoint{state_};
    const PackedState<Traits> speed = momentum_operand();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      const Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta);
      Element* d_delta = tensor(kDDelta);
      float of_step[2], of_momentum[2], d_step[2] = {0.0f, 0.0f}, d_momentum_step[2] = {0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        of_step[r] = steps(0)[s * kSlice + lane.group + 8 * r];
        if constexpr (Traits::kMomentum) of_momentum[r] = steps(1)[s * kSlice + lane.group + 8 * r];
      }
      PackedInputs errors, d_inputs;
      PackedUnits d_passed, hidden;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        begin_phase();
        Group h, slopes, curves, error, x;
        by_weight_in(h, keys, s, i);
        activate(h, slopes, curves);
        by_weight_out(error, delta, s, i);
        spread(error, [&](int n, int e, float y) {
          curves[n][e] *= y;
          return y * slopes[n][e];
        });
        // With momentum they are multiplied by either weight when they are used.
        if constexpr (Traits::kMomentum)
          pack(errors, i, error);
        else
          pack(errors, i, error, of_step[0], of_step[1]);
        by_adjoint_in(x, keys, s, i, adjoint);
        each_input([&](int n, int e, int r) {
          d_step[r] = fmaf(x[n][e], error[n][e], d_step[r]);
          x[n][e] *= of_step[r];
        });
        if constexpr (Traits::kMomentum) {
          Group y;
          by_adjoint_in(y, keys, s, i, speed);
          each_input([&](int n, int e, int r) {
            d_momentum_step[r] = fmaf(y[n][e], error[n][e], d_momentum_step[r]);
            x[n][e] = fmaf(of_momentum[r], y[n][e], x[n][e]);
          });
        }
        bend(curves, x, slopes);
        pack(d_passed, i, x);
        by_adjoint_out(x, delta, s, i, adjoint);
        each_unit([&](int n, int e, int r) {
          d_step[r] = fmaf(h[n][e], x[n][e], d_step[r]);
          x[n][e] *= of_step[r];
        });
        if constexpr (Traits::kMomentum) {
          Group y;
          by_adjoint_out(y, delta, s, i, speed);
          each_unit([&](int n, int e, int r) {
            d_momentum_step[r] = fmaf(h[n][e], y[n][e], d_momentum_step[r]);
            x[n][e] = fmaf(of_momentum[r], y[n][e], x[n][e]);
          });
          pack(hidden, i, h);
        } else {
          pack(hidden, i, h, of_step[0], of_step[1]);
        }
        spread(x, [&](int n, int e, float y) { return fmaf(y, slopes[n][e], curves[n][e]); });
        pack(d_inputs, i, x);
        keep(s, Parts::kErrors, i, errors);
        keep(s, Parts::kDPassed, i, d_passed);
        keep(s, Parts::kDInputs, i, d_inputs);
      }
      sum_rows(0, s, d_step);
      PackedUnits hidden_momentum;
      if constexpr (Traits::kMomentum) {
        sum_rows(1, s, d_momentum_step);
        copy(hidden_momentum, hidden);
        weigh(hidden_momentum, 1, s);
        weigh(hidden, 0, s);
      }
      begin_phase();
      sum_parts(
          s, true,
          [&](int p, float(&y)[2][4]) {
            add_weight_out(y, d_passed, p);
            add_adjoint_out(y, hidden, p, adjoint);
            if constexpr (Traits::kMomentum) add_adjoint_out(y, hidden_momentum, p, speed);
          },
          [&](int row, int column, float x0, float x1) { pair_at(d_delta, row, column) = Numbers::pack(x0, x1); });
    }
  }

  // This warp's part of a number per token, of rows g and g + 8.
  __device__ __forceinline__ void sum_rows(int which, int slice, float (&x)[2]) const {
    const Lane lane(thread_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] += __shfl_xor_sync(0xffffffffu, x[r], 1);
      x[r] += __shfl_xor_sync(0xffffffffu, x[r], 2);
      if (lane.pair == 0)
        row_sums(which)[thread_ / kWarp * back_.rebuild.rows + slice * kSlice + lane.group + 8 * r] = x[r];
    }
  }

  __device__ __forceinline__ void store_coefficients(int piece) const {
    if (this->rank() > 0) return;  // one block adds up those of all
    const BackwardResult& result = back_.result;
    const int64_t row = place_.coefficient_row(problem_, piece);
    const float sign = problem_.objective == Objective::dot ? 1.0f : -1.0f;
    const auto store = [&](void* gates, int which) {
      if (!gates) return;
      for (int t = thread_; t < back_.rebuild.span; t += Traits::kThreads) {
        const float sum = sum_.total(row_sums(which) + t, back_.rebuild.rows);
        static_cast<float*>(gates)[row * problem_.chunk_size + t] = sign * sum;
      }
    };
    store(result.step, 0);
    if constexpr (Traits::kMomentum) store(result.momentum_step, 1);
    if (thread_ < 3) {
      void* factor = thread_ == 0 ? result.decay : thread_ == 1 ? result.momentum_carry : result.momentum_decay;
      if (factor) static_cast<float*>(factor)[row] = sum_.total(scalar_sums(thread_), 1);
    }
  }

  // (3) The layers at the keys: their gradient over delta, and the adjoint of W_out.
  __device__ __forceinline__ void keys_adjoint() {
    begin_phase();
    Element *keys = tensor(kChunkKeys), *delta = tensor(kDelta), *d_delta = tensor(kDDelta);
    const StateTiles adjoint{state_};
    const bool predicted = predicts();
#pragma unroll 1
    for (int s = 0; s < slices(); ++s) {
      PackedInputs d_inputs;
      recall(s, Parts::kDInputs, d_inputs);
      if (predicted) {
        PackedUnits hidden;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          Group h, slopes, x;
          by_weight_in(h, keys, s, i);
          activate(h, slopes);
          pack(hidden, i, h);
          by_weight_out(x, d_delta, s, i);
          Group direct;
          unpack(direct, d_inputs, i);
          spread(x, [&](int n, int e, float y) { return fmaf(y, slopes[n][e], direct[n][e]); });
          pack(d_inputs, i, x);
          keep(s, Parts::kDInputs, i, d_inputs);
        }
        add_to_out(hidden, d_delta, s);
      }
      {
        PackedUnits d_passed;
        recall(s, Parts::kDPassed, d_passed);
        add_to_out(d_passed, delta, s);
      }
      PackedInputs errors, errors_momentum;
      recall(s, Parts::kErrors, errors);
      if constexpr (Traits::kMomentum) {
        copy(errors_momentum, errors);
        weigh(errors_momentum, 1, s);
        weigh(errors, 0, s);
      }
      sum_parts(
          s, false,
          [&](int p, float(&y)[2][4]) {
            add_weight_in(y, d_inputs, p);
            add_adjoint_in(y, errors, p, adjoint);
            if constexpr (Traits::kMomentum) add_adjoint_in(y, errors_momentum, p, momentum_operand());
          },
          [&](int row, int column, float x0, float x1) {
            const float2 d = Numbers::unpack(pair_at(d_delta, row, column));
            const float residual = predicted && problem_.residual ? 1.0f : 0.0f;
            x0 = fmaf(residual, d.x, x0), x1 = fmaf(residual, d.y, x1);
            pair_at(delta, row, column) = Numbers::pack(scale() * x0, scale() * x1);
          });
    }
  }

  // ---- writes by dgd, in backward_delta_rule.h -----------------------------------------------------------------------

  __device__ __forceinline__ void write_adjoint_delta();
  __device__ __forceinline__ void form_delta_and_products();
  __device__ __forceinline__ void form_systems(int piece);
  __device__ __forceinline__ void output_errors_adjoint(int piece);
  __device__ __forceinline__ void correct_errors();
  __device__ __forceinline__ void errors_adjoint_delta();
  __device__ __forceinline__ void keys_adjoint_delta();
  __device__ __forceinline__ void coefficients_adjoint(System system, int piece);
  __device__ __forceinline__ void store_coefficients_delta(int piece) const;
  template <int kTiles, class Left, class Right, class Finish>
  __device__ __forceinline__ void overlap_kept(const Left& left, const Right& right, const Finish& finish);
};

}  // namespace hope::cuda

#include "backward_delta_rule.h"
