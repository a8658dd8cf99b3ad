// policy_loss on CPU: loss, all statistics and both gradients in one pass over [B, T]; a sequence
// ratio takes a pass before it.
#include "aggregate.h"
#include "token_kl.h"

namespace rlhf_fast {
namespace {

// Sums over the counting tokens of one unit; kLoss and kSurrogate are weighted by c_b.
enum { kLoss, kSurrogate, kEntropy, kKl, kCut, kCutLow, kDual, kExcess, kExcess2, kMost, kLog,
       kLog2, kK3, kSums };

enum class Loss { ppo, cispo, reinforce, sapo, gmpo, vespo, dppo_tv, dppo_kl };

inline Loss loss_named(const std::string& name) {
  if (name == "ppo") return Loss::ppo;
  if (name == "cispo") return Loss::cispo;
  if (name == "sapo") return Loss::sapo;
  if (name == "gmpo") return Loss::gmpo;
  if (name == "vespo") return Loss::vespo;
  if (name == "dppo_tv") return Loss::dppo_tv;
  if (name == "dppo_kl") return Loss::dppo_kl;
  STD_TORCH_CHECK(name == "reinforce", "unknown loss ", name);
  return Loss::reinforce;
}

template <class S>
struct PolicySpan {
  const S *logp, *old_logp, *advantages, *importance_weights, *entropy, *ref_logp;
  const uint8_t* mask;
  S *d_logp, *d_entropy;
  S clip_low, clip_high, dual_clip, entropy_coef, kl_coef;
  S excess_pivot;  // a counting token's ratio - 1
  Estimator estimator;
  Loss loss;
  S tau_pos, tau_neg;
  double k_pos, lambda_pos, k_neg, lambda_neg;
  S delta;  // infinite: none
  bool unbiased_kl;
  bool own_slope;  // of a sequence's ratio in each of its tokens: GSPO-token
};

constexpr double kTiny = 1e-8;

// What all counting tokens of a row share under a sequence ratio.
template <class S>
struct Sequence {
  S ratio, excess;  // the row's ratio, and that minus 1
  bool moves;       // the clamp carries no gradient
  S slope;          // of the ppo and gmpo surrogates, by each logp of the row; without c_b
  S good, bad;      // vespo's weights where A >= 0, and where A < 0
};

// vespo: e^lambda w^k e^(-lambda w).
inline double gamma_weight(double log_w, double k, double lambda) {
  log_w = std::min(std::max(log_w, std::log(kTiny)), 20.0);
  return std::exp(lambda + k * log_w - lambda * std::exp(log_w));
}

// gmpo: a log-ratio is bounded on the side that the sign of A names.
template <class S, class V>
RLHF_INLINE V bounded_log_ratio(const PolicySpan<S>& s, V raw, V A) {
  const V low = V{} - s.clip_low, high = V{} + s.clip_high;
  return select(greater(V{}, A), raw < low ? low : raw, raw > high ? high : raw);
}

// The ratio is one number, so only the sign of A decides which tokens are cut: the row's gradient
// needs no more than the sums of w A over either sign.
template <class S>
RLHF_INLINE void sequence_row(const PolicySpan<S>& s, int64_t begin, int64_t end,
                              Sequence<S>* row) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  const V zero = V{};
  Wide<V> log_ratios{}, counts_{}, good{}, bad{};
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = end - i;
    const V counts = load_mask<S>(s.mask + i, n);
    auto kept = [&](const S* p) __attribute__((always_inline)) {
      return select(counts, load_some(p + i, n, 0), zero);
    };
    const V A = kept(s.advantages), negative = greater(zero, A);
    const V weighted = s.importance_weights ? times(kept(s.importance_weights), A) : A;
    add(counts_, counts);
    const V raw = kept(s.logp) - kept(s.old_logp);
    add(log_ratios, s.loss == Loss::gmpo ? bounded_log_ratio(s, raw, A) : raw);
    add(bad, select(negative, weighted, zero));
    add(good, select(negative, zero, weighted));
  }
  const double n = std::max(1.0, sum(counts_)), mean = sum(log_ratios) / n;
  const S log_ratio = std::min(std::max(S(mean), S(-20)), S(20));
  const S ratio = std::exp(log_ratio);
  const bool inside = mean >= -20 && mean <= 20;  // the clamp carries no gradient
  const bool above = ratio > 1 + s.clip_high, below = ratio < 1 - s.clip_low;
  const bool held = ratio > s.delta, dual = s.dual_clip != 0 && ratio > s.dual_clip;
  double flowing = sum(good) + sum(bad);
  if (s.loss == Loss::ppo) {
    flowing = (above || held ? 0 : sum(good)) + (below || dual || (above && held) ? 0 : sum(bad));
  }
  *row = {ratio, std::expm1(log_ratio), inside, S(inside ? -ratio * flowing / n : 0),
          S(gamma_weight(sum(log_ratios), s.k_pos, s.lambda_pos)),
          S(gamma_weight(sum(log_ratios), s.k_neg, s.lambda_neg))};
}
void run(const PolicySpan<float>* s, int64_t begin, int64_t end,
                     Sequence<float>* row) {
  RLHF_ON_THIS_CPU(sequence_row(*s, begin, end, row));
}
void run(const PolicySpan<double>* s, int64_t begin, int64_t end,
                     Sequence<double>* row) {
  RLHF_ON_THIS_CPU(sequence_row(*s, begin, end, row));
}

