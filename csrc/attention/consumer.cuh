// Consumer warpgroups: the items of the ring through the two products (products.cuh), and the results.
#pragma once
#include "attention/products.cuh"
#include "attention/work_list.cuh"

namespace flashcore::decode {

// Which of the two consumer warpgroups this is.
__device__ __forceinline__ int warpgroup_id() { return ptx::thread_id() / 128 - 1; }

// First q_row of this warpgroup within its item.
__device__ __forceinline__ int first_q_row(const WorkItem& item) {
  return item.q_row + (item.q_rows > kNarrowRows ? warpgroup_id() * kNarrowRows : 0);
}

// Divides, adds the sink where the row ends here, and stores 8 (fp32) or 4 (16-bit) bytes per thread and 8 columns.
template <class C, class Scales>
__device__ __forceinline__ void store_rows(const DecodeParams& p, const Scales& scales, SharedStorage<C>& s,
                                           const WorkItem& item, Accumulators<C>& acc, int warpgroup, int warp,
                                           int lane) {
  using T = typename C::T;
  const float v_scale = C::kConverts ? p.cache.of_v(kv_head_of(item)) : 1.f;
  const int column = (lane & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    acc.sum[r] += __shfl_xor_sync(~0u, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(~0u, acc.sum[r], 2);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = acc.sum[r];
    const int in_half = warp * 16 + lane / 4 + 8 * r;
    const int to = s.destinations[warpgroup][q_phase_of(item, warpgroup)][in_half];
    if (to == kNowhere) continue;
    const int head = kv_head_of(item) * p.ratio + (first_q_row(item) + in_half) % p.ratio;
    const float max2 = acc.max[r] * scales.scale_log2;
    if (to < 0) {
      if (p.sinks != nullptr) sum += ptx::exp2_approx(p.sinks[head] * kLog2e - max2);
      const float inverse = v_scale / sum;
      T* out = static_cast<T*>(p.out) + (to & 0x7FFFFFFF) * p.out_row_stride + head * C::kHeadDim + column;
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8) =
            round_out<C>(p, acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse);
      }
    } else {
      const float inverse = v_scale / sum;
      const int64_t at = static_cast<int64_t>(to) * p.heads + head;
      float* out = p.work.partial_out + at * C::kHeadDim + column;
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(out + j * 8) =
            make_float2(acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse);
      }
      if ((lane & 3) == 0) p.work.partial_lse2[at] = max2 + log2f(sum);
    }
  }
}

// A warpgroup skips the buffers of the other one's items, so that the buffer it wants may still be filling with what
// was there before: the parity of its barrier would then tell of a round too many. The loader comes to a buffer only
// after that. `issued`: of K or of V; `done`: tokens of this item done; later buffers are those that the warpgroup
// itself has emptied.
template <int kBuffers>
__device__ __forceinline__ void wait_issued(const int* issued, const Ring<kBuffers>& ring, int done, int tile) {
  if (done > kBuffers * tile) return;
  int ahead;
  do {
    ahead = ptx::load_acquire(ptx::smem_address(issued)) - ring.at;
    if (ahead < 0) ahead += 2 * kBuffers;
  } while (ahead == 0 || ahead > kBuffers);
}

template <class C>
__device__ __forceinline__ void wait_full(uint32_t barrier, uint32_t phase) {
  ptx::mbarrier_wait(barrier, phase);
  // Scattered tokens came by cp.async, through the generic proxy. The converter has done this itself.
  if constexpr (!C::kConverts) ptx::fence_proxy_async();
}

// A buffer is free after two arrivals: one of each warpgroup, or two of the only one that reads it.
__device__ __forceinline__ void release(uint32_t barrier, const WorkItem& item) {
  if (ptx::thread_id() % 128 == 0) ptx::mbarrier_arrive(barrier, item.q_rows > kNarrowRows ? 1 : 2);
}

// Where this warpgroup stands in the buffers. K and V rings of one size share a counter.
template <class C>
struct TileRing {
  Ring<C::kKBuffers> key;
  Ring<C::kVBuffers> value;
  __device__ __forceinline__ const Ring<C::kKBuffers>& k() const { return key; }
  __device__ __forceinline__ const Ring<C::kVBuffers>& v() const {
    if constexpr (C::kKBuffers == C::kVBuffers) {
      return key;
    } else {
      return value;
    }
  }
  __device__ __forceinline__ void advance(int n) {
    key.advance(n);
    if constexpr (C::kKBuffers != C::kVBuffers) value.advance(n);
  }
  __device__ __forceinline__ void advance() {
    key.advance();
    if constexpr (C::kKBuffers != C::kVBuffers) value.advance();
  }
};

