#include "machine/machine.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <stdexcept>

#include "machine/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

constexpr size_t kWindowBytes = 256 << 10;
constexpr int kLooks = 4;          // one after the other: more are polling
constexpr int kVainRounds = 1000;  // of threads that poll, while nothing else happens

std::string hex(uint64_t x) {
  char text[20];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

char* shared_of(int cta) {
  static std::vector<char*> windows;
  while (static_cast<int>(windows.size()) <= cta) {
    void* p = mmap(nullptr, kWindowBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for shared memory");
    windows.push_back(static_cast<char*>(p));
  }
  return windows[cta];
}

void enter_thread() {
  machine.kernel();
  Thread& t = self();
  set_state(t, State::kDone);
  leave_barriers(*t.cta);
  emulator_switch(&t.stack, machine.stack);
}

// `place`: among those that are resident.
std::unique_ptr<Cta> make_cta(int index, int place, const Shape& shape) {
  const unsigned threads = shape.threads;
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->shared = shared_of(place);
  cta->shared_bytes = static_cast<uint32_t>(shape.shared_bytes);
  std::memset(cta->shared, 0xFF, shape.shared_bytes);  // NaN in every format
  cta->written.resize(shape.shared_bytes / 16 + 1);
  cta->threads.resize(threads);
  cta->warps.resize((threads + 31) / 32);
  cta->warpgroups.resize((threads + 127) / 128);
  for (size_t w = 0; w < cta->warps.size(); ++w) {
    cta->warps[w].cta = cta.get();
    cta->warps[w].index = static_cast<int>(w);
    cta->warps[w].priority = machine.random();
  }
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = cta->threads[i];
    t.cta = cta.get();
    t.warp = &cta->warps[i / 32];
    t.index = static_cast<int>(i);
    t.stack = new_stack(place * static_cast<int>(threads) + static_cast<int>(i), enter_thread);
    t.warp->ready |= 1u << i % 32;
  }
  return cta;
}

}  // namespace

bool launch(const Shape& shape, const std::function<void()>& kernel) {
  if (shape.threads % 32 != 0 || shape.shared_bytes > 232448) {
    machine.error = "a launch: want whole warps and at most 232448 bytes of shared memory";
    return false;
  }
  machine.kernel = kernel;
  machine.error.clear();
  machine.random.seed(machine.settings.seed * 1000003 + machine.launches++);
  machine.patience = machine.random() % 8;
  try {
    machine.run(shape);
  } catch (const std::runtime_error& error) {  // of a copy or a product
    machine.error = error.what();
  }
  return machine.error.empty();
}

const char* last_error() { return machine.error.c_str(); }
int multiprocessors() { return machine.settings.multiprocessors; }

void Machine::run(const Shape& shape) {
  blockDim = dim3(shape.threads);
  gridDim = dim3(shape.x, shape.y);
  const unsigned grid = shape.x * shape.y;
  for (unsigned first = 0; first < grid && error.empty(); first += kResident) {
    ctas.clear();
    last_warp = nullptr;
    for (unsigned i = first; i < std::min(grid, first + kResident); ++i)
      ctas.push_back(make_cta(static_cast<int>(i), static_cast<int>(i - first), shape));
    while (error.empty() && step()) {
    }
    for (auto& cta : ctas) check_ended(*cta);
  }
}

void Machine::check_ended(const Cta& cta) {
  if (!error.empty()) return;
  bool in_flight = !cta.copies.empty();
  for (const Thread& t : cta.threads) in_flight |= !t.copies.empty();
  for (const Warpgroup& w : cta.warpgroups) in_flight |= !w.products.empty();
  if (in_flight) error = "CTA " + std::to_string(cta.index) + " has ended with copies or products in flight";
}

// One choice. False: all is over, or nothing can go on.
bool Machine::step() {
  const bool late = settings.asynchrony == Asynchrony::kLate;
  const bool now = settings.asynchrony == Asynchrony::kEarly || (!late && chance(2));
  Warp* warp = choose_warp(late);
  if ((now || warp == nullptr) && run_copy_or_product(Speed::kFast)) return true;
  if (warp == nullptr && chance(7) && run_copy_or_product(Speed::kSlow)) return true;  // copies mostly first
  if (warp != nullptr || (warp = choose_warp(true)) != nullptr) {
    run_warp(*warp);
    return true;
  }
  if (run_copy_or_product(Speed::kSlow) || run_copy_or_product(Speed::kLast)) return true;
  static uint64_t before = 0;
  static int vain = 0;
  vain = before == clock ? vain + 1 : 0;
  before = clock;
  bool any = false, over = true;
  for (auto& cta : ctas) {
    for (Thread& t : cta->threads) {
      over &= t.state == State::kDone;
      if (t.state == State::kPolling && vain < kVainRounds) {
        set_state(t, State::kReady);
        any = true;
      }
    }
  }
  if (!over && !any) error = report();
  return any;
}

