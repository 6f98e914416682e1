// The backward scan of mlp memories, written by delta gradient descent.
#include "backward_kernels.h"

namespace hope::cuda {

template Status start_backward<BackwardKind<Form::mlp, Rule::dgd>, false>(
    const ScanProblem&, const BackwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
