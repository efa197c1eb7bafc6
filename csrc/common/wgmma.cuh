// WGMMA: D[64, N] (+)= A[64, 16] B[16, N], bf16 or fp16 operands, fp32 sums, one warpgroup.
//
// Fragments, thread t of 128, warp w = t / 32, lane l = t % 32:
//   D: d[4 * j + {0, 1}] = D[16 w + l / 4][8 j + 2 (l % 4) + {0, 1}]; d[4 * j + {2, 3}]: eight rows below.
//   A in registers: a[0] = (row l / 4, columns 2 (l % 4) + {0, 1}), a[1]: row + 8, a[2]: column + 8, a[3]: both.
// So two neighbouring column groups of D, rounded to 16 bit, are an A fragment: P goes from the first product to the
// second without leaving the registers.
//
// Operands in shared memory: wgmma_descriptor.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/wgmma_descriptor.cuh"

namespace flashcore::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler must not move reads of an accumulator above the wait, nor keep copies of it across one.
template <int kCount>
__device__ __forceinline__ void wgmma_touch(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FC_D8(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FC_D32(i) FC_D8(i), FC_D8(i + 8), FC_D8(i + 16), FC_D8(i + 24)

#define FC_WGMMA_RS_64(TYPE)                                      \
  asm volatile(                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
      " "                                                         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                         \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                    \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                  \
      "%24, %25, %26, %27, %28, %29, %30, %31}, "                 \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"               \
      : FC_D32(0)                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))
#define FC_WGMMA_SS_64(TYPE)                                      \
  asm volatile(                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
      " "                                                         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                         \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                    \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                  \
      "%24, %25, %26, %27, %28, %29, %30, %31}, "                 \
      "%32, %33, p, 1, 1, 0, %35;\n}"                             \
      : FC_D32(0)                                                 \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB))

#define FC_WGMMA_RS_128(TYPE)                                      \
  asm volatile(                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
      " "                                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                          \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
      "%56, %57, %58, %59, %60, %61, %62, %63}, "                  \
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                \
      : FC_D32(0), FC_D32(32)                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))
#define FC_WGMMA_SS_128(TYPE)                                      \
  asm volatile(                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
      " "                                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                          \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
      "%56, %57, %58, %59, %60, %61, %62, %63}, "                  \
      "%64, %65, p, 1, 1, 0, %67;\n}"                              \
      : FC_D32(0), FC_D32(32)                                      \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB))

#define FC_WGMMA_RS_256(TYPE)                                      \
  asm volatile(                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE \
      " "                                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                          \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
      "%56, %57, %58, %59, %60, %61, %62, %63, "                   \
      "%64, %65, %66, %67, %68, %69, %70, %71, "                   \
      "%72, %73, %74, %75, %76, %77, %78, %79, "                   \
      "%80, %81, %82, %83, %84, %85, %86, %87, "                   \
      "%88, %89, %90, %91, %92, %93, %94, %95, "                   \
      "%96, %97, %98, %99, %100, %101, %102, %103, "               \
      "%104, %105, %106, %107, %108, %109, %110, %111, "           \
      "%112, %113, %114, %115, %116, %117, %118, %119, "           \
      "%120, %121, %122, %123, %124, %125, %126, %127}, "          \
      "{%128, %129, %130, %131}, %132, p, 1, 1, %134;\n}"          \
      : FC_D32(0), FC_D32(32), FC_D32(64), FC_D32(96)              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))

// A in registers.
template <typename T, int N, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 128 || N == 256);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (N == 64 && kBf16) FC_WGMMA_RS_64("bf16");
  if constexpr (N == 64 && !kBf16) FC_WGMMA_RS_64("f16");
  if constexpr (N == 128 && kBf16) FC_WGMMA_RS_128("bf16");
  if constexpr (N == 128 && !kBf16) FC_WGMMA_RS_128("f16");
  if constexpr (N == 256 && kBf16) FC_WGMMA_RS_256("bf16");
  if constexpr (N == 256 && !kBf16) FC_WGMMA_RS_256("f16");
}

// A in shared memory, K-major.
template <typename T, int N, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 128);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (N == 64 && kBf16) FC_WGMMA_SS_64("bf16");
  if constexpr (N == 64 && !kBf16) FC_WGMMA_SS_64("f16");
  if constexpr (N == 128 && kBf16) FC_WGMMA_SS_128("bf16");
  if constexpr (N == 128 && !kBf16) FC_WGMMA_SS_128("f16");
}

#undef FC_D8
#undef FC_D32
#undef FC_WGMMA_RS_64
#undef FC_WGMMA_RS_128
#undef FC_WGMMA_RS_256
#undef FC_WGMMA_SS_64
#undef FC_WGMMA_SS_128

}  // namespace flashcore::ptx
