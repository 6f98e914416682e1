// The part of the Python module that calls the CUDA engine; compiled where nvcc is. Tables as bindings.h describes them.
#include "bindings.h"
#include "cuda/device.h"
#include "cuda/level_update.h"
#include "cuda/scan.h"
#include "cuda/step.h"

namespace hope::bindings {
namespace {

void level_update(const py::tuple& tensors, const py::tuple& levels, float weight, float max_norm, int64_t norms,
                  int64_t workspace, int64_t workspace_bytes, int device, int64_t stream) {
  const UpdateTables tables(tensors, levels);
  const LevelUpdateProblem problem = tables.problem(weight, max_norm, norms);
  Status status;
  {
    py::gil_scoped_release release;
    status = cuda::level_update(problem, reinterpret_cast<void*>(workspace), workspace_bytes, device,
                                reinterpret_cast<void*>(stream));
  }
  raise(status);
}

int64_t level_update_workspace(const py::tuple& sizes, int64_t levels) {
  Items items(sizes.ptr(), "sizes");
  int64_t pieces = 0;
  for (size_t i = 0; i < sizes.size(); ++i) pieces += piece_count(items.number());
  return cuda::level_update_workspace(int64_t(sizes.size()), levels, pieces);
}

// Makes a device the current one: (architecture, bytes of shared memory one block may have).
py::tuple device(int number) {
  cuda::Device found;
  raise(cuda::use_device(number));
  raise(cuda::current_device(&found));
  return py::make_tuple(found.architecture, found.shared_memory);
}

cuda::Device read_device(const py::tuple& device) {
  Items items(device.ptr(), "device", 2);
  cuda::Device found;
  found.architecture = static_cast<int32_t>(items.number());
  found.shared_memory = items.number();
  return found;
}

py::object forward_refusal(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                           const py::tuple& coefficients, const py::tuple& states, const py::tuple& results,
                           const py::tuple& device) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  return refusal(cuda::supports_forward(problem, read_forward(results), read_device(device)));
}

py::object backward_refusal(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                            const py::tuple& coefficients, const py::tuple& states, const py::tuple& given,
                            const py::tuple& results, const py::tuple& device) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  return refusal(cuda::supports_backward(problem, read_backward(given, results), read_device(device)));
}

int64_t forward_workspace(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                          const py::tuple& coefficients, const py::tuple& states) {
  return cuda::forward_workspace(read_problem(vocabulary, sizes, tokens, coefficients, states));
}

int64_t backward_workspace(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                           const py::tuple& coefficients, const py::tuple& states, const py::tuple& given,
                           const py::tuple& results, const py::tuple& device) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  return cuda::backward_workspace(problem, read_backward(given, results), read_device(device));
}

// Runs start() on the device of that number.
template <class Start>
void launch_on(int number, const Start& start) {
  Status status;
  {
    py::gil_scoped_release release;
    status = cuda::use_device(number);
    if (status.code == StatusCode::ok) status = start();
  }
  raise(status);
}

void scan_forward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                  const py::tuple& coefficients, const py::tuple& states, const py::tuple& results,
                  const py::tuple& device, int64_t workspace, int number, int64_t stream) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  const ForwardResult result = read_forward(results);
  const cuda::Device known = read_device(device);
  launch_on(number, [&] {
    return cuda::scan_forward(problem, result, known, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
  });
}

void scan_backward(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                   const py::tuple& coefficients, const py::tuple& states, const py::tuple& given,
                   const py::tuple& results, const py::tuple& device, int64_t workspace, int number, int64_t stream) {
  const ScanProblem problem = read_problem(vocabulary, sizes, tokens, coefficients, states);
  const BackwardResult result = read_backward(given, results);
  const cuda::Device known = read_device(device);
  launch_on(number, [&] {
    return cuda::scan_backward(problem, result, known, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
  });
}

void step(const py::tuple& settings, const py::tuple& levels, int64_t x, int64_t x_row, int64_t output, int64_t workspace,
          int64_t workspace_bytes, int device, int64_t stream) {
  StepProblem problem = step_problem(settings, levels);
  problem.x = reinterpret_cast<const void*>(x);
  problem.x_row = x_row;
  problem.output = reinterpret_cast<void*>(output);
  Status status;
  {
    py::gil_scoped_release release;
    status = cuda::step(problem, reinterpret_cast<void*>(workspace), workspace_bytes, device,
                        reinterpret_cast<void*>(stream));
  }
  raise(status);
}

py::object step_refusal(const py::tuple& settings, const py::tuple& levels) {
  return refusal(cuda::check_step(step_problem(settings, levels)));
}

int64_t step_shared_memory(const py::tuple& settings, const py::tuple& levels) {
  return cuda::step_shared_memory(step_problem(settings, levels));
}

int64_t step_workspace(const py::tuple& settings, const py::tuple& levels) {
  return cuda::step_workspace(step_problem(settings, levels));
}

}  // namespace

void add_cuda(py::module_& m) {
  m.def("cuda_device", &device, "Architecture and shared memory of a device, which is then the current one.");
  m.def("cuda_forward_refusal", &forward_refusal, "None, or why such a device does not compute this forward scan.");
  m.def("cuda_backward_refusal", &backward_refusal, "The same for a backward scan.");
  m.def("cuda_forward_workspace", &forward_workspace, "Bytes of device memory that a forward scan works in.");
  m.def("cuda_backward_workspace", &backward_workspace, "Bytes of device memory that a backward scan works in.");
  m.def("cuda_scan_forward", &scan_forward, "Start a chunked scan; see hope_kernels.backends.cuda.");
  m.def("cuda_scan_backward", &scan_backward, "Start the adjoint of a chunked scan; see hope_kernels.backends.cuda.");
  m.def("cuda_level_update", &level_update, "Update tensors of several levels; see hope_kernels.backends.cuda.");
  m.def("cuda_level_update_workspace", &level_update_workspace,
        "Bytes that an update of tensors of these sizes and so many levels needs.");
  m.def("cuda_step", &step, "One token through all levels of a CMS; see hope_kernels.backends.cuda.step.");
  m.def("cuda_step_refusal", &step_refusal, "Why the kernel does not compute a step, or None.");
  m.def("cuda_step_shared_memory", &step_shared_memory, "Bytes of shared memory that one block of a step takes.");
  m.def("cuda_step_workspace", &step_workspace, "Bytes that a step needs.");
}

}  // namespace hope::bindings
