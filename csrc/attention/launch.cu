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

}  // namespace

void encode_kv_map(CUtensorMap* map, DType dtype, const void* base, int num_slots, int kv_heads, int head_dim,
                   int64_t slot_stride, int64_t head_stride, int rows) {
  const int element_bytes = bytes_of(dtype), line_bytes = std::min(head_dim * element_bytes, 128);
  const int line = line_bytes / element_bytes;
  const cuuint64_t slot_bytes = slot_stride * element_bytes, head_bytes = head_stride * element_bytes;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(line), static_cast<cuuint64_t>(num_slots),
                               static_cast<cuuint64_t>(head_dim / line), static_cast<cuuint64_t>(rows / 8),
                               static_cast<cuuint64_t>(kv_heads)};
  const cuuint64_t strides[4] = {slot_bytes, static_cast<cuuint64_t>(line_bytes), 8 * slot_bytes, head_bytes};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(line), 8, static_cast<cuuint32_t>(head_dim / line),
                             static_cast<cuuint32_t>(rows / 8), 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = dtype == DType::kBf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUtensorMapSwizzle swizzle = line_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      driver_encode()(map, type, 5, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FC_CHECK(result == CUDA_SUCCESS)
      << "k_cache: want a base aligned to 16 bytes and strides in multiples of 16 bytes, got slot stride "
      << slot_stride << " and head stride " << head_stride << " (cuTensorMapEncodeTiled " << static_cast<int>(result)
      << ")";
}

}  // namespace flashcore
