// Arithmetic that both libraries compile: the GPU's kernels and their twins on the CPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FC_HOST_DEVICE inline
#endif

namespace flashcore {

// A caller's vector. Not owned.
struct IntegerArray {
  const void* data;  // int32 or int64
  bool are_64bit;
};

FC_HOST_DEVICE int64_t load_integer(const IntegerArray& values, int i) {
  return values.are_64bit ? static_cast<const int64_t*>(values.data)[i] : static_cast<const int*>(values.data)[i];
}

FC_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace flashcore
