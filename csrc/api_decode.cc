// Exports of decode (tvm-ffi). Every launch goes to the caller's current stream; nothing is allocated.
// Errors: ValueError "<argument>: want <rule>, got <value>".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tvm/ffi/function.h>

#include <algorithm>

#include "attention/params.h"
#include "common/tensor_check.h"

namespace flashcore {
namespace {

WorkspaceLayout checked_layout(int64_t batch, int64_t segment_capacity, int64_t heads, int64_t kv_heads,
                               int64_t head_dim, int64_t partial_capacity) {
  check_heads(heads, kv_heads, head_dim);
  FC_CHECK(batch > 0 && batch <= kMaxBatch) << "batch: want 1 .. " << kMaxBatch << ", got " << batch;
  FC_CHECK(segment_capacity > 0 && segment_capacity <= kMaxSegments)
      << "segment_capacity: want 1 .. " << kMaxSegments << ", got " << segment_capacity;
  FC_CHECK(partial_capacity > 0 && partial_capacity < (1 << 24))
      << "partial_capacity: want 1 .. 2^24 - 1, got " << partial_capacity;
  const WorkspaceLayout w = workspace_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(w.entry_capacity < (1 << 16)) << "partial_capacity: want fewer than 65536 work items, got "
                                         << w.entry_capacity;
  return w;
}

Workspace checked_workspace(const TensorView& workspace, const WorkspaceLayout& w) {
  return bind_workspace(w, workspace_memory(workspace, w.bytes, "decode_workspace_bytes"));
}

int64_t decode_workspace_bytes(int64_t batch, int64_t segment_capacity, int64_t heads, int64_t kv_heads,
                               int64_t head_dim, int64_t partial_capacity) {
  return static_cast<int64_t>(
      checked_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity).bytes);
}

PageDivision division_by(int64_t page_size) {
  int shift = 31;
  while ((int64_t{1} << (shift - 31)) < page_size) ++shift;
  return {shift, static_cast<uint32_t>(((int64_t{1} << shift) + page_size - 1) / page_size)};
}

void decode_schedule(TensorView sizes, TensorView row_order, TensorView segment_rows, TensorView segment_positions,
                     TensorView page_indptr, TensorView page_indices, TensorView workspace, int64_t page_size,
                     int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t partial_capacity, int64_t wide_ns,
                     int64_t wide_item_ns, int64_t narrow_ns, int64_t narrow_item_ns, int64_t hbm_ps) {
  const int64_t batch = row_order.numel(), segments = page_indptr.numel() - 1;
  const WorkspaceLayout w = checked_layout(batch, segments, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(page_size > 0 && page_size <= kMaxPageSize)
      << "page_size: want 1 .. " << kMaxPageSize << ", got " << page_size;
  for (const int64_t cost : {wide_ns, wide_item_ns, narrow_ns, narrow_item_ns, hbm_ps})
    FC_CHECK(cost > 0 && cost < (1 << 24)) << "costs: want positive ones below 2^24, got " << cost;
  ScheduleParams p{};
  p.work = checked_workspace(workspace, w);
  p.layout = {int_array("sizes", sizes, workspace, 4),
              int_array("row_order", row_order, workspace, 1),
              int_array("segment_rows", segment_rows, workspace, 2 * segments),
              int_array("segment_positions", segment_positions, workspace, 2 * segments),
              int_array("page_indptr", page_indptr, workspace, 2),
              int_array("page_indices", page_indices, workspace, 1),
              nullptr,
              nullptr,
              static_cast<int>(batch),
              static_cast<int>(segments),
              static_cast<int>(page_indices.numel()),
              0,
              static_cast<int>(page_size)};
  p.by_page = division_by(page_size);
  p.cost = {static_cast<int>(wide_ns),        static_cast<int>(wide_item_ns), static_cast<int>(narrow_ns),
            static_cast<int>(narrow_item_ns), static_cast<int>(hbm_ps),       head_dim == 256 ? 64 : 128};
  p.kv_heads = kv_heads;
  p.ratio = heads / kv_heads;
  p.ctas = std::min(multiprocessors(workspace), kMaxCtas);
  launch_schedule(p, current_stream(workspace));
}

template <typename Cache>
void launch_decode_dim(const DecodeParams& p, int64_t head_dim, int ctas, cudaStream_t stream) {
  if (head_dim == 64) launch_decode<Cache, 64>(p, ctas, stream);
  if (head_dim == 128) launch_decode<Cache, 128>(p, ctas, stream);
  if (head_dim == 256) launch_decode<Cache, 256>(p, ctas, stream);
}

void decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_indices, TensorView workspace,
            TensorView out, int64_t segment_capacity, int64_t partial_capacity, int64_t page_size, double scale,
            double logit_cap, Optional<TensorView> sinks, Optional<TensorView> k_scale, Optional<TensorView> v_scale,
            double v_factor) {
  check_qkv(q, k_cache, v_cache, out, workspace);
  const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k_cache.size(1);
  const WorkspaceLayout w = checked_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(page_size > 0 && page_size <= kMaxPageSize)
      << "page_size: want 1 .. " << kMaxPageSize << ", got " << page_size;
  DecodeParams p{};
  p.work = checked_workspace(workspace, w);
  fill_attention(p, q, k_cache, v_cache, out, scale, logit_cap, sinks);
  p.cache = cache_scales(q, k_cache, k_scale, v_scale, v_factor);
  p.batch = batch;
  p.page_size = page_size;
  p.by_page = division_by(page_size);
  const int64_t heads_per_slot = p.kv_slot_stride / std::max<int64_t>(p.kv_head_stride, 1);
  p.strided = heads_per_slot * p.kv_head_stride == p.kv_slot_stride && heads_per_slot > 0 &&
              heads_per_slot * p.num_slots < (int64_t{1} << 31);
  p.heads_per_slot = static_cast<uint32_t>(heads_per_slot);
  p.page_indices = int_array("page_indices", page_indices, workspace, 1);
  p.page_capacity = page_indices.numel();
  const cudaStream_t stream = current_stream(workspace);
  const DType dtype = half_type("q", q);
  const int ctas = std::min(multiprocessors(workspace), kMaxCtas);
  switch (cache_type("k_cache", k_cache, q)) {
    case DType::kBf16:
      launch_decode_dim<__nv_bfloat16>(p, head_dim, ctas, stream);
      break;
    case DType::kFp16:
      launch_decode_dim<__half>(p, head_dim, ctas, stream);
      break;
    case DType::kE4m3:
      launch_decode_dim<E4m3>(p, head_dim, ctas, stream);
      break;
  }
  launch_merge(dtype, {p.work, p.sinks, p.out, p.out_row_stride, p.batch, p.heads, static_cast<int>(head_dim)}, stream);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_workspace_bytes, decode_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_schedule, decode_schedule);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode);
}  // namespace flashcore
