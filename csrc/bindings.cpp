// The Python module hope_kernels._core: unpacks problems described by plain tuples of integers, runs them without the
// interpreter lock, and turns a status into an exception. With bindings.h and bindings_cuda.cpp all that knows pybind11.
//
// A token tensor is None or (address, row stride, token stride, head stride); a matrix tensor is None or (address, dtype,
// sequence stride, head stride, in stride, out stride); strides count elements, dtypes are the numbers of hope::DType.
#include "bindings.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace {

using hope::ScanProblem;
using hope::bindings::Items;
using hope::bindings::raise;

ScanProblem read_problem(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                         const py::tuple& coefficients, const py::tuple& states, int threads) {
  ScanProblem problem{};
  Items v(vocabulary.ptr(), "vocabulary", 6);
  problem.form = static_cast<hope::Form>(v.number());
  problem.activation = static_cast<hope::Activation>(v.number());
  problem.objective = static_cast<hope::Objective>(v.number());
  problem.rule = static_cast<hope::Rule>(v.number());
  problem.residual = static_cast<int32_t>(v.number());
  problem.dtype = static_cast<hope::DType>(v.number());
  Items s(sizes.ptr(), "sizes", 12);
  problem.batch = s.number();
  problem.tokens = s.number();
  problem.heads = s.number();
  problem.dim = s.number();
  problem.hidden = s.number();
  problem.sequence_count = s.number();
  problem.pending_capacity = s.number();
  problem.chunk_size = s.number();
  problem.chunks = s.number();
  problem.first_chunk = s.number();
  problem.bptt_chunks = s.number();
  problem.checkpoint_interval = s.number();
  Items t(tokens.ptr(), "tokens", 5);
  problem.q = t.tokens();
  problem.k = t.tokens();
  problem.v = t.tokens();
  problem.pending_k = t.tokens();
  problem.pending_v = t.tokens();
  Items c(coefficients.ptr(), "coefficients", 6);
  problem.step = c.pointer();
  problem.retention = c.pointer();
  problem.decay = c.pointer();
  problem.momentum_step = c.pointer();
  problem.momentum_carry = c.pointer();
  problem.momentum_decay = c.pointer();
  Items w(states.ptr(), "states", 3);
  w.matrices(problem.weights, "weights");
  w.matrices(problem.momentum, "momentum");
  problem.sequences = static_cast<const hope::Sequence*>(w.pointer());
  problem.threads = threads;
  return problem;
}

// results: output, weights, momentum, weight checkpoints, momentum checkpoints, segment (None or address, bytes per task).
void scan_forward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                  const py::tuple& coefficients, const py::tuple& states, const py::tuple& results, int threads) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states, threads);
  hope::ForwardResult result{};
  Items r(results.ptr(), "results", 6);
  result.output = r.tokens();
  r.pointers(result.weights, "final weights");
  r.pointers(result.momentum, "final momentum");
  r.pointers(result.checkpoints, "weight checkpoints");
  r.pointers(result.checkpoints + hope::kMaxWeights, "momentum checkpoints");
  result.segment = r.segment();
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::scan_forward(problem, result);
  }
  raise(status);
}

// given: weight checkpoints, momentum checkpoints, segment, grad_output, grad_weights, grad_momentum.
// results: q, k, v, pending_k, pending_v; the six coefficients; weights; momentum.
void scan_backward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                   const py::tuple& coefficients, const py::tuple& states, const py::tuple& given,
                   const py::tuple& results, int threads) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states, threads);
  hope::BackwardResult result{};
  Items g(given.ptr(), "given", 6);
  g.pointers(result.checkpoints, "weight checkpoints");
  g.pointers(result.checkpoints + hope::kMaxWeights, "momentum checkpoints");
  result.segment = g.segment();
  result.grad_output = g.tokens();
  g.matrices(result.grad_weights, "grad_weights");
  g.matrices(result.grad_momentum, "grad_momentum");
  Items r(results.ptr(), "results", 13);
  result.q = r.tokens();
  result.k = r.tokens();
  result.v = r.tokens();
  result.pending_k = r.tokens();
  result.pending_v = r.tokens();
  result.step = r.pointer();
  result.retention = r.pointer();
  result.decay = r.pointer();
  result.momentum_step = r.pointer();
  result.momentum_carry = r.pointer();
  result.momentum_decay = r.pointer();
  r.pointers(result.weights, "weight gradients");
  r.pointers(result.momentum, "momentum gradients");
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::scan_backward(problem, result);
  }
  raise(status);
}

void level_update(const py::tuple& tensors, const py::tuple& levels, float weight, float max_norm, int64_t norms,
                  int threads) {
  const hope::bindings::UpdateTables tables(tensors, levels);
  const hope::LevelUpdateProblem problem = tables.problem(weight, max_norm, norms);
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::level_update(problem, threads);
  }
  raise(status);
}

std::string isa() {
  const char* problem = "";
  const hope::cpu::Variant* variant = hope::cpu::variant(&problem);
  if (!variant) throw std::runtime_error(problem);
  return variant->name;
}

py::list isas() {
  const char* names[8];
  py::list list;
  const int count = hope::cpu::usable_variants(names, 8);
  for (int i = 0; i < count; ++i) list.append(names[i]);
  return list;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled engines of hope_kernels.";
  m.def("scan_forward", &scan_forward, "Run a chunked scan; see hope_kernels.backends.cpu.");
  m.def("scan_backward", &scan_backward, "Adjoint of a chunked scan; see hope_kernels.backends.cpu.");
  m.def("level_update", &level_update, "Update tensors of several levels; see hope_kernels.backends.cpu.");
  m.def("isa", &isa, "Instruction set in use: the newest this processor has, or the one HOPE_KERNELS_CPU_ISA names.");
  m.def("isas", &isas, "Instruction sets this build and this processor share, newest first.");
  m.def(
      "fma_peak",
      [](int threads) {
        py::gil_scoped_release release;
        return hope::cpu::fma_peak(threads);
      },
      py::arg("threads"), "Measured peak of float32 multiply-adds held in registers, FLOP/s.");
  m.def(
      "copy_bandwidth",
      [](int threads) {
        py::gil_scoped_release release;
        return hope::cpu::copy_bandwidth(threads);
      },
      py::arg("threads"), "Measured bandwidth of a copy beyond the caches, bytes read plus written per second.");
#if defined(HOPE_KERNELS_CUDA_ARCHITECTURES)
  hope::bindings::add_cuda(m);
  m.attr("cuda_architectures") = HOPE_KERNELS_CUDA_ARCHITECTURES;
#endif
}
