// policy_loss on CPU: loss, all statistics and both gradients in one pass over [B, T]; a sequence
// ratio takes a pass before it.
#include "aggregate.h"
#include "token_kl.h"

namespace rlhf_fast {
namespace {

// Sums over the counting tokens of one unit; kLoss and kSurrogate are weighted by c_b.
enum { kLoss, kSurrogate, kEntropy, kKl, kCut, kCutLow, kDual, kExcess, kExcess2, kMost, kLog,
       kLog2, kK3, kSums };

enum class Loss { ppo, cispo, reinforce, sapo };

inline Loss loss_named(const std::string& name) {
  if (name == "ppo") return Loss::ppo;
  if (name == "cispo") return Loss::cispo;
  if (name == "sapo") return Loss::sapo;
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
};

// What all counting tokens of a row share under a sequence ratio.
template <class S>
struct Sequence {
  S ratio, excess;  // the row's ratio, and that minus 1
  S slope;          // of the ppo surrogates, by each logp of the row; without c_b
};

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
    add(log_ratios, kept(s.logp) - kept(s.old_logp));
    add(bad, select(negative, weighted, zero));
    add(good, select(negative, zero, weighted));
  }
  const double n = std::max(1.0, sum(counts_)), mean = sum(log_ratios) / n;
  const S log_ratio = std::min(std::max(S(mean), S(-20)), S(20));
  const S ratio = std::exp(log_ratio);
  const bool inside = mean >= -20 && mean <= 20;  // the clamp carries no gradient
  const bool above = ratio > 1 + s.clip_high, below = ratio < 1 - s.clip_low;
  const bool dual = s.dual_clip != 0 && ratio > s.dual_clip;
  const double flowing = (above ? 0 : sum(good)) + (below || dual ? 0 : sum(bad));
  *row = {ratio, std::expm1(log_ratio), S(inside ? -ratio * flowing / n : 0)};
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
    const V ratio = row ? zero + row->ratio : e.exp;
    const V bounded = clamp(ratio, floor, ceiling);
    V surrogate, slope, cut, cut_low;
    if (kind == Loss::ppo) {
      const V unclipped = -A * ratio, clipped = -A * bounded;
      cut = greater(clipped, unclipped);
      cut_low = cut * greater(zero, A);  // by the sign of A: 7 % less of the whole than by ratio
      surrogate = select(cut, clipped, unclipped);
      slope = select(cut, zero, unclipped);
      if (s.dual_clip != 0) {
        const V most_loss = -A * s.dual_clip;
        const V dual = greater(zero, A) * greater(surrogate, most_loss);
        surrogate = select(dual, most_loss, surrogate);
        slope = select(dual, zero, slope);
        duals += dual;
      }
      slope = raw != log_ratio ? zero : slope;  // the clamp carries no gradient
    } else if (kind == Loss::sapo) {
      const V tau = select(greater(A, zero), zero + s.tau_pos, zero + s.tau_neg);
      const V x = tau * e.minus_one;
      const V tail = exponential(x > zero ? -x : x).exp;  // sigmoid by what cannot overflow
      const V both = one / (one + tail), gate = x > zero ? both : tail * both;
      surrogate = -A * gate * 4 / tau;
      slope = -A * ratio * 4 * tail * both * both;
      slope = raw != log_ratio ? zero : slope;
      cut = cut_low = zero;
    } else {
      const bool cispo = kind == Loss::cispo;
      const V above = greater(ratio, ceiling), below = greater(floor, ratio);
      cut = cispo ? counts * (above + below) : zero;
      cut_low = cispo ? counts * below : zero;
      slope = cispo ? -A * bounded : -A;
      surrogate = times(slope, logp);
    }
    if (s.importance_weights) {
      const V w = kept(s.importance_weights);
      surrogate = times(w, surrogate);
      slope = times(w, slope);
    }
    if (row && kind == Loss::ppo) slope = zero + row->slope;
    V token = surrogate;
    if (s.entropy) {
      const V H = kept(s.entropy);
      entropies += H;
      token -= times(zero + s.entropy_coef, H);
      store_some(s.d_entropy + i, select(counts, zero - s.entropy_coef * S(c), zero), n);
    }
    if (s.ref_logp) {
      const auto kl = token_kl(logp - kept(s.ref_logp), s.estimator);
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
    double sapo_tau_pos, double sapo_tau_neg) {
  double tokens = 0;
  const std::vector<double> c = coefficients(mask, aggregation, normalizer, &tokens);
  const Units units(logp.size(0), logp.size(1));
  std::vector<std::array<double, kSums>> unit_sums(units.count());
  Tensor d_logp = torch::stable::empty_like(logp);
  const int64_t none = 0;
  Tensor d_entropy = entropy.has_value() ? torch::stable::empty_like(logp)
                                         : torch::stable::new_empty(logp, {&none, 1});
  return dispatch_accumulator(logp, "policy_loss", [&](auto element) {
    using S = decltype(element);
    PolicySpan<S> span{
        data<S>(logp), data<S>(old_logp), data<S>(advantages), data<S>(importance_weights),
        data<S>(entropy), data<S>(ref_logp), bits(mask), mutable_data<S>(d_logp),
        mutable_data<S>(d_entropy), S(clip_low), S(clip_high), S(dual_clip.value_or(0)),
        S(entropy_coef), S(kl_coef), S(0), estimator(kl_estimator),
        loss_named(loss), S(sapo_tau_pos), S(sapo_tau_neg)};
    std::vector<Sequence<S>> sequences(ratio == "sequence" ? logp.size(0) : 0);
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
