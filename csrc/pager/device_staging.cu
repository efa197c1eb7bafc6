// See device_staging.h.
#include "common/cuda_check.h"
#include "pager/device_block.cuh"
#include "pager/device_staging.h"

namespace flashcore {
namespace pager {

// Page entry e of the build's layout, and what it is the first or the last of.
struct Entry {
  int segment, block, page;
  bool first;  // of its segment
  bool stays, starts_part, ends_part, starts_run, ends_run;
};

__device__ __forceinline__ bool is_resident(const ResidentPages& r, int page) {
  if (r.bits == nullptr) return true;
  return r.packed ? static_cast<const unsigned*>(r.bits)[page >> 5] >> (page & 31) & 1
                  : static_cast<const unsigned char*>(r.bits)[page] != 0;
}

__device__ __forceinline__ Entry load_entry(const DevicePagerParams& p, const ResidentPages& resident, int e,
                                            int entries) {
  Entry x{};
  if (e >= entries) return x;
  x.segment = find_interval(p.page_indptr, p.sizes[0], e);
  const int within = e - p.page_indptr[x.segment];
  const int* page = p.table + p.segment_entries[x.segment] + within;
  const bool last = e + 1 == p.page_indptr[x.segment + 1];
  x.block = (p.segment_positions[2 * x.segment] >> p.page_shift) + within;
  x.page = *page;
  x.first = within == 0;
  x.stays = is_resident(resident, x.page);
  const bool before = !x.first && is_resident(resident, page[-1]), after = !last && is_resident(resident, page[1]);
  x.starts_part = x.stays && !before;
  x.ends_part = x.stays && !after;
  x.starts_run = x.starts_part || (x.stays && page[-1] + 1 != x.page);
  x.ends_run = x.ends_part || (x.stays && x.page + 1 != page[1]);
  return x;
}

__global__ void __launch_bounds__(kStagingTile)
    count_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ StagingArrays a,
                 const __grid_constant__ ResidentPages resident) {
  const int entries = p.sizes[1];
  for (int tile = blockIdx.x; tile * kStagingTile < entries; tile += gridDim.x) {
    const int e = tile * kStagingTile + threadIdx.x;
    const Entry x = load_entry(p, resident, e, entries);
    if (e < entries && !x.stays) atomicOr(a.missing + (x.page >> 5), 1u << (x.page & 31));
    const int stay = __syncthreads_count(x.stays), parts = __syncthreads_count(x.starts_part);
    const int runs = __syncthreads_count(x.starts_run);
    if (threadIdx.x == 0) a.tile_counts[tile] = make_int4(stay, parts, runs, 0);
  }
}

struct ScanShared {
  int scratch[4][32];
};

// One CTA. The marks are cleared as they are read.
__global__ void __launch_bounds__(kPagerRows)
    scan_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ StagingArrays a) {
  ScanShared& s = shared_memory<ScanShared>();
  const int tiles = (p.sizes[1] + kStagingTile - 1) / kStagingTile;
  int4 sum = make_int4(0, 0, 0, 0);
  for (int first = 0; first < tiles; first += kPagerRows) {
    const int tile = first + static_cast<int>(threadIdx.x);
    const int4 counts = tile < tiles ? a.tile_counts[tile] : make_int4(0, 0, 0, 0);
    int4 total;
    const int x = block_scan(counts.x, kWholeCta, s.scratch[0], &total.x);
    const int y = block_scan(counts.y, kWholeCta, s.scratch[1], &total.y);
    const int z = block_scan(counts.z, kWholeCta, s.scratch[2], &total.z);
    if (tile < tiles) a.tile_counts[tile] = make_int4(sum.x + x, sum.y + y, sum.z + z, 0);
    sum = make_int4(sum.x + total.x, sum.y + total.y, sum.z + total.z, 0);
    __syncthreads();
  }
  int staged = 0, total;
  for (int first = 0; first < a.missing_words; first += kPagerRows) {
    const int word = first + static_cast<int>(threadIdx.x);
    unsigned bits = word < a.missing_words ? a.missing[word] : 0;
    int at = staged + block_scan(__popc(bits), kWholeCta, s.scratch[3], &total);
    if (bits) a.missing[word] = 0;
    for (; bits; bits &= bits - 1) a.staged_pages[at++] = word * 32 + __ffs(bits) - 1;
    staged += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    a.page_indptr[sum.y] = sum.x;
    a.run_indptr[sum.y] = sum.z;
    a.first_part[p.sizes[0]] = sum.y;
    a.sizes[0] = sum.y, a.sizes[1] = sum.x, a.sizes[2] = sum.z, a.sizes[4] = staged;
    a.sizes[5] = p.sizes[5], a.sizes[6] = a.sizes[7] = 0;
  }
}

