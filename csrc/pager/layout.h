// The CSR layout: flashcore_sglang/layout.py documents it field by field.
#pragma once
#include <cstdint>
#include <vector>

#include "pager/forest.h"
#include "pager/snapshot.h"

namespace flashcore {

struct Layout {
  std::vector<int32_t> row_order;          // [B]
  std::vector<int32_t> segment_rows;       // [S, 2]
  std::vector<int32_t> segment_positions;  // [S, 2]
  std::vector<int32_t> page_indptr;        // [S + 1]
  std::vector<int32_t> page_indices;       // [N]
  std::vector<int32_t> run_indptr;         // [S + 1]
  std::vector<int32_t> runs;               // [U, 2]
  std::vector<int32_t> row_indptr;         // [B + 1]
  std::vector<int32_t> row_segments;       // [E]
  std::vector<int32_t> staged_pages;       // [M]
};

// Which pages are on the device. Not owned; nullptr bits: all of them.
struct Residency {
  const void* bits = nullptr;
  bool packed = false;  // false: one byte per page, true: one bit per page in little-endian words

  bool holds(int32_t page) const {
    if (!bits) return true;
    const auto* bytes = static_cast<const uint8_t*>(bits);
    return packed ? bytes[page >> 3] >> (page & 7) & 1 : bytes[page] != 0;
  }
};

Layout emit_layout(const Snapshot& snapshot, const Forest& forest, const Residency& resident);

}  // namespace flashcore
