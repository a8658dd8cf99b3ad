// gae and gae_packed on CPU: one affine scan along each row, a vector of steps at a time.
//
// What flows from step t to the left is X_t = gamma V_t + gamma lambda A_t. With `alive` = 0 where
// an episode ended at t and 1 elsewhere,
//
//   counting step   A_t = r_t - V_t + alive X_{t+1},   X_t = gamma V_t + gamma lambda A_t
//   skipped hole    X_t = alive X_{t+1}
//   zero hole       X_t = gamma lambda alive X_{t+1}
//
// so every step is a map X -> p X + q, and maps compose: log2(lanes) shuffles give a whole vector
// its prefixes, where the plain recursion waits for each step (12 cycles an element against 3).
#include "ops.h"

namespace rlhf_fast {
namespace {

template <class S>
struct Scan {
  const S *rewards, *values;
  const uint8_t *mask, *dones;  // null: all count, none done
  S *advantages, *returns;
  S gamma, gamma_lambda;
  bool skip_holes;
};

// v moved `by` lanes to the left; `fill` enters from the right.
template <int by>
RLHF_INLINE Floats shifted(Floats v, Floats fill) {
  static_assert(kFloats == 8);
  return __builtin_shufflevector(v, fill, by, by + 1, by + 2, by + 3, by + 4, by + 5, by + 6,
                                 by + 7);
}
template <int by>
RLHF_INLINE Doubles shifted(Doubles v, Doubles fill) {
  static_assert(kDoubles == 4);
  return __builtin_shufflevector(v, fill, by, by + 1, by + 2, by + 3);
}

// p X + q; where `drops`, p = 0 drops even a NaN: an episode does not see the one after it, nor does
// anybody through a gamma or lambda of 0. Else the scan does not look, and takes three quarters of
// the time.
template <bool drops, class V>
RLHF_INLINE V applied(V p, V X, V q) {
  return q + (drops ? select(p, p * X, V{}) : p * X);
}

// Lane i of (p, q) takes in the maps of lanes i + 1 to the end.
template <int by, bool drops, class V>
RLHF_INLINE void compose(V& p, V& q) {
  q = applied<drops>(p, shifted<by>(q, V{}), q);
  p = p * shifted<by>(p, V{} + 1);
}

// The n steps from i on, of a vector's width at most; next: X just right of them, in every lane, and
// then of the first of them.
template <bool drops, class S, class V>
RLHF_INLINE void scan_vector(const Scan<S>& s, int64_t i, int64_t n, V& next) {
  constexpr int width = Lane<S>::width;
  const V zero = V{}, one = V{} + 1;
  const V counts = s.mask ? load_mask<S>(s.mask + i, n) : one;
  const V alive = s.dones ? one - load_mask<S>(s.dones + i, n) : one;
  const V value = select(counts, load_some(s.values + i, n, 0), zero);
  const V delta = select(counts, load_some(s.rewards + i, n, 0), zero) - value;
  const V decay = s.gamma_lambda * alive;
  V p = s.skip_holes ? select(counts, decay, alive) : decay;
  V q = drops ? times(zero + s.gamma, value) + times(zero + s.gamma_lambda, delta)
              : s.gamma * value + s.gamma_lambda * delta;
  q = select(counts, q, zero);
  for (int64_t lane = n; lane < width; ++lane) {  // beyond the row: nothing happens
    p[lane] = 1;
    q[lane] = 0;
  }
  compose<1, drops>(p, q);
  compose<2, drops>(p, q);
  if constexpr (width == 8) compose<4, drops>(p, q);
  const V X = applied<drops>(p, next, q);
  const V advantage = select(counts, applied<drops>(alive, shifted<1>(X, next), delta), zero);
  store_some(s.advantages + i, advantage, n);
  store_some(s.returns + i, advantage + value, n);
  next = zero + X[0];
}
template <bool drops, class S>
RLHF_INLINE void scan_row(const Scan<S>& s, int64_t first, int64_t steps, S bootstrap) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  V next = times(V{} + s.gamma, V{} + bootstrap);
  const int64_t rest = steps % width;
  if (rest) scan_vector<drops>(s, first + steps - rest, rest, next);
  for (int64_t i = first + steps - rest - width; i >= first; i -= width) {
    scan_vector<drops>(s, i, width, next);  // a constant: no lane is looked at by itself
  }
}
template <class S>
RLHF_INLINE void scan(const Scan<S>& s, int64_t first, int64_t steps, S bootstrap) {
  if (s.dones || s.gamma_lambda == 0) {
    scan_row<true>(s, first, steps, bootstrap);
  } else {
    scan_row<false>(s, first, steps, bootstrap);
  }
}
void run(const Scan<float>* s, int64_t first, int64_t steps, float bootstrap) {
  RLHF_ON_THIS_CPU(scan(*s, first, steps, bootstrap));
}
void run(const Scan<double>* s, int64_t first, int64_t steps, double bootstrap) {
  RLHF_ON_THIS_CPU(scan(*s, first, steps, bootstrap));
}

// The rows' steps lie one row after the other; row b begins at first(b) and ends where b + 1 begins.
template <class First>
std::tuple<Tensor, Tensor> scan_rows(
    const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& dones,
    const MaybeTensor& bootstrap, double gamma, double lambda, bool skip_holes, int64_t rows,
    const First& first) {
  Tensor advantages = new_like(rewards);
  Tensor returns = new_like(rewards);
  dispatch_accumulator(rewards, "gae", [&](auto element) {
    using S = decltype(element);
    const Scan<S> s{data<S>(rewards), data<S>(values), bits(mask), bits(dones),
                    mutable_data<S>(advantages), mutable_data<S>(returns), S(gamma),
                    S(gamma * lambda), skip_holes};
    const S* last = data<S>(bootstrap);
    const int64_t width = rewards.numel() / std::max<int64_t>(1, rows);  // on average
    parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        run(&s, first(b), first(b + 1) - first(b), last ? last[b] : S(0));
      }
    });
    return 0;
  });
  return {advantages, returns};
}

// rewards, values [B, T]; mask, dones [B, T] bool; bootstrap [B] -> (advantages, returns) [B, T].
std::tuple<Tensor, Tensor> gae(
    const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& dones,
    const MaybeTensor& bootstrap, double gamma, double lambda, bool skip_holes) {
  const int64_t steps = rewards.size(1);
  return scan_rows(rewards, values, mask, dones, bootstrap, gamma, lambda, skip_holes,
                   rewards.size(0), [=](int64_t b) { return b * steps; });
}

// rewards, values [N]; cu_seqlens [B + 1] int64; mask, dones [N] bool; bootstrap [B] ->
// (advantages, returns) [N].
std::tuple<Tensor, Tensor> gae_packed(
    const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const MaybeTensor& mask,
    const MaybeTensor& dones, const MaybeTensor& bootstrap, double gamma, double lambda,
    bool skip_holes) {
  const int64_t *first = data<int64_t>(cu_seqlens), rows = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(rows >= 0 && first[0] == 0 && first[rows] == rewards.numel() &&
                      std::is_sorted(first, first + rows + 1),
                  "gae_packed: cu_seqlens must rise from 0 to N");
  return scan_rows(rewards, values, mask, dones, bootstrap, gamma, lambda, skip_holes, rows,
                   [=](int64_t b) { return first[b]; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("gae_packed", TORCH_BOX(&gae_packed));
}

}  // namespace rlhf_fast
