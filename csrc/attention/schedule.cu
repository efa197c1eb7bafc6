// Work list of one decode step, from the CSR layout; once per step for all layers, sizes read on the device.
//
// Segments of at most 64 q_rows are narrow (memory-bound: one pass over their tokens), others wide (compute-bound: row
// tiles of 128 q_rows). Segments are cut into chunks of about equal cost, so that every CTA gets one to four items;
// costly classes come first. An item stands for all KV heads: decode takes (entry, kv_head) with the head running
// fastest, so that the heads of a token, neighbours in memory, and the row tiles of a chunk are read at about the same
// time.
//
// How the card is shared: with W = time of the wide items on one CTA, N = time of the narrow ones when bandwidth is no
// limit, M = time the card needs to load all tokens once, the step takes about T = max(M, (W + N) / CTAs), and W / T
// CTAs start on the wide list.
//
// Grid: one CTA of 1024 threads. 23 us with a cold L2, most of it waiting for code and tables, whatever the batch.
// Order of everything is fixed by scans and integer sums, so the list is the same in every run.
#include "attention/launch.h"
#include "attention/params.h"
#include "common/block_scan.cuh"
#include "common/ptx.cuh"

namespace flashcore {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
using u64 = unsigned long long;

struct Shape {  // of a segment
  int row_begin, rows, begin, tokens, tiles, row_tiles;
  bool wide;
};

__device__ __forceinline__ Shape segment_shape(const ScheduleParams& p, int segment) {
  Shape s;
  const LayoutView& l = p.layout;
  s.row_begin = min(max(l.segment_rows[2 * segment], 0), l.batch - 1);
  s.rows = min(max(l.segment_rows[2 * segment + 1], s.row_begin), l.batch) - s.row_begin;
  s.begin = max(l.segment_positions[2 * segment], 0);
  // Never more tokens than there are page entries, so that no item walks off them.
  const int first = min(max(l.page_indptr[segment], 0), l.page_capacity);
  const int64_t held = static_cast<int64_t>(l.page_capacity - first) * l.page_size - s.begin % l.page_size;
  const int64_t wanted = static_cast<int64_t>(l.segment_positions[2 * segment + 1]) - s.begin;
  s.tokens = s.rows > 0 ? static_cast<int>(max(min(wanted, held), int64_t{0})) : 0;
  s.tiles = (s.tokens + p.cost.tile_tokens - 1) / p.cost.tile_tokens;
  const int q_rows = s.rows * p.ratio;
  s.wide = q_rows > kNarrowRows;
  s.row_tiles = (q_rows + kWideRows - 1) / kWideRows;
  return s;
}

struct Cut {
  int chunks, chunk_tiles;
};

struct Targets {  // tiles a chunk is to have
  int wide, narrow;
  __device__ __forceinline__ int of(const Shape& s) const { return s.wide ? wide : narrow; }
};

__device__ __forceinline__ Cut cut_segment(const Shape& s, const Targets& target) {
  const int want = target.of(s);
  if (s.tiles == 0) return {0, 1};
  const int chunks = (s.tiles + want - 1) / want;
  const int chunk_tiles = (s.tiles + chunks - 1) / chunks;
  return {(s.tiles + chunk_tiles - 1) / chunk_tiles, chunk_tiles};
}

// A lone row whose only piece this is writes to out directly and needs no partial slot.
__device__ __forceinline__ int partial_rows(const ScheduleParams& p, const Shape& s, const Cut& c) {
  if (c.chunks == 0) return 0;
  if (s.rows == 1 && c.chunks == 1) {
    const int row = min(max(p.layout.row_order[s.row_begin], 0), p.layout.batch - 1);
    if (p.layout.row_indptr[row + 1] - p.layout.row_indptr[row] == 1) return 0;
  }
  return s.rows * c.chunks;
}

template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  return sum;
}

// Cost class of the items of a segment: 0 the costliest. Four per list, in 16-bit fields of one word.
__device__ __forceinline__ int class_shift(const Shape& s, const Cut& c, const Targets& target) {
  const int tiles = 16 * c.chunk_tiles, want = 3 * target.of(s);
  return 16 * ((tiles < 4 * want) + (tiles < 2 * want) + (tiles < want));
}

