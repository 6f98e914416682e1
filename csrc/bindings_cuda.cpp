// The part of the Python module that calls the CUDA engine; compiled where nvcc is. Tables as bindings.h describes them.
#include "bindings.h"
#include "cuda/level_update.h"

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

}  // namespace

void add_cuda(py::module_& m) {
  m.def("cuda_level_update", &level_update, "Update tensors of several levels; see hope_kernels.backends.cuda.");
  m.def("cuda_level_update_workspace", &level_update_workspace,
        "Bytes that an update of tensors of these sizes and so many levels needs.");
}

}  // namespace hope::bindings
