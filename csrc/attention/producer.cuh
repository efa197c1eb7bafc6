// Loader warps: K, V and q of the items into shared memory. Each warp walks the items at its own pace.
#pragma once
#include "attention/strided.cuh"
#include "attention/work_list.cuh"

namespace flashcore::decode {

// Pages of this lane's tokens in two tiles: raw, so that nothing waits for them here. The loader asks for them two
// tiles ahead: under load a page index takes 2 us, longer than a tile, and behind scattered copies still longer.
constexpr int kBlock = 2;          // tiles
constexpr int kKeyLoader = 1;      // warp; the next loads V
constexpr int kEarlyRows = 16;     // q_rows of an item whose first tiles may set out before them
constexpr int kBegunTokens = 512;  // left to load of an item when the next may be claimed
static_assert(kRunTokens <= kBegunTokens);
constexpr int kFullArrivals = 32 + ptx::kWarpArrivals;  // that fill a buffer: one of the warp, and of what came by
                                                        // cp.async an asynchronous one of every lane

template <class C>
struct Pages {
  static constexpr int kGroups = C::kTile / 32;
  int of[kBlock][kGroups];
};

template <class C>
__device__ __forceinline__ Pages<C> load_pages(const DecodeParams& p, const WorkItem& item, int tile, int lane) {
  Pages<C> r;
  const int tokens = first_run_of(item) >= 0 ? 0 : item.num_tokens;  // runs need none
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
#pragma unroll
    for (int g = 0; g < Pages<C>::kGroups; ++g) {
      const int t = tile + i * C::kTile + g * 32 + lane;
      r.of[i][g] =
          t < tokens ? __ldg(p.page_indices + min(item.page + p.by_page(item.token + t), p.page_capacity - 1)) : 0;
    }
  }
  return r;
}

// The same of this CTA's first item, whose pages the schedule has looked up.
template <class C>
__device__ __forceinline__ Pages<C> load_start_pages(const DecodeParams& p, int lane) {
  static_assert(kBlock * C::kTile <= kStartTokens);
  Pages<C> r;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
#pragma unroll
    for (int g = 0; g < Pages<C>::kGroups; ++g)
      r.of[i][g] = __ldg(p.work.start_pages + blockIdx.x * kStartTokens + i * C::kTile + g * 32 + lane);
  }
  return r;
}

// The slot of token `t` of the item's chunk, given its page; inside the pool whatever the tables hold; -1 past the
// chunk.
__device__ __forceinline__ int slot_of(const DecodeParams& p, const WorkItem& item, int page, int t) {
  if (t >= item.num_tokens) return -1;
  const int at = item.token + t;
  const uint32_t slot = static_cast<uint32_t>(page) * p.page_size + (at - p.by_page(at) * p.page_size);
  return slot < static_cast<uint32_t>(p.num_slots) && page >= 0 ? static_cast<int>(slot) : p.num_slots - 1;
}

// The buffers of K or of V, as one loader sees them.
template <class C>
struct Buffers {
  const CUtensorMap* maps;
  const int4* pool;
  Scattered<C>* scattered;
  uint32_t data, full, empty;  // shared-memory addresses of the first
  uint32_t issued;             // shared-memory address
  int slots, slot;
  uint32_t phase;
  // A constant where K and V have equally many, which saves a register.
  __device__ __forceinline__ int count() const { return C::kConverts ? C::kCachedBuffers : slots; }
};

template <class C>
__device__ __forceinline__ Buffers<C> buffers_of(const DecodeParams& p, const TensorMaps& maps, SharedStorage<C>& s,
                                                 bool keys) {
  Buffers<C> b{};
  b.maps = keys ? maps.k : maps.v;
  b.pool = static_cast<const int4*>(keys ? p.k : p.v);
  b.scattered = &s.scattered[keys ? 0 : 1];
  b.issued = ptx::smem_address(&s.issued[keys ? 0 : 1]);
  if constexpr (C::kConverts) {
    b.data = ptx::smem_address(keys ? s.cached.k[0] : s.cached.v[0]);
    b.full = ptx::smem_address(keys ? s.cached_barriers.k_full : s.cached_barriers.v_full);
    b.empty = ptx::smem_address(keys ? s.cached_barriers.k_empty : s.cached_barriers.v_empty);
  } else {
    b.data = ptx::smem_address(keys ? s.k[0] : s.v[0]);
    b.full = ptx::smem_address(keys ? s.k_full : s.v_full);
    b.empty = ptx::smem_address(keys ? s.k_empty : s.v_empty);
    b.slots = keys ? C::kKBuffers : C::kVBuffers;
  }
  return b;
}

