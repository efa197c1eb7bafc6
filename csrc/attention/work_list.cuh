// How work items reach the warps of a CTA.
#pragma once
#include "attention/tiles.cuh"

namespace flashcore::decode {

// Producer warp 0 takes items from the lists and posts them to the ring. An item is claimed late, when its predecessor
// is nearly loaded: a CTA that is busy for long must not hold work that others could start. Small items are claimed in
// batches, so that the latency of the counter and of the list is paid once for several.
constexpr int kBatch = 4;  // items claimed at a time while they are small
constexpr int kSmallTokens = 256;

__device__ __forceinline__ int list_base(int list, int wide_ctas) {
  return list == 0 ? wide_ctas : static_cast<int>(gridDim.x) - wide_ctas;
}

// The first item of a CTA is fixed, so that it needs no counter. Returns lane 0's index of the first claimed item.
template <class C>
__device__ __forceinline__ int start_feed(SharedStorage<C>& s, int lane) {
  const int list = static_cast<int>(blockIdx.x) < s.wide_ctas ? 0 : 1;
  if (lane == 0) {
    s.feed = {};
    s.feed.list = list;
    s.feed.claimed = 1;
  }
  __syncwarp();
  return static_cast<int>(blockIdx.x) - (list == 0 ? 0 : s.wide_ctas);
}

// The counter's answer is on its way when this returns.
template <class C>
__device__ __forceinline__ int claim(const DecodeParams& p, SharedStorage<C>& s, int count, int lane) {
  int index = 0;
  if (lane == 0) {
    const int list = s.feed.list;
    s.feed.claimed = count;
    s.feed.wants = 0;
    index = list_base(list, s.wide_ctas) + atomicAdd(&p.work.header->taken[list], count);
  }
  __syncwarp();
  return index;
}

// Begins an item: how many more to claim while it is loaded.
template <class C>
__device__ __forceinline__ void begin_item(SharedStorage<C>& s, const WorkItem& item, int lane) {
  if (lane == 0) {
    const bool small = item.num_tokens <= kSmallTokens;
    const int ahead = s.feed.ahead - 1;
    s.feed.ahead = ahead;
    s.feed.wants = s.feed.done || ahead > (small ? 1 : 0) ? 0 : small ? kBatch : 1;
  }
  __syncwarp();
}

// Posts what was claimed, the whole warp together; then the end mark if both lists are empty.
template <class C>
__device__ __forceinline__ void post_claimed(const DecodeParams& p, SharedStorage<C>& s, int index, int lane) {
  int first = __shfl_sync(~0u, index, 0);
  if (first >= s.list_items[s.feed.list] && !s.feed.other_tried) {
    __syncwarp();
    if (lane == 0) {
      s.feed.other_tried = 1;
      s.feed.list ^= 1;
    }
    __syncwarp();
    first = __shfl_sync(~0u, claim<C>(p, s, 1, lane), 0);  // one: its items may be large
  }
  const FeedState f = s.feed;
  const int have = min(max(s.list_items[f.list] - first, 0), f.claimed);
  const bool mine = lane < have;
  const int at = first + lane, entry = at / p.kv_heads;
  int4 a = make_int4(0, 0, 0, 0), b = a;
  if (mine) {
    const int4* src =
        reinterpret_cast<const int4*>(p.work.items + (f.list == 0 ? entry : p.work.entry_capacity - 1 - entry));
    a = src[0];
    b = src[1];
  }
  const uint32_t before = (1u << lane) - 1;
  const uint32_t narrow = __ballot_sync(~0u, mine && a.z <= kNarrowRows);
  const uint32_t owners = a.z > kNarrowRows ? 3 : ((f.turn + __popc(narrow & before)) & 1) + 1;
  const uint32_t of_first = __ballot_sync(~0u, mine && (owners & 1)),
                 of_second = __ballot_sync(~0u, mine && (owners & 2));
  const uint32_t phases = f.q_phases ^ ((__popc(of_first & before) & 1) | (__popc(of_second & before) & 1) << 1);
  b.w = static_cast<int>((at - entry * p.kv_heads) | (owners | phases << 2) << kOwnerShift);
  const int posted = max(have, 1);  // items, or the end mark
  if (lane < posted) {
    Ring<C::kRing> slot{f.post};
    slot.advance(lane);
    ptx::mbarrier_wait(ptx::smem_address(&s.item_empty[slot.slot()]), slot.phase() ^ 1);
    int4* dst = reinterpret_cast<int4*>(&s.items[slot.slot()]);
    dst[0] = a;
    dst[1] = b;
    ptx::mbarrier_arrive(ptx::smem_address(&s.item_full[slot.slot()]));
  }
  __syncwarp();
  if (lane == 0) {
    Ring<C::kRing> slot{f.post};
    slot.advance(posted);
    s.feed.post = slot.at;
    s.feed.ahead = f.ahead + posted;
    s.feed.done = have == 0;
    s.feed.claimed = 0;
    s.feed.turn = (f.turn + __popc(narrow)) & 1;
    s.feed.q_phases = f.q_phases ^ ((__popc(of_first) & 1) | (__popc(of_second) & 1) << 1);
  }
  __syncwarp();
}

// The item stays in its slot until every warp has called finish_item.
template <class C>
__device__ __forceinline__ const WorkItem& wait_item(SharedStorage<C>& s, const Ring<C::kRing>& ring) {
  ptx::mbarrier_wait(ptx::smem_address(&s.item_full[ring.slot()]), ring.phase());
  return s.items[ring.slot()];
}

template <class C>
__device__ __forceinline__ bool item_ready(SharedStorage<C>& s, const Ring<C::kRing>& ring) {
  return __all_sync(~0u, ptx::mbarrier_test(ptx::smem_address(&s.item_full[ring.slot()]), ring.phase()));
}

template <class C>
__device__ __forceinline__ void finish_item(SharedStorage<C>& s, Ring<C::kRing>& ring, int lane) {
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.item_empty[ring.slot()]));
  ring.advance();
}

}  // namespace flashcore::decode