__global__ void __launch_bounds__(kStagingTile)
    write_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ StagingArrays a,
                 const __grid_constant__ ResidentPages resident) {
  ScanShared& s = shared_memory<ScanShared>();
  const int entries = p.sizes[1];
  for (int tile = blockIdx.x; tile * kStagingTile < entries; tile += gridDim.x) {
    const int e = tile * kStagingTile + threadIdx.x;
    const Entry x = load_entry(p, resident, e, entries);
    const int4 before = a.tile_counts[tile];
    int total;
    const int both = block_scan(x.stays << 16 | x.starts_part, kWholeCta, s.scratch[0], &total);
    const int entry = before.x + (both >> 16), part = before.y + (both & 0xFFFF);
    const int run = before.z + block_scan(x.starts_run, kWholeCta, s.scratch[1], &total);
    __syncthreads();  // before the scratch is written again
    if (e >= entries) continue;
    if (x.first) a.first_part[x.segment] = part;
    if (!x.stays) continue;
    const int2 positions = reinterpret_cast<const int2*>(p.segment_positions)[x.segment];
    const int begin = max(x.block << p.page_shift, positions.x), end = min((x.block + 1) << p.page_shift, positions.y);
    a.page_indices[entry] = x.page;
    if (x.starts_part) {
      reinterpret_cast<int2*>(a.segment_rows)[part] = reinterpret_cast<const int2*>(p.segment_rows)[x.segment];
      a.segment_positions[2 * part] = begin;
      a.segment_entries[part] = p.segment_entries[x.segment] + e - p.page_indptr[x.segment];
      a.page_indptr[part] = entry;
      a.run_indptr[part] = run;
    }
    if (x.ends_part) a.segment_positions[2 * (part + x.starts_part - 1) + 1] = end;
    if (x.starts_run) {
      const int slot = (x.page << p.page_shift) + begin - (x.block << p.page_shift);
      reinterpret_cast<int2*>(a.runs)[run] = make_int2(slot, begin);  // the length comes last
    }
    if (x.ends_run) a.run_end[run + x.starts_run - 1] = end;
  }
}

__device__ __forceinline__ void write_rows(const DevicePagerParams& p, const StagingArrays& a) {
  ScanShared& s = shared_memory<ScanShared>();
  const int row = threadIdx.x, lane = row & 31, rows = p.state->rows;
  int entries = 0, total;
  if (row < rows) {
    for (int i = p.row_indptr[row]; i < p.row_indptr[row + 1]; ++i) {
      entries += a.first_part[p.row_segments[i] + 1] - a.first_part[p.row_segments[i]];
    }
  }
  const int begin = block_scan(entries, kWholeCta, s.scratch[0], &total);
  if (row < rows) a.row_indptr[row] = begin;
  if (row == 0) a.row_indptr[rows] = a.sizes[3] = total;
  __syncthreads();
  for (int r = row >> 5; r < rows; r += kPagerRows / 32) {
    int at = a.row_indptr[r];
    for (int i = p.row_indptr[r]; i < p.row_indptr[r + 1]; ++i) {
      const int first = a.first_part[p.row_segments[i]], parts = a.first_part[p.row_segments[i] + 1] - first;
      for (int k = lane; k < parts; k += 32) a.row_segments[at + k] = first + k;
      at += parts;
    }
  }
}

// CTA 0: row -> parts. All: the lengths of the runs.
__global__ void __launch_bounds__(kPagerRows)
    finish_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ StagingArrays a) {
  const int runs = a.sizes[2], threads = gridDim.x * kPagerRows;
  for (int run = blockIdx.x * kPagerRows + threadIdx.x; run < runs; run += threads) {
    a.runs[2 * run + 1] = a.run_end[run] - a.runs[2 * run + 1];
  }
  if (blockIdx.x == 0) write_rows(p, a);
}

}  // namespace pager

void launch_staging(const DevicePagerParams& params, const StagingArrays& arrays, const ResidentPages& resident,
                    int ctas, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(pager::ScanShared);
  pager::count_kernel<<<ctas, kStagingTile, 0, stream>>>(params, arrays, resident);
  pager::scan_kernel<<<1, kPagerRows, kBytes, stream>>>(params, arrays);
  pager::write_kernel<<<ctas, kStagingTile, kBytes, stream>>>(params, arrays, resident);
  pager::finish_kernel<<<ctas, kPagerRows, kBytes, stream>>>(params, arrays);
  FC_CUDA(cudaGetLastError());
}

}  // namespace flashcore
