// Producer warps 1 to 3: K, V and q into shared memory. A tile of consecutive slots is one TMA box; of others, groups
// of eight consecutive tokens are boxes, and the rest goes by cp.async.
#pragma once
#include "attention/extend_tiles.cuh"

namespace flashcore::extend {

// Arrivals that fill a buffer: an asynchronous one of every lane and one of every warp.
constexpr int kFullArrivals = kLoaders * 33;
constexpr int kQArrivals = kLoaders * 32;
constexpr uint64_t kKeepInL2 = ptx::kEvictLast;  // other tiles of q_rows read the same K and V

// This warp's third of a tile's groups. Tokens past the end get zeros, because stale bytes may be NaN, and 0 * NaN in
// P V would poison every row.
template <class C>
__device__ __forceinline__ void load_groups(const Params& p, const uint32_t* slots, uint32_t boxes, uint32_t dst,
                                            uint32_t full, const CUtensorMap* map, const void* pool, int kv_head,
                                            int loader, int lane) {
  using Tile = typename C::Cached;
  constexpr int kGroups = C::kTile / 8, kRowsPerStep = 32 / Tile::kChunks;
  constexpr int kBatch = Tile::kChunks == 16 ? 4 : Tile::kChunks == 4 ? 1 : 2;
  const bool box = lane < kGroups && lane % kLoaders == loader && ((boxes >> lane) & 1);
  const int count = __popc(__ballot_sync(~0u, box));
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, count * Tile::kGroupBytes);
    ptx::mbarrier_arrive(full);
  }
  __syncwarp();
  if (box)
    ptx::tma_load_5d(dst + lane * Tile::kGroupBytes, map, full, kKeepInL2, 0, static_cast<int>(slots[lane * 8]), 0, 0,
                     kv_head);
  const int sub = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
  const int4* src = static_cast<const int4*>(pool) + static_cast<size_t>(kv_head) * p.kv_head_units + chunk;
#pragma unroll 1
  for (int g = loader; g < kGroups; g += kLoaders) {
    if ((boxes >> g) & 1) continue;
#pragma unroll
    for (int r = 0; r < 8; r += kBatch * kRowsPerStep) {
      uint32_t at[kBatch];
      const int4* from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) at[i] = slots[g * 8 + r + i * kRowsPerStep + sub];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)  // a copy holds the registers of its address for long
        from[i] = ptx::element_address(src, at[i] == kNoToken ? 0 : at[i]);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        ptx::cp_async_16(dst + g * Tile::kGroupBytes + tile_offset<Tile>(r + i * kRowsPerStep + sub, chunk), from[i],
                         at[i] == kNoToken ? 0 : 16);
    }
  }
  ptx::cp_async_mbarrier_arrive(full);
}

// This warp's third of an item's q. Rows that do not exist keep what was there: nothing of theirs is stored.
template <class C>
__device__ __forceinline__ void load_q(const Params& p, SharedStorage<C>& s, int buffer, const Item& item, int loader,
                                       int lane) {
  constexpr int kRowsPerStep = 32 / C::kChunks;
  const uint32_t full = ptx::smem_address(&s.q_full[buffer]), base = ptx::smem_address(s.q[buffer][0]);
  const int sub = lane / C::kChunks, chunk = lane % C::kChunks;
  const uint16_t* q = static_cast<const uint16_t*>(p.q) + item.kv_head * p.ratio * C::kHeadDim + chunk * 8;
  const int q_rows = item.q_rows, q_row = item.q_row;
#pragma unroll 1
  for (int first = loader * 32; first < q_rows; first += kLoaders * 32) {
    const int mine = q_row + first + lane, token = token_at(p, mine), head = mine - token * p.ratio;
    const int index = first + lane < q_rows ? __ldg(&p.work.tokens[token].index) : -1;
    const int offset = index >= 0 ? static_cast<int>(index * p.q_row_stride) + head * C::kHeadDim : -1;
#pragma unroll 4
    for (int r = 0; r < 32; r += kRowsPerStep) {
      const int from = __shfl_sync(~0u, offset, r + sub);
      if (from >= 0) ptx::cp_async_16(base + tile_offset<C>(first + r + sub, chunk), q + from, 16);
    }
  }
  ptx::cp_async_mbarrier_arrive(full);
}

