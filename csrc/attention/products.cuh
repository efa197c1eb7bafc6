// The two matrix products of a tile and the softmax between them, for any kernel whose traits C give T, kHeadDim,
// kGroupBytes and kQInRegisters.
#pragma once
#include "attention/tiles.cuh"
#include "common/pack.cuh"
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
  const uint64_t k_first = ptx::wgmma_descriptor(k_smem, 16, C::kGroupBytes);
  uint32_t q_at = q_smem;
  asm volatile("" : "+r"(q_at));  // keeps the 16 descriptors from being held in registers across tiles
  const uint64_t q_first = ptx::wgmma_descriptor(q_at, 16, C::kGroupBytes);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const uint32_t at = (step / 4) * 1024 + (step % 4) * 32;
    const uint64_t k_desc = ptx::wgmma_advance(k_first, at);
    if constexpr (C::kQInRegisters) {
      ptx::wgmma<typename C::T, kTile, 0>(scores, q[step], k_desc, step > 0);
    } else {
      ptx::wgmma<typename C::T, kTile, 0>(scores, ptx::wgmma_advance(q_first, at), k_desc, step > 0);
    }
  }
  ptx::wgmma_commit();
}

// O += P v of one tile; sixteen tokens (two groups) per instruction.
template <class C, int kTile>
__device__ __forceinline__ void issue_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&probs)[kTile / 16][4],
                                         uint32_t v_smem) {
  const uint64_t v_first = ptx::wgmma_descriptor(v_smem, 1024, C::kGroupBytes);
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
#pragma unroll
    for (int column = 0; column < C::kHeadDim; column += C::kPvColumns) {
      ptx::wgmma<typename C::T, C::kPvColumns, 1>(
          reinterpret_cast<float (&)[C::kPvColumns / 2]>(o[column / 2]), probs[step],
          ptx::wgmma_advance(v_first, step * 2 * C::kGroupBytes + column / 64 * 1024), 1);
    }
  }
  ptx::wgmma_commit();
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
    const float cap = kBlock < kTile / 2 ? ptx::opaque(p.logit_cap) : p.logit_cap;  // else the branches become one
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

// Scores of tokens that do not exist: `valid` of the tile do.
template <int kTile>
__device__ __forceinline__ void hide_past(float (&scores)[kTile / 2], int valid) {
  if (valid >= kTile) return;
  const int limit = valid - (ptx::thread_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    if ((i / 4) * 8 + (i & 1) >= limit) scores[i] = -INFINITY;
  }
}

// A row's scores may exceed the maximum that its sums and outputs are relative to by this power of two before they are
// brought to the new one. P up to 2^8 loses nothing in floating point, and most tiles need no multiplication of O.
constexpr float kSlackLog2 = 8.f;

// Scores, of which some or all may be -inf, to probabilities in place; in `alpha` what the two rows' old sums and
// outputs are to be multiplied with. Returns whether that is anything but 1 in any row of the warp. Without `second`
// its scores stay as they are.
template <class C, int kTile, class Params>
__device__ __forceinline__ bool softmax_rows(const Params& p, float (&scores)[kTile / 2], Accumulators<C>& acc,
                                             float (&alpha)[2], bool second) {
  bool grew[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r == 1 && !second) {
      grew[1] = false;
      alpha[1] = 1.f;
      break;
    }
    float part[4] = {acc.max[r], -INFINITY, -INFINITY, -INFINITY};  // four chains: one alone waits for itself
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j)
      part[j % 4] = fmaxf(part[j % 4], fmaxf(scores[j * 4 + r * 2], scores[j * 4 + r * 2 + 1]));
    float best = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    grew[r] = (best - acc.max[r]) * p.scale_log2 > kSlackLog2;  // not if both are -inf
    alpha[r] = grew[r] ? ptx::exp2_approx((acc.max[r] - best) * p.scale_log2) : 1.f;
    acc.max[r] = grew[r] ? best : acc.max[r];
    const float base = acc.max[r] == -INFINITY ? 0.f : acc.max[r];  // prevents (-inf) - (-inf)
    const float sum = exponentiate_row<kTile>(p, scores, r, base * p.scale_log2);
    acc.sum[r] = acc.sum[r] * alpha[r] + sum;
  }
  return __any_sync(~0u, grew[0] || grew[1]);
}

template <class C>
__device__ __forceinline__ void load_q_fragments(uint32_t (&q)[C::kHeadDim / 16][4], uint32_t q_smem, int warp,
                                                 int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step)
    ptx::ldmatrix_x4(q[step], q_smem + tile_offset<C>(row, step * 2 + (lane >> 4)));
}

// q of a warpgroup from bf16 to fp16: in registers, or in place in shared memory (`barrier`: one of its own).
template <class C>
__device__ __forceinline__ void convert_q(uint32_t (&q)[C::kHeadDim / 16][4]) {
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 4; ++i) q[i / 4][i % 4] = ptx::bf16x2_to_fp16x2(q[i / 4][i % 4]);
}
template <class C>
__device__ __forceinline__ void convert_q(uint32_t q_smem, int barrier) {
#pragma unroll 4
  for (int at = ptx::thread_id() % 128 * 16; at < C::kQBytes; at += 128 * 16) {
    uint4 x = ptx::load_shared_16(q_smem + at);
    x.x = ptx::bf16x2_to_fp16x2(x.x);
    x.y = ptx::bf16x2_to_fp16x2(x.y);
    x.z = ptx::bf16x2_to_fp16x2(x.z);
    x.w = ptx::bf16x2_to_fp16x2(x.w);
    ptx::store_shared_16(q_smem + at, x);
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(barrier, 128);
}

// What scores are multiplied with: the launch's own numbers, or for an e4m3 cache with the scale of its K.
struct ScoreScales {
  float scale_log2, logit_cap, cap_scale_log2;
};
template <bool kScaled, class Params>
__device__ __forceinline__ decltype(auto) score_scales(const Params& p, float k_scale) {
  if constexpr (kScaled) {
    return ScoreScales{p.logit_cap > 0.f ? p.scale_log2 : p.scale_log2 * k_scale, p.logit_cap,
                       p.cap_scale_log2 * k_scale};
  } else {
    return (p);
  }
}

// Sixteen bits of two columns each of four neighbouring column groups -> eight columns of one group: a 4 x 4 transpose
// among the four lanes of a row, so that they store 64 consecutive bytes.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&x)[4]) {
  const int lane = ptx::thread_id() & 3;
  const bool odd = lane & 1, high = lane & 2;
  // Lanes 1 apart exchange, then lanes 2 apart.
  const uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  const uint32_t p0 = odd ? a : x[0], p1 = odd ? x[1] : a, p2 = odd ? b : x[2], p3 = odd ? x[3] : b;
  const uint32_t c = __shfl_xor_sync(~0u, high ? p0 : p2, 2), d = __shfl_xor_sync(~0u, high ? p1 : p3, 2);
  return high ? make_uint4(c, d, p2, p3) : make_uint4(p0, p1, c, d);
}

// Two results in the dtype of out, which differs from the products' where the cache is e4m3.
template <class C, class Params>
__device__ __forceinline__ uint32_t round_out(const Params& p, float x, float y) {
  if (C::kConverts && p.cache.bf16) return pack(x, y, static_cast<__nv_bfloat16*>(nullptr));
  return pack(x, y, static_cast<typename C::T*>(nullptr));
}

}  // namespace flashcore::decode
