// The schedule's shared memory is an array of unknown bound in an unnamed namespace, which no other file could define:
// here its name stands for the CTA's window.
#include <cuda_runtime.h>

namespace flashcore::extend {
namespace {
char (*shared_window()) [] { return reinterpret_cast<char (*)[]>(emulator::shared_memory()); }
}  // namespace
}  // namespace flashcore::extend

#include "attention/launch.h"
#define __shared__
#undef __align__
#define __align__(n)
#define raw (*shared_window())
#include "attention/extend_schedule.cu"