// Chunk targets to choose from: 1 .. kCandidates items per CTA. Which is best depends on how the chunks of all segments
// fill the CTAs' last round, so all are tried.
constexpr int kCandidates = 8;
// What an item costs beside its tiles, in tiles: start, epilogue, merge of its partial result. Measured: a wide
// item 6.5 us + 1.65 us a tile.
constexpr float kWideItemTiles = 3.f, kNarrowItemTiles = 1.f;

struct Trial {                // of one list and candidate
  int items, large, longest;  // items per KV head; those of at least half the target; tiles of the longest
};

__device__ __forceinline__ int candidate(float tiles_per_cta, int i) {
  return max(2, static_cast<int>(ceilf(fminf(tiles_per_cta / (i + 1), 1e6f))));
}

// `rounds`: segments per thread, the same for all threads, so that the warps stay together.
__device__ __forceinline__ void try_candidates(const ScheduleParams& p, float wide_load, float narrow_load, int from,
                                               int to, int rounds, Trial (*trials)[kCandidates]) {
  for (int i = threadIdx.x; i < 2 * kCandidates; i += kThreads) trials[i / kCandidates][i % kCandidates] = {0, 0, 0};
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
    Shape s{};
    if (from + i < to) s = segment_shape(p, from + i);
    if (__all_sync(~0u, s.tiles == 0)) continue;
#pragma unroll 1
    for (int c = 0; c < kCandidates; ++c) {
      const Targets target{candidate(wide_load, c), candidate(narrow_load, c)};
      const Cut cut = cut_segment(s, target);
      const int items = cut.chunks * s.row_tiles, large = 2 * cut.chunk_tiles >= target.of(s) ? items : 0;
#pragma unroll
      for (int list = 0; list < 2; ++list) {
        const bool mine = s.wide == (list == 0) && s.tiles > 0;
        const int total = __reduce_add_sync(~0u, mine ? items : 0);
        if (total == 0) continue;
        const int total_large = __reduce_add_sync(~0u, mine ? large : 0),
                  longest = __reduce_max_sync(~0u, mine ? cut.chunk_tiles : 0);
        if (threadIdx.x % 32 == 0) {
          atomicAdd(&trials[list][c].items, total);
          atomicAdd(&trials[list][c].large, total_large);
          atomicMax(&trials[list][c].longest, longest);
        }
      }
    }
  }
  __syncthreads();
}

// The candidate with the shortest last round, in tiles of one CTA.
__device__ __forceinline__ int best_target(const Trial* trials, float load, int ctas, int kv_heads, float item_tiles) {
  float best = 1e30f;
  int target = 2;
  for (int c = 0; c < kCandidates; ++c) {
    const Trial t = trials[c];
    const float rounds = ceilf(static_cast<float>(t.large) * kv_heads / ctas);
    const float cost = fmaxf(rounds * t.longest, load) + static_cast<float>(t.items) * kv_heads / ctas * item_tiles;
    if (cost < best) {
      best = cost;
      target = candidate(load, c);
    }
  }
  return target;
}

// CTAs for the wide list.
__device__ __forceinline__ int choose_wide_ctas(const ScheduleParams& p, u64 wide_tiles, u64 narrow_tiles,
                                                u64 loaded_tiles) {
  if (wide_tiles == 0) return 0;
  if (narrow_tiles == 0) return p.ctas;
  const float wide = static_cast<float>(wide_tiles) * p.kv_heads * p.cost.wide_ns,
              narrow = static_cast<float>(narrow_tiles) * p.kv_heads * p.cost.narrow_ns;
  const float memory = static_cast<float>(loaded_tiles) * p.kv_heads * p.cost.hbm_ps * 1e-3f;
  const float step = fmaxf(memory, (wide + narrow) / p.ctas);
  return min(max(static_cast<int>(wide / step + 0.5f), 1), p.ctas - 1);
}

