// Which positions of which rows are the same pages, and which of these groups are worth reading together.
//
// Rows are sorted by their page sequences, so that the rows of every common prefix are neighbours; the longest common
// prefixes (LCP) of neighbours, found by comparing the ids, then give the nested groups. A share is never inferred.
#pragma once
#include <cstdint>
#include <vector>

#include "pager/snapshot.h"

namespace flashcore {

// Unit: the time to read the KV of one token for one row. See configs/cost_model.json.
struct CostModel {
  int64_t token_cost;    // reading one token of KV once
  int64_t segment_cost;  // one more segment, whatever its size
  int64_t partial_cost;  // one row's partial result, written and merged
};

// Positions [begin, end), read together by the rows order[row_begin .. row_end).
struct Segment {
  int32_t row_begin, row_end;
  int32_t begin, end;
};

struct Forest {
  std::vector<int32_t> order;     // [B] depth-first permutation of the rows
  std::vector<Segment> segments;  // sorted by (row_begin, begin)
  std::vector<int32_t> own;       // [B] by row: the segment that ends at the row's end and is its alone; -1: none
  bool appendable;                // appending tokens to rows changes nothing but the ends of `own`
};

Forest build_forest(const Snapshot& snapshot, const CostModel& cost);

}  // namespace flashcore
