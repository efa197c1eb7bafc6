#include <algorithm>

#include "attention/launch.h"

namespace flashcore {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Found at run time, so that the library loads on a machine without a driver.
Encode driver_encode() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    FC_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess)
      TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: want a driver for CUDA >= 12.0, got none";
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

// Five axes; none of a box is longer than 256.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* base,
                const cuuint64_t (&sizes)[5], const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5]) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return driver_encode()(map, type, 5, const_cast<void*>(base), sizes, strides, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A box of all of axes 1 to 4 but the last: [line][8][lines of a row][groups], one KV head.
void encode(CUtensorMap* map, DType dtype, const void* base, int head_dim, int groups, cuuint64_t tokens,
            cuuint64_t heads, int64_t token_stride, int64_t head_stride) {
  const int element_bytes = bytes_of(dtype), line_bytes = std::min(head_dim * element_bytes, 128);
  const int line = line_bytes / element_bytes;
  const cuuint64_t token_bytes = token_stride * element_bytes, head_bytes = head_stride * element_bytes;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(line), tokens, static_cast<cuuint64_t>(head_dim / line),
                               static_cast<cuuint64_t>(groups), heads};
  const cuuint64_t strides[4] = {token_bytes, static_cast<cuuint64_t>(line_bytes), 8 * token_bytes, head_bytes};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(line), 8, static_cast<cuuint32_t>(head_dim / line),
                             static_cast<cuuint32_t>(groups), 1};
  const CUtensorMapDataType type = dtype == DType::kBf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUtensorMapSwizzle swizzle = line_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encode(map, type, swizzle, base, sizes, strides, box);
  FC_CHECK(result == CUDA_SUCCESS)
      << "k_cache: want a base aligned to 16 bytes and strides in multiples of 16 bytes, got slot stride "
      << token_stride << " and head stride " << head_stride << " (cuTensorMapEncodeTiled " << static_cast<int>(result)
      << ")";
}

}  // namespace

void encode_kv_map(CUtensorMap* map, DType dtype, const void* base, int num_slots, int kv_heads, int head_dim,
                   int64_t slot_stride, int64_t head_stride, int rows) {
  encode(map, dtype, base, head_dim, rows / 8, num_slots, kv_heads, slot_stride, head_stride);
}

void encode_strided_map(CUtensorMap* map, DType dtype, const void* base, int num_slots, int head_dim,
                        int64_t slot_stride, int64_t head_stride) {
  encode(map, dtype, base, head_dim, 4, 8, num_slots * (slot_stride / head_stride), slot_stride, head_stride);
}

bool encode_q_map(CUtensorMap* map, const void* base, int num_tokens, int heads, int head_dim, int64_t token_stride,
                  int ratio, int rows) {
  if (8 % ratio != 0) return false;
  const cuuint32_t tokens = 8 / ratio, lines = head_dim / 64, groups = rows / 8;
  const cuuint64_t token_bytes = token_stride * 2;
  const cuuint64_t sizes[5] = {64, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(num_tokens), lines, groups};
  const cuuint64_t strides[4] = {static_cast<cuuint64_t>(head_dim) * 2, token_bytes, 128, tokens * token_bytes};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(ratio), tokens, lines, groups};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, base, sizes, strides, box) ==
         CUDA_SUCCESS;
}

}  // namespace flashcore
