// A residency bitmap on the GPU: blocks whose page is not resident leave the segments of a finished build, which may
// fall into several parts, and their pages go to the staging list, ascending, each once. What Emitter in layout.cc
// does.
//
// Four launches after the build's two; fixed grids, nothing read on the host. In the order of page entries, in tiles of
// 1024: count the entries that stay, the parts and the runs of each tile, and mark the missing pages; prefix sums of
// the tiles, and the marks as a list; write; row -> parts.
//
// Capacities: a part has a page entry, and a row reads a block in one part of each of its segments. With N = R T + 3 R
// page entries: N parts, N + R (R + 1) / 2 row_segments. 52 bytes for each entry: 3.3 MiB for 256 x 16384 tokens at
// page size 64.
#pragma once
#include <cuda_runtime.h>

#include "pager/device_pager.h"

namespace flashcore {

constexpr int kStagingTile = 1024;  // entries, one thread each

// Not owned. All of the layout but row_order and status, which are the pager's.
struct StagingArrays {
  int* sizes;              // [8]
  int* segment_rows;       // [N, 2]
  int* segment_positions;  // [N, 2]
  int* segment_entries;    // [N + 1]
  int* page_indptr;        // [N + 1]
  int* page_indices;       // [N]
  int* run_indptr;         // [N + 1]
  int* runs;               // [N, 2]
  int* row_indptr;         // [max_rows + 1]
  int* row_segments;       // [N + R (R + 1) / 2]
  int* staged_pages;       // [min(N, num_pages)]

  int4* tile_counts;  // [tiles] scratch: entries, parts and runs of a tile, then of those before it
  int* first_part;    // [3 max_rows + 1] scratch: parts of the segments before one
  int* run_end;       // [N] scratch: position after a run
  unsigned* missing;  // [num_pages / 32] scratch: a bit per page; zero between builds
  int missing_words;
};

// Which pages are resident. Not owned; nullptr: all are.
struct ResidentPages {
  const void* bits;
  bool packed;  // a bit per page in int32 words, else a byte
};

// As lay_out_arrays of device_pager.h.
template <class Visit>
int64_t lay_out_staging(StagingArrays& a, const DevicePagerParams& p, int* base, int64_t at, int64_t row_pages,
                        Visit visit) {
  const int64_t rows = p.max_rows, entries = rows * row_pages + 3 * rows;
  const auto take = [&](auto*& array, const char* name, int64_t elements) {
    using Element = std::remove_reference_t<decltype(*array)>;
    array = base ? reinterpret_cast<Element*>(base + at) : nullptr;
    visit(name, at, elements);
    at += (elements + 63) / 64 * 64;
  };
  take(a.sizes, "staged.sizes", 8);
  take(a.segment_rows, "staged.segment_rows", 2 * entries);
  take(a.segment_positions, "staged.segment_positions", 2 * entries);
  take(a.segment_entries, "staged.segment_entries", entries + 1);
  take(a.page_indptr, "staged.page_indptr", entries + 1);
  take(a.page_indices, "staged.page_indices", entries);
  take(a.run_indptr, "staged.run_indptr", entries + 1);
  take(a.runs, "staged.runs", 2 * entries);
  take(a.row_indptr, "staged.row_indptr", rows + 1);
  take(a.row_segments, "staged.row_segments", entries + rows * (rows + 1) / 2);
  take(a.staged_pages, "staged.staged_pages", entries < p.num_pages ? entries : p.num_pages);
  take(a.tile_counts, "staged.tile_counts", (entries + kStagingTile - 1) / kStagingTile * 4);
  take(a.first_part, "staged.first_part", 3 * rows + 1);
  take(a.run_end, "staged.run_end", entries);
  a.missing_words = static_cast<int>((int64_t{p.num_pages} + 31) / 32);
  take(a.missing, "staged.missing", a.missing_words);
  return at;
}

void launch_staging(const DevicePagerParams& params, const StagingArrays& arrays, const ResidentPages& resident,
                    int ctas, cudaStream_t stream);

}  // namespace flashcore
