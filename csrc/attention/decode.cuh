// Decode attention, one persistent launch per layer: for every item of the work list
//
//   S = q k^T * scale (capped), P = exp2(S - max S), O = P v / sum P, lse2 = max + log2(sum P)
//
// with q the gathered q_rows of a segment and k, v a chunk of its tokens. A row with one piece goes to `out`; others leave
// (O, lse2) in fp32 for merge.cu. Decode has no causal mask inside a segment, so a tile is any 128 tokens.
//
// Grid: one CTA per SM, 384 threads.
//   warps 0-3   producer (56 registers): warp w loads tokens 32 w .. 32 w + 31 of each tile, K then V, and a quarter of q.
//               32 consecutive slots: one TMA box; 8 consecutive: one 8-row box; anything else: cp.async token by token.
//               Warp 0 also takes items from the two lists (dynamic counters) and hands them round by a ring in shared memory.
//   warps 4-7, 8-11   two consumer warpgroups (224 registers), 64 q_rows each.
//               Wide item (> 64 q_rows): both work on every tile. Narrow item: one of them, in turn, so that one item's
//               epilogue overlaps the next item's products.
// A CTA starts on the wide or the narrow list (header.wide_ctas) and helps with the other one when its own is empty:
// compute-bound and memory-bound items run beside each other.
//
// Shared memory, D 128: 6 buffers of 128 tokens x 256 B (K, V, K, V, ...) + q 32 KiB = 224 KiB + barriers.
// A tile lies as [8-token group][64 elements of d][8 tokens][128 B], 128-byte swizzled.
#pragma once
#include "attention/params.h"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"

namespace flashcore::decode {

template <typename Element, int kHeadDim_>
struct Traits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = kHeadDim == 256 ? 64 : 128;   // tokens
  static constexpr int kBuffers = kHeadDim == 256 ? 5 : kHeadDim == 128 ? 6 : 12;
  static constexpr bool kQInRegisters = kHeadDim <= 128;     // d 256 has no registers left for it
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kGroupBytes = 8 * kRowBytes;          // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kQBytes = kNarrowRows * kRowBytes;    // of one warpgroup
  static constexpr int kWarpTokens = kTile / 4;              // a producer warp's share of a tile
  static constexpr int kRing = 8;                            // items known to the CTA
};

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

template <class C>
struct SharedStorage {
  alignas(1024) char buffers[C::kBuffers][C::kBufferBytes];
  alignas(1024) char q[2][C::kQBytes];
  WorkItem items[C::kRing];
  alignas(8) uint64_t full[C::kBuffers], empty[C::kBuffers], q_full[2], q_empty[2], item_full[C::kRing], item_empty[C::kRing];
};

struct TensorMaps {
  CUtensorMap k_warp, v_warp, k_group, v_group;  // boxes of a warp's share of a tile; of 8 tokens
};

// Position in a ring of kSize slots; `phase` is the parity of the pass.
template <int kSize>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int n = 1) {
    slot += n;
    const int passes = slot / kSize;
    slot -= passes * kSize;
    phase ^= passes & 1;
  }
};

// ------------------------------------------------------------------------------------------------ work list

// Producer warp 0, lane 0. `index` is the item to be taken next: its counter was read one item ahead.
struct Taker {
  int list, index, entries[2], base[2];
  bool other_tried;

  __device__ __forceinline__ void start(const ScheduleHeader& h, int kv_heads) {
    entries[0] = h.entries[0] * kv_heads;
    entries[1] = h.entries[1] * kv_heads;
    const int wide = min(max(h.wide_ctas, 0), static_cast<int>(gridDim.x));
    base[0] = wide;
    base[1] = gridDim.x - wide;
    list = blockIdx.x < wide ? 0 : 1;
    index = blockIdx.x - (list == 0 ? 0 : wide);
    other_tried = false;
  }
  // The item at `index`, and the next index on its way. num_tokens == 0 when both lists are empty.
  __device__ __forceinline__ WorkItem take(const DecodeParams& p) {
    WorkItem item{};
    if (index >= entries[list] && !other_tried) {
      other_tried = true;
      list ^= 1;
      index = base[list] + atomicAdd(&p.work.header->taken[list], 1);
    }
    if (index >= entries[list]) return item;
    const int entry = index / p.kv_heads;
    const int4* src = reinterpret_cast<const int4*>(p.work.items + (list == 0 ? entry : p.work.entry_capacity - 1 - entry));
    reinterpret_cast<int4*>(&item)[0] = src[0];
    reinterpret_cast<int4*>(&item)[1] = src[1];
    item.kv_head = index - entry * p.kv_heads;
    index = base[list] + atomicAdd(&p.work.header->taken[list], 1);
    return item;
  }
};

