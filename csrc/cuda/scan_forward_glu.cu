// The forward scan of glu memories.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<Form::glu, Rule::gd>(const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
