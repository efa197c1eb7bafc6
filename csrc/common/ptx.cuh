// One wrapper per PTX instruction: mbarrier, bulk tensor copy (TMA), cp.async, ldmatrix, registers, grid dependency.
// WGMMA has its own file (wgmma.cuh). Shared memory is addressed by 32-bit shared-window addresses.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Plain sm_90 lacks wgmma and setmaxnreg; a kernel built for it would fail at run time only.
#if defined(__CUDA_ARCH__) && !(defined(__CUDA_ARCH_FEAT_SM90_ALL) && __CUDA_ARCH__ == 900)
#error "flashcore kernels want -gencode=arch=compute_90a,code=sm_90a"
#endif

// Before, tensormap.replace took strides in units of 16 bytes.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1208
#error "flashcore kernels want CUDA >= 12.8"
#endif

namespace flashcore::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier ----
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar, uint32_t count = 1) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.release.cta.shared::cta.b64 state, [%0], %1;\n}" ::"r"(bar),
               "r"(count)
               : "memory");
}
// One arrival for a warp, ordered behind what all of its lanes did before; `lane`: the caller's. compute-sanitizer's
// racecheck does not follow accesses through __syncwarp to another lane's arrival. In the build for it
// (FLASHCORE_RACECHECK) every lane arrives; a barrier counts kWarpArrivals for a warp, kWarpgroupArrivals for four.
#ifdef FLASHCORE_RACECHECK
constexpr bool kForRacecheck = true;
#else
constexpr bool kForRacecheck = false;
#endif
constexpr int kWarpArrivals = kForRacecheck ? 32 : 1, kWarpgroupArrivals = kForRacecheck ? 128 : 1;
__device__ __forceinline__ void mbarrier_warp_arrive(uint32_t bar, int lane) {
  __syncwarp();
  if (kForRacecheck || lane == 0) mbarrier_arrive(bar);
}
// Arrives when the thread's earlier cp.async have landed; the arrival is one of the barrier's count.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
  return done != 0;
}
// Does not suspend the thread.
__device__ __forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

// ---- copies ----
// L2 policies in the encoding of createpolicy.fractional with fraction 1.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

// Into the L1, by a load whose value nobody waits for.
__device__ __forceinline__ void prefetch_l1(const uint8_t* at) {
  asm volatile("{\n.reg .u32 unused;\nld.global.nc.u8 unused, [%0];\n}" ::"l"(at));
}
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Strides 0 and 2 of a map in global memory: of its second axis, in bytes, and of its fourth, eight times as far.
__device__ __forceinline__ void tensormap_replace_strides(CUtensorMap* map, uint64_t bytes) {
  asm volatile(
      "tensormap.replace.tile.global_stride.global.b1024.b64 [%0], 0, %1;\n"
      "tensormap.replace.tile.global_stride.global.b1024.b64 [%0], 2, %2;" ::"l"(__cvta_generic_to_global(map)),
      "l"(bytes), "l"(8 * bytes)
      : "memory");
}
// What this thread wrote to a map, or saw of it, holds for its copies that come after.
__device__ __forceinline__ void fence_tensormap(const CUtensorMap* map) {
  asm volatile(
      "fence.proxy.tensormap::generic.release.gpu;\n"
      "fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map)
      : "memory");
}
__device__ __forceinline__ void tma_load_5d(uint32_t smem, const CUtensorMap* map, uint32_t bar, uint64_t policy,
                                            int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(smem),
      "l"(map), "r"(bar), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// 16 bytes past L1; zeros where bytes == 0 (the source is then not read).
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes) : "memory");
}
// Generic-proxy writes (cp.async, st.shared) before this are seen by wgmma and TMA after it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// ---- shared memory among the threads of a CTA ----
// All that the launch asked for.
template <class T>
__device__ __forceinline__ T& dynamic_shared() {
  extern __shared__ __align__(alignof(T) < 16 ? 16 : alignof(T)) char raw[];
  return *reinterpret_cast<T*>(raw);
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t smem) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(smem)
               : "memory");
  return x;
}
// kWords side by side.
template <int kWords>
__device__ __forceinline__ void load_shared_words(uint32_t (&x)[kWords], uint32_t smem) {
  static_assert(kWords % 4 == 0);
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 four = load_shared_16(smem + i * 4);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}
__device__ __forceinline__ void store_shared_16(uint32_t smem, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
// racecheck takes release stores and acquire loads for plain ones; the build for it uses atomics.
__device__ __forceinline__ void store_release(uint32_t smem, int value) {
#ifdef FLASHCORE_RACECHECK
  asm volatile("{\n.reg .b32 old;\natom.release.cta.shared::cta.exch.b32 old, [%0], %1;\n}" ::"r"(smem), "r"(value)
               : "memory");
#else
  asm volatile("st.release.cta.shared::cta.b32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
#endif
}
__device__ __forceinline__ int load_acquire(uint32_t smem) {
  int value;
#ifdef FLASHCORE_RACECHECK
  asm volatile("atom.acquire.cta.shared::cta.add.s32 %0, [%1], 0;" : "=r"(value) : "r"(smem) : "memory");
#else
  asm volatile("ld.acquire.cta.shared::cta.b32 %0, [%1];" : "=r"(value) : "r"(smem) : "memory");
#endif
  return value;
}

// The load waits for the condition; else 0. A plain load under an `if` may be executed before the condition is known.
__device__ __forceinline__ uint32_t load_shared_if(bool condition, uint32_t smem) {
  uint32_t value = 0;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.shared::cta.b32 %0, [%1];\n}"
               : "+r"(value)
               : "r"(smem), "r"(static_cast<int>(condition))
               : "memory");
  return value;
}

// ---- warps and grids ----
// Named barriers: `threads` of the CTA, some of which wait and some of which only say that they have come.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// threadIdx.x read anew at every use: in the main loops a register that holds it is one too many.
__device__ __forceinline__ int thread_id() {
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Programmatic dependent launch: wait for the grid this one depends on; let the next one start its prologue.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- arithmetic ----
// Two e4m3 to two fp16; exact, NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_fp16x2(uint16_t x) {
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(x));
  return y;
}

// Two fp16 to two bf16: exact for what was e4m3.
__device__ __forceinline__ uint32_t fp16x2_to_bf16x2(uint32_t x) {
  uint32_t y;
  asm("{\n"
      ".reg .b16 h<2>;\n"
      ".reg .f32 f<2>;\n"
      "mov.b32 {h0, h1}, %1;\n"
      "cvt.f32.f16 f0, h0;\n"
      "cvt.f32.f16 f1, h1;\n"
      "cvt.rn.bf16x2.f32 %0, f1, f0;\n"
      "}"
      : "=r"(y)
      : "r"(x));
  return y;
}

// Two bf16 to two fp16: exact from 2^-14 to 65504, beyond that the nearest finite value.
__device__ __forceinline__ uint32_t bf16x2_to_fp16x2(uint32_t x) {
  uint32_t y;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
      : "=r"(y)
      : "f"(__uint_as_float(x & 0xFFFF0000u)), "f"(__uint_as_float(x << 16)));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same, and it stays where it is among other volatile instructions.
__device__ __forceinline__ float exp2_approx_in_place(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler then knows nothing.
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// base + index in one instruction, with registers of its own.
__device__ __forceinline__ const int4* element_address(const int4* base, uint32_t index) {
  const int4* at;
  asm volatile("mad.wide.u32 %0, %1, 16, %2;" : "=l"(at) : "r"(index), "l"(base));
  return at;
}

}  // namespace flashcore::ptx
