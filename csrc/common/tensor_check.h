// Checks of the tensors that an export is given. Errors: ValueError "<argument>: want <rule>, got <value>".
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/optional.h>

#include <utility>

#include "attention/params.h"
#include "common/argument.h"
#include "common/cuda_check.h"

namespace flashcore {

using tvm::ffi::Optional;

inline cudaStream_t current_stream(const TensorView& t) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(t.device().device_type, t.device().device_id));
}

inline int multiprocessors(const TensorView& t) {
  int count = 0;
  FC_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.device().device_id));
  return count;
}

inline void check_device(const char* name, const TensorView& t, const TensorView& like) {
  FC_CHECK(t.device().device_type == kDLCUDA)
      << name << ": want a CUDA tensor, got device type " << static_cast<int>(t.device().device_type);
  FC_CHECK(t.device().device_id == like.device().device_id)
      << name << ": want device cuda:" << like.device().device_id
      << " (that of the workspace), got cuda:" << t.device().device_id;
}

inline const int* int_array(const char* name, const TensorView& t, const TensorView& like, int64_t at_least) {
  check_device(name, t, like);
  FC_CHECK(t.dtype().code == kDLInt && t.dtype().bits == 32)
      << name << ": want int32, got " << static_cast<int>(t.dtype().bits) << "-bit type "
      << static_cast<int>(t.dtype().code);
  FC_CHECK(t.IsContiguous()) << name << ": want a contiguous tensor, got strides of shape " << shape_text(t);
  FC_CHECK(t.numel() >= at_least) << name << ": want at least " << at_least << " elements, got " << shape_text(t);
  return static_cast<const int*>(t.data_ptr());
}

inline DType half_type(const char* name, const TensorView& t) {
  const bool bf16 = t.dtype().code == kDLBfloat && t.dtype().bits == 16,
             fp16 = t.dtype().code == kDLFloat && t.dtype().bits == 16;
  FC_CHECK(bf16 || fp16) << name << ": want bfloat16 or float16, got " << static_cast<int>(t.dtype().bits)
                         << "-bit type " << static_cast<int>(t.dtype().code);
  return bf16 ? DType::kBf16 : DType::kFp16;
}

// The cache's dtype: q's, or e4m3.
inline DType cache_type(const char* name, const TensorView& t, const TensorView& q) {
  if (t.dtype().code == kDLFloat8_e4m3fn && t.dtype().bits == 8) return DType::kE4m3;
  FC_CHECK(t.dtype().code == q.dtype().code && t.dtype().bits == q.dtype().bits)
      << name << ": want the dtype of q or float8_e4m3fn, got " << static_cast<int>(t.dtype().bits) << "-bit type "
      << static_cast<int>(t.dtype().code);
  return half_type(name, t);
}

// Heads and head dims that the attention kernels are made for.
inline void check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  FC_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= kNarrowRows)
      << "heads: want a multiple of kv_heads, at most " << kNarrowRows << " times it, got " << heads << " heads on "
      << kv_heads << " KV heads";
  FC_CHECK(head_dim == 64 || head_dim == 128 || head_dim == 256) << "head_dim: want 64, 128 or 256, got " << head_dim;
}

// The workspace's memory. `size_function`: the export that says how many bytes it needs.
inline void* workspace_memory(const TensorView& workspace, size_t needed, const char* size_function) {
  check_device("workspace", workspace, workspace);
  const size_t bytes = workspace.numel() * workspace.dtype().bits / 8;
  FC_CHECK(workspace.IsContiguous() && bytes >= needed)
      << "workspace: want at least " << needed << " contiguous bytes (" << size_function << "), got " << bytes;
  FC_CHECK(reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 256 == 0)
      << "workspace: want 256-byte alignment, got address " << workspace.data_ptr();
  return workspace.data_ptr();
}

