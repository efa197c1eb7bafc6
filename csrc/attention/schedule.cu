// Work list of one decode step, from the CSR layout; once per step for all layers, sizes read on the device.
//
// Segments of at most 64 q_rows are narrow (memory-bound: one pass over their tokens), others wide (compute-bound: row
// tiles of 128 q_rows). Segments are cut into chunks of about equal cost, so that every CTA gets one to four items;
// costly classes come first. An item stands for all KV heads: decode takes (entry, kv_head) with the head running
// fastest, so that the heads of a token, neighbours in memory, and the row tiles of a chunk are read at about the same
// time.
//
// How the card is shared: with W = time of the wide items on one CTA, N = time of the narrow ones when bandwidth is no
// limit, M = time the card needs to load all tokens once, the step takes about T = max(M, (W + N) / CTAs). Chunks of
// the wide items and CTAs for them are chosen so that whole rounds of them take no longer (schedule_choice.cuh).
//
// Pieces and partial slots: see RowInfo. Rows begin at position 0, and segments are sorted by (first row, first
// position): parents before children, and what is before a segment is read by all of its rows or by none. So the pieces
// that the rows of a segment have before it are those of all segments before it, less those of segments whose rows end
// before its first row; and the pieces of a row are those of all segments whose rows have begun, less those of segments
// whose rows have ended.
//
// Grid: one CTA of 1024 threads. Its time is that of code coming cold from memory and of a chain of barriers, whatever
// the batch: so the code is kept short, with loops that are not unrolled. Order of everything is fixed by scans and
// integer sums, so the list is the same in every run.
#include "attention/launch.h"
#include "attention/params.h"
#include "attention/schedule_choice.cuh"
#include "common/block_scan.cuh"
#include "common/ptx.cuh"

namespace flashcore {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kUnsplitShift = 24, kUnsplit = 1 << kUnsplitShift;  // tiles: more than a segment has
using u64 = unsigned long long;

struct Shape {                               // of a segment
  int row_begin, rows, token, tokens, page;  // token: where it begins in its first page
  int tiles, row_tiles;
  bool wide;
};

struct Cut {
  int chunks, chunk_tiles;
};

struct Targets {  // tiles a chunk is to have
  int wide, narrow;
  __device__ __forceinline__ int of(const Shape& s) const { return s.wide ? wide : narrow; }
};

struct Shared {
  int4 shapes[kMaxSegments];  // row_begin and rows, token, tokens, page
  Cut cuts[kMaxSegments];
  int row[kMaxBatch];
  int begun[kMaxBatch], ended[kMaxBatch + 1];  // pieces of the segments whose rows begin, end there
  WorkItem first[2][kMaxCtas];                 // items of each list
  Trials trials[2];
  int large[2];  // ScheduleHeader::large
  unsigned sums[6][kWarps];
  u64 scratch64[4][kWarps];
  int scratch[kWarps];
};
static_assert(kMaxBatch < 1 << 15);

// a and b below 2^24, b > 0: exact. Shorter than the division of integers.
__device__ __forceinline__ int ceil_div(int a, int b) {
  const int q = static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b))), rest = a - q * b;
  return q + (rest > 0) + (rest > b) - (rest <= -b);
}
__device__ __forceinline__ int floor_div(int a, int b) { return ceil_div(a + 1, b) - 1; }

__device__ __forceinline__ int4 read_shape(const ScheduleParams& p, int segment) {
  const LayoutView& l = p.layout;
  const int page = min(max(l.page_indptr[segment], 0), l.page_capacity);
  const int2 rows = reinterpret_cast<const int2*>(l.segment_rows)[segment],
             positions = reinterpret_cast<const int2*>(l.segment_positions)[segment];
  const int row_begin = min(max(rows.x, 0), l.batch - 1), begin = max(positions.x, 0);
  const int count = min(max(rows.y, row_begin), l.batch) - row_begin;
  const int token = begin - p.by_page(begin) * l.page_size;
  // Never more tokens than there are page entries, so that no item walks off them.
  const int64_t held = static_cast<int64_t>(l.page_capacity - page) * l.page_size - token;
  const int64_t wanted = static_cast<int64_t>(positions.y) - begin;
  const int tokens = count > 0 ? static_cast<int>(max(min(wanted, held), int64_t{0})) : 0;
  return make_int4(row_begin | count << 16, token, tokens, page);
}

