#pragma once
#include <cuda_runtime.h>

#include "common/check.h"

// Raises RuntimeError when a CUDA runtime call fails.
#define FC_CUDA(expr)                                                             \
  do {                                                                            \
    if (cudaError_t fc_err = (expr); fc_err != cudaSuccess)                       \
      TVM_FFI_THROW(RuntimeError) << #expr << ": " << cudaGetErrorString(fc_err); \
  } while (0)
