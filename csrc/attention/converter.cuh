// The converter warpgroup of an e4m3 cache: tiles as the loaders bring them -> the fp16 tiles that the products read.
//
// The values are exact in fp16; the scales of K and V are applied to scores and results. A 128-token tile of d 128
// costs each of the four warps 8 loads and 16 stores of 16 bytes a lane, without bank conflicts, and 64 conversions. K
// and V of a tile are converted one after the other by all four, so that the first product starts early.
#pragma once
#include "attention/work_list.cuh"

namespace flashcore::decode {

constexpr int kConverterThread = 384;  // first of the warpgroup

// One tile from shared memory at `from` to `to`. A warp takes eight rows and four of their 16-byte chunks at a time:
// eight lanes read, and write, a chunk of eight rows, which the swizzles spread over all banks. The other four chunks
// of a line, and the second half of a chunk's sixteen values, lie an exclusive or further. A short loop: in a cold
// launch each line of code comes from memory.
template <class C>
__device__ __forceinline__ void convert_tile(uint32_t from, uint32_t to) {
  using Tile = typename C::Cached;
  constexpr int kParts = Tile::kChunks / 4, kGroups = C::kTile / 8 / 4;  // of four chunks of a row; of a warp
  constexpr int kAtOnce = kParts == 1 && kGroups % 2 == 1 ? 1 : 2, kGroupsAtOnce = kParts == 1 ? kAtOnce : 1;
  static_assert(kGroups % kGroupsAtOnce == 0);
  const int warp = ptx::thread_id() / 32 % 4, lane = ptx::thread_id() % 32;
  from += tile_offset<Tile>(warp * kGroups * 8 + (lane & 7), lane / 8);
  to += tile_offset<C>(warp * kGroups * 8 + (lane & 7), lane / 8 * 2);
#pragma unroll 2
  for (int group = 0; group < kGroups; group += kGroupsAtOnce) {
#pragma unroll
    for (int first = 0; first < kGroupsAtOnce * kParts; first += kAtOnce) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int ahead = (first + i) / kParts, part = (first + i) % kParts;
        x[i] = ptx::load_shared_16((from ^ (part % 2 * 64)) + ahead * Tile::kGroupBytes + part / 2 * 1024);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int ahead = (first + i) / kParts, part = (first + i) % kParts;
        const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t y[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            y[j] = ptx::e4m3x2_to_fp16x2(static_cast<uint16_t>(words[half * 2 + j / 2] >> (16 * (j % 2))));
          ptx::store_shared_16((to ^ (half * 16)) + ahead * C::kGroupBytes + part * 1024,
                               make_uint4(y[0], y[1], y[2], y[3]));
        }
      }
    }
    from += kGroupsAtOnce * Tile::kGroupBytes;
    to += kGroupsAtOnce * C::kGroupBytes;
  }
}

// K and V of all items, in one loop: K and V of a tile in turn, each as soon as it is there and a buffer is free.
template <class C>
__device__ __forceinline__ void convert_kv(SharedStorage<C>& s) {
  constexpr uint32_t kCached = C::kCachedBuffers, kKeys = C::kKBuffers, kValues = C::kVBuffers;
  static_assert(((kKeys & (kKeys - 1)) | (kValues & (kValues - 1))) == 0);
  auto& b = s.cached_barriers;
  Ring<C::kRing> read;
  uint32_t n = 0;  // twice the tile's number; odd: its V
  auto cached_of = [](uint32_t of) { return of / 2 % kCached; };
  auto buffer_of = [](uint32_t of) { return of / 2 & ((of & 1 ? kValues : kKeys) - 1); };
  // Waits until the buffer that `of` goes to has been filled with what was there before, or emptied of it.
  auto wait_before = [&](uint32_t of, uint64_t* k_barriers, uint64_t* v_barriers) {
    ptx::mbarrier_wait(ptx::smem_address((of & 1 ? v_barriers : k_barriers) + buffer_of(of)),
                       (of / 2 & (of & 1 ? kValues : kKeys)) == 0);
  };
  while (true) {
    int left = __shfl_sync(~0u, 2 * tiles_of<C>(wait_item<C>(s, read)), 0);
    if (left <= 0) return;
    if (kKeys < kValues) wait_before(n, s.k_full, s.v_full);  // else implied: a tile's K is converted before its V
    wait_before(n + 1, s.k_full, s.v_full);
    // From here on a consumer may believe the parity of its first tiles' full barriers.
    if (ptx::thread_id() == kConverterThread) ptx::mbarrier_arrive(ptx::smem_address(&s.item_started[read.slot()]), 2);
    finish_item<C>(s, read, ptx::thread_id() % 32);
#pragma unroll 1
    for (; left > 0; --left, ++n) {
      wait_before(n, s.k_empty, s.v_empty);
      if (ptx::thread_id() == kConverterThread)  // of this tile's
        ptx::store_release(ptx::smem_address(&s.issued[n & 1]), (n / 2 + 1) & (2 * (n & 1 ? kValues : kKeys) - 1));
      ptx::mbarrier_wait(ptx::smem_address((n & 1 ? b.v_full : b.k_full) + cached_of(n)), n / 2 / kCached & 1);
      convert_tile<C>(ptx::smem_address(n & 1 ? s.cached.v[cached_of(n)] : s.cached.k[cached_of(n)]),
                      ptx::smem_address(n & 1 ? s.v[buffer_of(n)] : s.k[buffer_of(n)]));
      asm volatile("" : "+r"(n));  // what follows from it is computed again: there is no register to keep it in
      ptx::fence_proxy_async();
      ptx::mbarrier_warp_arrive(ptx::smem_address((n & 1 ? s.v_full : s.k_full) + buffer_of(n)), ptx::thread_id() % 32);
      ptx::mbarrier_warp_arrive(ptx::smem_address((n & 1 ? b.v_empty : b.k_empty) + cached_of(n)),
                                ptx::thread_id() % 32);
    }
  }
}

}  // namespace flashcore::decode
