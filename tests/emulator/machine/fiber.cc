#include "machine/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#ifndef __x86_64__
#error "the emulator's switch of stacks is written for x86-64"
#endif

// What a call keeps: rbx, rbp, r12 to r15. Rounding modes are not touched by kernels.
asm(R"(
.text
.type emulator_switch, @function
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

void* new_stack(int i, void (*entry)()) {
  static std::vector<char*> stacks;  // kept for the next launch, as their pages are there already
  while (static_cast<int>(stacks.size()) <= i) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for another stack");
    mprotect(p, 4096, PROT_NONE);  // an overflow ends the process here
    stacks.push_back(static_cast<char*>(p));
  }
  auto* top = reinterpret_cast<uint64_t*>(stacks[i] + kStackBytes);
  // From the top: padding that aligns the stack as a call does, the entry as return address, six registers.
  top -= 8;
  top[6] = reinterpret_cast<uint64_t>(entry);
  for (int k = 0; k < 6; ++k) top[k] = 0;
  return top;
}

}  // namespace emulator
