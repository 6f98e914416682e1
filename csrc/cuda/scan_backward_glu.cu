// The backward scan of glu memories without momentum.
#include "backward_kernels.h"

namespace hope::cuda {

template Status start_backward<BackwardKind<Form::glu>, false>(
    const ScanProblem&, const BackwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
