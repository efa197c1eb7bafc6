// Exports of the CUDA library (tvm-ffi). Every launch goes to the caller's current stream; nothing is allocated.
// Errors: ValueError "<argument>: want <rule>, got <value>".
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <string>

#include "attention/params.h"
#include "common/cuda_check.h"

namespace flashcore {
namespace {

using tvm::ffi::Optional;
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
