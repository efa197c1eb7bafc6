// Decode attention, one persistent launch per layer: for every item of the work list
//
//   S = q k^T * scale (capped), P = exp2(S - max S), O = P v / sum P, lse2 = max + log2(sum P)
//
// with q the gathered q_rows of a segment and k, v a chunk of its tokens. A row with one piece goes to `out`; others
// leave (O, lse2) in fp32 for merge.cu. Decode has no causal mask inside a segment, so a tile is any 128 tokens.
//
// Grid: one CTA per SM, 384 threads.
//   warps 0-3        producer (56 registers). Warp w loads tokens 32 w .. 32 w + 31 of each tile, K then V, and a
//   quarter
//                    of q: 32 consecutive slots by one TMA box, 8 consecutive by an 8-row box, anything else by
//                    cp.async. Page indices are asked for two tiles ahead. Warp 0 also claims items and posts them to a
//                    ring.
//   warps 4-7, 8-11  two consumer warpgroups (224 registers), 64 q_rows each. Wide item (> 64 q_rows): both work on
//   every
//                    tile. Narrow item: one of them, in turn, so that an epilogue overlaps the other's products.
// A CTA starts on the wide or the narrow list (header.wide_ctas) and helps with the other one when its own is empty:
// compute-bound and memory-bound items run beside each other.
//
// Narrow items use the same M = 64 tiles with most rows empty: a 128-token tile costs a warpgroup about 1 us, its
// loading 2.8 us at 1/132 of the bandwidth. Swapping A and B would save power, not time.
//
// Shared memory, D 128: 6 buffers of 128 tokens x 256 B (K, V, K, V, ...) + q 32 KiB + 2.3 KiB = 226.3 KiB.
// A tile lies as [8-token group][64 elements of d][8 tokens][128 B], 128-byte swizzled.
//
// Measured on an H100 (scripts/bench_decode.py): 64 x 8192 tokens 3.04 TB/s, the speed of a copy; wide items
// 1.65 us a tile (670 TFLOP/s over 132 CTAs) and 6.5 us each for their start, epilogue and merge.
#pragma once
#include "attention/consumer.cuh"
#include "attention/launch.h"
#include "attention/producer.cuh"

namespace flashcore::decode {

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& s = *reinterpret_cast<SharedStorage<C>*>(raw);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kBuffers; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.full[i]), 4 * 33);
      ptx::mbarrier_init(ptx::smem_address(&s.empty[i]), 2);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.q_full[i]), 128 + 4);
      ptx::mbarrier_init(ptx::smem_address(&s.q_empty[i]), 4);
    }
    for (int i = 0; i < C::kRing; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.item_full[i]), 1);
      ptx::mbarrier_init(ptx::smem_address(&s.item_empty[i]), 12);
    }
    ptx::fence_mbarrier_init();
    for (int i = 0; i < 2; ++i) {
      ptx::prefetch_tensormap(&maps.k[i]);
      ptx::prefetch_tensormap(&maps.v[i]);
    }
  }
  ptx::grid_dependency_wait();
  if (threadIdx.x < 2) s.list_items[threadIdx.x] = p.work.header->entries[threadIdx.x] * p.kv_heads;
  if (threadIdx.x == 64) s.issued = 0;
  if (threadIdx.x == 32) s.wide_ctas = min(max(p.work.header->wide_ctas, 0), static_cast<int>(gridDim.x));
  __syncthreads();
  ptx::grid_dependency_launch();
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    produce<C>(p, maps, s, warp);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume<C>(p, s);
  }
}

}  // namespace flashcore::decode

namespace flashcore {

template <typename T, int kHeadDim>
void launch_decode(const DecodeParams& p, int ctas, cudaStream_t stream) {
  using C = decode::Traits<T, kHeadDim>;
  constexpr int kSmemBytes = sizeof(decode::SharedStorage<C>);
  static_assert(kSmemBytes <= 232448);
  decode::TensorMaps maps;
  const DType dtype = std::is_same_v<T, __half> ? DType::kFp16 : DType::kBf16;
  for (int i = 0; i < 2; ++i) {
    const int tokens = i == 0 ? 8 : C::kWarpTokens;
    encode_kv_map(&maps.k[i], dtype, p.k, p.num_slots, p.kv_heads, kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
    encode_kv_map(&maps.v[i], dtype, p.v, p.num_slots, p.kv_heads, kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
  }
  auto* kernel = decode::decode_kernel<C>;
  FC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  launch_dependent(kernel, dim3(ctas), dim3(decode::kThreads), kSmemBytes, stream, p, maps);
}

}  // namespace flashcore
