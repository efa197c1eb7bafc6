// Sorts the rows that may share by their page sequences, and finds what each has in common with the row before it.
//
// Rows are compared with others in rounds; a row keeps what it found about the last one, its parent: it leaves the
// parent at entry `lcp`, where it holds page `id` (-1: it ends there), `less` than the parent's or not. A row leaves
// its parent after the parent has left its own. So the rows make a tree. Two rows with one parent
//   lcp equal, id equal    agree beyond lcp: one of them becomes the other's parent, and they are compared from there
//                          on in the next round (id -1: the same pages altogether, no more to compare)
//   lcp equal, id not      part at lcp, ordered by id
//   lcp not equal          part at the smaller lcp, where the other one goes with the parent
// Once all rows of one parent differ in (lcp, id), any two rows are where their ancestors below the common one are: the
// rank of a row is the number of rows that are found to be before it.
//
// The first round compares rows with what samples propose (device_proposals.cuh), and mostly is the last one. Should a
// row leave its parent too early, the proposals were wrong: all rows are compared with the first one. A round then
// splits classes of rows that agree so far, as quicksort splits strings.
// Every CTA keeps the tree of all rows for itself (one thread each); CTAs divide the comparisons, then the ranks.
//
// Small batches of short rows go without a tree: every row is compared with every other one (device_pairs.cuh).
#pragma once
#include "pager/device_compare.cuh"
#include "pager/device_pairs.cuh"
#include "pager/device_proposals.cuh"

