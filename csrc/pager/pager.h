// Keeps the last snapshot, so that a decode step, which appends a token to each row, updates the forest of the step
// before instead of sorting and comparing the rows again.
#pragma once
#include "pager/forest.h"
#include "pager/layout.h"
#include "pager/snapshot.h"

namespace flashcore {

class Pager {
 public:
  Pager(int64_t page_tokens, const CostModel& cost) : page_tokens_(page_tokens), cost_(cost) {}

  // The layout of the ranges that `table` names: the same, whatever was paged before.
  Layout step(const TableView& table, const Residency& resident) {
    Snapshot next = take_snapshot(table, page_tokens_);
    const bool appended = forest_.appendable && next.status.code == Status::kOk && extends(snapshot_, next);
    snapshot_ = std::move(next);
    if (appended) {
      for (int64_t r = 0; r < snapshot_.num_rows(); ++r) {
        if (forest_.own[r] >= 0) forest_.segments[forest_.own[r]].end = snapshot_.end[r];
      }
    } else {
      forest_ = build_forest(snapshot_, cost_);
      // A clamped table says nothing about the next one.
      if (snapshot_.status.code != Status::kOk) forest_.appendable = false;
    }
    appended_ = appended;
    return emit_layout(snapshot_, forest_, resident);
  }

  const Status& status() const { return snapshot_.status; }
  bool appended() const { return appended_; }

 private:
  const int64_t page_tokens_;
  const CostModel cost_;
  Snapshot snapshot_;
  Forest forest_{{}, {}, {}, false};
  bool appended_ = false;
};

}  // namespace flashcore
