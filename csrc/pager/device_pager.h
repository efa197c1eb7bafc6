// The pager on the GPU: the CSR layout of pager.h, field by field, built by two launches without the host.
//
// Snapshot, outside the CUDA graph, is the only reader of SGLang's live table. It copies the pages that the batch reads
// into a private table [max_rows, table_stride], one id per page, and compares each with what is stored there.
//
// Build, inside the graph, works on the snapshot alone. If every old entry was found equal and rows only grew, the
// forest of the last build stands and only the ends of the rows' own segments move: one CTA, the others leave.
// Otherwise:
// 1. Order. Rows are sorted by page sequence as quicksort sorts strings: all rows of a class, which agree so far, are
//    compared with one leader from where they are known to agree, and split by (where they leave it, the page there).
//    Ids are compared, never hashes of them, and no invariant of the cache is relied on. Over all rounds each entry is
//    compared about once: B x length loads, whatever is shared. A batch with one prefix, or with nothing shared, takes
//    one round; a tree takes about its height, or one round if the last build found one too: samples of the rows then
//    propose what to compare (device_proposals.cuh). Leaders are drawn by hash, so that a chain of B prefixes takes
//    log B. Small batches of short rows, 256 x 8192 tokens at page size 64, compare all pairs (device_pairs.cuh).
// 2. Forest. One CTA: the tree of common prefixes, decisions bottom-up, segments, row -> segments.
// 3. Emit, only if the canonical arrays are wanted: page_indices, run_indptr and runs.
//
// Why they may not be wanted: 256 x 8192 tokens at page size 1 have 8 MB of page_indices and up to 16 MB of runs, and
// CSR packs them, so that all of them move whenever a row grows. They only repeat what the snapshot holds. Attention
// may take its pages from there: entry b of segment s is table[segment_entries[s] + b], where segment_entries[s] =
// leader * table_stride + first block and the leader is the segment's first row. In a kernel's arguments
// (segment_entries, table) stand for (page_indptr, page_indices). A build then writes a few kilobytes.
//
// A pager that is `ranged` pages any ranges of a table of pages: rows that begin after position 0 first borrow what
// they are sorted by (device_ranges.cuh), two phases of the grid's barrier more, and every build is a rebuild.
//
// Capacities for R rows of at most T pages, sizes that no input can exceed: 2 R segments (at most R - 1 groups and R
// own parts; if ranged R more, what rows read before their group), R (R + 1) / 2 + 2 R row_segments (if ranged R more),
// R * align(T, 128) table entries; with emit R T + 2 R page_indices, as many runs, and scratch of 5/128 of that.
// lay_out_arrays has them all. MiB without emit:
//   256 x 12288 tokens: 12.2 at page size 1, 0.4 at 64. 1,024 x 131072: 514.1 and 10.1; SGLang's own table takes 512.
//
// Microseconds of both launches on an H100, L2 flushed, less an empty graph (python scripts/bench_pager.py): a rebuild
// in which every row changed, and an append.
//   rows x tokens            page size 1            page size 64
//   256 x 8192, own pages    22.1, append 12.3      13.2, append 7.0
//   256 x 8448, one prefix   25.3, append 14.2      15.5, append 7.6
//   256 x 8192, 2 levels     26.0, append 12.6      14.8, append 7.3
//   256 x 8192, 5 levels     27.6, append 12.7      16.3, append 7.4
//   1,024 x 8192, own        45.3, append 30.8      23.7, append 11.2
//   1,024 x 8448, prefix     56.7, append 32.4      27.0, append 11.8
//   1,024 x 8192, 3 levels   61.2, append 30.6      33.6, append 11.0
// A tree that has just formed takes a round for each level once, 4 to 5 us each, unless its rows are compared in pairs
// (device_pairs.cuh). Append is the snapshot's 8 bytes of memory per entry.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace flashcore {

