// Consumer warpgroups: the two products, the softmax between them, and the results.
#pragma once
#include "attention/work_list.cuh"
#include "common/wgmma.cuh"

namespace flashcore::decode {

constexpr float kLog2e = 1.4426950408889634f;

template <class C>
struct Accumulators {
  float o[C::kHeadDim / 2];
  float max[2], sum[2];  // of the thread's two rows; sum over the thread's own columns until the epilogue
};

// S = q k^T of one tile. Sixteen elements of d per instruction; a 64-element block is 1024 B further.
template <class C, int kTile>
__device__ __forceinline__ void issue_qk(float (&scores)[kTile / 2],
                                         const uint32_t (&q)[C::kQInRegisters ? C::kHeadDim / 16 : 1][4],
                                         uint32_t q_smem, uint32_t k_smem) {
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const uint32_t at = (step / 4) * 1024 + (step % 4) * 32;
    const uint64_t k_desc = ptx::wgmma_descriptor(k_smem + at, 16, C::kGroupBytes);
    if constexpr (C::kQInRegisters) {
      ptx::wgmma<typename C::T, kTile, 0>(scores, q[step], k_desc, step > 0);
    } else {
      uint32_t q_at = q_smem + at;
      asm volatile("" : "+r"(q_at));  // keeps the 16 descriptors from being held in registers across tiles
      ptx::wgmma<typename C::T, kTile, 0>(scores, ptx::wgmma_descriptor(q_at, 16, C::kGroupBytes), k_desc, step > 0);
    }
  }
  ptx::wgmma_commit();
}

// O += P v of one tile; sixteen tokens (two groups) per instruction.
template <class C, int kTile>
__device__ __forceinline__ void issue_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&probs)[kTile / 16][4],
                                         uint32_t v_smem) {
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
    ptx::wgmma<typename C::T, C::kHeadDim, 1>(
        o, probs[step], ptx::wgmma_descriptor(v_smem + step * 2 * C::kGroupBytes, 1024, C::kGroupBytes), 1);
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

template <class C, int kTile>
__device__ __forceinline__ void round_probs(uint32_t (&probs)[kTile / 16][4], const float (&scores)[kTile / 2]) {
  typename C::T* type = nullptr;
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) probs[step][i] = pack(scores[step * 8 + i * 2], scores[step * 8 + i * 2 + 1], type);
  }
}

// Scores to probabilities in place; returns in `alpha` what the two rows' old sums and outputs are to be multiplied
// with. `valid` tokens of the tile exist (>= 1, so the new maximum is finite and (-inf) - (-inf) cannot occur).
template <class C, int kTile>
__device__ __forceinline__ void softmax_step(const DecodeParams& p, float (&scores)[kTile / 2], Accumulators<C>& acc,
                                             float (&alpha)[2], int valid) {
  if (p.logit_cap > 0.f) {  // cap * tanh(s * scale / cap), tanh by exp2: within 1e-6 of exact
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i)
      scores[i] = p.logit_cap - __fdividef(2.f * p.logit_cap, 1.f + ptx::exp2_approx(scores[i] * p.cap_scale_log2));
  }
  if (valid < kTile) {
    const int limit = valid - (ptx::thread_id() & 3) * 2;
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) {
      if ((i / 4) * 8 + (i & 1) >= limit) scores[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = acc.max[r];
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) best = fmaxf(best, fmaxf(scores[j * 4 + r * 2], scores[j * 4 + r * 2 + 1]));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    alpha[r] = ptx::exp2_approx((acc.max[r] - best) * p.scale_log2);
    acc.max[r] = best;
    const float shift = best * p.scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = scores[j * 4 + r * 2 + i];
        x = ptx::exp2_approx(fmaf(x, p.scale_log2, -shift));
        sum += x;
      }
    }
    acc.sum[r] = acc.sum[r] * alpha[r] + sum;
  }
}

template <class C>
__device__ __forceinline__ void load_q_fragments(uint32_t (&q)[C::kHeadDim / 16][4], uint32_t q_smem, int warp,
                                                 int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step)
    ptx::ldmatrix_x4(q[step], q_smem + tile_offset<C>(row, step * 2 + (lane >> 4)));
}

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
