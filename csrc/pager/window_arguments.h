// The export that both libraries have for windows: sizes once, then the tensors of every step, all checked here.
#pragma once
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "common/argument.h"
#include "pager/window.h"

namespace flashcore {

using WindowOptions = tvm::ffi::Map<tvm::ffi::String, int64_t>;

inline WindowParams window_params(const WindowOptions& options) {
  const auto get = [&](const char* name, int64_t least, int64_t most) {
    return static_cast<int>(checked_size(name, options[name], least, most));
  };
  constexpr int64_t kLimit = 1 << 30;
  WindowParams p{};
  p.max_rows = get("max_rows", 1, kWindowRows);
  const int page_size = get("page_size", 1, 1024);
  p.page_shift = page_shift_of(page_size);
  p.num_pages = get("num_pages", 1, 0x7FFFFFFF);
  p.left = get("left", -1, kLimit);
  p.chunk = get("chunk", 0, kLimit);
  FC_CHECK(p.chunk > 0 ? p.chunk % page_size == 0 : p.left >= 0)
      << "reach: want a window, or chunks of whole pages of " << page_size << " tokens, got " << p.left << " and "
      << p.chunk;
  p.max_tokens = get("max_tokens", 1, kLimit);
  p.stride = get("stride", 1, kLimit / p.max_rows);
  return p;
}

inline void check_same_device(const char* name, const TensorView& t, const TensorView& like) {
  const DLDevice want = like.device(), got = t.device();
  FC_CHECK(got.device_type == want.device_type && got.device_id == want.device_id)
      << name << ": want the window's device " << static_cast<int>(want.device_type) << ":" << want.device_id
      << ", got " << static_cast<int>(got.device_type) << ":" << got.device_id;
}

// All but the table.
inline WindowFields window_fields(const WindowParams& p, const TensorView& fields) {
  check_int32_matrix("fields", fields, "[10, columns] int32", true);
  FC_CHECK(fields.size(0) == WindowFields::kCount && fields.size(1) > p.max_rows && fields.size(1) >= 8 &&
           fields.IsContiguous())
      << "fields: want contiguous [" << WindowFields::kCount << ", more than " << p.max_rows << "], got "
      << shape_text(fields);
  return {static_cast<int*>(fields.data_ptr()), fields.size(1), nullptr, 0};
}

// Arguments of a step.
struct WindowTensors {
  TensorView fields, table, req_to_token, req_pool_indices, seq_lens;
  tvm::ffi::Optional<TensorView> q_lens, slot_map;

  IntegerArray vector(const char* name, const TensorView& t, int64_t requests) const {
    check_same_device(name, t, fields);
    const IntegerArray values = integer_array(name, t);
    FC_CHECK(t.size(0) == requests) << name << ": want " << requests << " entries, one per request, got " << t.size(0);
    return values;
  }

  // All but the sizes.
  WindowInput input(const WindowParams& p) const {
    WindowInput in{};
    check_same_device("req_to_token", req_to_token, fields);
    check_int32_matrix("req_to_token", req_to_token, "[pool, max_context] int32 with stride 1", true);
    FC_CHECK(req_to_token.size(0) >= 1) << "req_to_token: want rows, got " << shape_text(req_to_token);
    in.ids = static_cast<const int*>(req_to_token.data_ptr());
    in.row_stride = req_to_token.stride(0), in.num_table_rows = req_to_token.size(0);
    in.num_positions = static_cast<int>(clamp(req_to_token.size(1), 0, p.max_tokens));
    in.requests = checked_size("req_pool_indices", req_pool_indices.numel(), 1, p.max_rows);
    in.table_rows = vector("req_pool_indices", req_pool_indices, in.requests);
    in.ends = vector("seq_lens", seq_lens, in.requests);
    if (q_lens.has_value()) in.q_lens = vector("q_lens", q_lens.value(), in.requests);
    if (slot_map.has_value()) {
      in.slots = slot_map.value().numel();
      FC_CHECK(in.slots >= 1) << "slot_map: want slots, got none";
      const IntegerArray values = vector("slot_map", slot_map.value(), in.slots);
      in.slot_map = static_cast<const int*>(values.data), in.slot_shift = values.are_64bit;
    }
    return in;
  }

