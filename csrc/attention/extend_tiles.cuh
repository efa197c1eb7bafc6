// Shapes and shared memory of the extend kernel. Read after extend.cuh's header.
#pragma once
#include "attention/extend_params.h"
#include "attention/tiles.cuh"
#include "common/ptx.cuh"

namespace flashcore::extend {

using decode::Ring;
using decode::tile_offset;

// kGeneral: with logit cap, sliding window or custom mask, whose code the loop else does without.
template <typename Element, int kHeadDim_, bool kGeneral_>
struct Traits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRows = tile_rows(kHeadDim), kWarpgroups = kRows / 64;  // consumers
  static constexpr int kThreads = 128 + 128 * kWarpgroups;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 232;
  // setmaxnreg moves registers inside what the CTA was launched with; asking for more waits forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(128 * kProducerRegisters + 128 * kWarpgroups * kConsumerRegisters <= kLaunchRegisters * kThreads);
  static constexpr int kTile = tile_tokens(kHeadDim);  // tokens of a buffer
  static constexpr int kBuffers = kHeadDim == 256 ? 5 : kHeadDim == 128 ? 6 : 16;
  static constexpr bool kQInRegisters = kHeadDim <= 128;  // d 256 has no registers left for it
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // 8 tokens (or q_rows)
  static constexpr int kBufferBytes = kTile * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;  // 16-byte chunks of a row
};

constexpr int kLoaders = 3;  // warps

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

// Slots of tiles between the planner and the loaders. Every loader waits for every buffer and every slot list, so none
// can be a round of a ring behind the others.
constexpr int kPlanned = 2;
constexpr uint32_t kNoToken = ~0u;
// No barrier guards these two rings: the planner is at most kPlanned tiles ahead of the loaders, they at most
// kBuffers / 2 ahead of the consumers, and every item has a tile.
constexpr int kTiles = 16, kItems = 16;

template <class C>
struct SharedStorage {
  static_assert(kPlanned + C::kBuffers / 2 + 2 < kTiles && kPlanned + C::kBuffers / 2 + 2 < kItems);
  alignas(1024) char buffers[C::kBuffers][C::kBufferBytes];
  alignas(1024) char q[C::kWarpgroups][64 * C::kRowBytes];
  uint32_t slots[kPlanned][C::kTile];  // of tokens in boxes; of others where they lie in the pool, in 16 bytes
  Item items[kItems];
  Load loads[kPlanned];
  Tile tiles[kTiles];
  int total, last_arriver[C::kWarpgroups];
  alignas(8) uint64_t full[C::kBuffers], empty[C::kBuffers], q_full, q_empty, planned[kPlanned], loaded[kPlanned];
};

struct TensorMaps {
  CUtensorMap k[3], v[3];  // boxes of 8 tokens, of a tile, of a tile of gathered slots
};

}  // namespace flashcore::extend