template <class C>
__device__ __forceinline__ void post_item(SharedStorage<C>& s, Ring<C::kRing>& ring, const WorkItem& item) {
  ptx::mbarrier_wait(ptx::smem_address(&s.item_empty[ring.slot]), ring.phase ^ 1);
  s.items[ring.slot] = item;
  ptx::mbarrier_arrive(ptx::smem_address(&s.item_full[ring.slot]));
  ring.advance();
}

template <class C>
__device__ __forceinline__ WorkItem read_item(SharedStorage<C>& s, Ring<C::kRing>& ring, int lane) {
  ptx::mbarrier_wait(ptx::smem_address(&s.item_full[ring.slot]), ring.phase);
  const WorkItem item = s.items[ring.slot];
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.item_empty[ring.slot]));
  ring.advance();
  return item;
}

// ------------------------------------------------------------------------------------------------ producer

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile.
template <class C>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  return (row >> 3) * C::kGroupBytes + (chunk >> 3) * 1024 + (row & 7) * 128 + (((chunk ^ row) & 7) << 4);
}

// The slot of token `t` of the item's chunk, inside the pool whatever the tables hold; -1 past the chunk.
__device__ __forceinline__ int load_slot(const DecodeParams& p, const WorkItem& item, int t) {
  if (t >= item.num_tokens) return -1;
  const int token = item.token + t;
  const int block = token / p.page_size;
  const int page = __ldg(p.page_indices + min(item.page + block, p.page_capacity - 1));
  const int64_t slot = static_cast<int64_t>(page) * p.page_size + (token - block * p.page_size);
  return static_cast<int>(slot < 0 ? 0 : slot < p.num_slots ? slot : p.num_slots - 1);
}

// Where lane `lane` of warp `warp` finds its q_row (16 of each half per warp): elements from p.q; -1 for none.
__device__ __forceinline__ int load_q_offset(const DecodeParams& p, const WorkItem& item, int warp, int lane) {
  const int in_tile = (lane >> 4) * kNarrowRows + warp * 16 + (lane & 15);
  if (in_tile >= item.q_rows) return -1;
  const int q_row = item.q_row + in_tile;
  const int local = q_row / p.ratio;
  const int row = __ldg(p.work.row_tags + min(item.row_begin + local, p.batch - 1)) & 0x7FFFFFFF;
  return static_cast<int>(row * p.q_row_stride) + (item.kv_head * p.ratio + q_row - local * p.ratio) * 1;
}

template <class C>
__device__ __forceinline__ void load_q_half(const DecodeParams& p, SharedStorage<C>& s, int half_of_item, int warpgroup, int q_offset, int warp,
                                            int lane) {
  constexpr int kChunks = C::kRowBytes / 16, kRowsPerStep = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const uint32_t base = ptx::smem_address(s.q[warpgroup]);
#pragma unroll
  for (int r = 0; r < 16; r += kRowsPerStep) {
    const int row = r + lane / kChunks, chunk = lane % kChunks;
    const int offset = __shfl_sync(~0u, q_offset, half_of_item * 16 + row);
    if (offset >= 0) {
      ptx::cp_async_16(base + tile_offset<C>(warp * 16 + row, chunk), static_cast<const typename C::T*>(p.q) + offset + chunk * 8, 16);
    }
  }
  ptx::cp_async_mbarrier_arrive(ptx::smem_address(&s.q_full[warpgroup]));
}