// kPlain is ppo on token ratios, in a function of its own: sharing one with the others it was
// 7 % slower.
template <bool kPlain, class S>
RLHF_INLINE void policy_span(const PolicySpan<S>& s, int64_t begin, int64_t end, double c,
                             const Sequence<S>* sequence, double* sums) {
  const Loss kind = kPlain ? Loss::ppo : s.loss;
  const Sequence<S>* row = kPlain ? nullptr : sequence;
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  const V zero = V{}, one = V{} + 1, limit = V{} + 20;
  const V floor = one - s.clip_low, ceiling = one + s.clip_high;
  V loss = zero, surrogates = zero, entropies = zero, kls = zero;
  V cuts = zero, cuts_low = zero, duals = zero;
  V most = zero, logs = zero, logs2 = zero, k3s = zero;
  Moments<V> excess;
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = end - i;
    const V counts = load_mask<S>(s.mask + i, n);
    auto kept = [&](const S* p) __attribute__((always_inline)) {
      return select(counts, load_some(p + i, n, 0), zero);
    };
    const V logp = kept(s.logp), A = kept(s.advantages);
    const V raw = logp - kept(s.old_logp);
    const V log_ratio = clamp(raw, -limit, limit);
    const auto e = exponential(log_ratio);  // the token's own
    const V beyond = raw != log_ratio ? one : zero;
    const V still = row ? zero + S(!row->moves) : beyond;  // the clamp carries no gradient
    const V ratio = row ? zero + row->ratio : e.exp;
    const V bounded = clamp(ratio, floor, ceiling);
    V surrogate, slope, cut, cut_low;
    if (kind == Loss::ppo) {
      const bool held = s.delta < std::numeric_limits<S>::infinity();
      const V whole = -A * ratio, clipped = -A * bounded, delta = zero + s.delta;
      const V unclipped = held ? -A * (ratio > delta ? delta : ratio) : whole;
      surrogate = select(greater(clipped, unclipped), clipped, unclipped);
      cut = greater(surrogate, whole);
      cut_low = cut * greater(zero, A);  // by the sign of A: 7 % less of the whole than by ratio
      slope = select(cut, zero, whole);
      if (s.dual_clip != 0) {
        const V most_loss = -A * s.dual_clip;
        const V dual = greater(zero, A) * greater(surrogate, most_loss);
        surrogate = select(dual, most_loss, surrogate);
      }
      if (held || s.dual_clip != 0) {
        const V dual = greater(whole, surrogate);
        slope = select(dual, zero, slope);
        duals += dual;
      }
      slope = select(still, zero, slope);
    } else if (kind == Loss::sapo) {
      const V tau = select(greater(A, zero), zero + s.tau_pos, zero + s.tau_neg);
      const V x = tau * e.minus_one;
      const V tail = exponential(x > zero ? -x : x).exp;  // sigmoid by what cannot overflow
      const V both = one / (one + tail), gate = x > zero ? both : tail * both;
      surrogate = -A * gate * 4 / tau;
      slope = select(still, zero, -A * ratio * 4 * tail * both * both);
      cut = cut_low = zero;
    } else if (kind == Loss::gmpo) {
      cut = bounded_log_ratio(s, raw, A) != raw ? one : zero;
      cut_low = cut * greater(zero, A);
      surrogate = -A * ratio;
      slope = zero;  // of its row, below
    } else {  // log-probs, weighted by a constant
      V weight = one;
      cut = cut_low = zero;
      if (kind == Loss::cispo) {
        cut_low = counts * greater(floor, ratio);
        cut = cut_low + counts * greater(ratio, ceiling);
        weight = bounded;
      } else if (kind == Loss::vespo) {
        weight = select(greater(zero, A), zero + row->bad, zero + row->good);
      } else if (kind != Loss::reinforce) {
        const V before = kept(s.old_logp), delta = zero + s.delta;
        const auto p = exponential(logp), q = exponential(before);
        V up = p.exp - q.exp, down = -up;
        if (kind == Loss::dppo_kl) {
          V rest = -p.minus_one;
          rest = rest < zero ? zero : rest;
          V old_rest = -q.minus_one;
          old_rest = old_rest < zero ? zero : old_rest;
          const V odds = (old_rest + S(kTiny)) / (rest + S(kTiny));
          const V divergence = times(q.exp, before - logp) + old_rest * logarithm(odds);
          up = select(greater(up, zero), divergence, zero);
          down = select(greater(down, zero), divergence, zero);
        }
        const V good = greater(A, zero);
        cut_low = select(good, zero, greater(down, zero + s.clip_low));
        cut = cut_low + select(good, greater(up, zero + s.clip_high), zero);
        weight = select(cut, zero, ratio > delta ? delta : ratio);
        duals += select(cut, zero, counts * greater(ratio, delta));
      }
      slope = -A * weight;
      surrogate = times(slope, logp);
    }
    if (s.importance_weights) {
      const V w = kept(s.importance_weights);
      surrogate = times(w, surrogate);
      slope = times(w, slope);
    }
    if (row && kind == Loss::ppo && !s.own_slope) slope = zero + row->slope;
    if (kind == Loss::gmpo) slope = select(cut, zero, zero + row->slope);
    V token = surrogate;
    if (s.entropy) {
      const V H = kept(s.entropy);
      entropies += H;
      token -= times(zero + s.entropy_coef, H);
      store_some(s.d_entropy + i, select(counts, zero - s.entropy_coef * S(c), zero), n);
    }
    if (s.ref_logp) {
      auto kl = token_kl(logp - kept(s.ref_logp), s.estimator);
      if (s.unbiased_kl) {
        kl = {e.exp * kl.value, e.exp * (kl.slope + select(beyond, zero, kl.value))};
      }
      const V value = select(counts, kl.value, zero);
      kls += value;
      if (s.kl_coef != 0) {
        token += s.kl_coef * value;
        slope += s.kl_coef * kl.slope;
      }
    }
    store_some(s.d_logp + i, select(counts, times(zero + S(c), slope), zero), n);
    loss += token;
    surrogates += surrogate;
    cuts += cut;  // ppo: where nothing counts, 0 > 0 is false
    cuts_low += cut_low;
    most = select(counts, max(ratio, most), most);
    logs += raw;  // the clamp is for the exponential
    logs2 += raw * raw;
    k3s += (e.minus_one - log_ratio) + times(e.minus_one, raw - log_ratio);  // its tangent beyond
    const V beyond_one = row ? zero + row->excess : e.minus_one;
    excess.add(select(counts, beyond_one, zero + s.excess_pivot), s.excess_pivot);
  }
  sums[kLoss] = c == 0 ? 0 : c * sum(loss);
  sums[kSurrogate] = c == 0 ? 0 : c * sum(surrogates);
  sums[kEntropy] = sum(entropies);
  sums[kKl] = sum(kls);
  sums[kCut] = sum(cuts);
  sums[kCutLow] = sum(cuts_low);
  sums[kDual] = sum(duals);
  sums[kExcess] = sum(excess.sum);
  sums[kExcess2] = sum(excess.squares);
  sums[kMost] = largest(most);
  sums[kLog] = sum(logs);
  sums[kLog2] = sum(logs2);
  sums[kK3] = sum(k3s);
}
void run_plain(const PolicySpan<float>* s, int64_t begin, int64_t end, double c,
                           double* sums) {
  RLHF_ON_THIS_CPU(policy_span<true, float>(*s, begin, end, c, nullptr, sums));
}
void run(const PolicySpan<float>* s, int64_t begin, int64_t end, double c,
                     const Sequence<float>* row, double* sums) {
  RLHF_ON_THIS_CPU(policy_span<false>(*s, begin, end, c, row, sums));
}
void run_plain(const PolicySpan<double>* s, int64_t begin, int64_t end, double c,
                           double* sums) {
  RLHF_ON_THIS_CPU(policy_span<true, double>(*s, begin, end, c, nullptr, sums));
}
void run(const PolicySpan<double>* s, int64_t begin, int64_t end, double c,
                     const Sequence<double>* row, double* sums) {
  RLHF_ON_THIS_CPU(policy_span<false>(*s, begin, end, c, row, sums));
}

