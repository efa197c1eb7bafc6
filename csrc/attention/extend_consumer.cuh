// Consumer warpgroups: the KV tiles of an item through the two products (products.cuh), masks, and results.
#pragma once
#include "attention/extend_softmax.cuh"
#include "attention/extend_tiles.cuh"
#include "attention/products.cuh"

namespace flashcore::extend {

using decode::Accumulators;

__device__ __forceinline__ int warpgroup_id() { return ptx::thread_id() / 128 - 1; }
// The first of the thread's two rows of its item's tile; the other one is 8 below.
__device__ __forceinline__ int first_row() {
  const int thread = ptx::thread_id();
  return thread / 32 % 4 * 16 + thread % 32 / 4 + (thread / 128 - 1) * 64;
}

template <class C>
__device__ __forceinline__ void wait_full(SharedStorage<C>& s, const Ring<C::kBuffers>& ring) {
  ptx::mbarrier_wait(ptx::smem_address(&s.full[ring.slot()]), ring.phase());
}

// Scattered tokens came by cp.async, through the generic proxy. A converter has done this itself.
template <class C>
__device__ __forceinline__ void see_scattered(uint32_t flags) {
  if (!C::kConverts && (flags & kScattered)) ptx::fence_proxy_async();
}

// Scales of an e4m3 cache for the KV head of an item.
template <class C>
struct ItemScales {
  float k = 1.f;
  __device__ __forceinline__ void take(const Params& p, const Item& item) {
    if constexpr (C::kScaled) k = p.cache.of_k(item.kv_head);
  }
  __device__ __forceinline__ decltype(auto) of(const Params& p) const { return decode::score_scales<C::kScaled>(p, k); }
  __device__ __forceinline__ float of_v(const Params& p, const Item& item) const {
    return C::kScaled ? p.cache.of_v(item.kv_head) : 1.f;
  }
};

template <class C>
__device__ __forceinline__ bool test_full(SharedStorage<C>& s, const Ring<C::kBuffers>& ring) {
  return ptx::mbarrier_try_wait(ptx::smem_address(&s.full[ring.slot()]), ring.phase());
}

// `signals`: one thread of the warpgroup.
template <class C>
__device__ __forceinline__ void release(SharedStorage<C>& s, const Ring<C::kBuffers>& ring, bool signals) {
  if (signals) ptx::mbarrier_arrive(ptx::smem_address(&s.empty[ring.slot()]));
}

// The packed token of a row of the tile, or null where the tile has no such row.
__device__ __forceinline__ const Token* token_of(const Params& p, const Item& item, int row) {
  return row < item.q_rows ? p.work.tokens + token_at(p, item.q_row + row) : nullptr;
}

// What a consumer keeps of its item, of the thread's two rows.
struct Rows {
  int ends[2];     // the first position that it does not see
  int indices[2];  // in out; -1: there is no such row
};

// Of the scores of one of the thread's rows, bit 2 j + i for column 8 j + i from its first one on: those of the first
// `columns` columns.
__device__ __forceinline__ uint32_t columns_below(int columns) {
  const int scores = columns / 8 * 2 + min(columns % 8, 2);
  return columns <= 0 ? 0 : scores >= 32 ? ~0u : (1u << scores) - 1;
}

// What a custom mask leaves of `seen`, bits as of columns_below. `mask`: the element that stands for the row's first
// column, ~0: all is left; `columns`: those to ask for. A short loop, as in a cold launch each line of code comes from
// memory; drafts are few, so it ends soon.
__device__ __forceinline__ void hide_by_mask(const Params& p, const uint32_t (&mask)[2], int columns,
                                             uint32_t (&seen)[2]) {
#pragma unroll 1
  for (int j = 0; j * 8 < columns; j += 2) {
    uint32_t kept[2] = {0, 0};
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const int r = x / 4, bit = 2 * j + x % 4;
      const uint32_t at = mask[r] + (j + x % 4 / 2) * 8 + x % 2;
      const bool read = ((seen[r] >> bit) & 1) && at < static_cast<uint32_t>(p.mask_size);
      kept[r] |= (mask[r] == ~0u || (read && __ldg(p.custom_mask + at) != 0) ? 1u : 0u) << x % 4;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] &= ~(0xFu << 2 * j) | kept[r] << 2 * j;
  }
}

