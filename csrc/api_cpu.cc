// The CPU library's exports. Arguments arrive checked for dtype and shape by flashcore_sglang/layout.py, whose messages
// name the user's arguments; what would break memory safety is checked again here.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/check.h"
#include "pager/pager.h"
#include "pager/window_arguments.h"

namespace flashcore {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;

struct HostAllocator {
  void AllocData(DLTensor* t) { t->data = std::malloc(std::max<size_t>(1, tvm::ffi::GetDataSize(*t))); }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

Tensor to_tensor(const std::vector<int32_t>& values, int64_t columns = 1) {
  const int64_t rows = static_cast<int64_t>(values.size()) / columns;
  std::vector<int64_t> shape{rows};
  if (columns > 1) shape.push_back(columns);
  Tensor t = Tensor::FromNDAlloc(HostAllocator(), tvm::ffi::ShapeView(shape.data(), shape.size()),
                                 DLDataType{kDLInt, 32, 1}, DLDevice{kDLCPU, 0});
  if (!values.empty()) std::memcpy(t.data_ptr(), values.data(), values.size() * sizeof(int32_t));
  return t;
}

void check_tensor(const TensorView& t, const char* name, int bits, int64_t min_elements) {
  FC_CHECK(t.device().device_type == kDLCPU) << name << ": want a CPU tensor";
  FC_CHECK(t.dtype().bits == bits) << name << ": want a dtype of " << bits << " bits, got " << int(t.dtype().bits);
  FC_CHECK(t.numel() >= min_elements) << name << ": want at least " << min_elements << " elements, got " << t.numel();
}

// [B] vector, contiguous, or nullptr.
template <class T>
const T* vector_of(const Optional<TensorView>& t, const char* name, int64_t num_rows) {
  if (!t.has_value()) return nullptr;
  check_tensor(t.value(), name, 8 * sizeof(T), num_rows);
  FC_CHECK(t.value().ndim() == 1 && (t.value().numel() <= 1 || t.value().IsContiguous()))
      << name << ": want a contiguous vector";
  return static_cast<const T*>(t.value().data_ptr());
}

// table: [rows, entries] int32; entry_tokens positions per entry; ids are slots (divisor = page size) or pages (1).
Array<Tensor> step(Pager& pager, int64_t num_pages, TensorView table, int64_t entry_tokens, int64_t divisor,
                   Optional<TensorView> table_rows, Optional<TensorView> begins, TensorView ends,
                   Optional<TensorView> may_share, Optional<TensorView> resident, bool packed, bool check_blocks) {
  check_tensor(table, "table", 32, 0);
  FC_CHECK(table.ndim() == 2) << "table: want 2 dimensions, got " << table.ndim();
  const int64_t num_rows = ends.size(0);
  TableView view{};
  view.ids = static_cast<const int32_t*>(table.data_ptr());
  view.row_stride = table.stride(0), view.entry_stride = table.stride(1);
  view.num_table_rows = table.size(0), view.num_positions = table.size(1) * entry_tokens;
  view.entry_tokens = entry_tokens, view.divisor = divisor;
  view.table_rows = vector_of<int64_t>(table_rows, "table_rows", num_rows);
  view.begins = vector_of<int64_t>(begins, "begins", num_rows);
  view.ends = vector_of<int64_t>(ends, "ends", num_rows);
  view.may_share = vector_of<int32_t>(may_share, "may_share", num_rows);
  view.num_rows = num_rows, view.num_pages = num_pages, view.check_blocks = check_blocks;
  FC_CHECK(view.table_rows || num_rows <= view.num_table_rows)
      << "table: want " << num_rows << " rows, got " << table.size(0);
  Residency residency;
  if (resident.has_value()) {
    const TensorView bits = resident.value();
    FC_CHECK(bits.device().device_type == kDLCPU && bits.IsContiguous()) << "resident: want a contiguous CPU tensor";
    const int64_t have = bits.numel() * bits.dtype().bits / 8, want = packed ? (num_pages + 7) / 8 : num_pages;
    FC_CHECK(have >= want) << "resident: want " << want << " bytes, got " << have;
    residency = {bits.data_ptr(), packed};
  }

  const Layout l = pager.step(view, residency);
  const Status& status = pager.status();
  return {to_tensor({status.code, status.row, status.position, status.value, pager.appended() ? 1 : 0}),
          to_tensor(l.row_order),
          to_tensor(l.segment_rows, 2),
          to_tensor(l.segment_positions, 2),
          to_tensor(l.page_indptr),
          to_tensor(l.page_indices),
          to_tensor(l.run_indptr),
          to_tensor(l.runs, 2),
          to_tensor(l.row_indptr),
          to_tensor(l.row_segments),
          to_tensor(l.staged_pages)};
}

// Returns the pager's step function; the pager lives as long as it does.
Function make_pager(int64_t page_tokens, int64_t num_pages, int64_t token_cost, int64_t segment_cost,
                    int64_t partial_cost) {
  FC_CHECK(page_tokens > 0) << "page_tokens: want a positive size, got " << page_tokens;
  auto pager = std::make_shared<Pager>(page_tokens, CostModel{token_cost, segment_cost, partial_cost});
  return Function::FromTyped([=](TensorView table, int64_t entry_tokens, int64_t divisor,
                                 Optional<TensorView> table_rows, Optional<TensorView> begins, TensorView ends,
                                 Optional<TensorView> may_share, Optional<TensorView> resident, bool packed,
                                 bool check_blocks) {
    return step(*pager, num_pages, table, entry_tokens, divisor, table_rows, begins, ends, may_share, resident, packed,
                check_blocks);
  });
}

void check_cpu(const TensorView& t) { FC_CHECK(t.device().device_type == kDLCPU) << "fields: want a CPU tensor"; }

Array<Function> make_window(WindowOptions options) {
  return make_window_functions(
      options, {[](const WindowParams& p, const WindowInput& in, const WindowFields& out, const TensorView& like) {
                  check_cpu(like);
                  snapshot_window(p, in, out);
                },
                [](const WindowFields& fields, const WindowMask& mask, const TensorView& like) {
                  check_cpu(like);
                  cut_mask(fields, mask);
                }});
}

}  // namespace
}  // namespace flashcore

#pragma GCC diagnostic ignored "-Wunused-parameter"  // of the function that the macro defines
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_pager, flashcore::make_pager);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_window, flashcore::make_window);
