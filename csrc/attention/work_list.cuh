// The feeder warp: work items from the lists to the other warps of the CTA.
#pragma once
#include "attention/tiles.cuh"

namespace flashcore::decode {

// An item is claimed late, when the one before it is nearly loaded: a CTA that is busy for long must not hold work that
// others could start. Where only small items are left of a list they are claimed in batches, about a CTA's share of
// them at most, so that the latency of the counter and of the list is paid once for several. (Behind one small item
// there may be large ones: a long segment's last chunk can be short.)
constexpr int kBatch = 4;                        // items claimed at a time, at most
constexpr int kSmallAhead = 2, kLargeAhead = 0;  // items still to be begun when the next are claimed
// Warps: K, V and q loaders, the consumers, the converter if there is one.
template <class C>
constexpr int kItemReaders = 3 + 8 + (C::kConverts ? 4 : 0);

__device__ __forceinline__ WorkItem load_item(const WorkItem* from) {
  const int4 a = __ldg(reinterpret_cast<const int4*>(from)), b = __ldg(reinterpret_cast<const int4*>(from) + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Waits for the item; it stays in its slot until every reader has called finish_item.
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
  ptx::mbarrier_warp_arrive(ptx::smem_address(&s.item_empty[ring.slot()]), lane);
  ring.advance();
}

struct Feed {
  int list, ahead;          // list it takes from; items posted and not yet begun
  bool small, other_tried;  // the last item posted is small; the first list is empty
  int batch;                // items to claim
  uint32_t turn, q_phases;  // warpgroup of the next narrow item; phases of the two q buffers
};

// Lane i < have posts item (a, b), the last of which is b's head; have 0: the end mark.
template <class C>
__device__ __forceinline__ void post(SharedStorage<C>& s, Feed& feed, Ring<C::kRing>& ring, int have, int4 a, int4 b,
                                     int lane) {
  const bool mine = lane < have;
  const uint32_t before = (1u << lane) - 1;
  const uint32_t narrow = __ballot_sync(~0u, mine && a.z <= kNarrowRows);
  const uint32_t owners = a.z > kNarrowRows ? 3 : ((feed.turn + __popc(narrow & before)) & 1) + 1;
  const uint32_t of_first = __ballot_sync(~0u, mine && (owners & 1)),
                 of_second = __ballot_sync(~0u, mine && (owners & 2));
  const uint32_t phases = feed.q_phases ^ ((__popc(of_first & before) & 1) | (__popc(of_second & before) & 1) << 1);
  b.w |= static_cast<int>((owners | phases << 2) << kOwnerShift);
  if (!mine) b.y = 0;
  const int posted = max(have, 1);
  if (lane < posted) {
    Ring<C::kRing> slot = ring;
    slot.advance(lane);
    ptx::mbarrier_wait(ptx::smem_address(&s.item_empty[slot.slot()]), slot.phase() ^ 1);
    int4* dst = reinterpret_cast<int4*>(&s.items[slot.slot()]);
    dst[0] = a;
    dst[1] = b;
    ptx::mbarrier_arrive(ptx::smem_address(&s.item_full[slot.slot()]));
  }
  __syncwarp();
  ring.advance(posted);
  feed.ahead += posted;
  feed.small = __shfl_sync(~0u, b.y, posted - 1) <= kSmallTokens;
  feed.turn = (feed.turn + __popc(narrow)) & 1;
  feed.q_phases ^= (__popc(of_first) & 1) | (__popc(of_second) & 1) << 1;
}

// Items of a list that CTAs start with.
template <class C>
__device__ __forceinline__ int started_of(const SharedStorage<C>& s, int list) {
  return list == 0 ? s.wide_ctas : static_cast<int>(gridDim.x) - s.wide_ctas;
}

// Items to claim when those before `next` are gone.
template <class C>
__device__ __forceinline__ int batch_at(const SharedStorage<C>& s, int list, int next) {
  constexpr int kCtas = 128;  // about as many as there are
  const int share = (s.list_items[list] - next + kCtas - 1) / kCtas;
  return next < s.large_items[list] ? 1 : min(max(share, 1), kBatch);
}

// `start`: the first item of this CTA, fixed by the schedule so that it needs no counter.
template <class C>
__device__ __forceinline__ void feed_items(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& start,
                                           int lane) {
  const int list = static_cast<int>(blockIdx.x) < s.wide_ctas ? 0 : 1;
  Feed feed{list, 0, false, false, batch_at(s, list, started_of(s, list)), 0, 0};
  Ring<C::kRing> ring, begun;
  if (start.num_tokens > 0) {
    post<C>(s, feed, ring, 1, make_int4(start.row_begin, start.q_row, start.q_rows, start.page),
            make_int4(start.token, start.num_tokens, start.piece, start.kv_head), lane);
  }
  while (true) {
    while (feed.ahead > (feed.small ? kSmallAhead : kLargeAhead)) {
      ptx::mbarrier_wait(ptx::smem_address(&s.item_begun[begun.slot()]), begun.phase());
      begun.advance();
      --feed.ahead;
    }
    const int count = feed.batch;
    int first = 0;
    if (lane == 0) {
      first = started_of(s, feed.list) + atomicAdd(&p.work.header->taken[feed.list], count);
    }
    first = __shfl_sync(~0u, first, 0);
    const int have = min(max(s.list_items[feed.list] - first, 0), count);
    if (have == 0 && !feed.other_tried) {
      feed.other_tried = true;
      feed.list ^= 1;
      feed.small = false;  // its items may be large: one at a time
      feed.batch = 1;
      continue;
    }
    int4 a = make_int4(0, 0, 0, 0), b = a;
    if (lane < have) {
      const int at = first + lane, entry = at / p.kv_heads;
      const int4* src =
          reinterpret_cast<const int4*>(p.work.items + (feed.list == 0 ? entry : p.work.entry_capacity - 1 - entry));
      a = src[0];
      b = src[1];
      b.w += at - entry * p.kv_heads;
    }
    feed.batch = batch_at(s, feed.list, first + have);
    post<C>(s, feed, ring, have, a, b, lane);
    if (have == 0) break;
  }
}

}  // namespace flashcore::decode
