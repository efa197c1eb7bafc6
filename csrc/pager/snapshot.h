// The private copy of what a batch reads. Every later decision is taken from it and never from SGLang's live
// table, which the scheduler rewrites while a step runs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace flashcore {

// One value is kept: the first violation in row order. `code` 0 means none.
struct Status {
  enum Code : int32_t { kOk = 0, kPageId = 1, kRange = 2, kOrder = 3, kMixedBlock = 4, kTableRow = 5 };
  int32_t code = kOk, row = 0, position = 0, value = 0;

  void report(Code c, int64_t r, int64_t p, int64_t v) {
    if (code == kOk)
      *this = {c, static_cast<int32_t>(r), static_cast<int32_t>(p),
               static_cast<int32_t>(std::clamp<int64_t>(v, INT32_MIN, INT32_MAX))};
  }
};

// A caller's table of ids, and the ranges of it that the batch reads. Not owned. Strides in elements.
struct TableView {
  const int32_t* ids;  // id of (table row, position) at ids[row * row_stride + entry * entry_stride]
  int64_t row_stride;
  int64_t entry_stride;
  int64_t num_table_rows;
  int64_t num_positions;      // positions a table row can hold
  int64_t entry_tokens;       // positions per entry: 1, or the page size when the table holds one id per page
  int64_t divisor;            // 1: ids are pages; page size: ids are slots
  const int64_t* table_rows;  // [B] row of the table for each request; nullptr: the identity
  const int64_t* begins;      // [B] first position read; nullptr: 0
  const int64_t* ends;        // [B] one past the last position read
  const int32_t* may_share;   // [B] 0: this request is never grouped (padding); nullptr: all may
  int64_t num_rows;           // B
  int64_t num_pages;          // pages of the pool; ids outside [0, num_pages) are read as page 0
  bool check_blocks;          // verify that all positions of a block name one page
};

struct Snapshot {
  int64_t page_tokens = 1;
  std::vector<int32_t> begin, end;   // [B] positions, clamped to the table
  std::vector<uint8_t> may_share;    // [B] 0 also for rows that read nothing
  std::vector<int64_t> page_indptr;  // [B + 1]
  std::vector<int32_t> pages;        // row r: pages of blocks begin / page_tokens .. (end - 1) / page_tokens
  Status status;

  int64_t num_rows() const { return static_cast<int64_t>(begin.size()); }
  int64_t first_block(int64_t row) const { return begin[row] / page_tokens; }
  const int32_t* row_pages(int64_t row) const { return pages.data() + page_indptr[row]; }
  int64_t num_blocks(int64_t row) const { return page_indptr[row + 1] - page_indptr[row]; }
  int32_t page(int64_t row, int64_t block) const { return row_pages(row)[block - first_block(row)]; }
  int64_t slot(int64_t row, int64_t position) const {
    return page(row, position / page_tokens) * page_tokens + position % page_tokens;
  }
};

// Reads the table once. Out-of-range values are clamped (page 0, empty or shortened rows) and reported in `status`.
Snapshot take_snapshot(const TableView& table, int64_t page_tokens);

// True if `next` is `old` with tokens appended: same rows, and every page that `old` holds found unchanged.
bool extends(const Snapshot& old, const Snapshot& next);

}  // namespace flashcore
