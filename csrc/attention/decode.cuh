// Decode attention, one persistent launch per layer: for every item of the work list
//
//   S = q k^T * scale (capped), P = exp2(S - max S), O = P v / sum P, lse2 = max + log2(sum P)
//
// with q the gathered q_rows of a segment and k, v a chunk of its tokens. A row with one piece goes to `out`; others
// leave O in 16 bits and lse2 for merge.cu. (Merging in here, by whoever brings the last piece, was tried: its fence
// takes up to 9 us while memory is busy.) Decode has no causal mask inside a segment, so a tile is any 128 tokens.
//
// Grid: one CTA per SM, 384 threads; over an e4m3 cache 512.
//   warp 0           feeder: claims items and posts them to a ring.
//   warps 1, 2       K and V loaders: a tile in one TMA box if its slots are consecutive, else 32 or 8 consecutive
//                    slots, or 32 a constant step apart (strided.cuh), by a box and anything else by cp.async. Page
//                    indices are asked for two tiles ahead; an item of runs (runs.cu) needs none.
//   warp 3           q loader: the item's q_rows, and where their results go.
//   warps 4-7, 8-11  two consumer warpgroups (224 registers), 64 q_rows each. Wide item (> 64 q_rows): both work on
//                    every tile. Narrow item: one of them, in turn, so that an epilogue overlaps the other's products.
//   warps 12-15      over an e4m3 cache: converter (converter.cuh). The loaders bring e4m3 tiles, it makes fp16 tiles
//                    of them, exactly, and the consumers do as ever: q as fp16, scales on scores and results.
// A CTA starts with an item that the schedule has set aside for it (its first two tiles may set out before all else),
// and takes from the wide or the narrow list (header.wide_ctas), then from the other one: compute-bound and
// memory-bound items run beside each other.
//
// Narrow items use the same M = 64 tiles with most rows empty; warps without rows leave out the softmax. A 128-token
// tile costs a warpgroup about 1 us, its loading 2.8 us at 1/132 of the bandwidth.
//
// Shared memory, D 128: 3 buffers each of K and V, 128 tokens x 256 B, + q 32 KiB + 2.9 KiB. With a converter: 2 of
// each, and before them 2 of each of 128 B a token.
// A tile lies as [8-token group][64 elements of d][8 tokens][128 B], 128-byte swizzled.
//
// Measured on an H100 (scripts/bench_decode.py): 64 x 8192 tokens 3.04 TB/s, the speed of a copy; wide items
// 2.0 us a tile and 8 us each for their start, epilogue and partial results. More in csrc/README.md.
#pragma once
#include "attention/consumer.cuh"
#include "attention/converter.cuh"
#include "attention/launch.h"
#include "attention/producer.cuh"