// Hides what the thread's rows do not see.
template <class C>
__device__ __forceinline__ void hide(const Params& p, const Item& item, const Tile& tile, float (&scores)[C::kTile / 2],
                                     const Rows& rows) {
  const int valid = tile.bits & 0xFF, first = (tile.bits >> 8) & 0xFF, end = (tile.bits >> 16) & 0xFF;
  const int column = (ptx::thread_id() & 3) * 2;
  int limits[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row() + 8 * r;
    limits[r] = (row >= first && row < end ? min(valid, rows.ends[r] - tile.position) : 0) - column;
  }
  if constexpr (C::kMasks) {
    uint32_t seen[2];
    uint32_t mask[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // asked for here, as registers are short
      const Token* token = token_of(p, item, first_row() + 8 * r);
      const int begin = p.windowed && token != nullptr ? __ldg(&token->begin) : 0;
      const int element = token != nullptr ? __ldg(&token->mask) : -1;
      mask[r] = element < 0 ? ~0u : static_cast<uint32_t>(element) + tile.position + column;
      seen[r] = columns_below(limits[r]) & ~columns_below(begin - tile.position - column);
    }
    if (p.custom_mask != nullptr) hide_by_mask(p, mask, max(limits[0], limits[1]), seen);
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
      if (!((seen[i / 2 % 2] >> (i / 4 * 2 + i % 2)) & 1)) scores[i] = -INFINITY;
    }
  } else {
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
      if (i / 4 * 8 + i % 2 >= limits[i / 2 % 2]) scores[i] = -INFINITY;
    }
  }
}

// Divides, adds the sink, and stores to out.
template <class C>
__device__ __forceinline__ void store_out(const Params& p, const Item& item, Accumulators<C>& acc,
                                          const int (&indices)[2], const ItemScales<C>& scales) {
  using T = typename C::T;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q_row = item.q_row + first_row() + 8 * r;
    const int head = item.kv_head * p.ratio + q_row - token_at(p, q_row) * p.ratio;
    float sum = acc.sum[r];
    if (p.sinks != nullptr)
      sum += ptx::exp2_approx(p.sinks[head] * decode::kLog2e - acc.max[r] * scales.of(p).scale_log2);
    // With a converter, the reciprocal would cost spilled registers.
    const float inverse = acc.max[r] == -INFINITY ? 0.f
                          : C::kConverts          ? scales.of_v(p, item) / sum
                                                  : scales.of_v(p, item) * ptx::rcp_approx(sum);
    T* out = static_cast<T*>(p.out) + indices[r] * p.out_row_stride + head * C::kHeadDim + (ptx::thread_id() & 3) * 8;
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (j + i) * 4 + r * 2;
        x[i] = decode::round_out<C>(p, acc.o[at] * inverse, acc.o[at + 1] * inverse);
      }
      const uint4 y = decode::transpose_quad(x);
      if (indices[r] >= 0) *reinterpret_cast<uint4*>(out + j * 8) = y;
    }
  }
}

template <class C>
__device__ __forceinline__ void store_partial(const Params& p, const Item& item, Accumulators<C>& acc, int slot,
                                              const ItemScales<C>& scales) {
  const int column = (ptx::thread_id() & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool empty = acc.max[r] == -INFINITY;
    const float inverse = empty ? 0.f : scales.of_v(p, item) / acc.sum[r];
    const int64_t at = static_cast<int64_t>(slot) * C::kRows + first_row() + 8 * r;
    float* out = p.work.partial_out + at * C::kHeadDim + column;
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; ++j)
      __stcg(reinterpret_cast<float2*>(out + j * 8),
             make_float2(acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse));
    if (column == 0)
      __stcg(p.work.partial_lse2 + at, empty ? -INFINITY : acc.max[r] * scales.of(p).scale_log2 + log2f(acc.sum[r]));
  }
}

__device__ __forceinline__ void sync_warpgroup() { ptx::barrier_sync(1 + warpgroup_id(), 128); }

