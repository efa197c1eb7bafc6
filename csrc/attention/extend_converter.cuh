// Extend's converter warpgroup of an e4m3 cache: K, V, K, V, ... as the loaders bring them -> fp16 tiles.
#pragma once
#include "attention/converter.cuh"
#include "attention/extend_tiles.cuh"

namespace flashcore::extend {

// All tiles of the CTA. Every consumer warpgroup reads every one of them, in order.
template <class C>
__device__ __forceinline__ void convert(SharedStorage<C>& s) {
  constexpr uint32_t kCached = C::kCachedBuffers, kBuffers = C::kBuffers;
  static_assert(((kCached & (kCached - 1)) | (kBuffers & (kBuffers - 1)) | (kTiles & (kTiles - 1))) == 0);
  auto& b = s.cached_barriers;
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {  // twice the tile's number; odd: its V
    const uint32_t from = n % kCached, to = n % kBuffers;
    ptx::mbarrier_wait(ptx::smem_address(&s.empty[to]), (n & kBuffers) == 0);
    ptx::mbarrier_wait(ptx::smem_address(&b.full[from]), n / kCached & 1);
    const bool end = (s.tiles[n / 2 % kTiles].bits >> kFlagShift) & kEnd;
    if (!end) {
      decode::convert_tile<C>(ptx::smem_address(s.cached.buffers[from]), ptx::smem_address(s.buffers[to]));
      ptx::fence_proxy_async();
    }
    ptx::mbarrier_warp_arrive(ptx::smem_address(&s.full[to]), ptx::thread_id() % 32);
    if (end) return;
    ptx::mbarrier_warp_arrive(ptx::smem_address(&b.empty[from]), ptx::thread_id() % 32);
  }
}

}  // namespace flashcore::extend
