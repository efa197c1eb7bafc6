// csrc/common/wgmma.cuh for the emulated machine. The layouts of operands and descriptors are described there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "machine/device.h"

namespace flashcore::ptx {

inline uint64_t wgmma_descriptor(uint32_t smem, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t{stride_bytes >> 4} << 32) | (uint64_t{leading_bytes >> 4} << 16) |
         ((smem & 0x3FFFF) >> 4);
}
inline uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000ull) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}
using emulator::wgmma_commit;
using emulator::wgmma_fence;
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kCount>
void wgmma_touch(float (&)[kCount]) {}

template <typename T, int N, int kTransposeB>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulator::wgmma({std::is_same_v<T, __nv_bfloat16>, kTransposeB != 0, true, accumulate != 0, N, 0, b}, d, a);
}
template <typename T, int N, int kTransposeB>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  emulator::wgmma({std::is_same_v<T, __nv_bfloat16>, kTransposeB != 0, false, accumulate != 0, N, a, b}, d, nullptr);
}

}  // namespace flashcore::ptx
