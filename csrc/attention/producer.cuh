// Producer warps: K, V and q of the items into shared memory, and the work list to the CTA.
#pragma once
#include "attention/work_list.cuh"

namespace flashcore::decode {

// Pages of this lane's token in two tiles from `t` on: raw, so that nothing waits for them here. The producer loads
// them two tiles ahead: under load a page index takes 2 us, longer than a tile, and behind scattered copies still
// longer.
constexpr int kBlock = 2;  // tiles

struct Pages {
  int of[kBlock];
};

__device__ __forceinline__ Pages load_pages(const DecodeParams& p, const WorkItem& item, int t, int tile_tokens) {
  Pages r;
#pragma unroll
  for (int i = 0; i < kBlock; ++i, t += tile_tokens) {
    r.of[i] = t < item.num_tokens
                  ? __ldg(p.page_indices + min(item.page + (item.token + t) / p.page_size, p.page_capacity - 1))
                  : 0;
  }
  return r;
}

// The slot of token `t` of the item's chunk, given its page; inside the pool whatever the tables hold; -1 past the
// chunk.
__device__ __forceinline__ int slot_of(const DecodeParams& p, const WorkItem& item, int page, int t) {
  if (t >= item.num_tokens) return -1;
  const uint32_t slot =
      static_cast<uint32_t>(page) * p.page_size + (item.token + t) % p.page_size;  // a page id in range cannot overflow
  return slot < static_cast<uint32_t>(p.num_slots) && page >= 0 ? static_cast<int>(slot) : p.num_slots - 1;
}

// What a lane prefetches of the q_rows of an item: the tag of its row (16 q_rows of each half per warp).
__device__ __forceinline__ int load_tag(const DecodeParams& p, const WorkItem& item, int warp, int lane) {
  const int in_tile = (lane >> 4) * kNarrowRows + warp * 16 + (lane & 15);
  if (in_tile >= item.q_rows) return 0;
  return __ldg(p.work.row_tags + min(item.row_begin + (item.q_row + in_tile) / p.ratio, p.batch - 1));
}

// A quarter of one warpgroup's q: 16 rows per warp, and where their results go.
template <class C>
__device__ __forceinline__ void load_q_half(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item, int half,
                                            int warpgroup, int tag, int warp, int lane) {
  constexpr int kChunks = C::kRowBytes / 16, kRowsPerStep = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const uint32_t full = ptx::smem_address(&s.q_full[warpgroup]), base = ptx::smem_address(s.q[warpgroup]);
  const uint32_t phase = q_phase_of(item, warpgroup);
  ptx::mbarrier_wait(ptx::smem_address(&s.q_empty[warpgroup]), phase ^ 1);
  const int in_tile = (lane >> 4) * kNarrowRows + warp * 16 + (lane & 15), q_row = item.q_row + in_tile,
            local = q_row / p.ratio;
  const bool exists = in_tile < item.q_rows;
  const int head = kv_head_of(item) * p.ratio + q_row - local * p.ratio;
  const int offset = exists ? static_cast<int>((tag & 0x7FFFFFFF) * p.q_row_stride) + head * C::kHeadDim : -1;
  if (lane >> 4 == half) {
    const int slot = item.partial + local;
    s.destinations[warpgroup][phase][warp * 16 + (lane & 15)] = !exists                          ? kNowhere
                                                                : tag < 0                        ? tag
                                                                : slot < p.work.partial_capacity ? slot
                                                                                                 : kNowhere;
  }
#pragma unroll 2
  for (int r = 0; r < 16; r += kRowsPerStep) {
    const int row = r + lane / kChunks, chunk = lane % kChunks;
    const int from = __shfl_sync(~0u, offset, half * 16 + row);
    if (from >= 0)
      ptx::cp_async_16(base + tile_offset<C>(warp * 16 + row, chunk),
                       static_cast<const typename C::T*>(p.q) + from + chunk * 8, 16);
  }
  ptx::cp_async_mbarrier_arrive(full);
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(full);  // for the destinations: an ordinary store needs an ordinary arrival
}

template <class C>
__device__ __forceinline__ void load_q(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item, int tag,
                                       int warp, int lane) {
  int half = 0;  // of the item: a narrow one has only the first, for either warpgroup
#pragma unroll 1
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    if (owns(item, warpgroup)) load_q_half<C>(p, s, item, half++, warpgroup, tag, warp, lane);
  }
}

