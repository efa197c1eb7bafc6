// The tables of windows and chunks on the GPU: window.h, in one launch, and one for the mask of a tree of drafts.
//
// Grid: (rows, parts), of 256 threads, no more CTAs than are resident at once: each takes its part of one row after the
// other. A part has at most 1,280 pages, five for each thread. The row's numbers are uniform, and every thread computes
// them for itself. Where a row's request or its entry depends on the requests before, every CTA adds up all of them
// first (8 KiB of shared memory).
//
// Limited by latency, of a length, an id and, in a pool of its own, the slot that stands for it, one after the other;
// and by memory: 8 bytes an entry, 16 where slots are translated.
#include <algorithm>

#include "common/cuda_check.h"
#include "pager/device_block.cuh"
#include "pager/device_window.h"

namespace flashcore {
namespace pager {
namespace {

constexpr int kThreads = 256, kCtasPerMultiprocessor = 8;
constexpr int kIdsPerThread = 5;  // so that a window of 4,096 and one more takes no part more than one of 4,096
constexpr int kPartPages = kThreads * kIdsPerThread;
constexpr int kRequestsPerThread = kWindowRows / kThreads;

struct WindowShared {
  int rows_before[kWindowRows + 1];  // rows, and queries, of the requests before
  int queries_before[kWindowRows];
  int scratch[2][32];
};

__device__ __forceinline__ void add_up(const WindowParams& p, const WindowInput& in, const WindowFields& out,
                                       WindowShared& s) {
  int rows[kRequestsPerThread], queries[kRequestsPerThread], row_sum = 0, query_sum = 0, total;
#pragma unroll
  for (int k = 0; k < kRequestsPerThread; ++k) {
    const int request = threadIdx.x * kRequestsPerThread + k;
    const WindowRequest x = request < in.requests ? read_request(p, in, request) : WindowRequest{};
    row_sum += rows[k] = x.rows;
    query_sum += queries[k] = min(x.queries, in.num_tokens);
    if (blockIdx.x == 0 && blockIdx.y == 0 && request < in.requests && !in.one_row_each(p))
      store_request(out, request, x.end, x.queries);
  }
  int row = block_scan(row_sum, kWholeCta, s.scratch[0], &total);
  int query = block_scan(query_sum, kWholeCta, s.scratch[1], &total);
#pragma unroll
  for (int k = 0; k < kRequestsPerThread; ++k) {
    s.rows_before[threadIdx.x * kRequestsPerThread + k] = row;
    s.queries_before[threadIdx.x * kRequestsPerThread + k] = query;
    row += rows[k];
    query += queries[k];
  }
  if (threadIdx.x == kThreads - 1) s.rows_before[kWindowRows] = row;
  __syncthreads();
}

template <bool kAddsUp>
__device__ __forceinline__ WindowRow find_row(const WindowParams& p, const WindowInput& in, const WindowFields& out,
                                              const WindowShared* s, int row) {
  if constexpr (!kAddsUp) {
    return row_of(p, in, out, row, row, read_request(p, in, row), 0, 0);
  } else {
    if (row >= s->rows_before[kWindowRows]) return empty_row(p, row);
    const int request = find_interval(s->rows_before, kWindowRows, row);
    return row_of(p, in, out, row, request, read_request(p, in, request), row - s->rows_before[request],
                  s->queries_before[request]);
  }
}

// The pages of a part: blocks of kThreads, of which each part has every `parts`th.
__device__ __forceinline__ void copy_pages(const WindowParams& p, const WindowInput& in, const WindowFields& out,
                                           const WindowRow& x, int part, int parts) {
  const int* ids = ids_of(in, x);
  int* table = out.table + x.entry;
  const int first = part * kThreads + threadIdx.x, step = parts * kThreads;
  int slots[kIdsPerThread];
#pragma unroll
  for (int k = 0; k < kIdsPerThread; ++k) {  // all loads before the first use
    const int i = first + k * step;
    slots[k] = i < x.pages ? __ldcs(ids + position_of(p, x, i)) : -1;
  }
  if (in.slot_map) {
#pragma unroll
    for (int k = 0; k < kIdsPerThread; ++k) slots[k] = own_slot(in, slots[k]);
  }
#pragma unroll
  for (int k = 0; k < kIdsPerThread; ++k) {
    const int i = first + k * step;
    if (i < x.pages) table[i] = page_of(p, slots[k]);
  }
}

template <bool kAddsUp>
__global__ void __launch_bounds__(kThreads, kCtasPerMultiprocessor)
    window_kernel(const __grid_constant__ WindowParams p, const __grid_constant__ WindowInput in,
                  const __grid_constant__ WindowFields out) {
  WindowShared* s = nullptr;
  if constexpr (kAddsUp) {
    __shared__ WindowShared shared;
    s = &shared;
    add_up(p, in, out, *s);
  }
  const int part = blockIdx.y, parts = gridDim.y;
  for (int row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const WindowRow x = find_row<kAddsUp>(p, in, out, s, row);
    copy_pages(p, in, out, x, part, parts);
    if (part == 0 && threadIdx.x == 0) store_row(p, in, out, row, x);
  }
  if (blockIdx.x == 0 && part == 0 && threadIdx.x == 0) out.sizes()[0] = in.rows;
}

// Sum over the threads of the CTA, for all of them. `scratch`: [kThreads / 32] shared.
__device__ __forceinline__ int64_t block_sum(int64_t x, int64_t* scratch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) x += __shfl_sync(kAllLanes, x, lane ^ i);
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// Grid: (rows, parts): a part takes blocks of kThreads positions of every query.
__global__ void __launch_bounds__(kThreads, kCtasPerMultiprocessor)
    cut_mask_kernel(const __grid_constant__ WindowFields fields, const __grid_constant__ WindowMask mask) {
  __shared__ int64_t scratch[2][kThreads / 32];
  const int row = blockIdx.x, request_of_row = fields.requests()[row];
  int64_t of_requests = 0, of_rows = 0;
  for (int i = threadIdx.x; i < request_of_row; i += kThreads) of_requests += mask_cells_of_request(fields, i);
  for (int i = threadIdx.x; i < row; i += kThreads) of_rows += mask_cells_of_row(fields, i);
  const MaskRow x = mask_row(fields, row, block_sum(of_requests, scratch[0]));
  const int64_t to = block_sum(of_rows, scratch[1]);
  for (int query = 0; query < x.queries; ++query) {
    for (int i = blockIdx.y * kThreads + threadIdx.x; i < x.length; i += gridDim.y * kThreads) {
      copy_cell(mask, x.from + int64_t{query} * x.stride + i, to + int64_t{query} * x.length + i);
    }
  }
}

}  // namespace
}  // namespace pager

void launch_window(const WindowParams& p, const WindowInput& in, const WindowFields& out, int multiprocessors,
                   cudaStream_t stream) {
  const int parts = (in.width + pager::kPartPages - 1) / pager::kPartPages;
  const int rows = std::clamp(pager::kCtasPerMultiprocessor * multiprocessors / parts, 1, in.rows);
  const bool adds_up = !in.one_row_each(p) || in.spread(p);
  auto* kernel = adds_up ? pager::window_kernel<true> : pager::window_kernel<false>;
  kernel<<<dim3(rows, parts), pager::kThreads, 0, stream>>>(p, in, out);
  FC_CUDA(cudaGetLastError());
}

void launch_cut_mask(const WindowFields& fields, const WindowMask& mask, int multiprocessors, cudaStream_t stream) {
  const int parts = std::max(1, pager::kCtasPerMultiprocessor * multiprocessors / mask.rows);
  pager::cut_mask_kernel<<<dim3(mask.rows, parts), pager::kThreads, 0, stream>>>(fields, mask);
  FC_CUDA(cudaGetLastError());
}

}  // namespace flashcore
