// table[r][b] = the page of block b of row r, for the blocks of each row, and what changed by it.
//
// Grid: any, 512 threads. Every CTA derives all row ranges for itself (B <= 1024 lengths, one scan), then warps take
// chunks of 512 entries in turn, so that one long row is spread over the card as well as many short ones. 16 KB of
// shared memory (20 where rows have a begin). Limited by memory: 8 bytes read per entry, 4 more written only where an
// entry changed; 4 read and 4 written once a thread has found a change.
//
// Three instances: SGLang's table of slots, rows from position 0 on, for decode; `kRanged`, any table and any range;
// and `kDrafts`, SGLang's table again, with a row for each branch of a request's drafts.
#pragma once
#include "pager/device_block.cuh"

namespace flashcore::pager {

constexpr int kSnapshotThreads = 512;
constexpr int kRowsPerThread = kPagerRows / kSnapshotThreads;
constexpr int kVectors = kSnapshotChunk / 128;

struct SnapshotShared {
  int table_row[kPagerRows];
  int blocks[kPagerRows];      // one past the last block
  int old_blocks[kPagerRows];  // of the last build, whose entries must not change
  int begin[kPagerRows];       // first position; only with kRanged. With kDrafts: tokens without the drafts
  int chunk_begin[kPagerRows + 1];
  int scratch[32];
};

struct RowRange {
  int table_row, begin, end;
  bool may_share;
  unsigned long long violation;
  int given_begin;  // as the caller gave it
};

__device__ __forceinline__ int saturate(int64_t value) {
  return static_cast<int>(min(max(value, -int64_t{0x80000000}), int64_t{0x7FFFFFFF}));
}

// A draft's range ends with its branch's first draft.
template <bool kRanged, bool kDrafts>
__device__ __forceinline__ RowRange read_range(const DevicePagerParams& p, const SnapshotInput& in, int row) {
  const bool identity = kRanged && in.table_rows.data == nullptr;
  const int request = kDrafts ? row / in.branches : row;
  const int64_t table_row = identity ? row : load_integer(in.table_rows, request);
  const int64_t end = load_integer(in.ends, request) + (kDrafts ? 1 : 0);
  const int64_t begin = kRanged && in.begins.data ? load_integer(in.begins, row) : 0;
  const int64_t capacity = min(in.num_positions, static_cast<int64_t>(p.table_stride) << p.page_shift);
  RowRange range{static_cast<int>(table_row), 0, 0, false, 0, static_cast<int>(begin)};
  if (table_row < 0 || table_row >= in.num_table_rows) {
    range.table_row = 0;
    range.violation = encode_violation(false, row, kTableRow, saturate(table_row));
  } else if (begin < 0 || end < begin) {
    range.violation = encode_violation(false, row, kOrder, saturate(end));
  } else {
    if (end > capacity) range.violation = encode_violation(false, row, kRange, saturate(end));
    range.end = static_cast<int>(min(end, capacity));
    range.begin = static_cast<int>(min(begin, capacity));
  }
  range.may_share = p.sharing && (identity || range.table_row != 0) && range.end > range.begin;
  return range;
}

// CTA 0 keeps the ranges for the build, and says if rows did more than grow.
template <bool kRanged>
__device__ __forceinline__ void store_range(const DevicePagerParams& p, const SnapshotInput& in, int row,
                                            const RowRange& range) {
  const int share = range.may_share;
  const bool grown =
      !kRanged && in.rows == p.state->forest_rows && range.end >= p.forest_end[row] && share == p.forest_share[row];
  p.row_end[row] = range.end;
  p.row_share[row] = share;
  if (kRanged) {
    p.row_begin[row] = range.begin;
    p.given_begin[row] = range.given_begin;
  }
  if (!grown) p.state->changed = 1;
  if (range.violation) report_violation(p.state, range.violation);
}

// Where a row's ids lie.
struct RowSource {
  const int* ids;
  bool consecutive;  // one entry per block, one after the other, aligned to 16 bytes
  int begin;         // ids before it are not looked at
  // With kDrafts: the branch's pages, from the one that the request's last tokens may share with its first branch on,
  // lie `skipped` blocks further.
  int own_block, skipped;
};

template <bool kRanged, bool kDrafts>
__device__ __forceinline__ RowSource find_source(const DevicePagerParams& p, const SnapshotInput& in,
                                                 const SnapshotShared& s, int row) {
  const int* ids = in.ids + s.table_row[row] * in.row_stride;
  const int entry_shift = kRanged ? in.entry_shift : 0;
  const bool unit = !kRanged || in.entry_stride == 1;
  RowSource source{ids, unit && entry_shift == p.page_shift && (reinterpret_cast<uintptr_t>(ids) & 15) == 0,
                   kRanged ? s.begin[row] : 0, 0, 0};
  if constexpr (kDrafts) {
    const int tokens = s.begin[row], mask = (1 << p.page_shift) - 1;
    source.own_block = tokens >> p.page_shift;
    source.skipped = row % in.branches * (((tokens & mask) + in.steps + mask) >> p.page_shift);
  }
  return source;
}

// Four consecutive blocks of a row from `block` on. Streamed: the table, which the build reads, is to stay in L2.
template <bool kRanged, bool kDrafts>
__device__ __forceinline__ void load_ids(const SnapshotInput& in, const RowSource& source, int page_shift, int block,
                                         int blocks, int (&ids)[4]) {
  if (source.consecutive && block + 3 < (kDrafts ? min(blocks, source.own_block) : blocks)) {
    const int4 v = __ldcs(reinterpret_cast<const int4*>(source.ids + block));
    ids[0] = v.x, ids[1] = v.y, ids[2] = v.z, ids[3] = v.w;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ids[k] = 0;
    if (block + k >= blocks) continue;
    int64_t entry = static_cast<int64_t>(block + k) << page_shift;
    if constexpr (kRanged) {
      if (block + k < source.begin >> page_shift) continue;
      entry = (max(entry, static_cast<int64_t>(source.begin)) >> in.entry_shift) * in.entry_stride;
    }
    if constexpr (kDrafts) {
      if (block + k >= source.own_block) entry += static_cast<int64_t>(source.skipped) << page_shift;
      entry = min(entry, in.num_positions - 1);
    }
    ids[k] = __ldcs(source.ids + entry);
  }
}

struct Sampling {
  int shift;  // 0: none
  bool all;   // samples that have not changed are written too
};

// Writes the pages of blocks [block, block + 4) of [first, blocks) where they differ from `old`, or anyway, and a
// sample of them. Returns whether an entry of the last build has changed.
__device__ __forceinline__ bool store_pages(const DevicePagerParams& p, int row, int block, int first, int blocks,
                                            int old_blocks, int id_shift, const int (&ids)[4], const int4& old,
                                            bool anyway, int4* stored, const Sampling& sampling) {
  const int was[4] = {old.x, old.y, old.z, old.w};
  int pages[4];
  bool differs = anyway, old_differs = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool valid = block + k >= first && block + k < blocks;
    int page = ids[k] >> id_shift;
    if (valid && (ids[k] < 0 || page >= p.num_pages)) {
      report_violation(p.state, encode_violation(true, row, block + k, ids[k]));
      page = 0;
    }
    pages[k] = valid ? page : was[k];
    differs |= pages[k] != was[k];
    old_differs |= pages[k] != was[k] && block + k < old_blocks;
  }
  if (differs) *stored = make_int4(pages[0], pages[1], pages[2], pages[3]);
  if (sampling.shift > 0 && (differs || sampling.all)) {
    const int sample = block >> sampling.shift;
    if (sample << sampling.shift == block && sample < kSamples) p.samples[sample * p.max_rows + row] = pages[0];
  }
  return old_differs;
}

