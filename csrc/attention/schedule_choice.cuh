// How the work list is cut: tiles of a chunk for wide and for narrow items, and CTAs for the wide ones. From estimates
// of the time that each choice would take (costs: configs/schedule.json).
#pragma once
#include "attention/params.h"

namespace flashcore {

enum List { kWide, kNarrow };

// Chunks to choose from, for each list: those with which a CTA would work on 1 .. kCandidates items during the step.
// Which is best depends on how the chunks of all segments fill the CTAs' rounds, so all are tried.
constexpr int kCandidates = 8;
enum Quantity { kItems, kLarge, kSlots, kItemCost, kLongest, kQuantities };  // of a trial; per KV head
using Trials = unsigned[kQuantities][2 * kCandidates];  // lanes 0 .. 7 of a warp: wide list, the next 8: narrow list

// A tile of K and V that several row tiles read comes from the L2; one that is read once waits for the memory, and
// takes longer by about a quarter. In quarters.
constexpr int kWideCost = 4;
__device__ __forceinline__ int wide_cost(int row_tiles) { return row_tiles == 1 ? kWideCost + 1 : kWideCost; }

// What an item of `q_rows` costs beside its tiles grows with the q_rows whose results it stores. In 32nds of a small
// one.
__device__ __forceinline__ int narrow_item_cost(int q_rows) { return 32 + q_rows; }

// What bounds the step, in ns: a CTA's work on wide and on narrow tiles (all CTAs together), the memory.
struct Bounds {
  float wide, narrow, memory, ctas;

  __device__ __forceinline__ float step() const { return fmaxf(memory, __fdividef(wide + narrow, ctas)); }
};

// Tiles of a chunk, of the lane's candidate.
__device__ __forceinline__ int candidate_of_lane(const ScheduleParams& p, float step) {
  const int lane = threadIdx.x % (2 * kCandidates);
  const bool wide = lane < kCandidates;
  const float item = wide ? p.cost.wide_item_ns : p.cost.narrow_item_ns,
              tile = wide ? p.cost.wide_ns : p.cost.narrow_ns;
  const float of_item = __fdividef(step, static_cast<float>(lane % kCandidates + 1)) - item;
  return max(2, static_cast<int>(fminf(__fdividef(of_item, tile), 1e6f)));
}

struct WideChoice {
  int candidate, ctas;
};

// Wide items take long, so the step is best when whole rounds of them end just before it does: a CTA that comes to the
// other list then finds short items, which fill what is left evenly. Every lane of a warp estimates two pairs of
// (candidate, rounds).
__device__ __forceinline__ WideChoice choose_wide(const ScheduleParams& p, const Trials& trials, const Bounds& bounds) {
  const int lane = threadIdx.x % 32, c = lane % kCandidates;
  const float items = trials[kItems][c] * p.kv_heads, large = trials[kLarge][c] * p.kv_heads;
  const float item =
      __fdividef(trials[kLongest][c] * static_cast<float>(p.cost.wide_ns), kWideCost) + p.cost.wide_item_ns;
  const float work = bounds.wide + items * p.cost.wide_item_ns;
  const float most = bounds.narrow > 0.f ? bounds.ctas - 1.f : bounds.ctas;
  float best = 1e30f, best_ctas = most;
#pragma unroll 1
  for (int rounds = lane / kCandidates + 1; rounds <= kCandidates; rounds += 32 / kCandidates) {
    const float wanted =
        ceilf(fmaxf(__fdividef(work, item * rounds), __fdividef(large, static_cast<float>(rounds))) - 0.01f);
    const float ctas = fminf(fmaxf(wanted, 1.f), most);
    const float end =
        fmaxf(fmaxf(static_cast<float>(rounds), ceilf(__fdividef(large, ctas) - 0.01f)) * item, __fdividef(work, ctas));
    // Until `end` the other CTAs do narrow items, as fast as they or the memory can; then all do.
    float total = end + __fdividef(work, bounds.ctas) * 0.1f;  // of equally good choices that with the fewest items
    if (bounds.narrow > 0.f) {
      const float rest = fmaxf(__fdividef(bounds.narrow, bounds.ctas), bounds.memory);
      const float done =
          end * fminf(__fdividef(bounds.ctas - ctas, bounds.narrow), __fdividef(1.f, fmaxf(bounds.memory, 1.f)));
      total += fmaxf(1.f - done, 0.f) * rest;
    }
    if (total < best) best = total, best_ctas = ctas;
  }
  const unsigned bits = __float_as_uint(best);  // in the order of the estimates, which are not negative
  const int chosen = __ffs(__ballot_sync(~0u, bits == __reduce_min_sync(~0u, bits))) - 1;
  return {chosen % kCandidates, static_cast<int>(__shfl_sync(~0u, best_ctas, chosen))};
}

// With equal items the last round counts, else half an item is lost at the end. `load`: tiles of a CTA.
__device__ __forceinline__ int choose_narrow(const ScheduleParams& p, const Trials& trials, float load, float ctas) {
  const int lane = kCandidates + threadIdx.x % kCandidates;
  const float per_cta = __fdividef(static_cast<float>(p.kv_heads), ctas);
  const float items = trials[kItems][lane] * per_cta, longest = trials[kLongest][lane];
  const float tail =
      trials[kLarge][lane] == trials[kItems][lane] ? fmaxf(ceilf(items) * longest - load, 0.f) : 0.5f * longest;
  const float item = __fdividef(static_cast<float>(p.cost.narrow_item_ns), 32.f * p.cost.narrow_ns);
  const unsigned bits = __float_as_uint(load + tail + trials[kItemCost][lane] * per_cta * item);
  return (__ffs(__ballot_sync(~0u, bits == __reduce_min_sync(~0u, bits))) - 1) % kCandidates;
}

}  // namespace flashcore
