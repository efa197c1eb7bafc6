// What a test sets of the machine, and the driver's entry point.
#include <cuda.h>
#include <cuda_runtime.h>
#include <tvm/ffi/function.h>

#include "machine/machine.h"

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emulator {

// `order`: 0 any warp goes on, 1 those of low numbers first, 2 those of high ones, 3 by priorities. `asynchrony`: 0
// copies and products happen at any time, 1 as early as they can, 2 as late as they can.
void configure(int64_t seed, int64_t order, int64_t asynchrony, int64_t multiprocessors) {
  machine.settings = {static_cast<uint64_t>(seed), static_cast<Order>(order), static_cast<Asynchrony>(asynchrony),
                      static_cast<int>(multiprocessors)};
  machine.launches = 0;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulator_configure, configure);

}  // namespace emulator
