// The forward scan of mlp memories in one block, written by delta gradient descent.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<ScanKind<Form::mlp, Rule::dgd>>(
    const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