template <class C>
__device__ __forceinline__ void load(const Params& p, const TensorMaps& maps, SharedStorage<C>& s, int loader,
                                     int lane) {
  // Where the tiles go: to the converter, or to the consumers.
  constexpr int kBuffers = C::kConverts ? C::kCachedBuffers : C::kBuffers;
  // One loader brings a box, and the others do not wait for its buffer. All have then finished tile t - kPlanned when
  // one comes to tile t, so with 2 kPlanned buffers none is a round off. 4 % at d 64; d 128 is 1 % slower.
  constexpr bool kAlone = C::kHeadDim != 128 && kBuffers >= 2 * kPlanned;
  uint32_t buffers, all_full, all_empty;
  if constexpr (C::kConverts) {
    buffers = ptx::smem_address(s.cached.buffers[0]);
    all_full = ptx::smem_address(s.cached_barriers.full);
    all_empty = ptx::smem_address(s.cached_barriers.empty);
  } else {
    buffers = ptx::smem_address(s.buffers[0]);
    all_full = ptx::smem_address(s.full);
    all_empty = ptx::smem_address(s.empty);
  }
  Ring<kPlanned> planned;
  Ring<kBuffers> ring;
  Ring<C::kQBuffers> q_ring;
  while (true) {
    ptx::mbarrier_wait(ptx::smem_address(&s.planned[planned.slot()]), planned.phase());
    const Load tile = s.loads[planned.slot()];
    const uint32_t flags = static_cast<uint32_t>(tile.item) >> kFlagShift;
    const Item& item = s.items[tile.item & (kItems - 1)];
    const int kv_head = item.kv_head;
#pragma unroll 1
    for (int kv = 0; kv < 2; ++kv) {  // one copy of the code: registers are short here
      const uint32_t full = all_full + ring.slot() * 8, dst = buffers + ring.slot() * C::Cached::kBufferBytes;
      const bool mine = !kAlone || loader == kv;
      if (mine || tile.first < 0 || (flags & kEnd)) ptx::mbarrier_wait(all_empty + ring.slot() * 8, ring.phase() ^ 1);
      if (flags & kEnd) {  // wakes the consumers
        if (lane == 0) ptx::mbarrier_arrive(full, 33);
        return;
      }
      const CUtensorMap* map = kv == 0 ? maps.k : maps.v;
      if (tile.first >= 0) {
        if (mine && lane == 0) {
          if (loader == kv) {
            ptx::mbarrier_expect_tx(full, C::Cached::kBufferBytes);
            ptx::tma_load_5d(dst, map + (flags & kGathered ? 2 : 1), full, kKeepInL2, 0, tile.first, 0, 0, kv_head);
          }
          ptx::mbarrier_arrive(full, kAlone ? kFullArrivals : 33);
        }
      } else {
        load_groups<C>(p, s.slots[planned.slot()], tile.boxes, dst, full, map, kv == 0 ? p.k : p.v, kv_head, loader,
                       lane);
      }
      // After K, so that K is not kept waiting by an item that still needs its q.
      if (kv == 0 && (flags & kFirst)) {
        ptx::mbarrier_wait(ptx::smem_address(&s.q_empty[q_ring.slot()]), q_ring.phase() ^ 1);
        if (q_begin(item) < 0) {
          load_q<C>(p, s, q_ring.slot(), item, loader, lane);
        } else {
          // Each says that it has come here: one that is late would else wait for a round that needs itself.
          const uint32_t q_full = ptx::smem_address(&s.q_full[q_ring.slot()]);
          __syncwarp();
          if (lane == 0) {
            if (loader == kLoaders - 1) {
              ptx::mbarrier_expect_tx(q_full, C::kWarpgroups * C::kQBytes);
              ptx::tma_load_5d(ptx::smem_address(s.q[q_ring.slot()]), &maps.q, q_full, ptx::kEvictFirst, 0,
                               kv_head * p.ratio, q_begin(item), 0, 0);
            }
            ptx::mbarrier_arrive(q_full, 32);
          }
        }
        q_ring.advance();
      }
      ring.advance();
    }
    ptx::mbarrier_warp_arrive(ptx::smem_address(&s.loaded[planned.slot()]), lane);
    planned.advance();
  }
}

}  // namespace flashcore::extend
