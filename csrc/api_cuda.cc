// Exports of the CUDA library (tvm-ffi). Every launch goes to the caller's current stream; nothing is allocated.
// Errors: ValueError "<argument>: want <rule>, got <value>".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <string>

#include "attention/params.h"
#include "common/cuda_check.h"
#include "pager/device_pager.h"

namespace flashcore {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

std::string shape_text(const TensorView& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

cudaStream_t current_stream(const TensorView& t) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(t.device().device_type, t.device().device_id));
}

void check_device(const char* name, const TensorView& t, const TensorView& like) {
  FC_CHECK(t.device().device_type == kDLCUDA)
      << name << ": want a CUDA tensor, got device type " << static_cast<int>(t.device().device_type);
  FC_CHECK(t.device().device_id == like.device().device_id)
      << name << ": want device cuda:" << like.device().device_id
      << " (that of the workspace), got cuda:" << t.device().device_id;
}

const int* int_array(const char* name, const TensorView& t, const TensorView& like, int64_t at_least) {
  check_device(name, t, like);
  FC_CHECK(t.dtype().code == kDLInt && t.dtype().bits == 32)
      << name << ": want int32, got " << static_cast<int>(t.dtype().bits) << "-bit type "
      << static_cast<int>(t.dtype().code);
  FC_CHECK(t.IsContiguous()) << name << ": want a contiguous tensor, got strides of shape " << shape_text(t);
  FC_CHECK(t.numel() >= at_least) << name << ": want at least " << at_least << " elements, got " << shape_text(t);
  return static_cast<const int*>(t.data_ptr());
}

DType half_type(const char* name, const TensorView& t) {
  const bool bf16 = t.dtype().code == kDLBfloat && t.dtype().bits == 16,
             fp16 = t.dtype().code == kDLFloat && t.dtype().bits == 16;
  FC_CHECK(bf16 || fp16) << name << ": want bfloat16 or float16, got " << static_cast<int>(t.dtype().bits)
                         << "-bit type " << static_cast<int>(t.dtype().code);
  return bf16 ? DType::kBf16 : DType::kFp16;
}

int multiprocessors(const TensorView& t) {
  int count = 0;
  FC_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.device().device_id));
  return count;
}

void check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  FC_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= kNarrowRows)
      << "heads: want a multiple of kv_heads, at most " << kNarrowRows << " times it, got " << heads << " heads on "
      << kv_heads << " KV heads";
  FC_CHECK(head_dim == 64 || head_dim == 128 || head_dim == 256) << "head_dim: want 64, 128 or 256, got " << head_dim;
}

WorkspaceLayout checked_layout(int64_t batch, int64_t segment_capacity, int64_t heads, int64_t kv_heads,
                               int64_t head_dim, int64_t partial_capacity) {
  check_heads(heads, kv_heads, head_dim);
  FC_CHECK(batch > 0 && batch < (1 << 20)) << "batch: want 1 .. " << (1 << 20) - 1 << ", got " << batch;
  FC_CHECK(segment_capacity > 0) << "segment_capacity: want a positive size, got " << segment_capacity;
  FC_CHECK(partial_capacity > 0) << "partial_capacity: want a positive size, got " << partial_capacity;
  const WorkspaceLayout w = workspace_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(w.entry_capacity < (1 << 16)) << "partial_capacity: want fewer than 65536 work items, got "
                                         << w.entry_capacity;
  return w;
}

Workspace checked_workspace(const TensorView& workspace, const WorkspaceLayout& w) {
  FC_CHECK(workspace.device().device_type == kDLCUDA)
      << "workspace: want a CUDA tensor, got device type " << static_cast<int>(workspace.device().device_type);
  const size_t bytes = workspace.numel() * workspace.dtype().bits / 8;
  FC_CHECK(workspace.IsContiguous() && bytes >= w.bytes)
      << "workspace: want at least " << w.bytes << " contiguous bytes (decode_workspace_bytes), got " << bytes;
  FC_CHECK(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 256 == 0)
      << "workspace: want 256-byte alignment, got address " << workspace.data_ptr();
  return bind_workspace(w, workspace.data_ptr());
}