namespace flashcore::decode {

template <class C>
__device__ __forceinline__ void init_barriers(SharedStorage<C>& s) {
  auto init = [](uint64_t* barriers, int count, int arrivals) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(ptx::smem_address(barriers + i), arrivals);
  };
  if constexpr (C::kConverts) {
    init(s.cached_barriers.k_full, C::kCachedBuffers, kFullArrivals);
    init(s.cached_barriers.v_full, C::kCachedBuffers, kFullArrivals);
    init(s.cached_barriers.k_empty, C::kCachedBuffers, 4 * ptx::kWarpArrivals);
    init(s.cached_barriers.v_empty, C::kCachedBuffers, 4 * ptx::kWarpArrivals);
  }
  init(s.k_full, C::kKBuffers, C::kConverts ? 4 * ptx::kWarpArrivals : kFullArrivals);
  init(s.v_full, C::kVBuffers, C::kConverts ? 4 * ptx::kWarpArrivals : kFullArrivals);
  init(s.k_empty, C::kKBuffers, 2);
  init(s.v_empty, C::kVBuffers, 2);
  init(s.q_full, 2, 32 + ptx::kWarpArrivals);
  init(s.q_empty, 2, 4 * ptx::kWarpArrivals);
  init(s.item_full, C::kRing, 1);
  init(s.item_begun, C::kRing, 1);
  init(s.item_started, C::kRing, 2);
  init(s.item_empty, C::kRing, kItemReaders<C> * ptx::kWarpArrivals);
  ptx::fence_mbarrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& s = *reinterpret_cast<SharedStorage<C>*>(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 128) {
    init_barriers<C>(s);
    for (int i = 0; i < kBoxes; ++i) {
      ptx::prefetch_tensormap(&maps.k[i]);
      ptx::prefetch_tensormap(&maps.v[i]);
    }
  }
  ptx::grid_dependency_wait();
  // What a CTA starts with sets out before the barrier.
  const int lane = threadIdx.x % 32;
  WorkItem start{};
  Pages<C> pages{};
  int slot = -1;
  if (warp < 3) {
    start = load_item(p.work.starts + blockIdx.x);
    if (warp > 0) {
      slot = __ldg(p.work.start_slots + blockIdx.x);
      pages = load_start_pages<C>(p, lane);
    }
  }
  if (threadIdx.x >= 96 && threadIdx.x < 98) {
    const int list = threadIdx.x - 96;
    s.list_items[list] = p.work.header->entries[list] * p.kv_heads;
    s.large_items[list] = p.work.header->large[list] * p.kv_heads;
  }
  if (threadIdx.x >= 99 && threadIdx.x < 101) s.issued[threadIdx.x - 99] = 0;
  if (warp == kKeyLoader || warp == kKeyLoader + 1) {
    if (lane < kStrides) s.scattered[warp - kKeyLoader].strides[lane] = 0;
  }
  if (threadIdx.x == 98) s.wide_ctas = min(max(p.work.header->wide_ctas, 0), static_cast<int>(gridDim.x));
  __syncthreads();
  ptx::grid_dependency_launch();
  if (warp < 4) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    if (warp == 0) {
      feed_items<C>(p, s, start, lane);
    } else if (warp < 3) {
      load_kv<C>(p, maps, s, buffers_of<C>(p, maps, s, warp == kKeyLoader), start, slot, pages);
    } else {
      load_q<C>(p, s, lane);
    }
  } else if (warp < 12) {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<C>(p, s, warp / 4 - 1);
  } else if constexpr (C::kConverts) {
    ptx::setmaxnreg_dec<C::kConverterRegisters>();
    convert_kv<C>(s);
  }
}

}  // namespace flashcore::decode

namespace flashcore {

template <typename Cache, int kHeadDim>
void launch_decode(const DecodeParams& p, int ctas, cudaStream_t stream) {
  using C = decode::Traits<Cache, kHeadDim>;
  constexpr int kSmemBytes = sizeof(decode::SharedStorage<C>);
  static_assert(kSmemBytes <= 232448);
  decode::TensorMaps maps{};
  constexpr DType dtype = decode::cache_dtype<C>();
  for (int i = 0; i < decode::kBoxes; ++i) {
    const int tokens = i == 0 ? 8 : i == 1 ? 32 : C::kTile;
    encode_kv_map(&maps.k[i], dtype, p.k, p.num_slots, p.kv_heads, kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
    encode_kv_map(&maps.v[i], dtype, p.v, p.num_slots, p.kv_heads, kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
  }
  if (p.strided) {
    encode_strided_map(&maps.strided_k, dtype, p.k, p.num_slots, kHeadDim, p.kv_slot_stride, p.kv_head_stride);
    encode_strided_map(&maps.strided_v, dtype, p.v, p.num_slots, kHeadDim, p.kv_slot_stride, p.kv_head_stride);
  }
  auto* kernel = decode::decode_kernel<C>;
  FC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  launch_dependent(kernel, dim3(ctas), dim3(C::kThreads), kSmemBytes, stream, p, maps);
}

}  // namespace flashcore
