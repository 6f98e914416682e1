// Small updates on the CUDA engine, for ThreadSanitizer: three levels, tensors of odd sizes over several pieces and blocks.
// Of the words in a case's name, `own` bounds each level's norm, `common` all of them together, `narrow` takes bfloat16
// gradients and writes bfloat16 copies, `shifted` starts tensors where groups of four elements are not aligned.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/level_update.h"

namespace {

struct Memory {
  std::vector<float> parameter, gradient, accumulator, first, second;
  std::vector<uint16_t> copy;
};

}  // namespace

extern "C" int run_case(const char* name) {
  const auto has = [&](const char* word) { return std::strstr(name, word) != nullptr; };
  constexpr int64_t kSizes[] = {13, 0, hope::kPieceElements + 5, 1030, 2 * hope::kPieceElements + 1, 7};
  constexpr int kLevels[] = {0, 0, 0, 1, 1, 2};
  constexpr int kTensors = 6;
  const int64_t shift = has("shifted") ? 1 : 0;
  std::vector<Memory> memory(kTensors);
  std::vector<hope::UpdateTensor> tensors(kTensors);
  std::vector<hope::UpdateLevel> levels(3);
  int64_t piece = 0;
  for (int i = 0; i < kTensors; ++i) {
    Memory& m = memory[i];
    const size_t size = size_t(kSizes[i] + shift);
    m.parameter.assign(size, 1);
    m.gradient.assign(size, 0.5f);
    m.accumulator.assign(size, 0.25f);
    m.first.assign(size, 0);
    m.second.assign(size, 0);
    m.copy.assign(size, 0);
    hope::UpdateTensor& t = tensors[i];
    t = {m.parameter.data() + shift, m.gradient.data() + shift, m.accumulator.data() + shift, m.first.data() + shift,
         m.second.data() + shift,    nullptr,                   kSizes[i],                    piece,
         kLevels[i],                 hope::DType::float32,      hope::DType::bfloat16,        0.1f};
    if (has("narrow")) t.gradient_dtype = hope::DType::bfloat16, t.copy = m.copy.data() + shift;
    const int64_t pieces = hope::piece_count(kSizes[i]);
    hope::UpdateLevel& level = levels[kLevels[i]];
    if (level.pieces == 0) level.first_piece = piece;
    level.pieces += pieces;
    piece += pieces;
  }
  for (int l = 0; l < 3; ++l) {
    hope::UpdateLevel& level = levels[l];
    level.rule = static_cast<hope::UpdateRule>(2 - l);
    level.due = l != 1 || has("common");
    level.lr = 0.01f, level.beta1 = 0.9f, level.beta2 = 0.99f, level.eps = 1e-8f, level.gain1 = 0.1f, level.gain2 = 0.01f;
    level.correction1 = 0.1f, level.correction2 = 0.01f, level.scale = 1;
    level.max_norm = has("own") ? 1.0f : 0;
  }
  std::vector<float> norms(3, NAN);
  const hope::LevelUpdateProblem problem{tensors.data(), levels.data(), kTensors, 3, 1.0f, has("common") ? 1.0f : 0, norms.data()};
  std::vector<double> workspace(size_t(hope::cuda::level_update_workspace(kTensors, 3, piece)) / 8 + 1, NAN);
  const hope::Status status =
      hope::cuda::level_update(problem, workspace.data(), int64_t(workspace.size()) * 8, 0, nullptr);
  if (status.code != hope::StatusCode::ok) return std::fprintf(stderr, "%s\n", status.message), 1;
  for (const Memory& m : memory)
    for (float x : m.parameter)
      if (!std::isfinite(x)) return std::fprintf(stderr, "a parameter is %g\n", double(x)), 1;
  for (float x : norms)
    if (!std::isfinite(x)) return std::fprintf(stderr, "a norm is %g\n", double(x)), 1;
  return 0;
}
