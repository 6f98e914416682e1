// The forward scan of glu memories in a cluster of blocks.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<ScanKind<Form::glu, Rule::gd, true>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);
template Status start_forward<ScanKind<Form::glu, Rule::dgd, true>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