__device__ __forceinline__ Shape segment_shape(const ScheduleParams& p, const int4& x) {
  Shape s;
  s.row_begin = x.x & 0xFFFF, s.rows = x.x >> 16, s.token = x.y, s.tokens = x.z, s.page = x.w;
  const unsigned last = s.tokens + p.cost.tile_tokens - 1;
  s.tiles = static_cast<int>(last >> (31 - __clz(p.cost.tile_tokens)));  // a power of two
  const int q_rows = s.rows * p.ratio;
  s.wide = q_rows > kNarrowRows;
  s.row_tiles = (q_rows + kWideRows - 1) / kWideRows;
  return s;
}

__device__ __forceinline__ Cut cut_segment(const Shape& s, const Targets& target) {
  const int want = target.of(s);
  if (s.tiles <= want) return {s.tiles > 0, max(s.tiles, 1)};
  const int chunk_tiles = ceil_div(s.tiles, ceil_div(s.tiles, want));
  return {ceil_div(s.tiles, chunk_tiles), chunk_tiles};
}

// Cost class of the items of a segment: 0 the costliest. Four per list, in 16-bit fields of one word.
__device__ __forceinline__ int class_shift(const Shape& s, const Cut& c, const Targets& target) {
  const int tiles = 16 * c.chunk_tiles, want = 3 * target.of(s);
  return 16 * ((tiles < 4 * want) + (tiles < 2 * want) + (tiles < want));
}

// Over the CTA, in every thread: sums of the first kSums, maxima of the rest. One barrier.
template <int kSums, int kCount>
__device__ __forceinline__ void reduce_over_threads(unsigned (&x)[kCount], unsigned (*scratch)[kWarps]) {
  auto reduce = [](int n, unsigned y) { return n < kSums ? __reduce_add_sync(~0u, y) : __reduce_max_sync(~0u, y); };
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const unsigned of_warp = reduce(n, x[n]);
    if (threadIdx.x % 32 == 0) scratch[n][threadIdx.x / 32] = of_warp;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) x[n] = reduce(n, scratch[n][threadIdx.x % 32]);
}

// Of all segments: tiles of the lists (wide ones in kWideCost), what the memory and the CTAs take for them.
struct Total {
  unsigned narrow_tiles;
  Bounds bounds;
  Targets longest;
};

__device__ __forceinline__ Total total_of(const ScheduleParams& p, Shared& s, int segments) {
  unsigned x[6] = {};  // wide tiles, narrow tiles, tokens, narrow segments; longest wide one, longest narrow one
#pragma unroll 1
  for (int i = threadIdx.x; i < segments; i += kThreads) {
    const int4 packed = s.shapes[i] = read_shape(p, i);
    const Shape shape = segment_shape(p, packed);
    x[0] += shape.wide ? shape.tiles * shape.row_tiles * wide_cost(shape.row_tiles) : 0;
    x[1] += shape.wide ? 0 : shape.tiles;
    x[2] += shape.tokens;
    x[3] += shape.wide || shape.tiles == 0 ? 0 : 1;
    x[4] = max(x[4], shape.wide ? shape.tiles : 0);
    x[5] = max(x[5], shape.wide ? 0 : shape.tiles);
  }
  reduce_over_threads<4>(x, s.sums);
  const float heads = p.kv_heads;
  const Bounds bounds{
      heads * x[0] * p.cost.wide_ns / kWideCost,
      heads * (static_cast<float>(x[1]) * p.cost.narrow_ns + static_cast<float>(x[3]) * p.cost.narrow_item_ns),
      heads * x[2] * p.cost.hbm_ps * __fdividef(1e-3f, p.cost.tile_tokens), static_cast<float>(p.ctas)};
  return {x[1], bounds, {static_cast<int>(x[4]), static_cast<int>(x[5])}};
}

