// Sums over the threads of a CTA.
#pragma once
#include <cuda_runtime.h>

namespace flashcore {

// Exclusive prefix of x over the threads of kWarps warps; `total` is the sum. `scratch`: [kWarps], shared.
template <int kWarps, typename T>
__device__ __forceinline__ T block_scan(T x, T* scratch, T& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T inclusive = x;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const T other = __shfl_up_sync(~0u, inclusive, i);
    if (lane >= i) inclusive += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? scratch[i] : 0;
    total += scratch[i];
  }
  return before + inclusive - x;
}

}  // namespace flashcore
