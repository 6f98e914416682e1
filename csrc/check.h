// Whether the description of a scan is consistent in itself: what every engine refuses before it looks at what it can run.
#pragma once

#include "memory.h"

namespace hope {

inline Status check_problem(const ScanProblem& p) {
  const auto invalid = [](const char* message) { return Status{StatusCode::invalid_argument, message}; };
  if (p.dim < 1) return invalid("dim must be positive");
  if (p.form != Form::linear && p.hidden < 1) return invalid("hidden must be positive");
  if (p.chunk_size < 1) return invalid("chunk_size must be positive");
  if (p.checkpoint_interval < 1) return invalid("checkpoint_interval must be positive");
  if (p.batch < 0 || p.tokens < 0 || p.heads < 0 || p.sequence_count < 0 || p.chunks < 0 || p.pending_capacity < 0)
    return invalid("sizes must not be negative");
  if (!p.q.data && !p.k.data && p.batch * p.tokens * p.heads > 0) return invalid("neither q nor k is given");
  if (!p.k.data != !p.v.data && p.batch * p.tokens * p.heads > 0) return invalid("k and v are given together or not at all");
  if (!p.sequences && p.sequence_count != p.batch) return invalid("without a table there is one sequence per batch row");
  if (!p.sequences && p.k.data && p.chunks != (p.pending_capacity + p.tokens) / p.chunk_size)
    return invalid("chunks must be the number of complete chunks");
  if (p.chunks > 0 && !p.step) return invalid("step is missing");
  if (p.pending_capacity > 0 && p.chunks > 0 && (!p.pending_k.data || !p.pending_v.data))
    return invalid("pending_k and pending_v are missing");
  if (p.rule == Rule::dgd && (p.momentum_step || p.decay)) return invalid("dgd takes neither momentum nor decay");
  if (p.rule == Rule::gd && p.retention) return invalid("gd takes decay, not retention");
  if (!p.momentum_step != !p.momentum_carry || !p.momentum_step != !p.momentum_decay)
    return invalid("momentum needs all three of its coefficients");
  for (int i = 0; i < weight_count(p.form); ++i)
    if (!p.weights[i].data) return invalid("a weight is missing");
  return {};
}

}  // namespace hope
