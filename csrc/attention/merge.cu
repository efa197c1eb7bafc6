// Merge of partial results: for rows with more than one piece, per head,
//
//   M = max lse2_i,  w_i = exp2(lse2_i - M),  out = sum w_i O_i / (sum w_i + exp2(sink * log2(e) - M))
//
// in an order fixed by the numbers of pieces and of rows, so that two runs agree bitwise. Rows without tokens get
// zeros; rows with one piece were written by decode. Bound by the latency of its loads: so where rows are few, and a
// row may have many pieces, several warps share those of a (row, head). Also resets the work-list counters for the next
// layer.
#include <algorithm>
#include <type_traits>

#include "attention/launch.h"
#include "attention/params.h"
#include "common/pack.cuh"
#include "common/ptx.cuh"

namespace flashcore {
namespace {

constexpr int kBlock = 8;  // pieces that a warp asks for at a time
// Of a CTA whose warps share a (row, head) in groups of kSplit.
template <int kSplit>
constexpr int kWarps = std::max(kSplit, 4);
constexpr float kLog2e = 1.4426950408889634f;

// kWords words of 32 bits, read and written as one.
template <int kWords>
using Vector = std::conditional_t<kWords == 1, uint32_t, std::conditional_t<kWords == 2, uint2, uint4>>;

// Running result of a (row, head); kPer neighbouring values of out per lane.
template <int kPer>
struct Sum {
  float out[kPer], total, best;
};

// What sums relative to `from` are to be multiplied with to be relative to `to`, which is no less. Both may be -inf.
__device__ __forceinline__ float rescale_of(float from, float to) {
  return from == to ? 1.f : ptx::exp2_approx(from - to);
}

// Adds up to 32 pieces from `slot` on, in order. The first outputs are asked for beside the weights, which take two
// loads' time otherwise.
template <int kPer>
__device__ __forceinline__ void add_pieces(const MergeParams& p, Sum<kPer>& sum, int slot, int count, int head,
                                           int lane) {
  using Words = Vector<kPer / 2>;
  const int64_t at = static_cast<int64_t>(slot) * p.heads + head;
  float2 piece = make_float2(-INFINITY, 0.f);  // lse2, unit
  if (lane < count) piece = __ldcg(reinterpret_cast<const float2*>(p.work.partial_heads + at + lane * p.heads));
  const Words* src = reinterpret_cast<const Words*>(p.work.partial_out + at * p.head_dim) + lane;
  Words words[kBlock];
  auto load = [&](int first) {
#pragma unroll
    for (int c = 0; c < kBlock; ++c) {
      if (first + c < count) words[c] = __ldcg(src + (first + c) * p.heads * 32);
    }
  };
  load(0);
  float best = piece.x;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
  best = fmaxf(best, sum.best);
  const float rescale = rescale_of(sum.best, best);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum.out[i] *= rescale;
  sum.total *= rescale;
  sum.best = best;
  const float weight = lane < count ? ptx::exp2_approx(piece.x - best) : 0.f;
  for (int first = 0; first < count; first += kBlock) {
    if (first > 0) load(first);
#pragma unroll
    for (int c = 0; c < kBlock; ++c) {
      if (first + c >= count) break;
      sum.total += __shfl_sync(~0u, weight, first + c);
      const float w = __shfl_sync(~0u, weight * piece.y, first + c);
#pragma unroll
      for (int i = 0; i < kPer; i += 2) {
        const float2 x = __half22float2(reinterpret_cast<const __half2*>(&words[c])[i / 2]);
        sum.out[i] = fmaf(w, x.x, sum.out[i]);
        sum.out[i + 1] = fmaf(w, x.y, sum.out[i + 1]);
      }
    }
  }
}

// Results of the warps that share a (row, head).
template <int kPer, int kSplit>
struct Parts {
  float2 heads[kWarps<kSplit>];  // best, total
  alignas(16) float out[kWarps<kSplit>][32][kPer];