namespace flashcore::pager {

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

// Rows of one parent that agree beyond where they leave it are a class, (parent, lcp, id): the slot of `row`'s.
__device__ __forceinline__ int find_class(OrderShared& s, int row) {
  int slot = mix(s.parent[row] * 0x9E3779B1u + s.lcp[row] * 0x85EBCA6Bu + s.id[row]) & (kClassSlots - 1);
  for (;; slot = (slot + 1) & (kClassSlots - 1)) {
    const int other = atomicCAS(&s.slot_row[slot], -1, row);
    if (other < 0) return slot;
    if (s.parent[other] == s.parent[row] && s.lcp[other] == s.lcp[row] && s.id[other] == s.id[row]) {
      atomicOr(&s.slot_shared[slot], 1);
      return slot;
    }
  }
}

// Puts this thread's row into its class, if it has one. The slots are clear before.
__device__ __forceinline__ int join_class(OrderShared& s, int round) {
  const int row = threadIdx.x;
  if (s.parent[row] < 0 || s.id[row] < 0) return -1;
  const int slot = find_class(s, row);
  const unsigned draw = mix(row + 0x9E3779B1u * (round + 1));
  atomicMin(&s.slot_best[slot], (draw & ~unsigned{kPagerRows - 1}) | row);
  return slot;
}

// In each class of several rows, all but one are to be compared with that one. Says if there are any. Leaders are drawn
// by hash, so that a chain of B prefixes takes log B rounds.
__device__ __forceinline__ bool assign_leaders(OrderShared& s, int slot) {
  const int row = threadIdx.x;
  const int leader = slot >= 0 && s.slot_shared[slot] ? static_cast<int>(s.slot_best[slot] % kPagerRows) : row;
  const bool active = leader != row;
  s.leader[row] = active ? leader : -1;
  s.from[row] = s.lcp[row] + 1;
  s.to[row] = active ? min(s.blocks[row], s.blocks[leader]) : 0;
  return __syncthreads_or(active);
}

struct Sharers {
  int before, total;        // rows that may share: before this thread's row, and in all
  int first;                // kNever: none
  int longest;              // blocks
  bool deep, contradicted;  // proposals are worth while; they did not hold
};

__device__ __forceinline__ Sharers count_sharers(OrderShared& s, bool share) {
  const int row = threadIdx.x, lane = row & 31, warp = row >> 5, warps = kPagerRows / 32;
  const unsigned sharing = __ballot_sync(kAllLanes, share);
  const unsigned most = __reduce_max_sync(kAllLanes, static_cast<unsigned>(s.blocks[row]));
  if (lane == 0) {
    s.first_sharer[warp] = sharing ? row + __ffs(sharing) - 1 : kNever;
    s.sharers[warp] = __popc(sharing);
    s.longest[warp] = most;
  }
  if (row == 0) s.deep = 0;
  __syncthreads();
  const unsigned first =
      __reduce_min_sync(kAllLanes, static_cast<unsigned>(lane < warps ? s.first_sharer[lane] : kNever));
  const int own = lane < warps ? s.sharers[lane] : 0;
  const int total = __reduce_add_sync(kAllLanes, static_cast<unsigned>(own));
  const int before = __reduce_add_sync(kAllLanes, static_cast<unsigned>(lane < warp ? own : 0));
  const int longest = __reduce_max_sync(kAllLanes, static_cast<unsigned>(lane < warps ? s.longest[lane] : 0));
  return {before + __popc(sharing & ((1u << lane) - 1)), total, static_cast<int>(first), longest, false, false};
}

// All rows are to be compared with the first one.
__device__ __forceinline__ void lead_by(OrderShared& s, int first) {
  const int row = threadIdx.x;
  const bool active = s.blocks[row] > 0 && row != first;
  s.parent[row] = -1;
  s.leader[row] = active ? first : -1;
  s.from[row] = 0;
  s.to[row] = active ? min(s.blocks[row], s.blocks[first]) : 0;
}

// Rows of one root, which read or borrow from the same position on, are one class; roots ascend. Says if there are
// rows to be compared.
__device__ __forceinline__ bool lead_by_roots(const DevicePagerParams& p, OrderShared& s, const int* root) {
  const int row = threadIdx.x;
  clear_classes(s);
  s.parent[row] = s.blocks[row] > 0 ? 0 : -1;
  s.lcp[row] = root[row];
  s.id[row] = 0;
  __syncthreads();
  const int slot = join_class(s, -1);
  __syncthreads();
  const bool active = assign_leaders(s, slot);
  s.parent[row] = -1;
  s.from[row] = root[row] >> p.page_shift;
  __syncthreads();
  return active;
}

// What the round has found. The leaders are parents now.
__device__ __forceinline__ void take_results(const DevicePagerParams& p, OrderShared& s, Mismatch found) {
  const int row = threadIdx.x, leader = s.leader[row];
  if (leader >= 0) {
    const int at = static_cast<int>(min(found >> 32, Mismatch{kNever})), to = s.to[row];
    const bool ended = at >= to && to == s.blocks[row];  // else the leader did
    s.parent[row] = leader;
    s.lcp[row] = min(at, to);
    s.id[row] = at < to ? static_cast<int>(static_cast<unsigned>(found) >> 1)
                : ended ? -1
                        : p.table[static_cast<int64_t>(row) * p.table_stride + to];
    s.less[row] = at < to ? found & 1 : ended && (to < s.blocks[leader] || is_shorter(s, row, leader));
  }
  __syncthreads();
}

// A row has left its parent before the parent left its own, or was not compared far enough.
__device__ __forceinline__ bool contradicts(const OrderShared& s) {
  const int row = threadIdx.x, parent = s.parent[row];
  if (parent < 0) return false;
  const bool too_early = s.parent[parent] >= 0 && s.lcp[row] <= s.lcp[parent];
  const bool undecided = s.lcp[row] >= s.to[row] && s.to[row] < min(s.blocks[row], s.blocks[parent]);
  return too_early || (s.leader[row] >= 0 && undecided);
}

// `root`: as in order_rows.
__device__ __forceinline__ PairResult compare_pair(const OrderShared& s, int x, int y, const int* root,
                                                   int page_shift) {
  int a = x, b = y, below_a = -1, below_b = -1;  // up to the row where their ways meet, and the rows before it
  if (s.node[x] == s.node[y] && s.node[x] >= kPagerRows) below_a = x, below_b = y, b = a;  // one parent
  while (a != b) {
    const int node_a = s.node[a], node_b = s.node[b];
    if (node_a < kPagerRows && node_b < kPagerRows) return {root[b] < root[a], 0};
    if (node_a / kPagerRows >= node_b / kPagerRows) below_a = a, a = node_a % kPagerRows;
    if (node_b / kPagerRows >= node_a / kPagerRows) below_b = b, b = node_b % kPagerRows;
  }
  const int lcp_x = below_a >= 0 ? s.lcp[below_a] : kNever, lcp_y = below_b >= 0 ? s.lcp[below_b] : kNever;
  bool before;
  if (lcp_x != lcp_y) {
    before = lcp_y < lcp_x ? s.less[below_b] : !s.less[below_a];
  } else if (s.id[below_a] != s.id[below_b]) {
    before = s.id[below_b] < s.id[below_a];
  } else {  // the same pages
    before = is_shorter(s, y, x);
  }
  return {before, min(min(lcp_x, lcp_y) << page_shift, min(s.end[x], s.end[y]))};
}

// The number of a row's ancestors and its parent, in one word: below kPagerRows if it has none.
__device__ __forceinline__ int tree_node(const OrderShared& s) {
  const int parent = s.parent[threadIdx.x];
  int ancestors = 0;
  for (int up = parent; up >= 0; up = s.parent[up]) ++ancestors;
  return ancestors * kPagerRows + max(parent, 0);
}

// Rank of this CTA's rows, what each has in common with the row before it, and the extent of the group of rows that
// agree so far: intervals of the order.
//
// s.pair[j][other]: common << 1 | other is before, of the j-th row at a time. A thread takes one of the others for
// every `groups`th row, so that small batches have more than one row at a time.
//
// pair_of(j, row, other): the PairResult of the j-th row of those at a time and another one; both may share.
template <class PairOf>
__device__ __forceinline__ void rank_rows(OrderShared& s, int rows, PairOf pair_of) {
  const int width = (rows + 31) & ~31, groups = kPagerRows / width, step = gridDim.x;
  const int group = threadIdx.x / width, other = threadIdx.x - group * width;
  const bool leads = (threadIdx.x & 31) == 0;
#pragma unroll 1
  for (int first = blockIdx.x; first < rows; first += kRankedAtOnce * step) {
    const int num_rows = group < groups ? min(kRankedAtOnce, (rows - first + step - 1) / step) : 0;
#pragma unroll 1
    for (int j = group; j < num_rows; j += groups) {
      const int row = first + j * step;
      PairResult r{false, 0};
      if (s.blocks[row] > 0 && other < rows && other != row && s.blocks[other] > 0) {
        r = pair_of(j, row, other);
      }
      s.pair[j][other] = static_cast<unsigned>(r.common) << 1 | r.before;
      const int count = __popc(__ballot_sync(kAllLanes, r.before));
      const unsigned common = __reduce_max_sync(kAllLanes, static_cast<unsigned>(r.before ? r.common : 0));
      if (leads && count > 0) {
        atomicAdd(&s.rank[row], count);
        atomicMax(&s.common[row], static_cast<int>(common));
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int j = group; j < num_rows; j += groups) {
      const int row = first + j * step;
      const unsigned depth = s.common[row], pair = s.pair[j][other], common = pair >> 1;
      if (depth == 0) continue;
      const unsigned group_of = __ballot_sync(kAllLanes, common >= depth);
      if (group_of == 0) continue;
      const unsigned before = __ballot_sync(kAllLanes, pair & 1), deeper = __ballot_sync(kAllLanes, common > depth);
      if (leads) {
        const unsigned above = group_of & before, below = group_of & ~before, deeper_below = deeper & ~before;
        atomicAdd(&s.around[row], __popc(above) | __popc(below) << 11 | __popc(deeper_below) << 22);
      }
    }
    __syncthreads();
  }
}

// What the forest is told of a row that may share, at its place in the order.
struct SortedRow {
  int row;
  int lcp;         // tokens in common with the row before
  int begin, end;  // places of the rows that have as much in common with this one; if lcp > 0
  bool last;       // no row after it leaves these rows where it does
};

__device__ __forceinline__ void store_sorted(const DevicePagerParams& p, const OrderShared& s, int row) {
  const int rank = s.rank[row];
  const unsigned around = s.around[row], above = around & 2047, below = around >> 11 & 2047, deeper = around >> 22;
  reinterpret_cast<int4*>(p.sorted)[rank] =
      make_int4(row << 1 | (below == deeper), s.common[row], rank - above, rank + 1 + below);
}

__device__ __forceinline__ SortedRow load_sorted(const DevicePagerParams& p, int rank) {
  const int4 x = __ldcg(reinterpret_cast<const int4*>(p.sorted) + rank);
  return {x.x >> 1, x.y, x.z, x.w, (x.x & 1) != 0};
}

struct RowState {
  int end, share;  // as p.row_end and p.row_share
};

// Writes `sorted`, complete for all after the barrier's next phase. `mine`: of this thread's row.
// `root`: of each row, in shared memory; nullptr: all rows begin at 0.
__device__ __forceinline__ Sharers order_rows(const DevicePagerParams& p, OrderShared& s, int rows,
                                              const RowState& mine, const int* root, GridBarrier& barrier) {
  const int row = threadIdx.x, mask = (1 << p.page_shift) - 1;
  const bool share = row < rows && mine.share;
  s.end[row] = share ? mine.end : 0;
  s.blocks[row] = (s.end[row] + mask) >> p.page_shift;
  s.rank[row] = s.common[row] = 0;
  s.around[row] = 0;
  s.parent[row] = s.leader[row] = -1;
  s.from[row] = s.to[row] = s.node[row] = 0;
  const int shift = root ? 0 : p.state->sample_shift;
  Sharers sharers = count_sharers(s, share);
  const bool all_pairs = !root && compares_pairs(rows, sharers.longest);
  bool active = sharers.total > 1 && !all_pairs, proposed = active && shift > 0;
  Comparers comparers{static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
  if (proposed) {
    const OwnRows own = own_rows(rows);
    propose_leaders(p, s, rows, shift, own);
    comparers = own.comparers;
  } else if (active && root) {
    active = lead_by_roots(p, s, root);
  } else if (active) {
    lead_by(s, sharers.first);
  }
#pragma unroll 1
  for (int round = 0; active; ++round) {
    compare_rows(p, s, rows, round, comparers);
    comparers = {static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
    barrier.arrive();
    clear_classes(s);  // meanwhile
    barrier.wait();
    const Mismatch found = row < rows ? __ldcg(p.mismatch + round % 3 * p.max_rows + row) : 0;
    if (proposed && round == 0) load_proposals(p, s, share && row != sharers.first, sharers.first);
    take_results(p, s, found);
    if (round > 0 && s.leader[row] >= 0 && (s.lcp[row] - s.from[row]) >> sample_shift(sharers.longest))
      atomicOr(&s.deep, 1);
    const int slot = join_class(s, round);
    if (__syncthreads_or(proposed && contradicts(s))) {
      proposed = false, sharers.contradicted = true;
      lead_by(s, sharers.first);
    } else {
      s.node[row] = tree_node(s);
      active = assign_leaders(s, slot);
    }
  }
  sharers.deep = s.deep;
  if (all_pairs) {
    compare_pairs(p, s, rows);
    __syncthreads();
    rank_rows(s, rows, [&](int j, int x, int y) { return finish_pair(p, s, j, x, y); });
  } else {
    rank_rows(s, rows, [&](int, int x, int y) { return compare_pair(s, x, y, root, p.page_shift); });
  }
  if (share && row % gridDim.x == blockIdx.x) store_sorted(p, s, row);
  return sharers;
}

}  // namespace flashcore::pager
