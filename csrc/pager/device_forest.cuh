// The forest of sorted rows, and all of the layout but the page entries. One CTA, thread k for the row at position k of
// row_order, or for the boundary k between positions k and k + 1.
//
// A group of rows that agree up to a depth is an interval of boundaries whose LCPs are at least that depth; its first
// boundary of exactly that depth stands for it. Extents are found by doubling over a table of range minima. Groups
// decide bottom-up, a level of the tree at a time, in integers (csrc/pager/forest.cc says what).
// 131 KB of shared memory, 41 of them range minima. Only the warps that have rows take part (`threads` of them): with
// 256 rows the barriers and the instructions of the other 24 would take longer than the work.
#pragma once
#include "pager/device_block.cuh"
#include "pager/device_order.cuh"

namespace flashcore::pager {

constexpr int kLevels = 10;
static_assert(kPagerRows == 1 << kLevels);

struct ForestShared {
  int row_tokens[kPagerRows];              // by row
  int order[kPagerRows], end[kPagerRows];  // by position
  int begin[kPagerRows];                   // by position; only with kRanged
  int minimum[kLevels][kPagerRows];        // [j][k]: of lcp[k .. k + 2^j); minimum[0] is lcp
  int node[kPagerRows];                    // boundary that stands for boundary k's group
  int row_begin[kPagerRows], row_end[kPagerRows];
  int parent[kPagerRows];   // -1: none
  int pending[kPagerRows];  // children that have not decided
  int covered[kPagerRows];  // rows of the children
  int tops[kPagerRows];     // segments that would start the reading of the children
  int kept[kPagerRows];
  int latest[kPagerRows];         // latest begin of the group's rows; only with kRanged
  int above[kPagerRows];          // nearest kept group around group k; -1: none
  int groups_at[kPagerRows];      // kept groups whose rows begin at k
  int segment[kPagerRows];        // of kept group k
  int first_segment[kPagerRows];  // by position: of the groups that begin there, and the row's own
  int entries_of[kPagerRows], first_entry[kPagerRows];  // by row, of row_segments
  int pages[3 * kPagerRows];                            // of a segment
  int scratch[3][32];                                   // of one scan each
};

// How many boundaries from `at` on have LCPs of at least `depth` > 0; their number is below 2^levels. Minima that would
// reach past the last boundary are 0.
__device__ __forceinline__ int extent_right(const ForestShared& s, int at, int depth, int levels) {
  int q = at;
  for (int j = levels - 1; j >= 0; --j) {
    if (s.minimum[j][q] >= depth) q += 1 << j;
  }
  return q - at;
}

struct Extent {
  int begin, end;  // boundaries
};

// The boundaries around `at` whose LCPs are at least `depth` > 0, which is that of `at`.
__device__ __forceinline__ Extent extent_around(const ForestShared& s, int at, int depth, int levels) {
  int begin = at, end = at + 1;
  for (int j = levels - 1; j >= 0; --j) {
    const int step = 1 << j;
    if (begin >= step && s.minimum[j][begin - step] >= depth) begin -= step;
    if (s.minimum[j][end] >= depth) end += step;
  }
  return {begin, end};
}

__device__ __forceinline__ int deeper_node(const ForestShared& s, int left, int right) {
  const int x = left >= 0 ? s.minimum[0][left] : 0, y = s.minimum[0][right];  // the last boundary's is 0
  return x == 0 && y == 0 ? -1 : s.node[x >= y ? left : right];
}

struct Placement {
  bool appendable;   // appending may keep the forest
  bool any_sharing;  // some rows have a prefix in common
};

// row_order: rows that may share as sorted, then the others by index. Waits for the sorted rows.
template <bool kRanged>
__device__ __forceinline__ Placement place_rows(const DevicePagerParams& p, ForestShared& s, int rows, int threads,
                                                const Sharers& sharers, const GridBarrier& barrier) {
  const int k = threadIdx.x, sharing = sharers.total;
  s.row_tokens[k] = k < rows ? p.row_end[k] : 0;
  s.kept[k] = s.groups_at[k] = 0;
  if (k < rows && !p.row_share[k]) s.order[sharing + k - sharers.before] = k;
  barrier.wait(threads);
  if (k < sharing) s.order[k] = __ldcg(p.sorted_rows + k);
  const int lcp = k + 1 < sharing ? __ldcg(p.sorted_lcp + k + 1) : 0;
  s.minimum[0][k] = lcp;
  const bool any_sharing = any_of_first(threads, lcp > 0);
  const int row = k < rows ? s.order[k] : 0, end = k < rows ? s.row_tokens[row] : 0;
  s.end[k] = end;
  if constexpr (kRanged) s.begin[k] = k < rows ? p.row_begin[row] : 0;
  if (k < rows) p.row_order[k] = row;
  // A row that is a prefix of its neighbour may diverge with its next token; an empty row that grows joins the order
  // anew.
  const bool fixed = (k + 1 < sharing && lcp >= min(end, s.row_tokens[s.order[k + 1]])) || (k < rows && end == 0);
  return {!any_of_first(threads, fixed), any_sharing};
}

__device__ __forceinline__ void build_tree(ForestShared& s, int rows, int threads) {
  const int k = threadIdx.x, levels = 32 - __clz(rows - 1);
  const int depth = s.minimum[0][k];
  int minimum = depth;
  for (int j = 1; j < levels; ++j) {
    const int half = 1 << (j - 1);
    minimum = k + half < threads ? min(minimum, s.minimum[j - 1][k + half]) : 0;
    s.minimum[j][k] = minimum;
    sync_first(threads);
  }
  s.pending[k] = s.covered[k] = s.tops[k] = 0;
  Extent group{0, 0};
  if (depth > 0) {
    group = extent_around(s, k, depth, levels);
    s.node[k] = group.begin + extent_right(s, group.begin, depth + 1, levels);
    s.row_begin[k] = group.begin;
    s.row_end[k] = group.end + 1;
  }
  sync_first(threads);
  const bool is_node = depth > 0 && s.node[k] == k;
  const int parent = is_node ? deeper_node(s, group.begin - 1, group.end) : -1;
  s.parent[k] = parent;
  if (parent >= 0) atomicAdd(&s.pending[parent], 1);
  sync_first(threads);
}

// The latest begin of the rows of group k: no position before it is read by all of them.
__device__ __forceinline__ int latest_begin(const ForestShared& s, int k) {
  int latest = 0;
  for (int at = s.row_begin[k]; at < s.row_end[k]; ++at) latest = max(latest, s.begin[at]);
  return latest;
}

template <bool kRanged>
__device__ __forceinline__ void decide(const DevicePagerParams& p, ForestShared& s, int threads) {
  const int k = threadIdx.x;
  bool undecided = s.minimum[0][k] > 0 && s.node[k] == k;
  if constexpr (kRanged) s.latest[k] = undecided ? latest_begin(s, k) : 0;
  while (any_of_first(threads, undecided)) {
    const bool ready = undecided && s.pending[k] == 0;
    sync_first(threads);
    if (!ready) continue;
    const int64_t rows = s.row_end[k] - s.row_begin[k], tops = s.tops[k] + rows - s.covered[k];
    const int parent = s.parent[k];
    const int above = parent >= 0 ? s.minimum[0][parent] : 0;
    const int64_t length = s.minimum[0][k] - (kRanged ? max(above, s.latest[k]) : above);
    const bool pays = length * (tops - 1) * p.token_cost >= p.segment_cost + rows * p.partial_cost;
    const bool kept = pays && (!kRanged || length > 0);
    s.kept[k] = kept;
    if (kept) atomicAdd(&s.groups_at[s.row_begin[k]], 1);
    if (parent >= 0) {
      atomicAdd(&s.tops[parent], kept ? 1 : static_cast<int>(tops));
      atomicAdd(&s.covered[parent], static_cast<int>(rows));
      atomicSub(&s.pending[parent], 1);
    }
    undecided = false;
  }
}

// Attention keeps a partial result for every row of every segment. Where there would be more of them than it has room
// for, nothing is shared: every row then has one segment.
template <bool kRanged>
__device__ __forceinline__ void bound_entries(const DevicePagerParams& p, ForestShared& s, int rows, int threads) {
  const int k = threadIdx.x;
  int of_groups;
  block_scan(s.kept[k] ? s.row_end[k] - s.row_begin[k] : 0, threads, s.scratch[2], &of_groups);
  if (of_groups + (kRanged ? 2 * rows : rows) > p.max_entries) s.kept[k] = s.groups_at[k] = 0;
  sync_first(threads);
}

__device__ __forceinline__ int nearest_kept(const ForestShared& s, int node) {
  while (node >= 0 && !s.kept[node]) node = s.parent[node];
  return node;
}

__device__ __forceinline__ int count_pages(int begin, int end, int page_shift) {
  return ((end + (1 << page_shift) - 1) >> page_shift) - (begin >> page_shift);
}

__device__ __forceinline__ void write_segment(const DevicePagerParams& p, ForestShared& s, int segment, int row_begin,
                                              int row_end, int begin, int end) {
  reinterpret_cast<int2*>(p.segment_rows)[segment] = make_int2(row_begin, row_end);
  reinterpret_cast<int2*>(p.segment_positions)[segment] = make_int2(begin, end);
  p.segment_entries[segment] = s.order[row_begin] * p.table_stride + (begin >> p.page_shift);
  s.pages[segment] = count_pages(begin, end, p.page_shift);
}

// Where the reading of kept group k begins.
template <bool kRanged>
__device__ __forceinline__ int group_begin(const ForestShared& s, int k) {
  if (s.above[k] >= 0) return s.minimum[0][s.above[k]];
  return kRanged ? s.latest[k] : 0;
}

// Segments in the order (first row, first position): what a row reads alone before its outermost kept group (its head,
// where it begins before others of the group), the kept groups that begin at a row, outermost first, then what is left
// of the row. Returns their number.
template <bool kRanged>
__device__ __forceinline__ int write_segments(const DevicePagerParams& p, ForestShared& s, int rows, int threads) {
  const int k = threadIdx.x;
  s.above[k] = s.kept[k] ? nearest_kept(s, s.parent[k]) : -1;
  const int around = k < rows ? nearest_kept(s, deeper_node(s, k - 1, k)) : -1;
  const int own_begin = around >= 0 ? s.minimum[0][around] : kRanged && k < rows ? s.begin[k] : 0;
  const bool has_own = k < rows && own_begin < s.end[k];
  sync_first(threads);
  int entries = has_own, outermost = around;
  for (int g = around; g >= 0; g = s.above[g]) ++entries, outermost = g;
  const bool has_head = kRanged && outermost >= 0 && s.begin[k] < s.latest[outermost];
  entries += has_head;
  if (k < rows) s.entries_of[s.order[k]] = entries;
  sync_first(threads);

  // Two sums at once: segments by position, at most 3071, and entries by row, below 2^20.
  static_assert(kPagerRows * (kPagerRows + 7) / 2 < 1 << 20);
  const int entries_of_row = k < rows ? s.entries_of[k] : 0;
  int totals;
  const int segments_of_row = has_head + s.groups_at[k] + has_own;
  const int before = block_scan(segments_of_row << 20 | entries_of_row, threads, s.scratch[0], &totals);
  const int head = static_cast<unsigned>(before) >> 20, first = head + has_head, own = first + s.groups_at[k];
  const int num_segments = static_cast<unsigned>(totals) >> 20;
  const int entry = before & ((1 << 20) - 1), num_entries = totals & ((1 << 20) - 1);
  s.first_segment[k] = first;
  s.first_entry[k] = entry;
  if (has_head) write_segment(p, s, head, k, k + 1, s.begin[k], s.latest[outermost]);
  if (has_own) write_segment(p, s, own, k, k + 1, own_begin, s.end[k]);
  if (k < rows) {
    p.own_segment[s.order[k]] = has_own ? own : -1;
    p.row_indptr[k] = entry;
  }
  if (k == 0) {
    p.row_indptr[rows] = num_entries;
    p.sizes[0] = num_segments;
    p.sizes[3] = num_entries;
  }
  sync_first(threads);
  if (s.kept[k]) {
    int segment = s.first_segment[s.row_begin[k]];
    for (int g = s.above[k]; g >= 0 && s.row_begin[g] == s.row_begin[k]; g = s.above[g]) ++segment;
    write_segment(p, s, segment, s.row_begin[k], s.row_end[k], group_begin<kRanged>(s, k), s.minimum[0][k]);
    s.segment[k] = segment;
  }
  sync_first(threads);
  if (k < rows) {
    int* out = p.row_segments + s.first_entry[s.order[k]] + entries;
    if (has_own) *--out = own;
    for (int g = around; g >= 0; g = s.above[g]) *--out = s.segment[g];
    if (has_head) *--out = head;
  }
  return num_segments;
}

// page_indptr from the pages of each segment, in s.pages.
template <bool kRanged>
__device__ __forceinline__ void write_page_indptr(const DevicePagerParams& p, ForestShared& s, int num_segments,
                                                  int threads) {
  constexpr int kEach = kRanged ? 3 : 2;
  const int segment = kEach * threadIdx.x;
  int sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += segment + i < num_segments ? s.pages[segment + i] : 0;
  int before = block_scan(sum, threads, s.scratch[1], &total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (segment + i >= num_segments) break;
    p.page_indptr[segment + i] = before;
    before += s.pages[segment + i];
  }
  if (threadIdx.x == 0) {
    p.page_indptr[num_segments] = total;
    p.sizes[1] = total;
  }
}

// The snapshot is now the forest's.
__device__ __forceinline__ void finish_build(const DevicePagerParams& p, int rows, unsigned long long violation,
                                             bool appended) {
  const int k = threadIdx.x;
  if (k < rows) {
    p.forest_end[k] = p.row_end[k];
    p.forest_share[k] = p.row_share[k];
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
                                             unsigned long long violation, const Sharers& sharers,
                                             const GridBarrier& barrier) {
  const Placement placed = place_rows<kRanged>(p, s, rows, threads, sharers, barrier);
  if (placed.any_sharing) {
    build_tree(s, rows, threads);
    decide<kRanged>(p, s, threads);
    bound_entries<kRanged>(p, s, rows, threads);
  }
  const int num_segments = write_segments<kRanged>(p, s, rows, threads);
  write_page_indptr<kRanged>(p, s, num_segments, threads);
  finish_build(p, rows, violation, false);
  if (threadIdx.x == 0) {
    p.state->appendable = !kRanged && placed.appendable && violation == 0;
    if (!kRanged) choose_samples(*p.state, sharers.deep && !sharers.contradicted, sharers.longest);
  }
}

__device__ __forceinline__ void append_rows(const DevicePagerParams& p, ForestShared& s, int rows, int threads) {
  const int row = threadIdx.x, num_segments = p.sizes[0];
  for (int segment = row; segment < num_segments; segment += threads) {
    const int2 at = reinterpret_cast<const int2*>(p.segment_positions)[segment];
    s.pages[segment] = count_pages(at.x, at.y, p.page_shift);
  }
  sync_first(threads);
  if (row < rows) {
    const int own = p.own_segment[row], end = p.row_end[row];
    p.segment_positions[2 * own + 1] = end;
    s.pages[own] = count_pages(p.segment_positions[2 * own], end, p.page_shift);
  }
  sync_first(threads);
  write_page_indptr<false>(p, s, num_segments, threads);
  finish_build(p, rows, 0, true);
}

}  // namespace flashcore::pager