__device__ __forceinline__ void write_entry(const ScheduleParams& p, const Shape& s, const Cut& c, int page,
                                            int partial, bool wide, int at, int i) {
  const int chunk = i / s.row_tiles, tile = i - chunk * s.row_tiles;
  const int first = chunk * c.chunk_tiles * p.cost.tile_tokens;
  WorkItem item;
  item.row_begin = s.row_begin;
  item.q_row = tile * kWideRows;
  item.q_rows = min(kWideRows, s.rows * p.ratio - item.q_row);
  item.page = page;
  item.token = s.begin % p.layout.page_size + first;
  item.num_tokens = min(c.chunk_tiles * p.cost.tile_tokens, s.tokens - first);
  item.partial = partial + chunk * s.rows;
  item.kv_head = 0;
  const int slot = wide ? at + i : p.work.entry_capacity - 1 - (at + i);
  if (slot < 0 || slot >= p.work.entry_capacity) return;
  int4* dst = reinterpret_cast<int4*>(p.work.items + slot);
  dst[0] = reinterpret_cast<const int4*>(&item)[0];
  dst[1] = reinterpret_cast<const int4*>(&item)[1];
}

__device__ __forceinline__ int sum_fields(u64 x) {
  return static_cast<int>((x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48));
}

__device__ __forceinline__ void tag_rows(const ScheduleParams& p) {
  const LayoutView& l = p.layout;
  for (int position = threadIdx.x; position < l.batch; position += kThreads) {
    const int row = min(max(l.row_order[position], 0), l.batch - 1);
    p.work.row_positions[row] = position;
    const int begin = max(l.row_indptr[row], 0), end = min(l.row_indptr[row + 1], l.row_segment_capacity);
    int pieces = 0;
    for (int e = begin; e < end && pieces < 2; ++e)
      pieces += p.work.segments[min(max(l.row_segments[e], 0), l.segment_capacity - 1)].chunks;
    p.work.row_tags[position] = row | (pieces == 1 && end - begin == 1 ? 1 << 31 : 0);
  }
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  __shared__ u64 scratch64[kWarps];
  __shared__ int scratch[kWarps];
  const int tid = threadIdx.x;
  ptx::grid_dependency_wait();
  const int segments = min(max(p.layout.sizes[0], 0), p.layout.segment_capacity);
  const int per_thread = (segments + kThreads - 1) / kThreads;
  const int from = min(tid * per_thread, segments), to = min(from + per_thread, segments);

  u64 wide_tiles = 0, narrow_tiles = 0, loaded_tiles = 0;
  for (int i = from; i < to; ++i) {
    const Shape s = segment_shape(p, i);
    (s.wide ? wide_tiles : narrow_tiles) += static_cast<u64>(s.tiles) * (s.wide ? s.row_tiles : 1);
    loaded_tiles += s.tiles;
  }
  wide_tiles = block_sum(wide_tiles, scratch64);
  narrow_tiles = block_sum(narrow_tiles, scratch64);
  loaded_tiles = block_sum(loaded_tiles, scratch64);
  __shared__ Trial trials[2][kCandidates];
  const int wide_ctas = choose_wide_ctas(p, wide_tiles, narrow_tiles, loaded_tiles), narrow_ctas = p.ctas - wide_ctas;
  const float wide_load = static_cast<float>(wide_tiles) * p.kv_heads / max(wide_ctas, 1);
  const float narrow_load = static_cast<float>(narrow_tiles) * p.kv_heads / max(narrow_ctas, 1);
  try_candidates(p, wide_load, narrow_load, from, to, per_thread, trials);
  Targets target{best_target(trials[0], wide_load, max(wide_ctas, 1), p.kv_heads, kWideItemTiles),
                 best_target(trials[1], narrow_load, max(narrow_ctas, 1), p.kv_heads, kNarrowItemTiles)};

  // Split less where entries or partial slots would not suffice.
  int entries_total = 0, partial_total = 0;
  for (int attempt = 0; attempt < 20; ++attempt) {
    int entries = 0, partials = 0;
    for (int i = from; i < to; ++i) {
      const Shape s = segment_shape(p, i);
      const Cut c = cut_segment(s, target);
      entries += c.chunks * s.row_tiles;
      partials += partial_rows(p, s, c);
    }
    entries_total = block_sum(entries, scratch);
    partial_total = block_sum(partials, scratch);
    if (entries_total <= p.work.entry_capacity && partial_total <= p.work.partial_capacity) break;
    target.wide = min(2 * target.wide, 1 << 24);
    target.narrow = min(2 * target.narrow, 1 << 24);
  }

  // Entries of a class lie in the order of the segments, classes one behind the other.
  u64 wide_counts = 0, narrow_counts = 0, wide_totals, narrow_totals;
  int partials = 0, all_partials;
  for (int i = from; i < to; ++i) {
    const Shape s = segment_shape(p, i);
    const Cut c = cut_segment(s, target);
    const u64 count = static_cast<u64>(c.chunks * s.row_tiles) << class_shift(s, c, target);
    wide_counts += s.wide ? count : 0;
    narrow_counts += s.wide ? 0 : count;
    partials += partial_rows(p, s, c);
  }
  u64 wide_at = block_scan<kWarps>(wide_counts, scratch64, wide_totals),
      narrow_at = block_scan<kWarps>(narrow_counts, scratch64, narrow_totals);
  int partial = block_scan<kWarps>(partials, scratch, all_partials);
  wide_at += (wide_totals << 16) + (wide_totals << 32) + (wide_totals << 48);
  narrow_at += (narrow_totals << 16) + (narrow_totals << 32) + (narrow_totals << 48);

  for (int i = 0; i < per_thread; ++i) {
    const int segment = from + i;
    const bool have = segment < to;
    Shape s{};
    s.row_tiles = 1;
    Cut c{0, 1};
    int where = 0, page = 0;
    const int base = partial;
    if (have) {
      s = segment_shape(p, segment);
      c = cut_segment(s, target);
      const int shift = class_shift(s, c, target);
      where = static_cast<int>(((s.wide ? wide_at : narrow_at) >> shift) & 0xFFFF);
      const u64 count = static_cast<u64>(c.chunks * s.row_tiles) << shift;
      wide_at += s.wide ? count : 0;
      narrow_at += s.wide ? 0 : count;
      page = max(p.layout.page_indptr[segment], 0);
      partial += partial_rows(p, s, c);
      p.work.segments[segment] = {c.chunks, base, s.row_begin, s.rows};
    }
    const int count = c.chunks * s.row_tiles;
    if (count <= 4) {
      for (int e = 0; e < count; ++e) write_entry(p, s, c, page, base, s.wide, where, e);
    }
    for (uint32_t many = __ballot_sync(~0u, count > 4); many != 0; many &= many - 1) {  // the warp together
      const int src = __ffs(many) - 1;
      Shape b;
      b.row_begin = __shfl_sync(~0u, s.row_begin, src);
      b.rows = __shfl_sync(~0u, s.rows, src);
      b.begin = __shfl_sync(~0u, s.begin, src);
      b.tokens = __shfl_sync(~0u, s.tokens, src);
      b.row_tiles = __shfl_sync(~0u, s.row_tiles, src);
      b.wide = __shfl_sync(~0u, static_cast<int>(s.wide), src);
      const Cut d{0, __shfl_sync(~0u, c.chunk_tiles, src)};
      const int b_page = __shfl_sync(~0u, page, src), b_base = __shfl_sync(~0u, base, src),
                b_where = __shfl_sync(~0u, where, src);
      const int b_count = __shfl_sync(~0u, count, src);
      for (int e = tid % 32; e < b_count; e += 32) write_entry(p, b, d, b_page, b_base, b.wide, b_where, e);
    }
  }
  if (tid == 0) {
    ScheduleHeader& h = *p.work.header;
    h.taken[0] = h.taken[1] = 0;
    h.entries[0] = sum_fields(wide_totals);
    h.entries[1] = sum_fields(narrow_totals);
    h.wide_ctas = wide_ctas;
    h.overflow = partial_total > p.work.partial_capacity || entries_total > p.work.entry_capacity;
  }
  __syncthreads();
  tag_rows(p);
}

}  // namespace

void launch_schedule(const ScheduleParams& p, cudaStream_t stream) {
  launch_dependent(schedule_kernel, dim3(1), dim3(kThreads), 0, stream, p);
}

}  // namespace flashcore
