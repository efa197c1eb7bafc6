// Sorts the rows that may share by their page sequences, and finds what each has in common with the row before it.
//
// Invariant of a round: the active rows of a class agree on entries [0, from). Each is compared with the class's
// leader; it leaves the leader at entry `lcp`, where it holds page `id` (-1: it ends there), `less` than the leader's
// or not. For two rows of the class
//   lcp equal, id equal    they agree beyond lcp: the same class of the next round (id -1: the same pages altogether)
//   lcp equal, id not      they part at lcp, ordered by id
//   lcp not equal          they part at the smaller lcp, where the other one goes with the leader
// so every pair is decided in exactly one round, and the rank of a row is the number of rows found to be before it.
// Every CTA keeps the classes of all rows for itself (one thread each); CTAs divide the comparisons, then the pairs by
// row.
#pragma once
#include "pager/device_block.cuh"

namespace flashcore::pager {

constexpr int kClassSlots = 4 * kPagerRows;  // sparse: a row's search is short

struct OrderShared {
  int blocks[kPagerRows], end[kPagerRows];
  int leader[kPagerRows];  // of the row's class; -1: the row is decided
  int parted[kPagerRows];  // the leader that lcp, id and less are about; -1: none
  int from[kPagerRows], to[kPagerRows];
  int lcp[kPagerRows], id[kPagerRows], less[kPagerRows];
  int tile_begin[kPagerRows + 1];
  int slot_row[kClassSlots];                 // hash table of (leader, lcp, id): a row that has it; -1: free
  unsigned slot_best[kClassSlots];           // the new leader, below random bits
  int slot_shared[kClassSlots];              // 1: by more than one row
  int rank[kPagerRows], common[kPagerRows];  // of the rows that are this CTA's
  int scratch[32], sharers[32];
};

__device__ __forceinline__ unsigned mix(unsigned x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

__device__ __forceinline__ void clear_classes(OrderShared& s) {
  for (int i = threadIdx.x; i < kClassSlots; i += kPagerRows) {
    s.slot_row[i] = -1;
    s.slot_best[i] = ~0u;
    s.slot_shared[i] = 0;
  }
}

// Classes of the rows that are still to be compared, by (leader, lcp, id): the slot of `row`'s.
__device__ __forceinline__ int find_class(OrderShared& s, int row) {
  int slot = mix(s.leader[row] * 0x9E3779B1u + s.lcp[row] * 0x85EBCA6Bu + s.id[row]) & (kClassSlots - 1);
  for (;; slot = (slot + 1) & (kClassSlots - 1)) {
    const int other = atomicCAS(&s.slot_row[slot], -1, row);
    if (other < 0) return slot;
    if (s.leader[other] == s.leader[row] && s.lcp[other] == s.lcp[row] && s.id[other] == s.id[row]) {
      atomicOr(&s.slot_shared[slot], 1);
      return slot;
    }
  }
}

// Splits the classes, gives each a leader, and says if any row is left to be compared. The slots are clear before.
__device__ __forceinline__ bool split_classes(OrderShared& s, int round) {
  const int row = threadIdx.x;
  bool active = s.leader[row] >= 0 && s.id[row] >= 0;
  int slot = 0;
  if (active) {
    slot = find_class(s, row);
    const unsigned draw = mix(row + 0x9E3779B1u * (round + 1));
    atomicMin(&s.slot_best[slot], (draw & ~unsigned{kPagerRows - 1}) | row);
  }
  __syncthreads();
  active = active && s.slot_shared[slot];
  const int leader = active ? static_cast<int>(s.slot_best[slot] % kPagerRows) : -1;
  s.parted[row] = s.leader[row];
  s.leader[row] = leader;
  s.from[row] = s.lcp[row] + 1;
  s.to[row] = active ? min(s.blocks[row], s.blocks[leader]) : 0;
  return __syncthreads_or(active);
}

struct Sharers {
  int before, total;  // rows that may share: before this thread's row, and in all
};

// All rows that may share are one class; its leader is the first of them.
__device__ __forceinline__ Sharers start_class(OrderShared& s, bool share) {
  const int row = threadIdx.x, lane = row & 31, warp = row >> 5, warps = kPagerRows / 32;
  const unsigned sharing = __ballot_sync(kAllLanes, share);
  if (lane == 0) {
    s.scratch[warp] = sharing ? row + __ffs(sharing) - 1 : kNever;
    s.sharers[warp] = __popc(sharing);
  }
  __syncthreads();
  const unsigned leader = __reduce_min_sync(kAllLanes, static_cast<unsigned>(lane < warps ? s.scratch[lane] : kNever));
  const int own = lane < warps ? s.sharers[lane] : 0;
  const int total = __reduce_add_sync(kAllLanes, static_cast<unsigned>(own));
  const int before = __reduce_add_sync(kAllLanes, static_cast<unsigned>(lane < warp ? own : 0));
  s.leader[row] = share ? static_cast<int>(leader) : -1;
  s.from[row] = 0;
  s.to[row] = share ? min(s.blocks[row], s.blocks[leader]) : 0;
  __syncthreads();
  return {before + __popc(sharing & ((1u << lane) - 1)), total};
}

// What is known of a row's first difference from its leader, smallest first: entry << 32 | page << 1 | page is less.
// All ones: none found.
using Mismatch = unsigned long long;

__device__ __forceinline__ int component(const int4& v, int k) {
  return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

// The first difference of two rows in a tile, which begins at `begin` and ends at `to` or earlier; the same in all
// lanes. Whether there is one.
__device__ __forceinline__ bool compare_tile(const int* row, const int* leader, int begin, int to, Mismatch* mismatch) {
  unsigned mine = kNever;
  int page = 0, leader_page = 0;
#pragma unroll
  for (int i = 0; i < kCompareTile / 128; ++i) {
    const int e = begin + i * 128 + (threadIdx.x & 31) * 4;
    if (e < to) {
      const int4 x = *reinterpret_cast<const int4*>(row + e), y = *reinterpret_cast<const int4*>(leader + e);
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

__device__ __forceinline__ void compare_rows(const DevicePagerParams& p, OrderShared& s, int rows, int round) {
  const int row = threadIdx.x;
  int total, tiles = 0;
  if (s.leader[row] >= 0 && s.leader[row] != row && s.from[row] < s.to[row]) {
    tiles = (s.to[row] - (s.from[row] & ~3) + kCompareTile - 1) / kCompareTile;
  }
  s.tile_begin[row] = block_scan(tiles, kWholeCta, s.scratch, &total);
  if (row == 0) s.tile_begin[kPagerRows] = total;
  // The next round's words: last read before this round's barrier, next written after it.
  if (blockIdx.x == gridDim.x - 1 && row < rows) p.mismatch[(round + 1) % 3 * p.max_rows + row] = ~Mismatch{0};
  __syncthreads();
  // A warp's tiles are consecutive, so that it can leave a row once it has found a difference.
  const int warps = gridDim.x * (kPagerRows / 32), span = (total + warps - 1) / warps;
  const int first = ((row >> 5) * gridDim.x + blockIdx.x) * span;
  compare_tiles(p, s, rows, first, min(total, first + span), p.mismatch + round % 3 * p.max_rows);
}

__device__ __forceinline__ void load_results(const DevicePagerParams& p, OrderShared& s, int round) {
  const int row = threadIdx.x;
  if (s.leader[row] >= 0) {
    const Mismatch found = __ldcg(p.mismatch + round % 3 * p.max_rows + row);
    const int at = static_cast<int>(min(found >> 32, Mismatch{kNever})), to = s.to[row];
    const bool ended = at >= to && to == s.blocks[row];  // else the leader did
    s.lcp[row] = min(at, to);
    s.id[row] = at < to ? static_cast<int>(static_cast<unsigned>(found) >> 1)
                : ended ? -1
                        : p.table[static_cast<int64_t>(row) * p.table_stride + to];
    s.less[row] = at < to ? found & 1 : ended;
  }
  __syncthreads();
}

struct PairResult {  // of row x and row y
  bool before;       // y is before x
  int common;        // tokens that both read from the same slots
};

struct RowResult {
  int lcp, id, less, end;
};

// Rows of one class that a round parts.
__device__ __forceinline__ PairResult compare_pair(const RowResult& x, const RowResult& y, bool y_first,
                                                   int page_shift) {
  bool before;
  if (x.lcp != y.lcp) {
    before = y.lcp < x.lcp ? y.less : !x.less;
  } else if (x.id != y.id) {
    before = y.id < x.id;
  } else if (x.id < 0) {  // the same pages: the shorter, then the index
    before = y.end != x.end ? y.end < x.end : y_first;
  } else {
    return {false, 0};
  }
  return {before, min(min(x.lcp, y.lcp) << page_shift, min(x.end, y.end))};
}

__device__ __forceinline__ RowResult result_of(const OrderShared& s, int row) {
  return {s.lcp[row], s.id[row], s.less[row], s.end[row]};
}

// Counts what the last round has parted.
__device__ __forceinline__ void rank_rows(const DevicePagerParams& p, OrderShared& s, int rows) {
  const int other = threadIdx.x, other_leader = s.parted[other];
  if ((other & ~31) >= rows) return;
  const RowResult y = result_of(s, other);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int leader = s.parted[row];
    if (leader < 0) continue;
    PairResult r{false, 0};
    if (other != row && other_leader == leader) r = compare_pair(result_of(s, row), y, other < row, p.page_shift);
    const int count = __popc(__ballot_sync(kAllLanes, r.before));
    const unsigned common = __reduce_max_sync(kAllLanes, static_cast<unsigned>(r.before ? r.common : 0));
    if ((other & 31) == 0 && count > 0) {
      atomicAdd(&s.rank[row], count);
      atomicMax(&s.common[row], static_cast<int>(common));
    }
  }
}

// Rows of one root, which read or borrow from the same position on, are one class; roots ascend.
__device__ __forceinline__ bool start_roots(const DevicePagerParams& p, OrderShared& s, const int* root, int rows) {
  const int row = threadIdx.x;
  clear_classes(s);
  s.leader[row] = min(s.leader[row], 0);
  s.lcp[row] = root[row];
  s.id[row] = 0;
  __syncthreads();
  for (int mine = blockIdx.x; mine < rows; mine += gridDim.x) {
    const bool before = s.leader[mine] >= 0 && s.leader[row] >= 0 && root[row] < root[mine];
    const int count = __syncthreads_count(before);
    if (row == 0) s.rank[mine] = count;
  }
  const bool active = split_classes(s, -1);
  s.from[row] = root[row] >> p.page_shift;
  s.parted[row] = -1;
  __syncthreads();
  return active;
}

// Writes sorted_rows and sorted_lcp; complete for all after the barrier's next phase. `root`: of each row, in shared
// memory; nullptr: all rows begin at 0.
__device__ __forceinline__ Sharers order_rows(const DevicePagerParams& p, OrderShared& s, int rows, const int* root,
                                              GridBarrier& barrier) {
  const int row = threadIdx.x, mask = (1 << p.page_shift) - 1;
  const bool share = row < rows && p.row_share[row];
  s.end[row] = share ? p.row_end[row] : 0;
  s.blocks[row] = (s.end[row] + mask) >> p.page_shift;
  s.rank[row] = s.common[row] = 0;
  s.parted[row] = -1;
  const Sharers sharers = start_class(s, share);
  bool active = sharers.total > 0;
  if (root) active = start_roots(p, s, root, rows);
#pragma unroll 1
  for (int round = 0; active; ++round) {
    compare_rows(p, s, rows, round);
    barrier.arrive();
    // Meanwhile: the pairs of the round before.
    rank_rows(p, s, rows);
    clear_classes(s);
    barrier.wait();
    load_results(p, s, round);
    active = split_classes(s, round);
  }
  rank_rows(p, s, rows);
  __syncthreads();
  if (share && row % gridDim.x == blockIdx.x) {
    p.sorted_rows[s.rank[row]] = row;
    p.sorted_lcp[s.rank[row]] = s.common[row];
  }
  return sharers;
}

}  // namespace flashcore::pager