// This warp's share of one tile of K or V. `slot`: of the lane's token (-1: past the chunk, zeros are stored, because stale
// bytes may be NaN and 0 * NaN in P.V would poison every row).
template <class C>
__device__ __forceinline__ void load_share(const DecodeParams& p, SharedStorage<C>& s, const Ring<C::kBuffers>& ring, const CUtensorMap* warp_map,
                                           const CUtensorMap* group_map, const void* pool, int kv_head, int slot, int warp, int lane) {
  constexpr int kTokens = C::kWarpTokens;
  constexpr int kShareBytes = kTokens * C::kRowBytes;
  const uint32_t full = ptx::smem_address(&s.full[ring.slot]);
  const uint32_t dst = ptx::smem_address(s.buffers[ring.slot]) + warp * kShareBytes;
  ptx::mbarrier_wait(ptx::smem_address(&s.empty[ring.slot]), ring.phase ^ 1);

  const bool mine = lane < kTokens;
  const int first = __shfl_sync(~0u, slot, 0);
  if (__all_sync(~0u, !mine || (slot == first + lane && slot >= 0))) {
    if (lane == 0) {
      ptx::mbarrier_expect_tx(full, kShareBytes);
      ptx::tma_load_5d(dst, warp_map, full, ptx::kEvictFirst, 0, first, 0, 0, kv_head);
      ptx::mbarrier_arrive(full, 33);
    }
    return;
  }
  const int leader = __shfl_sync(~0u, slot, lane & ~7);
  const uint32_t good = __ballot_sync(~0u, mine && slot >= 0 && slot == leader + (lane & 7));
  uint32_t boxes = 0;
#pragma unroll
  for (int g = 0; g < kTokens / 8; ++g) boxes |= ((good >> (8 * g)) & 0xFF) == 0xFF ? 1u << g : 0u;
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, __popc(boxes) * C::kGroupBytes);
    ptx::mbarrier_arrive(full, 1);
  }
  __syncwarp();
  if (mine && (lane & 7) == 0 && ((boxes >> (lane >> 3)) & 1)) {
    ptx::tma_load_5d(dst + (lane >> 3) * C::kGroupBytes, group_map, full, ptx::kEvictFirst, 0, slot, 0, 0, kv_head);
  }
  constexpr int kChunks = C::kRowBytes / 16, kRowsPerStep = 32 / kChunks > 0 ? 32 / kChunks : 1;
  const auto* src = static_cast<const typename C::T*>(pool) + kv_head * p.kv_head_stride;
#pragma unroll 1
  for (int g = 0; g < kTokens / 8; ++g) {
    if ((boxes >> g) & 1) continue;
#pragma unroll
    for (int r = 0; r < 8; r += kRowsPerStep) {
      const int row = g * 8 + r + lane / kChunks, chunk = lane % kChunks;
      const int at = __shfl_sync(~0u, slot, row);
      ptx::cp_async_16(dst + tile_offset<C>(row, chunk), src + max(at, 0) * p.kv_slot_stride + chunk * 8, at >= 0 ? 16 : 0);
    }
  }
  ptx::cp_async_mbarrier_arrive(full);
}

template <class C>
__device__ __forceinline__ void produce(const DecodeParams& p, const TensorMaps& maps, SharedStorage<C>& s, int warp, int lane) {
  Ring<C::kBuffers> ring;
  Ring<C::kRing> read, post;
  uint32_t q_phase[2] = {0, 0};
  int turn = 0;
  Taker taker{};
  if (warp == 0 && lane == 0) {
    taker.start(*p.work.header, p.kv_heads);
    post_item<C>(s, post, taker.take(p));
  }
  __syncwarp();
  WorkItem item = read_item<C>(s, read, lane);
  while (item.num_tokens > 0) {
    int slot = load_slot(p, item, warp * C::kWarpTokens + lane);
    if (C::kWarpTokens < 32 && lane >= C::kWarpTokens) slot = -1;
    int q_head = load_q_offset(p, item, warp, lane);
    WorkItem next{};
    if (warp == 0 && lane == 0) next = taker.take(p);  // in flight while this item's first tile is issued

    const bool wide = item.q_rows > kNarrowRows;
    for (int half = 0; half < (wide ? 2 : 1); ++half) {
      const int warpgroup = wide ? half : turn;
      ptx::mbarrier_wait(ptx::smem_address(&s.q_empty[warpgroup]), (warpgroup ? q_phase[1] : q_phase[0]) ^ 1);
      if (warpgroup) q_phase[1] ^= 1; else q_phase[0] ^= 1;
      load_q_half<C>(p, s, half, warpgroup, q_head, warp, lane);
    }
    if (!wide) turn ^= 1;

    const int tiles = (item.num_tokens + C::kTile - 1) / C::kTile;
    for (int t = 0; t < tiles; ++t) {
      load_share<C>(p, s, ring, &maps.k_warp, &maps.k_group, p.k, item.kv_head, slot, warp, lane);
      ring.advance();
      load_share<C>(p, s, ring, &maps.v_warp, &maps.v_group, p.v, item.kv_head, slot, warp, lane);
      ring.advance();
      if (t == 0 && warp == 0 && lane == 0) post_item<C>(s, post, next);
      __syncwarp();
      if (t + 1 < tiles) {
        slot = load_slot(p, item, (t + 1) * C::kTile + warp * C::kWarpTokens + lane);
        if (C::kWarpTokens < 32 && lane >= C::kWarpTokens) slot = -1;
      }
    }
    item = read_item<C>(s, read, lane);
  }
}

