// Shapes and shared memory of the decode kernel: tiles, rings, items. Read after decode.cuh's header.
#pragma once
#include "attention/params.h"
#include "common/ptx.cuh"

namespace flashcore::decode {

template <typename Element, int kHeadDim_>
struct Traits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = kHeadDim == 256 ? 64 : 128;  // tokens of a buffer
  static constexpr int kKBuffers = kHeadDim == 64 ? 6 : 3, kVBuffers = kHeadDim == 256 ? 2 : kKBuffers;
  static constexpr bool kQInRegisters = kHeadDim <= 128;  // d 256 has no registers left for it
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kQBytes = kNarrowRows * kRowBytes;  // of one warpgroup
  static constexpr int kRing = 12;                         // items known to the CTA
};

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
// setmaxnreg moves registers inside what the CTA was launched with (168 x 384); asking for more waits forever.
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 168 * kThreads);

template <class C>
struct SharedStorage {
  alignas(1024) char k[C::kKBuffers][C::kBufferBytes];
  alignas(1024) char v[C::kVBuffers][C::kBufferBytes];
  alignas(1024) char q[2][C::kQBytes];
  WorkItem items[C::kRing];
  int destinations[2][2][kNarrowRows];  // of the q_rows in q, by warpgroup and phase; see kNowhere
  uint32_t scattered[2][C::kTile];      // where the tokens of a K and a V tile lie that no box holds (load_scattered)
  int list_items[2], wide_ctas;
  int issued[2];  // ring positions behind the last K and the last V buffer that a loader has begun to fill
  alignas(8) uint64_t k_full[C::kKBuffers], k_empty[C::kKBuffers], v_full[C::kVBuffers], v_empty[C::kVBuffers],
      q_full[2], q_empty[2], item_full[C::kRing], item_begun[C::kRing], item_empty[C::kRing];
  // A consumer warpgroup skips the tiles of the other one, perhaps more than a ring of them. The parity of a full
  // barrier tells it about its own tile only from the time that both loaders have come to the item.
  uint64_t item_started[C::kRing];
};

// Where the result of a q_row goes: a row of out (top bit set), a partial slot, or kNowhere. Kept in shared memory
// beside q because the main loop has no register to spare; the q loader has looked it up by the time it is needed.
constexpr int kNowhere = 0x7FFFFFFF;

constexpr int kBoxes = 3;  // of 8 tokens, of 32, of a tile

struct TensorMaps {
  CUtensorMap k[kBoxes], v[kBoxes];
};

// Position in a ring of kSize slots, modulo two passes: slot and the parity of the pass in one register.
template <int kSize>
struct Ring {
  int at = 0;
  __device__ __forceinline__ int slot() const { return at < kSize ? at : at - kSize; }
  __device__ __forceinline__ uint32_t phase() const { return at >= kSize; }
  __device__ __forceinline__ void advance() { at = at == 2 * kSize - 1 ? 0 : at + 1; }
  __device__ __forceinline__ void advance(int n) { at = (at + n) % (2 * kSize); }
  __device__ __forceinline__ Ring previous() const { return {at == 0 ? 2 * kSize - 1 : at - 1}; }
  __device__ __forceinline__ Ring next() const {
    Ring r = *this;
    r.advance();
    return r;
  }
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile.
template <class C>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  return (row >> 3) * C::kGroupBytes + (chunk >> 3) * 1024 + (row & 7) * 128 + (((chunk ^ row) & 7) << 4);
}

template <class C>
__device__ __forceinline__ int tiles_of(const WorkItem& item) {
  return (item.num_tokens + C::kTile - 1) / C::kTile;
}

__device__ __forceinline__ RowInfo load_row_info(const DecodeParams& p, int position) {
  const int4 x = __ldg(reinterpret_cast<const int4*>(p.work.rows + min(max(position, 0), p.batch - 1)));
  return {x.x, x.y, x.z, x.w};
}

// kv_head also carries, from bit kOwnerShift: the warpgroups that work on the item, and the phases of their q buffers.
__device__ __forceinline__ int kv_head_of(const WorkItem& item) { return item.kv_head & ((1 << kOwnerShift) - 1); }
__device__ __forceinline__ bool owns(const WorkItem& item, int warpgroup) {
  return (item.kv_head >> (kOwnerShift + warpgroup)) & 1;
}

__device__ __forceinline__ uint32_t q_phase_of(const WorkItem& item, int warpgroup) {
  return (item.kv_head >> (kOwnerShift + 2 + warpgroup)) & 1;
}

}  // namespace flashcore::decode
