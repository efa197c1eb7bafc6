// The pager's two kernels; see device_pager.h.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "pager/device_emit.cuh"
#include "pager/device_forest.cuh"
#include "pager/device_order.cuh"
#include "pager/device_pager.h"
#include "pager/device_ranges.cuh"
#include "pager/device_snapshot.cuh"

namespace flashcore {
namespace pager {

constexpr size_t kBuildSharedBytes = std::max({sizeof(RangesShared), sizeof(ForestShared), sizeof(EmitShared)});

// Grid: one CTA of 1024 threads per multiprocessor, launched cooperatively, because its barriers want all CTAs
// resident.
template <bool kRanged>
__global__ void __launch_bounds__(kPagerRows, 1) build_kernel(const __grid_constant__ DevicePagerParams p) {
  ptx::grid_dependency_launch();  // the schedule comes in as CTAs leave
  const PagerState& state = *p.state;
  const int row = threadIdx.x;
  // Not after the state has said that they are wanted: one latency after the other is what a small build takes.
  const RowState row_state = row < p.max_rows ? RowState{p.row_end[row], p.row_share[row]} : RowState{0, 0};
  const int rows = state.rows;
  // CTA 0 changes these words only where all CTAs have passed a barrier since, or writes what they are.
  const bool append = state.appendable && !state.changed && state.violation == 0 && state.forest_rows == rows;
  GridBarrier barrier(&p.state->barrier);
  Sharers sharers{};
  if (!append) {
    const int* root = nullptr;
    if constexpr (kRanged) root = complete_rows(p, shared_memory<RangesShared>(), rows, barrier);
    sharers = order_rows(p, shared_memory<OrderShared>(), rows, row_state, root, barrier);
    barrier.arrive();
  }
  if (blockIdx.x == 0) {
    ForestShared& s = shared_memory<ForestShared>();
    // Those that emit need all warps afterwards, and racecheck cannot follow warps that leave barriers out and come
    // back.
    const int threads = p.emit ? kPagerRows : (rows + 31) & ~31;
    if (threadIdx.x < threads) {
      append ? append_rows(p, s, rows, threads, row_state)
             : build_forest<kRanged>(p, s, rows, threads, row_state, sharers, barrier);
    }
  } else if (p.emit && !append) {
    barrier.wait();
  }
  if (!p.emit) return;
  barrier.arrive();
  barrier.wait();
  EmitShared& s = shared_memory<EmitShared>();
  const EmitShare share = load_segments(p, s);
  emit_all_pages(p, s, share);
  barrier.arrive();
  barrier.wait();
  emit_all_runs(p, s, share);
}

}  // namespace pager

void prepare_build(const DevicePagerParams& params, int ctas) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  auto* kernel = params.ranged ? pager::build_kernel<true> : pager::build_kernel<false>;
  FC_CUDA(cudaGetDevice(&device));
  FC_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  FC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, pager::kBuildSharedBytes));
  FC_CUDA(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kPagerRows, pager::kBuildSharedBytes));
  FC_CHECK(ctas >= 1 && ctas <= multiprocessors * per_multiprocessor)
      << "ctas: want 1 .. " << multiprocessors * per_multiprocessor << ", what device " << device
      << " holds at once, got " << ctas;
}

void launch_snapshot(const DevicePagerParams& params, const SnapshotInput& input, int ctas, cudaStream_t stream) {
  auto* kernel = params.ranged        ? pager::snapshot_kernel<true, false>
                 : input.branches > 0 ? pager::snapshot_kernel<false, true>
                                      : pager::snapshot_kernel<false, false>;
  kernel<<<2 * ctas, pager::kSnapshotThreads, sizeof(pager::SnapshotShared), stream>>>(params, input);
  FC_CUDA(cudaGetLastError());
}

void launch_build(const DevicePagerParams& params, int ctas, cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kPagerRows);
  config.dynamicSmemBytes = pager::kBuildSharedBytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  FC_CUDA(cudaLaunchKernelEx(&config, params.ranged ? pager::build_kernel<true> : pager::build_kernel<false>, params));
}

}  // namespace flashcore
