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
// Pieces and partial slots: see RowInfo. All rows of a segment have the same segments before it, so the pieces of a
// segment have the same number in each of its rows.
//
// Grid: one CTA of 1024 threads; its time is that of the chain of loads and of code coming cold from memory, whatever
// the batch. Order of everything is fixed by scans and integer sums, so the list is the same in every run.
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

// Shapes in shared memory; of segments past kCached only the tables know them, and they are read anew each time.
constexpr int kCached = 4096;

struct Shared {
  int4 shapes[kCached];
  int pieces[kCached];  // of a segment: number of its first piece
  u64 scratch64[3][kWarps];
  int scratch[2][kWarps];
};

__device__ __forceinline__ int4 read_shape(const ScheduleParams& p, int segment) {
  const LayoutView& l = p.layout;
  const int first = min(max(l.page_indptr[segment], 0), l.page_capacity);
  const int2 rows = reinterpret_cast<const int2*>(l.segment_rows)[segment],
             positions = reinterpret_cast<const int2*>(l.segment_positions)[segment];
  const int row_begin = min(max(rows.x, 0), l.batch - 1), begin = max(positions.x, 0);
  const int count = min(max(rows.y, row_begin), l.batch) - row_begin;
  // Never more tokens than there are page entries, so that no item walks off them.
  const int64_t held = static_cast<int64_t>(l.page_capacity - first) * l.page_size - begin % l.page_size;
  const int64_t wanted = static_cast<int64_t>(positions.y) - begin;
  return make_int4(row_begin, count, begin, count > 0 ? static_cast<int>(max(min(wanted, held), int64_t{0})) : 0);
}

__device__ __forceinline__ Shape segment_shape(const ScheduleParams& p, const Shared& shared, int segment) {
  const int4 x = segment < kCached ? shared.shapes[segment] : read_shape(p, segment);
  Shape s;
  s.row_begin = x.x, s.rows = x.y, s.begin = x.z, s.tokens = x.w;
  s.tiles = (s.tokens + p.cost.tile_tokens - 1) / p.cost.tile_tokens;
  const int q_rows = s.rows * p.ratio;
  s.wide = q_rows > kNarrowRows;
  s.row_tiles = (q_rows + kWideRows - 1) / kWideRows;
  return s;
}