// One item on this warpgroup. `ring` stands at its first tile and is left behind its last.
//
// Step t issues S = Q K^T of tile t and O += P V of tile t - 1, which runs on under the softmax of tile t. There is one
// copy of that code, because a short launch is spent waiting for instructions.
template <class C>
__device__ __forceinline__ void attend(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item,
                                       TileRing<C>& ring, int warpgroup) {
  constexpr int kTile = C::kTile;
  // K is released behind the exponentials if their sums, which are never negative, allow: else the compiler moves them
  // behind the wait for P V, where nothing runs beside them. d 256 has no register for that, and a converter waits for
  // the buffer.
  constexpr bool kLateRelease = C::kQInRegisters && !C::kConverts;
  const uint32_t q_smem = ptx::smem_address(s.q[warpgroup]);
  uint32_t q[C::kQInRegisters ? C::kHeadDim / 16 : 1][4];
  ptx::mbarrier_wait(ptx::smem_address(&s.q_full[warpgroup]), q_phase_of(item, warpgroup));
  if constexpr (C::kQInRegisters) {
    load_q_fragments<C>(q, q_smem, ptx::thread_id() / 32 % 4, ptx::thread_id() % 32);
    ptx::mbarrier_warp_arrive(ptx::smem_address(&s.q_empty[warpgroup]), ptx::thread_id() % 32);
    if (C::kConverts && p.cache.bf16) convert_q<C>(q);
  } else if (C::kConverts && p.cache.bf16) {
    convert_q<C>(q_smem, 1 + warpgroup);
  } else if (C::kConverts) {
    ptx::fence_proxy_async();  // q came by cp.async; of K and V that are not converted wait_full does it
  }
  decltype(auto) scales = score_scales<C::kConverts>(p, C::kConverts ? p.cache.of_k(kv_head_of(item)) : 1.f);

  Accumulators<C> acc;
  acc.max[0] = acc.max[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.f;
  float scores[kTile / 2], alpha[2];
  uint32_t probs[kTile / 16][4];
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] = 0.f;
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) scores[i] = 0.f;
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) probs[i / 4][i % 4] = 0;

  // q_rows from the warp's first one on. Most rows of a narrow item are empty: a warp that has none does no softmax,
  // one that has up to 8 half of it; what their scores then are stays in those rows, which are not stored. Asked anew
  // for each tile, as there is no register to keep it in.
  auto rows_of_warp = [&]() -> int {
    const int rows = reinterpret_cast<const volatile WorkItem&>(item).q_rows;
    return rows - (rows > kNarrowRows ? warpgroup * kNarrowRows : 0) - ptx::thread_id() / 32 % 4 * 16;
  };

  // V of the tile before this one.
  auto value = [&]() -> Ring<C::kVBuffers> { return ring.v().previous(); };
#pragma unroll 1
  for (int valid = item.num_tokens; valid > 0; valid -= kTile) {
    if (valid < item.num_tokens) wait_issued(&s.issued[0], ring.k(), item.num_tokens - valid, kTile);
    wait_full<C>(ptx::smem_address(&s.k_full[ring.k().slot()]), ring.k().phase());
    ptx::wgmma_touch(scores);
    ptx::wgmma_touch(acc.o);
    ptx::wgmma_fence();
    issue_qk<C, kTile>(scores, q, q_smem, ptx::smem_address(s.k[ring.k().slot()]));
    const int done = item.num_tokens - valid;
    if (done > 0) {
      if (done > kTile) wait_issued(&s.issued[1], value(), done, kTile);
      wait_full<C>(ptx::smem_address(&s.v_full[value().slot()]), value().phase());
      ptx::wgmma_fence();
      issue_pv<C, kTile>(acc.o, probs, ptx::smem_address(s.v[value().slot()]));
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    // scores are there; P.V of the tile before runs on under the softmax
    ptx::wgmma_touch(scores);
    if constexpr (!kLateRelease) release(ptx::smem_address(&s.k_empty[ring.k().slot()]), item);
    bool grew = false;
    const int rows = rows_of_warp();
    if (rows > 0) {
      cap_scores<kTile, C::kQInRegisters ? 8 : kTile / 2>(scales, scores);
      hide_past<kTile>(scores, valid);
      grew = softmax_rows<C, kTile>(scales, scores, acc, alpha, rows > 8);
    }
    if (kLateRelease && !(acc.sum[0] + acc.sum[1] < 0.f)) release(ptx::smem_address(&s.k_empty[ring.k().slot()]), item);
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(acc.o);
    if (valid < item.num_tokens) release(ptx::smem_address(&s.v_empty[value().slot()]), item);
    ring.advance();
    if (grew) {
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] *= alpha[(i >> 1) & 1];
    }
    round_probs<C, kTile>(probs, scores);
  }
  if (item.num_tokens > kTile) wait_issued(&s.issued[1], value(), 0, kTile);
  wait_full<C>(ptx::smem_address(&s.v_full[value().slot()]), value().phase());
  ptx::wgmma_touch(acc.o);
  ptx::wgmma_fence();
  issue_pv<C, kTile>(acc.o, probs, ptx::smem_address(s.v[value().slot()]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(acc.o);
  release(ptx::smem_address(&s.v_empty[value().slot()]), item);
  if constexpr (!C::kQInRegisters) {
    ptx::mbarrier_warp_arrive(ptx::smem_address(&s.q_empty[warpgroup]), ptx::thread_id() % 32);
  }
  const int warp = ptx::thread_id() / 32 % 4, lane = ptx::thread_id() % 32;
  store_rows<C>(p, scales, s, item, acc, warpgroup, warp, lane);
}

template <class C>
__device__ __forceinline__ void consume(const DecodeParams& p, SharedStorage<C>& s, int warpgroup) {
  TileRing<C> ring;
  Ring<C::kRing> read;
  while (true) {
    const WorkItem& item = wait_item<C>(s, read);
    if (item.num_tokens <= 0) return;
    if (owns(item, warpgroup)) {
      ptx::mbarrier_wait(ptx::smem_address(&s.item_started[read.slot()]), read.phase());
      attend<C>(p, s, item, ring, warpgroup);
    } else {
      ring.advance(tiles_of<C>(item));
    }
    finish_item<C>(s, read, ptx::thread_id() % 32);
  }
}

}  // namespace flashcore::decode
