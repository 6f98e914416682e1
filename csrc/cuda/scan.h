// The CUDA engine's entry points: a chunked scan on one device. Plain C++, no CUDA and no tensor-library type, so that the
// bindings and the tests include it without either.
//
// A problem is described as for the CPU engine (../memory.h), with every address in the device's memory, the table of
// sequences included. `threads` is not used.
#pragma once

#include "memory.h"

namespace hope::cuda {

// What a kernel's plan depends on.
struct Device {
  int32_t architecture = 0;   // 10 * major + minor
  int64_t shared_memory = 0;  // bytes one block may have
};

// Whether the forward kernel computes this on such a device; otherwise `unsupported` with the reason, or `invalid_argument`.
// Looks at vocabulary, sizes, strides and which pointers are null; never at what they point to.
Status supports_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device);

// Bytes of device memory, aligned to 16, that the forward scan of a supported problem works in (0 without momentum, which
// does not fit on chip beside the weights).
int64_t forward_workspace(const ScanProblem& problem);

// Starts the forward scan on `stream` (a cudaStream_t, null: the default one) of the current device. Asynchronous: an error
// inside the kernel shows up where the stream is next waited for. The workspace's contents do not matter.
Status scan_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                    void* stream);

// The same for the backward: whether it is computed, the bytes it works in, and its start. Results are gradients, those of
// weights and momentum of each sequence; what a table leaves out of every sequence or chunk is not written.
Status supports_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device);
int64_t backward_workspace(const ScanProblem& problem, const BackwardResult& result, const Device& device);
Status scan_backward(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                     void* stream);

// The current device.
Status current_device(Device* device);

}  // namespace hope::cuda