int64_t decode_workspace_bytes(int64_t batch, int64_t segment_capacity, int64_t heads, int64_t kv_heads,
                               int64_t head_dim, int64_t partial_capacity) {
  return static_cast<int64_t>(
      checked_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity).bytes);
}

void decode_schedule(TensorView sizes, TensorView row_order, TensorView segment_rows, TensorView segment_positions,
                     TensorView page_indptr, TensorView page_indices, TensorView row_indptr, TensorView row_segments,
                     TensorView workspace, int64_t page_size, int64_t heads, int64_t kv_heads, int64_t head_dim,
                     int64_t partial_capacity, int64_t wide_ns, int64_t narrow_ns, int64_t hbm_ps) {
  const int64_t batch = row_order.numel(), segments = page_indptr.numel() - 1;
  const WorkspaceLayout w = checked_layout(batch, segments, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(page_size > 0) << "page_size: want a positive size, got " << page_size;
  FC_CHECK(wide_ns > 0 && narrow_ns > 0 && hbm_ps > 0)
      << "wide_ns, narrow_ns, hbm_ps: want positive costs, got " << wide_ns << ", " << narrow_ns << ", " << hbm_ps;
  ScheduleParams p{};
  p.work = checked_workspace(workspace, w);
  p.layout = {int_array("sizes", sizes, workspace, 4),
              int_array("row_order", row_order, workspace, 1),
              int_array("segment_rows", segment_rows, workspace, 2 * segments),
              int_array("segment_positions", segment_positions, workspace, 2 * segments),
              int_array("page_indptr", page_indptr, workspace, 2),
              int_array("page_indices", page_indices, workspace, 1),
              int_array("row_indptr", row_indptr, workspace, batch + 1),
              int_array("row_segments", row_segments, workspace, 1),
              static_cast<int>(batch),
              static_cast<int>(segments),
              static_cast<int>(page_indices.numel()),
              static_cast<int>(row_segments.numel()),
              static_cast<int>(page_size)};
  p.cost = {static_cast<int>(wide_ns), static_cast<int>(narrow_ns), static_cast<int>(hbm_ps),
            head_dim == 256 ? 64 : 128};
  p.kv_heads = kv_heads;
  p.ratio = heads / kv_heads;
  p.ctas = multiprocessors(workspace);
  launch_schedule(p, current_stream(workspace));
}

template <typename T>
void launch_decode_dim(const DecodeParams& p, int64_t head_dim, int ctas, cudaStream_t stream) {
  if (head_dim == 64) launch_decode<T, 64>(p, ctas, stream);
  if (head_dim == 128) launch_decode<T, 128>(p, ctas, stream);
  if (head_dim == 256) launch_decode<T, 256>(p, ctas, stream);
}

void check_qkv(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache, const TensorView& out) {
  FC_CHECK(q.ndim() == 3 && q.stride(2) == 1 && q.stride(1) == q.size(2) && q.stride(0) % 8 == 0 &&
           reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0)
      << "q: want [B, H, D] with heads and dims contiguous, aligned to 16 bytes, got " << shape_text(q);
  FC_CHECK(q.size(0) * q.stride(0) < (int64_t{1} << 31)) << "q: want fewer than 2^31 elements, got " << shape_text(q);
  FC_CHECK(out.ndim() == 3 && out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == q.size(2) &&
           out.stride(2) == 1 && out.stride(1) == out.size(2))
      << "out: want " << shape_text(q) << " with heads and dims contiguous, got " << shape_text(out);
  FC_CHECK(k_cache.ndim() == 3 && k_cache.size(2) == q.size(2) && k_cache.stride(2) == 1)
      << "k_cache: want [slots, G, " << q.size(2) << "] with dims contiguous, got " << shape_text(k_cache);
  FC_CHECK(v_cache.ndim() == 3 && v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1) &&
           v_cache.size(2) == k_cache.size(2) && v_cache.stride(0) == k_cache.stride(0) &&
           v_cache.stride(1) == k_cache.stride(1) && v_cache.stride(2) == 1)
      << "v_cache: want shape and strides of k_cache " << shape_text(k_cache) << ", got " << shape_text(v_cache);
  FC_CHECK(k_cache.size(0) > 0 && k_cache.size(0) < (int64_t{1} << 31))
      << "k_cache: want 1 .. 2^31 - 1 slots, got " << k_cache.size(0);
  FC_CHECK(k_cache.stride(0) % 8 == 0 && k_cache.stride(1) % 8 == 0 &&
           k_cache.size(0) * (k_cache.stride(0) / 8) < (int64_t{1} << 32))
      << "k_cache: want strides in multiples of 8 elements and less than 64 GiB, got strides " << k_cache.stride(0)
      << ", " << k_cache.stride(1) << " of " << shape_text(k_cache);
  FC_CHECK(half_type("k_cache", k_cache) == half_type("q", q) && half_type("v_cache", v_cache) == half_type("q", q) &&
           half_type("out", out) == half_type("q", q))
      << "k_cache, v_cache, out: want the dtype of q, got another";
}

void decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView page_indices, TensorView row_indptr,
            TensorView row_segments, TensorView workspace, TensorView out, int64_t segment_capacity,
            int64_t partial_capacity, int64_t page_size, double scale, double logit_cap, Optional<TensorView> sinks) {
  check_qkv(q, k_cache, v_cache, out);
  for (auto& [name, t] :
       {std::pair<const char*, const TensorView&>{"q", q}, {"k_cache", k_cache}, {"v_cache", v_cache}, {"out", out}})
    check_device(name, t, workspace);
  const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k_cache.size(1);
  const WorkspaceLayout w = checked_layout(batch, segment_capacity, heads, kv_heads, head_dim, partial_capacity);
  FC_CHECK(page_size > 0) << "page_size: want a positive size, got " << page_size;
  FC_CHECK(scale > 0) << "scale: want a positive number, got " << scale;
  FC_CHECK(logit_cap >= 0) << "logit_cap: want 0 (none) or a positive number, got " << logit_cap;
  DecodeParams p{};
  p.work = checked_workspace(workspace, w);
  p.q = q.data_ptr();
  p.out = out.data_ptr();
  p.k = k_cache.data_ptr();
  p.v = v_cache.data_ptr();
  p.page_indices = int_array("page_indices", page_indices, workspace, 1);
  if (sinks.has_value()) {
    const TensorView& s = sinks.value();
    check_device("sinks", s, workspace);
    FC_CHECK(s.dtype().code == kDLFloat && s.dtype().bits == 32 && s.ndim() == 1 && s.size(0) == heads &&
             s.IsContiguous())
        << "sinks: want contiguous float32 [" << heads << "], got " << shape_text(s);
    p.sinks = static_cast<const float*>(s.data_ptr());
  }
  p.q_row_stride = q.stride(0);
  p.out_row_stride = out.stride(0);
  p.kv_slot_stride = k_cache.stride(0);
  p.kv_head_stride = k_cache.stride(1);
  p.kv_slot_units = k_cache.stride(0) / 8;
  p.kv_head_units = k_cache.stride(1) / 8;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.ratio = heads / kv_heads;
  p.page_size = page_size;
  p.num_slots = k_cache.size(0);
  p.page_capacity = page_indices.numel();
  constexpr double kLog2e = 1.4426950408889634;
  p.scale_log2 = logit_cap > 0 ? kLog2e : scale * kLog2e;
  p.logit_cap = logit_cap;
  p.cap_scale_log2 = logit_cap > 0 ? 2 * scale / logit_cap * kLog2e : 0;
  const cudaStream_t stream = current_stream(workspace);
  const DType dtype = half_type("q", q);
  const int ctas = multiprocessors(workspace);
  dtype == DType::kBf16 ? launch_decode_dim<__nv_bfloat16>(p, head_dim, ctas, stream)
                        : launch_decode_dim<__half>(p, head_dim, ctas, stream);

  MergeParams m{};
  m.layout.row_indptr = int_array("row_indptr", row_indptr, workspace, batch + 1);
  m.layout.row_segments = int_array("row_segments", row_segments, workspace, 1);
  m.layout.batch = batch;
  m.layout.segment_capacity = segment_capacity;
  m.layout.row_segment_capacity = row_segments.numel();
  m.work = p.work;
  m.sinks = p.sinks;
  m.out = p.out;
  m.out_row_stride = p.out_row_stride;
  m.heads = heads;
  m.head_dim = head_dim;
  launch_merge(dtype, m, stream);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_workspace_bytes, decode_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_schedule, decode_schedule);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode);
}  // namespace flashcore

