// The backward scan of mlp memories in a cluster of blocks, without momentum.
#include "backward_kernels.h"

namespace hope::cuda {

template Status start_backward<BackwardKind<Form::mlp, Rule::gd, true>, false>(
    const ScanProblem&, const BackwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
