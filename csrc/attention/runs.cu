// Marks the items whose tokens lie in one row of slots, or in two: what a request has of its own, or that behind the
// last pages of a prefix that few share. Their loaders ask for no page index, and know without looking which boxes
// bring a tile: for items of one tile a loader's own instructions are the limit. Once per step for all layers.
//
// Longer items hide both. The first items of the CTAs (Workspace::starts) have their pages beside them.
//
// Grid: a warp for each entry of the work list, in turn.
#include "attention/launch.h"
#include "attention/params.h"
#include "common/ptx.cuh"

namespace flashcore {
namespace {

constexpr int kRunThreads = 256;
static_assert(kRunTokens + 1 < 1 << (31 - kRunShift));

// Tokens from `begin` on that lie `step` slots apart, the first of them at slot `first`. By a warp.
template <class Slots>
__device__ __forceinline__ int run_length(const Slots& slot_of, int begin, int end, int64_t first, int64_t step,
                                          int lane) {
  constexpr int kGroups = kRunTokens / 32;  // of 32 tokens, whose pages are asked for at once
  int broken = end;
#pragma unroll 1
  for (int t = begin + lane; t < end; t += 32 * kGroups) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = t + 32 * g;
      if (at < end && slot_of(at) != first + (at - begin) * step) broken = min(broken, at);
    }
  }
  return __reduce_min_sync(~0u, broken) - begin;
}

__device__ __forceinline__ void mark_runs(const ScheduleParams& p, WorkItem& item, int lane) {
  const int tokens = item.num_tokens;
  if (tokens <= 0 || tokens > kRunTokens || item.piece < 0 || item.piece >= 1 << kStepShift) return;
  const LayoutView& l = p.layout;
  auto slot_of = [&](int t) {
    const int at = item.token + t, page = p.by_page(at);
    return static_cast<int64_t>(l.page_indices[min(item.page + page, l.page_capacity - 1)]) * l.page_size +
           (at - page * l.page_size);
  };
  const int64_t first = slot_of(0);
  int length = run_length(slot_of, 0, tokens, first, 1, lane);
  if (length == 1) length = 0;  // more likely the first of those that lie apart
  const int64_t second = length < tokens ? slot_of(length) : 0;
  const int64_t step = length + 1 < tokens ? slot_of(length + 1) - second : 1;
  if (length < tokens && run_length(slot_of, length, tokens, second, step, lane) < tokens - length) return;
  constexpr int64_t kMost = (int64_t{1} << 31) - kRunTokens - 1;
  const bool sound = first >= 0 && first <= kMost && step > 0 && step < 1 << (31 - kStepShift) && second >= 0 &&
                     second + step * kRunTokens <= kMost;
  if (!sound || lane != 0) return;
  item.page = static_cast<int>(first);
  item.token = static_cast<int>(second);
  item.piece |= static_cast<int>(step) << kStepShift;
  item.kv_head = (length + 1) << kRunShift;
}

__global__ void __launch_bounds__(kRunThreads) runs_kernel(const __grid_constant__ ScheduleParams p) {
  ptx::grid_dependency_wait();
  const int warps = gridDim.x * (kRunThreads / 32), lane = threadIdx.x % 32;
  const int wide = p.work.header->entries[0], narrow = p.work.header->entries[1];
#pragma unroll 1
  for (int i = blockIdx.x * (kRunThreads / 32) + threadIdx.x / 32; i < wide + narrow; i += warps)
    mark_runs(p, p.work.items[i < wide ? i : p.work.entry_capacity - 1 - (i - wide)], lane);
}

}  // namespace

void launch_mark_runs(const ScheduleParams& p, cudaStream_t stream) {
  launch_dependent(runs_kernel, dim3(p.ctas), dim3(kRunThreads), 0, stream, p);
}

}  // namespace flashcore
