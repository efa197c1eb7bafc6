// table[r][b] = req_to_token[req_pool_indices[r]][b * P] / P for the blocks b of each row, and what changed by it.
//
// Grid: any, 512 threads. Every CTA derives all row ranges for itself (B <= 1024 lengths, one scan), then warps take
// chunks of 512 entries in turn, so that one long row is spread over the card as well as many short ones. 16 KB of
// shared memory. Limited by memory: 8 bytes read per entry, 4 more written only where an entry changed.
#pragma once
#include "pager/device_block.cuh"

namespace flashcore::pager {

constexpr int kSnapshotThreads = 512;
constexpr int kRowsPerThread = kPagerRows / kSnapshotThreads;
constexpr int kVectors = kSnapshotChunk / 128;

struct SnapshotShared {
  int pool_row[kPagerRows];
  int blocks[kPagerRows];
  int old_blocks[kPagerRows];  // of the last build, whose entries must not change
  int chunk_begin[kPagerRows + 1];
  int scratch[32];
};

struct RowRange {
  int pool_row, end;
  unsigned long long violation;
};

__device__ __forceinline__ int64_t load_integer(const void* values, bool are_64bit, int i) {
  return are_64bit ? static_cast<const int64_t*>(values)[i] : static_cast<const int*>(values)[i];
}

__device__ __forceinline__ int saturate(int64_t value) {
  return static_cast<int>(min(max(value, -int64_t{0x80000000}), int64_t{0x7FFFFFFF}));
}

__device__ __forceinline__ RowRange read_range(const DevicePagerParams& p, const SnapshotInput& in, int row) {
  const int64_t pool_row = load_integer(in.req_pool_indices, in.indices_are_64bit, row);
  const int64_t end = load_integer(in.seq_lens, in.lens_are_64bit, row);
  const int64_t capacity = min(in.num_positions, static_cast<int64_t>(p.table_stride) << p.page_shift);
  const int value = saturate(end);
  if (pool_row < 0 || pool_row >= in.num_table_rows) {
    return {0, 0, encode_violation(false, row, 5, saturate(pool_row))};
  }
  if (end < 0) return {static_cast<int>(pool_row), 0, encode_violation(false, row, 3, value)};
  if (end > capacity)
    return {static_cast<int>(pool_row), static_cast<int>(capacity), encode_violation(false, row, 2, value)};
  return {static_cast<int>(pool_row), value, 0};
}

// CTA 0 keeps the ranges for the build, and says if rows did more than grow.
__device__ __forceinline__ void store_range(const DevicePagerParams& p, const SnapshotInput& in, int row,
                                            const RowRange& range) {
  const int share = p.sharing && range.pool_row != 0 && range.end > 0;
  const bool grown = in.rows == p.state->forest_rows && range.end >= p.forest_end[row] && share == p.forest_share[row];
  p.row_end[row] = range.end;
  p.row_share[row] = share;
  if (!grown) p.state->changed = 1;
  if (range.violation) report_violation(p.state, range.violation);
}

// Four consecutive blocks of a row from `block` on. Streamed: the table, which the build reads, is to stay in L2.
__device__ __forceinline__ void load_ids(const int* source, int page_shift, int block, int blocks, bool aligned,
                                         int (&ids)[4]) {
  if (aligned && block + 3 < blocks) {
    const int4 v = __ldcs(reinterpret_cast<const int4*>(source + block));
    ids[0] = v.x, ids[1] = v.y, ids[2] = v.z, ids[3] = v.w;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ids[k] = block + k < blocks ? __ldcs(source + (static_cast<int64_t>(block + k) << page_shift)) : 0;
  }
}

// Writes the pages of blocks [block, block + 4) where they differ from `old`. Returns whether an entry of the last
// build has changed.
__device__ __forceinline__ bool store_pages(const DevicePagerParams& p, int row, int block, int blocks, int old_blocks,
                                            const int (&ids)[4], const int4& old, int4* stored) {
  const int was[4] = {old.x, old.y, old.z, old.w};
  int pages[4];
  bool differs = false, old_differs = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool valid = block + k < blocks;
    int page = ids[k] >> p.page_shift;
    if (valid && (ids[k] < 0 || page >= p.num_pages)) {
      report_violation(p.state, encode_violation(true, row, block + k, ids[k]));
      page = 0;
    }
    pages[k] = valid ? page : was[k];
    differs |= pages[k] != was[k];
    old_differs |= pages[k] != was[k] && block + k < old_blocks;
  }
  if (differs) *stored = make_int4(pages[0], pages[1], pages[2], pages[3]);
  return old_differs;
}

__device__ __forceinline__ bool copy_chunk(const DevicePagerParams& p, const SnapshotInput& in, const SnapshotShared& s,
                                           int chunk) {
  const int row = find_interval(s.chunk_begin, in.rows, chunk);
  const int first = (chunk - s.chunk_begin[row]) * kSnapshotChunk + 4 * (threadIdx.x & 31);
  const int blocks = s.blocks[row], old_blocks = s.old_blocks[row];
  const int* source = in.req_to_token + s.pool_row[row] * in.row_stride;
  const bool aligned = p.page_shift == 0 && (reinterpret_cast<uintptr_t>(source) & 15) == 0;
  int4* stored = reinterpret_cast<int4*>(p.table + static_cast<int64_t>(row) * p.table_stride);
  int ids[kVectors][4];
  int4 old[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {  // all loads before the first use
    const int block = first + i * 128;
    if (block < blocks) {
      load_ids(source, p.page_shift, block, blocks, aligned, ids[i]);
      old[i] = stored[block / 4];
    }
  }
  bool changed = false;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int block = first + i * 128;
    if (block < blocks) changed |= store_pages(p, row, block, blocks, old_blocks, ids[i], old[i], stored + block / 4);
  }
  return changed;
}

__global__ void __launch_bounds__(kSnapshotThreads, 2)
    snapshot_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ SnapshotInput in) {
  SnapshotShared& s = shared_memory<SnapshotShared>();
  const int mask = (1 << p.page_shift) - 1, old_rows = p.state->forest_rows;
  int chunks[kRowsPerThread], sum = 0, total;
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int row = threadIdx.x * kRowsPerThread + k;
    chunks[k] = 0;
    if (row < in.rows) {
      const RowRange range = read_range(p, in, row);
      const int blocks = (range.end + mask) >> p.page_shift;
      s.pool_row[row] = range.pool_row;
      s.blocks[row] = blocks;
      const int old_end = p.forest_end[row];
      s.old_blocks[row] = row < old_rows ? (old_end + mask) >> p.page_shift : 0;
      chunks[k] = (blocks + kSnapshotChunk - 1) / kSnapshotChunk;
      if (blockIdx.x == 0) store_range(p, in, row, range);
    }
    sum += chunks[k];
  }
  int before = block_scan(sum, kWholeCta, s.scratch, &total);
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    s.chunk_begin[threadIdx.x * kRowsPerThread + k] = before;
    before += chunks[k];
  }
  if (threadIdx.x == 0) {
    s.chunk_begin[kPagerRows] = total;
    if (blockIdx.x == 0) p.state->rows = in.rows;
  }
  __syncthreads();
  const int warps = gridDim.x * (kSnapshotThreads / 32);
  bool changed = false;
  for (int chunk = (threadIdx.x >> 5) * gridDim.x + blockIdx.x; chunk < total; chunk += warps) {
    changed |= copy_chunk(p, in, s, chunk);
  }
  // Once per CTA: thousands of stores to one word would take their turns.
  if (__syncthreads_or(changed) && threadIdx.x == 0) p.state->changed = 1;
}

}  // namespace flashcore::pager