// ------------------------------------------------------------------------------------------------ consumer

// Where a thread's two rows go: bit 31 clear: element offset of (row, head) in out / D-less units; see store_rows.
struct Destination {
  int at[2];      // row * H + head for out, partial * H + head for a partial result; -1: no such row
  bool direct[2];
  int head[2];
};

__device__ __forceinline__ Destination find_destination(const DecodeParams& p, const WorkItem& item, int first_row) {
  Destination d;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_tile = first_row + 8 * i;
    d.at[i] = -1;
    d.direct[i] = false;
    d.head[i] = 0;
    if (in_tile < item.q_rows) {
      const int q_row = item.q_row + in_tile;
      const int local = q_row / p.ratio;
      const int tag = __ldg(p.work.row_tags + min(item.row_begin + local, p.batch - 1));
      d.head[i] = item.kv_head * p.ratio + q_row - local * p.ratio;
      d.direct[i] = tag < 0;
      d.at[i] = d.direct[i] ? (tag & 0x7FFFFFFF) : item.partial + local;
    }
  }
  return d;
}

template <class C>
struct Accumulators {
  float o[C::kHeadDim / 2];
  float max[2], sum[2];  // of the thread's two rows; sum over the thread's own columns until the epilogue
};

// S = q k^T of one tile. Sixteen elements of d per instruction; a 64-element block is 1024 B further.
template <class C>
__device__ __forceinline__ void issue_qk(float (&scores)[C::kTile / 2], const uint32_t (&q)[C::kQInRegisters ? C::kHeadDim / 16 : 1][4], uint32_t q_smem,
                                         uint32_t k_smem) {
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const uint32_t at = (step / 4) * 1024 + (step % 4) * 32;
    const uint64_t k_desc = ptx::wgmma_descriptor(k_smem + at, 16, C::kGroupBytes);
    if constexpr (C::kQInRegisters) {
      ptx::wgmma<typename C::T, C::kTile, 0>(scores, q[step], k_desc, step > 0);
    } else {
      ptx::wgmma<typename C::T, C::kTile, 0>(scores, ptx::wgmma_descriptor(q_smem + at, 16, C::kGroupBytes), k_desc, step > 0);
    }
  }
  ptx::wgmma_commit();
}

// O += P v of one tile; sixteen tokens (two groups) per instruction.
template <class C>
__device__ __forceinline__ void issue_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&probs)[C::kTile / 16][4], uint32_t v_smem) {
#pragma unroll
  for (int step = 0; step < C::kTile / 16; ++step) {
    ptx::wgmma<typename C::T, C::kHeadDim, 1>(o, probs[step], ptx::wgmma_descriptor(v_smem + step * 2 * C::kGroupBytes, 1024, C::kGroupBytes), 1);
  }
  ptx::wgmma_commit();
}

__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16*) {
  __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack(float x, float y, __half*) {
  __half2 v = __floats2half2_rn(x, y);
  return reinterpret_cast<uint32_t&>(v);
}

template <class C>
__device__ __forceinline__ void round_probs(uint32_t (&probs)[C::kTile / 16][4], const float (&scores)[C::kTile / 2]) {
  typename C::T* type = nullptr;
#pragma unroll
  for (int step = 0; step < C::kTile / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) probs[step][i] = pack(scores[step * 8 + i * 2], scores[step * 8 + i * 2 + 1], type);
  }
}

