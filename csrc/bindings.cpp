// The Python module hope_kernels._core: unpacks problems described by plain tuples of integers, runs them without the
// interpreter lock, and turns a status into an exception. With bindings.h and bindings_cuda.cpp all that knows pybind11.
#include "bindings.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace {

using hope::ScanProblem;
using hope::bindings::raise;
using hope::bindings::read_backward;
using hope::bindings::read_forward;
using hope::bindings::read_problem;

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