// ---- device pager (csrc/pager/device_pager.h) ----
namespace flashcore {
namespace {

DevicePagerParams pager_params(int64_t max_rows, int64_t row_pages, int64_t page_size, bool emit) {
  FC_CHECK(max_rows >= 1 && max_rows <= kPagerRows) << "max_rows: want 1 .. " << kPagerRows << ", got " << max_rows;
  FC_CHECK(row_pages >= 1 && row_pages <= kMaxRowPages)
      << "row_pages: want 1 .. " << kMaxRowPages << ", got " << row_pages;
  FC_CHECK(page_size >= 1 && page_size <= 1024 && (page_size & (page_size - 1)) == 0)
      << "page_size: want a power of two up to 1024, got " << page_size;
  DevicePagerParams p{};
  p.max_rows = max_rows;
  p.table_stride = (row_pages + kTableAlign - 1) / kTableAlign * kTableAlign;
  while ((int64_t{1} << p.page_shift) < page_size) ++p.page_shift;
  p.emit = emit;
  FC_CHECK(!emit || max_rows * (row_pages + 2) < (int64_t{1} << 31))
      << "canonical: want fewer than 2^31 page entries, got " << max_rows << " rows of " << row_pages << " pages";
  return p;
}

// Name -> [offset, elements], in ints, of every array in the pager's memory; "" -> [0, ints in all].
Map<String, Array<int64_t>> device_pager_arrays(int64_t max_rows, int64_t row_pages, bool emit, int64_t ctas) {
  DevicePagerParams p = pager_params(max_rows, row_pages, 1, emit);
  Map<String, Array<int64_t>> arrays;
  const int64_t total = lay_out_arrays(
      p, nullptr, row_pages, ctas,
      [&](const char* name, int64_t at, int64_t elements) { arrays.Set(name, Array<int64_t>{at, elements}); });
  arrays.Set("", Array<int64_t>{0, total});
  return arrays;
}

void pager_snapshot(const DevicePagerParams& p, int ctas, TensorView memory, TensorView req_to_token,
                    TensorView req_pool_indices, TensorView seq_lens) {
  check_device("req_to_token", req_to_token, memory);
  check_device("req_pool_indices", req_pool_indices, memory);
  check_device("seq_lens", seq_lens, memory);
  FC_CHECK(req_to_token.ndim() == 2 && req_to_token.dtype().code == kDLInt && req_to_token.dtype().bits == 32 &&
           req_to_token.stride(1) == 1)
      << "req_to_token: want [pool, max_context] int32 with stride 1, got " << shape_text(req_to_token);
  for (auto& [name, t] :
       {std::pair<const char*, const TensorView&>{"req_pool_indices", req_pool_indices}, {"seq_lens", seq_lens}}) {
    FC_CHECK(t.ndim() == 1 && t.dtype().code == kDLInt && (t.dtype().bits == 32 || t.dtype().bits == 64) &&
             t.IsContiguous())
        << name << ": want contiguous [B] int32 or int64, got " << shape_text(t) << " of "
        << static_cast<int>(t.dtype().bits) << " bits";
  }
  const int64_t rows = seq_lens.size(0);
  FC_CHECK(rows >= 1 && rows <= p.max_rows) << "seq_lens: want 1 .. " << p.max_rows << " rows (max_rows), got " << rows;
  FC_CHECK(req_pool_indices.size(0) == rows)
      << "req_pool_indices: want " << rows << " entries, one per row, got " << req_pool_indices.size(0);
  SnapshotInput in{static_cast<const int*>(req_to_token.data_ptr()),
                   req_pool_indices.data_ptr(),
                   seq_lens.data_ptr(),
                   req_to_token.stride(0),
                   req_to_token.size(0),
                   req_to_token.size(1),
                   static_cast<int>(rows),
                   req_pool_indices.dtype().bits == 64,
                   seq_lens.dtype().bits == 64};
  launch_snapshot(p, in, ctas, current_stream(memory));
}

// [snapshot(memory, req_to_token, req_pool_indices, seq_lens), build(memory)]. `memory`: device_pager_arrays, zero but
// for mismatch; `report`: one int64 of pinned host memory. Both outlive the functions.
Array<Function> make_device_pager(TensorView memory, TensorView report, int64_t max_rows, int64_t row_pages,
                                  int64_t page_size, int64_t num_pages, bool sharing, bool emit, int64_t ctas,
                                  int64_t token_cost, int64_t segment_cost, int64_t partial_cost, int64_t max_entries) {
  DevicePagerParams p = pager_params(max_rows, row_pages, page_size, emit);
  FC_CHECK(num_pages >= 1 && num_pages < (int64_t{1} << 31)) << "num_pages: want 1 .. 2^31 - 1, got " << num_pages;
  const int64_t cost_limit = 1 << 30;
  FC_CHECK(token_cost >= 0 && segment_cost >= 0 && partial_cost >= 0 && token_cost <= cost_limit &&
           segment_cost <= cost_limit && partial_cost <= cost_limit)
      << "cost_model: want costs of 0 .. " << cost_limit << ", got " << token_cost << ", " << segment_cost << ", "
      << partial_cost;
  FC_CHECK(max_entries >= max_rows && max_entries < (int64_t{1} << 31))
      << "max_entries: want at least " << max_rows << ", one for each row, got " << max_entries;
  p.num_pages = num_pages;
  p.max_entries = max_entries;
  p.sharing = sharing;
  p.token_cost = token_cost, p.segment_cost = segment_cost, p.partial_cost = partial_cost;
  check_device("memory", memory, memory);
  FC_CHECK(reinterpret_cast<uintptr_t>(memory.data_ptr()) % 256 == 0)
      << "memory: want 256-byte alignment, got address " << memory.data_ptr();
  const int64_t ints =
      lay_out_arrays(p, static_cast<int*>(memory.data_ptr()), row_pages, ctas, [](const char*, int64_t, int64_t) {});
  FC_CHECK(memory.IsContiguous() && memory.dtype().bits == 32 && memory.numel() >= ints)
      << "memory: want " << ints << " contiguous int32, got " << shape_text(memory);
  FC_CHECK(report.numel() == 1 && report.dtype().bits == 64) << "report: want one int64, got " << shape_text(report);
  void* mapped = nullptr;
  FC_CUDA(cudaSetDevice(memory.device().device_id));
  FC_CUDA(cudaHostGetDevicePointer(&mapped, report.data_ptr(), 0));
  p.report = static_cast<unsigned long long*>(mapped);
  prepare_build(ctas);
  const int grid = static_cast<int>(ctas);
  return {Function::FromTyped(
              [p, grid](TensorView memory, TensorView req_to_token, TensorView req_pool_indices, TensorView seq_lens) {
                pager_snapshot(p, grid, memory, req_to_token, req_pool_indices, seq_lens);
              }),
          Function::FromTyped([p, grid](TensorView memory) { launch_build(p, grid, current_stream(memory)); })};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_pager_arrays, device_pager_arrays);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_device_pager, make_device_pager);
}  // namespace flashcore
