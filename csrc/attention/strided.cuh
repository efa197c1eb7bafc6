// Tokens that lie a constant distance apart, by TMA. At page size 1 SGLang gives the requests of a step consecutive
// slots: the tokens that a request generates beside B - 1 others lie B apart until that number changes.
//
// A tensor map fixes its strides, and no host knows these. So a loader makes maps while it runs: a copy, in the
// workspace, of one whose strides it replaces. kStrides of them a launch, each for good: copies in flight read them.
// Making one takes fences, so only kApartTokens of a tile, or of an item of runs, are a reason for it. Other tokens
// that lie apart come by cp.async.
#pragma once
#include "attention/tiles.cuh"

namespace flashcore::decode {

constexpr int kApartTokens = 64;

// Where all of a lane's `slot` lie first + step * lane, step > 1: that step; else 0. The same for the whole warp.
__device__ __forceinline__ int stride_of(int slot, int lane) {
  const int first = __shfl_sync(~0u, slot, 0), step = __shfl_sync(~0u, slot, 1) - first;
  return __all_sync(~0u, slot == first + step * lane) && step > 1 ? step : 0;
}

// Which map of p.work.maps is for boxes of 32 tokens `step` slots apart; -1: none, and `tokens` are too few to make
// one, or there is no room. `strides`: of the maps that this warp has made, [kStrides], 0 for none. `loader`: 0 or 1.
// By a whole warp.
__device__ __forceinline__ int strided_map(const DecodeParams& p, const CUtensorMap& base, int* strides, int loader,
                                           int step, int tokens, int lane) {
  const int made = lane < kStrides ? strides[lane] : -1;
  const uint32_t same = __ballot_sync(~0u, made == step),
                 room = __ballot_sync(~0u, made == 0 && tokens >= kApartTokens);
  if ((same | room) == 0 || !p.strided) return -1;
  const int at = __ffs(same != 0 ? same : room) - 1, index = (blockIdx.x * 2 + loader) * kStrides + at;
  if (same == 0) {
    CUtensorMap* map = p.work.maps + index;
    reinterpret_cast<uint32_t*>(map)[lane] = reinterpret_cast<const uint32_t*>(&base)[lane];
    __syncwarp();
    if (lane == 0) {
      ptx::tensormap_replace_strides(map, static_cast<uint64_t>(step) * p.kv_slot_units * 16);
      ptx::fence_tensormap(map);
      strides[at] = step;
    }
    __syncwarp();
  }
  return index;
}

}  // namespace flashcore::decode