// The tokens of a share that no box holds, 16 bytes per lane: two tokens an instruction at d 128. `units`: of the
// lane's token, from the start of the pool in 16 bytes; `exists`: a bit per token. Tokens past the chunk get zeros,
// because stale bytes may be NaN, and 0 * NaN in P.V would poison every row.
template <class C>
__device__ __forceinline__ void load_scattered(const int4* pool, uint32_t dst, uint32_t units, uint32_t exists,
                                               uint32_t boxes, int groups, int lane) {
  constexpr int kChunks = C::kRowBytes / 16, kRowsPerStep = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const int sub = lane / kChunks, chunk = lane % kChunks;
  const int4* src = pool + chunk;
#pragma unroll 1
  for (int g = 0; g < groups; ++g) {
    if ((boxes >> g) & 1) continue;
#pragma unroll 4
    for (int r = 0; r < 8; r += kRowsPerStep) {
      const uint32_t at = __shfl_sync(~0u, units, g * 8 + r + sub);
      ptx::cp_async_16(dst + g * C::kGroupBytes + tile_offset<C>(r + sub, chunk), src + at,
                       (exists >> (g * 8 + r + sub)) & 1 ? 16 : 0);
    }
  }
}

// This warp's share of one tile of K or V. `slot`: of the lane's token, -1 past the chunk. 33 arrivals of each warp
// fill a buffer (a scattered share has one asynchronous arrival per lane among them).
template <class C>
__device__ __forceinline__ void load_share(const DecodeParams& p, SharedStorage<C>& s, const Ring<C::kBuffers>& ring,
                                           const CUtensorMap* maps, const void* pool, int kv_head, int slot, int warp,
                                           int lane) {
  constexpr int kTokens = C::kWarpTokens;
  const uint32_t full = ptx::smem_address(&s.full[ring.slot()]);
  const uint32_t dst = ptx::smem_address(s.buffers[ring.slot()]) + warp * kTokens * C::kRowBytes;
  ptx::mbarrier_wait(ptx::smem_address(&s.empty[ring.slot()]), ring.phase() ^ 1);

  const bool mine = lane < kTokens;
  const int first = __shfl_sync(~0u, slot, 0);
  if (__all_sync(~0u, !mine || (slot == first + lane && slot >= 0))) {
    if (lane == 0) {
      ptx::mbarrier_expect_tx(full, kTokens * C::kRowBytes);
      ptx::tma_load_5d(dst, maps + 1, full, ptx::kEvictFirst, 0, first, 0, 0, kv_head);
      ptx::mbarrier_arrive(full, 33);
    }
    return;
  }
  const int leader = __shfl_sync(~0u, slot, lane & ~7);
  const uint32_t exists = __ballot_sync(~0u, mine && slot >= 0);
  const uint32_t good = __ballot_sync(~0u, mine && slot >= 0 && slot == leader + (lane & 7));
  uint32_t boxes = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g) boxes |= ((good >> (8 * g)) & 0xFF) == 0xFF ? 1u << g : 0u;
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, __popc(boxes) * C::kGroupBytes);
    ptx::mbarrier_arrive(full);
  }
  __syncwarp();
  if ((lane & 7) == 0 && ((boxes >> (lane >> 3)) & 1)) {
    ptx::tma_load_5d(dst + (lane >> 3) * C::kGroupBytes, maps, full, ptx::kEvictFirst, 0, slot, 0, 0, kv_head);
  }
  const uint32_t at = static_cast<uint32_t>(max(slot, 0)) * p.kv_slot_units + kv_head * p.kv_head_units;
  load_scattered<C>(static_cast<const int4*>(pool), dst, at, exists, boxes, kTokens / 8, lane);
  ptx::cp_async_mbarrier_arrive(full);
}