bool Machine::run_copy_or_product(Speed slowest) {
  struct Choice {
    Cta* cta;
    size_t copy;
    Warpgroup* warpgroup;
  };
  static std::vector<Choice> choices;
  choices.clear();
  for (auto& cta : ctas) {
    for (size_t i = 0; i < cta->copies.size(); ++i)
      if (cta->copies[i].speed <= slowest) choices.push_back({cta.get(), i, nullptr});
    for (Warpgroup& w : cta->warpgroups)
      if (can_run(w) && (slowest > Speed::kFast || !w.slow)) choices.push_back({cta.get(), 0, &w});
  }
  if (choices.empty()) return false;
  const Choice chosen = choices[random() % choices.size()];
  ++clock;
  if (chosen.warpgroup != nullptr) {
    run_product(*chosen.cta, *chosen.warpgroup);
    chosen.warpgroup->slow = chance(1);
  } else {
    const Copy copy = chosen.cta->copies[chosen.copy];
    chosen.cta->copies.erase(chosen.cta->copies.begin() + static_cast<int64_t>(chosen.copy));
    land(*chosen.cta, copy);
  }
  return true;
}

// A slow one only if there is no other and `slow` allows it.
Warp* Machine::choose_warp(bool slow) {
  if (last_warp != nullptr && last_warp->ready && settings.order == Order::kRandom && chance(patience))
    return last_warp;
  static std::vector<Warp*> ready, others;
  ready.clear(), others.clear();
  for (auto& cta : ctas) {
    for (Warp& w : cta->warps)
      if (w.ready) (w.slow ? others : ready).push_back(&w);
  }
  if (ready.empty() && slow) ready.swap(others);
  if (ready.empty()) return nullptr;
  size_t chosen = settings.order == Order::kFirst ? 0 : ready.size() - 1;
  if (settings.order == Order::kRandom) chosen = random() % ready.size();
  if (settings.order == Order::kPriority) {
    for (size_t i = 0; i < ready.size(); ++i)
      if (ready[i]->priority > ready[chosen]->priority) chosen = i;
    if (random() % 1024 == 0) ready[chosen]->priority = random();
  }
  last_warp = ready[chosen];
  last_warp->slow = random() % 512 == 0;
  return last_warp;
}

void Machine::run_warp(Warp& warp) {
  const uint32_t lanes = warp.ready;
  const bool upwards = chance(4);
  for (int i = 0; i < 32 && error.empty(); ++i) {
    const uint32_t lane = upwards ? i : 31 - i;
    if (lanes & warp.ready & 1u << lane) resume(warp.cta->threads[warp.index * 32 + lane]);
  }
}

void Machine::resume(Thread& t) {
  current = &t;
  threadIdx = {static_cast<unsigned>(t.index), 0, 0};
  const auto block = static_cast<unsigned>(t.cta->index);
  blockIdx = {block % gridDim.x, block / gridDim.x, 0};
  emulator_switch(&stack, t.stack);
  current = nullptr;
}

std::string Machine::report() const {
  std::string text = "no thread can go on:";
  for (auto& cta : ctas) {
    for (size_t i = 0; i < cta->threads.size(); ++i) {
      const Thread& t = cta->threads[i];
      if (t.state == State::kDone) continue;
      size_t last = i;  // neighbours that wait for the same
      auto same = [&](const Thread& o) {
        return o.state == t.state && o.where == t.where && std::strcmp(o.waits_for, t.waits_for) == 0;
      };
      while (last + 1 < cta->threads.size() && same(cta->threads[last + 1])) ++last;
      text += "\n  CTA " + std::to_string(cta->index) + " threads " + std::to_string(i) + " .. " +
              std::to_string(last) + ": " + t.waits_for + " " + hex(t.where);
      if (const auto bar = cta->mbarriers.find(t.where & ~7u); bar != cta->mbarriers.end()) {
        text += ", parity " + std::to_string(t.where & 1) + " (phase " + std::to_string(bar->second.phase) + ", " +
                std::to_string(bar->second.missing) + " of " + std::to_string(bar->second.count) + " arrivals and " +
                std::to_string(bar->second.bytes) + " bytes missing)";
      }
      i = last;
    }
  }
  return text;
}

void set_state(Thread& t, State state) {
  const uint32_t lane = 1u << t.index % 32;
  t.state = state;
  t.warp->ready = (t.warp->ready & ~lane) | (state == State::kReady ? lane : 0);
  t.warp->done |= state == State::kDone ? lane : 0;
}

void wait_for(const char* what, uint32_t where) {
  Thread& t = self();
  t.waits_for = what;
  t.where = where;
  set_state(t, State::kWaiting);
  emulator_switch(&t.stack, machine.stack);
}

void wake(std::vector<Thread*>& threads) {
  for (Thread* t : threads) set_state(*t, State::kReady);
  threads.clear();
  ++machine.clock;
}

void fail(const std::string& what) {
  Thread* t = machine.current;
  machine.error = what;
  if (t == nullptr) throw std::runtime_error(what);  // in a copy or product; the loop's caller gets it
  machine.error = "CTA " + std::to_string(t->cta->index) + " thread " + std::to_string(t->index) + ": " + what;
  emulator_switch(&t->stack, machine.stack);
  __builtin_unreachable();
}

void step_aside() {
  ++machine.clock;
  self().looks = 0;
  if (machine.chance(2)) emulator_switch(&self().stack, machine.stack);
}

void let_others() {
  if (machine.chance(4)) {
    for (Warp& w : self().cta->warps) w.slow = true;
  }
  step_aside();
}

void poll() {
  Thread& t = self();
  if (++t.looks < kLooks) {
    if (machine.chance(2)) emulator_switch(&t.stack, machine.stack);
    return;
  }
  t.waits_for = "polls";
  t.where = 0;
  set_state(t, State::kPolling);
  emulator_switch(&t.stack, machine.stack);
}

}  // namespace emulator
