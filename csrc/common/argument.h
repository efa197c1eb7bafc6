// Checks of tensors that both libraries make. Errors: ValueError "<argument>: want <rule>, got <value>".
#pragma once
#include <tvm/ffi/container/tensor.h>

#include <string>

#include "common/check.h"
#include "common/host_device.h"

namespace flashcore {

using tvm::ffi::TensorView;

inline std::string shape_text(const TensorView& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline int64_t checked_size(const char* name, int64_t value, int64_t least, int64_t most) {
  FC_CHECK(value >= least && value <= most) << name << ": want " << least << " .. " << most << ", got " << value;
  return value;
}

inline int page_shift_of(int64_t page_size) {
  FC_CHECK(page_size >= 1 && page_size <= 1024 && (page_size & (page_size - 1)) == 0)
      << "page_size: want a power of two up to 1024, got " << page_size;
  return __builtin_ctzll(page_size);
}

inline IntegerArray integer_array(const char* name, const TensorView& t) {
  FC_CHECK(t.ndim() == 1 && t.dtype().code == kDLInt && (t.dtype().bits == 32 || t.dtype().bits == 64) &&
           t.IsContiguous())
      << name << ": want contiguous [B] int32 or int64, got " << shape_text(t) << " of "
      << static_cast<int>(t.dtype().bits) << " bits";
  return {t.data_ptr(), t.dtype().bits == 64};
}

inline void check_int32_matrix(const char* name, const TensorView& t, const char* rule, bool unit_stride) {
  FC_CHECK(t.ndim() == 2 && t.dtype().code == kDLInt && t.dtype().bits == 32 && (!unit_stride || t.stride(1) == 1))
      << name << ": want " << rule << ", got " << shape_text(t);
}

}  // namespace flashcore
