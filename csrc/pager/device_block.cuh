// What the pager's kernels share: scans, searches, a barrier of the grid, and how a violated bound is reported.
#pragma once
#include "pager/device_pager.h"

namespace flashcore::pager {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kNever = 0x7FFFFFFF;

template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return *reinterpret_cast<T*>(shared_bytes);
}

constexpr int kWholeCta = 0;

// A barrier of the CTA's first `threads` threads, a multiple of 32, or of all. Small batches leave the other warps out.
__device__ __forceinline__ void sync_first(int threads) {
  if (threads == kWholeCta) {
    __syncthreads();
  } else {
    asm volatile("barrier.cta.sync 1, %0;" ::"r"(threads) : "memory");
  }
}
// The same, and whether x holds for any of them.
__device__ __forceinline__ bool any_of_first(int threads, bool x) {
  unsigned any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.pred q, 1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<unsigned>(x)), "r"(threads)
      : "memory");
  return any != 0;
}

__device__ __forceinline__ int warp_scan(int value) {  // inclusive
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, d);
    if (lane >= d) value += below;
  }
  return value;
}

__device__ __forceinline__ int2 warp_scan(int2 value) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1  // code that comes cold from memory takes longer than the steps
  for (int d = 1; d < 32; d *= 2) {
    const int x = __shfl_up_sync(kAllLanes, value.x, d), y = __shfl_up_sync(kAllLanes, value.y, d);
    if (lane >= d) value.x += x, value.y += y;
  }
  return value;
}

// Sum of `value` over the threads before this one, and over the first `threads` of the CTA, which all call it, in
// *total. One barrier: two scans in a row want two scratch arrays, of [32].
__device__ __forceinline__ int block_scan(int value, int threads, int* scratch, int* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5,
            warps = (threads == kWholeCta ? blockDim.x : threads) >> 5;
  const int sum = warp_scan(value);
  if (lane == 31) scratch[warp] = sum;
  sync_first(threads);
  const int sums = warp_scan(lane < warps ? scratch[lane] : 0);
  const int before = __shfl_sync(kAllLanes, sums, (warp + 31) & 31);
  *total = __shfl_sync(kAllLanes, sums, 31);
  return (warp > 0 ? before : 0) + sum - value;
}

// Two sums at once. `scratch`: [32].
__device__ __forceinline__ int2 block_scan(int2 value, int threads, int2* scratch, int2* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5,
            warps = (threads == kWholeCta ? blockDim.x : threads) >> 5;
  const int2 sum = warp_scan(value);
  if (lane == 31) scratch[warp] = sum;
  sync_first(threads);
  const int2 sums = warp_scan(lane < warps ? scratch[lane] : make_int2(0, 0));
  const int source = (warp + 31) & 31;
  const int x = __shfl_sync(kAllLanes, sums.x, source), y = __shfl_sync(kAllLanes, sums.y, source);
  *total = make_int2(__shfl_sync(kAllLanes, sums.x, 31), __shfl_sync(kAllLanes, sums.y, 31));
  return make_int2((warp > 0 ? x : 0) + sum.x - value.x, (warp > 0 ? y : 0) + sum.y - value.y);
}

// The i in [0, n) with begins[i] <= x < begins[i + 1]; begins ascends and ends above x.
__device__ __forceinline__ int find_interval(const int* begins, int n, int x) {
  int low = 0, high = n;  // begins[low] <= x < begins[high]
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    if (begins[middle] <= x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ void add_release(unsigned* word, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// A barrier of all CTAs of a cooperative launch. After `wait` a CTA sees what the others wrote before `arrive` (with
// __ldcg: L1 is not coherent). The word's top bit flips when the last CTA arrives, so that it needs no reset.
class GridBarrier {
 public:
  // Made before this CTA arrives for the first time: the bit cannot flip until then.
  __device__ __forceinline__ explicit GridBarrier(unsigned* word) : word_(word), phase_(*word & kTop) {}

  __device__ __forceinline__ void arrive() {
    __syncthreads();
    // Not the first warp: a release waits for what the CTA has written, and the first warps have more to do.
    if (threadIdx.x == blockDim.x - 1) add_release(word_, blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1u);
    phase_ ^= kTop;
  }
  // For the CTA's first `threads` threads, which all call it.
  __device__ __forceinline__ void wait(int threads = kWholeCta) const {
    if (threadIdx.x == 0) {
      while ((load_acquire(word_) & kTop) != phase_) {
      }
    }
    sync_first(threads);
  }

 private:
  static constexpr unsigned kTop = 0x80000000u;
  unsigned* word_;
  unsigned phase_;
};

// As Status::Code of snapshot.h.
enum ViolationCode { kPageId = 1, kRange = 2, kOrder = 3, kTableRow = 5 };

// Violations are kept as one word so that the first in the CPU's order (ranges by row, then ids by row and position) is
// the smallest and one atomic keeps it: bit 62 id?, 52..61 row, 32..51 block or code, 0..31 value. Stored inverted: 0
// is none.
__device__ __forceinline__ unsigned long long encode_violation(bool of_id, int row, int block_or_code, int value) {
  const unsigned long long high =
      (static_cast<unsigned long long>(of_id) << 30) | (static_cast<unsigned long long>(row) << 20) | block_or_code;
  return ~((high << 32) | static_cast<unsigned>(value));
}

__device__ __forceinline__ void report_violation(PagerState* state, unsigned long long violation) {
  atomicMax(&state->violation, violation);
}

// status[4] of the layout. Rows that begin at 0 have no `begins`.
__device__ __forceinline__ void decode_violation(unsigned long long violation, int page_shift, const int* begins,
                                                 const int* given_begins, int* status) {
  const unsigned long long word = ~violation;
  const bool none = violation == 0, of_id = (word >> 62) & 1;
  const int block_or_code = static_cast<int>((word >> 32) & (kMaxRowPages - 1));
  const int row = none ? 0 : static_cast<int>((word >> 52) & (kPagerRows - 1));
  int position = none || !of_id ? 0 : block_or_code << page_shift;
  if (begins && !none) {
    if (of_id) position = max(position, begins[row]);
    if (!of_id && block_or_code == kOrder) position = given_begins[row];
  }
  status[0] = none ? 0 : of_id ? kPageId : block_or_code;
  status[1] = row;
  status[2] = position;
  status[3] = none ? 0 : static_cast<int>(static_cast<unsigned>(word));
}

}  // namespace flashcore::pager
