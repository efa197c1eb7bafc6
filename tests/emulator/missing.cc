// Kernels that were left out of the build; linked last, so those that are in it come first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/extend_params.h"
#include "common/check.h"

namespace flashcore::extend {

template <typename Cache, int kHeadDim>
void launch(const Params&, int, cudaStream_t) {
  TVM_FFI_THROW(RuntimeError) << "extend: this dtype and head dim are not emulated";
}

#define FC_MISSING(Cache)                                        \
  template void launch<Cache, 64>(const Params&, int, cudaStream_t);  \
  template void launch<Cache, 128>(const Params&, int, cudaStream_t); \
  template void launch<Cache, 256>(const Params&, int, cudaStream_t);
FC_MISSING(__nv_bfloat16)
FC_MISSING(__half)
FC_MISSING(E4m3)

}  // namespace flashcore::extend