// `candidates`: of the lanes.
__device__ __forceinline__ Targets targets_of(int candidates, int wide, int narrow) {
  return {__shfl_sync(~0u, candidates, wide), __shfl_sync(~0u, candidates, kCandidates + narrow)};
}

// Adds up what the cut of every segment gives, with targets of the candidate that is this warp's.
__device__ __forceinline__ void try_targets(const ScheduleParams& p, const Shared& s, int segments,
                                            const Targets& target, const Targets& longest, Trials& trials) {
  const int warp = threadIdx.x / 32, c = warp % kCandidates;
  unsigned sums[2][kQuantities] = {};
#pragma unroll 1
  for (int i = warp / kCandidates * 32 + threadIdx.x % 32; i < segments; i += kThreads / kCandidates) {
    const Shape shape = segment_shape(p, s.shapes[i]);
    const Cut cut = cut_segment(shape, target);
    const unsigned items = cut.chunks * shape.row_tiles, slots = cut.chunks * shape.rows;
    const unsigned large = 2 * cut.chunk_tiles >= min(target.of(shape), longest.of(shape)) ? items : 0;
#pragma unroll
    for (int list = 0; list < 2; ++list) {
      if (shape.wide != (list == kWide) || cut.chunks == 0) continue;
      sums[list][kItems] += items;
      sums[list][kLarge] += large;
      sums[list][kSlots] += slots;
      sums[list][kItemCost] += cut.chunks * narrow_item_cost(shape.rows * p.ratio);
      sums[list][kLongest] =
          max(sums[list][kLongest], cut.chunk_tiles * (list == kWide ? wide_cost(shape.row_tiles) : 1));
    }
  }
#pragma unroll
  for (int list = 0; list < 2; ++list) {
#pragma unroll
    for (int n = 0; n < kQuantities; ++n) {
      const unsigned x = n == kLongest ? __reduce_max_sync(~0u, sums[list][n]) : __reduce_add_sync(~0u, sums[list][n]);
      unsigned* to = &trials[n][list * kCandidates + c];
      if (threadIdx.x % 32 == 0) n == kLongest ? atomicMax(to, x) : atomicAdd(to, x);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ bool fits(const ScheduleParams& p, const Trials& trials, int wide, int narrow) {
  return trials[kItems][wide] + trials[kItems][kCandidates + narrow] <= p.work.entry_capacity &&
         trials[kSlots][wide] + trials[kSlots][kCandidates + narrow] <= p.work.partial_capacity;
}

struct Choice {
  Targets target;
  int wide_ctas;
  bool fits, listed;  // listed: there is room for the entries
};

__device__ __forceinline__ int times_two(int target, int shift) { return min(target, kUnsplit >> shift) << shift; }

__device__ __forceinline__ Choice choose(const ScheduleParams& p, Shared& s, const Total& total, int segments) {
  const int c = threadIdx.x / 32 % kCandidates, candidates = candidate_of_lane(p, total.bounds.step());
  Targets tried = targets_of(candidates, c, c), best{};
  int wide_ctas = 0;
#pragma unroll 1
  for (int round = 0;; ++round) {
    Trials& trials = s.trials[round];
    try_targets(p, s, segments, tried, total.longest, trials);
    if (round == 0) {
      const WideChoice wide = choose_wide(p, trials, total.bounds);
      wide_ctas = total.bounds.wide > 0.f ? wide.ctas : 0;
      const float ctas = max(p.ctas - wide_ctas, 1);
      const int narrow =
          choose_narrow(p, trials, __fdividef(static_cast<float>(total.narrow_tiles) * p.kv_heads, ctas), ctas);
      best = targets_of(candidates, wide.candidate, narrow);
      if (fits(p, trials, wide.candidate, narrow)) return {best, wide_ctas, true, true};
      // Entries or partial slots would not suffice: split less, 2 .. 128 times less or not at all.
      const int shift = c + 1 < kCandidates ? c + 1 : kUnsplitShift;
      tried = {times_two(best.wide, shift), times_two(best.narrow, shift)};
    } else {
      const int lane = threadIdx.x % kCandidates;
      const uint32_t enough = __ballot_sync(~0u, fits(p, trials, lane, lane));
      const int first = __ffs(enough), shift = first != 0 && first < kCandidates ? first : kUnsplitShift;
      // Only wrong tables want more entries than there is room for when nothing is split.
      const unsigned unsplit = trials[kItems][kCandidates - 1] + trials[kItems][2 * kCandidates - 1];
      const bool listed = enough != 0 || unsplit <= static_cast<unsigned>(p.work.entry_capacity);
      return {{times_two(best.wide, shift), times_two(best.narrow, shift)}, wide_ctas, enough != 0, listed};
    }
  }
}

__device__ __forceinline__ void write_entry(const ScheduleParams& p, Shared& shared, int segment, int i, int at,
                                            int piece) {
  const Shape s = segment_shape(p, shared.shapes[segment]);
  const int chunk_tiles = shared.cuts[segment].chunk_tiles;
  const int chunk = floor_div(i, s.row_tiles), q_row = (i - chunk * s.row_tiles) * kWideRows;
  const int first = chunk * chunk_tiles * p.cost.tile_tokens;
  const int slot = s.wide ? at : p.work.entry_capacity - 1 - at;
  if (slot < 0 || slot >= p.work.entry_capacity) return;
  const int4 x = make_int4(s.row_begin, q_row, min(kWideRows, s.rows * p.ratio - q_row), s.page);
  const int4 y = make_int4(s.token + first, min(chunk_tiles * p.cost.tile_tokens, s.tokens - first), piece + chunk, 0);
  int4* to = reinterpret_cast<int4*>(p.work.items + slot);
  to[0] = x, to[1] = y;
  if (at >= kMaxCtas) return;
  to = reinterpret_cast<int4*>(&shared.first[s.wide ? kWide : kNarrow][at]);
  to[0] = x, to[1] = y;
}

// Entries of up to 32 segments, one for each lane, by the warp together. Of a lane's segment: `count` entries that
// begin at `at` of its list; the number of its first piece.
__device__ __forceinline__ void write_entries(const ScheduleParams& p, Shared& shared, int segment, int count, int at,
                                              int piece) {
  const int lane = threadIdx.x % 32;
  int end = count;
#pragma unroll 1
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, end, i);
    if (lane >= i) end += other;
  }
  const int total = __shfl_sync(~0u, end, 31);
#pragma unroll 1
  for (int e = lane; e - lane < total; e += 32) {
    int owner = 0;
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
      if (__shfl_sync(~0u, end, owner + step - 1) <= e) owner += step;
    }
    const int of = __shfl_sync(~0u, segment, owner), i = e - __shfl_sync(~0u, end - count, owner);
    const int first = __shfl_sync(~0u, at, owner), of_piece = __shfl_sync(~0u, piece, owner);
    if (e < total) write_entry(p, shared, of, i, first + i, of_piece);
  }
}