// The token of a tile that this lane stands for.
template <class C>
__device__ __forceinline__ int share_token() {
  const int thread = ptx::thread_id();
  return thread % 32 < C::kWarpTokens ? thread / 32 * C::kWarpTokens + thread % 32 : 1 << 30;
}

// The next item, once it is posted: its page indices and row tags start on their way.
template <class C>
__device__ __forceinline__ void load_next(const DecodeParams& p, const WorkItem& next, Pages& pages, int& tag,
                                          int warp) {
  pages = load_pages(p, next, share_token<C>(), C::kTile);
  tag = load_tag(p, next, warp, ptx::thread_id() % 32);
}

// Tiles go out in blocks of two, whose page indices were loaded during the block before. In the last block of an item
// the next item is looked up: at once if it is posted already, else after this block's first tile. q follows the first
// tile, so that the wait for a q buffer does not hold up K and V.
template <class C>
__device__ __forceinline__ void produce(const DecodeParams& p, const TensorMaps& maps, SharedStorage<C>& s, int warp) {
  Ring<C::kBuffers> ring;
  Ring<C::kRing> read;
  int index = 0;  // of warp 0: the first item of a claim
  if (warp == 0) {
    index = start_feed<C>(s, ptx::thread_id() % 32);
    post_claimed<C>(p, s, index, ptx::thread_id() % 32);
  }
  const WorkItem* item = &wait_item<C>(s, read);
  if (item->num_tokens <= 0) return;
  Pages ahead;
  int tag;
  load_next<C>(p, *item, ahead, tag, warp);
  while (true) {
    if (warp == 0) begin_item<C>(s, *item, ptx::thread_id() % 32);
    const int q_tag = tag;
#pragma unroll 1
    for (int t = 0; t < item->num_tokens; t += kBlock * C::kTile) {
      const Pages pages = ahead;
      const bool last = t + kBlock * C::kTile >= item->num_tokens;
      bool looked = !last;
      if (!last) {
        ahead = load_pages(p, *item, t + kBlock * C::kTile + share_token<C>(), C::kTile);
      } else {
        const int wants = warp == 0 ? s.feed.wants : 0;
        __syncwarp();  // lane 0 clears it in claim
        if (wants > 0) index = claim<C>(p, s, wants, ptx::thread_id() % 32);
        looked = item_ready<C>(s, read.next());
        if (looked) load_next<C>(p, s.items[read.next().slot()], ahead, tag, warp);
      }
#pragma unroll 1
      for (int i = 0; i < kBlock; ++i) {
        const int token = t + i * C::kTile;
        if (token >= item->num_tokens) break;
        const int page = i == 0 ? pages.of[0] : pages.of[1];
        const int slot = slot_of(p, *item, page, token + share_token<C>());
#pragma unroll 1
        for (int kv = 0; kv < 2; ++kv) {  // one copy of the code: registers are short here
          load_share<C>(p, s, ring, kv == 0 ? maps.k : maps.v, kv == 0 ? p.k : p.v, kv_head_of(*item), slot, warp,
                        ptx::thread_id() % 32);
          ring.advance();
          if (ptx::thread_id() == 0) ptx::store_release(ptx::smem_address(&s.issued), ring.at);
        }
        if (token == 0) load_q<C>(p, s, *item, q_tag, warp, ptx::thread_id() % 32);
        if (last && i == 0) {
          if (warp == 0 && s.feed.claimed > 0) post_claimed<C>(p, s, index, ptx::thread_id() % 32);
          if (!looked) load_next<C>(p, wait_item<C>(s, read.next()), ahead, tag, warp);
        }
      }
    }
    finish_item<C>(s, read, ptx::thread_id() % 32);
    item = &s.items[read.slot()];
    if (item->num_tokens <= 0) return;
  }
}

}  // namespace flashcore::decode