  __device__ __forceinline__ void put(const Sum<kPer>& sum, int warp, int lane) {
    if (lane == 0) heads[warp] = make_float2(sum.best, sum.total);
#pragma unroll
    for (int i = 0; i < kPer; ++i) out[warp][lane][i] = sum.out[i];
  }
  // Of the warps from `warp` on.
  __device__ __forceinline__ Sum<kPer> all(int warp, int lane) const {
    Sum<kPer> sum{};
    sum.best = -INFINITY;
#pragma unroll
    for (int w = 0; w < kSplit; ++w) sum.best = fmaxf(sum.best, heads[warp + w].x);
#pragma unroll
    for (int w = 0; w < kSplit; ++w) {
      const float2 head = heads[warp + w];
      const float rescale = rescale_of(head.x, sum.best);
      sum.total = fmaf(rescale, head.y, sum.total);
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum.out[i] = fmaf(rescale, out[warp + w][lane][i], sum.out[i]);
    }
    return sum;
  }
};

// kSplit warps for each (row, head).
template <typename T, int kPer, int kSplit>
__global__ void __launch_bounds__(kWarps<kSplit> * 32) merge_kernel(const __grid_constant__ MergeParams p) {
  constexpr int kHeads = kWarps<kSplit> / kSplit;  // of a CTA
  // decode lets this grid start after it has itself waited for the schedule, whose results may thus be read at once.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % kSplit;
  const int head = blockIdx.y * kHeads + warp / kSplit;
  // Before the wait, so not from the L1: only the L2 has what the schedule wrote, before decode began.
  const int4 words = __ldcg(reinterpret_cast<const int4*>(p.work.rows) + blockIdx.x);
  const RowInfo info = {words.x, words.y, words.z, words.w};
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < 2) p.work.header->taken[threadIdx.x] = 0;
  if (info.pieces == 1) return;  // fewer than 0 pieces: zeros, too

  Sum<kPer> sum{};
  sum.best = -INFINITY;
  const bool shared = kSplit > 1 && info.pieces > kBlock;
  const int begin = shared ? info.pieces * part / kSplit : 0,
            end = shared ? info.pieces * (part + 1) / kSplit : info.pieces;
  if (head < p.heads && (shared || part == 0)) {
    for (int first = begin; first < end; first += 32)
      add_pieces<kPer>(p, sum, info.slot + first, min(32, end - first), head, lane);
  }
  if constexpr (kSplit > 1) {
    if (shared) {
      extern __shared__ __align__(16) char raw[];
      auto& parts = *reinterpret_cast<Parts<kPer, kSplit>*>(raw);
      parts.put(sum, warp, lane);
      __syncthreads();
      if (part == 0) sum = parts.all(warp, lane);
    }
  }
  if (head >= p.heads || part > 0) return;
  if (p.sinks != nullptr && info.pieces > 0) sum.total += ptx::exp2_approx(p.sinks[head] * kLog2e - sum.best);
  const float inverse = sum.total > 0.f ? 1.f / sum.total : 0.f;
  T* out = static_cast<T*>(p.out) + info.row * p.out_row_stride + head * p.head_dim;
  alignas(16) uint32_t rounded[kPer / 2];
#pragma unroll
  for (int i = 0; i < kPer; i += 2)
    rounded[i / 2] = pack(sum.out[i] * inverse, sum.out[i + 1] * inverse, static_cast<T*>(nullptr));
  reinterpret_cast<Vector<kPer / 2>*>(out)[lane] = *reinterpret_cast<const Vector<kPer / 2>*>(rounded);
}

template <typename T, int kPer, int kSplit>
void launch(const MergeParams& p, cudaStream_t stream) {
  constexpr int kHeads = kWarps<kSplit> / kSplit, kSmemBytes = kSplit > 1 ? sizeof(Parts<kPer, kSplit>) : 0;
  const dim3 grid(p.batch, (p.heads + kHeads - 1) / kHeads), block(kWarps<kSplit> * 32);
  launch_dependent(merge_kernel<T, kPer, kSplit>, grid, block, kSmemBytes, stream, p);
}

// As many warps for a (row, head) as the card holds at a time.
template <typename T, int kPer>
void launch(const MergeParams& p, cudaStream_t stream) {
  constexpr int kResident = 132 * 32;  // warps, about, by registers
  const int rows = p.batch * p.heads;
  if (rows * 8 <= kResident) {
    launch<T, kPer, 8>(p, stream);
  } else if (rows * 2 <= kResident) {
    launch<T, kPer, 2>(p, stream);
  } else {
    launch<T, kPer, 1>(p, stream);
  }
}

template <typename T>
void launch(const MergeParams& p, cudaStream_t stream) {
  if (p.head_dim == 64) launch<T, 2>(p, stream);
  if (p.head_dim == 128) launch<T, 4>(p, stream);
  if (p.head_dim == 256) launch<T, 8>(p, stream);
}

}  // namespace

void launch_merge(DType dtype, const MergeParams& p, cudaStream_t stream) {
  dtype == DType::kBf16 ? launch<__nv_bfloat16>(p, stream) : launch<__half>(p, stream);
}

}  // namespace flashcore