  WindowFields output(const WindowParams& p) const {
    WindowFields out = window_fields(p, fields);
    check_same_device("table", table, fields);
    FC_CHECK(table.ndim() == 1 && table.dtype().code == kDLInt && table.dtype().bits == 32 && table.IsContiguous())
        << "table: want contiguous [entries] int32, got " << shape_text(table);
    out.table = static_cast<int*>(table.data_ptr()), out.table_entries = table.size(0);
    return out;
  }
};

inline unsigned char* mask_bytes(const char* name, const TensorView& t, const TensorView& like) {
  check_same_device(name, t, like);
  FC_CHECK(t.ndim() == 1 && t.dtype().bits == 8 && t.IsContiguous())
      << name << ": want a contiguous vector of bool or uint8, got " << shape_text(t) << " of "
      << static_cast<int>(t.dtype().bits) << " bits";
  return static_cast<unsigned char*>(t.data_ptr());
}

// What does a step, on the device of its tensors.
struct WindowFunctions {
  void (*snapshot)(const WindowParams&, const WindowInput&, const WindowFields&, const TensorView& like);
  void (*cut_mask)(const WindowFields&, const WindowMask&, const TensorView& like);
};

// [snapshot(fields, table, req_to_token, req_pool_indices, seq_lens, q_lens, slot_map, rows, num_tokens, max_queries,
// width), cut_mask(fields, mask, cut, rows)], as the structs of window.h have them.
inline tvm::ffi::Array<tvm::ffi::Function> make_window_functions(const WindowOptions& options,
                                                                 const WindowFunctions& run) {
  using tvm::ffi::Function;
  using tvm::ffi::Optional;
  const WindowParams p = window_params(options);
  const auto snapshot = [=](TensorView fields, TensorView table, TensorView req_to_token, TensorView req_pool_indices,
                            TensorView seq_lens, Optional<TensorView> q_lens, Optional<TensorView> slot_map,
                            int64_t rows, int64_t num_tokens, int64_t max_queries, int64_t width) {
    const WindowTensors tensors{fields, table, req_to_token, req_pool_indices, seq_lens, q_lens, slot_map};
    constexpr int64_t kMaxTokens = 1 << 20;
    WindowInput in = tensors.input(p);
    in.rows = checked_size("rows", rows, 1, p.max_rows);
    FC_CHECK(!in.one_row_each(p) || in.rows == in.requests)
        << "rows: want " << in.requests << ", one per request, got " << rows;
    in.num_tokens = checked_size("num_tokens", num_tokens, 0, kMaxTokens);
    in.max_queries = checked_size("max_queries", max_queries, 1, kMaxTokens);
    in.width = checked_size("width", width, 1, p.max_tokens);
    const WindowFields out = tensors.output(p);
    const int64_t entries = int64_t{in.rows} * p.stride + (in.spread(p) ? in.num_tokens >> p.page_shift : 0);
    FC_CHECK(out.table_entries >= entries) << "table: want " << entries << " entries for " << rows << " rows and "
                                           << num_tokens << " tokens, got " << out.table_entries;
    run.snapshot(p, in, out, fields);
  };
  const auto cut_mask = [=](TensorView fields, TensorView mask, TensorView cut, int64_t rows) {
    run.cut_mask(window_fields(p, fields),
                 {mask_bytes("custom_mask", mask, fields), mask.numel(), mask_bytes("cut", cut, fields), cut.numel(),
                  static_cast<int>(checked_size("rows", rows, 1, p.max_rows))},
                 fields);
  };
  return {Function::FromTyped(snapshot), Function::FromTyped(cut_mask)};
}

}  // namespace flashcore
