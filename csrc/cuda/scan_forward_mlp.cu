// The forward scan of mlp memories.
#include "forward_kernels.h"

namespace hope::cuda {

template Status start_forward<Form::mlp, Rule::gd>(const ScanProblem&, const ForwardResult&, const Device&, void*, void*);

}  // namespace hope::cuda
