#include "pager/layout.h"

#include <algorithm>

namespace flashcore {
namespace {

class Emitter {
 public:
  Emitter(const Snapshot& s, const Residency& resident) : s_(s), resident_(resident) {
    out.page_indptr = {0};
    out.run_indptr = {0};
  }

  // Appends the resident parts of a segment; `row` is any of its rows.
  void add(const Segment& seg, int32_t row) {
    int64_t part = seg.begin;
    for (int64_t p = seg.begin; p < seg.end; p = next_block(p)) {
      const int32_t page = s_.page(row, p / s_.page_tokens);
      if (resident_.holds(page)) continue;
      out.staged_pages.push_back(page);
      add_part(seg, row, part, p);
      part = std::min<int64_t>(next_block(p), seg.end);
    }
    add_part(seg, row, part, seg.end);
  }

  Layout out;

 private:
  int64_t next_block(int64_t position) const { return (position / s_.page_tokens + 1) * s_.page_tokens; }

  void add_part(const Segment& seg, int32_t row, int64_t begin, int64_t end) {
    if (begin >= end) return;
    out.segment_rows.insert(out.segment_rows.end(), {seg.row_begin, seg.row_end});
    out.segment_positions.insert(out.segment_positions.end(), {static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    int64_t run_end = -1;  // slot after the open run
    for (int64_t p = begin; p < end; p = next_block(p)) {
      out.page_indices.push_back(s_.page(row, p / s_.page_tokens));
      const int64_t slot = s_.slot(row, p), length = std::min(next_block(p), end) - p;
      if (slot == run_end) {
        out.runs.back() += length;
      } else {
        out.runs.insert(out.runs.end(), {static_cast<int32_t>(slot), static_cast<int32_t>(length)});
      }
      run_end = slot + length;
    }
    out.page_indptr.push_back(out.page_indices.size());
    out.run_indptr.push_back(out.runs.size() / 2);
  }

  const Snapshot& s_;
  const Residency& resident_;
};

// Row -> segments by increasing position. A row that starts alone has its head piece after its group in segment order.
void index_rows(Layout* out) {
  const int64_t num_rows = out->row_order.size(), num_segments = out->segment_rows.size() / 2;
  out->row_indptr.assign(num_rows + 1, 0);
  const auto for_each_read = [&](auto visit) {
    for (int64_t seg = 0; seg < num_segments; ++seg) {
      for (int32_t k = out->segment_rows[2 * seg]; k < out->segment_rows[2 * seg + 1]; ++k)
        visit(out->row_order[k], seg);
    }
  };
  for_each_read([&](int32_t row, int64_t) { ++out->row_indptr[row + 1]; });
  for (int64_t r = 0; r < num_rows; ++r) out->row_indptr[r + 1] += out->row_indptr[r];
  out->row_segments.resize(out->row_indptr[num_rows]);
  std::vector<int32_t> cursor(out->row_indptr.begin(), out->row_indptr.end() - 1);
  for_each_read([&](int32_t row, int64_t seg) { out->row_segments[cursor[row]++] = seg; });
  for (int64_t r = 0; r < num_rows; ++r) {
    std::sort(out->row_segments.begin() + out->row_indptr[r], out->row_segments.begin() + out->row_indptr[r + 1],
              [&](int32_t a, int32_t b) { return out->segment_positions[2 * a] < out->segment_positions[2 * b]; });
  }
}

}  // namespace

Layout emit_layout(const Snapshot& snapshot, const Forest& forest, const Residency& resident) {
  Emitter emitter(snapshot, resident);
  for (const Segment& seg : forest.segments) emitter.add(seg, forest.order[seg.row_begin]);
  Layout& out = emitter.out;
  out.row_order = forest.order;
  index_rows(&out);
  std::sort(out.staged_pages.begin(), out.staged_pages.end());
  out.staged_pages.erase(std::unique(out.staged_pages.begin(), out.staged_pages.end()), out.staged_pages.end());
  return std::move(out);
}

}  // namespace flashcore
