// Runs CUDA kernels on a CPU, for tests: a std::thread for each CUDA thread of a block, barriers
// for __syncthreads and shuffles, blocks one after another. Slow and exact; include it before the
// kernel's own header.
#pragma once

#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace cuda_on_cpu {

struct Warp {
  std::barrier<> meet{32};
  alignas(16) char slots[32][16];
};
struct Block {
  explicit Block(int threads) : meet(threads), warps(threads / 32) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  std::barrier<> meet;
  std::vector<std::unique_ptr<Warp>> warps;
};
inline thread_local Block* block;

// Every lane of the warp shows its x; the caller's lane reads lane `from`'s.
template <class T>
T exchange(T x, int from) {
  Warp& warp = *block->warps[threadIdx.x / 32];
  std::memcpy(warp.slots[threadIdx.x % 32], &x, sizeof(T));
  warp.meet.arrive_and_wait();
  std::memcpy(&x, warp.slots[from % 32], sizeof(T));
  warp.meet.arrive_and_wait();
  return x;
}

template <class Kernel>
void launch(unsigned blocks, int threads, Kernel kernel) {
  Block shared(threads);
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) {
    team.emplace_back([&, i] {
      block = &shared;
      threadIdx.x = i;
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        kernel();
        shared.meet.arrive_and_wait();
      }
    });
  }
  for (auto& thread : team) thread.join();
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->meet.arrive_and_wait(); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return cuda_on_cpu::exchange(x, from);
}
template <class T>
T __shfl_down_sync(unsigned, T x, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::exchange(x, static_cast<int>(lane + delta < 32 ? lane + delta : lane));
}
inline unsigned __ballot_sync(unsigned, bool x) {
  unsigned vote = 0;
  for (int lane = 0; lane < 32; ++lane) {
    vote |= static_cast<unsigned>(cuda_on_cpu::exchange(x, lane)) << lane;
  }
  return vote;
}
