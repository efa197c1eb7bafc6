#include "pager/snapshot.h"

#include <algorithm>

namespace flashcore {
namespace {

struct Range {
  int64_t begin, end;
};

Range clamp_range(const TableView& t, int64_t row, Status* status) {
  int64_t begin = t.begins ? t.begins[row] : 0, end = t.ends[row];
  if (t.table_rows && (t.table_rows[row] < 0 || t.table_rows[row] >= t.num_table_rows)) {
    status->report(Status::kTableRow, row, 0, t.table_rows[row]);
    return {0, 0};
  }
  if (begin < 0 || end < begin) {
    status->report(Status::kOrder, row, begin, end);
    return {0, 0};
  }
  if (end > t.num_positions) {
    status->report(Status::kRange, row, 0, end);
    end = t.num_positions;
    begin = std::min(begin, end);
  }
  return {begin, end};
}

class RowReader {
 public:
  RowReader(const TableView& t, int64_t row, int64_t page_tokens, Status* status)
      : t_(t), row_(row), page_tokens_(page_tokens), status_(status) {
    ids_ = t.ids + (t.table_rows ? t.table_rows[row] : row) * t.row_stride;
  }

  // Page of the block that holds `position`; ids before `position` in the block are not looked at.
  int32_t page(int64_t position) const {
    const int64_t id = ids_[position / t_.entry_tokens * t_.entry_stride];
    const int64_t page = id / t_.divisor;
    if (id >= 0 && page < t_.num_pages) return static_cast<int32_t>(page);
    status_->report(Status::kPageId, row_, position, id);
    return 0;
  }

  void check_block(int64_t position, int64_t end) const {
    const int64_t first = ids_[position / t_.entry_tokens * t_.entry_stride];
    const int64_t step = t_.divisor > 1 ? 1 : 0;  // slots of a page are consecutive and aligned, page ids equal
    if (step && first % page_tokens_ != position % page_tokens_) {
      status_->report(Status::kMixedBlock, row_, position, first);
    }
    for (int64_t p = position + 1; p < end; ++p) {
      const int64_t id = ids_[p / t_.entry_tokens * t_.entry_stride];
      if (id != first + step * (p - position)) status_->report(Status::kMixedBlock, row_, p, id);
    }
  }

 private:
  const TableView& t_;
  const int64_t row_, page_tokens_;
  Status* status_;
  const int32_t* ids_;
};

}  // namespace

Snapshot take_snapshot(const TableView& table, int64_t page_tokens) {
  Snapshot s;
  s.page_tokens = page_tokens;
  const int64_t num_rows = table.num_rows;
  s.begin.resize(num_rows), s.end.resize(num_rows), s.may_share.resize(num_rows);
  s.page_indptr.resize(num_rows + 1);
  for (int64_t r = 0; r < num_rows; ++r) {
    const Range range = clamp_range(table, r, &s.status);
    s.begin[r] = range.begin, s.end[r] = range.end;
    const bool empty = range.begin == range.end;
    s.may_share[r] = !empty && (!table.may_share || table.may_share[r]);
    const int64_t blocks = empty ? 0 : (range.end - 1) / page_tokens - range.begin / page_tokens + 1;
    s.page_indptr[r + 1] = s.page_indptr[r] + blocks;
  }
  s.pages.resize(s.page_indptr[num_rows]);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (s.num_blocks(r) == 0) continue;
    const RowReader reader(table, r, page_tokens, &s.status);
    int32_t* out = s.pages.data() + s.page_indptr[r];
    for (int64_t p = s.begin[r]; p < s.end[r]; p = (p / page_tokens + 1) * page_tokens) {
      *out++ = reader.page(p);
      if (table.check_blocks && table.entry_tokens < page_tokens) {
        reader.check_block(p, std::min<int64_t>((p / page_tokens + 1) * page_tokens, s.end[r]));
      }
    }
  }
  return s;
}

bool extends(const Snapshot& old, const Snapshot& next) {
  if (old.page_tokens != next.page_tokens || old.begin != next.begin || old.may_share != next.may_share) return false;
  for (int64_t r = 0; r < old.num_rows(); ++r) {
    if (next.end[r] < old.end[r]) return false;
    if (!std::equal(old.row_pages(r), old.row_pages(r) + old.num_blocks(r), next.row_pages(r))) return false;
  }
  return true;
}

}  // namespace flashcore
