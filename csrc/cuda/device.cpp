// Calls of the CUDA runtime that need no kernel, and so no nvcc.
#include "device.h"

#include "launch.h"

namespace hope::cuda {

Status use_device(int number) { return status_of(cudaSetDevice(number), "choosing the device"); }

}  // namespace hope::cuda
