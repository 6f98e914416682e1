// The forward scan of mlp memories in a cluster of blocks.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<ScanKind<Form::mlp, Rule::gd, true>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);
template Status start_forward<ScanKind<Form::mlp, Rule::dgd, true>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