__device__ __forceinline__ int sum_fields(u64 x) {
  return static_cast<int>((x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48));
}

// The slot that an item begins at, if its first two tiles are whole and lie in one row of slots; else -1. `pages`: of
// the tokens 32 g + lane. Wrong tables may give any slot: decode looks whether it is in the pool.
__device__ __forceinline__ int run_slot(const ScheduleParams& p, const WorkItem& item,
                                        const int (&pages)[kStartTokens / 32]) {
  const int wanted = 2 * p.cost.tile_tokens;
  bool whole = item.num_tokens >= wanted;
  uint32_t first = 0;
#pragma unroll
  for (int g = 0; g < kStartTokens / 32; ++g) {
    const int t = g * 32 + threadIdx.x % 32, at = item.token + t, page = p.by_page(at);
    const uint32_t slot = static_cast<uint32_t>(pages[g]) * p.layout.page_size + (at - page * p.layout.page_size);
    if (g == 0) first = __shfl_sync(~0u, slot, 0);
    whole &= g * 32 >= wanted || (pages[g] >= 0 && slot - t == first);
  }
  return __all_sync(~0u, whole) ? static_cast<int>(first) : -1;
}

// The first item of every CTA, and the pages of its first tokens. A warp's CTAs are neighbours: most differ by the KV
// head alone.
__device__ __forceinline__ void write_starts(const ScheduleParams& p, const Shared& s, int wide_ctas, int wide_entries,
                                             int narrow_entries) {
  const int lane = threadIdx.x % 32, per_warp = (p.ctas + kWarps - 1) / kWarps;
  const int begin = threadIdx.x / 32 * per_warp, end = min(begin + per_warp, p.ctas);
  int pages[kStartTokens / 32] = {};
  int slot = -1;
#pragma unroll 1
  for (int cta = begin; cta < end; ++cta) {
    const bool wide = cta < wide_ctas;
    const int index = wide ? cta : cta - wide_ctas, entry = floor_div(index, p.kv_heads);
    WorkItem item{};
    if (entry < (wide ? wide_entries : narrow_entries)) {
      item = s.first[wide ? kWide : kNarrow][entry];
      item.kv_head = index - entry * p.kv_heads;
    }
    if (cta == begin || item.kv_head == 0) {
#pragma unroll
      for (int g = 0; g < kStartTokens / 32; ++g) {  // all loads before the first use
        const int t = g * 32 + lane, at = item.page + p.by_page(item.token + t);
        pages[g] = t < item.num_tokens ? p.layout.page_indices[min(at, p.layout.page_capacity - 1)] : 0;
      }
      slot = run_slot(p, item, pages);
    }
    if (lane == 0) p.work.starts[cta] = item, p.work.start_slots[cta] = slot;
#pragma unroll
    for (int g = 0; g < kStartTokens / 32; ++g) p.work.start_pages[cta * kStartTokens + g * 32 + lane] = pages[g];
  }
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int tid = threadIdx.x, batch = p.layout.batch;
  for (int i = tid; i < 4 * kQuantities * kCandidates; i += kThreads) (&s.trials[0][0][0])[i] = 0;
  if (tid < 2) s.large[tid] = 0;
  ptx::grid_dependency_wait();
  int segments = min(max(p.layout.sizes[0], 0), p.layout.segment_capacity);
#pragma unroll 1
  for (int i = tid; i < batch; i += kThreads) {
    s.begun[i] = s.ended[i] = 0;
    s.row[i] = min(max(p.layout.row_order[i], 0), batch - 1);
  }
  const Total total = total_of(p, s, segments);
  const Choice choice = choose(p, s, total, segments);
  const Targets& target = choice.target;
  if (!choice.listed) segments = 0;

  // Entries of a class lie in the order of the segments, classes one behind the other.
  const int per_thread = (segments + kThreads - 1) / kThreads;
  const int from = min(tid * per_thread, segments), to = min(from + per_thread, segments);
  u64 at[4] = {}, counts[4];  // wide, narrow; pieces of segments, of positions: begun, ended
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    const Shape shape = segment_shape(p, s.shapes[i]);
    const Cut c = s.cuts[i] = cut_segment(shape, target);
    const u64 count = static_cast<u64>(c.chunks * shape.row_tiles) << class_shift(shape, c, target);
    at[kWide] += shape.wide ? count : 0;
    at[kNarrow] += shape.wide ? 0 : count;
    at[2] += c.chunks;
    atomicAdd(&s.begun[shape.row_begin], c.chunks);
    atomicAdd(&s.ended[shape.row_begin + shape.rows], c.chunks);
  }
  __syncthreads();
  const int rows_per_thread = (batch + kThreads - 1) / kThreads;
  const int first_row = min(tid * rows_per_thread, batch), end_row = min(first_row + rows_per_thread, batch);
