// Merge of partial results: for rows with more than one piece (segment x chunk), per head,
//
//   M = max lse2_i,  w_i = exp2(lse2_i - M),  out = sum w_i O_i / (sum w_i + exp2(sink * log2(e) - M))
//
// in the order of row_segments, so that two runs agree bitwise. Rows of length 0 get zeros; rows with one piece were
// written by decode. One warp per (row, head), four heads per CTA. Bound by the latency of two dependent loads. Also
// resets the work-list counters for the next layer.
#include "attention/launch.h"
#include "attention/params.h"
#include "common/ptx.cuh"

namespace flashcore {
namespace {

constexpr int kHeadsPerCta = 4;
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }

// Pieces of a row in merge order. Lane i holds segment `batch * 32 + i` of the row: what it takes to find its pieces
// needs only the schedule's results, so it is loaded while decode still runs.
struct Pieces {
  int first_slot, step, end;  // slot of the segment's first chunk, distance of its chunks, pieces of the row up to here
};

__device__ __forceinline__ Pieces load_pieces(const MergeParams& p, int position, int segment_begin, int segment_end,
                                              int before, int lane) {
  Pieces r{0, 0, 0};
  int chunks = 0;
  if (segment_begin + lane < segment_end) {
    const int segment = min(max(p.layout.row_segments[segment_begin + lane], 0), p.layout.segment_capacity - 1);
    const SegmentInfo info = p.work.segments[segment];
    r.first_slot = info.partial + position - info.row_begin;
    r.step = info.rows;
    chunks = info.rows > 0
                 ? min(info.chunks, max(p.work.partial_capacity - r.first_slot + info.rows - 1, 0) / info.rows)
                 : 0;
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, chunks, i);
    if (lane >= i) chunks += other;
  }
  r.end = before + chunks;
  return r;
}

// The partial slot of piece `piece` (one per lane), -1 where there is none.
__device__ __forceinline__ int slot_of(const Pieces& pieces, int piece, int before, int segments) {
  int slot = -1, begin = before;
  for (int i = 0; i < segments; ++i) {
    const int end = __shfl_sync(~0u, pieces.end, i), first = __shfl_sync(~0u, pieces.first_slot, i),
              step = __shfl_sync(~0u, pieces.step, i);
    if (piece >= begin && piece < end) slot = first + (piece - begin) * step;
    begin = end;
  }
  return slot;
}

// Running result of a (row, head); kPer values of out per lane, two by two.
template <int kPer>
struct Sum {
  float out[kPer], total, best;
};

// Adds up to 32 pieces, one per lane's `slot`, in order.
template <int kPer>
__device__ __forceinline__ void add_pieces(const MergeParams& p, Sum<kPer>& sum, int slot, int count, int head,
                                           int lane) {
  const float lse2 = slot >= 0 ? __ldcg(p.work.partial_lse2 + static_cast<int64_t>(slot) * p.heads + head) : -INFINITY;
  float best = lse2;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
  best = fmaxf(best, sum.best);
  const float rescale = sum.best == best ? 1.f : ptx::exp2_approx(sum.best - best);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum.out[i] *= rescale;
  sum.total *= rescale;
  sum.best = best;
  const float weight = slot >= 0 ? ptx::exp2_approx(lse2 - best) : 0.f;
#pragma unroll 8
  for (int c = 0; c < count; ++c) {
    const float w = __shfl_sync(~0u, weight, c);
    const int from = max(__shfl_sync(~0u, slot, c), 0);
    const float2* src = reinterpret_cast<const float2*>(p.work.partial_out +
                                                        (static_cast<int64_t>(from) * p.heads + head) * p.head_dim) +
                        lane;
    sum.total += w;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      const float2 x = __ldcg(src + i * 16);
      sum.out[i] = fmaf(w, x.x, sum.out[i]);
      sum.out[i + 1] = fmaf(w, x.y, sum.out[i + 1]);
    }
  }
}

template <typename T, int kPer>
__global__ void __launch_bounds__(kHeadsPerCta * 32) merge_kernel(const __grid_constant__ MergeParams p) {
  // decode lets this grid start after it has itself waited for the schedule, whose results may thus be read at once.
  const int row = blockIdx.x, lane = threadIdx.x % 32, head = blockIdx.y * kHeadsPerCta + threadIdx.x / 32;
  const int begin = max(p.layout.row_indptr[row], 0),
            end = min(p.layout.row_indptr[row + 1], p.layout.row_segment_capacity);
  const int position = p.work.row_positions[row];
  const bool direct = begin < end && p.work.row_tags[position] < 0;
  Pieces pieces = load_pieces(p, position, begin, end, 0, lane);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (row == 0 && blockIdx.y == 0 && threadIdx.x < 2) p.work.header->taken[threadIdx.x] = 0;
  if (head >= p.heads || direct) return;

  Sum<kPer> sum{};
  sum.best = -INFINITY;
  int before = 0;
  for (int e = begin; e < end; e += 32) {
    const int segments = min(32, end - e), last = __shfl_sync(~0u, pieces.end, 31);
    for (int first = before; first < last; first += 32) {
      add_pieces<kPer>(p, sum, slot_of(pieces, first + lane, before, segments), min(32, last - first), head, lane);
    }
    before = last;
    if (e + 32 < end) pieces = load_pieces(p, position, e + 32, end, before, lane);
  }
  if (p.sinks != nullptr && begin < end) sum.total += ptx::exp2_approx(p.sinks[head] * kLog2e - sum.best);
  const float inverse = sum.total > 0.f ? 1.f / sum.total : 0.f;
  T* out = static_cast<T*>(p.out) + row * p.out_row_stride + head * p.head_dim;
#pragma unroll
  for (int i = 0; i < kPer; ++i) store(out + (i / 2) * 64 + lane * 2 + (i & 1), sum.out[i] * inverse);
}

template <typename T>
void launch(const MergeParams& p, cudaStream_t stream) {
  const dim3 grid(p.layout.batch, (p.heads + kHeadsPerCta - 1) / kHeadsPerCta), block(kHeadsPerCta * 32);
  if (p.head_dim == 64) launch_dependent(merge_kernel<T, 2>, grid, block, 0, stream, p);
  if (p.head_dim == 128) launch_dependent(merge_kernel<T, 4>, grid, block, 0, stream, p);
  if (p.head_dim == 256) launch_dependent(merge_kernel<T, 8>, grid, block, 0, stream, p);
}

}  // namespace

void launch_merge(DType dtype, const MergeParams& p, cudaStream_t stream) {
  dtype == DType::kBf16 ? launch<__nv_bfloat16>(p, stream) : launch<__half>(p, stream);
}

}  // namespace flashcore
