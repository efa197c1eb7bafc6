// Decode attention over the CSR layout: sizes, workspace and the params structs of its kernels (schedule.cu -> runs.cu
// -> decode.cuh -> merge.cu). Shape letters: B requests, H query heads, G KV heads, R = H / G, D head dim, P page size,
// S segments. A q_row of a segment is (row, head of the group): row = q_row / R, head = kv_head * R + q_row % R.
#pragma once
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace flashcore {

constexpr int kNarrowRows = 64;  // q_rows of one consumer warpgroup; a wide item has up to two of these
constexpr int kWideRows = 128;
constexpr int kMinEntries = 2048;
constexpr int kMaxCtas = 256;
constexpr int kSmallTokens = 256;                     // of a small item; see ScheduleHeader::large
constexpr int kStartTokens = 256;                     // whose pages are looked up for a CTA beforehand
constexpr int kMaxBatch = 4096, kMaxSegments = 4096;  // that a step can have
constexpr int kMaxPageSize = 1 << 20;
constexpr int kOwnerShift = 16;
constexpr int kRunTokens = 512;  // an item of runs has no more
constexpr int kRunShift = 20, kStepShift = 16;
constexpr int kStrides = 2;  // of tokens that lie apart, for which a loader makes tensor maps

// t / page_size = t * magic >> shift for every t of 31 bits.
struct PageDivision {
  int shift;
  uint32_t magic;
#ifdef __CUDACC__
  __device__ __forceinline__ int operator()(int t) const {
    return static_cast<int>((static_cast<uint64_t>(t) * magic) >> shift);
  }
#endif
};

// The pager's output (see the layout's documentation). Device memory, int32, not owned. For decode rows that
// share begin at position 0: a row's own head before its group would give the rows of the group different numbers of
// pieces before it. A row that shares nothing may begin anywhere, as one does whose layer has a window.
struct LayoutView {
  const int* sizes;              // [8] S, N, U, E, M
  const int* row_order;          // [B]
  const int* segment_rows;       // [S, 2] into row_order
  const int* segment_positions;  // [S, 2]
  const int* page_indptr;        // [S + 1] first entry of each segment in page_indices; the last is not used
  const int* page_indices;       // [N]
  const int* row_indptr;         // [B + 1]; only for extend
  const int* row_segments;       // [E]; only for extend
  int batch;                     // B
  int segment_capacity;
  int page_capacity;
  int row_segment_capacity;
  int page_size;  // P
};

// One (segment, row tile, chunk of its tokens), for every KV head. 32 bytes. In an item of runs (runs.cu) some fields
// say something else.
struct alignas(16) WorkItem {
  int row_begin;   // of the segment, in row_order
  int q_row;       // first q_row of the tile, within the segment
  int q_rows;      // 1 .. kWideRows; more than kNarrowRows: both consumer warpgroups
  int page;        // first entry of the segment in page_indices; of runs: the slot that the first begins at
  int token;       // first token of the chunk, counted from the start of that page; of runs: the second's first slot
  int num_tokens;  // 0 ends the list
  int piece;       // of the segment's rows: which of their pieces this chunk is; of runs, from bit kStepShift: slots
                   // from a token of the second to the next
  int kv_head;     // filled in when the item is taken, from bit kOwnerShift its warpgroups and their q phases; from bit
                   // kRunShift: one more than the first run has tokens; 0: not an item of runs
};

// A piece is one chunk of one of a row's segments. The partial results of a row lie in consecutive slots, in the order
// of row_segments; a row with one piece has none, its result goes straight to out. 16 bytes, by position in row_order.
struct alignas(16) RowInfo {
  int row;
  int pieces;  // 0: the row has no tokens; -1: there were too many
  int slot;    // partial slot of the first piece
  int pad;
};

// Beside a head's partial output, which is in 16 bits: half the bytes to write and to read again.
struct alignas(8) PartialHead {
  float lse2;  // log2 of its sum of exponentials
  float unit;  // of the output: a power of two, so that its largest value is 2^14 to 2^15 units
};

struct ScheduleHeader {
  int taken[2];    // dynamic counters: wide, narrow; merge sets them to 0 again
  int entries[2];  // work items per KV head: wide, narrow
  int wide_ctas;   // CTAs that start on the wide list
  int large[2];    // of the entries, those up to the last one that may have more than kSmallTokens tokens
  int overflow;    // 1: partial slots ran out, some rows are wrong: row_segments must be bounded by partial_capacity
  int pad[8];
};

// Offsets in bytes into the workspace. All 256-aligned.
struct WorkspaceLayout {
  size_t header, rows, starts, start_slots, start_pages, maps, items, partial_heads, partial_out, bytes;
  int entry_capacity, partial_capacity;
};

constexpr size_t align_up(size_t x, size_t a = 256) { return (x + a - 1) / a * a; }

// entry_capacity: unsplit tiles of S segments and of their rows, and room to split.
// partial_capacity: rows of partial results; the schedule splits less when they run short.
inline WorkspaceLayout workspace_layout(int batch, int segment_capacity, int heads, int kv_heads, int head_dim,
                                        int partial_capacity) {
  WorkspaceLayout w{};
  const int ratio = heads / kv_heads;
  w.partial_capacity = partial_capacity;
  w.entry_capacity =
      segment_capacity + kMinEntries + static_cast<int>((int64_t{partial_capacity} * ratio) / kNarrowRows);
  size_t at = 0;
  auto take = [&](size_t bytes) {
    size_t here = at;
    at = align_up(at + bytes);
    return here;
  };
  w.header = take(sizeof(ScheduleHeader));
  w.rows = take(sizeof(RowInfo) * batch);
  w.starts = take(sizeof(WorkItem) * kMaxCtas);
  w.start_slots = take(sizeof(int) * kMaxCtas);
  w.start_pages = take(sizeof(int) * kMaxCtas * kStartTokens);
  w.maps = take(sizeof(CUtensorMap) * kMaxCtas * 2 * kStrides);
  w.items = take(sizeof(WorkItem) * w.entry_capacity);
  w.partial_heads = take(sizeof(PartialHead) * partial_capacity * heads);
  w.partial_out = take(sizeof(__half) * partial_capacity * heads * head_dim);
  w.bytes = at;
  return w;
}

// Pointers into one workspace.
struct Workspace {
  ScheduleHeader* header;
  RowInfo* rows;      // [B] by position in row_order
  WorkItem* starts;   // [kMaxCtas] first item of each CTA; num_tokens 0: none
  int* start_slots;   // [kMaxCtas] that its first two tiles begin at, if they are whole and in one row; else -1
  int* start_pages;   // [kMaxCtas, kStartTokens] pages of its first tokens
  CUtensorMap* maps;  // [kMaxCtas, 2, kStrides] that the loaders of K and of V make
  WorkItem* items;    // [entry_capacity] wide ones from the front, narrow ones from the back
  PartialHead* partial_heads;  // [partial, H]
  __half* partial_out;         // [partial, H, D]
  int entry_capacity, partial_capacity;
};

inline Workspace bind_workspace(const WorkspaceLayout& w, void* base) {
  char* p = static_cast<char*>(base);
  return {reinterpret_cast<ScheduleHeader*>(p + w.header),
          reinterpret_cast<RowInfo*>(p + w.rows),
          reinterpret_cast<WorkItem*>(p + w.starts),
          reinterpret_cast<int*>(p + w.start_slots),
          reinterpret_cast<int*>(p + w.start_pages),
          reinterpret_cast<CUtensorMap*>(p + w.maps),
          reinterpret_cast<WorkItem*>(p + w.items),
          reinterpret_cast<PartialHead*>(p + w.partial_heads),
          reinterpret_cast<__half*>(p + w.partial_out),
          w.entry_capacity,
          w.partial_capacity};
}

// What a CTA takes for a tile of `tile_tokens` of an item of each kind, and for the item beside its tiles; what the
// card takes to load a tile. See configs/schedule.json.
struct ScheduleCosts {
  int wide_ns, wide_item_ns, narrow_ns, narrow_item_ns, hbm_ps;
  int tile_tokens;
};

struct ScheduleParams {
  LayoutView layout;
  Workspace work;
  ScheduleCosts cost;
  PageDivision by_page;
  int kv_heads, ratio, ctas;
};

// What the values of an e4m3 cache are to be multiplied with: [1] or [G] in device memory; nullptr: 1. A factor of K
// that the host knows is part of `scale`.
struct CacheScales {
  const float *k, *v;
  int k_stride, v_stride;  // 0: one for all KV heads
  float v_host;            // times `v`
  bool bf16;               // dtype of q and out, which the kernels of an e4m3 cache learn at run time
#ifdef __CUDACC__
  __device__ __forceinline__ float of_k(int kv_head) const {
    return k == nullptr ? 1.f : __ldg(k + kv_head * k_stride);
  }
  __device__ __forceinline__ float of_v(int kv_head) const {
    return v == nullptr ? v_host : v_host * __ldg(v + kv_head * v_stride);
  }
#endif
};

// Strides in elements.
struct DecodeParams {
  const void* q;  // [B, H, D]
  void* out;      // [B, H, D]
  const int* page_indices;
  const float* sinks;  // [H] natural log, or nullptr
  Workspace work;
  int64_t q_row_stride, out_row_stride;
  const void* k;  // [slots, G, D]
  const void* v;
  int64_t kv_slot_stride, kv_head_stride;  // the same for k and v
  uint32_t kv_slot_units, kv_head_units;   // the same in 16 bytes
  int batch, heads, kv_heads, ratio, num_slots, page_capacity;
  int page_size;
  uint32_t heads_per_slot;  // a slot's size in KV heads, and
  bool strided;             // whether that is exact, so that a map may count slots in them
  PageDivision by_page;
  float scale_log2;      // scale * log2(e); with a cap log2(e) alone, the cap has applied the scale
  float logit_cap;       // 0: none
  float cap_scale_log2;  // 2 * scale / logit_cap * log2(e)
  CacheScales cache;     // of an e4m3 cache
};

struct MergeParams {
  Workspace work;
  const float* sinks;
  void* out;
  int64_t out_row_stride;
  int batch, heads, head_dim;
};

enum class DType { kBf16, kFp16, kE4m3 };
struct E4m3;  // stands for the cache's element type in templates; cuda_fp8.h would double the compile time

constexpr int bytes_of(DType dtype) { return dtype == DType::kE4m3 ? 1 : 2; }

void launch_schedule(const ScheduleParams&, cudaStream_t);
void launch_mark_runs(const ScheduleParams&, cudaStream_t);
void launch_merge(DType, const MergeParams&, cudaStream_t);
// One instantiation per file: decode_<dtype of the cache>_d<D>.cu
template <typename Cache, int kHeadDim>
void launch_decode(const DecodeParams&, int ctas, cudaStream_t);

}  // namespace flashcore
