// Starts the kernels of the forward scan, which are compiled in several files.
//
// Only those of clusters know instructions of sm_90, and are compiled for each architecture. All others are compiled to PTX
// of sm_80 once, from which the machine code of every architecture is made: that takes half the time.
#pragma once

#include "scan_plan.h"

namespace hope::cuda {

// `problem` is one that supports_forward accepts, of this kind.
template <class Kind>
Status start_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                     void* stream);

}  // namespace hope::cuda
