// Exports of the extend kernels (attention/extend_params.h). Every launch goes to the caller's current stream; nothing
// is allocated. Errors: ValueError "<argument>: want <rule>, got <value>".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tvm/ffi/function.h>

#include <algorithm>

#include "attention/extend_params.h"
#include "common/tensor_check.h"

namespace flashcore::extend {
namespace {

constexpr int64_t kMaxTokens = 1 << 20;
// token_at is exact for the q_rows of so many tokens, and those past the end of the last tile.
static_assert((kMaxTokens * kNarrowRows + 64 * kMaxWarpgroups) * (kNarrowRows - 1) < int64_t{1} << 32);

// `e4m3`: of the cache, 0 or 1.
WorkspaceLayout checked_layout(int64_t max_rows, int64_t max_tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                               int64_t partial_capacity, int64_t e4m3) {
  check_heads(heads, kv_heads, head_dim);
  FC_CHECK(max_rows >= 1 && max_rows <= kMaxBatch) << "max_rows: want 1 .. " << kMaxBatch << ", got " << max_rows;
  FC_CHECK(max_tokens >= 1 && max_tokens <= kMaxTokens)
      << "max_tokens: want 1 .. " << kMaxTokens << ", got " << max_tokens;
  FC_CHECK(partial_capacity >= 0 && partial_capacity < (1 << 16))
      << "partial_capacity: want 0 .. 65535, got " << partial_capacity;
  return workspace_layout(max_rows, max_tokens, heads, kv_heads, head_dim, e4m3 != 0, partial_capacity);
}

Workspace checked_workspace(const TensorView& workspace, const WorkspaceLayout& w) {
  return bind_workspace(w, workspace_memory(workspace, w.bytes, "extend_workspace_bytes"));
}

int64_t extend_workspace_bytes(int64_t max_rows, int64_t max_tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                               int64_t partial_capacity, int64_t e4m3) {
  return static_cast<int64_t>(
      checked_layout(max_rows, max_tokens, heads, kv_heads, head_dim, partial_capacity, e4m3).bytes);
}

bool check_lens(const char* name, const TensorView& t, const TensorView& like, int64_t rows) {
  check_device(name, t, like);
  FC_CHECK(t.ndim() == 1 && t.size(0) == rows && t.dtype().code == kDLInt &&
           (t.dtype().bits == 32 || t.dtype().bits == 64) && t.IsContiguous())
      << name << ": want contiguous [" << rows << "] int32 or int64, got " << shape_text(t) << " of "
      << static_cast<int>(t.dtype().bits) << " bits";
  return t.dtype().bits == 64;
}

void extend_schedule(TensorView sizes, TensorView row_order, TensorView segment_rows, TensorView segment_positions,
                     TensorView segment_entries, TensorView row_indptr, TensorView row_segments, TensorView seq_lens,
                     TensorView q_lens, TensorView workspace, int64_t num_tokens, int64_t table_stride,
                     int64_t page_size, int64_t max_rows, int64_t max_tokens, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, int64_t partial_capacity, int64_t visible, int64_t window_left, TensorView table,
                     int64_t gather_slots, int64_t gather_rows_scattered, int64_t gather_rows_boxed,
                     int64_t gather_rows_converted, int64_t e4m3, Optional<TensorView> row_entries) {
  const WorkspaceLayout w = checked_layout(max_rows, max_tokens, heads, kv_heads, head_dim, partial_capacity, e4m3);
  const int64_t batch = row_order.numel(), segments = segment_entries.numel() - 1;
  FC_CHECK(batch >= 1 && batch <= max_rows) << "row_order: want 1 .. " << max_rows << " rows, got " << batch;
  FC_CHECK(num_tokens >= 0 && num_tokens <= max_tokens)
      << "num_tokens: want 0 .. " << max_tokens << ", got " << num_tokens;
  FC_CHECK(table_stride >= 1 && table_stride * page_size < (int64_t{1} << 31))
      << "table_stride: want 1 .. 2^31 - 1 tokens, got " << table_stride << " pages of " << page_size;
  FC_CHECK(visible >= 0 && visible <= 2) << "visible: want 0 (causal), 1 (all) or 2 (masked), got " << visible;
  FC_CHECK(window_left < 0 || visible != 1)
      << "window_left: want causal attention or a mask with a window, got visible " << visible;
  page_shift_of(page_size);
  ScheduleParams p{};
  p.work = checked_workspace(workspace, w);
  p.layout.sizes = int_array("sizes", sizes, workspace, 4);
  p.layout.row_order = int_array("row_order", row_order, workspace, 1);
  p.layout.segment_rows = int_array("segment_rows", segment_rows, workspace, 2 * segments);
  p.layout.segment_positions = int_array("segment_positions", segment_positions, workspace, 2 * segments);
  p.layout.page_indptr = int_array("segment_entries", segment_entries, workspace, 2);
  p.layout.row_indptr = int_array("row_indptr", row_indptr, workspace, batch + 1);
  p.layout.row_segments = int_array("row_segments", row_segments, workspace, 1);
  p.layout.batch = batch;
  p.layout.segment_capacity = segments;
  p.layout.row_segment_capacity = row_segments.numel();
  p.layout.page_size = page_size;
  p.seq_lens_are_64bit = check_lens("seq_lens", seq_lens, workspace, batch);
  p.q_lens_are_64bit = check_lens("q_lens", q_lens, workspace, batch);
  p.seq_lens = seq_lens.data_ptr();
  p.q_lens = q_lens.data_ptr();
  p.num_tokens = num_tokens;
  p.table_stride = table_stride;
  if (row_entries.has_value()) p.row_entries = int_array("row_entries", row_entries.value(), workspace, batch);
  p.visible = static_cast<Visible>(visible);
  p.window_left = window_left < 0 ? -1 : static_cast<int>(std::min(window_left, int64_t{1} << 30));
  p.kv_heads = kv_heads;
  p.ratio = heads / kv_heads;
  p.ctas = multiprocessors(workspace);
  p.tile_rows = tile_rows(head_dim, e4m3 != 0);
  p.converted_tile_rows = tile_rows(head_dim, false);
  p.tile_tokens = tile_tokens(head_dim);
  p.head_dim = head_dim;
  FC_CHECK(gather_slots >= 0 && gather_slots <= kMaxGatherSlots)
      << "gather_slots: want 0 .. " << kMaxGatherSlots << ", got " << gather_slots;
  p.table = int_array("table", table, workspace, 2);
  p.table_entries = table.numel();
  p.gather_slots = gather_slots;
  p.gather_rows_scattered = std::clamp(gather_rows_scattered, int64_t{1}, int64_t{1} << 30);
  p.gather_rows_boxed = std::clamp(gather_rows_boxed, int64_t{1}, int64_t{1} << 30);
  p.gather_rows_converted = e4m3 != 0 ? std::clamp(gather_rows_converted, int64_t{1}, int64_t{1} << 30) : 0;
  launch_schedule(p, current_stream(workspace));
}

template <typename Cache>
void launch_dim(const Params& p, int64_t head_dim, int ctas, cudaStream_t stream) {
  if (head_dim == 64) launch<Cache, 64>(p, ctas, stream);
  if (head_dim == 128) launch<Cache, 128>(p, ctas, stream);
  if (head_dim == 256) launch<Cache, 256>(p, ctas, stream);
}

// `type`: of what is read.
void launch_type(const Params& p, DType type, int64_t head_dim, int ctas, cudaStream_t stream) {
  if (type == DType::kBf16) launch_dim<__nv_bfloat16>(p, head_dim, ctas, stream);
  if (type == DType::kFp16) launch_dim<__half>(p, head_dim, ctas, stream);
  if (type == DType::kE4m3) launch_dim<E4m3>(p, head_dim, ctas, stream);
}

// The launch that reads an e4m3 cache as it was converted: consecutive slots of [G, D] in q's dtype.
Params of_converted(Params p, int64_t head_dim) {
  const int64_t slot = int64_t{p.kv_heads} * head_dim;
  p.k = p.gathered;
  p.v = static_cast<const char*>(p.gathered) + p.gather_slots * slot * 2;
  p.num_slots = p.gather_slots;
  p.kv_slot_stride = slot;
  p.kv_head_stride = head_dim;
  p.kv_slot_units = slot / 8;
  p.kv_head_units = head_dim / 8;
  p.converted = true;
  return p;
}

void extend(TensorView q, TensorView k_cache, TensorView v_cache, TensorView table, TensorView workspace,
            TensorView out, int64_t page_size, int64_t max_rows, int64_t max_tokens, int64_t partial_capacity,
            int64_t windowed, double scale, double logit_cap, Optional<TensorView> sinks, Optional<TensorView> k_scale,
            Optional<TensorView> v_scale, double v_factor, Optional<TensorView> custom_mask,
            Optional<TensorView> gathered) {
  check_qkv(q, k_cache, v_cache, out, workspace);
  const int64_t heads = q.size(1), head_dim = q.size(2), kv_heads = k_cache.size(1);
  const DType cached = cache_type("k_cache", k_cache, q);
  const WorkspaceLayout w =
      checked_layout(max_rows, max_tokens, heads, kv_heads, head_dim, partial_capacity, cached == DType::kE4m3);
  FC_CHECK(q.size(0) <= max_tokens) << "q: want at most " << max_tokens << " tokens, got " << shape_text(q);
  Params p{};
  fill_attention(p, q, k_cache, v_cache, out, scale, logit_cap, sinks);
  p.cache = cache_scales(q, k_cache, k_scale, v_scale, v_factor);
  if (q.size(0) == 0) return;
  p.boxed_tokens = static_cast<int>(q.size(0));
  p.work = checked_workspace(workspace, w);
  p.table = int_array("table", table, workspace, 1);
  if (custom_mask.has_value()) {
    const TensorView& m = custom_mask.value();
    check_device("custom_mask", m, workspace);
    FC_CHECK(m.dtype().bits == 8 && m.ndim() == 1 && m.IsContiguous() && m.numel() < (int64_t{1} << 31))
        << "custom_mask: want one contiguous dimension of bool or uint8, fewer than 2^31, got " << shape_text(m)
        << " of " << static_cast<int>(m.dtype().bits) << " bits";
    p.custom_mask = static_cast<const uint8_t*>(m.data_ptr());
    p.mask_size = m.numel();
  }
  p.ratio_inverse = p.ratio > 1 ? static_cast<uint32_t>(((uint64_t{1} << 32) + p.ratio - 1) / p.ratio) : 0;
  p.page_shift = page_shift_of(page_size);
  p.table_entries = table.numel();
  p.windowed = windowed != 0;
  const cudaStream_t stream = current_stream(workspace);
  const int ctas = multiprocessors(workspace);
  if (gathered.has_value()) {
    const TensorView& g = gathered.value();
    check_device("gathered", g, workspace);
    const int64_t row_bytes = head_dim * 2;
    FC_CHECK(g.ndim() == 4 && g.size(0) == 2 && g.size(1) > 0 && g.size(2) == kv_heads && g.size(3) == row_bytes &&
             g.dtype().bits == 8 && g.IsContiguous())
        << "gathered: want contiguous uint8 [2, slots, " << kv_heads << ", " << row_bytes << "], got " << shape_text(g);
    for (const void* base :
         {p.k, p.v, static_cast<const void*>(g.data_ptr())})  // the maps, which come later, check too
      FC_CHECK(reinterpret_cast<uintptr_t>(base) % 16 == 0)
          << "k_cache, v_cache, gathered: want a base aligned to 16 bytes";
    p.gathered = g.data_ptr();
    p.gather_slots = g.size(1);
    launch_gather(p, head_dim * bytes_of(cached) / 16, cached == DType::kE4m3, ctas, stream);
  }
  if (cached == DType::kE4m3 && p.gathered != nullptr) {
    // Both are launched, as only the device knows which one serves; the other one ends at once.
    launch_type(of_converted(p, head_dim), half_type("q", q), head_dim, ctas, stream);
    p.gathered = nullptr;
  }
  launch_type(p, cached, head_dim, ctas, stream);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(extend_workspace_bytes, extend_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(extend_schedule, extend_schedule);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(extend, extend);
}  // namespace flashcore::extend