// How a warp copies scattered tokens, 16 bytes a lane: four tokens a lane and turn, at least, as many rows apart as one
// instruction copies.
template <class C>
struct Turn {
  static constexpr int kRows = 32 / C::Cached::kChunks;  // of an instruction
  static constexpr int kTokens = kRows > 2 ? 4 * kRows : 8, kCopies = kTokens / kRows;
  // Where in `where` the token is that this lane looks up: the tokens of one copying lane lie side by side.
  static __device__ __forceinline__ int position(int lane) {
    const int token = lane % kTokens;
    return lane - token + token % kRows * kCopies + token / kRows;
  }
  // The first 8-token groups of the turns that take `groups`.
  static __device__ __forceinline__ uint32_t of_groups(uint32_t groups) {
    if constexpr (kTokens >= 16) groups |= groups >> 1;
    if constexpr (kTokens == 32) groups |= groups >> 2;
    return groups & (kTokens == 8 ? ~0u : kTokens == 16 ? 0x55555555u : 0x11111111u);
  }
};

// Zeros into the 8-token groups in `groups`.
template <class C>
__device__ __forceinline__ void clear(uint32_t dst, uint32_t groups, int lane) {
  constexpr int kBytes = C::Cached::kGroupBytes;
#pragma unroll 1
  for (; groups != 0; groups &= groups - 1) {
    const uint32_t to = dst + (__ffs(groups) - 1) * kBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kBytes; i += 512) ptx::store_shared_16(to + i, make_uint4(0, 0, 0, 0));
  }
}

// Copies the 8-token groups in `groups`, perhaps others beside them once more. `where`: the shared-memory address of
// each token's distance from the pool in 16 bytes, at Turn::position; kNoToken past the chunk. Those get zeros, because
// stale bytes may be NaN, and 0 * NaN in P.V would poison every row.
//
// The warp's instructions are what limits it. So a lane's words of a turn are one load; an address is one multiply-add,
// in registers of its own, as a copy holds them for long; the swizzle of a later row is an exclusive or.
constexpr uint32_t kNoToken = ~0u;

template <class C>
__device__ __forceinline__ void load_scattered(const int4* pool, uint32_t dst, uint32_t where, uint32_t groups,
                                               int lane) {
  using Tile = typename C::Cached;
  using T = Turn<C>;
  const int sub = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
  const char* src = reinterpret_cast<const char*>(pool + chunk);
  asm volatile("" : "+l"(src));  // one register pair: else the compiler adds in three steps
  dst += tile_offset<Tile>(sub, chunk);
  where += sub * T::kCopies * 4;
  groups = T::of_groups(groups);
#pragma unroll 1
  for (; groups != 0; groups &= groups - 1) {
    const int g = __ffs(groups) - 1;
    uint32_t at[T::kCopies];
    ptx::load_shared_words(at, where + g * 32);
    const uint32_t to = dst + g * Tile::kGroupBytes;
#pragma unroll
    for (int i = 0; i < T::kCopies; ++i) {
      const int row = i * T::kRows, line = row % 8;
      static_assert(T::kRows == 8 || Tile::kRowBytes >= 128);
      ptx::cp_async_16((to ^ (line << 4)) + row / 8 * Tile::kGroupBytes + line * 128,
                       src + static_cast<uint64_t>(at[i]) * 16, at[i] == kNoToken ? 0 : 16);
    }
  }
}

