// What the emulated headers (cuda_runtime.h, common/ptx.cuh, common/wgmma.cuh) ask of the machine, on behalf of the
// thread of a kernel that runs. Shared memory is addressed as on the device, by 32-bit addresses of the CTA's window.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct CUtensorMap;

namespace emulator {

// ---- launches ----
// Runs a grid to its end. False: last_error() says what was wrong.
struct Shape {
  unsigned x, y, threads;
  size_t shared_bytes;
};
bool launch(const Shape& shape, const std::function<void()>& kernel);
const char* last_error();
int multiprocessors();

// ---- threads ----
[[noreturn]] void fail(const std::string& what);
void step_aside();  // here another warp may go on
void let_others();  // an atomic operation was done: here all other CTAs may go on before this one
void poll();        // the thread looks for something; having looked again and again, it waits until something happens

// ---- warps and CTAs ----
struct Lanes {
  uint64_t values[32];  // 0 of lanes that have ended
};
// Every lane of the warp gives a value. Valid until the thread's next exchange.
const Lanes& exchange(const char* what, unsigned mask, uint64_t value);
int sync_cta(bool vote);  // all threads that have not ended; returns how many voted
void barrier_sync(int barrier, int threads);
void barrier_arrive(int barrier, int threads);

// ---- shared memory ----
char* shared_memory();
uint32_t shared_address(const void* p);
// `bytes` of the window, which must be inside of it and aligned.
char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment);
// The thread has written 16 bytes there through the generic proxy, which is not yet seen by wgmma.
void wrote_generic(uint32_t address);
void fence_proxy_async();

// ---- mbarriers ----
void mbarrier_init(uint32_t bar, uint32_t count);
void mbarrier_expect_tx(uint32_t bar, uint32_t bytes);
void mbarrier_arrive(uint32_t bar, uint32_t count);
bool mbarrier_test(uint32_t bar, uint32_t parity);
bool mbarrier_try_wait(uint32_t bar, uint32_t parity);
void mbarrier_wait(uint32_t bar, uint32_t parity);

// ---- copies, which land some time later ----
void tma_load(uint32_t smem, const CUtensorMap& map, uint32_t bar, const int (&coordinates)[5]);
void cp_async_16(uint32_t smem, const void* global, uint32_t bytes);
void cp_async_mbarrier_arrive(uint32_t bar);

// ---- wgmma, which runs some time later ----
struct Product {
  bool bf16, transpose_b, a_in_registers, accumulate;
  int columns;
  uint64_t a, b;  // descriptors; a: 0 if it lies in registers
  bool operator==(const Product&) const = default;
};
void wgmma(const Product& product, float* d, const uint32_t* a);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator
