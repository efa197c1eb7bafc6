// Stacks, and the switch from one to another.
#pragma once
#include <cstddef>

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;

// Keeps the present stack in `from` and goes on with `to`.
extern "C" void emulator_switch(void** from, void* to);

// The i-th stack, at whose first switch `entry` is called. `entry` does not return.
void* new_stack(int i, void (*entry)());

}  // namespace emulator