// Loads the groups of 32 tokens that lie apart by the same step. Their 8-token groups.
template <class C>
__device__ __forceinline__ uint32_t load_strided(const DecodeParams& p, const TensorMaps& maps, Buffers<C>& b,
                                                 const int (&slot)[Pages<C>::kGroups], uint32_t full, uint32_t dst,
                                                 int kv_head, int lane) {
  using Tile = typename C::Cached;
  uint32_t apart = 0;
  int step = 0;
#pragma unroll
  for (int g = 0; g < Pages<C>::kGroups; ++g) {
    const int stride = stride_of(slot[g], lane);
    if (step == 0) step = stride;
    apart |= stride == step && step != 0 ? 0xFu << (4 * g) : 0u;
  }
  if (apart == 0) return 0;
  const bool keys = ptx::thread_id() / 32 == kKeyLoader;
  const int map = strided_map(p, keys ? maps.strided_k : maps.strided_v, b.scattered->strides, !keys, step,
                              8 * __popc(apart), lane);
  if (map < 0) return 0;
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, __popc(apart) * Tile::kGroupBytes);
#pragma unroll
    for (int g = 0; g < Pages<C>::kGroups; ++g) {
      if ((apart >> (4 * g)) & 1)
        ptx::tma_load_5d(dst + g * 4 * Tile::kGroupBytes, p.work.maps + map, full, ptx::kEvictFirst, 0, 0, 0, 0,
                         slot[g] * p.heads_per_slot + kv_head);
    }
  }
  return apart;
}

// Waits until the next buffer is free, and goes on to it. `shallow`: one more stays empty. Addresses of the buffer and
// of its full barrier.
template <class C>
__device__ __forceinline__ uint2 next_buffer(Buffers<C>& b, bool shallow) {
  const uint32_t full = b.full + b.slot * 8, dst = b.data + b.slot * C::Cached::kBufferBytes;
  ptx::mbarrier_wait(b.empty + b.slot * 8, b.phase ^ 1);
  if (++b.slot == b.count()) {
    b.slot = 0;
    b.phase ^= 1;
  }
  if (shallow) ptx::mbarrier_wait(b.empty + b.slot * 8, b.phase ^ 1);
  return {dst, full};
}

// A tile of an item of runs, from its token `at` on. Zeros past the item's end are boxes past the pool's end.
template <class C>
__device__ __forceinline__ void load_run(const DecodeParams& p, const TensorMaps& maps, Buffers<C>& b,
                                         const WorkItem& item, int at, bool shallow, int lane) {
  using Tile = typename C::Cached;
  constexpr int kGroups = Pages<C>::kGroups, kAll = C::kTile / 8;
  static_assert(kGroups + kAll <= 32);
  const int end = item.num_tokens - at, cut = first_run_of(item) - at, step = item.piece >> kStepShift;
  auto slot_at = [&](int t) { return t < cut ? item.page + at + t : item.token + (t - cut) * step; };
  const auto [dst, full] = next_buffer<C>(b, shallow);
  // A lane for the tile's groups of 32 tokens each, then one for those of 8.
  const bool small = lane >= kGroups;
  const int size = small ? 8 : 32, begin = small ? (lane - kGroups) * 8 : lane * 32;
  auto is_whole = [&](int from, int tokens) {
    return (from >= cut || from + tokens <= cut) && (from >= end || from + tokens <= end);
  };
  bool whole = is_whole(begin, size), in_larger = small && is_whole(begin & ~31, 32);
  uint32_t strided = 0;  // groups of 32 that lie apart, if there is a map for their step
  int map = -1;
  if (step > 1) {
    const bool apart = begin >= cut && begin < end;
    strided = __ballot_sync(~0u, apart && !small && whole && slot_at(begin + 31) < p.num_slots);
    if (strided != 0) {
      const bool keys = ptx::thread_id() / 32 == kKeyLoader;
      map = strided_map(p, keys ? maps.strided_k : maps.strided_v, b.scattered->strides, !keys, step,
                        item.num_tokens - first_run_of(item), lane);
      if (map < 0) strided = 0;
    }
    if (apart) {
      whole = false;
      in_larger = small && ((strided >> (begin / 32)) & 1);
    }
  }
  const uint32_t scattered = (__ballot_sync(~0u, !whole && !in_larger) >> kGroups) & (~0u >> (32 - kAll));
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, (kAll - __popc(scattered)) * Tile::kGroupBytes);
#pragma unroll 1
    for (; strided != 0; strided &= strided - 1) {
      const int t = (__ffs(strided) - 1) * 32;
      ptx::tma_load_5d(dst + t / 8 * Tile::kGroupBytes, p.work.maps + map, full, ptx::kEvictFirst, 0, 0, 0, 0,
                       slot_at(t) * p.heads_per_slot + kv_head_of(item));
    }
  }
  __syncwarp();
  if (whole && !in_larger && lane < kGroups + kAll) {
    const int slot = slot_at(begin);
    ptx::tma_load_5d(dst + begin / 8 * Tile::kGroupBytes, b.maps + (small ? 0 : 1), full, ptx::kEvictFirst, 0,
                     begin < end && slot + size <= p.num_slots ? slot : p.num_slots, 0, 0, kv_head_of(item));
  }
  if (scattered == 0) {
    if (lane == 0) ptx::mbarrier_arrive(full, kFullArrivals);
    return;
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int t = g * 32 + lane;
    b.scattered->where[g * 32 + Turn<C>::position(lane)] =
        t < end ? static_cast<uint32_t>(min(slot_at(t), p.num_slots - 1)) * p.kv_slot_units +
                      kv_head_of(item) * p.kv_head_units
                : kNoToken;
  }
  ptx::mbarrier_warp_arrive(full, lane);
  load_scattered<C>(b.pool, dst, ptx::smem_address(b.scattered->where), scattered, lane);
  ptx::cp_async_mbarrier_arrive(full);
  __syncwarp();  // `scattered` is free again
}

