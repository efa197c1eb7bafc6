// Small batches of short rows: each CTA compares its own rows with all others, entry by entry. That takes no rounds and
// no barrier, and for a tree of any height as long as for one prefix. Every CTA reads all rows. Limited by the L2's
// latency, once for each tile, and by a warp's 10 instructions for each pair and tile.
#pragma once
#include "pager/device_compare.cuh"

namespace flashcore::pager {

constexpr int kPairTile = 128;    // entries of a row that a warp compares at a time, four in each lane
constexpr int kPairTiles = 2;     // of a row, at most
constexpr int kPairRows = 2;      // of a CTA, at most
constexpr int kOthersAtOnce = 8;  // that a warp has under way
static_assert(kPairRows * kOthersAtOnce <= 32 && kPairRows <= kRankedAtOnce);

// The same in all CTAs. `longest`: entries of a row.
__device__ __forceinline__ bool compares_pairs(int rows, int longest) {
  return longest <= kPairTile * kPairTiles && rows <= kPairRows * static_cast<int>(gridDim.x);
}

__device__ __forceinline__ int4 load_entries(const DevicePagerParams& p, int row, int entry, int entries) {
  if (entry >= entries) return make_int4(0, 0, 0, 0);
  return *reinterpret_cast<const int4*>(p.table + static_cast<int64_t>(row) * p.table_stride + entry);
}

__device__ __forceinline__ bool differ(const int4& x, const int4& y) {
  return ((x.x ^ y.x) | (x.y ^ y.y) | (x.z ^ y.z) | (x.w ^ y.w)) != 0;
}

// s.pair[j][other], in entries: the j-th of this CTA's rows and the other one agree before it, and differ in the four
// entries from there on, or one of them ends in or before those. For pairs of rows that may share.
__device__ __forceinline__ void compare_pairs(const DevicePagerParams& p, OrderShared& s, int rows) {
  const int lane = threadIdx.x & 31, warps = kPagerRows / 32, first_row = blockIdx.x, step = gridDim.x;
  // Lane j * kOthersAtOnce + i keeps what is known of own row j and other row i.
  const int j_of_lane = lane / kOthersAtOnce, i_of_lane = lane % kOthersAtOnce * warps;
  const bool has_own = lane < kPairRows * kOthersAtOnce && first_row + j_of_lane * step < rows;
#pragma unroll 1
  for (int first = threadIdx.x >> 5; first < rows; first += warps * kOthersAtOnce) {
    unsigned open = __ballot_sync(kAllLanes, has_own && first + i_of_lane < rows);
#pragma unroll 1
    for (int entry = lane * 4; open; entry += kPairTile) {
      int4 others[kOthersAtOnce];
      constexpr unsigned kOfAnyOwn = 1 | 1 << kOthersAtOnce;
      static_assert(kPairRows == 2);
#pragma unroll
      for (int i = 0; i < kOthersAtOnce; ++i) {
        const int other = first + i * warps;
        others[i] = load_entries(p, other, entry, open & kOfAnyOwn << i ? s.blocks[other] : 0);
      }
      unsigned found = 0;  // lanes that have found a difference
#pragma unroll 1
      for (int j = 0; j < kPairRows; ++j) {
        const int row = first_row + j * step;
        const int4 own = load_entries(p, row, entry, row < rows ? s.blocks[row] : 0);
#pragma unroll
        for (int i = 0; i < kOthersAtOnce; ++i) {
          const unsigned lanes = __ballot_sync(kAllLanes, differ(own, others[i]));
          if (lane == j * kOthersAtOnce + i) found = lanes;
        }
      }
      const bool is_open = open >> lane & 1, ended = entry - lane * 4 == kPairTile * (kPairTiles - 1);
      const bool closes = is_open && (found || ended);
      if (closes) s.pair[j_of_lane][first + i_of_lane] = entry + 4 * ((found ? __ffs(found) - 1 : 32) - lane);
      open = __ballot_sync(kAllLanes, is_open && !closes);
    }
  }
}

// The j-th of this CTA's rows, `row`, and another one. As compare_pair.
__device__ __forceinline__ PairResult finish_pair(const DevicePagerParams& p, const OrderShared& s, int j, int row,
                                                  int other) {
  const int begin = s.pair[j][other], to = min(s.blocks[row], s.blocks[other]);
  int at = to;
  bool before = is_shorter(s, other, row);
  if (begin < to) {
    const int4 x = load_entries(p, row, begin, to), y = load_entries(p, other, begin, to);
    const int k = x.x != y.x ? 0 : x.y != y.y ? 1 : x.z != y.z ? 2 : 3;
    if (begin + k < to && component(x, k) != component(y, k)) {
      at = begin + k;
      before = component(y, k) < component(x, k);
    }
  }
  return {before, min(at << p.page_shift, min(s.end[row], s.end[other]))};
}

}  // namespace flashcore::pager
