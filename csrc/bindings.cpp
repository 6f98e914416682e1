// The Python module hope_kernels._core: unpacks problems described by plain tuples of integers, runs them without the
// interpreter lock, and turns a status into an exception. With bindings.h and bindings_cuda.cpp all that knows pybind11.
#include "bindings.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace {

using hope::ScanProblem;
using hope::bindings::FactoredTables;
using hope::bindings::Items;
using hope::bindings::raise;
using hope::bindings::read_backward;
using hope::bindings::read_forward;
using hope::bindings::read_problem;
using hope::bindings::step_problem;

void scan_forward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                  const py::tuple& coefficients, const py::tuple& states, const py::tuple& results, int threads) {
  ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  problem.threads = threads;
  const hope::ForwardResult result = read_forward(results);
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::scan_forward(problem, result);
  }
  raise(status);
}

void scan_backward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                   const py::tuple& coefficients, const py::tuple& states, const py::tuple& given,
                   const py::tuple& results, int threads) {
  ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  problem.threads = threads;
  const hope::BackwardResult result = read_backward(given, results);
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::scan_backward(problem, result);
  }
  raise(status);
}

int64_t factored_kept_bytes(const py::tuple& vocabulary, const py::tuple& sizes) {
  const py::tuple none = py::make_tuple(py::none(), py::none());
  const py::tuple empty = py::make_tuple(py::tuple(), py::tuple(), py::none(), py::none(), py::tuple(), py::none());
  return hope::cpu::factored_kept_bytes(FactoredTables(vocabulary, sizes, none, empty, 1).chunk());
}

// results: output, stride, hidden, errors.
void factored_forward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens, const py::tuple& memory,
                      const py::tuple& results, int threads) {
  const FactoredTables tables(vocabulary, sizes, tokens, memory, threads);
  hope::FactoredResult result{};
  Items r(results.ptr(), "results", 4);
  result.output = r.tokens();
  result.stride = r.number();
  result.hidden = r.pointer();
  r.pointers(result.errors, "errors");
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::factored_forward(tables.chunk(), result);
  }
  raise(status);
}

// given: gradients of output, hidden and errors; results: those of x and target, of weights, a and gamma.
void factored_backward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                       const py::tuple& memory, const py::tuple& given, const py::tuple& results, int threads) {
  const FactoredTables tables(vocabulary, sizes, tokens, memory, threads);
  hope::FactoredGradients gradients{};
  Items g(given.ptr(), "given", 3);
  gradients.grad_output = g.tokens();
  gradients.grad_hidden = g.pointer();
  g.pointers(gradients.grad_errors, "gradients of errors");
  Items r(results.ptr(), "results", 5);
  gradients.x = r.tokens();
  gradients.target = r.tokens();
  r.pointers(gradients.weights, "gradients of weights");
  gradients.scale = r.pointer();
  gradients.decay = r.pointer();
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::factored_backward(tables.chunk(), gradients);
  }
  raise(status);
}

// from: address, dtype, matrices, rows, columns, elements between matrices, between rows; to: address, elements between rows.
void transpose_matrices(const py::tuple& from, const py::tuple& to, int threads) {
  Items f(from.ptr(), "from", 7);
  hope::MatrixView view;
  view.data = f.pointer();
  view.dtype = static_cast<hope::DType>(f.number());
  const int64_t matrices = f.number(), rows = f.number(), columns = f.number();
  view.head = f.number();
  view.in = f.number();
  view.out = 1;
  Items t(to.ptr(), "to", 2);
  void* target = t.pointer();
  const int64_t stride = t.number();
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::transpose_matrices(view, matrices, rows, columns, target, stride, threads);
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

py::object step_refusal(const py::tuple& settings, const py::tuple& levels) {
  return hope::bindings::refusal(hope::check_step_problem(step_problem(settings, levels)));
}

int64_t step_workspace(const py::tuple& settings, const py::tuple& levels) {
  return hope::cpu::step_workspace(step_problem(settings, levels));
}

void step(const py::tuple& settings, const py::tuple& levels, int64_t x, int64_t x_row, int64_t output, int64_t workspace,
          int64_t workspace_bytes, int threads) {
  hope::StepProblem problem = step_problem(settings, levels);
  problem.x = reinterpret_cast<const void*>(x);
  problem.x_row = x_row;
  problem.output = reinterpret_cast<void*>(output);
  hope::Status status;
  {
    py::gil_scoped_release release;
    status = hope::cpu::step(problem, reinterpret_cast<void*>(workspace), workspace_bytes, threads);
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
  m.def("factored_kept_bytes", &factored_kept_bytes, "Bytes that a chunk of the factored plan keeps for its backward.");
  m.def("factored_forward", &factored_forward, "One chunk of the factored plan; see hope_kernels.memory.factored_ops.");
  m.def("factored_backward", &factored_backward, "Its adjoint.");
  m.def("transpose_matrices", &transpose_matrices, "Transposed copies of matrices.");
  m.def("step", &step, "One token through all levels of a CMS; see hope_kernels.backends.cpu.step.");
  m.def("step_refusal", &step_refusal, "Why the engine does not compute a step, or None.");
  m.def("step_workspace", &step_workspace, "Bytes that a step needs.");
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
