// Work of one extend step, from the CSR layout and the query ranges; once per step for all layers, nothing read on the
// host. Grid: one CTA of 1024 threads, a row each.
//
// 1. Rows in row_order, packed tokens, what each token sees.
// 2. Segments in short runs that many q_rows read are marked to be gathered first; of an e4m3 cache all or none.
// 3. Groups of rows under one first segment: all their q_rows in tiles one behind the other, or each row in tiles of
//    its own? The former reads a prefix once for a tile of q_rows, the latter spares rows the tokens of others. The
//    KV tiles that each takes are counted; fewer wins.
// 4. Tiles and their pieces.
// 5. Chunks, if there are too few tiles to occupy all CTAs; the number of chunks with the shortest estimated time wins.
// 6. Order. (tile, KV head) units whose K and V fit in the L2 together are neighbours, among them the longest first, so
//    that causal work ends evenly. By counting sort; the order within a bucket may differ between runs, results do not.
// 7. Tail. Units that are left over of whole rounds of the CTAs, and long, are laid end to end and cut into a range for
//    each CTA: chunks again, one of a unit or two of neighbours.
#include "attention/extend_params.h"
#include "attention/launch.h"
#include "common/block_scan.cuh"
#include "common/ptx.cuh"

namespace flashcore::extend {
namespace {

constexpr int kThreads = kMaxBatch, kWarps = kThreads / 32;
static_assert(kMaxGathers == kThreads);
constexpr int kLengths = 64, kParts = 64;  // buckets of the sort: by length, by part of the L2
constexpr int kBuckets = kLengths * kParts;
constexpr int kGatherTokens = 256;      // a shorter segment is not worth it
constexpr int kGatherRun = 64;          // mean tokens of a run; longer ones are boxes that are large enough
constexpr int64_t kL2Bytes = 16 << 20;  // K and V that stay in the L2 while they are read: each half of it keeps a copy
constexpr int kCandidates = 8, kMinChunkTiles = 4;
constexpr float kItemTiles = 1.5f, kChunkTiles = 2.f;  // what an item, and a partial result, cost besides: in KV tiles
constexpr int kTailGain = 5;                           // KV tiles that a tail has to save: more than it costs

struct Shared {
  int q_begin[kThreads + 1];  // by position in row_order: packed tokens before
  int q_first[kThreads];      // first token in q
  int seq_len[kThreads], row[kThreads];
  int leader[kThreads];          // position of the first row that shares tiles with this one
  int bundle_end[kThreads];      // by leader
  int tile_begin[kThreads + 1];  // tiles before
  int kv_begin[kThreads + 1];    // tokens of K before, each prefix once
  int packed_cost[kThreads], lone_cost[kThreads];
  int histogram[kBuckets];
  int scratch[kWarps];
  int row_first[kThreads];    // by row: first token in q
  int gathered[kMaxGathers];  // by segment, as Piece::gathered; other segments are not looked at
  bool any_gathered;
  int tile_rows;
  unsigned long long gain;  // of converting; signed
  int pieces, partials, overflow, longest, items[kCandidates], large[kCandidates], longest_chunk[kCandidates];
  unsigned long long load;
  int tail_bucket, tail_unit;  // the tail: units of later buckets, and of this one from this unit on
  int tail_count;
  int tail[kThreads], tail_begin[kThreads];  // units; KV tiles before
};

__device__ __forceinline__ int read_int(const void* p, bool is_64bit, int i) {
  const int64_t x = is_64bit ? static_cast<const int64_t*>(p)[i] : static_cast<const int*>(p)[i];
  return static_cast<int>(min(max(x, int64_t{0}), int64_t{1} << 30));
}

// The last index of array[0 .. n] whose value is at most x; array[0] is.
__device__ __forceinline__ int last_at_most(const int* array, int n, int x) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (array[middle] <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

struct Segment {
  int first, end;        // rows, by position
  int begin, end_token;  // positions
  int entry;
};

__device__ __forceinline__ Segment load_segment(const LayoutView& l, int i) {
  i = min(max(i, 0), l.segment_capacity - 1);
  Segment s;
  s.first = min(max(l.segment_rows[2 * i], 0), l.batch - 1);
  s.end = min(max(l.segment_rows[2 * i + 1], s.first), l.batch);
  s.begin = max(l.segment_positions[2 * i], 0);
  s.end_token = max(l.segment_positions[2 * i + 1], s.begin);
  s.entry = l.page_indptr[i];
  return s;
}

// Rows by position: lengths, queries, first packed token.
__device__ __forceinline__ void load_rows(const ScheduleParams& p, Shared& s) {
  const int k = threadIdx.x, batch = p.layout.batch;
  int total;
  // q holds the rows in their own order; lengths that exceed it are cut.
  const int wanted = k < batch ? min(read_int(p.q_lens, p.q_lens_are_64bit, k), p.num_tokens) : 0;
  const int first = min(block_scan<kWarps>(wanted, s.scratch, total), p.num_tokens);
  s.row_first[k] = first;
  __syncthreads();
  int row = 0, q_len = 0;
  if (k < batch) {
    row = min(max(p.layout.row_order[k], 0), batch - 1);
    q_len = min(min(read_int(p.q_lens, p.q_lens_are_64bit, row), p.num_tokens), p.num_tokens - s.row_first[row]);
    s.row[k] = row;
    s.q_first[k] = s.row_first[row];
    s.seq_len[k] = min(read_int(p.seq_lens, p.seq_lens_are_64bit, row), p.table_stride * p.layout.page_size);
  }
  const int begin = min(block_scan<kWarps>(q_len, s.scratch, total), p.num_tokens);
  s.q_begin[k] = begin;
  if (k == kThreads - 1) s.q_begin[kThreads] = min(begin + q_len, p.num_tokens);
  __syncthreads();
}

__device__ __forceinline__ int q_len_of(const Shared& s, int k) { return s.q_begin[k + 1] - s.q_begin[k]; }

// First position that token i of the row at position k does not see, and the first that it sees.
__device__ __forceinline__ int end_of(const ScheduleParams& p, const Shared& s, int k, int i) {
  return p.visible == Visible::kCausal ? max(s.seq_len[k] - q_len_of(s, k) + i + 1, 0) : s.seq_len[k];
}
__device__ __forceinline__ int begin_of(const ScheduleParams& p, const Shared& s, int k, int i) {
  return p.window_left >= 0 ? max(s.seq_len[k] - q_len_of(s, k) + i - p.window_left, 0) : 0;
}
// Below this position all tokens from the i-th on see everything.
__device__ __forceinline__ int full_of(const ScheduleParams& p, const Shared& s, int k, int i) {
  return p.visible == Visible::kMasked ? max(s.seq_len[k] - q_len_of(s, k), 0) : end_of(p, s, k, i);
}

__device__ __forceinline__ void write_tokens(const ScheduleParams& p, const Shared& s) {
  const int batch = p.layout.batch, total = s.q_begin[batch];
  for (int t = threadIdx.x; t < total; t += kThreads) {
    const int k = last_at_most(s.q_begin, batch - 1, t), i = t - s.q_begin[k];
    p.work.tokens[t] = {s.q_first[k] + i, begin_of(p, s, k, i), end_of(p, s, k, i), -1};
  }
}

// The custom mask of a row is [q_len, seq_len], row after row in their own order.
__device__ __forceinline__ void write_mask_offsets(const ScheduleParams& p, Shared& s) {
  const int k = threadIdx.x, batch = p.layout.batch;
  int total, size = 0;
  if (k < batch) {
    size = min(read_int(p.q_lens, p.q_lens_are_64bit, k), p.num_tokens) *
           min(read_int(p.seq_lens, p.seq_lens_are_64bit, k), p.table_stride * p.layout.page_size);
  }
  const int first = block_scan<kWarps>(size, s.scratch, total);
  s.row_first[k] = first;
  __syncthreads();
  const int tokens = s.q_begin[batch];
  for (int t = threadIdx.x; t < tokens; t += kThreads) {
    const int at = last_at_most(s.q_begin, batch - 1, t);
    p.work.tokens[t].mask = s.row_first[s.row[at]] + (t - s.q_begin[at]) * s.seq_len[at];
  }
  __syncthreads();
}

// Slots that a segment takes of the gathered ones; 0: it is read where it is. For one warp, which looks at 32 places of
// the page table, for its mean run.
__device__ __forceinline__ int gather_wish(const ScheduleParams& p, const Shared& s, const Segment& seg) {
  const int tokens = seg.end_token - seg.begin, q_rows = (s.q_begin[seg.end] - s.q_begin[seg.first]) * p.ratio;
  if (tokens < kGatherTokens || tokens > p.gather_slots || p.layout.page_size >= kGatherRun) return 0;
  if (q_rows < p.gather_rows_scattered) return 0;
  const int lane = threadIdx.x % 32, steps = ceil_div(tokens, p.layout.page_size) - 1;
  const int at = min(max(seg.entry + static_cast<int>(int64_t{steps} * lane / 32), 0), p.table_entries - 2);
  const int breaks = __popc(__ballot_sync(~0u, __ldg(p.table + at + 1) != __ldg(p.table + at) + 1));
  if (breaks < 2) return 0;
  const int run = p.layout.page_size * 32 / breaks;
  const bool wanted = run < 8 || (run < kGatherRun && q_rows >= p.gather_rows_boxed);
  return wanted ? ceil_div(tokens, p.tile_tokens) * p.tile_tokens : 0;
}

// The same for an e4m3 cache, whose segments are all gathered or none. Converting a token once costs as much as
// converting it for gather_rows_converted q_rows, tile by tile.
__device__ __forceinline__ int convert_wish(const ScheduleParams& p, Shared& s, const Segment& seg) {
  const int tokens = seg.end_token - seg.begin, q_rows = (s.q_begin[seg.end] - s.q_begin[seg.first]) * p.ratio;
  if (tokens > p.gather_slots) return p.gather_slots + 1;  // there is no room
  const int slots = ceil_div(tokens, p.tile_tokens) * p.tile_tokens;
  atomicAdd(&s.gain,
            static_cast<unsigned long long>(int64_t{q_rows} * tokens - int64_t{p.gather_rows_converted} * slots));
  return slots;
}

// Marks segments as gathered, in their order, as far as there is room.
__device__ __forceinline__ void choose_gathers(const ScheduleParams& p, Shared& s, bool allowed) {
  const int tid = threadIdx.x, all = min(max(p.layout.sizes[0], 0), p.layout.segment_capacity);
  const int segments = min(all, kMaxGathers);
  const bool e4m3 = p.gather_rows_converted > 0;
  Header& h = *p.work.header;
  s.gathered[tid] = 0;
  __syncthreads();
  if (tid == 0) {
    s.any_gathered = false;
    s.tile_rows = p.tile_rows;
    s.gain = 0;
    h.gathers = h.gathered_slots = h.converted = 0;
  }
  __syncthreads();
  if (!allowed || p.gather_slots == 0 || p.window_left >= 0 || (e4m3 && all > kMaxGathers)) return;
  if (e4m3) {
    if (tid < segments) s.gathered[tid] = convert_wish(p, s, load_segment(p.layout, tid));
  } else {
    for (int i = tid / 32; i < segments; i += kWarps) {
      const int wish = gather_wish(p, s, load_segment(p.layout, i));
      if (tid % 32 == 0) s.gathered[i] = wish;
    }
  }
  __syncthreads();
  const int wish = s.gathered[tid];
  int slots, count;
  const int slot = block_scan<kWarps>(wish, s.scratch, slots);
  if (e4m3) {
    const bool converts = slots > 0 && slots <= p.gather_slots && static_cast<long long>(s.gain) >= 0;
    if (!converts) {
      s.gathered[tid] = 0;
      return;
    }
    if (tid == 0) {
      s.tile_rows = p.converted_tile_rows;
      h.converted = 1;
    }
  }
  const bool taken = wish > 0 && slot + wish <= p.gather_slots;  // those that fit are the first ones
  const int at = block_scan<kWarps>(taken ? 1 : 0, s.scratch, count);
  s.gathered[tid] = taken ? slot + 1 : 0;
  if (!taken) return;
  const Segment seg = load_segment(p.layout, tid);
  p.work.gathers[at] = {seg.entry, seg.begin, seg.end_token - seg.begin, slot};
  s.any_gathered = true;
  atomicMax(&h.gathers, at + 1);
  atomicMax(&h.gathered_slots, slot + wish);
}

// Which rows share tiles, and how many tiles each bundle has. Returns all tiles.
__device__ __forceinline__ int make_bundles(const ScheduleParams& p, Shared& s, bool pack) {
  const LayoutView& l = p.layout;
  const int k = threadIdx.x, batch = l.batch, ratio = p.ratio;
  s.packed_cost[k] = s.lone_cost[k] = 0;
  int leader = k, end = k + 1, prefix = 0;
  if (k < batch) {
    const int row = s.row[k];
    if (l.row_indptr[row] < l.row_indptr[row + 1]) {
      const Segment root = load_segment(l, l.row_segments[min(max(l.row_indptr[row], 0), l.row_segment_capacity - 1)]);
      if (root.end - root.first > 1 && root.first <= k && k < root.end) {
        leader = root.first;
        end = root.end;
        prefix = min(root.end_token, s.seq_len[k]);
      }
    }
  }
  s.leader[k] = leader;
  __syncthreads();
  // K and V by the first row of a group; the others add what is their own.
  int total;
  const int own = k < batch ? s.seq_len[k] - (k == leader ? 0 : prefix) : 0;
  const int kv_begin = block_scan<kWarps>(own, s.scratch, total);
  s.kv_begin[k] = kv_begin;
  if (k == kThreads - 1) s.kv_begin[kThreads] = kv_begin + own;

  if (k < batch) {
    atomicAdd(&s.lone_cost[leader],
              ceil_div(q_len_of(s, k) * ratio, s.tile_rows) * ceil_div(s.seq_len[k], p.tile_tokens));
  }
  const int segments = min(max(l.sizes[0], 0), l.segment_capacity);
  for (int i = k; i < segments; i += kThreads) {
    const Segment seg = load_segment(l, i);
    const int g = s.leader[seg.first], base = s.q_begin[g];
    const int from = (s.q_begin[seg.first] - base) * ratio, to = (s.q_begin[seg.end] - base) * ratio;
    if (from < to)
      atomicAdd(&s.packed_cost[g],
                (ceil_div(to, s.tile_rows) - from / s.tile_rows) * ceil_div(seg.end_token - seg.begin, p.tile_tokens));
  }
  __syncthreads();
  const bool packed = pack && p.window_left < 0 && leader < end - 1 && s.packed_cost[leader] < s.lone_cost[leader];
  __syncthreads();
  if (!packed) leader = k, end = k + 1;
  s.leader[k] = leader;
  s.bundle_end[k] = min(end, batch);
  const int q_rows = k < batch && leader == k ? (s.q_begin[min(end, batch)] - s.q_begin[k]) * ratio : 0;
  const int tiles = block_scan<kWarps>(ceil_div(q_rows, s.tile_rows), s.scratch, total);
  s.tile_begin[k] = tiles;
  if (k == kThreads - 1) s.tile_begin[kThreads] = total;
  __syncthreads();
  return total;
}

__device__ __forceinline__ int gathered_slot(const Shared& s, int segment) {
  return segment >= 0 && segment < kMaxGathers ? s.gathered[segment] : 0;
}

struct TileRange {
  int q_row, q_rows;  // packed
  int first, last;    // rows, by position
};

__device__ __forceinline__ TileRange tile_range(const ScheduleParams& p, const Shared& s, int tile) {
  const int batch = p.layout.batch;
  const int leader = last_at_most(s.tile_begin, batch - 1, tile);
  TileRange r;
  r.q_row = s.q_begin[leader] * p.ratio + (tile - s.tile_begin[leader]) * s.tile_rows;
  r.q_rows = min(s.tile_rows, s.q_begin[s.bundle_end[leader]] * p.ratio - r.q_row);
  r.first = last_at_most(s.q_begin, batch - 1, r.q_row / p.ratio);
  r.last = last_at_most(s.q_begin, batch - 1, (r.q_row + r.q_rows - 1) / p.ratio);
  return r;
}

// The tokens [x, y) of the row at position k that are in the tile.
__device__ __forceinline__ int2 tokens_in(const ScheduleParams& p, const Shared& s, const TileRange& r, int k) {
  return make_int2(max(0, r.q_row / p.ratio - s.q_begin[k]),
                   min(q_len_of(s, k), (r.q_row + r.q_rows - 1) / p.ratio + 1 - s.q_begin[k]));
}

// A tile of consecutive slots is one box only if it is full. So it is filled with what comes next, where `there` tokens
// are: the rest is masked.
__device__ __forceinline__ int loaded_tokens(const ScheduleParams& p, int tokens, int there) {
  return max(tokens, min(ceil_div(tokens, p.tile_tokens) * p.tile_tokens, there));
}

// One row: its own part of the page table, up to what its last token sees.
__device__ __forceinline__ Piece lone_piece(const ScheduleParams& p, const Shared& s, const TileRange& r) {
  const int2 t = tokens_in(p, s, r, r.first);
  Piece piece{};
  piece.begin = min(begin_of(p, s, r.first, t.x), max(s.seq_len[r.first] - 1, 0));
  piece.tokens = max(min(end_of(p, s, r.first, t.y - 1), s.seq_len[r.first]) - piece.begin, 0);
  const int row = s.row[r.first];
  piece.entry = (p.row_entries ? p.row_entries[row] : row * p.table_stride) + piece.begin / p.layout.page_size;
  piece.from = p.window_left >= 0 ? begin_of(p, s, r.first, t.y - 1) - piece.begin : 0;
  piece.full = min(max(full_of(p, s, r.first, t.x) - piece.begin, 0), piece.tokens);
  piece.rows = r.q_rows << 16;
  piece.loaded = loaded_tokens(p, piece.tokens, s.seq_len[r.first] - piece.begin);
  return piece;
}

// Whether a row's pieces are to be its segments, because one of them lies elsewhere.
__device__ __forceinline__ bool has_gathered(const ScheduleParams& p, const Shared& s, int k) {
  if (!s.any_gathered) return false;
  const LayoutView& l = p.layout;
  const int row = s.row[k], end = min(l.row_indptr[row + 1], l.row_segment_capacity);
  for (int e = max(l.row_indptr[row], 0); e < end; ++e) {
    if (gathered_slot(s, l.row_segments[e]) > 0) return true;
  }
  return false;
}

// Calls visit(piece) for the pieces of a tile as segments: each once, for those of its rows that are in the tile.
template <class Visit>
__device__ __forceinline__ void visit_pieces(const ScheduleParams& p, const Shared& s, const TileRange& r,
                                             Visit visit) {
  const LayoutView& l = p.layout;
  for (int k = r.first; k <= r.last; ++k) {
    const int row = s.row[k];
    const int begin = max(l.row_indptr[row], 0), end = min(l.row_indptr[row + 1], l.row_segment_capacity);
    for (int e = begin; e < end; ++e) {
      const Segment seg = load_segment(l, l.row_segments[e]);
      if (max(seg.first, r.first) != k) continue;
      const int last = min(seg.end - 1, r.last);
      int most = 0, least = seg.end_token;
      for (int m = k; m <= last; ++m) {
        const int2 t = tokens_in(p, s, r, m);
        if (t.x >= t.y) continue;
        most = max(most, end_of(p, s, m, t.y - 1));
        least = min(least, full_of(p, s, m, t.x));
      }
      Piece piece{};
      piece.entry = seg.entry;
      piece.begin = seg.begin;
      piece.tokens = min(seg.end_token, most) - seg.begin;
      if (piece.tokens <= 0) continue;
      const int from = max(s.q_begin[k] * p.ratio - r.q_row, 0);
      const int to = min(s.q_begin[last + 1] * p.ratio - r.q_row, r.q_rows);
      piece.full = from == 0 && to == r.q_rows ? min(max(least - seg.begin, 0), piece.tokens) : 0;
      piece.rows = from | to << 16;
      piece.gathered = gathered_slot(s, l.row_segments[e]);
      piece.loaded = loaded_tokens(p, piece.tokens, seg.end_token - seg.begin);
      visit(piece);
    }
  }
}

__device__ __forceinline__ int kv_tiles(const ScheduleParams& p, const Piece& piece) {
  return max(1, ceil_div(piece.tokens, p.tile_tokens));
}

// Items that stand for whole tiles, for no KV head yet, in work.tiles.
__device__ __forceinline__ void make_tiles(const ScheduleParams& p, Shared& s, int tiles) {
  for (int j = threadIdx.x; j < tiles; j += kThreads) {
    const TileRange r = tile_range(p, s, j);
    Item item{};
    item.q_row = r.q_row;
    item.q_rows = r.q_rows;
    item.partial = -1;
    item.kv_head = r.first;  // until the items are written: the first row
    if (r.first == r.last && !has_gathered(p, s, r.first)) {
      item.first = lone_piece(p, s, r);
      item.num_tiles = kv_tiles(p, item.first);
    } else {
      int pieces = 0;
      visit_pieces(p, s, r, [&](const Piece& piece) {
        if (pieces++ == 0) item.first = piece;
        item.num_tiles += kv_tiles(p, piece);
      });
      item.num_tiles = max(item.num_tiles, 1);
      if (pieces > 1) {
        item.more = atomicAdd(&s.pieces, pieces - 1);
        if (item.more + pieces - 1 > p.work.piece_capacity) {
          s.overflow = 1;
        } else {
          int i = -1;
          visit_pieces(p, s, r, [&](const Piece& piece) {
            if (i >= 0) p.work.pieces[item.more + i] = piece;
            ++i;
          });
        }
      }
    }
    p.work.tiles[j] = item;
    atomicMax(&s.longest, item.num_tiles);
    atomicAdd(&s.load, static_cast<unsigned long long>(item.num_tiles));
  }
  __syncthreads();
}

// KV tiles of a chunk at most, by candidate; 0 does not split.
__device__ __forceinline__ int candidate(float per_cta, int i) {
  return i == 0 ? 1 << 28 : max(kMinChunkTiles, static_cast<int>(ceilf(fminf(per_cta, 1e6f) * 1.25f / i)));
}

__device__ __forceinline__ int chunks_of(const Item& item, int most) {
  const int chunks = min(ceil_div(item.num_tiles, most), kMaxChunks);
  const int per_chunk = ceil_div(item.num_tiles, chunks);
  return ceil_div(item.num_tiles, per_chunk);  // none is empty
}

// The most KV tiles of a chunk. A candidate's time: rounds of its long items, or the load of a CTA if that is more, and
// what items and partial results cost.
__device__ __forceinline__ int choose_chunk(const ScheduleParams& p, Shared& s, int tiles) {
  const int tid = threadIdx.x, heads = p.kv_heads;
  const float per_cta = static_cast<float>(s.load) * heads / p.ctas;
  if (static_cast<int64_t>(tiles) * heads >= 4 * p.ctas && s.longest <= per_cta) return 1 << 28;
  for (int c = 0; c < kCandidates; ++c) {
    const int most = candidate(per_cta, c), longest = min(s.longest, most);
    for (int j = tid; j < tiles; j += kThreads) {
      const Item& item = p.work.tiles[j];
      const int chunks = chunks_of(item, most), size = ceil_div(item.num_tiles, chunks);
      atomicAdd(&s.items[c], chunks);
      if (2 * size >= longest) atomicAdd(&s.large[c], chunks);
      atomicMax(&s.longest_chunk[c], size);
    }
  }
  __syncthreads();
  float best = 1e30f;
  int most = 1 << 28;
  for (int c = 0; c < kCandidates; ++c) {
    const int partials = c == 0 ? 0 : s.items[c];
    if (static_cast<int64_t>(partials) * heads > p.work.partial_capacity) continue;
    const float rounds = ceilf(static_cast<float>(s.large[c]) * heads / p.ctas);
    const float cost = fmaxf(rounds * s.longest_chunk[c], per_cta) +
                       static_cast<float>(s.items[c]) * heads / p.ctas * kItemTiles +
                       (c > 0 && s.items[c] > tiles ? kChunkTiles + 0.1f * s.items[c] / tiles : 0.f);
    if (cost < best) {
      best = cost;
      most = candidate(per_cta, c);
    }
  }
  return most;
}

// Bucket of a (tile, KV head): by part of the L2, then longest first.
__device__ __forceinline__ int bucket_of(const ScheduleParams& p, const Shared& s, const Item& item, int head, int size,
                                         int longest, int64_t part) {
  const int k = s.leader[item.kv_head], end = s.bundle_end[k];
  const int64_t begin = s.kv_begin[k], tokens = s.kv_begin[end] - begin;
  const int64_t wanted = (begin * p.kv_heads + tokens * head) / part;  // lengths out of range may make it negative
  const int at = static_cast<int>(min(max(wanted, int64_t{0}), int64_t{kParts - 1}));
  return at * kLengths + kLengths - 1 - static_cast<int>(int64_t{size} * (kLengths - 1) / longest);
}

__device__ __forceinline__ void write_item(const ScheduleParams& p, const Item& item, int at) {
  if (at >= p.work.item_capacity) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) reinterpret_cast<int4*>(p.work.items + at)[i] = reinterpret_cast<const int4*>(&item)[i];
}

__device__ __forceinline__ void clear_counters(const ScheduleParams& p, int partial) {
  for (int w = 0; w < kMaxWarpgroups; ++w) p.work.counters[kMaxWarpgroups * partial + w] = 0;
}

__device__ __forceinline__ bool in_tail(const Shared& s, int bucket, int unit) {
  return bucket > s.tail_bucket || (bucket == s.tail_bucket && unit >= s.tail_unit);
}

// Units left over of whole rounds of the CTAs.
struct Tail {
  int whole, count;  // units before it, units of it
  int range;         // KV tiles that a CTA takes of it; 0: it is not cut
};

// Finds the units of a tail: which those are must not depend on the order within a bucket, as results depend on where
// they are cut. `bucket_of_unit` is the sort's, whose histogram holds the units before each bucket. False: they are
// short.
template <class BucketOf>
__device__ __forceinline__ bool find_tail(Shared& s, int units, int whole, BucketOf bucket_of_unit) {
  const int tid = threadIdx.x, bucket = last_at_most(s.histogram, kBuckets - 1, whole);
  int left = (bucket + 1 < kBuckets ? s.histogram[bucket + 1] : units) - whole;  // of this bucket's units
  __syncthreads();  // all have read the histogram before it changes
  if ((kLengths - bucket % kLengths) * s.longest <= kTailGain * (kLengths - 1)) return false;
  if (tid == 0) s.tail_bucket = bucket;
  for (int end = units; left > 0; end -= kThreads) {  // from behind
    const int unit = end - 1 - tid;
    const bool here = unit >= 0 && bucket_of_unit(unit) == bucket;
    int found;
    if (block_scan<kWarps>(here ? 1 : 0, s.scratch, found) == left - 1 && here) s.tail_unit = unit;
    left -= found;
  }
  return true;
}

// Lists them, in their order.
template <class BucketOf>
__device__ __forceinline__ void list_tail(Shared& s, int units, int count, BucketOf bucket_of_unit) {
  const int tid = threadIdx.x;
  if (tid == 0) s.tail_count = 0;
  __syncthreads();
  for (int unit = tid; unit < units; unit += kThreads) {
    if (in_tail(s, bucket_of_unit(unit), unit)) s.tail[atomicAdd(&s.tail_count, 1)] = unit;
  }
  __syncthreads();
  const int unit = tid < count ? s.tail[tid] : 0;
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += s.tail[i] < unit ? 1 : 0;
  __syncthreads();
  if (tid < count) s.tail[rank] = unit;
  __syncthreads();
}

// KV tiles of a range of the listed units; 0: cutting them gains too little.
__device__ __forceinline__ int tail_range(const ScheduleParams& p, Shared& s, int count) {
  const int tid = threadIdx.x, size = tid < count ? p.work.tiles[s.tail[tid] / p.kv_heads].num_tiles : 0;
  int tiles;
  s.tail_begin[tid] = block_scan<kWarps>(size, s.scratch, tiles);
  const int range = max(ceil_div(tiles, p.ctas), kMinChunkTiles);
  // A shorter unit could lie in one range with both its neighbours.
  const bool even = __syncthreads_or(tid < count && size < range) == 0;
  const bool gains = __syncthreads_or(size - range >= kTailGain) != 0;
  return even && gains ? range : 0;
}

// The tail of `units` that are not cut.
template <class BucketOf>
__device__ __forceinline__ Tail choose_tail(const ScheduleParams& p, Shared& s, int units, BucketOf bucket_of_unit) {
  Tail t{units / p.ctas * p.ctas, units % p.ctas, 0};
  if (t.count == 0 || p.ctas > kThreads || t.count + p.ctas > p.work.partial_capacity) return t;
  if (!find_tail(s, units, t.whole, bucket_of_unit)) return t;
  list_tail(s, units, t.count, bucket_of_unit);
  t.range = tail_range(p, s, t.count);
  return t;
}

// The KV tiles [from, to) of the tail, of its unit i.
__device__ __forceinline__ void write_part(const ScheduleParams& p, const Shared& s, int i, int from, int to, int range,
                                           int at) {
  Item item = p.work.tiles[s.tail[i] / p.kv_heads];
  const int begin = s.tail_begin[i], first = begin / range, chunks = ceil_div(s.tail_begin[i + 1], range) - first;
  item.kv_head = s.tail[i] % p.kv_heads;
  item.first_tile = from - begin;
  item.num_tiles = to - from;
  item.chunk = (from / range - first) | chunks << 16;
  if (chunks > 1) {
    item.partial = i + first;  // units and ends of ranges before: no less than parts
    if (from == begin) clear_counters(p, item.partial);
  }
  write_item(p, item, at);
}

// Writes the tail's ranges behind the whole rounds: those with two parts first, and the second parts behind them all.
// Returns the ranges and the second parts.
__device__ __forceinline__ int2 write_tail(const ScheduleParams& p, Shared& s, const Tail& t) {
  const int r = threadIdx.x, tiles = s.tail_begin[t.count], ranges = ceil_div(tiles, t.range);
  const int from = r * t.range, to = min(from + t.range, tiles);
  const int i = r < ranges ? last_at_most(s.tail_begin, t.count - 1, from) : 0, end = s.tail_begin[i + 1];
  const bool two = r < ranges && to > end;
  int seconds;
  const int before = block_scan<kWarps>(two ? 1 : 0, s.scratch, seconds);
  const int at = t.whole + (two ? before : seconds + r - before);
  if (r < ranges) write_part(p, s, i, from, min(to, end), t.range, at);
  if (two) write_part(p, s, i + 1, end, to, t.range, at + ranges);
  return make_int2(ranges, seconds);
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  extern __shared__ __align__(16) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int tid = threadIdx.x;
  ptx::grid_dependency_wait();
  for (int i = tid; i < kBuckets; i += kThreads) s.histogram[i] = 0;
  load_rows(p, s);
  write_tokens(p, s);
  if (p.visible == Visible::kMasked) write_mask_offsets(p, s);

  int tiles = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {  // the second packs and gathers nothing and so needs no pieces
    __syncthreads();
    choose_gathers(p, s, attempt == 0);
    if (tid == 0) {
      s.pieces = s.partials = s.overflow = s.longest = 0;
      s.load = 0;
      for (int c = 0; c < kCandidates; ++c) s.items[c] = s.large[c] = s.longest_chunk[c] = 0;
    }
    tiles = min(make_bundles(p, s, attempt == 0), p.work.tile_capacity);
    make_tiles(p, s, tiles);
    if (s.overflow == 0) break;
  }
  const int most = choose_chunk(p, s, tiles), units = tiles * p.kv_heads;
  const int64_t all_kv = static_cast<int64_t>(s.kv_begin[kThreads]) * p.kv_heads;
  const int64_t part = max(kL2Bytes / (4 * p.head_dim), all_kv / kParts + 1);
  const int longest = min(s.longest, most);

  auto bucket_of_unit = [&](int u) {
    const Item& item = p.work.tiles[u / p.kv_heads];
    const int size = ceil_div(item.num_tiles, chunks_of(item, most));
    return bucket_of(p, s, item, u % p.kv_heads, size, longest, part);
  };
  for (int u = tid; u < units; u += kThreads)
    atomicAdd(&s.histogram[bucket_of_unit(u)], chunks_of(p.work.tiles[u / p.kv_heads], most));
  __syncthreads();
  constexpr int kPer = kBuckets / kThreads;
  int counts[kPer], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum += counts[i] = s.histogram[tid * kPer + i];
  int before = block_scan<kWarps>(sum, s.scratch, total);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    s.histogram[tid * kPer + i] = before;
    before += counts[i];
  }
  __syncthreads();
  const Tail tail = total == units ? choose_tail(p, s, units, bucket_of_unit) : Tail{};
  const bool cut = tail.range > 0;
  const int paired = cut ? tail.whole : total;
  const int2 parts = cut ? write_tail(p, s, tail) : make_int2(0, 0);
  for (int u = tid; u < units; u += kThreads) {
    Item item = p.work.tiles[u / p.kv_heads];
    const int bucket = bucket_of_unit(u), chunks = chunks_of(item, most), size = ceil_div(item.num_tiles, chunks);
    if (cut && in_tail(s, bucket, u)) continue;
    const int at = atomicAdd(&s.histogram[bucket], chunks);
    item.kv_head = u % p.kv_heads;
    if (chunks > 1) {
      item.partial = atomicAdd(&s.partials, chunks);
      clear_counters(p, item.partial);
    }
    const int all = item.num_tiles;
    for (int c = 0; c < chunks; ++c) {
      item.chunk = c | chunks << 16;
      item.first_tile = c * size;
      item.num_tiles = min(size, all - c * size);
      write_item(p, item, at + c);
    }
  }
  if (tid == 0) {
    Header& h = *p.work.header;
    total = paired + parts.x + parts.y;
    h.items = total;
    h.paired = paired;
    h.pairs = parts.x;
    h.taken = h.finished = 0;
    h.overflow = s.overflow || total > p.work.item_capacity;
  }
}

}  // namespace

void launch_schedule(const ScheduleParams& p, cudaStream_t stream) {
  FC_CUDA(cudaFuncSetAttribute(schedule_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  launch_dependent(schedule_kernel, dim3(1), dim3(kThreads), sizeof(Shared), stream, p);
}

}  // namespace flashcore::extend
