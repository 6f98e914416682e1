// Which device a thread's launches go to. Plain C++: no CUDA header is needed to call it.
#pragma once

#include "../memory.h"

namespace hope::cuda {

// Makes the device of that number the current one of this thread.
Status use_device(int number);

}  // namespace hope::cuda