// The warpgroup that finishes a tile's last chunk adds up all of them, in the order of the chunks whoever it is:
// out = sum w_i O_i / (sum w_i + sink), w_i = exp2(lse2_i - max). A warp takes several rows at a time.
template <class C>
__device__ __forceinline__ void merge_chunks(const Params& p, SharedStorage<C>& s, const Item& item) {
  using T = typename C::T;
  const int chunks = item.chunk >> 16, part = warpgroup_id();
  __threadfence();
  sync_warpgroup();
  if (ptx::thread_id() % 128 == 0) {
    int* counter = p.work.counters + kMaxWarpgroups * item.partial + part;
    const bool last = atomicAdd(counter, 1) == chunks - 1;
    if (last) *counter = 0;
    s.last_arriver[part] = last;
    __threadfence();
  }
  sync_warpgroup();
  const bool last = s.last_arriver[part];
  sync_warpgroup();  // before the next item's
  if (!last || part * 64 >= item.q_rows) return;
  constexpr int kLanes = 8, kPer = C::kHeadDim / kLanes;  // of a row; floats of a lane, in fours
  const int lane = ptx::thread_id() % kLanes, first = part * 64 + ptx::thread_id() % 128 / kLanes;
#pragma unroll 1
  for (int i = 0; i < 64; i += 128 / kLanes) {  // the same for all lanes, so that the compiler takes the warp for one
    const int row = min(first + i, item.q_rows - 1), q_row = item.q_row + row, token = token_at(p, q_row);
    const int head = item.kv_head * p.ratio + q_row - token * p.ratio;
    const int64_t at = static_cast<int64_t>(item.partial) * C::kRows + row;
    float best = -INFINITY;
    for (int c = 0; c < chunks; c += kLanes)
      best = fmaxf(best, __ldcg(p.work.partial_lse2 + at + int64_t{min(c + lane, chunks - 1)} * C::kRows));
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
    const float shift = best == -INFINITY ? 0.f : best;
    float total = p.sinks != nullptr ? ptx::exp2_approx(p.sinks[head] * decode::kLog2e - shift) : 0.f;
    float out[kPer] = {};
#pragma unroll 2
    for (int c = 0; c < chunks; ++c) {
      const int64_t from = at + int64_t{c} * C::kRows;
      const float w = ptx::exp2_approx(__ldcg(p.work.partial_lse2 + from) - shift);
      total += w;
#pragma unroll
      for (int k = 0; k < kPer; k += 4) {
        const float4 x =
            __ldcg(reinterpret_cast<const float4*>(p.work.partial_out + from * C::kHeadDim) + k / 4 * kLanes + lane);
        out[k] = fmaf(w, x.x, out[k]);
        out[k + 1] = fmaf(w, x.y, out[k + 1]);
        out[k + 2] = fmaf(w, x.z, out[k + 2]);
        out[k + 3] = fmaf(w, x.w, out[k + 3]);
      }
    }
    const float inverse = best > -INFINITY ? 1.f / total : 0.f;
    T* dst = static_cast<T*>(p.out) + __ldg(&p.work.tokens[token].index) * p.out_row_stride + head * C::kHeadDim;
#pragma unroll
    for (int k = 0; k < kPer; k += 4) {
      const uint2 x = make_uint2(decode::round_out<C>(p, out[k] * inverse, out[k + 1] * inverse),
                                 decode::round_out<C>(p, out[k + 2] * inverse, out[k + 3] * inverse));
      if (first + i < item.q_rows) reinterpret_cast<uint2*>(dst)[k / 4 * kLanes + lane] = x;
    }
  }
}

template <class C>
__device__ __forceinline__ Rows load_rows(const Params& p, const Item& item) {
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row() + 8 * r, at = token_at(p, item.q_row + min(row, item.q_rows - 1));
    const Token* token = p.work.tokens + at;
    rows.ends[r] = row < item.q_rows ? __ldg(&token->end) : 0;
    if constexpr (C::kKeepsIndices) rows.indices[r] = row < item.q_rows ? __ldg(&token->index) : -1;
  }
  return rows;
}

template <class C>
__device__ __forceinline__ void reset(Accumulators<C>& acc) {
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] = 0.f;
  acc.max[0] = acc.max[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.f;
}

template <class C>
__device__ __forceinline__ void finish_item(const Params& p, SharedStorage<C>& s, const Item& item,
                                            Accumulators<C>& acc, Rows rows, const ItemScales<C>& scales) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (!C::kKeepsIndices) {
      const Token* token = token_of(p, item, first_row() + 8 * r);
      rows.indices[r] = token != nullptr ? __ldg(&token->index) : -1;
    }
    acc.sum[r] += __shfl_xor_sync(~0u, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(~0u, acc.sum[r], 2);
  }
  if (item.partial < 0) {
    store_out<C>(p, item, acc, rows.indices, scales);
  } else {
    store_partial<C>(p, item, acc, item.partial + (item.chunk & 0xFFFF), scales);
    merge_chunks<C>(p, s, item);
  }
}

