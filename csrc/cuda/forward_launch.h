// Starts the kernels of the forward scan, which are compiled in a file of their own for each form of memory and rule.
#pragma once

#include "scan_plan.h"

namespace hope::cuda {

// `problem` is one that supports_forward accepts, of this form and rule.
template <Form kForm, Rule kRule>
Status start_forward(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                     void* stream);

}  // namespace hope::cuda
