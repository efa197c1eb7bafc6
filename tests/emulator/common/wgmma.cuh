// csrc/common/wgmma.cuh for the emulated machine. The layouts of operands are described there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/wgmma_descriptor.cuh"
#include "machine/device.h"

namespace flashcore::ptx {

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