// A tile of consecutive slots, of which `first` is the first. `to`: see next_buffer.
template <class C>
__device__ __forceinline__ void load_box(const Buffers<C>& b, uint2 to, int first, int kv_head, int lane) {
  if (lane != 0) return;
  ptx::mbarrier_expect_tx(to.y, C::Cached::kBufferBytes);
  ptx::tma_load_5d(to.x, b.maps + 2, to.y, ptx::kEvictFirst, 0, first, 0, 0, kv_head);
  ptx::mbarrier_arrive(to.y, kFullArrivals);
}

// One tile. `shallow`: one buffer stays empty. `slot`: of the lane's tokens 32 g + lane, -1 past the chunk. A full
// barrier counts one arrival of the warp and, for what came by cp.async, one of every lane.
template <class C>
__device__ __forceinline__ void load_tile(const DecodeParams& p, const TensorMaps& maps, Buffers<C>& b,
                                          const int (&slot)[Pages<C>::kGroups], int kv_head, bool shallow, int lane) {
  using Tile = typename C::Cached;
  constexpr int kGroups = Pages<C>::kGroups;
  const auto [dst, full] = next_buffer<C>(b, shallow);
  const int first = __shfl_sync(~0u, slot[0], 0);
  bool run = true;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) run &= slot[g] == first + g * 32 + lane;
  if (__all_sync(~0u, run)) {
    load_box<C>(b, make_uint2(dst, full), first, kv_head, lane);
    return;
  }
  constexpr uint32_t kAll = ~0u >> (32 - 4 * kGroups);
  const uint32_t strided = load_strided<C>(p, maps, b, slot, full, dst, kv_head, lane);
  uint32_t boxes = 0, runs = 0;  // 8-token groups that lie in a row; those of them that a box of 32 takes
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int leader = __shfl_sync(~0u, slot[g], lane & ~7), head = __shfl_sync(~0u, slot[g], 0);
    const uint32_t good = __ballot_sync(~0u, slot[g] >= 0 && slot[g] == leader + (lane & 7));
#pragma unroll
    for (int i = 0; i < 4; ++i) boxes |= ((good >> (8 * i)) & 0xFF) == 0xFF ? 1u << (4 * g + i) : 0u;
    runs |= __all_sync(~0u, slot[g] == head + lane) ? 0xFu << (4 * g) : 0u;
  }
  if (lane == 0) ptx::mbarrier_expect_tx(full, __popc(boxes) * Tile::kGroupBytes);
  __syncwarp();
  if (boxes != 0) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool whole = (runs >> (4 * g)) & 1;
      if (lane == 0 && whole) {
        ptx::tma_load_5d(dst + g * 4 * Tile::kGroupBytes, b.maps + 1, full, ptx::kEvictFirst, 0, slot[g], 0, 0,
                         kv_head);
      } else if ((lane & 7) == 0 && !whole && ((boxes >> (4 * g + lane / 8)) & 1)) {
        ptx::tma_load_5d(dst + (g * 4 + lane / 8) * Tile::kGroupBytes, b.maps, full, ptx::kEvictFirst, 0, slot[g], 0, 0,
                         kv_head);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    b.scattered->where[g * 32 + Turn<C>::position(lane)] =
        slot[g] >= 0 ? static_cast<uint32_t>(slot[g]) * p.kv_slot_units + kv_head * p.kv_head_units : kNoToken;
  uint32_t past = 0;  // 8-token groups past the chunk: zeros
  if (__any_sync(~0u, slot[kGroups - 1] < 0)) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t gone = __ballot_sync(~0u, slot[g] < 0);
      past |= ((gone & 1) | (gone >> 7 & 2) | (gone >> 14 & 4) | (gone >> 21 & 8)) << (4 * g);
    }
    clear<C>(dst, past, lane);
  }
  ptx::mbarrier_warp_arrive(full, lane);
  load_scattered<C>(b.pool, dst, ptx::smem_address(b.scattered->where), ~(boxes | strided | past) & kAll, lane);
  ptx::cp_async_mbarrier_arrive(full);
  __syncwarp();  // `scattered` is free again
}

