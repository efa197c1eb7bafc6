// The forest of sorted rows, and all of the layout but the page entries. One CTA, thread k for the row at position k of
// row_order, or for the boundary k between positions k and k + 1.
//
// A group of rows that agree up to a depth is an interval of positions; the last boundary of exactly that depth in it
// stands for it. The CTAs that sorted the rows have found the intervals. Groups decide bottom-up, in integers
// (csrc/pager/forest.cc says what): the last child to decide goes on with its parent.
// Only the warps that have rows take part (`threads` of them): with 256 rows the barriers and the instructions of the
// other 24 would take longer than the work.
#pragma once
#include "pager/device_block.cuh"
#include "pager/device_order.cuh"

namespace flashcore::pager {

struct ForestShared {
  int row_tokens[kPagerRows];              // by row
  int order[kPagerRows], end[kPagerRows];  // by position
  int begin[kPagerRows];                   // by position; only with kRanged
  int lcp[kPagerRows];                     // of boundaries: tokens that both sides have in common
  int key[kPagerRows];                     // of boundary k's group, see group_key
  int node[2 * kPagerRows];                // boundary that stands for the group of a key
  int row_begin[kPagerRows], row_end[kPagerRows];
  int parent[kPagerRows];            // -1: none
  int children[kPagerRows];          // their number
  unsigned of_children[kPagerRows];  // sums over those that have decided, see decide
  int kept[kPagerRows];
  int latest[kPagerRows];                 // latest begin of the group's rows; only with kRanged
  int above[kPagerRows];                  // nearest kept group around group k; -1: none
  int group_pages[kPagerRows];            // of kept group k
  int groups_at[kPagerRows];              // kept groups whose rows begin at k
  int pages_at[kPagerRows];               // and their pages
  int first_segment[kPagerRows];          // by position: of the groups that begin there, and the row's own
  int first_page[kPagerRows];             // and their first page entry
  int segment[kPagerRows];                // of kept group k
  int position[kPagerRows];               // by row
  int entries_of[kPagerRows];             // by row, of row_segments
  int around[kPagerRows];                 // by position: the innermost kept group; -1: none
  int own[kPagerRows], head[kPagerRows];  // by position: segments that are the row's alone; -1: none
  int pages[2 * kPagerRows];              // of a segment, and
  int segment_begin[2 * kPagerRows];      // its first position: only while rows are appended
  int of_groups;                          // entries of row_segments that kept groups have
  int scratch[32];
  int2 scratch2[32];
};

// A group's own number: its first row, or, if the group around it begins there too, kPagerRows + its last row. `left`
// and `right`: what the rows beside the group have in common with it.
__device__ __forceinline__ int group_key(int row_begin, int row_end, int left, int right) {
  return left < right ? kPagerRows + row_end - 1 : row_begin;
}

// The group around boundaries `left` and `right` that is the deeper one; -1: none. `left` may be -1; the last
// boundary's lcp is 0.
__device__ __forceinline__ int deeper_node(const ForestShared& s, int left, int right) {
  const int x = left >= 0 ? s.lcp[left] : 0, y = s.lcp[right];
  return x == 0 && y == 0 ? -1 : s.node[s.key[x >= y ? left : right]];
}

struct Placement {
  bool may_move;     // this thread's row may come to lie elsewhere by appending
  bool any_sharing;  // some rows have a prefix in common
  bool stands;       // boundary k stands for its group
};

// row_order: rows that may share as sorted, then the others by index. Waits for the sorted rows. `mine`: of row k.
template <bool kRanged>
__device__ __forceinline__ Placement place_rows(const DevicePagerParams& p, ForestShared& s, int rows, int threads,
                                                const RowState& mine, const Sharers& sharers,
                                                const GridBarrier& barrier) {
  const int k = threadIdx.x, sharing = sharers.total;
  s.row_tokens[k] = k < rows ? mine.end : 0;
  s.kept[k] = s.groups_at[k] = s.pages_at[k] = s.children[k] = 0;
  s.of_children[k] = 0;
  if (k == 0) s.of_groups = 0;
  if (k < rows && !mine.share) s.order[sharing + k - sharers.before] = k;
  barrier.wait(threads);
  const SortedRow none{k < rows ? s.order[k] : 0, 0, 0, 0, false};
  const SortedRow own = k < sharing ? load_sorted(p, k) : none, next = k + 1 < sharing ? load_sorted(p, k + 1) : none;
  const int lcp = next.lcp, row = own.row, end = k < rows ? s.row_tokens[row] : 0;
  s.lcp[k] = lcp;
  s.row_begin[k] = next.begin, s.row_end[k] = next.end;
  s.order[k] = row;
  s.end[k] = end;
  if constexpr (kRanged) s.begin[k] = k < rows ? p.row_begin[row] : 0;
  if (k < rows) {
    s.position[row] = k;
    p.row_order[k] = row;
  }
  // A row that is a prefix of its neighbour may diverge with its next token; an empty row that grows joins the order
  // anew.
  const bool may_move = (k + 1 < sharing && lcp >= min(end, s.row_tokens[next.row])) || (k < rows && end == 0);
  return {may_move, any_of_first(threads, lcp > 0), lcp > 0 && next.last};
}

__device__ __forceinline__ void build_tree(ForestShared& s, int threads, bool stands) {
  const int k = threadIdx.x, left = s.row_begin[k] - 1, right = s.row_end[k] - 1;
  if (s.lcp[k] > 0) {
    const int key = group_key(left + 1, right + 1, left >= 0 ? s.lcp[left] : 0, s.lcp[right]);
    s.key[k] = key;
    if (stands) s.node[key] = k;
  }
  sync_first(threads);
  if (stands) {
    const int parent = deeper_node(s, left, right);
    s.parent[k] = parent;
    if (parent >= 0) atomicAdd(&s.children[parent], 1);
  }
  sync_first(threads);
}

// The latest begin of the rows of group k: no position before it is read by all of them.
__device__ __forceinline__ int latest_begin(const ForestShared& s, int k) {
  int latest = 0;
  for (int at = s.row_begin[k]; at < s.row_end[k]; ++at) latest = max(latest, s.begin[at]);
  return latest;
}

// of_children: tops, segments that would start their reading, 11 bits; their rows, 11 bits; their number, 10 bits.
template <bool kRanged>
__device__ __forceinline__ void decide(const DevicePagerParams& p, ForestShared& s, int threads, bool stands) {
  const int k = threadIdx.x;
  if constexpr (kRanged) {
    s.latest[k] = stands ? latest_begin(s, k) : 0;
    sync_first(threads);
  }
  int node = stands && s.children[k] == 0 ? k : -1;
  unsigned of_children = 0;
  while (node >= 0) {
    const unsigned rows = s.row_end[node] - s.row_begin[node];
    const unsigned tops = (of_children & 2047) + rows - (of_children >> 11 & 2047);
    const int parent = s.parent[node];
    const int above = parent >= 0 ? s.lcp[parent] : 0;
    const int64_t length = s.lcp[node] - (kRanged ? max(above, s.latest[node]) : above);
    const bool pays = length * (tops - 1) * p.token_cost >= p.segment_cost + rows * p.partial_cost;
    const bool kept = pays && (!kRanged || length > 0);
    if (kept) {
      s.kept[node] = 1;
      atomicAdd(&s.groups_at[s.row_begin[node]], 1);
      atomicAdd(&s.of_groups, static_cast<int>(rows));
    }
    node = -1;
    if (parent < 0) continue;
    const unsigned mine = (kept ? 1 : tops) | rows << 11 | 1u << 22;
    of_children = atomicAdd(&s.of_children[parent], mine) + mine;
    if (static_cast<int>(of_children >> 22) == s.children[parent]) node = parent;
  }
  sync_first(threads);
}

// Attention keeps a partial result for every row of every segment. Where there would be more of them than it has room
// for, nothing is shared: every row then has one segment.
template <bool kRanged>
__device__ __forceinline__ void bound_entries(const DevicePagerParams& p, ForestShared& s, int rows, int threads) {
  const int k = threadIdx.x;
  if (s.of_groups + (kRanged ? 2 * rows : rows) <= p.max_entries) return;
  s.kept[k] = s.groups_at[k] = 0;
  sync_first(threads);
}

__device__ __forceinline__ int nearest_kept(const ForestShared& s, int node) {
  while (node >= 0 && !s.kept[node]) node = s.parent[node];
  return node;
}

__device__ __forceinline__ int count_pages(int begin, int end, int page_shift) {
  return ((end + (1 << page_shift) - 1) >> page_shift) - (begin >> page_shift);
}

// Position k of row_order is segment_rows' first, for segments of one or more rows.
__device__ __forceinline__ void write_segment(const DevicePagerParams& p, const ForestShared& s, int segment,
                                              int row_begin, int row_end, int begin, int end, int first_page) {
  reinterpret_cast<int2*>(p.segment_rows)[segment] = make_int2(row_begin, row_end);
  reinterpret_cast<int2*>(p.segment_positions)[segment] = make_int2(begin, end);
  p.segment_entries[segment] = s.order[row_begin] * p.table_stride + (begin >> p.page_shift);
  p.page_indptr[segment] = first_page;
}

// Where the reading of kept group k begins.
template <bool kRanged>
__device__ __forceinline__ int group_begin(const ForestShared& s, int k) {
  if (s.above[k] >= 0) return s.lcp[s.above[k]];
  return kRanged ? s.latest[k] : 0;
}

// Segments in the order (first row, first position): what a row reads alone before its outermost kept group (its head,
// where it begins before others of the group), the kept groups that begin at a row, outermost first, then what is left
// of the row. Returns whether no row may move, see Placement.
template <bool kRanged>
__device__ __forceinline__ bool write_segments(const DevicePagerParams& p, ForestShared& s, int rows, int threads,
                                               bool may_move) {
  const int k = threadIdx.x;
  const bool kept = s.kept[k];
  s.above[k] = kept ? nearest_kept(s, s.parent[k]) : -1;
  if (kept) {
    s.group_pages[k] = count_pages(group_begin<kRanged>(s, k), s.lcp[k], p.page_shift);
    atomicAdd(&s.pages_at[s.row_begin[k]], s.group_pages[k]);
  }
  const int around = k < rows ? nearest_kept(s, deeper_node(s, k - 1, k)) : -1;
  const int own_begin = around >= 0 ? s.lcp[around] : kRanged && k < rows ? s.begin[k] : 0;
  const bool has_own = k < rows && own_begin < s.end[k];
  int entries = has_own, outermost = around;
  for (int g = around; g >= 0; g = nearest_kept(s, s.parent[g])) ++entries, outermost = g;
  const bool has_head = kRanged && outermost >= 0 && s.begin[k] < s.latest[outermost];
  entries += has_head;
  s.around[k] = around;
  if (k < rows) s.entries_of[s.order[k]] = entries;
  const bool appendable = !any_of_first(threads, may_move);

  // Three sums at once: segments by position, at most 3071, entries by row, below 2^20, and pages by position.
  static_assert(kPagerRows * (kPagerRows + 7) / 2 < 1 << 20);
  const int entries_of_row = k < rows ? s.entries_of[k] : 0;
  const int segments = has_head + s.groups_at[k] + has_own;
  const int head_pages = has_head ? count_pages(s.begin[k], s.latest[outermost], p.page_shift) : 0;
  const int own_pages = has_own ? count_pages(own_begin, s.end[k], p.page_shift) : 0;
  int2 total;
  const int2 before = block_scan(make_int2(segments << 20 | entries_of_row, head_pages + s.pages_at[k] + own_pages),
                                 threads, s.scratch2, &total);
  const int head = static_cast<unsigned>(before.x) >> 20, first = head + has_head, own = first + s.groups_at[k];
  const int entry = before.x & ((1 << 20) - 1), first_page = before.y + head_pages;
  s.first_segment[k] = first;
  s.first_page[k] = first_page;
  s.own[k] = has_own ? own : -1;
  if constexpr (kRanged) s.head[k] = has_head ? head : -1;
  if (has_head) write_segment(p, s, head, k, k + 1, s.begin[k], s.latest[outermost], before.y);
  if (has_own) write_segment(p, s, own, k, k + 1, own_begin, s.end[k], first_page + s.pages_at[k]);
  if (k < rows) p.row_indptr[k] = entry;
  if (k == 0) {
    const int num_segments = static_cast<unsigned>(total.x) >> 20, num_entries = total.x & ((1 << 20) - 1);
    p.row_indptr[rows] = num_entries;
    p.page_indptr[num_segments] = total.y;
    p.sizes[0] = num_segments;
    p.sizes[1] = total.y;
    p.sizes[3] = num_entries;
  }
  sync_first(threads);
  if (kept) {
    int segment = s.first_segment[s.row_begin[k]], page = s.first_page[s.row_begin[k]];
    for (int g = s.above[k]; g >= 0 && s.row_begin[g] == s.row_begin[k]; g = s.above[g]) {
      ++segment;
      page += s.group_pages[g];
    }
    write_segment(p, s, segment, s.row_begin[k], s.row_end[k], group_begin<kRanged>(s, k), s.lcp[k], page);
    s.segment[k] = segment;
  }
  sync_first(threads);
  if (k < rows) {  // row k
    const int at = s.position[k], own_segment = s.own[at];
    p.own_segment[k] = own_segment;
    int* out = p.row_segments + entry + entries_of_row;
    if (own_segment >= 0) *--out = own_segment;
    for (int g = s.around[at]; g >= 0; g = s.above[g]) *--out = s.segment[g];
    if (kRanged && s.head[at] >= 0) *--out = s.head[at];
  }
  return appendable;
}

// The snapshot is now the forest's. `mine`: of row k.
__device__ __forceinline__ void finish_build(const DevicePagerParams& p, int rows, const RowState& mine,
                                             unsigned long long violation, bool appended) {
  const int k = threadIdx.x;
  if (k < rows) {
    p.forest_end[k] = mine.end;
    p.forest_share[k] = mine.share;
    p.mismatch[k] = ~0ull;  // as round 0 of the next build wants it
  }
  if (k == 0) {
    PagerState& state = *p.state;
    p.sizes[2] = p.sizes[4] = p.sizes[6] = p.sizes[7] = 0;
    p.sizes[5] = appended;
    decode_violation(violation, p.page_shift, p.row_begin, p.given_begin, p.status);
    if (violation) *const_cast<volatile unsigned long long*>(p.report) = violation;
    state.violation = 0;
    state.changed = 0;
    if (appended) state.resample = 0;  // the snapshot has written all samples
    state.forest_rows = rows;
  }
}

template <bool kRanged>
__device__ __forceinline__ void build_forest(const DevicePagerParams& p, ForestShared& s, int rows, int threads,
                                             const RowState& mine, const Sharers& sharers, const GridBarrier& barrier) {
  const unsigned long long violation = p.state->violation;
  const Placement placed = place_rows<kRanged>(p, s, rows, threads, mine, sharers, barrier);
  if (placed.any_sharing) {
    build_tree(s, threads, placed.stands);
    decide<kRanged>(p, s, threads, placed.stands);
    bound_entries<kRanged>(p, s, rows, threads);
  }
  const bool appendable = write_segments<kRanged>(p, s, rows, threads, placed.may_move);
  finish_build(p, rows, mine, violation, false);
  if (threadIdx.x == 0) {
    p.state->appendable = !kRanged && appendable && violation == 0;
    if (!kRanged) choose_samples(*p.state, sharers.deep && !sharers.contradicted, sharers.longest);
  }
}

__device__ __forceinline__ void append_rows(const DevicePagerParams& p, ForestShared& s, int rows, int threads,
                                            const RowState& mine) {
  const int row = threadIdx.x, num_segments = p.sizes[0], own = row < rows ? p.own_segment[row] : -1;
  for (int segment = row; segment < num_segments; segment += threads) {
    const int2 at = reinterpret_cast<const int2*>(p.segment_positions)[segment];
    s.segment_begin[segment] = at.x;
    s.pages[segment] = count_pages(at.x, at.y, p.page_shift);
  }
  sync_first(threads);
  if (own >= 0) {
    p.segment_positions[2 * own + 1] = mine.end;
    s.pages[own] = count_pages(s.segment_begin[own], mine.end, p.page_shift);
  }
  sync_first(threads);
  const int first = 2 * row, of_first = first < num_segments ? s.pages[first] : 0;
  const int of_second = first + 1 < num_segments ? s.pages[first + 1] : 0;
  int total;
  const int before = block_scan(of_first + of_second, threads, s.scratch, &total);
  if (first < num_segments) p.page_indptr[first] = before;
  if (first + 1 < num_segments) p.page_indptr[first + 1] = before + of_first;
  if (row == 0) p.page_indptr[num_segments] = p.sizes[1] = total;
  finish_build(p, rows, mine, 0, true);
}

}  // namespace flashcore::pager
