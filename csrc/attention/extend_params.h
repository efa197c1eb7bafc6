// Extend attention (prefill, chunks on a cached prefix, verify): sizes, workspace and params of its two kernels
// (extend_schedule.cu -> extend.cuh). Shape letters as in params.h, and T query tokens of the batch.
//
// Queries are counted in packed order: the tokens of the rows in row_order, and of each token its R = H / G heads of
// one KV head: q_row = packed token * R + head of the group.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/params.h"

namespace flashcore::extend {

constexpr int kMaxBatch = 1024;  // a thread of the schedule per row
constexpr int kMaxChunks = 1024;
constexpr int kMaxGathers = 1024;         // a thread of the schedule per segment
constexpr int kMaxGatherSlots = 1 << 20;  // times kMaxGathers: no sum of wishes overflows
constexpr int kMaxWarpgroups = 3;

// q_rows of a tile, 64 for each consumer warpgroup: d 64 has registers for three, whose softmax hides one another's.
// A converter takes the threads of one of them. `e4m3`: what the kernel reads is converted tile by tile.
constexpr int tile_rows(int64_t head_dim, bool e4m3) { return head_dim == 64 && !e4m3 ? 192 : 128; }
// KV tokens of a tile.
constexpr int tile_tokens(int64_t head_dim) { return head_dim == 256 ? 64 : 128; }

// Consecutive positions that q_rows of one tile read, through `entry` of the page table. 32 bytes.
struct Piece {
  int entry;       // of the page that holds position `begin`
  int begin;       // first position
  int tokens;      // 0: nothing is seen
  int from, full;  // tokens [from, full) are seen by every q_row of the tile
  int rows;        // q_rows of the tile that read it: first | end << 16
  int gathered;    // 1 + where `begin` lies in the gathered K and V; 0: they are read in the pool
  int loaded;      // tokens that are there to be loaded, those that no q_row sees too; behind them zeros are put
};

// A segment whose K and V are first copied to consecutive slots: so many q_rows read it, in runs so short; or all
// segments are, of an e4m3 cache, as values of q's dtype. 16 bytes.
struct alignas(16) Gather {
  int entry;   // of the page that holds position `begin`
  int begin;   // first position
  int tokens;  // behind them come zeros, up to a whole tile
  int slot;    // first, of the gathered K and V
};

// One tile of q_rows for one KV head, or a chunk of its KV tiles. 64 bytes.
struct alignas(16) Item {
  int q_row, q_rows;  // first, 1 .. tile_rows
  int kv_head;
  int first_tile, num_tiles;  // of the KV tiles of all pieces; in shared memory the first is q_begin (extend_tiles.cuh)
  int partial;                // slot of the tile's first chunk; -1: one chunk, which goes to out
  int chunk;                  // chunk | chunks << 16
  int more;                   // pieces after the first: first of them in Workspace::pieces
  Piece first;
};
static_assert(sizeof(Piece) == 32 && sizeof(Item) == 64);

// What a packed token may see. 16 bytes.
struct alignas(16) Token {
  int index;       // in q and out
  int begin, end;  // positions
  int mask;        // element of the custom mask that stands for position 0; -1: none
};

struct Header {
  int items;
  int taken, finished;  // counters of the kernel, 0 between launches
  int overflow;         // 1: there was no room for all items; wrong tables or capacities
  int gathers, gathered_slots;
  int converted;  // 1: all of an e4m3 cache is gathered, for the kernel of q's dtype; 0: the cache's own kernel serves
  // Who takes one of the `pairs` items from `paired` on goes on with the item `pairs` behind it, if there is one, and
  // then ends. These are nobody else's.
  int paired, pairs;
  int pad[7];
};

// Offsets in bytes into the workspace. All 256-aligned.
struct WorkspaceLayout {
  size_t header, tokens, tiles, items, pieces, gathers, counters, partial_lse2, partial_out, bytes;
  int tile_capacity, item_capacity, piece_capacity, partial_capacity;
};

// `max_tokens`: query tokens. `partial_capacity`: chunks of split tiles, each tile_rows x D fp32.
inline WorkspaceLayout workspace_layout(int64_t max_rows, int64_t max_tokens, int heads, int kv_heads, int head_dim,
                                        bool e4m3, int partial_capacity) {
  WorkspaceLayout w{};
  const int64_t ratio = heads / kv_heads;
  const int64_t rows = tile_rows(head_dim, e4m3), tiles = (max_tokens * ratio + rows - 1) / rows + max_rows;
  const int64_t partial_rows = tile_rows(head_dim, false);  // the larger one
  w.tile_capacity = static_cast<int>(tiles);
  w.item_capacity = static_cast<int>(tiles * kv_heads + partial_capacity);
  w.piece_capacity = static_cast<int>(4 * max_rows + 4 * (max_tokens * ratio / rows));
  w.partial_capacity = partial_capacity;
  size_t at = 0;
  auto take = [&](size_t bytes) {
    size_t here = at;
    at = align_up(at + bytes);
    return here;
  };
  w.header = take(sizeof(Header));
  w.tokens = take(sizeof(Token) * max_tokens);
  w.tiles = take(sizeof(Item) * w.tile_capacity);
  w.items = take(sizeof(Item) * w.item_capacity);
  w.pieces = take(sizeof(Piece) * w.piece_capacity);
  w.gathers = take(sizeof(Gather) * kMaxGathers);
  w.counters = take(sizeof(int) * kMaxWarpgroups * partial_capacity);
  w.partial_lse2 = take(sizeof(float) * partial_rows * partial_capacity);
  w.partial_out = take(sizeof(float) * partial_rows * head_dim * partial_capacity);
  w.bytes = at;
  return w;
}

struct Workspace {
  Header* header;
  Token* tokens;    // [max_tokens] in packed order
  Item* tiles;      // [tile_capacity] scratch of the schedule
  Item* items;      // [item_capacity] in the order in which they are to start
  Piece* pieces;    // [piece_capacity]
  Gather* gathers;  // [kMaxGathers] one behind the other in the gathered slots
  int* counters;    // [partial, kMaxWarpgroups] chunks of a tile that are done, by warpgroup; at the tile's first chunk
  float* partial_lse2;  // [partial, tile_rows]
  float* partial_out;   // [partial, tile_rows, D]
  int tile_capacity, item_capacity, piece_capacity, partial_capacity;
};

inline Workspace bind_workspace(const WorkspaceLayout& w, void* base) {
  char* p = static_cast<char*>(base);
  return {reinterpret_cast<Header*>(p + w.header),
          reinterpret_cast<Token*>(p + w.tokens),
          reinterpret_cast<Item*>(p + w.tiles),
          reinterpret_cast<Item*>(p + w.items),
          reinterpret_cast<Piece*>(p + w.pieces),
          reinterpret_cast<Gather*>(p + w.gathers),
          reinterpret_cast<int*>(p + w.counters),
          reinterpret_cast<float*>(p + w.partial_lse2),
          reinterpret_cast<float*>(p + w.partial_out),
          w.tile_capacity,
          w.item_capacity,
          w.piece_capacity,
          w.partial_capacity};
}

enum class Visible : int {
  kCausal,  // a query sees the positions up to its own
  kAll,     // all positions of its row
  kMasked,  // the cached prefix, and of the new tokens those that the custom mask has
};

struct ScheduleParams {
  LayoutView layout;  // page_indptr holds entries of `table`, as the device pager writes them
  Workspace work;
  const void* seq_lens;  // [B] int32 or int64
  const void* q_lens;    // [B] int32 or int64
  bool seq_lens_are_64bit, q_lens_are_64bit;
  int num_tokens;          // T: what q has
  int table_stride;        // the most entries of a row of the page table
  const int* row_entries;  // [B] where each row begins in the page table; nullptr: row x table_stride
  Visible visible;
  int window_left;   // positions seen before the query's own; -1: all. Causal only
  const int* table;  // page ids
  int table_entries;
  int gather_slots;  // that there is room for; 0: nothing is gathered
  // A segment is gathered from so many q_rows on, if its runs are shorter than 8 tokens, or than kGatherRun.
  int gather_rows_scattered, gather_rows_boxed;
  // Of an e4m3 cache all is gathered and converted, or nothing: if so many q_rows read a token of it. 0: another cache.
  int gather_rows_converted;
  int kv_heads, ratio, ctas, tile_tokens, head_dim;
  int tile_rows, converted_tile_rows;
};

// Strides in elements.
struct Params {
  const void* q;  // [T, H, D]
  void* out;      // [T, H, D]
  const void* k;  // [slots, G, D]
  const void* v;
  void* gathered;  // K, then V: [gather_slots, G, D] each; nullptr: nothing is gathered
  int gather_slots;
  const int* table;            // page ids
  const float* sinks;          // [H] natural log, or nullptr
  const uint8_t* custom_mask;  // [sum q_len * seq_len] 0: hidden; or nullptr
  Workspace work;
  int64_t q_row_stride, out_row_stride;
  uint32_t kv_slot_units, kv_head_units;   // strides of k and v in 16 bytes
  int64_t kv_slot_stride, kv_head_stride;  // the same in elements
  int64_t mask_size;
  int heads, kv_heads, ratio, page_shift, num_slots, table_entries;
  bool windowed;
  bool converted;  // k and v are what was gathered of an e4m3 cache; the header says whether this launch serves
  float scale_log2, logit_cap, cap_scale_log2;  // as in DecodeParams
  CacheScales cache;
  uint32_t ratio_inverse;  // 2^32 / ratio, rounded up; 0 for 1
  int boxed_tokens;        // T if an item's q may come as one box, else 0
};

void launch_schedule(const ScheduleParams&, cudaStream_t);
// `head_units`: 16-byte units of a KV head's row. `e4m3`: of the cache, which is converted to q's dtype.
void launch_gather(const Params&, int head_units, bool e4m3, int ctas, cudaStream_t);
// One instantiation per file: extend_<dtype of what the kernel reads>_d<D>.cu
template <typename Cache, int kHeadDim>
void launch(const Params&, int ctas, cudaStream_t);

}  // namespace flashcore::extend
