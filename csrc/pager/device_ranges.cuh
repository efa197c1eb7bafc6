// Rows that begin after position 0: what a row borrows from another one to be sorted among the rows that read more.
//
// The anchor of a row is the row with the smallest (begin, index) that begins before it and reads the same page where
// it begins. The row's entries before its own first block are filled with those of its anchor, of the anchor's anchor
// and so on: up to its root, where the last of them begins. The borrowed entries only place the row: no segment covers
// a position before a row's begin. Rows of different roots have nothing in common. (Sequences in csrc/pager/forest.cc.)
//
// Loads bypass L1, where lines read before the entries are borrowed would go stale.
#pragma once
#include "pager/device_order.cuh"

namespace flashcore::pager {

struct RangesShared {
  OrderShared order;                       // of the step after
  int begin[kPagerRows], end[kPagerRows];  // end 0: the row may not share
  int anchor[kPagerRows], root[kPagerRows];
  int tile_begin[kPagerRows + 1];
  int scratch[32];
};

// Warps take rows in turn.
__device__ __forceinline__ void find_anchors(const DevicePagerParams& p, const RangesShared& s, int rows) {
  const int lane = threadIdx.x & 31;
  for (int row = (threadIdx.x >> 5) * gridDim.x + blockIdx.x; row < rows; row += gridDim.x * (kPagerRows / 32)) {
    const int begin = s.begin[row], block = begin >> p.page_shift;
    unsigned best_begin = kNever, best = kNever;
    if (s.end[row] > 0 && begin > 0) {
      const int page = __ldcg(p.table + static_cast<int64_t>(row) * p.table_stride + block);
      for (int other = lane; other < rows; other += 32) {
        const bool earlier = s.begin[other] < begin && begin < s.end[other];
        if (!earlier || s.begin[other] >= static_cast<int>(best_begin)) continue;
        if (__ldcg(p.table + static_cast<int64_t>(other) * p.table_stride + block) != page) continue;
        best_begin = s.begin[other], best = other;
      }
    }
    const unsigned first = __reduce_min_sync(kAllLanes, best_begin);
    const unsigned anchor = __reduce_min_sync(kAllLanes, best_begin == first ? best : kNever);
    if (lane == 0) p.anchor[row] = anchor == kNever ? -1 : static_cast<int>(anchor);
  }
}

// Entries [root's block, first block) of each row, and zeros before them up to a multiple of four entries, as rows are
// compared. Reads and writes different entries: no row borrows what another one has borrowed.
__device__ __forceinline__ void borrow_entries(const DevicePagerParams& p, RangesShared& s, int rows) {
  const int row = threadIdx.x, lane = row & 31;
  int tiles = 0, total;
  if (row < rows && s.end[row] > 0) {
    const int blocks = (s.begin[row] >> p.page_shift) - (s.root[row] >> p.page_shift & ~3);
    tiles = (blocks + kCompareTile - 1) / kCompareTile;
  }
  s.tile_begin[row] = block_scan(tiles, kWholeCta, s.scratch, &total);
  if (row == 0) s.tile_begin[kPagerRows] = total;
  __syncthreads();
  const int warps = gridDim.x * (kPagerRows / 32);
  for (int tile = (row >> 5) * gridDim.x + blockIdx.x; tile < total; tile += warps) {
    const int borrower = find_interval(s.tile_begin, rows, tile), root = s.root[borrower] >> p.page_shift;
    const int stop = s.begin[borrower] >> p.page_shift;
    int block = (root & ~3) + (tile - s.tile_begin[borrower]) * kCompareTile + lane;
    const int end = min(stop, block - lane + kCompareTile);
    for (; block < end; block += 32) {
      int page = 0;
      if (block >= root) {
        int owner = s.anchor[borrower];
        while (s.begin[owner] >> p.page_shift > block) owner = s.anchor[owner];
        page = __ldcg(p.table + static_cast<int64_t>(owner) * p.table_stride + block);
      }
      p.table[static_cast<int64_t>(borrower) * p.table_stride + block] = page;
    }
  }
}

// Two phases of the barrier. Returns the root of each row, in `s`.
__device__ __forceinline__ const int* complete_rows(const DevicePagerParams& p, RangesShared& s, int rows,
                                                    GridBarrier& barrier) {
  const int row = threadIdx.x;
  const bool share = row < rows && p.row_share[row];
  s.begin[row] = share ? p.row_begin[row] : 0;
  s.end[row] = share ? p.row_end[row] : 0;
  __syncthreads();
  find_anchors(p, s, rows);
  barrier.arrive();
  barrier.wait();
  s.anchor[row] = row < rows ? __ldcg(p.anchor + row) : -1;
  __syncthreads();
  int top = row;
  while (s.anchor[top] >= 0) top = s.anchor[top];
  s.root[row] = s.begin[top];
  __syncthreads();
  borrow_entries(p, s, rows);
  barrier.arrive();
  barrier.wait();
  return s.root;
}

}  // namespace flashcore::pager
