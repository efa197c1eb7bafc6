// Softmax of a tile between its two products. While the special-function unit works on the first row of a thread, the
// maximum of the second is found; while it works on the second, the first is added up. An addition right behind its
// exponential would wait for it: 11 cycles an exponential, where the unit gives one in 8.
#pragma once
#include "attention/products.cuh"

namespace flashcore::extend {

// x, which is not to be had before `y`: so the compiler places what is made of x behind what makes y.
__device__ __forceinline__ float after(float y, float x) { return fmaxf(x, fminf(y, ptx::opaque(-INFINITY))); }

template <class C>
struct Softmax {
  static constexpr int kTile = C::kTile, kScores = kTile / 4;  // of a row
  static constexpr int kGate = 4;                              // exponentials before what is done meanwhile
  float alpha[2];                                              // what the rows' old outputs are to be multiplied with
  bool grew[2];                                                // whether that is anything but 1

  template <int kRow>
  static __device__ __forceinline__ float& at(float (&scores)[kTile / 2], int i) {
    return scores[i / 2 * 4 + kRow * 2 + i % 2];
  }

  // The maximum that a row's probabilities are relative to, scaled.
  template <int kRow, class Scales>
  __device__ __forceinline__ float choose_shift(const Scales& p, float (&scores)[kTile / 2],
                                                decode::Accumulators<C>& acc, float begin) {
    float part[4] = {begin, begin, begin, begin};  // four chains: one alone waits for itself
#pragma unroll
    for (int i = 0; i < kScores; ++i) part[i % 4] = fmaxf(part[i % 4], at<kRow>(scores, i));
    float best = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    grew[kRow] = (best - acc.max[kRow]) * p.scale_log2 > decode::kSlackLog2;  // not if both are -inf
    alpha[kRow] = grew[kRow] ? ptx::exp2_approx((acc.max[kRow] - best) * p.scale_log2) : 1.f;
    acc.max[kRow] = grew[kRow] ? best : acc.max[kRow];
    acc.sum[kRow] *= alpha[kRow];
    return (acc.max[kRow] == -INFINITY ? 0.f : acc.max[kRow]) * p.scale_log2;  // prevents (-inf) - (-inf)
  }

  template <int kRow, class Scales>
  static __device__ __forceinline__ void exponentiate(const Scales& p, float (&scores)[kTile / 2], float shift) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      float& x = at<kRow>(scores, i);
      x = ptx::exp2_approx_in_place(fmaf(x, p.scale_log2, -shift));  // not behind the wait for the product
    }
  }

  template <int kRow>
  static __device__ __forceinline__ float sum(float (&scores)[kTile / 2], float begin, float zero) {
    float part[4] = {begin, zero, zero, zero};
#pragma unroll
    for (int i = 0; i < kScores; ++i) part[i % 4] += at<kRow>(scores, i);
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // Scores, of which some or all may be -inf, to probabilities in place, and rounded. `look` is called on the way,
  // `settle` before the first probability is rounded: the product that reads the old ones must be over.
  template <class Scales, class Look, class Settle>
  __device__ __forceinline__ void operator()(const Scales& p, float (&scores)[kTile / 2],
                                             uint32_t (&probs)[kTile / 16][4], decode::Accumulators<C>& acc, Look look,
                                             Settle settle) {
    __syncwarp();  // says so to the compiler, which else prepares every exchange for a divided warp
    exponentiate<0>(p, scores, choose_shift<0>(p, scores, acc, acc.max[0]));
    const float shift = choose_shift<1>(p, scores, acc, after(at<0>(scores, kGate), acc.max[1]));
    look();
    exponentiate<1>(p, scores, shift);
    const float here = at<1>(scores, kGate);
    acc.sum[0] = sum<0>(scores, after(here, acc.sum[0]), after(here, 0.f));
    settle(__any_sync(~0u, grew[0] || grew[1]));
    decode::round_probs<C, kTile>(probs, scores);
    acc.sum[1] = sum<1>(scores, acc.sum[1], 0.f);
  }
};

}  // namespace flashcore::extend