// Scores to probabilities in place; returns in `alpha` what the two rows' old sums and outputs are to be multiplied with.
// `valid` tokens of the tile exist (>= 1, so the new maximum is finite and (-inf) - (-inf) cannot occur).
template <class C>
__device__ __forceinline__ void softmax_step(const DecodeParams& p, float (&scores)[C::kTile / 2], Accumulators<C>& acc, float (&alpha)[2], int valid,
                                             int lane) {
  float scale_log2 = p.scale_log2;
  if (p.logit_cap > 0.f) {  // cap * tanh(s * scale / cap), tanh by exp2: within 1e-6 of exact
    const float inner = 2.f * scale_log2 / p.logit_cap, outer = p.logit_cap;
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) scores[i] = outer - __fdividef(2.f * outer, 1.f + ptx::exp2_approx(scores[i] * inner));
    scale_log2 = 1.4426950408889634f;
  }
  if (valid < C::kTile) {
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
      if ((i / 4) * 8 + (lane & 3) * 2 + (i & 1) >= valid) scores[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = acc.max[r];
#pragma unroll
    for (int j = 0; j < C::kTile / 8; ++j) best = fmaxf(best, fmaxf(scores[j * 4 + r * 2], scores[j * 4 + r * 2 + 1]));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    alpha[r] = ptx::exp2_approx((acc.max[r] - best) * scale_log2);
    acc.max[r] = best;
    const float shift = best * scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < C::kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = scores[j * 4 + r * 2 + i];
        x = ptx::exp2_approx(fmaf(x, scale_log2, -shift));
        sum += x;
      }
    }
    acc.sum[r] = acc.sum[r] * alpha[r] + sum;
  }
}

template <class C>
__device__ __forceinline__ void load_q_fragments(uint32_t (&q)[C::kHeadDim / 16][4], uint32_t q_smem, int warp, int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) ptx::ldmatrix_x4(q[step], q_smem + tile_offset<C>(row, step * 2 + (lane >> 4)));
}

// Divides, adds the sink where the row ends here, and stores 8 (fp32) or 4 (16-bit) bytes per thread and 8 columns.
template <class C>
__device__ __forceinline__ void store_rows(const DecodeParams& p, Accumulators<C>& acc, const Destination& dst, int lane) {
  using T = typename C::T;
  const float scale_log2 = p.logit_cap > 0.f ? 1.4426950408889634f : p.scale_log2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = acc.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (dst.at[r] < 0) continue;
    const float max2 = acc.max[r] * scale_log2;
    const int column = (lane & 3) * 2;
    if (dst.direct[r]) {
      if (p.sinks != nullptr) sum += ptx::exp2_approx(p.sinks[dst.head[r]] * 1.4426950408889634f - max2);
      const float inverse = 1.f / sum;
      T* out = static_cast<T*>(p.out) + dst.at[r] * p.out_row_stride + dst.head[r] * C::kHeadDim + column;
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8) = pack(acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse, static_cast<T*>(nullptr));
      }
    } else {
      const float inverse = 1.f / sum;
      const int64_t at = static_cast<int64_t>(dst.at[r]) * p.heads + dst.head[r];
      if (dst.at[r] >= p.work.partial_capacity) continue;
      float* out = p.work.partial_out + at * C::kHeadDim + column;
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(out + j * 8) = make_float2(acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse);
      }
      if ((lane & 3) == 0) p.work.partial_lse2[at] = max2 + log2f(sum);
    }
  }
}

template <class C>
__device__ __forceinline__ void wait_full(SharedStorage<C>& s, const Ring<C::kBuffers>& ring) {
  ptx::mbarrier_wait(ptx::smem_address(&s.full[ring.slot]), ring.phase);
  ptx::fence_proxy_async();  // scattered tokens came by cp.async, through the generic proxy
}

// A buffer is free after two arrivals: one of each warpgroup, or two of the only one that reads it.
template <class C>
__device__ __forceinline__ void release(SharedStorage<C>& s, const Ring<C::kBuffers>& ring, int thread, int count) {
  if (thread == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.empty[ring.slot]), count);
}

