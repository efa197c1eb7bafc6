// Shapes and shared memory of the extend kernel. Read after extend.cuh's header.
#pragma once
#include "attention/extend_params.h"
#include "attention/tiles.cuh"
#include "common/ptx.cuh"

namespace flashcore::extend {

using decode::Ring;
using decode::tile_offset;

// kMasks: with sliding window or custom mask; kCap: with logit cap. The loop else does without their code.
// Cache: the elements of what is read. E4m3 is converted (converter.cuh) to fp16, the type of the products.
// kScaled: with the scales of an e4m3 cache, which extend_gather.cu may have converted.
template <typename Cache, int kHeadDim_, bool kMasks_, bool kCap_, bool kScaled_>
struct Traits {
  static constexpr bool kConverts = std::is_same_v<Cache, E4m3>;
  using T = std::conditional_t<kConverts, __half, Cache>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kMasks = kMasks_, kCap = kCap_, kScaled = kScaled_;
  static constexpr int kRows = tile_rows(kHeadDim, kConverts), kWarpgroups = kRows / 64;  // consumers
  static constexpr int kThreads = 128 + 128 * kWarpgroups + (kConverts ? 128 : 0);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : kConverts ? 224 : 232;
  static constexpr int kConverterRegisters = kConverts ? 24 : 0;
  // setmaxnreg moves registers inside what the CTA was launched with; asking for more waits forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(128 * (kProducerRegisters + kConverterRegisters + kWarpgroups * kConsumerRegisters) <=
                kLaunchRegisters * kThreads);
  static constexpr int kTile = tile_tokens(kHeadDim);  // tokens of a buffer
  // K, V, K, V, ...; with a converter there are as many tiles in what comes before it, at half the bytes a token.
  static constexpr int kBuffers = kConverts ? (kHeadDim == 64 ? 8 : 4) : kHeadDim == 64 ? 10 : 5;
  static constexpr int kCachedBuffers = kConverts ? (kHeadDim == 256 ? 2 : kBuffers) : 0;
  static constexpr int kPvColumns = kConverts && kHeadDim == 256 ? 128 : kHeadDim;  // as in decode's traits
  // With a converter q comes into registers, where there are enough of them, and is converted there. Else it stays in
  // shared memory, if there is room twice: the next item's beside the present one's.
  static constexpr bool kQInRegisters = kConverts && kHeadDim <= 128;
  static constexpr int kQBuffers = kConverts || kHeadDim == 256 ? 1 : 2;
  // Of a thread's rows, in out. Else there are no registers left for them, and they are asked for again at the end.
  static constexpr bool kKeepsIndices = kHeadDim <= 128 && !((kConverts || (kWarpgroups == 3 && kCap)) && kMasks);
  static constexpr bool kTurns = kWarpgroups == 2 && !kConverts;  // of the warpgroups at the tensor cores
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;                              // 16-byte chunks of a row
  static constexpr int kQBytes = 64 * kRowBytes;                              // of one warpgroup
  using Cached = decode::TileShape<kTile, kConverts ? kHeadDim : kRowBytes>;  // what the loaders bring
};

constexpr int kLoaders = 3;  // warps

// Where the q of an item in shared memory begins, if it is one box; else -1 (q_box). It stands where the planner alone
// needed the first tile.
__device__ __forceinline__ int q_begin(const Item& item) { return item.first_tile; }

// The packed token of a q_row: q_row / ratio, exact for q_row < 2^32 / (ratio - 1), so for all (api_extend.cc).
__device__ __forceinline__ int token_at(const Params& p, int q_row) {
  return p.ratio == 1 ? q_row : static_cast<int>(__umulhi(static_cast<uint32_t>(q_row), p.ratio_inverse));
}

// What the loaders and the consumers are told of a KV tile. Both lie in rings of shared memory.
struct Load {
  int first;       // slot of the first token if all are consecutive, else -1
  uint32_t boxes;  // bit g: tokens 8 g .. 8 g + 7 are consecutive
  int item;        // ring position of the tile's item; from bit kFlagShift: kFirst, kGathered, kEnd
};

struct Tile {
  int position;   // of its first token
  uint32_t bits;  // valid tokens | first q_row << 8 | end q_row << 16 | kMasked, kLast, kEnd, kScattered << kFlagShift
};

constexpr int kFlagShift = 24;
constexpr uint32_t kFirst = 1, kMasked = 1, kLast = 2, kEnd = 4, kScattered = 8, kGathered = 16;

// Slots of tiles between the planner and the loaders. Every loader waits for every slot list, so none is further than
// these tiles ahead of another or behind it.
constexpr int kPlanned = 2;
constexpr uint32_t kNoToken = ~0u;
// No barrier guards these two rings: the planner is at most kPlanned tiles ahead of the loaders, they at most half of
// all buffers ahead of the consumers, and every item has a tile.
constexpr int kTiles = 16, kItems = 16;

// K and V as the loaders bring them, where a converter stands between them and the consumers.
template <class C>
struct CachedTiles {
  alignas(1024) char buffers[C::kCachedBuffers][C::Cached::kBufferBytes];
};
template <class C>
struct CachedBarriers {
  uint64_t full[C::kCachedBuffers], empty[C::kCachedBuffers];
};

template <class C>
struct SharedStorage {
  static constexpr int kAhead = kPlanned + (C::kBuffers + C::kCachedBuffers) / 2 + 2;
  static_assert(kAhead < kTiles && kAhead < kItems);
  alignas(1024) char buffers[C::kBuffers][C::kBufferBytes];
  [[no_unique_address]] std::conditional_t<C::kConverts, CachedTiles<C>, decode::None> cached;
  alignas(1024) char q[C::kQBuffers][C::kWarpgroups][C::kQBytes];
  uint32_t slots[kPlanned][C::kTile];  // of tokens in boxes; of others where they lie in the pool, in 16 bytes
  Item items[kItems];
  Load loads[kPlanned];
  Tile tiles[kTiles];
  int total, paired, limit;  // items; the first and the end of those that a second one belongs to (Header)
  int last_arriver[C::kWarpgroups];
  alignas(8) uint64_t full[C::kBuffers], empty[C::kBuffers], q_full[C::kQBuffers], q_empty[C::kQBuffers],
      planned[kPlanned], loaded[kPlanned];
  [[no_unique_address]] std::conditional_t<C::kConverts, CachedBarriers<C>, decode::None> cached_barriers;
};

struct TensorMaps {
  CUtensorMap k[3], v[3];  // boxes of 8 tokens, of a tile, of a tile of gathered slots
  CUtensorMap q;           // of an item
};

}  // namespace flashcore::extend
