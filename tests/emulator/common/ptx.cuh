// csrc/common/ptx.cuh for the emulated machine.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashcore::ptx {

inline uint32_t smem_address(const void* p) { return emulator::shared_address(p); }

// ---- mbarrier ----
using emulator::mbarrier_expect_tx;
using emulator::mbarrier_init;
using emulator::mbarrier_test;
using emulator::mbarrier_try_wait;
using emulator::mbarrier_wait;
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t bar, uint32_t count = 1) { emulator::mbarrier_arrive(bar, count); }
constexpr bool kForRacecheck = false;
constexpr int kWarpArrivals = 1, kWarpgroupArrivals = 1;
inline void mbarrier_warp_arrive(uint32_t bar, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(bar);
}
using emulator::cp_async_mbarrier_arrive;

// ---- copies ----
constexpr uint64_t kEvictFirst = 0, kEvictLast = 0;
inline void prefetch_l1(const uint8_t* at) { static_cast<void>(*static_cast<const volatile uint8_t*>(at)); }
inline void prefetch_tensormap(const CUtensorMap*) {}
inline void tensormap_replace_strides(CUtensorMap* map, uint64_t bytes) {
  map->strides[0] = bytes;
  map->strides[2] = 8 * bytes;
}
inline void fence_tensormap(const CUtensorMap*) {}
inline void tma_load_5d(uint32_t smem, const CUtensorMap* map, uint32_t bar, uint64_t, int c0, int c1, int c2, int c3,
                        int c4) {
  emulator::tma_load(smem, *map, bar, {c0, c1, c2, c3, c4});
}
using emulator::cp_async_16;
using emulator::fence_proxy_async;

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  const emulator::Lanes& rows = emulator::exchange("ldmatrix", ~0u, smem);
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; ++i) {
    const char* row = emulator::shared_pointer(static_cast<uint32_t>(rows.values[i * 8 + lane / 4]), 16, 16);
    std::memcpy(&r[i], row + lane % 4 * 4, 4);
  }
}

// ---- shared memory among the threads of a CTA ----
template <class T>
T& dynamic_shared() {
  return *reinterpret_cast<T*>(emulator::shared_memory());
}
inline uint4 load_shared_16(uint32_t smem) {
  uint4 x;
  std::memcpy(&x, emulator::shared_pointer(smem, 16, 16), 16);
  return x;
}
template <int kWords>
void load_shared_words(uint32_t (&x)[kWords], uint32_t smem) {
  std::memcpy(x, emulator::shared_pointer(smem, kWords * 4, 16), kWords * 4);
}
inline void store_shared_16(uint32_t smem, uint4 x) {
  std::memcpy(emulator::shared_pointer(smem, 16, 16), &x, 16);
  emulator::wrote_generic(smem);
}
inline void store_release(uint32_t smem, int value) {
  emulator::step_aside();
  std::memcpy(emulator::shared_pointer(smem, 4, 4), &value, 4);
}
inline int load_acquire(uint32_t smem) {
  emulator::poll();
  int value;
  std::memcpy(&value, emulator::shared_pointer(smem, 4, 4), 4);
  return value;
}
inline uint32_t load_shared_if(bool condition, uint32_t smem) {
  uint32_t value = 0;
  if (condition) std::memcpy(&value, emulator::shared_pointer(smem, 4, 4), 4);
  return value;
}

// ---- warps and grids ----
using emulator::barrier_arrive;
using emulator::barrier_sync;
inline int thread_id() { return threadIdx.x; }
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

// ---- arithmetic ----
inline uint32_t halves(__half low, __half high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
inline __half e4m3_to_fp16(uint8_t x) {
  const int exponent = x >> 3 & 15, fraction = x & 7;
  const float size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  const float value = exponent == 15 && fraction == 7 ? NAN : size;
  return __float2half_rn(x & 0x80 ? -value : value);
}
inline uint32_t e4m3x2_to_fp16x2(uint16_t x) {
  return halves(e4m3_to_fp16(static_cast<uint8_t>(x)), e4m3_to_fp16(static_cast<uint8_t>(x >> 8)));
}
inline uint32_t fp16x2_to_bf16x2(uint32_t x) {
  const float low = __half2float({static_cast<uint16_t>(x)}), high = __half2float({static_cast<uint16_t>(x >> 16)});
  return std::bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
inline __half fp16_of_finite(float x) { return __float2half_rn(std::fmin(std::fmax(x, -65504.f), 65504.f)); }
inline uint32_t bf16x2_to_fp16x2(uint32_t x) {
  return halves(fp16_of_finite(__uint_as_float(x << 16)), fp16_of_finite(__uint_as_float(x & 0xFFFF0000u)));
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float exp2_approx_in_place(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.f / x; }
inline float opaque(float x) { return x; }
inline const int4* element_address(const int4* base, uint32_t index) { return base + index; }

}  // namespace flashcore::ptx
