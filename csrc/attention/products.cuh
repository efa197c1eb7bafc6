// The two matrix products of a tile and the softmax between them, for any kernel whose traits C give T, kHeadDim,
// kGroupBytes and kQInRegisters.
#pragma once
#include "attention/tiles.cuh"
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

// O += P v of one tile, O = P v without `accumulate`; sixteen tokens (two groups) per instruction.
template <class C, int kTile>
__device__ __forceinline__ void issue_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&probs)[kTile / 16][4],
                                         uint32_t v_smem, int accumulate = 1) {
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
    ptx::wgmma<typename C::T, C::kHeadDim, 1>(
        o, probs[step], ptx::wgmma_descriptor(v_smem + step * 2 * C::kGroupBytes, 1024, C::kGroupBytes),
        step > 0 ? 1 : accumulate);
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

// Logit cap, if there is one: cap * tanh(s * scale / cap), tanh by exp2: within 1e-6 of exact. kBlock scores share a
// branch: as many as registers allow.
template <int kTile, int kBlock = kTile / 2, class Params>
__device__ __forceinline__ void cap_scores(const Params& p, float (&scores)[kTile / 2]) {
#pragma unroll
  for (int from = 0; from < kTile / 2; from += kBlock) {
    float cap = p.logit_cap;
    if constexpr (kBlock < kTile / 2) asm volatile("" : "+f"(cap));  // else the branches become one
    if (cap > 0.f) {
#pragma unroll
      for (int i = from; i < from + kBlock; ++i)
        scores[i] = fmaf(-2.f * cap, ptx::rcp_approx(1.f + ptx::exp2_approx(scores[i] * p.cap_scale_log2)), cap);
    }
  }
}

// Of one of the thread's two rows: scores to probabilities in place, against the maximum `shift`, and their sum.
template <int kTile, class Params>
__device__ __forceinline__ float exponentiate_row(const Params& p, float (&scores)[kTile / 2], int row, float shift) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = scores[j * 4 + row * 2 + i];
      x = ptx::exp2_approx(fmaf(x, p.scale_log2, -shift));
      sum += x;
    }
  }
  return sum;
}

// Scores to probabilities in place; returns in `alpha` what the two rows' old sums and outputs are to be multiplied
// with. `valid` tokens of the tile exist (>= 1, so the new maximum is finite and (-inf) - (-inf) cannot occur).
template <class C, int kTile, class Params>
__device__ __forceinline__ void softmax_step(const Params& p, float (&scores)[kTile / 2], Accumulators<C>& acc,
                                             float (&alpha)[2], int valid) {
  cap_scores<kTile, C::kQInRegisters ? 8 : kTile / 2>(p, scores);
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
    const float sum = exponentiate_row<kTile>(p, scores, r, best * p.scale_log2);
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

}  // namespace flashcore::decode