__device__ __forceinline__ int& first_piece(const ScheduleParams& p, Shared& shared, int segment) {
  return segment < kCached ? shared.pieces[segment] : p.work.segment_pieces[segment];
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
__device__ __forceinline__ void try_candidates(const ScheduleParams& p, const Shared& shared, float wide_load,
                                               float narrow_load, int from, int to, int rounds,
                                               Trial (*trials)[kCandidates]) {
  for (int i = threadIdx.x; i < 2 * kCandidates; i += kThreads) trials[i / kCandidates][i % kCandidates] = {0, 0, 0};
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
    Shape s{};
    if (from + i < to) s = segment_shape(p, shared, from + i);
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

__device__ __forceinline__ void write_entry(const ScheduleParams& p, const Shape& s, const Cut& c, int page, int piece,
                                            int at, int i) {
  const int chunk = i / s.row_tiles, tile = i - chunk * s.row_tiles;
  const int first = chunk * c.chunk_tiles * p.cost.tile_tokens, q_row = tile * kWideRows;
  const int slot = s.wide ? at + i : p.work.entry_capacity - 1 - (at + i);
  if (slot < 0 || slot >= p.work.entry_capacity) return;
  int4* dst = reinterpret_cast<int4*>(p.work.items + slot);
  dst[0] = make_int4(s.row_begin, q_row, min(kWideRows, s.rows * p.ratio - q_row), page);
  dst[1] = make_int4(s.begin % p.layout.page_size + first, min(c.chunk_tiles * p.cost.tile_tokens, s.tokens - first),
                     piece + chunk, 0);
}

__device__ __forceinline__ int sum_fields(u64 x) {
  return static_cast<int>((x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48));
}

// Pieces and partial slots of every row; the pieces that a segment's rows have before it.
__device__ __forceinline__ void number_pieces(const ScheduleParams& p, Shared& shared, const Targets& target) {
  const LayoutView& l = p.layout;
  const int per_thread = (l.batch + kThreads - 1) / kThreads;
  const int from = min(static_cast<int>(threadIdx.x) * per_thread, l.batch), to = min(from + per_thread, l.batch);
  int slots[1] = {0}, total[1];
#pragma unroll 1
  for (int position = from; position < to; ++position) {
    const int row = min(max(l.row_order[position], 0), l.batch - 1);
    const int begin = max(l.row_indptr[row], 0), end = min(l.row_indptr[row + 1], l.row_segment_capacity);
    int pieces = 0;
    for (int e = begin; e < end; ++e) {
      const int segment = min(max(l.row_segments[e], 0), l.segment_capacity - 1);
      const Shape s = segment_shape(p, shared, segment);
      if (s.row_begin == position) first_piece(p, shared, segment) = pieces;
      pieces += cut_segment(s, target).chunks;
    }
    slots[0] += pieces > 1 ? pieces : 0;
    p.work.rows[position] = {row, pieces, 0, 0};
  }
  block_scan<kWarps>(slots, total, shared.scratch);
  int slot = slots[0];
#pragma unroll 1
  for (int position = from; position < to; ++position) {
    const int pieces = p.work.rows[position].pieces, slots_of_row = pieces > 1 ? pieces : 0;
    p.work.rows[position].slot = slot;
    // Too many for the partial slots, which sound tables cannot bring about: the row gets no result.
    if (slot > p.work.partial_capacity - slots_of_row) p.work.rows[position].pieces = -1;
    slot += slots_of_row;
  }
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  __shared__ Trial trials[2][kCandidates];
  const int tid = threadIdx.x;
  ptx::grid_dependency_wait();
  const int segments = min(max(p.layout.sizes[0], 0), p.layout.segment_capacity);
  const int per_thread = (segments + kThreads - 1) / kThreads;
  const int from = min(tid * per_thread, segments), to = min(from + per_thread, segments);

  u64 tiles[3] = {0, 0, 0};  // wide, narrow, loaded
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    if (i < kCached) shared.shapes[i] = read_shape(p, i);
    const Shape s = segment_shape(p, shared, i);
    tiles[0] += s.wide ? static_cast<u64>(s.tiles) * s.row_tiles : 0;
    tiles[1] += s.wide ? 0 : s.tiles;
    tiles[2] += s.tiles;
  }
  block_sum<kWarps>(tiles, shared.scratch64);
  const int wide_ctas = choose_wide_ctas(p, tiles[0], tiles[1], tiles[2]), narrow_ctas = p.ctas - wide_ctas;
  const float wide_load = static_cast<float>(tiles[0]) * p.kv_heads / max(wide_ctas, 1);
  const float narrow_load = static_cast<float>(tiles[1]) * p.kv_heads / max(narrow_ctas, 1);
  try_candidates(p, shared, wide_load, narrow_load, from, to, per_thread, trials);
  Targets target{best_target(trials[0], wide_load, max(wide_ctas, 1), p.kv_heads, kWideItemTiles),
                 best_target(trials[1], narrow_load, max(narrow_ctas, 1), p.kv_heads, kNarrowItemTiles)};

  // Split less where entries or partial slots would not suffice.
  int totals[2];
#pragma unroll 1
  for (int attempt = 0; attempt < 20; ++attempt) {
    totals[0] = totals[1] = 0;
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      const Shape s = segment_shape(p, shared, i);
      const Cut c = cut_segment(s, target);
      totals[0] += c.chunks * s.row_tiles;
      totals[1] += c.chunks * s.rows;
    }
    block_sum<kWarps>(totals, shared.scratch);
    if (totals[0] <= p.work.entry_capacity && totals[1] <= p.work.partial_capacity) break;
    target.wide = min(2 * target.wide, 1 << 24);
    target.narrow = min(2 * target.narrow, 1 << 24);
  }
  number_pieces(p, shared, target);

  // Entries of a class lie in the order of the segments, classes one behind the other.
  u64 at[2] = {0, 0}, counts[2];  // wide, narrow
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    const Shape s = segment_shape(p, shared, i);
    const Cut c = cut_segment(s, target);
    const u64 count = static_cast<u64>(c.chunks * s.row_tiles) << class_shift(s, c, target);
    at[0] += s.wide ? count : 0;
    at[1] += s.wide ? 0 : count;
  }
  block_scan<kWarps>(at, counts, shared.scratch64);
  at[0] += (counts[0] << 16) + (counts[0] << 32) + (counts[0] << 48);
  at[1] += (counts[1] << 16) + (counts[1] << 32) + (counts[1] << 48);

