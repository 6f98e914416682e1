// The CUDA scan behind C functions, for the tests: called from Python (scan.py) on problems of Python's making, and from a
// program of its own (case_main.cpp) under ThreadSanitizer on small problems made here.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <cuda_bf16.h>

#include "cuda/scan.h"

using namespace hope;

namespace {

int report(const Status& status, char* message, size_t size) {
  std::snprintf(message, size, "%s", status.message);
  return int(status.code);
}

// Numbers in [-1, 1) that look random.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return float(int64_t(state_ >> 40) - (1 << 23)) / float(1 << 23);
  }
  std::vector<float> floats(int64_t count, float scale) {
    std::vector<float> x(count);
    for (float& y : x) y = scale * next();
    return x;
  }
  std::vector<__nv_bfloat16> tokens(int64_t count) {
    std::vector<__nv_bfloat16> x(count);
    for (__nv_bfloat16& y : x) y = __float2bfloat16(0.3f * next());
    return x;
  }

 private:
  uint64_t state_ = 1;
};

}  // namespace

extern "C" {

size_t problem_bytes() { return sizeof(ScanProblem); }
size_t forward_result_bytes() { return sizeof(ForwardResult); }
size_t backward_result_bytes() { return sizeof(BackwardResult); }

int supports_forward(const ScanProblem* problem, const ForwardResult* result, const cuda::Device* device, char* message,
                     size_t size) {
  return report(cuda::supports_forward(*problem, *result, *device), message, size);
}

int scan_forward(const ScanProblem* problem, const ForwardResult* result, const cuda::Device* device, char* message,
                 size_t size) {
  std::vector<float> workspace(cuda::forward_workspace(*problem) / sizeof(float), NAN);
  return report(cuda::scan_forward(*problem, *result, *device, workspace.data(), nullptr), message, size);
}

int scan_backward(const ScanProblem* problem, const BackwardResult* result, const cuda::Device* device, char* message,
                  size_t size) {
  const Status status = cuda::supports_backward(*problem, *result, *device);
  if (status.code != StatusCode::ok) return report(status, message, size);
  std::vector<float> workspace(cuda::backward_workspace(*problem, *result, *device) / sizeof(float), NAN);
  return report(cuda::scan_backward(*problem, *result, *device, workspace.data(), nullptr), message, size);
}

// One head of one sequence: `chunks` chunks of 20 tokens, three of them pending, and two tokens behind. Words of the name:
// "small" for a memory of 32 x 128 instead of 64 x 256, "cluster" for one that takes two blocks, "single" for shared memory
// that has room for one stage (backward: one set of partial sums), "glu", "dgd", "momentum", "self", "write" for no queries,
// "short" for chunks of one slice, "backward" for that.
int run_case(const char* name) {
  const std::string words = name;
  const auto has = [&](const char* word) { return words.find(word) != std::string::npos; };
  const bool momentum = has("momentum"), glu = has("glu"), cluster = has("cluster"), delta = has("dgd");
  const int64_t odd = has("backward") ? 128 : 72;  // only rows that are whole are copied without registers between
  const int64_t D = has("small") ? 32 : cluster ? (glu ? 40 : odd) : 64, H = cluster ? 136 : 4 * D;
  const int64_t C = has("short") ? 12 : 20, chunks = 2, pending = 3, T = chunks * C - pending + 2;
  Numbers numbers;
  auto q = numbers.tokens(T * D), k = numbers.tokens(T * D), v = numbers.tokens(T * D), y = numbers.tokens(T * D);
  auto old_k = numbers.tokens(pending * D), old_v = numbers.tokens(pending * D);
  const auto w_in = numbers.floats(D * H, 0.2f), w_out = numbers.floats(D * H, 0.1f);
  const auto step = numbers.floats(chunks * C, 0.1f), scalars = numbers.floats(chunks, 0.9f);
  const auto retention = numbers.floats(chunks * C, 0.9f);
  std::vector<float> states[6];
  for (auto& state : states) state.assign(D * H, 0.0f);

  ScanProblem p{};
  p.form = glu ? Form::glu : Form::mlp;
  p.activation = Activation::gelu_tanh;
  p.objective = has("self") ? Objective::self : Objective::l2;
  p.rule = delta ? Rule::dgd : Rule::gd;
  p.residual = 1;
  p.dtype = DType::bfloat16;
  p.batch = p.heads = p.sequence_count = 1;
  p.tokens = T, p.dim = D, p.hidden = H;
  p.pending_capacity = pending, p.chunk_size = C, p.chunks = chunks, p.checkpoint_interval = has("backward") ? 2 : 1;
  const auto view = [&](std::vector<__nv_bfloat16>& x) { return TokenView{x.data(), int64_t(x.size()), D, D}; };
  p.q = has("write") ? TokenView{} : view(q);
  p.k = view(k), p.v = view(v), p.pending_k = view(old_k), p.pending_v = view(old_v);
  p.step = step.data();
  if (delta)
    p.retention = retention.data();
  else
    p.decay = scalars.data();
  if (momentum) p.momentum_step = step.data(), p.momentum_carry = p.momentum_decay = scalars.data();
  const int inputs = weight_count(p.form) - 1;
  for (int i = 0; i < inputs; ++i)
    p.weights[i] = MatrixView{const_cast<float*>(w_in.data()), DType::float32, D * H, D * H, H, 1};
  p.weights[inputs] = MatrixView{const_cast<float*>(w_out.data()), DType::float32, D * H, D * H, D, 1};
  std::vector<float> checkpoints[6];
  for (auto& checkpoint : checkpoints) checkpoint.assign(chunks * D * H, 0.0f);
  ForwardResult r{};
  if (p.q.data) r.output = view(y);
  for (int i = 0; i <= inputs; ++i) {
    r.weights[i] = states[i].data();
    r.checkpoints[i] = checkpoints[i].data();
    if (momentum) r.momentum[i] = states[3 + i].data(), r.checkpoints[kMaxWeights + i] = checkpoints[3 + i].data();
  }
  const int64_t small_room = has("backward") ? (delta ? 75000 : 58000) + (glu ? (delta ? 10000 : 8000) : 0) : 58000;
  const int64_t room = !has("single") ? 232448 : D == 64 ? 120000 : small_room;
  const cuda::Device device{90, room};
  if (has("backward")) {
    // All gradients, over the results of a forward; the checkpoints are zeros.
    auto dq = y, dk = k, dv = v, old_dk = old_k, old_dv = old_v;
    std::vector<float> gates[2], factors[3];
    for (auto& gate : gates) gate.assign(chunks * C, 0.0f);
    for (auto& factor : factors) factor.assign(chunks, 0.0f);
    BackwardResult b{};
    b.grad_output = view(y);
    b.q = view(dq), b.k = view(dk), b.v = view(dv), b.pending_k = view(old_dk), b.pending_v = view(old_dv);
    b.step = gates[0].data();
    if (delta)
      b.retention = gates[1].data();
    else
      b.decay = factors[0].data();
    if (momentum) {
      b.momentum_step = gates[1].data();
      b.momentum_carry = factors[1].data(), b.momentum_decay = factors[2].data();
    }
    for (int i = 0; i <= inputs; ++i) {
      b.checkpoints[i] = checkpoints[i].data(), b.checkpoints[kMaxWeights + i] = checkpoints[3 + i].data();
      b.grad_weights[i] = p.weights[i];
      b.weights[i] = states[i].data();
    }
    std::vector<float> workspace(cuda::backward_workspace(p, b, device) / sizeof(float), NAN);
    const Status status = cuda::scan_backward(p, b, device, workspace.data(), nullptr);
    if (status.code != StatusCode::ok) return std::fprintf(stderr, "%s\n", status.message), 1;
    return 0;
  }
  std::vector<float> workspace(cuda::forward_workspace(p) / sizeof(float), NAN);
  const Status status = cuda::scan_forward(p, r, device, workspace.data(), nullptr);
  if (status.code != StatusCode::ok) return std::fprintf(stderr, "%s\n", status.message), 1;
  return 0;
}

}  // extern "C"
