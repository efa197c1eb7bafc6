#include "pager/window.h"

namespace flashcore {

void snapshot_window(const WindowParams& p, const WindowInput& in, const WindowFields& out) {
  const auto page_at = [&](const WindowRow& x, int page) {
    const int slot = ids_of(in, x)[position_of(p, x, page)];
    return page_of(p, in.slot_map ? own_slot(in, slot) : slot);
  };
  int row = 0;
  const auto store = [&](const WindowRow& x) {
    store_row(p, in, out, row++, x);
    for (int i = 0; i < x.pages; ++i) out.table[x.entry + i] = page_at(x, i);
  };
  int64_t before = 0;
  for (int request = 0; request < in.requests; ++request) {
    const WindowRequest of = read_request(p, in, request);
    if (!in.one_row_each(p)) store_request(out, request, of.end, of.queries);
    for (int index = 0; index < of.rows && row < in.rows; ++index) {
      store(row_of(p, in, out, row, request, of, index, static_cast<int>(before)));
    }
    before = clamp(before + of.queries, 0, in.num_tokens);
  }
  while (row < in.rows) store(empty_row(p, row));
  out.sizes()[0] = in.rows;
}

void cut_mask(const WindowFields& fields, const WindowMask& mask) {
  int request = 0;
  int64_t before = 0, to = 0;
  for (int row = 0; row < mask.rows; ++row) {
    while (request < fields.requests()[row]) before += mask_cells_of_request(fields, request++);
    const MaskRow x = mask_row(fields, row, before);
    for (int query = 0; query < x.queries; ++query) {
      for (int i = 0; i < x.length; ++i) copy_cell(mask, x.from + int64_t{query} * x.stride + i, to++);
    }
  }
}

}  // namespace flashcore