// K or V of all items. Tiles go out in blocks of two, whose page indices were loaded during the block before. During
// the last block of an item the next item is looked up, as soon as it is posted. Of the CTA's start item, if it has
// one: `slot`, see Workspace::start_slots; `ahead`, pages. Two tiles whose slots are known set out before anything
// else, as the way to the loop below takes 1 us; but not before many q_rows, which would come behind those of all CTAs.
template <class C>
__device__ __forceinline__ void load_kv(const DecodeParams& p, const TensorMaps& maps, SharedStorage<C>& s,
                                        Buffers<C> b, const WorkItem& start, int slot, Pages<C> ahead) {
  constexpr int kGroups = Pages<C>::kGroups;
  Ring<C::kRing> read;
  // A tile has begun to be filled; `first` of its item. A converter says so itself.
  auto publish = [&](bool first) {
    if (C::kConverts || ptx::thread_id() % 32 != 0) return;
    ptx::store_release(b.issued, b.slot + static_cast<int>(b.phase) * b.slots);
    if (first) ptx::mbarrier_arrive(ptx::smem_address(&s.item_started[read.slot()]));
  };
  int from = 0;  // tokens of the item that are on their way
  const bool few = start.q_rows <= kEarlyRows && s.wide_ctas == 0;
  if (few && start.num_tokens >= 2 * C::kTile && slot >= 0 && slot <= p.num_slots - 2 * C::kTile) {
#pragma unroll 1
    for (; from < 2 * C::kTile; from += C::kTile) {
      const uint2 to = next_buffer<C>(b, false);
      __syncwarp();  // all lanes have seen it free, before who reads it can free it again
      load_box<C>(b, to, slot + from, start.kv_head, ptx::thread_id() % 32);
      publish(from == 0);
    }
  }
  const WorkItem* item = &wait_item<C>(s, read);
  if (start.num_tokens == 0 || from > 0) ahead = load_pages<C>(p, *item, from, ptx::thread_id() % 32);
  bool begun = false;
  auto begin = [&](int left) {
    if (begun || left > kBegunTokens) return;
    if (ptx::thread_id() == kKeyLoader * 32) ptx::mbarrier_arrive(ptx::smem_address(&s.item_begun[read.slot()]));
    begun = true;
  };
  while (item->num_tokens > 0) {
    bool looked = false;
    // Beside wide items narrow ones hold back: what they have in flight is the queue that the tiles of the wide ones,
    // which are in the L2, wait in.
    const bool shallow = b.count() > 2 && s.wide_ctas > 0 && item->q_rows <= kNarrowRows;
    if (first_run_of(*item) >= 0) {
      if (ptx::thread_id() == kKeyLoader * 32) ptx::mbarrier_arrive(ptx::smem_address(&s.item_begun[read.slot()]));
      if ((looked = item_ready<C>(s, read.next())))
        ahead = load_pages<C>(p, s.items[read.next().slot()], 0, ptx::thread_id() % 32);
#pragma unroll 1
      for (int t = 0; t < item->num_tokens; t += C::kTile) {
        load_run<C>(p, maps, b, *item, t, shallow, ptx::thread_id() % 32);
        publish(t == 0);
      }
    } else {
      if (from > 0) begin(item->num_tokens - from);
#pragma unroll 1
      for (int t = from; t < item->num_tokens; t += kBlock * C::kTile) {
        const Pages<C> pages = ahead;
        const int left = item->num_tokens - t;
        const bool last = left <= kBlock * C::kTile;
        if (!last) ahead = load_pages<C>(p, *item, t + kBlock * C::kTile, ptx::thread_id() % 32);
        begin(left);
#pragma unroll 1
        for (int i = 0; i < kBlock && i * C::kTile < left; ++i) {
          if (last && !looked && (looked = item_ready<C>(s, read.next())))
            ahead = load_pages<C>(p, s.items[read.next().slot()], 0, ptx::thread_id() % 32);
          int slot[kGroups];
#pragma unroll
          for (int g = 0; g < kGroups; ++g)
            slot[g] = slot_of(p, *item, i == 0 ? pages.of[0][g] : pages.of[1][g],
                              t + i * C::kTile + g * 32 + ptx::thread_id() % 32);
          load_tile<C>(p, maps, b, slot, kv_head_of(*item), shallow, ptx::thread_id() % 32);
          publish(t + i == 0);
        }
      }
    }
    finish_item<C>(s, read, ptx::thread_id() % 32);
    item = &wait_item<C>(s, read);
    begun = false;
    from = 0;
    if (!looked) ahead = load_pages<C>(p, *item, 0, ptx::thread_id() % 32);
  }
}

