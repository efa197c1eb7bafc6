// Sums over the threads of a CTA of kWarps warps, several at a time. `scratch`: [kCount][kWarps], shared.
#pragma once
#include <cuda_runtime.h>

namespace flashcore {

// The sums replace x, in every thread.
template <int kWarps, typename T, int kCount>
__device__ __forceinline__ void block_sum(T (&x)[kCount], T (*scratch)[kWarps]) {
  static_assert(kWarps == 32);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x[n] += __shfl_xor_sync(~0u, x[n], i);
    if (threadIdx.x % 32 == 0) scratch[n][threadIdx.x / 32] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    x[n] = scratch[n][threadIdx.x % 32];
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x[n] += __shfl_xor_sync(~0u, x[n], i);
  }
}

// Exclusive prefixes over the threads replace x; `total` are the sums.
template <int kWarps, typename T, int kCount>
__device__ __forceinline__ void block_scan(T (&x)[kCount], T (&total)[kCount], T (*scratch)[kWarps]) {
  static_assert(kWarps == 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T inclusive[kCount];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    inclusive[n] = x[n];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const T other = __shfl_up_sync(~0u, inclusive[n], i);
      if (lane >= i) inclusive[n] += other;
    }
    if (lane == 31) scratch[n][warp] = inclusive[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    T of_warps = scratch[n][lane];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const T other = __shfl_up_sync(~0u, of_warps, i);
      if (lane >= i) of_warps += other;
    }
    const T before = __shfl_sync(~0u, of_warps, (warp + 31) % 32);
    total[n] = __shfl_sync(~0u, of_warps, 31);
    x[n] = (warp > 0 ? before : 0) + inclusive[n] - x[n];
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
