// Shared memory, and what is copied to it: TMA boxes and cp.async. From its issue until it lands, what a copy writes is
// NaN: so whoever reads too early reads it, and so does whoever is not done yet with what lay there before.
#include <cstring>

#include "machine/machine.h"

namespace emulator {
namespace {

constexpr int kPoison = 0xFF;

// Calls visit(destination, source or nullptr) for each 16 bytes of a box. Lines lie one behind the other, and their
// chunks where the swizzle of the address says.
template <class Visit>
void visit_box(Cta& cta, const Copy& c, Visit visit) {
  const CUtensorMap& m = c.map;
  const uint32_t line = m.box[0] * m.element_bytes, mask = m.swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 0x70 : 0x30;
  uint32_t at = c.smem;
  uint64_t x[5];
  for (uint32_t i4 = 0; i4 < m.box[4]; ++i4) {
    for (uint32_t i3 = 0; i3 < m.box[3]; ++i3) {
      for (uint32_t i2 = 0; i2 < m.box[2]; ++i2) {
        for (uint32_t i1 = 0; i1 < m.box[1]; ++i1, at += line) {
          const uint32_t steps[5] = {0, i1, i2, i3, i4};
          bool inside = true;
          for (int d = 0; d < 5; ++d) {
            x[d] = static_cast<uint64_t>(int64_t{c.coordinates[d]} + steps[d]);  // below 0: very large
            inside &= x[d] < m.sizes[d];
          }
          uint64_t from = x[0] * m.element_bytes;
          for (int d = 1; d < 5; ++d) from += x[d] * m.strides[d - 1];
          if (inside && from + line > m.extent) fail("a TMA box reads past the end of its tensor");
          for (uint32_t byte = 0; byte < line; byte += 16) {
            const uint32_t linear = at + byte, to = linear ^ (linear >> 3 & mask);
            visit(to, window(cta, to, 16, 16), inside ? m.base + from + byte : nullptr);
          }
        }
      }
    }
  }
}

uint32_t box_bytes(const CUtensorMap& m) {
  return m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4] * m.element_bytes;
}

void land_first(Thread& t) {
  const AsyncCopy copy = t.copies.front();
  t.copies.pop_front();
  ++t.landed;
  char* to = window(*t.cta, copy.smem, 16, 16);
  std::memset(to, 0, 16);
  std::memcpy(to, copy.global, copy.bytes);
  t.cta->written[(copy.smem - kWindow) / 16] = {machine.clock, t.index};
}

}  // namespace

char* shared_memory() { return self().cta->shared; }

uint32_t shared_address(const void* p) {
  const Cta& cta = *self().cta;
  const ptrdiff_t at = static_cast<const char*>(p) - cta.shared;
  if (at < 0 || at > cta.shared_bytes) fail("an address is asked for that is not in shared memory");
  return kWindow + static_cast<uint32_t>(at);
}

char* window(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address < kWindow || uint64_t{address} + bytes > uint64_t{kWindow} + cta.shared_bytes)
    fail("shared memory has " + std::to_string(cta.shared_bytes) + " bytes; " + std::to_string(bytes) +
         " are accessed at " + std::to_string(int64_t{address} - kWindow));
  if (address % alignment != 0)
    fail("shared memory at " + std::to_string(address - kWindow) + ": want a multiple of " + std::to_string(alignment));
  return cta.shared + (address - kWindow);
}

char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment) {
  return window(*self().cta, address, bytes, alignment);
}

void wrote_generic(uint32_t address) {
  self().cta->written[(address - kWindow) / 16] = {++machine.clock, self().index};
}

void fence_proxy_async() { self().fenced = ++machine.clock; }

void tma_load(uint32_t smem, const CUtensorMap& map, uint32_t bar, const int (&coordinates)[5]) {
  Cta& cta = *self().cta;
  window(cta, smem, box_bytes(map), 128);
  Copy copy{.bar = bar, .smem = smem, .map = map, .speed = machine.speed()};
  std::memcpy(copy.coordinates, coordinates, sizeof coordinates);
  visit_box(cta, copy, [](uint32_t, char* to, const char*) { std::memset(to, kPoison, 16); });
  cta.copies.push_back(copy);
  step_aside();
}

void cp_async_16(uint32_t smem, const void* global, uint32_t bytes) {
  Thread& t = self();
  if (bytes > 16) fail("cp.async of " + std::to_string(bytes) + " bytes: want at most 16");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async from an address off 16 bytes");
  std::memset(window(*t.cta, smem, 16, 16), kPoison, 16);
  t.copies.push_back({smem, global, bytes});
  ++t.issued;
}

void cp_async_mbarrier_arrive(uint32_t bar) {
  Thread& t = self();
  t.cta->copies.push_back({.bar = bar, .thread = &t, .until = t.issued, .speed = machine.speed()});
}

void land(Cta& cta, const Copy& copy) {
  if (copy.thread != nullptr) {
    while (copy.thread->landed < copy.until) land_first(*copy.thread);
    arrive_at(cta, copy.bar, 1);
    return;
  }
  visit_box(cta, copy, [&](uint32_t at, char* to, const char* from) {
    if (from != nullptr) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
    cta.written[(at - kWindow) / 16] = {};
  });
  complete_tx(cta, copy.bar, box_bytes(copy.map));
}

}  // namespace emulator

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fits = rank == 5 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  *map = {};
  map->base = static_cast<const char*>(base);
  map->element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  map->swizzle = static_cast<uint16_t>(swizzle);
  for (int d = 0; d < 5; ++d) {
    map->sizes[d] = sizes[d];
    map->box[d] = box[d];
    fits &= box[d] >= 1 && box[d] <= 256 && steps[d] == 1;
  }
  for (int d = 0; d < 4; ++d) {
    map->strides[d] = strides[d];
    fits &= strides[d] % 16 == 0;
  }
  fits &= box[0] * map->element_bytes <= (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128u : 64u);
  // Of a map for tokens that lie apart (launch.h), the last axis has the pool's size, of one of q the third, else the
  // second.
  map->extent = std::max({sizes[1] * strides[0], sizes[2] * strides[1], sizes[4] * strides[3]});
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
