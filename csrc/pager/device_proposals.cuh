// What the first round compares rows with. A physical page lies on one path of the radix cache, so rows that hold the
// same page at some entry agree before it, as a rule. So of the rows before a row, the first of those that agree with
// it on the most samples is where it leaves the tree that they make. A round that compares every row with that one
// finds the tree whatever its height, but for branches shorter than the samples lie apart. Nothing rests on the rule:
// order_rows drops proposals that do not hold.
//
// A CTA looks for its own rows only, and compares them: samples of all rows in registers, those of its own in shared
// memory. That takes 2 to 3 us, so it is done, and samples are kept, only if the last forest was deep: if a round after
// the first has found rows to agree for long enough to be told from samples, or proposals have.
#pragma once
#include "pager/device_compare.cuh"

namespace flashcore::pager {

// For rows of up to `longest` entries. At least 2, so that a sample is the first of four entries that are copied
// together.
__device__ __forceinline__ int sample_shift(int longest) {
  return max(2, 32 - __clz((max(longest, 1) - 1) / kSamples));
}

// Rows first, first + step, .. are this CTA's. Where there are fewer rows than CTAs, several share one.
struct OwnRows {
  int first, step;
  Comparers comparers;
};

__device__ __forceinline__ OwnRows own_rows(int rows) {
  const int ctas = gridDim.x, cta = blockIdx.x;
  if (rows >= ctas) return {cta, ctas, {1, 0}};
  const int each = ctas / rows, part = cta / rows;
  return {part < each ? cta % rows : rows, rows, {each, part}};
}

// Samples on which a row agrees with another one, up to the first difference.
__device__ __forceinline__ int common_samples(const int (&samples)[kSamples], const int* other) {
  unsigned differ = 0;
#pragma unroll
  for (int i = 0; i < kSamples; ++i) differ |= static_cast<unsigned>(samples[i] != other[i]) << i;
  return differ ? __ffs(differ) - 1 : kSamples;
}

__device__ __forceinline__ int count_samples(int blocks, int shift) {
  return min((blocks + (1 << shift) - 1) >> shift, kSamples);
}

// Gives this CTA's rows leaders. The first row that may share has none.
__device__ __forceinline__ void propose_leaders(const DevicePagerParams& p, OrderShared& s, int rows, int shift,
                                                const OwnRows& own) {
  static_assert(kSamples <= 32 && kPagerRows % kSamples == 0);
  constexpr int kAtOnce = kPagerRows / kSamples;
  // Small batches: a group of threads, one for each row, for each of this CTA's.
  const int width = (rows + 31) & ~31, num_own = (rows - own.first + own.step - 1) / own.step;
  const int groups = min(kPagerRows / width, num_own);
  const int thread = threadIdx.x, group = thread / width, row = thread - group * width;
  // Only rows before the last one of the group matter.
  const int last = own.first + (num_own - 1 - (num_own - 1 - group) % max(groups, 1)) * own.step;
  const int valid = group < groups && row < last ? count_samples(s.blocks[row], shift) : 0;
  int samples[kSamples];
#pragma unroll
  for (int i = 0; i < kSamples; ++i) samples[i] = i < valid ? p.samples[i * p.max_rows + row] : 0;
  for (int first = own.first; first < rows; first += kAtOnce * own.step) {
    const int staged = first + thread / kSamples * own.step;
    s.samples[thread] = staged < rows ? p.samples[thread % kSamples * p.max_rows + staged] : 0;
    if (thread < kAtOnce) s.nearest[thread] = 0;
    __syncthreads();
    for (int j = group; j < kAtOnce && group < groups; j += groups) {
      const int mine = first + j * own.step;
      if (mine >= rows) break;
      if ((row & ~31) >= mine) continue;
      unsigned near = 0;
      if (row < mine && valid > 0) {
        const int of_mine = count_samples(s.blocks[mine], shift);
        const int common = min(common_samples(samples, s.samples + j * kSamples), min(valid, of_mine));
        near = common * kPagerRows + kPagerRows - row;  // never 0
      }
      near = __reduce_max_sync(kAllLanes, near);
      if ((thread & 31) == 0) atomicMax(&s.nearest[j], near);
    }
    __syncthreads();
    const int mine = first + thread * own.step;
    if (thread < kAtOnce && mine < rows && s.blocks[mine] > 0 && s.nearest[thread] > 0) {
      const int near = s.nearest[thread] - 1, leader = kPagerRows - 1 - near % kPagerRows, common = near / kPagerRows;
      const int blocks = min(s.blocks[mine], s.blocks[leader]);
      s.leader[mine] = leader;
      s.to[mine] = common < count_samples(blocks, shift) ? (common << shift) + 1 : blocks;
      if (own.comparers.cta == 0) reinterpret_cast<int2*>(p.proposals)[mine] = make_int2(leader, s.to[mine]);
    }
    __syncthreads();
  }
}

// Which samples the next snapshot keeps.
__device__ __forceinline__ void choose_samples(PagerState& state, bool wanted, int longest) {
  const int shift = wanted ? sample_shift(longest) : 0;
  state.resample = shift != state.sample_shift;
  state.sample_shift = shift;
}

// The proposals of all CTAs, after the barrier.
__device__ __forceinline__ void load_proposals(const DevicePagerParams& p, OrderShared& s, bool has_leader, int first) {
  const int row = threadIdx.x;
  const int2 proposal = has_leader ? __ldcg(reinterpret_cast<const int2*>(p.proposals) + row) : make_int2(-1, 0);
  s.leader[row] = proposal.x;
  s.to[row] = proposal.y;
  if (has_leader && proposal.x != first) atomicOr(&s.deep, 1);
}

}  // namespace flashcore::pager
