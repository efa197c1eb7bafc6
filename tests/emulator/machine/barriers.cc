// Exchanges in a warp, named barriers, mbarriers.
#include <cstring>

#include "machine/fiber.h"
#include "machine/machine.h"

namespace emulator {
namespace {

// All of the warp's lanes that are still there have come.
bool complete(Warp& warp, Exchange& x) {
  if (x.arrived == 0 || (x.arrived | warp.done) != ~0u) return false;
  x.arrived = 0;
  ++machine.clock;
  return true;
}

void finish_exchange(Warp& warp, Exchange& x) {
  const uint32_t arrived = x.arrived;
  if (!complete(warp, x)) return;
  for (int lane = 0; lane < 32; ++lane) {
    Thread& t = warp.cta->threads[warp.index * 32 + lane];
    if ((arrived >> lane & 1) && &t != machine.current) set_state(t, State::kReady);
  }
}

void finish_barrier(NamedBarrier& b, int wanted) {
  if (b.arrived < wanted) return;
  b.result = b.votes;
  b.arrived = b.votes = b.threads = 0;
  wake(b.waiting);
}

NamedBarrier& come_to(int barrier, int threads) {
  if (barrier < 0 || barrier > 15) fail("barrier " + std::to_string(barrier) + ": want 0 .. 15");
  if (threads <= 0 || threads % 32 != 0) fail("barrier of " + std::to_string(threads) + " threads: want whole warps");
  NamedBarrier& b = self().cta->barriers[barrier];
  if (b.threads != 0 && b.threads != threads)
    fail("barrier " + std::to_string(barrier) + ": others have come to it for " + std::to_string(b.threads) +
         " threads, this one for " + std::to_string(threads));
  b.threads = threads;
  ++b.arrived;
  return b;
}

Mbarrier& find(Cta& cta, uint32_t bar) {
  const auto found = cta.mbarriers.find(bar);
  if (found == cta.mbarriers.end()) fail("no mbarrier was made at " + std::to_string(bar));
  return found->second;
}

void end_phase(Mbarrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.missing = b.count;
  wake(b.waiting);
}

}  // namespace

const Lanes& exchange(const char* what, unsigned mask, uint64_t value) {
  if (mask != ~0u) fail(std::string(what) + ": want all lanes; others are not emulated");
  Thread& t = self();
  Exchange& x = t.warp->exchanges[t.exchanges++ & 1];
  if (x.arrived == 0) {
    x.what = what;
    std::memset(&x.lanes, 0, sizeof x.lanes);
  } else if (std::strcmp(x.what, what) != 0) {
    fail(std::string("the warp is divided: this lane is at ") + what + ", others are at " + x.what);
  }
  const int lane = t.index % 32;
  x.arrived |= 1u << lane;
  x.lanes.values[lane] = value;
  if ((x.arrived | t.warp->done) == ~0u) {
    finish_exchange(*t.warp, x);
    emulator_switch(&t.stack, machine.stack);  // goes on with the others, as a warp's lanes do on the device
  } else {
    wait_for(what, 0);
  }
  return x.lanes;
}

int sync_cta(bool vote) {
  Cta& cta = *self().cta;
  NamedBarrier& b = cta.barriers[0];
  ++b.arrived;
  b.votes += vote;
  if (b.arrived + cta.done == static_cast<int>(cta.threads.size())) {
    finish_barrier(b, b.arrived);
  } else {
    b.waiting.push_back(&self());
    wait_for("__syncthreads", 0);
  }
  return b.result;
}

void barrier_sync(int barrier, int threads) {
  NamedBarrier& b = come_to(barrier, threads);
  if (b.arrived == threads) {
    finish_barrier(b, threads);
  } else {
    b.waiting.push_back(&self());
    wait_for("named barrier", static_cast<uint32_t>(barrier));
  }
}

void barrier_arrive(int barrier, int threads) {
  finish_barrier(come_to(barrier, threads), threads);
  step_aside();
}

void leave_barriers(Cta& cta) {
  ++cta.done;
  ++machine.clock;
  for (Exchange& x : self().warp->exchanges) finish_exchange(*self().warp, x);
  NamedBarrier& b = cta.barriers[0];
  if (b.arrived > 0 && b.threads == 0 && b.arrived + cta.done == static_cast<int>(cta.threads.size()))
    finish_barrier(b, b.arrived);
}

// ---- mbarriers ----
void mbarrier_init(uint32_t bar, uint32_t count) {
  shared_pointer(bar, 8, 8);
  if (count == 0) fail("an mbarrier of no arrivals");
  Mbarrier& b = self().cta->mbarriers[bar];
  if (!b.waiting.empty()) fail("an mbarrier is made anew while threads wait for it");
  b = {.count = count, .missing = count, .bytes = 0, .phase = 0, .waiting = {}};
}

void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) { find(*self().cta, bar).bytes += bytes; }

void arrive_at(Cta& cta, uint32_t bar, uint32_t count) {
  Mbarrier& b = find(cta, bar);
  if (count > b.missing)
    fail("mbarrier at " + std::to_string(bar) + ": " + std::to_string(count) + " arrivals, of which " +
         std::to_string(b.missing) + " are missing in this phase");
  b.missing -= count;
  end_phase(b);
}

void complete_tx(Cta& cta, uint32_t bar, uint32_t bytes) {
  Mbarrier& b = find(cta, bar);
  b.bytes -= bytes;
  end_phase(b);
}

void mbarrier_arrive(uint32_t bar, uint32_t count) {
  arrive_at(*self().cta, bar, count);
  step_aside();
}

bool mbarrier_test(uint32_t bar, uint32_t parity) {
  step_aside();
  return find(*self().cta, bar).phase != (parity & 1);
}

// Its time may run out at any moment, for some lanes of a warp and not for others.
bool mbarrier_try_wait(uint32_t bar, uint32_t parity) { return mbarrier_test(bar, parity) && !machine.chance(1); }

void mbarrier_wait(uint32_t bar, uint32_t parity) {
  Mbarrier& b = find(*self().cta, bar);
  while (b.phase == (parity & 1)) {
    b.waiting.push_back(&self());
    wait_for("mbarrier", bar | (parity & 1));
  }
}

}  // namespace emulator
