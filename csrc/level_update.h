// What an engine is handed for an update of many tensors of many levels, and the checks every engine makes.
//
// A level is updated every `period` steps; until then its gradients only gather. For each element, every step:
//   sum = accumulator + weight * gradient
// and where the level is due, with g = sum * scale * (clipping coefficient), lambda the tensor's decay:
//   sgd        p = (1 - lr lambda) p - lr g
//   momentum   m = beta1 m + g                                p = (1 - lr lambda) p - lr (nesterov ? g + beta1 m : m)
//   adam       m = beta1 m + gain1 g;  v = beta2 v + gain2 g^2
//              p = (1 - lr lambda) p - lr (m / correction1) / (sqrt(v / correction2) + eps)
// the accumulator is 0 again and the 16-bit copy is p rounded to nearest even. Where it is not due, accumulator = sum.
//
// Tensors are cut into pieces of kPieceElements, numbered through all tensors in order. A norm is the root of the sum of the
// pieces' sums of squares, taken in that order: it depends on neither the grid nor the number of threads.
#pragma once

#include "memory.h"

namespace hope {

constexpr int64_t kPieceElements = 8192;

enum class UpdateRule : int32_t { sgd = 0, momentum = 1, adam = 2 };

// One tensor: contiguous, `size` elements each. Null where absent.
struct UpdateTensor {
  float* parameter;
  const void* gradient;  // absent: no gradient this step
  float* accumulator;    // absent only where the level is due at every step
  float* first;          // m, where the rule has it
  float* second;         // v
  void* copy;            // of the parameter, in copy_dtype
  int64_t size;
  int64_t first_piece;
  int32_t level;
  DType gradient_dtype;  // float32, bfloat16, float16
  DType copy_dtype;      // bfloat16, float16
  float decay;
};

struct UpdateLevel {
  UpdateRule rule;
  int32_t due, nesterov;
  int64_t first_piece, pieces;  // its tensors follow one another
  float lr, beta1, beta2, eps;
  float gain1, gain2;  // 1 - beta, rounded once: 1 - float(0.999) would be wrong in the fifth digit
  float correction1, correction2;  // 1 - beta^updates: only adam's
  float scale;
  float max_norm;  // of sum * scale over the level's tensors; not positive: no bound
};

struct LevelUpdateProblem {
  const UpdateTensor* tensors;  // in the order of their levels; in host memory
  const UpdateLevel* levels;    // in host memory
  int64_t tensor_count, level_count;
  float weight;    // of this step's gradients
  float max_norm;  // over all due levels together; not positive: no bound
  float* norms;    // [level_count]: of each due level's sum * scale before clipping (with a common bound, their common
                   // norm), 0 for the others and where there is no bound
};

// Internal linkage: objects built for different instruction sets must not share a function.
static inline int64_t piece_count(int64_t size) { return (size + kPieceElements - 1) / kPieceElements; }
static inline bool clips(const LevelUpdateProblem& p, const UpdateLevel& level) {
  return level.due && (p.max_norm > 0 || level.max_norm > 0);
}
static inline int64_t total_pieces(const LevelUpdateProblem& p) {
  return p.level_count ? p.levels[p.level_count - 1].first_piece + p.levels[p.level_count - 1].pieces : 0;
}

static inline Status check(const LevelUpdateProblem& p) {
  const auto invalid = [](const char* message) { return Status{StatusCode::invalid_argument, message}; };
  if (p.tensor_count < 0 || p.level_count < 0) return invalid("counts must not be negative");
  if ((p.tensor_count && !p.tensors) || (p.level_count && (!p.levels || !p.norms)))
    return invalid("tensors, levels or norms are missing");
  int64_t tensor = 0, piece = 0;
  for (int64_t l = 0; l < p.level_count; ++l) {
    const UpdateLevel& level = p.levels[l];
    if (level.rule < UpdateRule::sgd || level.rule > UpdateRule::adam) return invalid("a rule is unknown");
    if (level.first_piece != piece) return invalid("the pieces of the levels do not follow one another");
    for (; tensor < p.tensor_count && p.tensors[tensor].level == l; ++tensor) {
      const UpdateTensor& t = p.tensors[tensor];
      if (t.size < 0 || t.first_piece != piece) return invalid("the pieces of the tensors do not follow one another");
      piece += piece_count(t.size);
      if (t.size == 0) continue;
      if (!t.parameter) return invalid("a parameter is missing");
      if (!t.accumulator && !level.due) return invalid("an accumulator is missing");
      if (level.rule != UpdateRule::sgd && !t.first) return invalid("a first moment is missing");
      if (level.rule == UpdateRule::adam && !t.second) return invalid("a second moment is missing");
      if (t.gradient && t.gradient_dtype != DType::float32 && t.gradient_dtype != DType::bfloat16 &&
          t.gradient_dtype != DType::float16)
        return invalid("gradients are float32, bfloat16 or float16");
      if (t.copy && t.copy_dtype != DType::bfloat16 && t.copy_dtype != DType::float16)
        return invalid("copies are bfloat16 or float16");
    }
    if (level.pieces != piece - level.first_piece) return invalid("a level has more or fewer pieces than its tensors");
  }
  return tensor == p.tensor_count ? Status{} : invalid("the tensors are not in the order of their levels");
}

}  // namespace hope