// The warpgroup's q of an item: in registers, or where it lies in shared memory.
template <class C>
struct Queries {
  uint32_t fragments[C::kQInRegisters ? C::kHeadDim / 16 : 1][4];
  uint32_t smem = 0, empty = 0;  // the buffer, if it is to be read from there, and its barrier

  // Once it is there. In registers it leaves its buffer at once. `item` counts the CTA's.
  __device__ __forceinline__ void take(const Params& p, SharedStorage<C>& s, int item) {
    const int buffer = item % C::kQBuffers;
    const uint32_t at = ptx::smem_address(s.q[buffer][warpgroup_id()]);
    ptx::mbarrier_wait(ptx::smem_address(&s.q_full[buffer]), item / C::kQBuffers & 1);
    if constexpr (C::kQInRegisters) {
      decode::load_q_fragments<C>(fragments, at, ptx::thread_id() / 32 % 4, ptx::thread_id() % 32);
      ptx::mbarrier_warp_arrive(ptx::smem_address(&s.q_empty[buffer]), ptx::thread_id() % 32);
      if (p.cache.bf16) decode::convert_q<C>(fragments);
    } else {
      if (C::kConverts && p.cache.bf16) {
        decode::convert_q<C>(at, 1 + warpgroup_id());
      } else {
        ptx::fence_proxy_async();
      }
      smem = __shfl_sync(~0u, at, 0);  // tells the compiler that it is the same in all lanes
      empty = ptx::smem_address(&s.q_empty[buffer]);
    }
  }

  // The last scores of an item are there: q in shared memory may go.
  __device__ __forceinline__ void leave(uint32_t flags) const {
    if constexpr (!C::kQInRegisters) {
      if (flags & kLast) ptx::mbarrier_warp_arrive(empty, ptx::thread_id() % 32);
    }
  }
};

// The warpgroups take turns in giving the tensor cores their products, so that one's softmax runs under the others'.
// Warpgroup 0 begins. Barrier 4 + w stands for the turn of warpgroup w: it and the one before come there.
template <class C>
struct Turns {
  static constexpr int kBarrier = 4, kTwo = 256;

  static __device__ __forceinline__ void open() {
    if (C::kTurns && warpgroup_id() == C::kWarpgroups - 1) ptx::barrier_arrive(kBarrier, kTwo);
  }
  static __device__ __forceinline__ void take() {
    if constexpr (C::kTurns) ptx::barrier_sync(kBarrier + warpgroup_id(), kTwo);
  }
  static __device__ __forceinline__ void pass() {
    if constexpr (C::kTurns) ptx::barrier_arrive(kBarrier + (warpgroup_id() + 1) % C::kWarpgroups, kTwo);
  }
  // All have taken as many; the last one passed is warpgroup 0's.
  static __device__ __forceinline__ void close() {
    if (C::kTurns && warpgroup_id() == 0) ptx::barrier_sync(kBarrier, kTwo);
  }
};

template <class C>
__device__ __forceinline__ void mask_and_cap(const Params& p, const Item& item, const Tile& tile, uint32_t flags,
                                             float (&scores)[C::kTile / 2], const Rows& rows,
                                             const ItemScales<C>& scales) {
  if constexpr (C::kCap)
    decode::cap_scores<C::kTile, C::kConverts || C::kWarpgroups == 3 ? 8 : C::kTile / 2>(scales.of(p), scores);
  if (flags & kMasked) hide<C>(p, item, tile, scores, rows);
}

// What comes after a tile: its V and the K of the next tile. Looked for while there is other work, because the answers
// of a barrier and of shared memory take 100 cycles. The flags are read only behind the answer: a read that is issued
// behind a pending try_wait may overtake it, and find what was there before.
template <class C>
struct Ahead {
  Ring<C::kBuffers> v, k;
  int tile;
  uint32_t flags, v_smem, k_smem;
  bool ready;  // both are there

  __device__ __forceinline__ void look(SharedStorage<C>& s, const Ring<C::kBuffers>& ring, int current) {
    v = ring.next();
    k = v.next();
    v_smem = ptx::smem_address(s.buffers[v.slot()]);
    k_smem = ptx::smem_address(s.buffers[k.slot()]);
    tile = (current + 1) % kTiles;
    const bool v_ready = test_full<C>(s, v), k_ready = test_full<C>(s, k);
    ready = v_ready && k_ready;
  }
  __device__ __forceinline__ void read(const SharedStorage<C>& s) {
    flags = ptx::load_shared_if(ready, ptx::smem_address(&s.tiles[tile].bits)) >> kFlagShift;
  }
  __device__ __forceinline__ void wait(SharedStorage<C>& s) {
    if (ready) return;
    wait_full<C>(s, v);
    wait_full<C>(s, k);
    flags = s.tiles[tile].bits >> kFlagShift;
  }
};

