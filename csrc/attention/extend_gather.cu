// Copies K and V of the segments that the schedule chose to consecutive slots, once a layer, so that the attention
// kernel reads each of their tiles as one box. A warp takes 8 tokens at a time. Bound by memory: 131 KB for a tile of
// 128 tokens of one KV head of 128, where reading such a tile as scattered tokens costs every q tile 0.7 us of an SM.
// Of an e4m3 cache it writes values of q's dtype, exactly: each token is converted once, and not for every q tile.
#include "attention/extend_params.h"
#include "attention/launch.h"
#include "common/ptx.cuh"

namespace flashcore::extend {
namespace {

constexpr int kThreads = 256, kTokens = 8;  // of a warp at a time

// Slot of the token `slot` of the gathered ones, -1 behind the end of its segment.
__device__ __forceinline__ int source_of(const Params& p, int gathers, int slot) {
  int low = 0, high = gathers - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(&p.work.gathers[middle].slot) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int4 words = __ldg(reinterpret_cast<const int4*>(p.work.gathers + low));
  const Gather g = {words.x, words.y, words.z, words.w};
  const int token = slot - g.slot;
  if (token >= g.tokens) return -1;
  const int mask = (1 << p.page_shift) - 1, offset = (g.begin & mask) + token;
  const int page = __ldg(p.table + min(max(g.entry + (offset >> p.page_shift), 0), p.table_entries - 1));
  const bool valid = page >= 0 && page <= (p.num_slots - 1) >> p.page_shift;
  return min(valid ? (page << p.page_shift) + (offset & mask) : p.num_slots - 1, p.num_slots - 1);
}

// Sixteen e4m3 as bf16 or fp16.
__device__ __forceinline__ void store_converted(int4* to, const int4& x, bool bf16) {
  const int words[4] = {x.x, x.y, x.z, x.w};
  uint32_t y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] = ptx::e4m3x2_to_fp16x2(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    if (bf16) y[i] = ptx::fp16x2_to_bf16x2(y[i]);
  }
  auto* out = reinterpret_cast<uint4*>(to);
  out[0] = make_uint4(y[0], y[1], y[2], y[3]);
  out[1] = make_uint4(y[4], y[5], y[6], y[7]);
}

// `head_units`: 16-byte units of a head in the cache.
template <bool kConverts>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ Params p, int head_units) {
  constexpr int kUnits = kConverts ? 2 : 1;  // of what is written, for each that is read
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % 32, warp = (blockIdx.x * kThreads + threadIdx.x) / 32;
  const int warps = gridDim.x * kThreads / 32, slots = min(p.work.header->gathered_slots, p.gather_slots);
  const int units = p.kv_heads * head_units;
  const int4 *k = static_cast<const int4*>(p.k), *v = static_cast<const int4*>(p.v);
  int4* to_k = static_cast<int4*>(p.gathered);
  int4* to_v = to_k + static_cast<int64_t>(p.gather_slots) * units * kUnits;
  for (int first = warp * kTokens; first < slots; first += warps * kTokens) {
    const int source = lane < kTokens && first + lane < slots ? source_of(p, p.work.header->gathers, first + lane) : -1;
    int from[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) from[t] = __shfl_sync(~0u, source, t);
    for (int unit = lane; unit < units; unit += 32) {
      const int head = unit / head_units;
      const int64_t within = static_cast<int64_t>(head) * p.kv_head_units + unit - head * head_units;
      int4 x[2][kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int64_t at = static_cast<int64_t>(from[t]) * p.kv_slot_units + within;
        x[0][t] = from[t] >= 0 ? __ldg(k + at) : make_int4(0, 0, 0, 0);
        x[1][t] = from[t] >= 0 ? __ldg(v + at) : make_int4(0, 0, 0, 0);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t >= slots) break;
        const int64_t at = (static_cast<int64_t>(first + t) * units + unit) * kUnits;
        if constexpr (kConverts) {
          store_converted(to_k + at, x[0][t], p.cache.bf16);
          store_converted(to_v + at, x[1][t], p.cache.bf16);
        } else {
          to_k[at] = x[0][t];
          to_v[at] = x[1][t];
        }
      }
    }
  }
}

}  // namespace

void launch_gather(const Params& p, int head_units, bool e4m3, int ctas, cudaStream_t stream) {
  auto* kernel = e4m3 ? gather_kernel<true> : gather_kernel<false>;
  launch_dependent(kernel, dim3(2 * ctas), dim3(kThreads), 0, stream, p, head_units);
}

}  // namespace flashcore::extend
