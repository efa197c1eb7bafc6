// The exports of the extend kernels, for tensors on the CPU.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#define kDLCUDA kDLCPU
#include "api_extend.cc"
