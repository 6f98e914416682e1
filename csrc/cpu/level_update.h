// The update of many tensors of many levels for one instruction set; csrc/level_update.h has its equations.
//
// Memory-bound like the CUDA kernel: each element is read and written once, or, where a norm bounds the update, read once more
// before. A thread takes whole pieces and walks each in blocks that stay in the first-level cache, so that converting a
// 16-bit gradient or copy costs no traffic. What a piece yields does not depend on who computes it.
#pragma once

#include "../level_update.h"
#include "convert.h"
#include "thread_pool.h"

namespace hope::cpu::HOPE_ISA {

constexpr idx kUpdateBlock = 1024;

// sum[0 .. n) = accumulator + weight * gradient, from element i on.
inline void gather(float* __restrict sum, const UpdateTensor& tensor, float weight, idx i, idx n) {
  if (tensor.accumulator)
    std::memcpy(sum, tensor.accumulator + i, size_t(n) * sizeof(float));
  else
    std::memset(sum, 0, size_t(n) * sizeof(float));
  if (!tensor.gradient) return;
  with_element(tensor.gradient_dtype, [&](auto element) {
    using E = decltype(element);
    const auto* gradient = static_cast<const typename E::Memory*>(tensor.gradient) + i;
    for (idx j = 0; j < n; ++j) sum[j] += weight * float(E::read(gradient[j]));
  });
}

// Calls body(i, n) for the blocks of a piece.
template <class F>
HOPE_INLINE void for_each_block(const UpdateTensor& tensor, idx piece, const F& body) {
  const idx first = (piece - tensor.first_piece) * kPieceElements, end = min(first + kPieceElements, tensor.size);
  for (idx i = first; i < end; i += kUpdateBlock) body(i, min(kUpdateBlock, end - i));
}

inline float sum_squares(const UpdateTensor& tensor, float weight, idx piece) {
  double total = 0;
  for_each_block(tensor, piece, [&](idx i, idx n) {
    alignas(64) float x[kUpdateBlock];
    gather(x, tensor, weight, i, n);
    vfloat sum{};
    idx j = 0;
    for (; j + kLanes<float> <= n; j += kLanes<float>) sum += load(x + j) * load(x + j);
    total += sum_lanes<float>(sum);
    for (; j < n; ++j) total += double(x[j]) * x[j];
  });
  return float(total);
}

// One block of a due tensor, from its gathered gradients on.
inline void update_block(const UpdateTensor& tensor, const UpdateLevel& level, float* __restrict g, float scale, idx i, idx n) {
  float* __restrict p = tensor.parameter + i;
  const float kept = 1 - level.lr * tensor.decay, lr = level.lr, beta1 = level.beta1;
  for (idx j = 0; j < n; ++j) g[j] *= scale;
  if (level.rule == UpdateRule::sgd) {
    for (idx j = 0; j < n; ++j) p[j] = kept * p[j] - lr * g[j];
  } else if (level.rule == UpdateRule::momentum) {
    float* __restrict m = tensor.first + i;
    const float of_gradient = level.nesterov ? lr : 0, of_moment = level.nesterov ? lr * beta1 : lr;
    for (idx j = 0; j < n; ++j) {
      m[j] = beta1 * m[j] + g[j];
      p[j] = kept * p[j] - (of_moment * m[j] + of_gradient * g[j]);
    }
  } else {
    float *__restrict m = tensor.first + i, *__restrict v = tensor.second + i;
    const float beta2 = level.beta2, gain1 = level.gain1, gain2 = level.gain2, eps = level.eps;
    const float corrected = lr / level.correction1, root = 1 / __builtin_sqrtf(level.correction2);
    for (idx j = 0; j < n; ++j) {
      m[j] = beta1 * m[j] + gain1 * g[j];
      v[j] = beta2 * v[j] + gain2 * g[j] * g[j];
      p[j] = kept * p[j] - corrected * m[j] / (__builtin_sqrtf(v[j]) * root + eps);
    }
  }
  if (tensor.copy)
    with_element(tensor.copy_dtype, [&](auto element) {
      using E = decltype(element);
      auto* copy = static_cast<typename E::Memory*>(tensor.copy) + i;
      for (idx j = 0; j < n; ++j) copy[j] = typename E::Memory(E::write(p[j]));
    });
  if (tensor.accumulator) std::memset(tensor.accumulator + i, 0, size_t(n) * sizeof(float));
}

inline float clipping(float max_norm, float norm) {
  const float c = max_norm / (norm + 1e-6f);  // as torch.nn.utils.clip_grad_norm_
  return c < 1 ? c : (norm == norm ? 1.0f : norm);
}

// scales[l] = what level l's gathered gradients are multiplied with, from the pieces' sums of squares.
inline void level_scales(const LevelUpdateProblem& problem, const float* sums, float* scales) {
  double together = 0;
  for (idx l = 0; l < problem.level_count; ++l) {
    const UpdateLevel& level = problem.levels[l];
    scales[l] = level.scale;
    problem.norms[l] = 0;
    if (!clips(problem, level)) continue;
    double square = 0;
    for (idx i = 0; i < level.pieces; ++i) square += sums[level.first_piece + i];
    square *= double(level.scale) * level.scale;
    together += square;
    problem.norms[l] = float(__builtin_sqrt(square));
    if (!(problem.max_norm > 0)) scales[l] *= clipping(level.max_norm, problem.norms[l]);
  }
  if (!(problem.max_norm > 0)) return;
  const float norm = float(__builtin_sqrt(together));
  for (idx l = 0; l < problem.level_count; ++l) {
    if (!clips(problem, problem.levels[l])) continue;
    problem.norms[l] = norm;
    scales[l] *= clipping(problem.max_norm, norm);
  }
}

// Calls body(tensor, piece) for every piece of every tensor, on `threads` threads.
template <class F>
void for_each_piece(const LevelUpdateProblem& problem, int threads, const F& body) {
  struct Context {
    const LevelUpdateProblem& problem;
    const F& body;
  } context{problem, body};
  parallel_for(
      threads, total_pieces(problem),
      [](void* pointer, int64_t piece) {
        const Context& context = *static_cast<const Context*>(pointer);
        // The last tensor whose first piece is not beyond this one: an empty tensor has none of its own.
        idx low = 0, high = context.problem.tensor_count;
        while (high - low > 1) {
          const idx middle = (low + high) / 2;
          (context.problem.tensors[middle].first_piece <= piece ? low : high) = middle;
        }
        context.body(context.problem.tensors[low], piece);
      },
      &context);
}

// sums [pieces] and scales [levels] are scratch.
inline void level_update(const LevelUpdateProblem& problem, float* sums, float* scales, int threads) {
  bool any = false;
  for (idx l = 0; l < problem.level_count; ++l) any = any || clips(problem, problem.levels[l]);
  if (any)
    for_each_piece(problem, threads, [&](const UpdateTensor& tensor, idx piece) {
      if (clips(problem, problem.levels[tensor.level])) sums[piece] = sum_squares(tensor, problem.weight, piece);
    });
  level_scales(problem, sums, scales);
  for_each_piece(problem, threads, [&](const UpdateTensor& tensor, idx piece) {
    const UpdateLevel& level = problem.levels[tensor.level];
    for_each_block(tensor, piece, [&](idx i, idx n) {
      alignas(64) float g[kUpdateBlock];
      gather(g, tensor, problem.weight, i, n);
      if (level.due)
        update_block(tensor, level, g, scales[tensor.level], i, n);
      else
        std::memcpy(tensor.accumulator + i, g, size_t(n) * sizeof(float));
    });
  });
}

}  // namespace hope::cpu::HOPE_ISA
