// Exports of the device pager (csrc/pager/device_pager.h, device_staging.h). Every launch goes to the caller's current
// stream; nothing is allocated. Errors: ValueError "<argument>: want <rule>, got <value>".
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "common/tensor_check.h"
#include "pager/device_pager.h"
#include "pager/device_staging.h"

namespace flashcore {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;

using Options = Map<String, int64_t>;
using Arrays = Map<String, Array<int64_t>>;

// A pager and the arrays in its memory.
struct DevicePager {
  DevicePagerParams params{};
  StagingArrays staging{};
  bool stages;
  int64_t row_pages;
  int ctas;

  // What the constructor of flashcore_sglang/device_pager.py passes; sizes that are not served are refused.
  explicit DevicePager(const Options& options) {
    const auto get = [&](const char* name, int64_t least, int64_t most) {
      return checked_size(name, options[name], least, most);
    };
    constexpr int64_t kIntMax = 0x7FFFFFFF, kCostLimit = 1 << 30;
    DevicePagerParams& p = params;
    p.max_rows = get("max_rows", 1, kPagerRows);
    row_pages = get("row_pages", 1, kMaxRowPages);
    p.page_shift = page_shift_of(get("page_size", 1, 1024));
    p.table_stride = (row_pages + kTableAlign - 1) / kTableAlign * kTableAlign;
    p.num_pages = get("num_pages", 1, kIntMax);
    p.max_entries = get("max_entries", p.max_rows, kIntMax);
    p.token_cost = get("token_cost", 0, kCostLimit);
    p.segment_cost = get("segment_cost", 0, kCostLimit);
    p.partial_cost = get("partial_cost", 0, kCostLimit);
    p.sharing = get("sharing", 0, 1);
    p.ranged = get("ranged", 0, 1);
    stages = get("staging", 0, 1);
    const bool canonical = get("canonical", 0, 1);
    p.emit = canonical && !stages;  // staging writes the canonical arrays itself
    ctas = get("ctas", 1, 1 << 16);
    FC_CHECK(!canonical || p.max_rows * (row_pages + 3) < (int64_t{1} << 31))
        << "canonical: want fewer than 2^31 page entries, got " << p.max_rows << " rows of " << row_pages << " pages";
  }

