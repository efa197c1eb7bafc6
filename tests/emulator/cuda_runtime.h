// The CUDA language and runtime as the kernels of csrc/ use them, for g++: a launch runs on machine/machine.h.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine/device.h"

// ---- language ----
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b : a;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<uint64_t>(x) * y >> 32; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fdividef(float x, float y) { return x / y; }

// ---- memory ----
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> x) {
  *p = x;
}
inline void __threadfence() { emulator::step_aside(); }

template <class T, class Change>
T atomic_change(T* p, Change change) {
  emulator::step_aside();
  const T old = *p;
  *p = change(old);
  emulator::let_others();
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return atomic_change(p, [=](T old) { return static_cast<T>(old + x); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  return atomic_change(p, [=](T old) { return std::max(old, x); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  return atomic_change(p, [=](T old) { return std::min(old, x); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  return atomic_change(p, [=](T old) { return static_cast<T>(old | x); });
}

// ---- warps and CTAs ----
inline void __syncthreads() { emulator::sync_cta(false); }
inline int __syncthreads_count(int x) { return emulator::sync_cta(x != 0); }
inline int __syncthreads_or(int x) { return emulator::sync_cta(x != 0) > 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange("__syncwarp", mask, 0); }

template <class T>
T shuffle(const char* what, unsigned mask, T x, int from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof(T));
  const emulator::Lanes& lanes = emulator::exchange(what, mask, word);
  std::memcpy(&x, &lanes.values[from & 31], sizeof(T));
  return x;
}
inline int lane_of_thread() { return threadIdx.x % 32; }
template <class T>
T __shfl_sync(unsigned mask, T x, int from) {
  return shuffle("__shfl_sync", mask, x, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return shuffle("__shfl_xor_sync", mask, x, lane_of_thread() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  return shuffle("__shfl_up_sync", mask, x,
                 lane_of_thread() < distance ? lane_of_thread() : lane_of_thread() - distance);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  const emulator::Lanes& lanes = emulator::exchange("vote", mask, x != 0);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes.values[i]) << i;
  return votes;
}
template <class T, class Merge>
T reduce(unsigned mask, T x, Merge merge) {
  const emulator::Lanes& lanes = emulator::exchange("reduction", mask, static_cast<uint64_t>(x));
  T result = static_cast<T>(lanes.values[0]);
  for (int i = 1; i < 32; ++i) result = merge(result, static_cast<T>(lanes.values[i]));
  return result;
}
template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return reduce(mask, x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return reduce(mask, x, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return reduce(mask, x, [](T a, T b) { return std::max(a, b); });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, !x) == 0; }

// ---- runtime ----
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::multiprocessors();
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, size_t) {
  return cudaSuccess;
}
template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params...),
                               const std::type_identity_t<Params>&... params) {
  const emulator::Shape shape{c->gridDim.x, c->gridDim.y, c->blockDim.x, c->dynamicSmemBytes};
  const bool finished = emulator::launch(shape, [&] { kernel(params...); });
  return finished ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
