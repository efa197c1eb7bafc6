// page_indices, run_indptr and runs from the segments, by all CTAs. Each takes a contiguous share of the page entries
// and its warps take tiles of 256 of them: first the pages, with a bit for every entry that starts a run; after a grid
// barrier the counts of the bits before a tile give its runs' indices, and the next set bit gives a run's end. Limited
// by memory: 4 bytes read and 4 written per entry, 8 written per run.
#pragma once
#include "pager/device_block.cuh"

namespace flashcore::pager {

constexpr int kEmitWords = kEmitTile / 32;

struct EmitShared {
  int page_indptr[3 * kPagerRows + 1];
  int table_offset[3 * kPagerRows];  // page of entry e of segment s is table[table_offset[s] + e]
  int2 positions[3 * kPagerRows];
  int tile_base[kPagerRows];  // runs of this CTA before a tile, for kPagerRows tiles at a time
  int scratch[2][32];
};

struct EmitShare {
  int segments, entries;     // of the layout
  int first_tile, end_tile;  // this CTA's
};

__device__ __forceinline__ EmitShare load_segments(const DevicePagerParams& p, EmitShared& s) {
  EmitShare share;
  share.segments = __ldcg(p.sizes), share.entries = __ldcg(p.sizes + 1);
  for (int i = threadIdx.x; i < share.segments; i += kPagerRows) {
    const int begin = __ldcg(p.page_indptr + i);
    s.page_indptr[i] = begin;
    s.table_offset[i] = __ldcg(p.segment_entries + i) - begin;
    s.positions[i] = __ldcg(reinterpret_cast<const int2*>(p.segment_positions) + i);
  }
  if (threadIdx.x == 0) s.page_indptr[share.segments] = share.entries;
  const int tiles = (share.entries + kEmitTile - 1) / kEmitTile, per_cta = (tiles + gridDim.x - 1) / gridDim.x;
  share.first_tile = min(tiles, per_cta * static_cast<int>(blockIdx.x));
  share.end_tile = min(tiles, share.first_tile + per_cta);
  __syncthreads();
  return share;
}

// The segment of entry e, which is not before `segment`; segments have entries, so few steps are enough inside a tile.
__device__ __forceinline__ int advance_to(const EmitShared& s, int segment, int e) {
  while (s.page_indptr[segment + 1] <= e) ++segment;
  return segment;
}

__device__ __forceinline__ int emit_pages(const DevicePagerParams& p, const EmitShared& s, const EmitShare& share,
                                          int tile) {
  const int lane = threadIdx.x & 31;
  int segment = find_interval(s.page_indptr, share.segments, tile * kEmitTile);
  int pages[kEmitWords], before[kEmitWords];
  unsigned begins = 0;  // bit i: the lane's entry of word i is the first of a segment
#pragma unroll
  for (int i = 0; i < kEmitWords; ++i) {  // all loads before the first use
    const int first = tile * kEmitTile + i * 32, e = first + lane;
    pages[i] = before[i] = -2;
    if (first < share.entries) segment = advance_to(s, segment, first);
    if (e < share.entries) {
      const int at = advance_to(s, segment, e);
      const int* entry = p.table + s.table_offset[at] + e;
      const bool begin = e == s.page_indptr[at];
      begins |= static_cast<unsigned>(begin) << i;
      pages[i] = *entry;
      if (lane == 0 && !begin) before[i] = entry[-1];
    }
  }
  unsigned starts = 0;  // lane i: of entries 32 i .. 32 i + 31 of the tile
#pragma unroll
  for (int i = 0; i < kEmitWords; ++i) {
    const int e = tile * kEmitTile + i * 32 + lane;
    const int below = __shfl_up_sync(kAllLanes, pages[i], 1);
    const bool is_start = (begins >> i & 1) || pages[i] != (lane > 0 ? below : before[i]) + 1;
    const unsigned word = __ballot_sync(kAllLanes, is_start && e < share.entries);
    if (lane == i) starts = word;
    if (e < share.entries) p.page_indices[e] = pages[i];
  }
  if (lane < kEmitWords) p.run_starts[static_cast<int64_t>(tile) * kEmitWords + lane] = starts;
  const int count = __reduce_add_sync(kAllLanes, static_cast<unsigned>(__popc(starts)));
  const unsigned words = __ballot_sync(kAllLanes, starts != 0);
  const int word = words ? __ffs(words) - 1 : 0;
  const unsigned bits = __shfl_sync(kAllLanes, starts, word);
  if (lane == 0) {
    p.tile_runs[tile] = count;
    p.tile_first[tile] = words ? tile * kEmitTile + word * 32 + __ffs(bits) - 1 : -1;
  }
  return count;
}

__device__ __forceinline__ void emit_all_pages(const DevicePagerParams& p, EmitShared& s, const EmitShare& share) {
  int runs = 0, total;
  for (int tile = share.first_tile + (threadIdx.x >> 5); tile < share.end_tile; tile += kPagerRows / 32) {
    runs += emit_pages(p, s, share, tile);
  }
  block_scan((threadIdx.x & 31) == 0 ? runs : 0, kWholeCta, s.scratch[0], &total);
  if (threadIdx.x == 0) p.cta_runs[blockIdx.x] = total;
}

// First entry after the tile that starts a run; the end of all entries if none does.
__device__ __forceinline__ int next_start(const DevicePagerParams& p, const EmitShare& share, int tile) {
  const int lane = threadIdx.x & 31, tiles = (share.entries + kEmitTile - 1) / kEmitTile;
  for (int at = tile + 1; at < tiles; at += 32) {
    const int first = at + lane < tiles ? __ldcg(p.tile_first + at + lane) : -1;
    const unsigned found = __ballot_sync(kAllLanes, first >= 0);
    if (found) return __shfl_sync(kAllLanes, first, __ffs(found) - 1);
  }
  return share.entries;
}

__device__ __forceinline__ void emit_runs(const DevicePagerParams& p, const EmitShared& s, const EmitShare& share,
                                          int tile, int base) {
  const int lane = threadIdx.x & 31, after = next_start(p, share, tile);
  unsigned starts = 0;
  if (lane < kEmitWords) starts = __ldcg(p.run_starts + static_cast<int64_t>(tile) * kEmitWords + lane);
  const unsigned words = __ballot_sync(kAllLanes, starts != 0);
  const int runs = warp_scan(__popc(starts)) - __popc(starts);
  int segment = find_interval(s.page_indptr, share.segments, tile * kEmitTile);
  for (unsigned rest = words; rest != 0; rest &= rest - 1) {
    const int i = __ffs(rest) - 1, first = tile * kEmitTile + i * 32, e = first + lane;
    const unsigned bits = __shfl_sync(kAllLanes, starts, i), later = rest & (rest - 1);
    const int next_word = later ? __ffs(later) - 1 : 0;
    const unsigned next_bits = __shfl_sync(kAllLanes, starts, next_word);
    const int index = base + __shfl_sync(kAllLanes, runs, i) + __popc(bits & ((1u << lane) - 1));
    segment = advance_to(s, segment, first);
    if (!(bits >> lane & 1)) continue;
    const unsigned above = lane < 31 ? bits & (~0u << (lane + 1)) : 0;
    const int stop = above   ? first + __ffs(above) - 1
                     : later ? tile * kEmitTile + next_word * 32 + __ffs(next_bits) - 1
                             : after;
    const int at = advance_to(s, segment, e), block = (s.positions[at].x >> p.page_shift) + e - s.page_indptr[at];
    const int begin = max(block << p.page_shift, s.positions[at].x);
    const int end = min((block + stop - e) << p.page_shift, s.positions[at].y);
    const int slot = (__ldcg(p.page_indices + e) << p.page_shift) + begin - (block << p.page_shift);
    reinterpret_cast<int2*>(p.runs)[index] = make_int2(slot, end - begin);
    if (e == s.page_indptr[at]) p.run_indptr[at] = index;
  }
}

__device__ __forceinline__ void emit_all_runs(const DevicePagerParams& p, EmitShared& s, const EmitShare& share) {
  int before = 0, total = 0, base;
  for (int cta = threadIdx.x; cta < gridDim.x; cta += kPagerRows) {
    const int runs = __ldcg(p.cta_runs + cta);
    total += runs;
    if (cta < blockIdx.x) before += runs;
  }
  block_scan(before, kWholeCta, s.scratch[0], &base);
  block_scan(total, kWholeCta, s.scratch[1], &total);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.sizes[2] = total;
    p.run_indptr[share.segments] = total;
  }
  for (int first = share.first_tile; first < share.end_tile; first += kPagerRows) {
    const int tile = first + threadIdx.x;
    int of_batch;
    s.tile_base[threadIdx.x] =
        base + block_scan(tile < share.end_tile ? __ldcg(p.tile_runs + tile) : 0, kWholeCta, s.scratch[0], &of_batch);
    base += of_batch;
    __syncthreads();
    const int end = min(share.end_tile, first + kPagerRows);
    for (int t = first + (threadIdx.x >> 5); t < end; t += kPagerRows / 32)
      emit_runs(p, s, share, t, s.tile_base[t - first]);
    __syncthreads();
  }
}

}  // namespace flashcore::pager
