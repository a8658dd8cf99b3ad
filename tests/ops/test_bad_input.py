"""Bad input: one clear error that names the argument, before any kernel runs."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops import support
from rlhf_fast.ops.registry import OPS

x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
cu = torch.tensor([0, 1, 3])
hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
TIED = (hidden, weight, labels, hidden)


def outside(value: int) -> torch.Tensor:
    bad = labels.clone()
    bad[1, 2] = value
    return bad


CASES = [
    ("token_logprobs", (logits.int(), labels), {}, TypeError, "logits must be float32.*int32"),
    ("token_logprobs", ([1.0], labels), {}, TypeError, "logits must be a tensor, got list"),
    ("token_logprobs", (logits, labels.int()), {}, TypeError, "labels must be int64"),
    ("token_logprobs", (logits, labels[:1]), {}, ValueError, r"labels must have the leading shape"),
    ("token_logprobs", (logits, labels.to("meta")), {}, ValueError, "labels must be on the device"),
    (
        "token_logprobs",
        (logits, outside(5)),
        {},
        ValueError,
        r"labels\[1, 2\] is 5, outside \[0, 5",
    ),
    ("token_logprobs", (logits, outside(-1)), {}, ValueError, r"labels\[1, 2\] is -1"),
    (
        "token_logprobs",
        (logits, labels),
        {"temperature": 0.0},
        ValueError,
        "temperature must be ab",
    ),
    (
        "token_logprobs",
        (logits, labels),
        {"temperature": "1"},
        TypeError,
        "temperature must be a n",
    ),
    (
        "token_logprobs",
        (logits, labels),
        {"temperature": x[0]},
        ValueError,
        "temperature must have",
    ),
    ("token_logprobs", (logits, labels), {"softcap": -1.0}, ValueError, "softcap must be above 0"),
    (
        "linear_token_logprobs",
        (hidden, weight.t(), labels),
        {},
        ValueError,
        r"weight must be \[V, H",
    ),
    (
        "linear_token_logprobs",
        (hidden, weight.half(), labels),
        {},
        TypeError,
        "weight must have the",
    ),
    ("linear_token_logprobs", (hidden, weight, outside(5)), {}, ValueError, r"labels\[1, 2\] is 5"),
    (
        "linear_token_logprobs",
        (hidden, weight, labels),
        {"bias": x[0]},
        ValueError,
        r"bias must be \[",
    ),
    ("linear_token_kl", TIED, {"direction": "both"}, ValueError, "direction must be one of rev"),
    ("linear_token_kl", (*TIED, weight[:4]), {}, ValueError, "ref_weight must be of weight's voc"),
    ("linear_token_kl", (*TIED, weight[0]), {}, ValueError, r"ref_weight must be \[V, H\]"),
    ("linear_token_kl", (*TIED[:3], hidden[:1]), {}, ValueError, "ref_hidden must have the lead"),
    ("linear_token_kl", (*TIED[:3], hidden[..., :2]), {}, ValueError, r"ref_hidden must be \[..."),
    ("linear_token_kl", (*TIED[:3], hidden.double()), {}, TypeError, "ref_hidden must have the d"),
    ("linear_token_kl", TIED, {"ref_bias": weight[:, 0]}, ValueError, "ref_bias needs ref_weight"),
    (
        "linear_token_kl",
        (*TIED, weight),
        {"ref_bias": weight[0]},
        ValueError,
        r"ref_bias must be \[V\]",
    ),
    ("policy_loss", (x, x[:1], x, mask), {}, ValueError, "old_logp must have the shape of logp"),
    ("policy_loss", (x, x, x, mask.float()), {}, TypeError, "mask must be bool.*mask.bool()"),
    (
        "policy_loss",
        (x, x, x, mask),
        {"aggregation": "mean"},
        ValueError,
        "aggregation must be one",
    ),
    (
        "policy_loss",
        (x, x, x, mask),
        {"entropy_coef": 0.1},
        ValueError,
        "entropy_coef 0.1 needs en",
    ),
    ("policy_loss", (x, x, x, mask), {"kl_coef": 0.1}, ValueError, "kl_coef 0.1 needs ref_logp"),
    ("policy_loss", (x, x, x, mask), {"clip_low": 1.5}, ValueError, "clip_low must be at most 1"),
    ("policy_loss", (x, x, x, mask), {"dual_clip": 1.0}, ValueError, "dual_clip must be above 1"),
    ("policy_loss", (x, x, x, mask), {"normalizer": 0}, ValueError, "normalizer must be above 0"),
    (
        "policy_loss",
        (x, x, x, mask),
        {"clip_high": float("nan")},
        ValueError,
        "clip_high must be fi",
    ),
    ("policy_loss", (x, x, x, mask), {"ratio": "row"}, ValueError, "ratio must be one of token, s"),
    ("policy_loss", (x, x, x, mask), {"loss": "grpo"}, ValueError, "loss must be one of ppo, cisp"),
    (
        "policy_loss",
        (x, x, x, mask),
        {"ratio": "sequence", "loss": "reinforce"},
        ValueError,
        "loss='reinforce' needs ratio='token', got ratio='sequence'",
    ),
    (
        "policy_loss",
        (x, x, x, mask),
        {"dual_clip": 3.0, "loss": "cispo"},
        ValueError,
        "dual_clip 3.0 needs loss='ppo', got loss='cispo'",
    ),
    (
        "policy_loss",
        (x, x, x, mask),
        {"dual_clip": 3.0, "loss": "reinforce"},
        ValueError,
        "dual_clip 3.0 needs loss='ppo', got loss='reinforce'",
    ),
    ("policy_loss", (x, x, x, mask), {"clip_high": -0.1}, ValueError, "clip_high must be at least"),
    (
        "policy_loss",
        (x, x, x, mask),
        {"loss": "cispo", "clip_low": 0.1, "clip_high": -0.2},
        ValueError,
        "clip_high must be at least -0.1",
    ),
    ("top_entropy_mask", (x, mask, 1.5), {}, ValueError, "share must be at most 1"),
    ("top_entropy_mask", (x, mask.int(), 0.5), {}, TypeError, "mask must be bool"),
    (
        "top_entropy_mask",
        (x, mask, 0.5),
        {"all_entropies": x},
        ValueError,
        r"all_entropies must be \[",
    ),
    ("off_policy_mask", (x, x[:1], x, mask, 0.1), {}, ValueError, "old_logp must have the shape"),
    ("off_policy_mask", (x, x, x, mask, -0.1), {}, ValueError, "threshold must be at least 0"),
    ("covariance_mask", (x, x, x, mask), {"share": 0.0}, ValueError, "share must be above 0"),
    ("covariance_mask", (x, x, x, mask), {"high": 1.0}, ValueError, "high must be above 1"),
    ("gae_packed", (x, x, cu), {}, ValueError, r"rewards must be \[N\]"),
    ("gae_packed", (x[0], x[0], cu.float()), {}, TypeError, "cu_seqlens must be int32 or int64"),
    ("gae_packed", (x[0], x[0], cu[:0]), {}, ValueError, r"cu_seqlens must be \[B\+1\]"),
    ("gae_packed", (x[0], x[0], cu + 1), {}, ValueError, "cu_seqlens must rise from 0 to 3"),
    ("gae_packed", (x[0], x[0], cu[:2]), {}, ValueError, "cu_seqlens must rise from 0 to 3"),
    ("gae_packed", (x[0], x[0], cu[[0, 2, 1, 2]]), {}, ValueError, "cu_seqlens must rise from 0"),
    ("gae_packed", (x[0], x[0], cu), {"bootstrap": x[0]}, ValueError, "bootstrap must be"),
    ("gae_packed", (x[0], x[0], cu), {"lam": 2}, ValueError, "lam must be at most 1"),
    (
        "gae_packed",
        (x[0], x[0], cu),
        {"mask": mask},
        ValueError,
        "mask must have the shape of rewards",
    ),
    ("preference_loss", (x, mask), {}, ValueError, "loss='dpo' needs ref_logp"),
    ("preference_loss", (x, mask, x), {"loss": "simpo"}, ValueError, "'simpo' has no ref_logp"),
    (
        "preference_loss",
        (x[:1], mask[:1], x[:1]),
        {},
        ValueError,
        r"\[2B, T\], chosen .*, got 1 rows",
    ),
    ("preference_loss", (x[0], mask[0], x[0]), {}, ValueError, r"logp must be \[2B, T\]"),
    ("preference_loss", (x, mask, x), {"beta": 0.0}, ValueError, "beta must be"),
    (
        "preference_loss",
        (x, mask, x),
        {"loss": "ipo", "beta": 1e-20},  # its (1/(2β))² is 2.5e39
        ValueError,
        "beta must be at least 1e-15",
    ),
    ("preference_loss", (x, mask, x), {"loss": "kto"}, ValueError, "loss must be one of dpo, ipo"),
    (
        "preference_loss",
        (x, mask, x),
        {"loss": "ipo", "margin": 1.0},
        ValueError,
        "margin 1.0 has no",
    ),
    ("preference_loss", (x, mask, x), {"label_smoothing": 0.6}, ValueError, "label_smoothing must"),
    ("kto_loss", (x, mask, x, mask), {}, ValueError, r"desirable must be \[B\]"),
    ("kto_loss", (x, mask, x, x[:, 0]), {}, TypeError, "desirable must be bool"),
    ("kto_loss", (x, mask, x, mask[:, 0]), {"kl": torch.nan}, ValueError, "kl must be"),
    ("kto_loss", (x, mask, x, mask[:, 0]), {"kl": x[0, 0] * torch.nan}, ValueError, "kl must be"),
    (
        "kto_loss",
        (x, mask, x, mask[:, 0]),
        {"kl": x[0]},
        ValueError,
        "kl must be a number or a 0-dim",
    ),
    ("group_advantages", (x, 3), {}, ValueError, r"scores must be \[B\]"),
    ("group_advantages", (x[0], 2), {}, ValueError, "group_size 2 must divide .*, 3"),
    ("group_advantages", (x[0], 1), {}, ValueError, "group_size must be at least 2, got 1"),
    ("group_advantages", (x[0], 3.0), {}, TypeError, "group_size must be an int, got float"),
    ("group_advantages", (x[0], 3), {"method": "gae"}, ValueError, "method must be one of grpo, r"),
    ("group_advantages", (x[0], 3), {"method": "opo"}, ValueError, "lengths and method='opo' need"),
    (
        "group_advantages",
        (x[0], 3),
        {"method": "opo", "lengths": -cu},
        ValueError,
        "lengths must be at least 0, got -3",
    ),
    ("group_advantages", (x[0], 3), {"lengths": cu}, ValueError, "lengths and method='opo' need"),
    (
        "group_advantages",
        (x[0], 3),
        {"lengths": x[0], "method": "opo"},
        TypeError,
        "lengths must be int32 or int64",
    ),
    ("rollout_correction", (x, x[0], mask), {}, ValueError, "rollout_logp must have the shape of"),
    ("rollout_correction", (x, x, x), {}, TypeError, "mask must be bool"),
    ("rollout_correction", (x, x, mask), {"mode": "tis"}, ValueError, "mode must be one of trunc"),
    ("rollout_correction", (x, x, mask), {"level": "row"}, ValueError, "level must be one of tok"),
    ("rollout_correction", (x, x, mask), {"low": 2.0}, ValueError, "low must be below high 2.0"),
    ("rollout_correction", (x, x, mask), {"high": 0.0}, ValueError, "high must be above 0"),
    ("rollout_correction", (x, x, mask), {"reject": "mean_k1"}, ValueError, "need each other"),
    ("rollout_correction", (x, x, mask), {"reject_above": 1.0}, ValueError, "need each other"),
    (
        "rollout_correction",
        (x, x, mask),
        {"reject": "mean", "reject_above": 1.0},
        ValueError,
        "reject must be one of mean_k1",
    ),
    ("rollout_correction", (x, x, mask), {"veto": 2.0}, ValueError, "veto must be at most 1"),
    ("rollout_correction", (x, x, mask), {"batch_normalize": 1}, TypeError, "must be True or Fal"),
    ("rollout_correction", (x, x, mask), {"group": 1}, TypeError, "group must be a ProcessGroup"),
    ("value_loss", (x, None, x, mask), {}, ValueError, "clip 0.2 needs old_values"),
    ("value_loss", (x, x, x[:, :2], mask), {}, ValueError, "returns must have the shape of values"),
    ("gae", (x, x[0], mask), {}, ValueError, "values must have the shape of rewards"),
    ("gae", (x, x, mask), {"gamma": 1.5}, ValueError, "gamma must be at most 1"),
    ("gae", (x, x, mask), {"bootstrap": x}, ValueError, "bootstrap must be"),
    ("gae", (x, x, mask), {"holes": "drop"}, ValueError, "holes must be one of skip, zero"),
    ("gae", (x, x, mask), {"dones": x}, TypeError, "dones must be bool"),
    ("token_kl", (x, x, "k4"), {}, ValueError, "estimator must be one of k1, k2, k3, abs"),
    ("token_kl", (x, x.long()), {}, TypeError, "ref_logp must be float32"),
    (
        "kl_penalized_rewards",
        (x[0], x, x, mask),
        {"beta": 0.1},
        ValueError,
        r"scores must be \[B\]",
    ),
    (
        "kl_penalized_rewards",
        (x[:, 0], x, x, mask),
        {"beta": -1},
        ValueError,
        "beta must be at leas",
    ),
    ("pairwise_loss", (x, x[0]), {}, ValueError, "rejected must have the shape of chosen"),
    ("pairwise_loss", (x, x, x[0]), {}, ValueError, "margin must have the shape of chosen"),
    ("masked_mean", (x, mask[:1]), {}, ValueError, "mask must have the shape of values"),
    ("masked_whiten", (x, mask.int()), {}, TypeError, "mask must be bool"),
]


CASES += [  # the same options, the same errors
    ("linear_policy_loss", (hidden, weight, labels, x, x, mask), options, kind, message)
    for name, _, options, kind, message in CASES
    if name == "policy_loss" and options and "entropy_coef" not in options  # it has the entropy
]


FULL = {  # arguments that are right
    "token_logprobs": (logits, labels),
    "linear_token_logprobs": (hidden, weight, labels),
    "linear_token_kl": TIED,
    "linear_policy_loss": (hidden, weight, labels, x, x, mask),
}
LINEAR = tuple(FULL)[1:]
ones, nan = torch.ones(2, 3), float("nan")
DOWN, UP = torch.zeros(2, 4), torch.zeros(5, 2)
ADAPTERS = [(name, "lora") for name in LINEAR] + [("linear_token_kl", "ref_lora")]
CASES += [
    (name, FULL[name], {lora: given}, kind, message.replace("lora", lora))
    for name, lora in ADAPTERS
    for given, kind, message in [
        ((DOWN, UP), TypeError, r"^lora must be \(A \[r, H\], B \[V, r\], scale\)"),
        (DOWN, TypeError, r"^lora must be \(A \[r, H\], B \[V, r\], scale\)"),
        ((DOWN.t(), UP, 1.0), ValueError, r"^lora's A must be \[r, H\] = \[4, 4\]"),
        ((DOWN, UP[:4], 1.0), ValueError, r"^lora's B must be \[V, r\] = \[5, 2\]"),
        ((DOWN, UP.half(), 1.0), TypeError, "^lora's B must have the dtype of"),
        ((DOWN, UP, nan), ValueError, "^lora's scale must be finite"),
        ((DOWN.long(), UP, 1.0), TypeError, "^lora's A must be float32"),
        ((DOWN.to("meta"), UP, 1.0), ValueError, "^lora's A must be on the device of"),
    ]
]
CASES += [
    (name, FULL[name], options, kind, message)
    for names, options, kind, message in [
        (FULL, {"temperature": True}, TypeError, "temperature must be a number, got bool"),
        (FULL, {"temperature": nan}, ValueError, "temperature must be finite"),
        (FULL, {"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        (FULL, {"temperature": torch.tensor(1.0)}, ValueError, "temperature must have the shape"),
        (FULL, {"temperature": ones.int()}, TypeError, "temperature must be float32"),
        (FULL, {"temperature": ones.to("meta")}, ValueError, "temperature must be on the device"),
        (
            FULL,
            {"temperature": ones - 1},
            ValueError,
            r"temperature\[0, 0\] is 0.0, not finite and",
        ),
        (FULL, {"temperature": ones * nan}, ValueError, r"temperature\[0, 0\] is nan"),
        (FULL, {"softcap": 0.0}, ValueError, "softcap must be above 0"),
        (FULL, {"softcap": True}, TypeError, "softcap must be a number, got bool"),
        (
            FULL,
            {"softcap": torch.tensor(2.0)},
            TypeError,
            "softcap must be a number, got a float32",
        ),
        (LINEAR, {"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        (LINEAR, {"bias": torch.zeros(1, 5)}, ValueError, r"bias must be \[V\] = \[5\]"),
        (
            LINEAR,
            {"bias": torch.zeros(5).double()},
            TypeError,
            "bias must have the dtype of hidden",
        ),
        (LINEAR, {"bias": torch.zeros(5).to("meta")}, ValueError, "bias must be on the device of"),
        (LINEAR, {"compact": None}, TypeError, "compact must be True or False, got NoneType"),
        (LINEAR, {"compact": "no"}, TypeError, "compact must be True or False, got str"),
        (LINEAR, {"deterministic": 1}, TypeError, "deterministic must be True or False, got int"),
        (tuple(FULL)[:2], {"entropy": "yes"}, TypeError, "entropy must be True or False, got str"),
        (
            tuple(FULL)[:2],
            {"entropy": ones},
            TypeError,
            "entropy must be True or False, got a float",
        ),
        (
            ["token_logprobs"],
            {"inplace_backward": 1},
            TypeError,
            "inplace_backward must be True or",
        ),
    ]
    for name in names
]
CASES += [
    (name, (*given, *FULL[name][3:]), {}, kind, message)
    for name in LINEAR
    for given, kind, message in [
        ((None, weight, labels), TypeError, "hidden must be a tensor, got NoneType"),
        ((hidden.int(), weight, labels), TypeError, "hidden must be float32"),
        (
            (torch.tensor(1.0), weight, labels),
            ValueError,
            "hidden must have at least one dimension",
        ),
        ((hidden, None, labels), TypeError, "weight must be a tensor"),
        ((hidden, weight[None], labels), ValueError, r"weight must be \[V, H\]"),
        ((hidden, weight.to("meta"), labels), ValueError, "weight must be on the device of hidden"),
        ((hidden, weight, None), TypeError, "labels must be a tensor"),
        ((hidden, weight, labels.float()), TypeError, "labels must be int64"),
        ((hidden, weight, labels[..., None]), ValueError, "labels must have the leading shape"),
        ((hidden, weight, outside(-1)), ValueError, r"labels\[1, 2\] is -1"),
        ((hidden, weight[:0], labels), ValueError, r"labels\[0, 0\] is 0, outside \[0, 0\)"),
    ]
]
KL, PPO = FULL["linear_token_kl"], FULL["linear_policy_loss"]
CASES += [
    ("linear_token_kl", (*KL[:3], None), {}, TypeError, "ref_hidden must be a tensor"),
    (
        "linear_token_kl",
        (*KL[:3], hidden.to("meta")),
        {},
        ValueError,
        "ref_hidden must be on the d",
    ),
    ("linear_token_kl", (*KL, weight.double()), {}, TypeError, "ref_weight must have the dtype of"),
    (
        "linear_token_kl",
        (*KL, weight.to("meta")),
        {},
        ValueError,
        "ref_weight must be on the devic",
    ),
    ("linear_token_kl", KL, {"direction": None}, ValueError, "direction must be one of reverse, f"),
    ("linear_policy_loss", (*PPO[:5], mask.int()), {}, TypeError, "mask must be bool"),
    (
        "linear_policy_loss",
        (*PPO[:5], mask.to("meta")),
        {},
        ValueError,
        "mask must be on the device",
    ),
    ("linear_policy_loss", (*PPO[:5], None), {}, TypeError, "mask must be a tensor"),
    ("linear_policy_loss", (*PPO[:3], None, x, mask), {}, TypeError, "old_logp must be a tensor"),
    (
        "linear_policy_loss",
        (*PPO[:4], x[0], mask),
        {},
        ValueError,
        "advantages must have the shape",
    ),
    (
        "linear_policy_loss",
        (hidden[0, 0], weight, labels[0, 0], x[0, 0], x[0, 0], mask[0, 0]),
        {},
        ValueError,
        r"hidden must be \[..., T, H\]",
    ),
]
SETS = labels[..., None]  # of one token, the label
WRONG_SETS = {  # what a set may not hold, and what is said of it
    "4, -2": "must hold tokens in .*got .4, -2. in row 0",
    "0, 5": r"must hold tokens in \[0, 5\)",
    f"0, {2**40}": "must hold tokens in",
    "3, 4": "must hold the label in each row .*, 0, got .3, 4. in row 0",
    "0, 1, 0": "must hold each token once, got .0, 1, 0. in row 0",
}


def sets_of(tokens: str) -> torch.Tensor:
    return torch.tensor([int(token) for token in tokens.split(",")]).expand(2, 3, -1)


CASES += [
    (name, FULL[name], {"support": support}, kind, f"^support {message}")
    for name in tuple(FULL)
    for support, kind, message in [
        (labels.tolist(), TypeError, "must be a tensor, got list"),
        (SETS.float(), TypeError, "must be int64 or int32, got a float32"),
        (SETS.bool(), TypeError, "must be int64 or int32, got a bool"),
        (labels, ValueError, r"must be \[2, 3, K\]"),
        (SETS[:, :2], ValueError, r"must be \[2, 3, K\]"),
        (SETS[None], ValueError, r"must be \[2, 3, K\]"),
        (SETS.to("meta"), ValueError, "must be on the device of labels"),
        (torch.arange(999).expand(2, 3, -1), ValueError, r"must hold tokens in.{,160}$"),
        *((sets_of(tokens), ValueError, said) for tokens, said in WRONG_SETS.items()),
    ]
]
LOSSES = ("policy_loss", "linear_policy_loss")
FULL["policy_loss"] = (x, x, x, mask)
CASES += [
    (name, FULL[name], options, kind, message)
    for name in LOSSES
    for options, kind, message in [
        ({"clip_low": -0.1}, ValueError, "clip_low must be at least 0"),
        ({"clip_low": "0.2"}, TypeError, "clip_low must be a number, got str"),
        ({"clip_high": True}, TypeError, "clip_high must be a number, got bool"),
        ({"dual_clip": nan}, ValueError, "dual_clip must be finite"),
        ({"delta": 0.0}, ValueError, "delta must be above 0"),
        ({"delta": 2.0, "loss": "sapo"}, ValueError, "delta 2.0 needs loss='ppo' or 'dppo_tv' or"),
        ({"dual_clip": 2.0, "loss": "sapo"}, ValueError, "dual_clip 2.0 needs loss='ppo', got"),
        ({"loss": "sapo", "ratio": "sequence"}, ValueError, "loss='sapo' needs ratio='token', got"),
        ({"loss": "gmpo"}, ValueError, "loss='gmpo' needs ratio='sequence', got ratio='token'"),
        ({"sapo_tau_neg": 0}, ValueError, "sapo_tau_neg must be above 0"),
        ({"vespo_k_pos": -1.0}, ValueError, "vespo_k_pos must be at least 0"),
        *(
            (
                {"loss": "vespo", "ratio": "sequence", **weights},
                ValueError,
                f"{sign} .*up to e.{e},",
            )
            for sign, weights, e in [
                ("pos", {"vespo_lambda_pos": 100.0, "vespo_k_pos": 0.0}, 100),
                ("neg", {"vespo_lambda_neg": 1e-20, "vespo_k_neg": 5.0}, 100),
            ]
        ),
        ({"unbiased_kl": 1}, TypeError, "unbiased_kl must be"),
        ({"ratio": None}, ValueError, "ratio must be one of"),
        ({"loss": None}, ValueError, "loss must be one of"),
        ({"normalizer": True}, TypeError, "normalizer must be a number, got bool"),
        ({"normalizer": torch.ones(1)}, ValueError, "normalizer must be a 0-dim tensor"),
        ({"normalizer": torch.tensor(True)}, TypeError, "normalizer must be a number, got a bool"),
        ({"normalizer": torch.tensor(-3)}, ValueError, "normalizer must be finite and at least 0"),
        ({"normalizer": torch.tensor(nan)}, ValueError, "normalizer must be finite and at least 0"),
        ({"normalizer": ones[0, 0].to("meta")}, ValueError, "normalizer must be on the device of"),
        ({"importance_weights": x[0]}, ValueError, "importance_weights must have the shape of"),
        ({"importance_weights": 1.0}, TypeError, "importance_weights must be a tensor, got float"),
        ({"ref_logp": x.int()}, TypeError, "ref_logp must be float32"),
        ({"entropy_coef": nan}, ValueError, "entropy_coef must be finite"),
        ({"kl_coef": nan, "ref_logp": x}, ValueError, "kl_coef must be finite"),
        ({"kl_coef": None}, TypeError, "kl_coef must be a number, got NoneType"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of k1, k2, k3, abs"),
    ]
]
CASES += [
    (
        name,
        args,
        {"group": "world"},
        TypeError,
        "group must be a ProcessGroup of this rank, got str",
    )
    for name, args in [
        *((name, FULL[name]) for name in LINEAR),
        ("masked_mean", (x, mask)),
        ("masked_whiten", (x, mask)),
    ]
]
CASES += [
    (
        "masked_whiten",
        (x, mask),
        {"shift_mean": "no"},
        TypeError,
        "shift_mean must be True or Fals",
    ),
]


@pytest.mark.parametrize(
    ("name", "args", "options", "kind", "message"), CASES,
    ids=[f"{c[0]}: {c[4][:24]}" for c in CASES],
)  # fmt: skip
def test_refused(name: str, args: tuple, options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        getattr(rf, name)(*args, **options)


def test_a_bad_label_inside_a_compiled_graph_is_caught_by_the_kernel() -> None:
    compiled = torch.compile(rf.token_logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="outside|out of bounds"):
        compiled(logits, outside(7))


@pytest.mark.parametrize("name", tuple(FULL)[:3])  # the loss calls linear_token_logprobs's
def test_a_wrong_set_inside_a_compiled_graph_is_caught_by_the_kernel(name: str) -> None:
    """Before it is read: a token outside the vocabulary would be read beside the head."""
    op = getattr(rf, name)
    compiled = torch.compile(
        lambda sets: op(*FULL[name], support=sets), fullgraph=True, backend="aot_eager"
    )
    for tokens in WRONG_SETS:
        with pytest.raises((RuntimeError, ValueError), match="support:? "):
            compiled(sets_of(tokens))


@pytest.mark.parametrize("tokens", WRONG_SETS)
def test_a_wrong_set_is_caught_where_there_is_no_kernel(tokens: str) -> None:
    with pytest.raises(ValueError, match=f"^support {WRONG_SETS[tokens]}"):
        support.KERNEL.fallback(sets_of(tokens).flatten(0, 1), labels.flatten(), 5, False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", OPS)
def test_tensors_that_are_not_strided_are_refused(name: str) -> None:
    """Sparse ones and nested ones, in every argument, with what came in one line."""
    drawn = list(OPS[name].samples(torch.Generator().manual_seed(0)))
    most = max(drawn, key=lambda sample: sum(map(torch.is_tensor, sample.arguments.values())))
    for argument, value in most.arguments.items():
        if not torch.is_tensor(value):
            continue
        rows = list(value.reshape(-1, 1))
        others = [value.to_sparse(), torch.nested.nested_tensor(rows)]
        others.append(torch.nested.nested_tensor(rows, layout=torch.jagged))
        others += [value.tolist()] if value.dim() else []  # a number may be right
        for other in (*others, value.numpy()):
            with pytest.raises(TypeError, match=rf"^{argument} must be .{{,140}}$"):
                OPS[name].function(**{**most.arguments, argument: other})


def test_chunk_budget_is_checked() -> None:
    with pytest.raises(ValueError, match="n_bytes must be at least 1"), rf.chunk_budget(0.5):
        pass


def test_debug_looks_at_labels_off_the_cpu_too_and_ends() -> None:
    """A meta tensor has no values: looking at them fails, and so shows that somebody looked."""
    x, y = logits.to("meta"), labels.to("meta")
    rf.token_logprobs(x, y)
    with rf.debug(), pytest.raises((NotImplementedError, RuntimeError)):
        rf.token_logprobs(x, y)
    rf.token_logprobs(x, y)
