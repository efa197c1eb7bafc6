// Shapes and shared memory of the decode kernel: tiles, rings, items. Read after decode.cuh's header.
#pragma once
#include <algorithm>
#include <type_traits>

#include "attention/params.h"
#include "common/ptx.cuh"

namespace flashcore::decode {

// A tile of `kTokens` tokens of one KV head in shared memory: [8-token group][line of up to 128 B][8 tokens], swizzled.
template <int kTokens, int kRowBytes_>
struct TileShape {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTokens * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;  // 16-byte chunks of a row
};

// Cache: the elements of the KV cache. E4m3 is converted (converter.cuh) to fp16, the type of the products.
template <typename Cache, int kHeadDim_>
struct Traits {
  static constexpr bool kConverts = std::is_same_v<Cache, E4m3>;
  using T = std::conditional_t<kConverts, __half, Cache>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTile = kHeadDim == 256 ? 64 : 128;  // tokens of a buffer
  // What the products read. With a converter most of the depth is in what comes before it, at half the bytes a token.
  static constexpr int kKBuffers = kConverts ? 256 / kHeadDim : kHeadDim == 64 ? 6 : 3;
  static constexpr int kVBuffers = kHeadDim == 256 ? 2 : kKBuffers;
  static constexpr int kCachedBuffers = kHeadDim == 64 ? 4 : 2;  // each of K and V
  static constexpr bool kQInRegisters = kHeadDim <= 128;         // d 256 has no registers left for it
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kQBytes = kNarrowRows * kRowBytes;  // of one warpgroup
  static constexpr int kRing = 12;                         // items known to the CTA
  // Columns of one P V instruction: no more than the registers at launch (65536 / kThreads) hold.
  static constexpr int kPvColumns = kConverts ? std::min(kHeadDim, 128) : kHeadDim;
  using Cached = TileShape<kTile, kConverts ? kHeadDim : kRowBytes>;  // what the loaders bring
  static constexpr int kThreads = kConverts ? 512 : 384;
  static constexpr int kProducerRegisters = kConverts ? 40 : 56, kConverterRegisters = kConverts ? 24 : 0;
  static constexpr int kConsumerRegisters = 224;
  // setmaxnreg moves registers inside what the CTA was launched with; asking for more waits forever.
  static_assert(128 * (kProducerRegisters + kConverterRegisters) + 256 * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * kThreads);
};

// K and V as the loaders bring them, where a converter stands between them and the consumers.
template <class C>
struct CachedTiles {
  alignas(1024) char k[C::kCachedBuffers][C::Cached::kBufferBytes];
  alignas(1024) char v[C::kCachedBuffers][C::Cached::kBufferBytes];
};
template <class C>
struct CachedBarriers {
  uint64_t k_full[C::kCachedBuffers], k_empty[C::kCachedBuffers], v_full[C::kCachedBuffers], v_empty[C::kCachedBuffers];
};
struct None {};

// What a loader keeps about tokens that do not lie in a row.
template <class C>
struct Scattered {
  alignas(16) uint32_t where[C::kTile];  // of a tile's tokens that no box holds (load_scattered)
  int strides[kStrides];                 // of the maps it has made (strided.cuh)
};

template <class C>
struct SharedStorage {
  alignas(1024) char k[C::kKBuffers][C::kBufferBytes];
  alignas(1024) char v[C::kVBuffers][C::kBufferBytes];
  [[no_unique_address]] std::conditional_t<C::kConverts, CachedTiles<C>, None> cached;
  alignas(1024) char q[2][C::kQBytes];
  WorkItem items[C::kRing];
  int destinations[2][2][kNarrowRows];           // of the q_rows in q, by warpgroup and phase; see kNowhere
  Scattered<C> scattered[2];                     // of the loaders of K and of V
  int list_items[2], large_items[2], wide_ctas;  // items of the lists; those up to the last large one
  int issued[2];  // ring positions behind the last K and the last V buffer that has begun to be filled
  alignas(8) uint64_t k_full[C::kKBuffers], k_empty[C::kKBuffers], v_full[C::kVBuffers], v_empty[C::kVBuffers],
      q_full[2], q_empty[2], item_full[C::kRing], item_begun[C::kRing], item_empty[C::kRing];
  // A consumer warpgroup skips the tiles of the other one, perhaps more than a ring of them. The parity of a full
  // barrier tells it about its own tile only from the time that who fills K and who fills V have come to the item.
  uint64_t item_started[C::kRing];
  [[no_unique_address]] std::conditional_t<C::kConverts, CachedBarriers<C>, None> cached_barriers;
};

// Of the KV cache, for its tensor maps.
template <class C>
constexpr DType cache_dtype() {
  return C::kConverts ? DType::kE4m3 : std::is_same_v<typename C::T, __half> ? DType::kFp16 : DType::kBf16;
}

// Where the result of a q_row goes: the index of a row of out (kInOut) or of a partial slot, and the head within its
// group; or kNowhere. Kept in shared memory beside q because the main loop has no register to spare; the q loader has
// looked it up by the time it is needed.
constexpr int kNowhere = 0x7FFFFFFF, kInOut = 1 << 31, kGroupHeadBits = 6;
static_assert(1 << kGroupHeadBits >= kNarrowRows);  // the largest group that check_heads lets pass
__device__ __forceinline__ int index_of(int destination) { return (destination & ~kInOut) >> kGroupHeadBits; }
__device__ __forceinline__ int group_head_of(int destination) { return destination & ((1 << kGroupHeadBits) - 1); }

constexpr int kBoxes = 3;  // of 8 tokens, of 32, of a tile

struct TensorMaps {
  CUtensorMap k[kBoxes], v[kBoxes], strided_k, strided_v;
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

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile: lines of 128 bytes, or of 64, whose swizzle spreads
// eight rows over all banks too.
template <class C>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  if constexpr (C::kRowBytes == 64) {
    return (row >> 3) * C::kGroupBytes + (row & 7) * 64 + (((chunk ^ (row >> 1)) & 3) << 4);
  } else {
    return (row >> 3) * C::kGroupBytes + (chunk >> 3) * 1024 + (row & 7) * 128 + (((chunk ^ row) & 7) << 4);
  }
}

template <class C>
__device__ __forceinline__ int tiles_of(const WorkItem& item) {
  return (item.num_tokens + C::kTile - 1) / C::kTile;
}

__device__ __forceinline__ RowInfo load_row_info(const DecodeParams& p, int position) {
  const int4 x = __ldg(reinterpret_cast<const int4*>(p.work.rows + min(max(position, 0), p.batch - 1)));
  return {x.x, x.y, x.z, x.w};
}

// kv_head also carries, from bit kOwnerShift: the warpgroups that work on the item, and the phases of their q buffers;
// from bit kRunShift: see first_run_of.
__device__ __forceinline__ int kv_head_of(const WorkItem& item) { return item.kv_head & ((1 << kOwnerShift) - 1); }
__device__ __forceinline__ bool owns(const WorkItem& item, int warpgroup) {
  return (item.kv_head >> (kOwnerShift + warpgroup)) & 1;
}

// Tokens of the first run of an item of runs; else -1.
__device__ __forceinline__ int first_run_of(const WorkItem& item) { return (item.kv_head >> kRunShift) - 1; }
__device__ __forceinline__ int piece_of(const WorkItem& item) {
  return first_run_of(item) < 0 ? item.piece : item.piece & ((1 << kStepShift) - 1);
}

__device__ __forceinline__ uint32_t q_phase_of(const WorkItem& item, int warpgroup) {
  return (item.kv_head >> (kOwnerShift + 2 + warpgroup)) & 1;
}

}  // namespace flashcore::decode
