// Comparison of rows with others, entry by entry, by all CTAs.
#pragma once
#include "pager/device_block.cuh"

namespace flashcore::pager {

constexpr int kClassSlots = 4 * kPagerRows;  // sparse: a row's search is short
constexpr int kRankedAtOnce = 8;

struct OrderShared {
  int blocks[kPagerRows], end[kPagerRows];  // 0: the row may not share
  int leader[kPagerRows];                   // what the row is compared with; -1: nothing
  int from[kPagerRows], to[kPagerRows];     // the entries that are
  int parent[kPagerRows];                   // the row that lcp, id and less are about; -1: none
  int lcp[kPagerRows], id[kPagerRows], less[kPagerRows];
  int node[kPagerRows];  // see tree_node
  int tile_begin[kPagerRows + 1];
  union {
    struct {                            // while rows are compared
      int slot_row[kClassSlots];        // hash table of (parent, lcp, id): a row that has it; -1: free
      unsigned slot_best[kClassSlots];  // the row that the others join, below random bits
      int slot_shared[kClassSlots];     // 1: by more than one row
    };
    unsigned pair[kRankedAtOnce][kPagerRows];  // then, of this CTA's rows and all others: see rank_rows
  };
  int rank[kPagerRows], common[kPagerRows];  // of the rows that are this CTA's
  unsigned around[kPagerRows];               // rows that have as much in common, see rank_rows
  int samples[kPagerRows];                   // [rows, kSamples] of some of the rows that are this CTA's
  unsigned nearest[kPagerRows / kSamples];   // for each of them, how near the nearest row before it is, and which
  int scratch[32], first_sharer[32], sharers[32], longest[32];  // of each warp
  int deep;                                                     // 1: proposals are worth while
};

// What is known of a row's first difference from its leader, smallest first: entry << 32 | page << 1 | page is less.
// All ones: none found.
using Mismatch = unsigned long long;

__device__ __forceinline__ int component(const int4& v, int k) {
  return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

// Row x reads less than row y, of the same pages, or as much and has the smaller index.
__device__ __forceinline__ bool is_shorter(const OrderShared& s, int x, int y) {
  return s.end[x] != s.end[y] ? s.end[x] < s.end[y] : x < y;
}

struct PairResult {  // of row x and row y
  bool before;       // y is before x
  int common;        // tokens that both read from the same slots
};

// The first difference of two rows in a tile, which begins at `begin` and ends at `to` or earlier; the same in all
// lanes. Whether there is one.
__device__ __forceinline__ bool compare_tile(const int* row, const int* leader, int begin, int to, Mismatch* mismatch) {
  unsigned mine = kNever;
  int page = 0, leader_page = 0;
#pragma unroll
  for (int i = 0; i < kCompareTile / 128; ++i) {
    const int e = begin + i * 128 + (threadIdx.x & 31) * 4;
    if (e < to) {
      // A row is read once, its leader often: the L2 is to keep what other rows have still to read of the snapshot.
      const int4 x = __ldcs(reinterpret_cast<const int4*>(row + e)), y = *reinterpret_cast<const int4*>(leader + e);
      const int k = x.x != y.x ? 0 : x.y != y.y ? 1 : x.z != y.z ? 2 : 3;
      if (mine == kNever && component(x, k) != component(y, k)) {
        mine = e + k;
        page = component(x, k), leader_page = component(y, k);
      }
    }
  }
  const unsigned first = __reduce_min_sync(kAllLanes, mine);
  if (first >= static_cast<unsigned>(to)) return false;
  if (mine == first) {
    const unsigned low = static_cast<unsigned>(page) << 1 | (page < leader_page);
    atomicMin(mismatch, static_cast<Mismatch>(first) << 32 | low);
  }
  return true;
}

// Tiles [first, last) of all rows' tiles.
__device__ __forceinline__ void compare_tiles(const DevicePagerParams& p, const OrderShared& s, int rows, int first,
                                              int last, Mismatch* mismatch) {
  int row = -1, next = first;  // `next`: the first tile of the row after `row`
  for (int tile = first; tile < last;) {
    if (tile == next) {
      row = find_interval(s.tile_begin, rows, tile);
      next = s.tile_begin[row + 1];
    }
    const int begin = (s.from[row] & ~3) + (tile - s.tile_begin[row]) * kCompareTile;
    const bool found =
        compare_tile(p.table + static_cast<int64_t>(row) * p.table_stride,
                     p.table + static_cast<int64_t>(s.leader[row]) * p.table_stride, begin, s.to[row], mismatch + row);
    tile = found ? next : tile + 1;  // what comes after the first difference does not matter
  }
}

// Who takes part in comparing the rows that have a leader.
struct Comparers {
  int ctas, cta;  // this one is cta of them
};

__device__ __forceinline__ void compare_rows(const DevicePagerParams& p, OrderShared& s, int rows, int round,
                                             const Comparers& comparers) {
  const int row = threadIdx.x;
  int total, tiles = 0;
  if (s.leader[row] >= 0 && s.from[row] < s.to[row]) {
    tiles = (s.to[row] - (s.from[row] & ~3) + kCompareTile - 1) / kCompareTile;
  }
  s.tile_begin[row] = block_scan(tiles, kWholeCta, s.scratch, &total);
  if (row == 0) s.tile_begin[kPagerRows] = total;
  // The next round's words: last read before this round's barrier, next written after it.
  if (blockIdx.x == gridDim.x - 1 && row < rows) p.mismatch[(round + 1) % 3 * p.max_rows + row] = ~Mismatch{0};
  __syncthreads();
  // A warp's tiles are consecutive, so that it can leave a row once it has found a difference.
  const int warps = comparers.ctas * (kPagerRows / 32), warp = (row >> 5) * comparers.ctas + comparers.cta;
  const int span = total / warps, rest = total - span * warps, first = warp * span + min(warp, rest);
  compare_tiles(p, s, rows, first, first + span + (warp < rest), p.mismatch + round % 3 * p.max_rows);
}

}  // namespace flashcore::pager