#pragma unroll 1
  for (int i = 0; i < per_thread; ++i) {
    const int segment = from + i;
    int count = 0, shift = 0;
    if (segment < to) {
      const Shape s = segment_shape(p, shared, segment);
      const Cut c = cut_segment(s, target);
      count = c.chunks * s.row_tiles;
      shift = class_shift(s, c, target);
    }
    const bool wide = count > 0 && segment_shape(p, shared, segment).wide;
    const int where = static_cast<int>(((wide ? at[0] : at[1]) >> shift) & 0xFFFF);
    at[0] += wide ? static_cast<u64>(count) << shift : 0;
    at[1] += wide ? 0 : static_cast<u64>(count) << shift;
    for (uint32_t many = __ballot_sync(~0u, count > 0); many != 0; many &= many - 1) {  // the warp together
      const int src = __ffs(many) - 1;
      const int theirs = __shfl_sync(~0u, segment, src), first = __shfl_sync(~0u, where, src),
                entries = __shfl_sync(~0u, count, src);
      const Shape s = segment_shape(p, shared, theirs);
      const Cut c = cut_segment(s, target);
      const int page = max(p.layout.page_indptr[theirs], 0), piece = first_piece(p, shared, theirs);
      for (int e = tid % 32; e < entries; e += 32) write_entry(p, s, c, page, piece, first, e);
    }
  }
  const int entries[2] = {sum_fields(counts[0]), sum_fields(counts[1])};
  if (tid == 0) {
    ScheduleHeader& h = *p.work.header;
    h.taken[0] = h.taken[1] = 0;
    h.entries[0] = entries[0];
    h.entries[1] = entries[1];
    h.wide_ctas = wide_ctas;
    h.overflow = totals[1] > p.work.partial_capacity || totals[0] > p.work.entry_capacity;
  }
  __syncthreads();
  __shared__ WorkItem starts[kMaxCtas];
  if (tid < p.ctas) {
    const bool wide = tid < wide_ctas;
    const int index = wide ? tid : tid - wide_ctas, entry = index / p.kv_heads;
    WorkItem item{};
    if (entry < min(wide ? entries[0] : entries[1], p.work.entry_capacity)) {
      item = p.work.items[wide ? entry : p.work.entry_capacity - 1 - entry];
      item.kv_head = index - entry * p.kv_heads;
    }
    p.work.starts[tid] = starts[tid] = item;
  }
  __syncthreads();
#pragma unroll 4
  for (int i = tid; i < p.ctas * kStartTokens; i += kThreads) {
    const WorkItem& item = starts[i / kStartTokens];
    const int t = i % kStartTokens;
    if (t < item.num_tokens)
      p.work.start_pages[i] =
          p.layout.page_indices[min(item.page + (item.token + t) / p.layout.page_size, p.layout.page_capacity - 1)];
  }
}

}  // namespace

void launch_schedule(const ScheduleParams& p, cudaStream_t stream) {
  FC_CUDA(cudaFuncSetAttribute(schedule_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  launch_dependent(schedule_kernel, dim3(1), dim3(kThreads), sizeof(Shared), stream, p);
}

}  // namespace flashcore
