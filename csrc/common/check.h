#pragma once
#include <tvm/ffi/error.h>

// Raises Python's ValueError with exactly the text streamed in:
//   FC_CHECK(n > 0) << "n: want a positive size, got " << n;
#define FC_CHECK(cond) \
  if (cond) {          \
  } else               \
    TVM_FFI_THROW(ValueError)