constexpr int kPagerRows = 1024;       // rows of a batch: one thread each
constexpr int kSnapshotChunk = 512;    // entries that a warp copies at a time
constexpr int kTableAlign = 128;       // entries: a row of the table begins at 512 bytes
constexpr int kCompareTile = 512;      // entries that a warp compares at a time
constexpr int kSamples = 16;           // entries of a row, at most, that propose what it shares
constexpr int kEmitTile = 256;         // page entries that a warp writes at a time
constexpr int kMaxDraftSteps = 1024;   // slots of a branch of drafts
constexpr int kMaxRowPages = 1 << 20;  // a violation's block takes 20 bits of its report

// Device memory, zero before the first launch.
struct PagerState {
  unsigned long long violation;  // ~report of the first violated bound (see encode_violation); 0: none
  unsigned barrier;
  int rows;         // B of the last snapshot
  int changed;      // a snapshot since the last build was no mere append
  int forest_rows;  // B of the last build; 0: none
  int appendable;   // appending tokens to rows changes nothing but the ends of `own_segment`
  // Entry i << sample_shift of a row is its sample i; 0: none are kept. The next snapshot writes them all, or only what
  // has changed.
  int sample_shift, resample;
};

// What the snapshot reads. Not owned. Strides in elements. A decode step names slots, one per position, from position 0
// on; the general form, for a pager that is `ranged`, has what is marked with *.
//
// Drafts: a request has `branches` rows, one after the other, each of which reads the request's tokens and then its own
// branch's. SGLang keeps those behind the request's: page size 1, or one branch, at the position of the first draft +
// branch x steps; else each branch begins on a page, of which the request's last tokens fill the beginning.
struct SnapshotInput {
  const int* ids;           // [num_table_rows, row_stride] slots; * or pages
  IntegerArray table_rows;  // [rows]; rows of index 0 are padding; * nullptr: the identity, without padding
  IntegerArray begins;      // * [rows] first position; nullptr: 0
  IntegerArray ends;        // [rows] one past the last position
  int64_t row_stride;
  int64_t entry_stride;  // * elsewhere 1
  int64_t num_table_rows;
  int64_t num_positions;  // of a row of the table
  int rows;               // B, 1 .. max_rows
  int entry_shift;        // * an entry stands for 1 << entry_shift positions; elsewhere 0
  int id_shift;           // * id >> id_shift is a page; elsewhere page_shift
  int branches;           // of drafts; 0: none, and `steps` is not used
  int steps;              // slots of a branch; all are copied, and a row ends with the first
};

// All device memory but `report`; not owned.
struct DevicePagerParams {
  int max_rows, table_stride, page_shift;  // page size 1 << page_shift
  int num_pages;                           // ids outside [0, num_pages) are read as page 0
  bool sharing, emit;
  bool ranged;  // rows may begin after position 0; no build is then an append
  int64_t token_cost, segment_cost, partial_cost;
  int max_entries;  // of row_segments; a batch that would have more shares nothing. At least max_rows

  PagerState* state;
  unsigned long long* report;  // mapped host memory: the last violation, as `violation`; 0: none. The host clears it.

  int* table;      // [max_rows, table_stride] page of each block
  int* row_end;    // [max_rows] tokens of each row
  int* row_share;  // [max_rows] 0: never grouped
  // Only if ranged, else nullptr.
  int* row_begin;    // [max_rows] first position of each row
  int* given_begin;  // [max_rows] as the caller gave it
  int* anchor;       // [max_rows] the row whose top a row borrows; -1: none
  // Only if not ranged, else nullptr.
  int* samples;    // [kSamples, max_rows]
  int* proposals;  // [max_rows, 2] scratch: the row that a row is compared with first, and up to which entry

  int* forest_end;  // [max_rows] row_end and row_share of the last build
  int* forest_share;
  int* own_segment;              // [max_rows] by row: the segment that is its alone; -1: none
  unsigned long long* mismatch;  // [3, max_rows] scratch of the rounds; all ones before the first launch
  int* sorted;  // [max_rows, 4] scratch: SortedRow of device_order.cuh, of rows that may share, in order

