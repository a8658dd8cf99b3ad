// The instruction set that the kernels run on: the best that they are compiled for and the CPU has,
// or a lower one that was asked for (RLHF_FAST_CPU_CAPABILITY, see ops/registry.py).
//
// A function picked when the library is loaded (target_clones) would save a branch a call, and no
// switch could reach it.
#pragma once

namespace rlhf_fast {

enum Cpu { kPlain, kAvx2, kAvx512 };
extern Cpu cpu;  // module.cpp

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLHF_X86_LEVELS 1
template <class F>
__attribute__((target("arch=x86-64-v4"), noinline)) void on_avx512(F f) {
  f();
}
template <class F>
__attribute__((target("arch=x86-64-v3"), noinline)) void on_avx2(F f) {
  f();
}
#else
#define RLHF_X86_LEVELS 0
#endif

}  // namespace rlhf_fast
