// The page tables of layers whose tokens see a window or a chunk: of each request what its queries reach, from a page
// boundary on, and nothing below. flashcore_sglang/device_window.py says what becomes of them.
//
// A row is a request, or a chunk of one that has queries; every row has a segment of its own. Queries [first, end) of
// a request reach
//   window:  [max(0, first - left), end)
//   chunks:  for each chunk c of [first / chunk, (end - 1) / chunk]: [c chunk, min(end, (c + 1) chunk))
// and base = begin / P P. Pages of row r lie from entry(r) on:
//   entry(r) = r stride                               where `stride` pages hold what any request reaches in this step
//            = r stride + queries before r / P        else: a window of many queries. No two rows overlap if `stride`
//                                                     pages hold what a page of queries reaches.
// So a step of T new tokens takes rows x stride + T / P entries, however T is spread over the requests.
//
// Whatever SGLang's tables hold, nothing is read or written out of bounds: ids outside their pool are page 0, lengths
// and queries are cut. On the GPU (device_window.cu) it is one launch; on the CPU (window.cc) a loop over the rows.
#pragma once
#include "common/host_device.h"

namespace flashcore {

constexpr int kWindowRows = 1024;  // requests of a step

// Sizes that do not change.
struct WindowParams {
  int max_rows;
  int page_shift;  // P = 1 << page_shift
  int num_pages;   // of the pool that is read; ids outside are read as page 0
  int left;        // positions seen before a query's own; not used with chunks
  int chunk;       // tokens of a chunk, whole pages; 0: a window
  int max_tokens;  // longer requests are cut
  int stride;      // entries of a row
};

// A step. Not owned.
struct WindowInput {
  const int* ids;  // [num_table_rows, row_stride] slot of each position
  int64_t row_stride, num_table_rows;
  int num_positions;        // that are read of a row of the table
  IntegerArray table_rows;  // [requests]
  IntegerArray ends;        // [requests] one past the last position
  IntegerArray q_lens;      // [requests] the last tokens, which are queries; nullptr: one each
  const int* slot_map;      // [slots] the slot of these layers' pool for each slot of `ids`; nullptr: itself
  int slot_shift;           // 1: of int64, of which the lower word is read; 0: of int32
  int64_t slots;
  int requests, rows;  // rows: with chunks more or fewer than there are; what is left over is empty, or cut
  int num_tokens;      // the sum of q_lens, max_queries: the largest of them
  int max_queries;
  int width;  // the most pages of a row

  FC_HOST_DEVICE bool one_row_each(const WindowParams& p) const { return p.chunk == 0 || q_lens.data == nullptr; }
  FC_HOST_DEVICE bool spread(const WindowParams& p) const { return width > p.stride; }
};

// What is written, by row. Not owned.
struct WindowFields {
  static constexpr int kCount = 10;  // arrays of `stride` ints each; positions are two

  int* base;
  int64_t stride;
  int* table;
  int64_t table_entries;

