// Host side: tensor maps of the KV pool, and launches that may overlap the tail of the kernel before (PDL).
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/params.h"
#include "common/cuda_check.h"

namespace flashcore {

// Box of `rows` tokens (a multiple of 8) of one KV head, starting at any slot, laid out in shared memory as
// [rows / 8][row bytes / line][8][line], lines of up to 128 bytes, swizzled. Coordinates: (0, slot, 0, 0, kv_head).
// The token axis appears twice, as 8 tokens and as groups of 8, so that one copy makes the order WGMMA wants.
void encode_kv_map(CUtensorMap* map, DType dtype, const void* base, int num_slots, int kv_heads, int head_dim,
                   int64_t slot_stride, int64_t head_stride, int rows);

// The same for tokens that lie apart: 32 of one KV head, each as far from the one before as strides 0 and 2 say, which
// a kernel replaces. Coordinates: (0, 0, 0, 0, slot * slot_stride / head_stride + kv_head).
void encode_strided_map(CUtensorMap* map, DType dtype, const void* base, int num_slots, int head_dim,
                        int64_t slot_stride, int64_t head_stride);

// Of q [num_tokens, heads, head_dim] in 16 bits: `rows` q_rows of one KV head, whose tokens lie one behind the other,
// in the layout of tiles.cuh. Coordinates: (0, kv_head * ratio, token, 0, 0); `rows` / `ratio` tokens must be there.
// False: there is no such box, as eight rows are not whole tokens or q is not aligned to 16 bytes.
bool encode_q_map(CUtensorMap* map, const void* base, int num_tokens, int heads, int head_dim, int64_t token_stride,
                  int ratio, int rows);

template <typename... Params>
void launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                      const Params&... params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FC_CUDA(cudaLaunchKernelEx(&config, kernel, params...));
}

}  // namespace flashcore