#pragma unroll 1
  for (int i = first_row; i < end_row; ++i)
    at[3] += static_cast<u64>(s.begun[i]) << 32 | static_cast<unsigned>(s.ended[i]);
  block_scan<kWarps>(at, counts, s.scratch64);
  at[kWide] += (counts[kWide] << 16) + (counts[kWide] << 32) + (counts[kWide] << 48);
  at[kNarrow] += (counts[kNarrow] << 16) + (counts[kNarrow] << 32) + (counts[kNarrow] << 48);

  // Rows: their pieces take the place of those begun there, the pieces ended before them that of those ended there.
  int slots = 0, all_slots;
#pragma unroll 1
  for (int i = first_row; i < end_row; ++i) {
    at[3] += static_cast<u64>(s.begun[i]) << 32 | static_cast<unsigned>(s.ended[i]);
    const int ended = static_cast<int>(at[3]), pieces = static_cast<int>(at[3] >> 32) - ended;
    s.begun[i] = pieces;
    s.ended[i] = ended;
    slots += pieces > 1 ? pieces : 0;
  }
  int slot = block_scan<kWarps>(slots, s.scratch, all_slots);
#pragma unroll 1
  for (int i = first_row; i < end_row; ++i) {
    const int pieces = s.begun[i], wanted = pieces > 1 ? pieces : 0;
    // Too many for the partial slots, which sound tables cannot bring about: the row gets no result.
    const bool sound = pieces >= 0 && slot >= 0 && slot <= p.work.partial_capacity - wanted;
    reinterpret_cast<int4*>(p.work.rows)[i] = make_int4(s.row[i], sound ? pieces : -1, slot, 0);
    slot += wanted;
  }

