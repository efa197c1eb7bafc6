// Extend attention: one persistent launch per layer; for every tile of q_rows and its KV tiles
//
//   S = q k^T * scale (capped, masked), P = exp2(S - max S), O = P v / sum P
//
// A tile belongs to one KV head: the R query heads of that head and rows / R tokens share its K and V. Its KV tiles
// come in pieces. A row of many queries has one piece, its positions up to the last query's. Rows of few queries that
// share a prefix lie in one tile together: the prefix is a piece that all q_rows read, and each row's own tokens are a
// piece that the others' q_rows are masked from. So no result is ever in parts, except where a tile is cut into chunks
// because there are too few of them or a few are left over; the last chunk to finish then merges all, in their order.
//
// Grid: one CTA per SM, 384 threads; d 64, or an e4m3 cache: 512.
//   warp 0           planner: takes items, turns page ids into slots two tiles ahead of the loaders
//   warps 1-3        loaders: q, K, V. 128 consecutive slots are one TMA box, 8 consecutive ones a small box, others
//                    come by cp.async. What extend_gather.cu has copied is one box always
//   warps 4-7, 8-11  two consumer warpgroups (232 registers), 64 q_rows each, which take turns at the tensor cores. The
//                    softmax of a tile runs while these do P V of the tile before and the other warpgroup's products.
//                    d 64 has as much softmax for half the products: a third warpgroup there (160 registers), and no
//                    turns, so that the schedulers have more to choose from
//   warps 12-15      over an e4m3 cache: converter (extend_converter.cuh); consumers with 224 registers, at d 64 two
//                    warpgroups of them, q in registers (d 256: shared memory), no turns
//
// Shared memory, D 128: 5 buffers of 128 tokens x 256 B (K, V, K, V, ...) + q of two items, 2 x 32 KiB + 2.3 KiB =
// 226.3 KiB. The layout of a tile is decode's (tiles.cuh).
#pragma once
#include "attention/extend_consumer.cuh"
#include "attention/extend_converter.cuh"
#include "attention/extend_loader.cuh"
#include "attention/extend_planner.cuh"
#include "attention/launch.h"

namespace flashcore::extend {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    extend_kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMaps maps) {
  auto& s = ptx::dynamic_shared<SharedStorage<C>>();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kBuffers; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.full[i]), C::kConverts ? 4 * ptx::kWarpArrivals : kFullArrivals);
      ptx::mbarrier_init(ptx::smem_address(&s.empty[i]), C::kWarpgroups * ptx::kWarpgroupArrivals);
    }
    if constexpr (C::kConverts) {
      for (int i = 0; i < C::kCachedBuffers; ++i) {
        ptx::mbarrier_init(ptx::smem_address(&s.cached_barriers.full[i]), kFullArrivals);
        ptx::mbarrier_init(ptx::smem_address(&s.cached_barriers.empty[i]), 4 * ptx::kWarpArrivals);
      }
    }
    for (int i = 0; i < C::kQBuffers; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.q_full[i]), kQArrivals);
      ptx::mbarrier_init(ptx::smem_address(&s.q_empty[i]), 4 * C::kWarpgroups * ptx::kWarpArrivals);
    }
    for (int i = 0; i < kPlanned; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&s.planned[i]), ptx::kWarpArrivals);
      ptx::mbarrier_init(ptx::smem_address(&s.loaded[i]), kLoaders * ptx::kWarpArrivals);
    }
    ptx::fence_mbarrier_init();
    for (int i = 0; i < 2; ++i) {
      ptx::prefetch_tensormap(&maps.k[i]);
      ptx::prefetch_tensormap(&maps.v[i]);
    }
    if (p.boxed_tokens > 0) ptx::prefetch_tensormap(&maps.q);
  }
  ptx::grid_dependency_wait();
  if (threadIdx.x == 0) {
    const Header& h = *p.work.header;
    s.total = (h.converted != 0) == p.converted ? min(max(h.items, 0), p.work.item_capacity) : 0;
    s.paired = min(max(h.paired, 0), s.total);
    s.limit = min(s.paired + max(h.pairs, 0), s.total);
  }
  __syncthreads();
  ptx::grid_dependency_launch();
  if (warp < 4) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    if (warp == 0) {
      plan<C>(p, s, static_cast<int>(threadIdx.x % 32));
    } else {
      load<C>(p, maps, s, warp - 1, static_cast<int>(threadIdx.x % 32));
    }
  } else if (warp < 4 + 4 * C::kWarpgroups) {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<C>(p, s);
  } else if constexpr (C::kConverts) {
    ptx::setmaxnreg_dec<C::kConverterRegisters>();
    convert<C>(s);
  }
}

template <class C>
void launch_kernel(const Params& p, int ctas, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(SharedStorage<C>);
  static_assert(kSmemBytes <= 232448);
  TensorMaps maps{};
  constexpr DType dtype = decode::cache_dtype<C>();
  for (int i = 0; i < 2; ++i) {
    const int tokens = i == 0 ? 8 : C::kTile;
    encode_kv_map(&maps.k[i], dtype, p.k, p.num_slots, p.kv_heads, C::kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
    encode_kv_map(&maps.v[i], dtype, p.v, p.num_slots, p.kv_heads, C::kHeadDim, p.kv_slot_stride, p.kv_head_stride,
                  tokens);
  }
  if (p.gathered != nullptr) {
    const int64_t slot = int64_t{p.kv_heads} * C::kHeadDim;
    const auto* k = static_cast<const char*>(p.gathered);
    encode_kv_map(&maps.k[2], dtype, k, p.gather_slots, p.kv_heads, C::kHeadDim, slot, C::kHeadDim, C::kTile);
    encode_kv_map(&maps.v[2], dtype, k + p.gather_slots * slot * bytes_of(dtype), p.gather_slots, p.kv_heads,
                  C::kHeadDim, slot, C::kHeadDim, C::kTile);
  }
  Params boxed = p;
  if (!encode_q_map(&maps.q, p.q, p.boxed_tokens, p.heads, C::kHeadDim, p.q_row_stride, p.ratio, C::kRows))
    boxed.boxed_tokens = 0;
  auto* kernel = extend_kernel<C>;
  FC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  launch_dependent(kernel, dim3(ctas), dim3(C::kThreads), kSmemBytes, stream, boxed, maps);
}

template <typename Cache, int kHeadDim>
void launch(const Params& p, int ctas, cudaStream_t stream) {
  constexpr bool kE4m3 = std::is_same_v<Cache, E4m3>;
  const bool scaled = kE4m3 || p.cache.k != nullptr || p.cache.v != nullptr || p.cache.v_host != 1.f;
  constexpr bool kMasksAlone = kE4m3 && kHeadDim == 256;  // the kernel without masks would spill
  const bool masks = kMasksAlone || p.windowed || p.custom_mask != nullptr;
  if (p.logit_cap > 0.f || (masks && scaled != kE4m3)) {
    launch_kernel<Traits<Cache, kHeadDim, true, true, true>>(p, ctas, stream);
  } else if (masks) {
    launch_kernel<Traits<Cache, kHeadDim, true, false, kE4m3>>(p, ctas, stream);
  } else if constexpr (!kMasksAlone) {
    if (scaled) {
      launch_kernel<Traits<Cache, kHeadDim, false, false, true>>(p, ctas, stream);
    } else {
      launch_kernel<Traits<Cache, kHeadDim, false, false, kE4m3>>(p, ctas, stream);
    }
  }
}

}  // namespace flashcore::extend
