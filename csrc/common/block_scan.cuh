// Prefix sums over the threads of a CTA of kWarps warps, several at a time. `scratch`: [kCount][kWarps], shared.
// Shuffles are what it costs, so warps without anything to add leave them out. The steps are not unrolled: code that
// comes cold from memory takes longer than they do.
#pragma once
#include <cuda_runtime.h>

namespace flashcore {

// Inclusive prefixes over the lanes replace x.
template <typename T, int kCount>
__device__ __forceinline__ void warp_scan(T (&x)[kCount]) {
  const int lane = threadIdx.x % 32;
  bool any = false;
#pragma unroll
  for (int n = 0; n < kCount; ++n) any |= x[n] != 0;
  if (!__any_sync(~0u, any)) return;
#pragma unroll 1
  for (int i = 1; i < 32; i *= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const T other = __shfl_up_sync(~0u, x[n], i);
      if (lane >= i) x[n] += other;
    }
  }
}

// Exclusive prefixes over the threads replace x; `total` are the sums.
template <int kWarps, typename T, int kCount>
__device__ __forceinline__ void block_scan(T (&x)[kCount], T (&total)[kCount], T (*scratch)[kWarps]) {
  static_assert(kWarps == 32 && kCount <= kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T inclusive[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) inclusive[n] = x[n];
  warp_scan(inclusive);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    if (lane == 31) scratch[n][warp] = inclusive[n];
  }
  __syncthreads();
  if (warp < kCount) {
    T of_warps[1] = {scratch[warp][lane]};
    warp_scan(of_warps);
    scratch[warp][lane] = of_warps[0];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    total[n] = scratch[n][kWarps - 1];
    x[n] = (warp > 0 ? scratch[n][warp - 1] : 0) + inclusive[n] - x[n];
  }
}

// The same of one number; returns the prefix.
template <int kWarps, typename T>
__device__ __forceinline__ T block_scan(T x, T* scratch, T& total) {
  T one[1] = {x}, sum[1];
  block_scan<kWarps>(one, sum, reinterpret_cast<T(*)[kWarps]>(scratch));
  total = sum[0];
  return one[0];
}

}  // namespace flashcore