#pragma unroll 1
  for (int i = 0; i < per_thread; ++i) {
    const int segment = from + i;
    int count = 0, where = 0, piece = 0, large = 0;
    bool wide = false;
    if (segment < to) {
      const Shape shape = segment_shape(p, s.shapes[segment]);
      const Cut c = s.cuts[segment];
      const int shift = class_shift(shape, c, target);
      wide = shape.wide;
      count = c.chunks * shape.row_tiles;
      where = static_cast<int>(((shape.wide ? at[kWide] : at[kNarrow]) >> shift) & 0xFFFF);
      at[kWide] += shape.wide ? static_cast<u64>(count) << shift : 0;
      at[kNarrow] += shape.wide ? 0 : static_cast<u64>(count) << shift;
      piece = static_cast<int>(at[2]) - s.ended[shape.row_begin];
      at[2] += c.chunks;
      large = c.chunk_tiles * p.cost.tile_tokens > kSmallTokens ? where + count : 0;
    }
    write_entries(p, s, segment, count, where, piece);
#pragma unroll 1
    for (int list = 0; list < 2; ++list) {
      const int end = __reduce_max_sync(~0u, wide == (list == kWide) ? large : 0);
      if (tid % 32 == 0 && end > 0) atomicMax(&s.large[list], end);
    }
  }
  __syncthreads();
  const int wide_entries = sum_fields(counts[kWide]), narrow_entries = sum_fields(counts[kNarrow]);
  if (tid == 0) {
    ScheduleHeader& h = *p.work.header;
    h.taken[0] = h.taken[1] = 0;
    h.entries[0] = min(wide_entries, p.work.entry_capacity);
    h.entries[1] = min(narrow_entries, p.work.entry_capacity);
    h.large[kWide] = s.large[kWide];
    h.large[kNarrow] = s.large[kNarrow];
    h.wide_ctas = choice.wide_ctas;
    h.overflow = !choice.fits;
  }
  write_starts(p, s, choice.wide_ctas, wide_entries, narrow_entries);
}

}  // namespace

void launch_schedule(const ScheduleParams& p, cudaStream_t stream) {
  FC_CUDA(cudaFuncSetAttribute(schedule_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  launch_dependent(schedule_kernel, dim3(1), dim3(kThreads), sizeof(Shared), stream, p);
  launch_mark_runs(p, stream);
}

}  // namespace flashcore