// logp, old_logp, advantages, importance_weights, entropy, ref_logp [B, T]; mask [B, T] bool;
// normalizer 0-dim -> (loss 0-dim, stats [14], dloss/dlogp [B, T], dloss/dentropy [B, T] or,
// without entropy, [0]).
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, const Tensor& mask,
    const MaybeTensor& importance_weights, const MaybeTensor& entropy, const MaybeTensor& ref_logp,
    const MaybeTensor& normalizer, double clip_low, double clip_high,
    std::optional<double> dual_clip, double entropy_coef, double kl_coef,
    std::string kl_estimator, std::string aggregation, std::string ratio, std::string loss,
    double sapo_tau_pos, double sapo_tau_neg, double vespo_k_pos, double vespo_lambda_pos,
    double vespo_k_neg, double vespo_lambda_neg, std::optional<double> delta, bool unbiased_kl) {
  double tokens = 0;
  const std::vector<double> c = coefficients(mask, aggregation, normalizer, &tokens);
  const Units units(logp.size(0), logp.size(1));
  std::vector<std::array<double, kSums>> unit_sums(units.count());
  Tensor d_logp = new_like(logp);
  Tensor d_entropy = entropy.has_value() ? new_like(logp)
                                         : new_tensor({0}, logp.scalar_type());
  return dispatch_accumulator(logp, "policy_loss", [&](auto element) {
    using S = decltype(element);
    PolicySpan<S> span{
        data<S>(logp), data<S>(old_logp), data<S>(advantages), data<S>(importance_weights),
        data<S>(entropy), data<S>(ref_logp), bits(mask), mutable_data<S>(d_logp),
        mutable_data<S>(d_entropy), S(clip_low), S(clip_high), S(dual_clip.value_or(0)),
        S(entropy_coef), S(kl_coef), S(0), estimator(kl_estimator),
        loss_named(loss), S(sapo_tau_pos), S(sapo_tau_neg), vespo_k_pos, vespo_lambda_pos,
        vespo_k_neg, vespo_lambda_neg,
        S(delta.value_or(std::numeric_limits<double>::infinity())), unbiased_kl,
        ratio == "sequence_token"};
    std::vector<Sequence<S>> sequences(ratio == "token" ? 0 : logp.size(0));
    parallel_rows(sequences.size(), logp.size(1), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        run(&span, b * logp.size(1), (b + 1) * logp.size(1), &sequences[b]);
      }
    });
    if (const int64_t first = first_counting(mask); first >= 0) {
      const S log_ratio = span.logp[first] - span.old_logp[first];
      span.excess_pivot = sequences.empty() ? std::expm1(std::min(std::max(log_ratio, S(-20)), S(20)))
                                            : sequences[first / logp.size(1)].excess;
    }
    const bool plain = span.loss == Loss::ppo && sequences.empty();
    units.parallel([&](int64_t unit, int64_t row, int64_t begin, int64_t end) {
      const Sequence<S>* sequence = sequences.empty() ? nullptr : &sequences[row];
      double* sums = unit_sums[unit].data();
      if (plain) return run_plain(&span, begin, end, c[row], sums);
      run(&span, begin, end, c[row], sequence, sums);
    });
    const auto sums = total(unit_sums);
    double most = 0;
    for (const auto& unit : unit_sums) most = std::max(most, unit[kMost]);
    auto mean = [&](int k) { return tokens > 0 ? sums[k] / tokens : 0; };
    const double ratio_mean = 1 + (span.excess_pivot + mean(kExcess));
    return std::tuple(
        scalar_of<S>(logp, sums[kLoss]),
        vector_of<S>(logp, {sums[kSurrogate], mean(kEntropy), mean(kKl), mean(kCut), mean(kDual),
                            tokens > 0 ? ratio_mean : 0,
                            variance(sums[kExcess], sums[kExcess2], tokens), most, -mean(kLog),
                            mean(kLog2) / 2, mean(kK3), mean(kCutLow),
                            mean(kCut) - mean(kCutLow), tokens}),
        d_logp, d_entropy);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
}

}  // namespace rlhf_fast
