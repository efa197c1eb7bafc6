// Descriptors of WGMMA's operands in shared memory, with the 128-byte swizzle: 1024-byte atoms of eight 128-byte lines.
//   K-major (A, and K as B): an atom is 8 rows x 64 elements of d; `stride` is the distance between 8-row groups.
//   MN-major (V as B): an atom is 8 tokens x 64 columns of d; `stride` between 8-token groups, `leading` between
//   64-column blocks.
#pragma once
#include <cstdint>

namespace flashcore::ptx {

__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t{stride_bytes >> 4} << 32) | (uint64_t{leading_bytes >> 4} << 16) |
         ((smem & 0x3FFFF) >> 4);
}
// The descriptor of what lies `bytes` further on: one addition, where making it anew takes four instructions.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000ull) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

}  // namespace flashcore::ptx
