// Softmax of a tile between its two products. The first exponentials are issued against the old maximum, which nearly
// always stays. While the special-function unit works on the first row of a thread, the maximum of the second is found;
// while it works on the second, the first is added up. An addition right behind its exponential would wait for it: 11
// cycles an exponential, where the unit gives one in 8.
#pragma once
#include <algorithm>

#include "attention/products.cuh"

namespace flashcore::extend {

// x, which is not to be had before `y`: so the compiler places what is made of x behind what makes y.
__device__ __forceinline__ float after(float y, float x) { return fmaxf(x, fminf(y, ptx::opaque(-INFINITY))); }

template <class C>
struct Softmax {
  static constexpr int kTile = C::kTile, kScores = kTile / 4;  // of a row
  // Exponentials of the first row before its maximum is known, and those before what is done meanwhile.
  static constexpr int kEarly = C::kConverts ? 0 : 12, kGate = 4;
  static constexpr int kFirstGate = std::min(kEarly + kGate, kScores - 1);

  template <int kRow>
  static __device__ __forceinline__ float& at(float (&scores)[kTile / 2], int i) {
    return scores[i / 2 * 4 + kRow * 2 + i % 2];
  }

  // What a row's probabilities are relative to: its maximum, scaled.
  template <class Scales>
  static __device__ __forceinline__ float shift_of(const Scales& p, float max) {
    return (max == -INFINITY ? 0.f : max) * p.scale_log2;  // prevents (-inf) - (-inf)
  }

  // The maximum of `begin` and the thread's scores of a row.
  template <int kRow>
  static __device__ __forceinline__ float best_of(float (&scores)[kTile / 2], float begin) {
    float part[4] = {begin, begin, begin, begin};  // four chains: one alone waits for itself
#pragma unroll
    for (int i = 0; i < kScores; ++i) part[i % 4] = fmaxf(part[i % 4], at<kRow>(scores, i));
    return fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
  }

  // Whether `best` is so far beyond `max` that the row's maximum has to be raised; not if both are -inf.
  template <class Scales>
  static __device__ __forceinline__ bool beyond(const Scales& p, float best, float max) {
    return (best - max) * p.scale_log2 > decode::kSlackLog2;
  }

  // Raises a row's maximum, if `best` of its four threads says so. Returns what its old outputs are to be multiplied
  // with.
  template <int kRow, class Scales>
  static __device__ __forceinline__ float raise(const Scales& p, decode::Accumulators<C>& acc, float best) {
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    const bool grew = beyond(p, best, acc.max[kRow]);
    const float alpha = grew ? ptx::exp2_approx((acc.max[kRow] - best) * p.scale_log2) : 1.f;
    acc.max[kRow] = grew ? best : acc.max[kRow];
    acc.sum[kRow] *= alpha;
    return alpha;
  }

  static __device__ __forceinline__ float exponential(float x, float scale, float shift) {
    return ptx::exp2_approx_in_place(fmaf(x, scale, -shift));  // not behind the wait for the product
  }

  template <int kRow, int kFrom, class Scales>
  static __device__ __forceinline__ void exponentiate(const Scales& p, float (&scores)[kTile / 2], float shift) {
#pragma unroll
    for (int i = kFrom; i < kScores; ++i) at<kRow>(scores, i) = exponential(at<kRow>(scores, i), p.scale_log2, shift);
  }

  template <int kRow>
  static __device__ __forceinline__ float sum(float (&scores)[kTile / 2], float begin, float zero) {
    float part[4] = {begin, zero, zero, zero};
#pragma unroll
    for (int i = 0; i < kScores; ++i) part[i % 4] += at<kRow>(scores, i);
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // Scores, of which some or all may be -inf, to probabilities in place, and rounded. `look` is called on the way,
  // `settle` once the product that reads the old probabilities must be over: from there on acc.o may change.
  // A maximum is rarely raised, so a vote of the warp stands before the exchange that this takes. `settle` has its wait
  // before the second vote's branch: behind it the compiler made two of the wait, and the warps of a warpgroup waited
  // for one product at two instructions. Whether O is to be multiplied is a vote of its own: d 128 was 2 % slower with
  // the answers of the first two.
  template <class Scales, class Look, class Settle>
  __device__ __forceinline__ void operator()(const Scales& p, float (&scores)[kTile / 2],
                                             uint32_t (&probs)[kTile / 16][4], decode::Accumulators<C>& acc, Look look,
                                             Settle settle) {
    __syncwarp();  // says so to the compiler, which else prepares every exchange for a divided warp
    float alpha[2] = {1.f, 1.f}, early[kEarly + 1];
    float shift = shift_of(p, acc.max[0]);
#pragma unroll
    for (int i = 0; i < kEarly; ++i) early[i] = exponential(at<0>(scores, i), p.scale_log2, shift);
    float best = best_of<0>(scores, acc.max[0]);
    if (__any_sync(~0u, beyond(p, best, acc.max[0]))) {
      alpha[0] = raise<0>(p, acc, best);
      shift = shift_of(p, acc.max[0]);
#pragma unroll
      for (int i = 0; i < kEarly; ++i) early[i] = exponential(at<0>(scores, i), p.scale_log2, shift);
    }
#pragma unroll
    for (int i = 0; i < kEarly; ++i) at<0>(scores, i) = early[i];
    exponentiate<0, kEarly>(p, scores, shift);
    best = best_of<1>(scores, after(at<0>(scores, kFirstGate), acc.max[1]));
    look();
    settle();
    if (__any_sync(~0u, beyond(p, best, acc.max[1]))) alpha[1] = raise<1>(p, acc, best);
    if (__any_sync(~0u, alpha[0] * alpha[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 2; ++i) acc.o[i] *= alpha[(i >> 1) & 1];
    }
    exponentiate<1, 0>(p, scores, shift_of(p, acc.max[1]));
    const float here = at<1>(scores, kGate);
    acc.sum[0] = sum<0>(scores, after(here, acc.sum[0]), after(here, 0.f));
    decode::round_probs<C, kTile>(probs, scores);
    acc.sum[1] = sum<1>(scores, acc.sum[1], 0.f);
  }
};

}  // namespace flashcore::extend
