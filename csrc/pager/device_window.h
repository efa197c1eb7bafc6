#pragma once
#include <cuda_runtime.h>

#include "pager/window.h"

namespace flashcore {

void launch_window(const WindowParams& params, const WindowInput& input, const WindowFields& out, int multiprocessors,
                   cudaStream_t stream);
void launch_cut_mask(const WindowFields& fields, const WindowMask& mask, int multiprocessors, cudaStream_t stream);

}  // namespace flashcore