// One item on this warpgroup. `ring` stands at the item's first K buffer and is left behind its last V buffer.
template <class C>
__device__ __forceinline__ void attend(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item, Ring<C::kBuffers>& ring, uint32_t q_phase,
                                       int warpgroup, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const bool wide = item.q_rows > kNarrowRows;
  const int releases = wide ? 1 : 2;
  const int tiles = (item.num_tokens + C::kTile - 1) / C::kTile;
  const Destination dst = find_destination(p, item, (wide ? warpgroup * kNarrowRows : 0) + warp * 16 + lane / 4);

  const uint32_t q_smem = ptx::smem_address(s.q[warpgroup]);
  uint32_t q[C::kQInRegisters ? C::kHeadDim / 16 : 1][4];
  ptx::mbarrier_wait(ptx::smem_address(&s.q_full[warpgroup]), q_phase);
  if constexpr (C::kQInRegisters) {
    load_q_fragments<C>(q, q_smem, warp, lane);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.q_empty[warpgroup]));
  }

  Accumulators<C> acc;
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] = 0.f;
  acc.max[0] = acc.max[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.f;

  float scores[C::kTile / 2], alpha[2];
  uint32_t probs[C::kTile / 16][4];
  Ring<C::kBuffers> k_ring = ring, v_ring = ring;
  v_ring.advance();

  wait_full<C>(s, k_ring);
  ptx::wgmma_fence();
  issue_qk<C>(scores, q, q_smem, ptx::smem_address(s.buffers[k_ring.slot]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(scores);
  release<C>(s, k_ring, thread, releases);
  softmax_step<C>(p, scores, acc, alpha, item.num_tokens, lane);
  round_probs<C>(probs, scores);

#pragma unroll 1
  for (int t = 1; t < tiles; ++t) {
    k_ring.advance(2);
    wait_full<C>(s, k_ring);
    ptx::wgmma_touch(scores);
    ptx::wgmma_fence();
    issue_qk<C>(scores, q, q_smem, ptx::smem_address(s.buffers[k_ring.slot]));
    wait_full<C>(s, v_ring);
    ptx::wgmma_touch(acc.o);
    issue_pv<C>(acc.o, probs, ptx::smem_address(s.buffers[v_ring.slot]));
    ptx::wgmma_wait<1>();  // scores are there; P.V of the tile before runs on under the softmax
    ptx::wgmma_touch(scores);
    release<C>(s, k_ring, thread, releases);
    softmax_step<C>(p, scores, acc, alpha, item.num_tokens - t * C::kTile, lane);
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(acc.o);
    release<C>(s, v_ring, thread, releases);
    v_ring.advance(2);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] *= alpha[(i >> 1) & 1];
    round_probs<C>(probs, scores);
  }
  wait_full<C>(s, v_ring);
  ptx::wgmma_touch(acc.o);
  ptx::wgmma_fence();
  issue_pv<C>(acc.o, probs, ptx::smem_address(s.buffers[v_ring.slot]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(acc.o);
  release<C>(s, v_ring, thread, releases);
  if constexpr (!C::kQInRegisters) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.q_empty[warpgroup]));
  }
  ring.advance(2 * tiles);
  store_rows<C>(p, acc, dst, lane);
}

template <class C>
__device__ __forceinline__ void consume(const DecodeParams& p, SharedStorage<C>& s, int warpgroup, int thread) {
  Ring<C::kBuffers> ring;
  Ring<C::kRing> read;
  uint32_t q_phase = 0;
  int turn = 0;
  while (true) {
    const WorkItem item = read_item<C>(s, read, thread % 32);
    if (item.num_tokens <= 0) return;
    const bool wide = item.q_rows > kNarrowRows;
    const bool mine = wide || turn == warpgroup;
    if (!wide) turn ^= 1;
    if (mine) {
      attend<C>(p, s, item, ring, q_phase, warpgroup, thread);
      q_phase ^= 1;
    } else {
      ring.advance(2 * ((item.num_tokens + C::kTile - 1) / C::kTile));
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ char raw[];
  auto& s = *reinterpret_cast<SharedStorage<C>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kBuffers; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.full[i]), 4 * 33);
      ptx::mbarrier_init(ptx::smem_address(&s.empty[i]), 2);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.q_full[i]), 128);
      ptx::mbarrier_init(ptx::smem_address(&s.q_empty[i]), 4);
    }
    for (int i = 0; i < C::kRing; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.item_full[i]), 1);
      ptx::mbarrier_init(ptx::smem_address(&s.item_empty[i]), 12);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&maps.k_warp);
    ptx::prefetch_tensormap(&maps.v_warp);
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    produce<C>(p, maps, s, warp, lane);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume<C>(p, s, warp / 4 - 1, threadIdx.x % 128);
  }
}

}  // namespace flashcore::decode
