// The GAE scan of one row by one block, in plain CUDA C++: no torch, so that tests can run this
// very text on a CPU (tests/cuda_on_cpu.h).
//
// The recursion is affine in what comes from the right: the next value is either replaced or passed
// on, and the advantage is A <- d A + e with d in {0, 1, gamma lambda}. A thread composes the maps
// of 16 bytes of consecutive steps, warps compose their threads' by shuffles, the block its warps'
// through shared memory: log2(32) steps where a loop makes 1024. Each input is read once and each
// output written once, 16 bytes at a time where rows allow it.
#pragma once

namespace rlhf_fast {

template <class S>
struct Gae {
  const S *rewards, *values, *bootstrap;        // bootstrap may be null
  const unsigned char *mask, *dones;            // may be null: all count, none is done
  S *advantages, *returns;
  long long steps;
  S gamma, gamma_lambda;
  bool skip_holes;
};

template <class T, int kItems>
struct alignas(sizeof(T) * kItems) Pack {
  T x[kItems];
};

// items t0 .. t0 + kItems - 1 of a row of `steps`; `nothing` beyond its end.
template <bool kAligned, int kItems, class T>
__device__ __forceinline__ void load(
    T (&out)[kItems], const T* row, long long t0, long long steps, T nothing) {
  if (kAligned && t0 < steps) {
    const auto pack = *reinterpret_cast<const Pack<T, kItems>*>(row + t0);
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = pack.x[i];
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = t0 + i < steps ? row[t0 + i] : nothing;
  }
}

template <bool kAligned, int kItems, class T>
__device__ __forceinline__ void store(
    T* row, long long t0, long long steps, const T (&in)[kItems]) {
  if (kAligned && t0 < steps) {
    Pack<T, kItems> pack;
#pragma unroll
    for (int i = 0; i < kItems; ++i) pack.x[i] = in[i];
    *reinterpret_cast<Pack<T, kItems>*>(row + t0) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (t0 + i < steps) row[t0 + i] = in[i];
    }
  }
}

// A <- d A + e; a cut (d = 0) drops even NaN.
template <class S>
__device__ __forceinline__ S apply(S d, S e, S A) {
  return d == S(0) ? e : d * A + e;
}

template <class S, int kWarps, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32) gae_rows(Gae<S> a) {
  constexpr int kItems = 16 / sizeof(S);
  constexpr long long kTile = kWarps * 32 * kItems;
  constexpr unsigned kAll = 0xffffffffu;
  __shared__ bool warp_found[kWarps];
  __shared__ S warp_value[kWarps], warp_d[kWarps], warp_e[kWarps];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long base = static_cast<long long>(blockIdx.x) * a.steps;
  S value_carry = a.bootstrap ? a.bootstrap[blockIdx.x] : S(0);  // of the first step to the right
  S advantage_carry = 0;

  for (long long tile = (a.steps - 1) / kTile; tile >= 0; --tile) {
    const long long t0 = tile * kTile + threadIdx.x * kItems;
    S r[kItems], v[kItems];
    unsigned char kept[kItems], done[kItems];
    load<kAligned>(r, a.rewards + base, t0, a.steps, S(0));
    load<kAligned>(v, a.values + base, t0, a.steps, S(0));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      kept[i] = t0 + i < a.steps;
      done[i] = 0;
    }
    if (a.mask) load<kAligned>(kept, a.mask + base, t0, a.steps, static_cast<unsigned char>(0));
    if (a.dones) load<kAligned>(done, a.dones + base, t0, a.steps, static_cast<unsigned char>(0));

    // 1. The value a step meets on its right. A thread either replaces it or passes it on.
    bool moves[kItems], found = false;
    S value = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      moves[i] = t0 + i < a.steps && (kept[i] || !a.skip_holes);
      if (!kept[i]) r[i] = v[i] = 0;
      if (moves[i] || done[i]) {
        found = true;
        value = v[i];  // 0 where a hole is done
      }
    }
    const unsigned vote = __ballot_sync(kAll, found);
    const unsigned right = lane == 31 ? 0u : vote >> (lane + 1);
    const S neighbour = __shfl_sync(kAll, value, right ? lane + __ffs(right) : lane);
    const S leftmost = __shfl_sync(kAll, value, vote ? __ffs(vote) - 1 : 0);
    if (lane == 0) {
      warp_found[warp] = vote != 0;
      warp_value[warp] = leftmost;
    }
    __syncthreads();
    S next_value = value_carry;
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w) {
      if (w == warp) next_value = value_carry;
      if (warp_found[w]) value_carry = warp_value[w];
    }
    if (right) next_value = neighbour;

    // 2. A <- d A + e for each step, each thread, each warp.
    S d[kItems], e[kItems], D = 1, E = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (done[i]) next_value = 0;
      d[i] = done[i] ? S(0) : moves[i] ? a.gamma_lambda : S(1);
      const S later = a.gamma == S(0) ? S(0) : a.gamma * next_value;  // 0 * inf is 0 here
      e[i] = moves[i] ? r[i] + later - v[i] : S(0);
      if (moves[i]) next_value = v[i];
      E = apply(d[i], e[i], E);
      D *= d[i];
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const S other_D = __shfl_down_sync(kAll, D, step), other_E = __shfl_down_sync(kAll, E, step);
      if (lane + step < 32) {
        E = apply(D, E, other_E);
        D *= other_D;
      }
    }
    if (lane == 0) {
      warp_d[warp] = D;
      warp_e[warp] = E;
    }
    D = __shfl_down_sync(kAll, D, 1);  // of the lanes to the right only
    E = __shfl_down_sync(kAll, E, 1);
    __syncthreads();  // also: every thread has read warp_found, which the next tile overwrites
    S A = advantage_carry;
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w) {
      if (w == warp) A = advantage_carry;
      advantage_carry = apply(warp_d[w], warp_e[w], advantage_carry);
    }
    if (lane < 31) A = apply(D, E, A);

#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      A = apply(d[i], e[i], A);
      r[i] = kept[i] ? A : S(0);
      v[i] = kept[i] ? A + v[i] : S(0);
    }
    store<kAligned>(a.advantages + base, t0, a.steps, r);
    store<kAligned>(a.returns + base, t0, a.steps, v);
  }
}

}  // namespace rlhf_fast
