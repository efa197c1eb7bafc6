// Consumer warpgroups: the items of the ring through the two products (products.cuh), and the results.
#pragma once
#include "attention/products.cuh"
#include "attention/work_list.cuh"

namespace flashcore::decode {

// Divides, adds the sink where the row ends here, and stores 8 (fp32) or 4 (16-bit) bytes per thread and 8 columns.
template <class C>
__device__ __forceinline__ void store_rows(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item,
                                           Accumulators<C>& acc, int warpgroup, int warp, int lane) {
  using T = typename C::T;
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
    const int q_row = item.q_row + (item.q_rows > kNarrowRows ? warpgroup * kNarrowRows : 0) + in_half;
    const int head = kv_head_of(item) * p.ratio + q_row % p.ratio;
    const float max2 = acc.max[r] * p.scale_log2;
    if (to < 0) {
      if (p.sinks != nullptr) sum += ptx::exp2_approx(p.sinks[head] * kLog2e - max2);
      const float inverse = 1.f / sum;
      T* out = static_cast<T*>(p.out) + (to & 0x7FFFFFFF) * p.out_row_stride + head * C::kHeadDim + column;
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8) =
            pack(acc.o[j * 4 + r * 2] * inverse, acc.o[j * 4 + r * 2 + 1] * inverse, static_cast<T*>(nullptr));
      }
    } else {
      const float inverse = 1.f / sum;
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
// was there before: the parity of its barrier would then tell of a round too many. The producer comes to a buffer only
// after that. `done`: tokens of this item done; later buffers are those that the warpgroup itself has emptied.
template <class C>
__device__ __forceinline__ void wait_issued(SharedStorage<C>& s, const Ring<C::kBuffers>& ring, int done) {
  if (done > C::kBuffers / 2 * C::kTile) return;
  int ahead;
  do {
    ahead = ptx::load_acquire(ptx::smem_address(&s.issued)) - ring.at;
    if (ahead < 0) ahead += 2 * C::kBuffers;
  } while (ahead == 0 || ahead > C::kBuffers);
}

template <class C>
__device__ __forceinline__ void wait_full(SharedStorage<C>& s, const Ring<C::kBuffers>& ring) {
  ptx::mbarrier_wait(ptx::smem_address(&s.full[ring.slot()]), ring.phase());
  ptx::fence_proxy_async();  // scattered tokens came by cp.async, through the generic proxy
}

// A buffer is free after two arrivals: one of each warpgroup, or two of the only one that reads it.
template <class C>
__device__ __forceinline__ void release(SharedStorage<C>& s, const Ring<C::kBuffers>& ring, const WorkItem& item) {
  if (ptx::thread_id() % 128 == 0)
    ptx::mbarrier_arrive(ptx::smem_address(&s.empty[ring.slot()]), item.q_rows > kNarrowRows ? 1 : 2);
}

// Which of the two consumer warpgroups this is.
__device__ __forceinline__ int warpgroup_id() { return ptx::thread_id() / 128 - 1; }

// One item on this warpgroup. `ring` stands at the item's first K buffer and is left behind its last V buffer.
template <class C>
__device__ __forceinline__ void attend(const DecodeParams& p, SharedStorage<C>& s, const WorkItem& item,
                                       Ring<C::kBuffers>& ring) {
  const int warp = ptx::thread_id() / 32 % 4, lane = ptx::thread_id() % 32;
  constexpr int kTile = C::kTile;
  const uint32_t q_smem = ptx::smem_address(s.q[warpgroup_id()]);
  uint32_t q[C::kQInRegisters ? C::kHeadDim / 16 : 1][4];
  ptx::mbarrier_wait(ptx::smem_address(&s.q_full[warpgroup_id()]), q_phase_of(item, warpgroup_id()));
  if constexpr (C::kQInRegisters) {
    load_q_fragments<C>(q, q_smem, ptx::thread_id() / 32 % 4, ptx::thread_id() % 32);
    __syncwarp();
    if (ptx::thread_id() % 32 == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.q_empty[warpgroup_id()]));
  }

  Accumulators<C> acc;
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] = 0.f;
  acc.max[0] = acc.max[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.f;
  float scores[kTile / 2], alpha[2];
  uint32_t probs[kTile / 16][4];
  int valid = item.num_tokens;
  wait_full<C>(s, ring);
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) scores[i] = 0.f;
  ptx::wgmma_touch(scores);
  ptx::wgmma_fence();
  issue_qk<C, kTile>(scores, q, q_smem, ptx::smem_address(s.buffers[ring.slot()]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(scores);
  release<C>(s, ring, item);
  softmax_step<C, kTile>(p, scores, acc, alpha, valid);
  round_probs<C, kTile>(probs, scores);

#pragma unroll 1
  for (valid -= kTile; valid > 0; valid -= kTile) {
    ring.advance();
    const Ring<C::kBuffers> v_ring = ring;
    ring.advance();
    wait_issued<C>(s, ring, item.num_tokens - valid);
    wait_full<C>(s, ring);
    ptx::wgmma_touch(scores);
    ptx::wgmma_touch(acc.o);
    ptx::wgmma_fence();
    issue_qk<C, kTile>(scores, q, q_smem, ptx::smem_address(s.buffers[ring.slot()]));
    wait_full<C>(s, v_ring);
    ptx::wgmma_fence();
    issue_pv<C, kTile>(acc.o, probs, ptx::smem_address(s.buffers[v_ring.slot()]));
    ptx::wgmma_wait<1>();
    // scores are there; P.V of the tile before runs on under the softmax
    ptx::wgmma_touch(scores);
    release<C>(s, ring, item);
    softmax_step<C, kTile>(p, scores, acc, alpha, valid);
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(acc.o);
    release<C>(s, v_ring, item);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] *= alpha[(i >> 1) & 1];
    round_probs<C, kTile>(probs, scores);
  }
  ring.advance();
  wait_issued<C>(s, ring, 0);
  wait_full<C>(s, ring);
  ptx::wgmma_touch(acc.o);
  ptx::wgmma_fence();
  issue_pv<C, kTile>(acc.o, probs, ptx::smem_address(s.buffers[ring.slot()]));
  ptx::wgmma_wait<0>();
  ptx::wgmma_touch(acc.o);
  release<C>(s, ring, item);
  ring.advance();
  if constexpr (!C::kQInRegisters) {
    __syncwarp();
    if (ptx::thread_id() % 32 == 0) ptx::mbarrier_arrive(ptx::smem_address(&s.q_empty[warpgroup_id()]));
  }
  store_rows<C>(p, s, item, acc, warpgroup_id(), ptx::thread_id() / 32 % 4, ptx::thread_id() % 32);
}

template <class C>
__device__ __forceinline__ void consume(const DecodeParams& p, SharedStorage<C>& s) {
  Ring<C::kBuffers> ring;
  Ring<C::kRing> read;
  while (true) {
    const WorkItem& item = wait_item<C>(s, read);
    if (item.num_tokens <= 0) return;
    if (owns(item, warpgroup_id())) {
      attend<C>(p, s, item, ring);
    } else {
      ring.advance(2 * tiles_of<C>(item));
    }
    finish_item<C>(s, read, ptx::thread_id() % 32);
  }
}

}  // namespace flashcore::decode
