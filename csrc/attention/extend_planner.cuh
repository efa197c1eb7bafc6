// Producer warp 0: takes items, and turns their pieces into KV tiles: which slots to load, what to mask.
#pragma once
#include "attention/extend_tiles.cuh"

namespace flashcore::extend {

// The first item of a CTA is fixed; others are claimed two ahead, so that neither the counter nor the item's own words
// are waited for. Items come longest first, so what is claimed early at the end is short.
// One of a pair is followed by the other one.
template <class C>
__device__ __forceinline__ int claim(const Params& p, const SharedStorage<C>& s, int item, int lane) {
  if (item >= s.paired) return item + s.limit - s.paired;
  return lane == 0 ? static_cast<int>(gridDim.x) + atomicAdd(&p.work.header->taken, 1) : 0;
}
// What was claimed as the next of `item`, or the end.
template <class C>
__device__ __forceinline__ int claimed_by(const SharedStorage<C>& s, int item, int claimed) {
  return claimed < (item < s.paired ? s.limit : s.total) ? claimed : s.total;
}

__device__ __forceinline__ int load_word(const Params& p, int item, int total, int lane) {
  return item < total && lane < 16 ? __ldg(reinterpret_cast<const int*>(p.work.items + item) + lane) : 0;
}

// Page ids of this lane's tokens of a tile, the first of which is token `token` of the piece.
template <class C>
struct Pages {
  int of[C::kTile / 32];
};

template <class C>
__device__ __forceinline__ Pages<C> load_pages(const Params& p, const Piece& piece, int token, int lane) {
  Pages<C> r;
  const int offset = piece.begin & ((1 << p.page_shift) - 1);
#pragma unroll
  for (int k = 0; k < C::kTile / 32; ++k) {
    const int t = token + k * 32 + lane;
    const int entry = piece.entry + ((offset + t) >> p.page_shift);
    r.of[k] = t < piece.loaded && piece.gathered == 0 ? __ldg(p.table + min(max(entry, 0), p.table_entries - 1)) : 0;
  }
  return r;
}

// Where an item's q begins, if it is one box: its tokens lie one behind the other, and there are as many more in q as a
// box takes; else -1. `word`: of the item, one per lane.
template <class C>
__device__ __forceinline__ int q_box(const Params& p, int word, int lane) {
  if (p.boxed_tokens == 0) return -1;
  const int q_row = __shfl_sync(~0u, word, 0), q_rows = __shfl_sync(~0u, word, 1), first = token_at(p, q_row);
  const int last = token_at(p, q_row + q_rows - 1);
  int begin = 0;
  bool boxed = first * p.ratio == q_row;
  for (int t = first; t <= last; t += 32) {
    const int index = __ldg(&p.work.tokens[min(t + lane, last)].index);
    if (t == first) begin = __shfl_sync(~0u, index, 0);
    boxed = boxed && index == begin + min(t + lane, last) - first;
  }
  return __all_sync(~0u, boxed && begin + C::kRows / p.ratio <= p.boxed_tokens) ? begin : -1;
}

// Asks for the custom mask of a tile, which the consumers else wait for.
__device__ __forceinline__ void prefetch_mask(const Params& p, const Item& item, const Piece& piece, int token,
                                              int lane) {
  const int first = token_at(p, item.q_row + (piece.rows & 0xFFFF)), end = item.q_row + (piece.rows >> 16);
  if (piece.rows >> 16 == 0) return;
  for (int t = first + lane; t <= token_at(p, end - 1); t += 32) {
    const int mask = __ldg(&p.work.tokens[t].mask);
    const int64_t at = static_cast<int64_t>(mask) + piece.begin + token;
    if (mask >= 0 && at >= 0 && at < p.mask_size) ptx::prefetch_l1(p.custom_mask + at);
  }
}

// Publishes one tile. Slots are inside the pool whatever the table holds.
template <class C>
__device__ __forceinline__ void plan_tile(const Params& p, SharedStorage<C>& s, Ring<kPlanned>& ring, int& tile,
                                          const Piece& piece, int token, const Pages<C>& pages, int item, bool first,
                                          bool last, int lane) {
  ptx::mbarrier_wait(ptx::smem_address(&s.loaded[ring.slot()]), ring.phase() ^ 1);
  const int page_mask = (1 << p.page_shift) - 1, offset = piece.begin & page_mask;
  int slots[C::kTile / 32], start = 0;
  bool consecutive = true;
#pragma unroll
  for (int k = 0; k < C::kTile / 32; ++k) {
    const int t = token + k * 32 + lane;
    const uint32_t in_pool = (static_cast<uint32_t>(pages.of[k]) << p.page_shift) + ((offset + t) & page_mask);
    const bool valid = pages.of[k] >= 0 && pages.of[k] <= (p.num_slots - 1) >> p.page_shift &&
                       in_pool < static_cast<uint32_t>(p.num_slots);
    slots[k] = t >= piece.loaded ? -1 : valid ? static_cast<int>(in_pool) : p.num_slots - 1;
    if (k == 0) start = __shfl_sync(~0u, slots[0], 0);
    consecutive = consecutive && slots[k] >= 0 && slots[k] == start + k * 32 + lane;
  }
  // Behind the end of gathered tokens lie zeros.
  if (piece.gathered > 0) start = piece.gathered - 1 + token;
  consecutive = __all_sync(~0u, consecutive || piece.gathered > 0);
  uint32_t boxes = 0;
#pragma unroll
  for (int k = 0; k < C::kTile / 32 && !consecutive; ++k) {
    const int slot = slots[k], leader = __shfl_sync(~0u, slot, lane & ~7);
    // Groups past the end are boxes past the end of the pool, which TMA fills with zeros.
    const uint32_t good = __ballot_sync(~0u, leader < 0 || (slot >= 0 && slot == leader + (lane & 7)));
#pragma unroll
    for (int g = 0; g < 4; ++g) boxes |= ((good >> (8 * g)) & 0xFF) == 0xFF ? 1u << (k * 4 + g) : 0u;
    const bool boxed = ((good >> (lane & ~7)) & 0xFF) == 0xFF;
    s.slots[ring.slot()][k * 32 + lane] = boxed      ? (slot < 0 ? p.num_slots : slot)
                                          : slot < 0 ? kNoToken
                                                     : slot * p.kv_slot_units;
  }
  if (lane == 0) {
    const bool masked = token < piece.from || token + C::kTile > piece.full;
    const uint32_t valid = min(max(piece.tokens - token, 0), C::kTile);
    const uint32_t flags = (masked ? kMasked : 0) | (last ? kLast : 0) | (consecutive ? 0 : kScattered);
    const uint32_t load_flags = (first ? kFirst : 0) | (piece.gathered > 0 ? kGathered : 0);
    s.loads[ring.slot()] = {consecutive ? start : -1, boxes, item | static_cast<int>(load_flags) << kFlagShift};
    s.tiles[tile] = {piece.begin + token,
                     valid | (piece.rows & 0xFF) << 8 | ((piece.rows >> 16) & 0xFF) << 16 | flags << kFlagShift};
  }
  ptx::mbarrier_warp_arrive(ptx::smem_address(&s.planned[ring.slot()]), lane);
  if constexpr (C::kMasks) {
    if (p.custom_mask != nullptr && (token < piece.from || token + C::kTile > piece.full))
      prefetch_mask(p, s.items[item], piece, token, lane);
  }
  ring.advance();
  tile = (tile + 1) % kTiles;
}

template <class C>
__device__ __forceinline__ void plan_end(SharedStorage<C>& s, const Ring<kPlanned>& ring, int tile, int lane) {
  ptx::mbarrier_wait(ptx::smem_address(&s.loaded[ring.slot()]), ring.phase() ^ 1);
  if (lane == 0) {
    s.loads[ring.slot()].item = static_cast<int>(kEnd << kFlagShift);
    s.tiles[tile].bits = kEnd << kFlagShift;
  }
  ptx::mbarrier_warp_arrive(ptx::smem_address(&s.planned[ring.slot()]), lane);
}

// Eight words, one per lane from `at` on, to all lanes.
__device__ __forceinline__ Piece piece_of(int word, int at) {
  return {__shfl_sync(~0u, word, at),     __shfl_sync(~0u, word, at + 1), __shfl_sync(~0u, word, at + 2),
          __shfl_sync(~0u, word, at + 3), __shfl_sync(~0u, word, at + 4), __shfl_sync(~0u, word, at + 5),
          __shfl_sync(~0u, word, at + 6), __shfl_sync(~0u, word, at + 7)};
}

template <class C>
__device__ __forceinline__ int tiles_of(const Piece& piece) {
  return max(1, (piece.tokens + C::kTile - 1) / C::kTile);
}

template <class C>
__device__ __forceinline__ void plan(const Params& p, SharedStorage<C>& s, int lane) {
  Ring<kPlanned> ring;
  int tile = 0, slot = 0;  // positions in the rings of tiles and items
  const int total = s.total;
  int item = blockIdx.x < s.limit ? static_cast<int>(blockIdx.x) : total;
  int claimed = claim<C>(p, s, item, lane), word = load_word(p, item, total, lane);
  int q_at = item < total ? q_box<C>(p, word, lane) : 0;
  while (item < total) {
    if (lane < 16) reinterpret_cast<int*>(&s.items[slot])[lane] = lane == offsetof(Item, first_tile) / 4 ? q_at : word;
    const int upcoming = claimed_by<C>(s, item, __shfl_sync(~0u, claimed, 0));
    const int next_word = load_word(p, upcoming, total, lane);
    if (upcoming < total) claimed = claim<C>(p, s, upcoming, lane);
    Piece piece = piece_of(word, 8);
    int skip = __shfl_sync(~0u, word, 3), left = __shfl_sync(~0u, word, 4), more = __shfl_sync(~0u, word, 7);
    bool first = true;
    while (true) {
      const int tiles = tiles_of<C>(piece);
      const int end = min(tiles, skip + left);
      if (skip < end) {
        Pages<C> ahead = load_pages<C>(p, piece, skip * C::kTile, lane);
#pragma unroll 1
        for (int t = skip; t < end; ++t) {
          const Pages<C> pages = ahead;
          if (t + 1 < end) ahead = load_pages<C>(p, piece, (t + 1) * C::kTile, lane);
          --left;
          plan_tile<C>(p, s, ring, tile, piece, t * C::kTile, pages, slot, first, left == 0, lane);
          // Under load the answer takes longer than a tile: so of the next item, and not between the two.
          if (first && upcoming < total) q_at = q_box<C>(p, next_word, lane);
          first = false;
        }
      }
      if (left <= 0) break;
      skip = max(skip - tiles, 0);
      const int* src = reinterpret_cast<const int*>(p.work.pieces + min(more++, p.work.piece_capacity - 1));
      piece = piece_of(lane < 8 ? __ldg(src + lane) : 0, 0);
    }
    slot = (slot + 1) % kItems;
    item = upcoming;
    word = next_word;
  }
  plan_end<C>(s, ring, tile, lane);
  // The last CTA readies the counters for the next launch: every claim came before.
  if (lane == 0) {
    Header& h = *p.work.header;
    __threadfence();
    if (atomicAdd(&h.finished, 1) == static_cast<int>(gridDim.x) - 1) {
      h.taken = 0;
      h.finished = 0;
    }
  }
}

}  // namespace flashcore::extend
