// WGMMA: D[64, N] (+)= A[64, 16] B[16, N] of a warpgroup. The threads issue it one by one; once all 128 have, it may
// run, and it runs at the latest when one of them waits for it and nothing else goes on.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "machine/machine.h"

namespace emulator {
namespace {

const uint32_t kPoison = 0x7FC5A5A5;  // NaN

float element(uint16_t bits, bool bf16) { return bf16 ? __bfloat162float({bits}) : __half2float({bits}); }

struct Place {
  int row, column;
};
// Of register i of thread t in D, and of half h of register i in A.
Place place_in_d(int t, int i) { return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2}; }
Place place_in_a(int t, int i, int half) {
  return {t / 32 * 16 + t % 32 / 4 + i % 2 * 8, i / 2 * 8 + t % 4 * 2 + half};
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) fail("a wgmma descriptor: want the 128-byte swizzle, base offset 0");
  }
};

// Eight elements side by side, through the swizzle. What was written through the generic proxy must have been fenced
// since, by the writer or by all that issued the product.
void load_chunk(Cta& cta, const PendingProduct& p, uint32_t linear, float (&x)[8]) {
  const uint32_t at = linear ^ (linear >> 3 & 0x70);
  const char* from = window(cta, at, 16, 16);
  const Written& w = cta.written[(at - kWindow) / 16];
  if (w.when != 0 && cta.threads[w.thread].fenced <= w.when && p.fenced <= w.when)
    fail("wgmma reads what thread " + std::to_string(w.thread) +
         " wrote through the generic proxy, without a proxy fence between");
  uint16_t bits[8];
  std::memcpy(bits, from, 16);
  for (int i = 0; i < 8; ++i) x[i] = element(bits[i], p.product.bf16);
}

// K-major: rows of 16 elements, eight of them in an atom.
template <int kColumns>
void load_k_major(Cta& cta, const PendingProduct& p, uint64_t descriptor, int rows, float (*to)[kColumns]) {
  const Descriptor d(descriptor);
  float x[8];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < 2; ++c) {
      load_chunk(cta, p, d.start + r / 8 * d.stride + r % 8 * 128 + c * 16, x);
      for (int i = 0; i < 8; ++i) to[r][c * 8 + i] = x[i];
    }
  }
}

float a_of[64][16], b_of[16][256];

void load_b(Cta& cta, const PendingProduct& p) {
  const int columns = p.product.columns;
  if (!p.product.transpose_b) {
    static float rows[256][16];
    load_k_major(cta, p, p.product.b, columns, rows);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) b_of[k][n] = rows[n][k];
    }
    return;
  }
  const Descriptor d(p.product.b);
  float x[8];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; n += 8) {
      load_chunk(cta, p, d.start + n / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + n % 64 * 2, x);
      std::copy(x, x + 8, b_of[k] + n);
    }
  }
}

void load_a(Cta& cta, const PendingProduct& p) {
  if (!p.product.a_in_registers) return load_k_major(cta, p, p.product.a, 64, a_of);
  for (int t = 0; t < 128; ++t) {
    if (std::memcmp(p.a[t], p.a_values[t], sizeof p.a_values[t]) != 0)
      fail("registers of A changed while wgmma was in flight, of thread " + std::to_string(t) + " of a warpgroup");
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const Place at = place_in_a(t, i, half);
        a_of[at.row][at.column] = element(static_cast<uint16_t>(p.a_values[t][i] >> 16 * half), p.product.bf16);
      }
    }
  }
}

void multiply(float* __restrict sums, int columns) {
  for (int r = 0; r < 64; ++r) {
    for (int k = 0; k < 16; ++k) {
      const float a = a_of[r][k];
      for (int n = 0; n < columns; ++n) sums[r * columns + n] += a * b_of[k][n];
    }
  }
}

void take_registers(Accumulator& a, int t, float* d) {
  a.registers[t] = d;
  for (int i = 0; i < a.columns / 2; ++i) {
    const Place at = place_in_d(t, i);
    a.sums[at.row * a.columns + at.column] = d[i];
    std::memcpy(&d[i], &kPoison, 4);
  }
}

void give_registers(const Accumulator& a) {
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < a.columns / 2; ++i) {
      float* d = a.registers[t] + i;
      if (std::memcmp(d, &kPoison, 4) != 0)
        fail("an accumulator changed while wgmma was in flight, of thread " + std::to_string(t) + " of a warpgroup");
      const Place at = place_in_d(t, i);
      *d = a.sums[at.row * a.columns + at.column];
    }
  }
}

Warpgroup& warpgroup_of(const Thread& t) { return t.cta->warpgroups[t.index / 128]; }

}  // namespace

void wgmma(const Product& product, float* d, const uint32_t* a) {
  Thread& t = self();
  Warpgroup& w = warpgroup_of(t);
  const int lane = t.index % 128;
  const uint64_t index = t.products++ - w.finished;
  if (index == w.products.size()) {  // the first thread to come
    PendingProduct p{.product = product, .group = t.groups};
    p.accumulator = std::find_if(w.accumulators.begin(), w.accumulators.end(),
                                 [&](const Accumulator& x) { return x.registers[lane] == d; });
    if (p.accumulator == w.accumulators.end()) {
      w.accumulators.push_back({.columns = product.columns, .sums = std::vector<float>(64 * product.columns)});
      p.accumulator = std::prev(w.accumulators.end());
    }
    ++p.accumulator->uses;
    w.products.push_back(p);
  }
  PendingProduct& p = w.products[index];
  Accumulator& sums = *p.accumulator;
  if (!(p.product == product) || p.group != t.groups || sums.columns != product.columns)
    fail("the threads of a warpgroup do not issue the same wgmma");
  if (sums.registers[lane] == nullptr) {
    if (!t.wgmma_fenced) fail("wgmma without wgmma.fence since its registers were waited for");
    take_registers(sums, lane, d);
  } else if (sums.registers[lane] != d) {
    fail("the threads of a warpgroup do not issue wgmma on the same accumulators");
  }
  if (product.a_in_registers) {
    p.a[lane] = a;
    std::memcpy(p.a_values[lane], a, sizeof p.a_values[lane]);
  }
  p.fenced = std::min(p.fenced, t.fenced);
  ++p.threads;
}

void wgmma_fence() { self().wgmma_fenced = true; }
void wgmma_commit() { ++self().groups; }

void wgmma_wait(int pending) {
  exchange("wgmma.wait_group", ~0u, static_cast<uint64_t>(pending));
  Thread& t = self();
  Warpgroup& w = warpgroup_of(t);
  const auto unfinished = [&] {
    return !w.products.empty() && w.products.front().group + static_cast<uint64_t>(pending) < t.groups;
  };
  while (unfinished()) {
    w.waiting.push_back(&t);
    wait_for("wgmma.wait_group", static_cast<uint32_t>(pending));
  }
  t.wgmma_fenced = false;
}

bool can_run(const Warpgroup& w) { return !w.products.empty() && w.products.front().threads == 128; }

void run_product(Cta& cta, Warpgroup& w) {
  const PendingProduct& p = w.products.front();
  Accumulator& sums = *p.accumulator;
  load_a(cta, p);
  load_b(cta, p);
  if (!p.product.accumulate) std::fill(sums.sums.begin(), sums.sums.end(), 0.f);
  multiply(sums.sums.data(), sums.columns);
  if (--sums.uses == 0) {
    give_registers(sums);
    w.accumulators.erase(p.accumulator);
  }
  w.products.pop_front();
  ++w.finished;
  wake(w.waiting);
}

}  // namespace emulator
