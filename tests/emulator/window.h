// Included ahead of every kernel's file. `extern __shared__ char raw[]` is an array of unknown bound, in an unnamed
// namespace even; here these words declare a function of that namespace instead, and `raw` is what it returns.
#pragma once
#include "attention/launch.h"

#define __shared__
#define __align__(n)
#define raw (*shared_window())

#define FC_WINDOW inline char (*shared_window()) [] { return reinterpret_cast<char (*)[]>(emulator::shared_memory()); }
namespace flashcore {
namespace {
FC_WINDOW
}
namespace decode {
FC_WINDOW
}
namespace extend {
namespace {
FC_WINDOW
}
}  // namespace extend
}  // namespace flashcore