  // Assigns the arrays from `base` on, which may be nullptr. Returns the ints in all.
  template <class Visit>
  int64_t lay_out(int* base, Visit visit) {
    const int64_t end = lay_out_arrays(params, base, row_pages, ctas, visit);
    return stages ? lay_out_staging(staging, params, base, end, row_pages, visit) : end;
  }
};

// Name -> [offset, elements], in ints, of every array in the pager's memory; "" -> [0, ints in all].
Arrays device_pager_arrays(Options options) {
  Arrays arrays;
  const int64_t total = DevicePager(options).lay_out(
      nullptr, [&](const char* name, int64_t at, int64_t elements) { arrays.Set(name, Array<int64_t>{at, elements}); });
  arrays.Set("", Array<int64_t>{0, total});
  return arrays;
}

IntegerArray integer_array(const char* name, const TensorView& t, const TensorView& memory) {
  check_device(name, t, memory);
  return flashcore::integer_array(name, t);
}

int checked_rows(const char* name, const TensorView& t, const DevicePagerParams& p) {
  FC_CHECK(t.size(0) >= 1 && t.size(0) <= p.max_rows)
      << name << ": want 1 .. " << p.max_rows << " rows (max_rows), got " << t.size(0);
  return static_cast<int>(t.size(0));
}

// SGLang's table, of which the rows of one decode step are read.
SnapshotInput decode_input(const DevicePagerParams& p, TensorView memory, TensorView req_to_token,
                           TensorView req_pool_indices, TensorView seq_lens) {
  check_device("req_to_token", req_to_token, memory);
  check_int32_matrix("req_to_token", req_to_token, "[pool, max_context] int32 with stride 1", true);
  SnapshotInput in{};
  in.ids = static_cast<const int*>(req_to_token.data_ptr());
  in.table_rows = integer_array("req_pool_indices", req_pool_indices, memory);
  in.ends = integer_array("seq_lens", seq_lens, memory);
  in.row_stride = req_to_token.stride(0), in.entry_stride = 1;
  in.num_table_rows = req_to_token.size(0), in.num_positions = req_to_token.size(1);
  in.rows = checked_rows("seq_lens", seq_lens, p);
  in.id_shift = p.page_shift;
  FC_CHECK(req_pool_indices.size(0) == in.rows)
      << "req_pool_indices: want " << in.rows << " entries, one per row, got " << req_pool_indices.size(0);
  return in;
}

void snapshot(const DevicePager& pager, TensorView memory, TensorView req_to_token, TensorView req_pool_indices,
              TensorView seq_lens) {
  const SnapshotInput in = decode_input(pager.params, memory, req_to_token, req_pool_indices, seq_lens);
  launch_snapshot(pager.params, in, pager.ctas, current_stream(memory));
}

void snapshot_drafts(const DevicePager& pager, TensorView memory, TensorView req_to_token, TensorView req_pool_indices,
                     TensorView seq_lens, int64_t branches, int64_t steps) {
  const DevicePagerParams& p = pager.params;
  FC_CHECK(!p.ranged) << "snapshot_drafts: want a pager for decode, got one made with ranged=True";
  SnapshotInput in = decode_input(p, memory, req_to_token, req_pool_indices, seq_lens);
  FC_CHECK(branches >= 1 && in.rows * branches <= p.max_rows)
      << "branches: want 1 .. " << p.max_rows / in.rows << " for " << in.rows << " requests, got " << branches;
  FC_CHECK(steps >= 1 && steps <= kMaxDraftSteps) << "steps: want 1 .. " << kMaxDraftSteps << ", got " << steps;
  in.rows *= static_cast<int>(branches);
  in.branches = static_cast<int>(branches), in.steps = static_cast<int>(steps);
  launch_snapshot(p, in, pager.ctas, current_stream(memory));
}

// pages: [B, entries] page of each position, or of each page if `per_page`.
void snapshot_ranges(const DevicePager& pager, TensorView memory, TensorView pages, bool per_page,
                     TensorView seq_starts, TensorView seq_ends) {
  const DevicePagerParams& p = pager.params;
  FC_CHECK(p.ranged) << "snapshot_ranges: want a pager made with ranged=True, got one for decode";
  check_device("token_to_page", pages, memory);
  check_int32_matrix("token_to_page", pages, "[B, entries] int32", false);
  SnapshotInput in{};
  in.ids = static_cast<const int*>(pages.data_ptr());
  in.begins = integer_array("seq_starts", seq_starts, memory);
  in.ends = integer_array("seq_ends", seq_ends, memory);
  in.row_stride = pages.stride(0), in.entry_stride = pages.stride(1);
  in.entry_shift = per_page ? p.page_shift : 0;
  in.num_table_rows = pages.size(0), in.num_positions = pages.size(1) << in.entry_shift;
  in.rows = checked_rows("token_to_page", pages, p);
  for (auto& [name, t] :
       {std::pair<const char*, const TensorView&>{"seq_starts", seq_starts}, {"seq_ends", seq_ends}}) {
    FC_CHECK(t.size(0) == in.rows) << name << ": want " << in.rows << " entries, one per row, got " << t.size(0);
  }
  launch_snapshot(p, in, pager.ctas, current_stream(memory));
}

void build_layout(const DevicePager& pager, TensorView memory, Optional<TensorView> page_resident_bitmap) {
  const DevicePagerParams& p = pager.params;
  ResidentPages resident{};
  if (page_resident_bitmap.has_value()) {
    const TensorView& t = page_resident_bitmap.value();
    FC_CHECK(pager.stages) << "page_resident_bitmap: want a pager made with staging=True, got one without";
    check_device("page_resident_bitmap", t, memory);
    const int bits = t.dtype().bits, code = t.dtype().code;
    const bool is_byte = bits == 8 && (code == kDLUInt || code == kDLBool), is_word = bits == 32 && code == kDLInt;
    const int64_t bytes = p.num_pages, words = (bytes + 31) / 32;
    resident = {t.data_ptr(), is_word};
    FC_CHECK(t.ndim() == 1 && t.IsContiguous() && (is_byte || is_word) && t.size(0) == (is_byte ? bytes : words))
        << "page_resident_bitmap: want contiguous [" << bytes << "] bool or uint8, or [" << words
        << "] int32 of packed bits, got " << shape_text(t) << " of " << bits << " bits";
  }
  const cudaStream_t stream = current_stream(memory);
  launch_build(p, pager.ctas, stream);
  if (pager.stages) launch_staging(p, pager.staging, resident, pager.ctas, stream);
}

// [snapshot, snapshot_ranges, snapshot_drafts, build]; their first argument is `memory`: device_pager_arrays, zero but
// for mismatch. `report`: one int64 of pinned host memory. Both outlive the functions.
Array<Function> make_device_pager(TensorView memory, TensorView report, Options options) {
  DevicePager pager(options);
  check_device("memory", memory, memory);
  FC_CHECK(reinterpret_cast<uintptr_t>(memory.data_ptr()) % 256 == 0)
      << "memory: want 256-byte alignment, got address " << memory.data_ptr();
  const int64_t ints = pager.lay_out(static_cast<int*>(memory.data_ptr()), [](const char*, int64_t, int64_t) {});
  FC_CHECK(memory.IsContiguous() && memory.dtype().bits == 32 && memory.numel() >= ints)
      << "memory: want " << ints << " contiguous int32, got " << shape_text(memory);
  FC_CHECK(report.numel() == 1 && report.dtype().bits == 64) << "report: want one int64, got " << shape_text(report);
  void* mapped = nullptr;
  FC_CUDA(cudaSetDevice(memory.device().device_id));
  FC_CUDA(cudaHostGetDevicePointer(&mapped, report.data_ptr(), 0));
  pager.params.report = static_cast<unsigned long long*>(mapped);
  prepare_build(pager.params, pager.ctas);
  return {Function::FromTyped(
              [pager](TensorView memory, TensorView req_to_token, TensorView req_pool_indices, TensorView seq_lens) {
                snapshot(pager, memory, req_to_token, req_pool_indices, seq_lens);
              }),
          Function::FromTyped(
              [pager](TensorView memory, TensorView pages, bool per_page, TensorView seq_starts, TensorView seq_ends) {
                snapshot_ranges(pager, memory, pages, per_page, seq_starts, seq_ends);
              }),
          Function::FromTyped([pager](TensorView memory, TensorView req_to_token, TensorView req_pool_indices,
                                      TensorView seq_lens, int64_t branches, int64_t steps) {
            snapshot_drafts(pager, memory, req_to_token, req_pool_indices, seq_lens, branches, steps);
          }),
          Function::FromTyped([pager](TensorView memory, Optional<TensorView> page_resident_bitmap) {
            build_layout(pager, memory, page_resident_bitmap);
          })};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_pager_arrays, device_pager_arrays);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_device_pager, make_device_pager);
}  // namespace flashcore
