// The forward scan of glu memories in one block.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<ScanKind<Form::glu, Rule::gd>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);
template Status start_forward<ScanKind<Form::glu, Rule::dgd>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