// `changed`: this thread has found an entry of the last build changed. What is stored need not be read any more then.
template <bool kRanged, bool kDrafts>
__device__ __forceinline__ bool copy_chunk(const DevicePagerParams& p, const SnapshotInput& in, const SnapshotShared& s,
                                           const Sampling& sampling, int chunk, const bool changed) {
  const int row = find_interval(s.chunk_begin, in.rows, chunk);
  const int first_block = kRanged ? s.begin[row] >> p.page_shift : 0, blocks = s.blocks[row];
  const int first = (first_block & ~3) + (chunk - s.chunk_begin[row]) * kSnapshotChunk + 4 * (threadIdx.x & 31);
  const RowSource source = find_source<kRanged, kDrafts>(p, in, s, row);
  const int id_shift = kRanged ? in.id_shift : p.page_shift, old_blocks = s.old_blocks[row];
  int4* stored = reinterpret_cast<int4*>(p.table + static_cast<int64_t>(row) * p.table_stride);
  int ids[kVectors][4];
  int4 old[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {  // all loads before the first use
    const int block = first + i * 128;
    if (block < blocks) {
      load_ids<kRanged, kDrafts>(in, source, p.page_shift, block, blocks, ids[i]);
      old[i] = changed ? make_int4(0, 0, 0, 0) : stored[block / 4];
    }
  }
  bool found = changed;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int block = first + i * 128;
    if (block < blocks) {
      found |= store_pages(p, row, block, first_block, blocks, old_blocks, id_shift, ids[i], old[i], changed,
                           stored + block / 4, sampling);
    }
  }
  return found;
}

template <bool kRanged, bool kDrafts>
__global__ void __launch_bounds__(kSnapshotThreads, 2)
    snapshot_kernel(const __grid_constant__ DevicePagerParams p, const __grid_constant__ SnapshotInput in) {
  SnapshotShared& s = shared_memory<SnapshotShared>();
  const int mask = (1 << p.page_shift) - 1, old_rows = p.state->forest_rows;
  const Sampling sampling{kRanged ? 0 : p.state->sample_shift, p.state->resample != 0};
  int chunks[kRowsPerThread], sum = 0, total;
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int row = threadIdx.x * kRowsPerThread + k;
    chunks[k] = 0;
    if (row < in.rows) {
      const RowRange range = read_range<kRanged, kDrafts>(p, in, row);
      int blocks = (range.end + mask) >> p.page_shift;
      if constexpr (kDrafts) {
        s.begin[row] = max(range.end - 1, 0);
        if (range.end > 0) blocks = min((range.end - 1 + in.steps + mask) >> p.page_shift, p.table_stride);
      }
      s.table_row[row] = range.table_row;
      s.blocks[row] = blocks;
      const int old_end = p.forest_end[row];
      s.old_blocks[row] = row < old_rows ? (old_end + mask) >> p.page_shift : 0;
      int copied = blocks;
      if constexpr (kRanged) {
        s.begin[row] = range.begin;
        copied = range.begin < range.end ? blocks - (range.begin >> p.page_shift & ~3) : 0;
      }
      chunks[k] = (copied + kSnapshotChunk - 1) / kSnapshotChunk;
      if (blockIdx.x == 0) store_range<kRanged>(p, in, row, range);
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
    changed = copy_chunk<kRanged, kDrafts>(p, in, s, sampling, chunk, changed);
  }
  // Once per CTA: thousands of stores to one word would take their turns.
  if (__syncthreads_or(changed) && threadIdx.x == 0) p.state->changed = 1;
}

}  // namespace flashcore::pager