// All tiles of the CTA, one behind the other: the first product of an item is issued beside the last product of the
// item before.
template <class C>
__device__ __forceinline__ void consume(const Params& p, SharedStorage<C>& s) {
  constexpr int kTile = C::kTile;
  const bool signals = ptx::kForRacecheck || ptx::thread_id() % 128 == 0;
  Ring<C::kBuffers> ring;
  int tile = 0, item = 0;
  wait_full<C>(s, ring);
  uint32_t flags = s.tiles[tile].bits >> kFlagShift;
  if (flags & kEnd) return;

  uint32_t probs[kTile / 16][4];
  float scores[kTile / 2];
  Queries<C> q;
  Softmax<C> softmax;
  Accumulators<C> acc;
  Ahead<C> ahead;
  Rows rows = load_rows<C>(p, s.items[item]);
  ItemScales<C> scales;
  scales.take(p, s.items[item]);
  reset<C>(acc);
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) scores[i] = 0.f;
  Turns<C>::open();
  q.take(p, s, item);
  see_scattered<C>(flags);
  ptx::wgmma_touch(scores);
  ptx::wgmma_fence();
  decode::issue_qk<C, kTile>(scores, q.fragments, q.smem, ptx::smem_address(s.buffers[ring.slot()]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(scores);
  release<C>(s, ring, signals);
  q.leave(flags);
  mask_and_cap<C>(p, s.items[item], s.tiles[tile], flags, scores, rows, scales);
  softmax(scales.of(p), scores, probs, acc, [&] { ahead.look(s, ring, tile); }, [&] { ahead.read(s); });

#pragma unroll 1
  while (true) {
    ahead.wait(s);
    const uint32_t v_flags = flags;
    const bool first = v_flags & kLast;
    if ((ahead.flags & (kEnd | kScattered)) | (v_flags & (kLast | kScattered))) {  // one question for most tiles
      if (ahead.flags & kEnd) break;
      if (first) q.take(p, s, item + 1);
      see_scattered<C>(ahead.flags | v_flags);
    }
    flags = ahead.flags;
    tile = ahead.tile;
    ring = ahead.k;
    Turns<C>::take();
    ptx::wgmma_touch(scores);
    ptx::wgmma_touch(acc.o);
    ptx::wgmma_fence();
    decode::issue_qk<C, kTile>(scores, q.fragments, q.smem, ahead.k_smem);
    decode::issue_pv<C, kTile>(acc.o, probs, ahead.v_smem);
    Turns<C>::pass();
    ptx::wgmma_wait<1>();
    // scores are there; P V of the tile before runs on under the softmax
    ptx::wgmma_touch(scores);
    release<C>(s, ring, signals);
    q.leave(flags);
    if (first) {
      Rows next;
      if constexpr (!C::kConverts) next = load_rows<C>(p, s.items[(item + 1) % kItems]);
      ptx::wgmma_wait<0>();
      ptx::wgmma_touch(acc.o);
      release<C>(s, ahead.v, signals);
      finish_item<C>(p, s, s.items[item % kItems], acc, rows, scales);
      ++item;
      scales.take(p, s.items[item % kItems]);
      if constexpr (C::kConverts) next = load_rows<C>(p, s.items[item % kItems]);  // has no registers for it before
      rows = next;
      reset<C>(acc);
    }
    mask_and_cap<C>(p, s.items[item % kItems], s.tiles[tile], flags, scores, rows, scales);
    const Ring<C::kBuffers> v_ring = ahead.v;
    softmax(
        scales.of(p), scores, probs, acc, [&] { ahead.look(s, ring, tile); },
        [&] {
          ptx::wgmma_wait<0>();
          ptx::wgmma_touch(acc.o);
          if (!first) release<C>(s, v_ring, signals);
          ahead.read(s);
        });
  }
  Turns<C>::close();
  see_scattered<C>(flags);
  ptx::wgmma_touch(acc.o);
  ptx::wgmma_fence();
  decode::issue_pv<C, kTile>(acc.o, probs, ahead.v_smem);
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(acc.o);
  finish_item<C>(p, s, s.items[item % kItems], acc, rows, scales);
}

}  // namespace flashcore::extend
