// How a scan is launched, forward and backward: the plan that holds the memory, its shared memory and what the kernel is told.
// Host code only.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "forward_scan.h"
#include "launch.h"
#include "scan.h"

namespace hope::cuda {

// Tokens of a piece where nothing is written: enough to hide the latency of loading the next one.
constexpr int kReadSpan = 64;

inline Status refused(const char* reason) { return {StatusCode::unsupported, reason}; }

inline bool writes_state(const ScanProblem& problem) { return problem.k.data && problem.chunks > 0; }

// Whether every token row starts at a multiple of 16 bytes.
inline bool rows_aligned(std::initializer_list<TokenView> views) {
  for (const TokenView& view : views)
    if (view.data && (reinterpret_cast<uintptr_t>(view.data) % 16 || view.row % 8 || view.token % 8 || view.head % 8))
      return false;
  return true;
}

// The Place lies in front of the dynamic shared memory, which is aligned to 128.
constexpr int64_t kPlaceBytes = (int64_t(sizeof(Place)) + 127) / 128 * 128;

// Blocks that hold a memory together: a power of two, so that they share the work of a sum evenly.
template <class Traits>
int blocks_of(const ScanProblem& problem) {
  int blocks = 1;
  while (blocks < kMaxBlocks && blocks * Traits::kHidden < problem.hidden) blocks *= 2;
  return blocks;
}

// Sizes, stages and shared memory; stages 0 where the chunk does not fit.
template <class Traits>
ForwardParams make_params(const ScanProblem& problem, const ForwardResult& result, const Device& device) {
  ForwardParams params{};
  params.problem = problem;
  params.result = result;
  params.sigmoidal = sigmoidal_of(problem.activation);
  params.checkpoints = problem.sequences ? 0 : checkpoints_per_sequence(problem);
  const bool writes = writes_state(problem);
  params.span = writes ? int(problem.chunk_size) : kReadSpan;
  params.rows = (params.span + kSlice - 1) / kSlice * kSlice;
  params.blocks = blocks_of<Traits>(problem);
  for (params.stages = 2; params.stages > 0; --params.stages) {
    params.layout = scan_layout<Traits>(params.rows, params.stages, writes, problem.q.data, params.blocks);
    if (params.layout.bytes + kPlaceBytes <= device.shared_memory) break;
  }
  params.vectors =
      problem.dim == Traits::kDim &&
      rows_aligned({problem.q, problem.k, problem.v, problem.pending_k, problem.pending_v, result.output});
  const TokenView &q = problem.q, &k = problem.k;
  // With gd the product of `self` is not the output, and `dot` and `error` make none of the keys.
  const bool makes_outputs = problem.objective == Objective::l2 || problem.rule == Rule::dgd;
  params.shared_read = makes_outputs && q.data && q.data == k.data && q.row == k.row && q.token == k.token &&
                       q.head == k.head;
  const TokenView fresh[kTensors] = {problem.q, problem.k, problem.v};
  const TokenView pending[kTensors] = {problem.q, problem.pending_k, problem.pending_v};
  for (int t = 0; t < kTensors; ++t) params.tokens[t] = fresh[t], params.pending[t] = pending[t];
  return params;
}

// Whether the registers of one block may be too few for a memory of this size.
inline bool clustered(const ScanProblem& problem) {
  const int64_t D = problem.dim, H = problem.hidden;
  return problem.form == Form::glu ? D > 32 || H > 128 : D > 64 || H > 256;
}

// Starts a scan's kernel: `blocks` to every (sequence, head).
template <class Traits, class Params>
Status launch_scan(const char* what, const ScanProblem& problem, int blocks, int shared_bytes, void* stream,
                   void (*kernel)(Params), const Params& params) {
  if (blocks > 1) {
    // PTX of an older architecture runs on a newer device, but it knows nothing of clusters.
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return status_of(error, what);
    if (attributes.ptxVersion < 90)
      return refused("the state takes the registers of several blocks, and the kernels were not built for sm_90");
  }
  LaunchShape shape;
  shape.grid = dim3(unsigned(problem.sequence_count * problem.heads * blocks));
  shape.cluster = dim3(unsigned(blocks));
  shape.block = dim3(Traits::kThreads);
  shape.shared_bytes = size_t(shared_bytes);
  shape.stream = static_cast<cudaStream_t>(stream);
  return launch(what, shape, kernel, params);
}

// What kernels are compiled for, file by file.
template <Form kForm_, Rule kRule_, bool kCluster_ = false, bool kBackward_ = false>
struct ScanKind {
  static constexpr Form kForm = kForm_;
  static constexpr Rule kRule = kRule_;
  static constexpr bool kCluster = kCluster_;
  static constexpr bool kBackward = kBackward_;  // of a glu it has no clusters: its largest memory is among those without
};
// Calls body(ScanKind{}) with the problem's.
template <class Body>
Status with_kind(const ScanProblem& problem, const Body& body) {
  const auto with_cluster = [&](auto kind) {
    return clustered(problem) ? body(ScanKind<kind.kForm, kind.kRule, true>{}) : body(ScanKind<kind.kForm, kind.kRule>{});
  };
  const bool delta = problem.rule == Rule::dgd;
  if (problem.form == Form::glu)
    return delta ? with_cluster(ScanKind<Form::glu, Rule::dgd>{}) : with_cluster(ScanKind<Form::glu, Rule::gd>{});
  return delta ? with_cluster(ScanKind<Form::mlp, Rule::dgd>{}) : with_cluster(ScanKind<Form::mlp, Rule::gd>{});
}

// Calls body(Traits{}) with the smallest plan that holds a memory of this kind.
template <class Kind, DType kType, bool kMomentum, class Body>
Status with_sizes(const ScanProblem& problem, const Body& body) {
  constexpr Form kForm = Kind::kForm;
  constexpr Rule kRule = Kind::kRule;
  const int64_t D = problem.dim, H = problem.hidden;
  if constexpr (kForm == Form::glu && Kind::kCluster) {
    if (D <= 64) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, true, kRule>{});
    return body(ScanTraits<kType, 128, 64, kMomentum, kForm, true, kRule>{});
  } else if constexpr (Kind::kCluster) {
    return body(ScanTraits<kType, 128, 128, kMomentum, kForm, true, kRule>{});
  } else if constexpr (kForm == Form::glu) {
    if constexpr (Kind::kBackward)
      if (D > 32) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, false, kRule>{});
    return body(ScanTraits<kType, 32, 128, kMomentum, kForm, false, kRule>{});
  } else {
    if (D <= 32 && H <= 128) return body(ScanTraits<kType, 32, 128, kMomentum, kForm, false, kRule>{});
    if (H <= 128) return body(ScanTraits<kType, 64, 128, kMomentum, kForm, false, kRule>{});
    return body(ScanTraits<kType, 64, 256, kMomentum, kForm, false, kRule>{});
  }
}
template <class Kind, bool kMomentum, class Body>
Status with_types(const ScanProblem& problem, const Body& body) {
  return problem.dtype == DType::float16 ? with_sizes<Kind, DType::float16, kMomentum>(problem, body)
                                         : with_sizes<Kind, DType::bfloat16, kMomentum>(problem, body);
}
template <class Kind, class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  if constexpr (Kind::kRule == Rule::gd)
    if (problem.momentum_step) return with_types<Kind, true>(problem, body);
  return with_types<Kind, false>(problem, body);
}
template <class Body>
Status with_traits(const ScanProblem& problem, const Body& body) {
  return with_kind(problem, [&](auto kind) { return with_traits<decltype(kind)>(problem, body); });
}

}  // namespace hope::cuda
