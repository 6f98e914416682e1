// Small steps on the CUDA engine, for ThreadSanitizer: three written levels and a plain one, sequences at different tokens,
// so that some memories are written, some start again, and some only keep their token.
//
// Of the words in a case's name, `split` shares a memory among blocks, `independent` lets all levels read the input, `glu`
// and `linear` choose the form (otherwise mlp), `one` takes one sequence instead of nine, `long` writes a chunk of 40
// tokens, `many` gives a memory more pieces than a block has warps.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda/step.h"

extern "C" int run_case(const char* name) {
  const auto has = [&](const char* word) { return std::strstr(name, word) != nullptr; };
  constexpr int64_t kHeads = 2, kDim = 8;
  const int64_t hidden = has("many") ? 296 : 40;
  const int64_t chunks[] = {1, 2, has("long") ? 40 : 4, 0}, batch = has("one") ? 1 : 9, width = kHeads * kDim;
  const int64_t seen = has("long") ? 39 : 3;  // by the one sequence
  const hope::Form form = has("glu") ? hope::Form::glu : has("linear") ? hope::Form::linear : hope::Form::mlp;
  std::deque<std::vector<float>> memory;
  const auto numbers = [&](int64_t count, float scale) {
    std::vector<float>& x = memory.emplace_back(size_t(count + 4));
    for (size_t i = 0; i < x.size(); ++i) x[i] = scale * std::sin(float(i) * 0.7f + float(memory.size()));
    return x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / sizeof(float);
  };
  hope::StepProblem p{};
  p.dtype = hope::DType::float32;
  p.independent = has("independent");
  p.split = has("split");
  p.batch = batch, p.heads = kHeads, p.dim = kDim, p.level_count = 4;
  for (int l = 0; l < 4; ++l) {
    hope::StepLevel& level = p.levels[l];
    level.form = form;
    level.chunk_size = chunks[l];
    level.segment = l == 0 ? 6 : l == 2 ? 2 * chunks[l] : 0;
    const bool plain = chunks[l] == 0;
    const int64_t in = plain ? width : kDim, copies = plain ? 1 : kHeads;
    level.hidden = form == hope::Form::linear ? 0 : hidden;
    level.step_bound = 0.1f;
    const int weights = hope::weight_count(form);
    for (int i = 0; i < weights; ++i) {
      const int64_t size = in * (form == hope::Form::linear ? in : hidden);
      level.initial[i] = numbers(copies * size, 0.2f);
      if (plain) continue;
      level.weights[i] = numbers(batch * copies * size, 0.2f);
      if (l == 1) level.momentum[i] = numbers(batch * copies * size, 0.01f);
    }
    if (plain) continue;
    const int64_t kept = batch * chunks[l] * kHeads;
    level.target = numbers(width * width, 0.1f);
    level.gate_weight = numbers(3 * kHeads * width, 0.1f);
    level.gate_bias = numbers(3 * kHeads, 0.1f);
    level.k = numbers(kept * kDim, 0.3f);
    level.v = numbers(kept * kDim, 0.3f);
    level.lr = numbers(kept, 0.1f);
    if (l != 2) level.retention = numbers(kept, 0.1f);
    if (l == 1) level.momentum_gate = numbers(kept, 0.1f);
    level.predictions = numbers(kept * kDim, 0.3f);
  }
  p.mix = numbers(4, 1);
  p.x = numbers(batch * width, 1);
  p.x_row = width;
  std::vector<float> output(size_t(batch * width), NAN);
  p.output = output.data();
  std::vector<int64_t> positions(size_t(batch), 0);
  for (int64_t b = 0; b < batch; ++b) positions[size_t(b)] = has("one") ? seen : b;
  p.positions = positions.data();
  std::vector<double> workspace(size_t(hope::cuda::step_workspace(p)) / 8 + 1, NAN);
  const hope::Status status = hope::cuda::step(p, workspace.data(), int64_t(workspace.size()) * 8, 0, nullptr);
  if (status.code != hope::StatusCode::ok) return std::fprintf(stderr, "%s\n", status.message), 1;
  for (float x : output)
    if (!std::isfinite(x)) return std::fprintf(stderr, "an output is %g\n", double(x)), 1;
  for (int64_t b = 0; b < batch; ++b)
    if (positions[size_t(b)] != (has("one") ? seen : b) + 1) return std::fprintf(stderr, "a sequence was not moved on\n"), 1;
  return 0;
}
