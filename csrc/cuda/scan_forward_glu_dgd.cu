// The forward scan of glu memories written by delta gradient descent.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<Form::glu, Rule::dgd>(const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
