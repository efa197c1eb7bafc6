// Consumer warpgroups: the items of the ring through the two products (products.cuh), and the results.
#pragma once
#include "attention/products.cuh"
#include "attention/work_list.cuh"

namespace flashcore::decode {

// Which of the two consumer warpgroups this is.
__device__ __forceinline__ int warpgroup_id() { return ptx::thread_id() / 128 - 1; }

// The unit of a row's partial output (PartialHead), whose largest value is `largest`; and one over it. Not below
// 2^-101: zeros times a factor that is infinite would not be zero. A scale of V from 2^27 on would still make it so.
__device__ __forceinline__ float unit_of(float largest) {
  return __uint_as_float(max(__float_as_uint(largest) & 0x7F800000u, 40u << 23) - (14u << 23));
}
__device__ __forceinline__ float one_over_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// Divides, adds the sink where the row ends here, and stores 16 bytes per thread and 32 columns: to out, or as a
// partial result. A lane has 8 columns of each 32.
template <class C, class Scales>
__device__ __forceinline__ void store_rows(const DecodeParams& p, const Scales& scales, SharedStorage<C>& s,
                                           const WorkItem& item, Accumulators<C>& acc, int warpgroup, int warp,
                                           int lane) {
  const float v_scale = C::kConverts ? p.cache.of_v(kv_head_of(item)) : 1.f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int in_half = warp * 16 + lane / 4 + 8 * r;
    const int to = s.destinations[warpgroup][q_phase_of(item, warpgroup)][in_half];
    if (__all_sync(~0u, to == kNowhere)) continue;
    const bool ends = to < 0;
    const int index = index_of(to), head = kv_head_of(item) * p.ratio + group_head_of(to);
    const float max2 = acc.max[r] * scales.scale_log2;
    float sum = acc.sum[r], largest = 0.f;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 4; ++i) largest = fmaxf(largest, fabsf(acc.o[i / 2 * 4 + r * 2 + i % 2]));
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      sum += __shfl_xor_sync(~0u, sum, d);
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    }
    if (ends && p.sinks != nullptr) sum += ptx::exp2_approx(p.sinks[head] * kLog2e - max2);
    const float inverse = v_scale * ptx::rcp_approx(sum), unit = unit_of(largest * fabsf(inverse));
    const float factor = ends ? inverse : inverse * one_over_unit(unit);
    const int64_t at = static_cast<int64_t>(index) * p.heads + head;
    if (!ends && to != kNowhere && (lane & 3) == 0) p.work.partial_heads[at] = {max2 + ptx::log2_approx(sum), unit};
    char* row = ends ? static_cast<char*>(p.out) + (index * p.out_row_stride + head * C::kHeadDim) * 2
                     : reinterpret_cast<char*>(p.work.partial_out + at * C::kHeadDim);
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = acc.o[(j + i) * 4 + r * 2] * factor, b = acc.o[(j + i) * 4 + r * 2 + 1] * factor;
        x[i] = ends ? round_out<C>(p, a, b) : pack(a, b, static_cast<__half*>(nullptr));
      }
      const uint4 y = transpose_quad(x);
      if (to != kNowhere) *reinterpret_cast<uint4*>(row + (j / 4 * 4 + (lane & 3)) * 16) = y;
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
