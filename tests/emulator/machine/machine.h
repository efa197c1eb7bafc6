// A GPU on one thread of the CPU: every thread of a grid is a fiber, and kResident CTAs run at a time.
//
// A fiber runs until it waits for something. Then the machine chooses, by a seed, which warp goes on, or which of the
// asynchronous operations in flight happens. Some of each are slow: they have to wait for all others, and some copies
// until nothing else can happen. Whatever a kernel does not wait for may so happen before or after:
//   copies    overwrite their destination with NaN when they are issued, and land later (copies.cc)
//   products  read shared memory and registers when they run, in order, at any time between their issue and the wait
//             for them; until then their accumulators are NaN (products.cc)
//   barriers  barriers.cc
// If nothing can go on, the launch ends with a report of who waits for what.
#pragma once
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda.h"
#include "machine/device.h"

namespace emulator {

struct Cta;
struct Warp;

// Which warp goes on: any, those of low numbers, those of high ones, that of the highest priority, drawn for a launch.
enum class Order { kRandom, kFirst, kLast, kPriority };
enum class Asynchrony { kRandom, kEarly, kLate };

struct Settings {
  uint64_t seed = 0;
  Order order = Order::kRandom;
  Asynchrony asynchrony = Asynchrony::kRandom;
  int multiprocessors = 2;
};

enum class State { kReady, kPolling, kWaiting, kDone };

struct AsyncCopy {
  uint32_t smem;
  const void* global;
  uint32_t bytes;
};

struct Thread {
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the CTA
  State state = State::kReady;
  int looks = 0;  // since anything else it did
  void* stack = nullptr;
  const char* waits_for = "";
  uint32_t where = 0;  // its address or number
  uint64_t exchanges = 0;
  uint64_t fenced = 0;           // when it has last fenced the generic proxy
  std::deque<AsyncCopy> copies;  // by cp.async, not landed
  uint64_t issued = 0;           // cp.async of it, and of its warpgroup's products
  uint64_t landed = 0;
  uint64_t products = 0, groups = 0;
  bool wgmma_fenced = false;
};

struct Exchange {
  const char* what = nullptr;
  uint32_t arrived = 0;
  Lanes lanes;
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  uint32_t ready = 0, polling = 0, done = 0;  // lanes
  Exchange exchanges[2];                      // no lane is more than one ahead of another
  bool slow = false;
  uint64_t priority = 0;
};

struct Mbarrier {
  uint32_t count = 0, missing = 0;
  int64_t bytes = 0;  // that are still to come
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
};

struct NamedBarrier {
  int threads = 0, arrived = 0, votes = 0, result = 0;
  std::vector<Thread*> waiting;
};

enum class Speed { kFast, kSlow, kLast };

// A copy that has been issued. `until`: of cp.async, how many of the thread's copies have to land before the arrival.
struct Copy {
  uint32_t bar = 0, smem = 0;
  CUtensorMap map{};
  int coordinates[5] = {};
  Thread* thread = nullptr;
  uint64_t until = 0;
  Speed speed = Speed::kFast;
};

// Sums of one or more products in flight, which become the registers of 128 threads again once all of them have run.
struct Accumulator {
  int columns = 0, uses = 0;
  float* registers[128] = {};
  std::vector<float> sums;  // [64][columns]
};

struct PendingProduct {
  Product product;
  uint64_t group = 0, fenced = ~uint64_t{0};
  int threads = 0;  // that have issued it
  std::list<Accumulator>::iterator accumulator;
  const uint32_t* a[128] = {};
  uint32_t a_values[128][4];  // as they were at issue
};

struct Warpgroup {
  std::deque<PendingProduct> products;  // in flight, in order
  uint64_t finished = 0;                // products before the first of them
  std::list<Accumulator> accumulators;
  std::vector<Thread*> waiting;
  bool slow = false;
};

struct Written {
  uint64_t when = 0;  // 0: not through the generic proxy
  int thread = 0;
};

struct Cta {
  int index = 0;  // in the grid, row by row
  char* shared = nullptr;
  uint32_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<uint32_t, Mbarrier> mbarriers;
  NamedBarrier barriers[16];
  std::vector<Copy> copies;
  std::vector<Written> written;  // by 16 bytes of shared memory
  int done = 0;                  // threads
};

struct Machine {
  Settings settings;
  std::mt19937_64 random{0};
  std::vector<std::unique_ptr<Cta>> ctas;
  std::function<void()> kernel;
  Thread* current = nullptr;
  Warp* last_warp = nullptr;
  void* stack = nullptr;  // of the loop that chooses
  std::string error;
  uint64_t clock = 1;  // counts what has happened
  uint64_t launches = 0;
  unsigned patience = 0;  // of 8: how often a warp goes on again

  bool chance(unsigned of_8) { return random() % 8 < of_8; }
  Speed speed() { return !chance(2) ? Speed::kFast : chance(6) ? Speed::kSlow : Speed::kLast; }
  void run(const Shape& shape);
  void check_ended(const Cta& cta);
  bool step();
  bool run_copy_or_product(Speed slowest);
  Warp* choose_warp(bool slow);
  void run_warp(Warp& warp);
  void resume(Thread& t);
  std::string report() const;
};
extern Machine machine;

constexpr unsigned kResident = 16;
constexpr uint32_t kWindow = 1024;  // address of the first byte of shared memory

// ---- for the thread that runs ----
inline Thread& self() { return *machine.current; }
void set_state(Thread& t, State state);
void wait_for(const char* what, uint32_t where);  // until another sets its state
void wake(std::vector<Thread*>& threads);
void leave_barriers(Cta& cta);  // when a thread has ended

// ---- for the loop ----
void complete_tx(Cta& cta, uint32_t bar, uint32_t bytes);
void arrive_at(Cta& cta, uint32_t bar, uint32_t count);
void land(Cta& cta, const Copy& copy);
void run_product(Cta& cta, Warpgroup& warpgroup);
bool can_run(const Warpgroup& warpgroup);
char* window(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment);

}  // namespace emulator