// q and out [T, H, D], k_cache and v_cache [slots, G, D], as the attention kernels take them, on `like`'s device.
inline void check_qkv(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache, const TensorView& out,
                      const TensorView& like) {
  FC_CHECK(q.ndim() == 3 && q.stride(2) == 1 && q.stride(1) == q.size(2) && q.stride(0) % 8 == 0 &&
           reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0)
      << "q: want [T, H, D] with heads and dims contiguous, aligned to 16 bytes, got " << shape_text(q);
  FC_CHECK(q.size(0) * q.stride(0) < (int64_t{1} << 31)) << "q: want fewer than 2^31 elements, got " << shape_text(q);
  FC_CHECK(out.ndim() == 3 && out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == q.size(2) &&
           out.stride(2) == 1 && out.stride(1) == out.size(2) && out.stride(0) % 8 == 0 &&
           reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0)
      << "out: want " << shape_text(q) << " with heads and dims contiguous, aligned to 16 bytes, got "
      << shape_text(out);
  FC_CHECK(k_cache.ndim() == 3 && k_cache.size(2) == q.size(2) && k_cache.stride(2) == 1)
      << "k_cache: want [slots, G, " << q.size(2) << "] with dims contiguous, got " << shape_text(k_cache);
  FC_CHECK(v_cache.ndim() == 3 && v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1) &&
           v_cache.size(2) == k_cache.size(2) && v_cache.stride(0) == k_cache.stride(0) &&
           v_cache.stride(1) == k_cache.stride(1) && v_cache.stride(2) == 1)
      << "v_cache: want shape and strides of k_cache " << shape_text(k_cache) << ", got " << shape_text(v_cache);
  FC_CHECK(k_cache.size(0) > 0 && k_cache.size(0) < (int64_t{1} << 31))
      << "k_cache: want 1 .. 2^31 - 1 slots, got " << k_cache.size(0);
  half_type("q", q);
  const DType cached = cache_type("k_cache", k_cache, q);
  FC_CHECK(cached == cache_type("v_cache", v_cache, q)) << "v_cache: want the dtype of k_cache, got another";
  FC_CHECK(half_type("out", out) == half_type("q", q)) << "out: want the dtype of q, got another";
  const int64_t unit = 16 / bytes_of(cached);  // elements of 16 bytes
  FC_CHECK(k_cache.stride(0) % unit == 0 && k_cache.stride(1) % unit == 0 &&
           k_cache.size(0) * (k_cache.stride(0) / unit) < (int64_t{1} << 32))
      << "k_cache: want strides in multiples of " << unit << " elements and less than 64 GiB, got strides "
      << k_cache.stride(0) << ", " << k_cache.stride(1) << " of " << shape_text(k_cache);
  for (auto& [name, t] :
       {std::pair<const char*, const TensorView&>{"q", q}, {"k_cache", k_cache}, {"v_cache", v_cache}, {"out", out}})
    check_device(name, t, like);
}

// What the params structs of the attention kernels have in common.
template <class Params>
void fill_attention(Params& p, const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                    const TensorView& out, double scale, double logit_cap, const Optional<TensorView>& sinks) {
  FC_CHECK(scale > 0) << "scale: want a positive number, got " << scale;
  FC_CHECK(logit_cap >= 0) << "logit_cap: want 0 (none) or a positive number, got " << logit_cap;
  p.q = q.data_ptr();
  p.out = out.data_ptr();
  p.k = k_cache.data_ptr();
  p.v = v_cache.data_ptr();
  p.q_row_stride = q.stride(0);
  p.out_row_stride = out.stride(0);
  p.kv_slot_stride = k_cache.stride(0);
  p.kv_head_stride = k_cache.stride(1);
  const int64_t unit = 16 / bytes_of(cache_type("k_cache", k_cache, q));
  p.kv_slot_units = k_cache.stride(0) / unit;
  p.kv_head_units = k_cache.stride(1) / unit;
  p.heads = q.size(1);
  p.kv_heads = k_cache.size(1);
  p.ratio = p.heads / p.kv_heads;
  p.num_slots = k_cache.size(0);
  constexpr double kLog2e = 1.4426950408889634;
  p.scale_log2 = logit_cap > 0 ? kLog2e : scale * kLog2e;
  p.logit_cap = logit_cap;
  p.cap_scale_log2 = logit_cap > 0 ? 2 * scale / logit_cap * kLog2e : 0;
  if (!sinks.has_value()) return;
  const TensorView& s = sinks.value();
  check_device("sinks", s, q);
  FC_CHECK(s.dtype().code == kDLFloat && s.dtype().bits == 32 && s.ndim() == 1 && s.size(0) == q.size(1) &&
           s.IsContiguous())
      << "sinks: want contiguous float32 [" << q.size(1) << "], got " << shape_text(s);
  p.sinks = static_cast<const float*>(s.data_ptr());
}

inline const float* scale_array(const char* name, const Optional<TensorView>& scale, const TensorView& like,
                                int kv_heads, bool e4m3, int* stride) {
  if (!scale.has_value()) return nullptr;
  const TensorView& s = scale.value();
  check_device(name, s, like);
  FC_CHECK(e4m3) << name << ": want none for a cache that is not float8_e4m3fn, got " << shape_text(s);
  FC_CHECK(s.dtype().code == kDLFloat && s.dtype().bits == 32 && (s.numel() == 1 || s.numel() == kv_heads) &&
           s.IsContiguous())
      << name << ": want contiguous float32 [1] or [" << kv_heads << "], got " << shape_text(s);
  *stride = s.numel() == 1 ? 0 : 1;
  return static_cast<const float*>(s.data_ptr());
}

// Scales of an e4m3 cache: in device memory, or `v_factor` that the host knows.
inline CacheScales cache_scales(const TensorView& q, const TensorView& k_cache, const Optional<TensorView>& k_scale,
                                const Optional<TensorView>& v_scale, double v_factor) {
  const bool e4m3 = cache_type("k_cache", k_cache, q) == DType::kE4m3;
  const int kv_heads = k_cache.size(1);
  FC_CHECK(v_factor > 0 && (e4m3 || v_factor == 1)) << "v_scale: want a positive number, or 1 for a cache that is not "
                                                    << "float8_e4m3fn, got " << v_factor;
  CacheScales c{};
  c.k = scale_array("k_scale", k_scale, q, kv_heads, e4m3, &c.k_stride);
  c.v = scale_array("v_scale", v_scale, q, kv_heads, e4m3, &c.v_stride);
  c.v_host = v_factor;
  c.bf16 = half_type("q", q) == DType::kBf16;
  return c;
}

}  // namespace flashcore