  // The layout, as flashcore_sglang/layout.py documents it. sizes[5]: 1 if appended; sizes[2] is 0 without emit.
  int* sizes;              // [8]
  int* status;             // [4]
  int* row_order;          // [max_rows]
  int* segment_rows;       // [segments, 2]; segments = 2 max_rows, if ranged 3
  int* segment_positions;  // [segments, 2]
  int* segment_entries;    // [segments + 1] first entry of the segment in `table`; the last is not used
  int* page_indptr;        // [segments + 1]
  int* row_indptr;         // [max_rows + 1]
  int* row_segments;       // [row_segment_capacity]

  // Only with emit, else nullptr.
  int* page_indices;     // [entry_capacity]
  int* run_indptr;       // [segments + 1]
  int* runs;             // [entry_capacity, 2]
  unsigned* run_starts;  // [tiles, 8] scratch: a bit per page entry
  int* tile_runs;        // [tiles] scratch: runs that start in a tile
  int* tile_first;       // [tiles] scratch: page entry of the first of them; -1: none
  int* cta_runs;         // [CTAs] scratch
};

// Assigns the arrays of `p` (whose max_rows, table_stride, emit and ranged are set) consecutively from `base` on, which
// may be nullptr, and tells visit(name, offset, elements), in ints. `row_pages`: the most pages of a row. Returns the
// ints in all.
template <class Visit>
int64_t lay_out_arrays(DevicePagerParams& p, int* base, int64_t row_pages, int ctas, Visit visit) {
  const int64_t rows = p.max_rows, of_ranged = p.ranged ? rows : 0, segments = 2 * rows + of_ranged;
  const int64_t of_sampled = rows - of_ranged;
  const int64_t entries = p.emit ? rows * row_pages + segments : 0;
  const int64_t tiles = (entries + kEmitTile - 1) / kEmitTile, if_emit = p.emit;
  int64_t at = 0;
  const auto take = [&](auto*& array, const char* name, int64_t elements) {
    using Element = std::remove_reference_t<decltype(*array)>;
    array = base && elements ? reinterpret_cast<Element*>(base + at) : nullptr;
    visit(name, at, elements);
    at += (elements + 63) / 64 * 64;  // 256 bytes
  };
  take(p.state, "state", sizeof(PagerState) / sizeof(int));
  take(p.sizes, "sizes", 8);
  take(p.status, "status", 4);
  take(p.row_end, "row_end", rows);
  take(p.row_share, "row_share", rows);
  take(p.row_begin, "row_begin", of_ranged);
  take(p.given_begin, "given_begin", of_ranged);
  take(p.anchor, "anchor", of_ranged);
  take(p.samples, "samples", kSamples * of_sampled);
  take(p.proposals, "proposals", 2 * of_sampled);
  take(p.forest_end, "forest_end", rows);
  take(p.forest_share, "forest_share", rows);
  take(p.own_segment, "own_segment", rows);
  take(p.mismatch, "mismatch", 6 * rows);
  take(p.sorted, "sorted", 4 * rows);
  take(p.row_order, "row_order", rows);
  take(p.segment_rows, "segment_rows", 2 * segments);
  take(p.segment_positions, "segment_positions", 2 * segments);
  take(p.segment_entries, "segment_entries", segments + 1);
  take(p.page_indptr, "page_indptr", segments + 1);
  take(p.row_indptr, "row_indptr", rows + 1);
  take(p.row_segments, "row_segments", rows * (rows + 1) / 2 + 2 * rows + of_ranged);
  take(p.page_indices, "page_indices", entries);
  take(p.run_indptr, "run_indptr", if_emit * (segments + 1));
  take(p.runs, "runs", 2 * entries);
  take(p.run_starts, "run_starts", tiles * kEmitTile / 32);
  take(p.tile_runs, "tile_runs", tiles);
  take(p.tile_first, "tile_first", tiles);
  take(p.cta_runs, "cta_runs", if_emit * ctas);
  take(p.table, "table", rows * p.table_stride);
  return at;
}

// Readies the build kernel for the current device. Raises if `ctas` of it, one per multiprocessor, cannot be resident
// at once.
void prepare_build(const DevicePagerParams& params, int ctas);

void launch_snapshot(const DevicePagerParams& params, const SnapshotInput& input, int ctas, cudaStream_t stream);
void launch_build(const DevicePagerParams& params, int ctas, cudaStream_t stream);

}  // namespace flashcore
