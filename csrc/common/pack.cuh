// Two floats rounded to 16 bits each, the first in the lower half. The pointer tells the dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashcore {

__device__ __forceinline__ uint32_t pack(float x, float y, const __nv_bfloat16*) {
  __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack(float x, float y, const __half*) {
  __half2 v = __floats2half2_rn(x, y);
  return reinterpret_cast<uint32_t&>(v);
}

}  // namespace flashcore
