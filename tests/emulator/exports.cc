// The exports of the attention kernels, for tensors on the CPU.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#define kDLCUDA kDLCPU
#include "api_decode.cc"
#include "api_extend.cc"