// The q_rows of one warpgroup, and where their results go. A lane looks up two of them: lane and lane + 32.
template <class C>
__device__ __forceinline__ void load_q_half(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item, int half,
                                            int warpgroup, int lane) {
  constexpr int kChunks = C::kRowBytes / 16, kRowsPerStep = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const int rows = min(item.q_rows - half * kNarrowRows, kNarrowRows);
  const uint32_t full = ptx::smem_address(&s.q_full[warpgroup]), base = ptx::smem_address(s.q[warpgroup]);
  const uint32_t phase = q_phase_of(item, warpgroup);
  const int piece = piece_of(item);
  int from[2], to[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_half = i * 32 + lane, q_row = item.q_row + half * kNarrowRows + in_half, local = q_row / p.ratio;
    from[i] = -1;
    to[i] = kNowhere;
    if (in_half < rows) {
      const RowInfo info = load_row_info(p, item.row_begin + local);
      const int in_group = q_row - local * p.ratio, slot = info.slot + piece;
      const bool ends = info.pieces == 1, fits = piece >= 0 && piece < info.pieces && slot < p.work.partial_capacity;
      from[i] = static_cast<int>(info.row * p.q_row_stride) + (kv_head_of(item) * p.ratio + in_group) * C::kHeadDim;
      if (ends || fits) to[i] = (ends ? info.row : slot) << kGroupHeadBits | in_group | (ends ? kInOut : 0);
    }
  }
  ptx::mbarrier_wait(ptx::smem_address(&s.q_empty[warpgroup]), phase ^ 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) s.destinations[warpgroup][phase][i * 32 + lane] = to[i];
#pragma unroll 2
  for (int r = 0; r < rows; r += kRowsPerStep) {
    const int row = r + lane / kChunks, chunk = lane % kChunks;
    const int low = __shfl_sync(~0u, from[0], row & 31), high = __shfl_sync(~0u, from[1], row & 31);
    const int at = row < 32 ? low : high;
    if (at >= 0)
      ptx::cp_async_16(base + tile_offset<C>(row, chunk), static_cast<const typename C::T*>(p.q) + at + chunk * 8, 16);
  }
  ptx::cp_async_mbarrier_arrive(full);
  ptx::mbarrier_warp_arrive(full, lane);  // for the destinations: an ordinary store needs an ordinary arrival
}

// q of all items.
template <class C>
__device__ __forceinline__ void load_q(const DecodeParams& p, SharedStorage<C>& s, int lane) {
  Ring<C::kRing> read;
  while (true) {
    const WorkItem& item = wait_item<C>(s, read);
    if (item.num_tokens <= 0) return;
    int half = 0;  // of the item: a narrow one has only the first, for either warpgroup
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
      if (owns(item, warpgroup)) load_q_half<C>(p, s, item, half++, warpgroup, lane);
    }
    finish_item<C>(s, read, ptx::thread_id() % 32);
  }
}

}  // namespace flashcore::decode
