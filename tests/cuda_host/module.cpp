// A Python module with the CUDA engine's functions, run on the CPU by the host layer.
// One source instead of two: reading pybind11's headers takes most of the time.
#include "bindings_cuda.cpp"

PYBIND11_MODULE(cuda_on_host, m) {
  hope::bindings::add_cuda(m);
  m.attr("cuda_architectures") = "80 90";
}