  FC_HOST_DEVICE int* sizes() const { return base; }                  // [8] of which the first is the number of rows
  FC_HOST_DEVICE int* positions() const { return base + stride; }     // [max_rows, 2] what is read, counted from bases
  FC_HOST_DEVICE int* entries() const { return base + 3 * stride; }   // [max_rows + 1] first in `table`
  FC_HOST_DEVICE int* lens() const { return base + 4 * stride; }      // [max_rows] end, counted from bases
  FC_HOST_DEVICE int* q_lens() const { return base + 5 * stride; }    // [max_rows]
  FC_HOST_DEVICE int* bases() const { return base + 6 * stride; }     // [max_rows] positions
  FC_HOST_DEVICE int* requests() const { return base + 7 * stride; }  // [max_rows]
  FC_HOST_DEVICE int* request_ends() const { return base + 8 * stride; }     // [requests]
  FC_HOST_DEVICE int* request_queries() const { return base + 9 * stride; }  // [requests]
};

// The custom mask of a step, of requests' queries by their positions, to be cut to what rows read of it. Not owned.
struct WindowMask {
  const unsigned char* mask;  // [size] request after request: [queries, end]
  int64_t size;
  unsigned char* cut;  // [cut_size] row after row: [q_len, len], positions from the row's base on
  int64_t cut_size;
  int rows;
};

struct WindowRequest {
  int table_row, end, queries, rows;
};

struct WindowRow {
  int request, table_row, begin, base, end, queries, pages;
  int64_t entry;
};

FC_HOST_DEVICE WindowRequest read_request(const WindowParams& p, const WindowInput& in, int request) {
  // All loads before the first use.
  const int64_t table_row = load_integer(in.table_rows, request), given_end = load_integer(in.ends, request);
  const int64_t wanted = in.q_lens.data ? load_integer(in.q_lens, request) : 1;
  const int end = static_cast<int>(clamp(given_end, 0, in.num_positions));
  const int queries = static_cast<int>(clamp(wanted, 0, in.max_queries < end ? in.max_queries : end));
  int rows = 1;
  if (!in.one_row_each(p)) {
    rows = queries > 0 ? (end - 1) / p.chunk - (end - queries) / p.chunk + 1 : 0;
    rows = rows < in.rows ? rows : in.rows;
  }
  return {static_cast<int>(clamp(table_row, 0, in.num_table_rows - 1)), end, queries, rows};
}

// Row `row`, the `index`th of its request. `before`: queries of the requests before.
FC_HOST_DEVICE WindowRow row_of(const WindowParams& p, const WindowInput& in, const WindowFields& out, int row,
                                int request, WindowRequest of, int index, int before) {
  WindowRow x{request, of.table_row, 0, 0, of.end, of.queries, 0, int64_t{row} * p.stride};
  if (in.spread(p)) {
    const int room = static_cast<int>(clamp(in.num_tokens - before, 0, in.num_tokens));
    x.queries = of.queries < room ? of.queries : room;
    x.entry += (in.num_tokens - room) >> p.page_shift;
  }
  const int first = x.end - x.queries;
  if (p.chunk == 0) {
    x.begin = first > p.left ? first - p.left : 0;
  } else {
    // A request without tokens has its first query at 0 here.
    x.begin = (first / p.chunk + index) * p.chunk;
    if (x.end - x.begin > p.chunk) x.end = x.begin + p.chunk;
    x.queries = x.end - (first > x.begin ? first : x.begin);
  }
  x.base = x.begin >> p.page_shift << p.page_shift;
  const int pages = x.begin < x.end ? ((x.end - 1) >> p.page_shift) - (x.base >> p.page_shift) + 1 : 0;
  x.pages = static_cast<int>(clamp(out.table_entries - x.entry, 0, pages < in.width ? pages : in.width));
  return x;
}

// One that no request takes.
FC_HOST_DEVICE WindowRow empty_row(const WindowParams& p, int row) {
  return {0, 0, 0, 0, 0, 0, 0, int64_t{row} * p.stride};
}

FC_HOST_DEVICE void store_request(const WindowFields& out, int request, int end, int queries) {
  out.request_ends()[request] = end;
  out.request_queries()[request] = queries;
}

FC_HOST_DEVICE void store_row(const WindowParams& p, const WindowInput& in, const WindowFields& out, int row,
                              const WindowRow& x) {
  if (in.one_row_each(p)) store_request(out, row, x.end, x.queries);
  out.positions()[2 * row] = x.begin - x.base;
  out.positions()[2 * row + 1] = x.end - x.base;
  out.entries()[row] = static_cast<int>(x.entry);
  out.lens()[row] = x.end - x.base;
  out.q_lens()[row] = x.queries;
  out.bases()[row] = x.base;
  out.requests()[row] = x.request;
}

// Where the id of a row's page lies: at its first position that is reached, as SGLang may have freed those below.
FC_HOST_DEVICE int position_of(const WindowParams& p, const WindowRow& x, int page) {
  const int position = x.base + (page << p.page_shift);
  return position > x.begin ? position : x.begin;
}

FC_HOST_DEVICE const int* ids_of(const WindowInput& in, const WindowRow& x) {
  return in.ids + x.table_row * in.row_stride;
}

// The slot of these layers' pool for a slot of SGLang's table; -1: none.
FC_HOST_DEVICE int own_slot(const WindowInput& in, int slot) {
  const bool inside = slot >= 0 && slot < in.slots;
  const int own = in.slot_map[(inside ? int64_t{slot} : 0) << in.slot_shift];
  return inside ? own : -1;
}

FC_HOST_DEVICE int page_of(const WindowParams& p, int slot) {
  const int page = slot >> p.page_shift;
  return page >= 0 && page < p.num_pages ? page : 0;
}

FC_HOST_DEVICE int64_t mask_cells_of_request(const WindowFields& fields, int request) {
  return int64_t{fields.request_queries()[request]} * fields.request_ends()[request];
}

FC_HOST_DEVICE int64_t mask_cells_of_row(const WindowFields& fields, int row) {
  return int64_t{fields.q_lens()[row]} * fields.lens()[row];
}

// A row's cells: `length` from `from` on, `queries` times, each `stride` further on.
struct MaskRow {
  int queries, length, stride;
  int64_t from;
};

// `before`: cells of the requests before the row's.
FC_HOST_DEVICE MaskRow mask_row(const WindowFields& fields, int row, int64_t before) {
  const int request = fields.requests()[row], end = fields.request_ends()[request];
  const int base = fields.bases()[row], length = fields.lens()[row], queries = fields.q_lens()[row];
  const int skipped =
      (base + length - queries) - (end - fields.request_queries()[request]);  // of the request's queries
  return {queries, length, end, before + int64_t{skipped} * end + base};
}

FC_HOST_DEVICE void copy_cell(const WindowMask& m, int64_t from, int64_t to) {
  if (to < m.cut_size) m.cut[to] = from >= 0 && from < m.size ? m.mask[from] : 0;
}

// The same for all rows, on the CPU.
void cut_mask(const WindowFields& fields, const WindowMask& mask);
void snapshot_window(const WindowParams& params, const WindowInput& input, const WindowFields& out);

}  // namespace flashcore
