"""verl's losses and log-probs on the kernels of this package.

Importing this module registers, in verl's own registries, what its config then selects by name:

    VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=rlhf_fast

- policy loss ``rlhf_fast``: verl's "vanilla" (clip, clip-higher, dual clip, rollout weights, every
  ``loss_agg_mode``), from one kernel, with verl's metrics; ``rlhf_fast_gspo``, ``…_cispo``,
  ``…_sapo``, ``…_geo_mean``, ``…_dppo_tv`` and ``…_dppo_kl``: its losses of these names;
- advantage estimator ``rlhf_fast_gae``: verl's "gae". verl 0.9.1 gives a registered estimator no
  values (``compute_advantage`` passes them only for ``adv_estimator=gae``), so this name serves
  trainers that do; in verl's own, keep ``algorithm.adv_estimator=gae`` and ``patch()``.

``patch()`` also replaces ``compute_gae_advantage_return``, ``compute_value_loss``, ``kl_penalty``,
``masked_whiten``, ``logprobs_from_logits`` and ``linear_cross_entropy`` in every module of verl
that uses them, until ``unpatch()``. Each Ray worker has to call it: name a module of yours that
does in VERL_USE_EXTERNAL_MODULES.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import (
    gae,
    linear_token_logprobs,
    masked_mean,
    policy_loss,
    token_kl,
    token_logprobs,
    value_loss,
)
from .. import masked_whiten as masked_whiten_op
from ..ops.policy_loss import MAX_LOG_RATIO, row_means
from .patching import Patch, Replacement, found

VERSIONS = "0.9.1"
register_policy_loss, register_adv_est = found(
    "verl",
    "verl",
    VERSIONS,
    "verl==0.9.1",
    "verl.trainer.ppo.core_algos:register_policy_loss",
    "verl.trainer.ppo.core_algos:register_adv_est",
)

MAX_KL = 10.0
ESTIMATORS = {
    "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3",
}  # fmt: skip

# verl's loss modes: the options of ``policy_loss`` beside clips and aggregation, from its config.
MODES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vanilla": lambda config: {"dual_clip": config.get("clip_ratio_c", 3.0)},
    "gspo": lambda config: {"ratio": "sequence_token"},
    "cispo": lambda config: {"loss": "cispo"},
    "sapo": lambda config: {
        "loss": "sapo", "sapo_tau_pos": config.tau_pos, "sapo_tau_neg": config.tau_neg,
    },
    "geo_mean": lambda config: {"loss": "gmpo", "ratio": "sequence"},
    "dppo_tv": lambda config: {"loss": "dppo_tv", "delta": config.get("clip_ratio_c", 20.0)},
    "dppo_kl": lambda config: {"loss": "dppo_kl", "delta": config.get("clip_ratio_c", 20.0)},
}  # fmt: skip


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    mode: str = "vanilla",
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss of verl's actor; all tensors [batch, response].

    Args:
        config: verl's ActorConfig; read are clip_ratio, clip_ratio_low, clip_ratio_high,
            global_batch_info and what ``MODES`` reads.
        mode: of verl's loss modes the one that is computed, a key of ``MODES``.

    Returns:
        (loss, metrics): actor/pg_clipfrac, actor/ppo_kl and actor/pg_clipfrac_lower. Of geo_mean
        the first counts the tokens that the clip cut off, the last none (verl: those of positive
        and of negative advantage that are outside on either side).
    """
    if config is None:
        raise ValueError("config must be verl's actor config, got None")
    low, high = config.clip_ratio_low, config.clip_ratio_high
    counts = config.global_batch_info
    if mode in ("sapo", "geo_mean"):  # whatever verl's config says
        loss_agg_mode = "seq-mean-token-mean"
    if mode == "geo_mean":  # the mean over the rows here, empty ones too
        counts = {"global_batch_size": len(response_mask)}
        if rollout_is_weights is not None:
            log_weights = row_means((rollout_is_weights + 1e-10).log(), response_mask.bool())
            rollout_is_weights = log_weights.exp()
    aggregation, normalizer, scale = _aggregation(loss_agg_mode, response_mask, **counts)
    total, stats = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask.bool(),
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        aggregation=aggregation,
        normalizer=normalizer,
        importance_weights=rollout_is_weights,
        **MODES[mode](config),
    )
    # verl's metric is of log-ratios held at ±20; stats.old_kl_k1 is of them as they are
    held = (old_log_prob - log_prob).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ppo_kl = masked_mean(held, response_mask.bool())
    numbers = torch.stack([stats.clipfrac, ppo_kl, stats.dual_clipfrac]).tolist()
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return total * scale, dict(zip(names, numbers, strict=True))


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns), [batch, response]; observation tokens are stepped over.

    Where masked both are 0. A batch with fewer than two response tokens, which verl refuses, is
    whitened to 0.
    """
    mask = response_mask.bool()
    advantages, returns = gae(
        token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam), holes="skip"
    )
    return masked_whiten_op(advantages, mask), returns


def gae_estimator(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any,
    values: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """``compute_gae_advantage_return`` as a registered estimator; gamma and lam from config."""
    if values is None:
        raise ValueError(
            "adv_estimator=rlhf_fast_gae got no values: this verl passes them only for "
            "adv_estimator=gae. Keep that and call rlhf_fast.integrations.verl.patch()."
        )
    return compute_gae_advantage_return(
        token_level_rewards, values, response_mask, config.gamma, config.lam
    )


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(clipped value loss, share of tokens that the clip cut off); tensors [batch, response]."""
    aggregation, normalizer, scale = _aggregation(
        loss_agg_mode, response_mask, dp_size, batch_num_tokens, global_batch_size,
        loss_scale_factor,
    )  # fmt: skip
    loss, stats = value_loss(
        vpreds,
        values,
        returns,
        response_mask.bool(),
        clip=cliprange_value,
        aggregation=aggregation,
        normalizer=normalizer,
    )
    return loss * scale, stats.clipfrac


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL estimate: kl or k1, abs, mse or k2, low_var_kl or k3 (held within ±10).

    With a trailing "+" the value is the estimate and the gradient that of k2, KL's own.
    """
    name = kl_penalty.removesuffix("+")
    if name not in ESTIMATORS:
        raise NotImplementedError(
            f"kl_penalty must be one of {', '.join(ESTIMATORS)}; got {name!r}"
        )
    value = token_kl(logprob, ref_logprob, ESTIMATORS[name])
    if ESTIMATORS[name] == "k3":
        value = value.clamp(-MAX_KL, MAX_KL)
    if name == kl_penalty:
        return value
    slope = token_kl(logprob, ref_logprob, "k2")
    return slope - slope.detach() + value.detach()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Whitened over mask, and 0 where masked (verl leaves whitened garbage there)."""
    return masked_whiten_op(values, mask.bool(), shift_mean=shift_mean)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, float32, in the shape of logits' rows: logits [..., V], as
    many labels in any shape (verl has [N, V] beside [1, N]).

    As with verl's flash-attention path, ``inplace_backward`` lets the backward overwrite logits.
    """
    if labels.numel() == logits.shape[:-1].numel():
        labels = labels.reshape(logits.shape[:-1])
    return token_logprobs(logits, labels, inplace_backward=inplace_backward)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), both [N], of labels (N of them) under the head: no logits are made.

    Args:
        hidden: [..., H]; weight: [V, H]; labels: [...].
        reduction: "none", the only one that verl uses.
        dist_process_group: None; a vocabulary-parallel head keeps verl's own, which leaves the
            sum of d_hidden over the ranks to Megatron, while ``linear_token_logprobs(group=)``
            makes it itself.
    """
    if reduction != "none" or dist_process_group is not None:
        raise ValueError(
            "linear_cross_entropy takes reduction='none' and dist_process_group=None; got "
            f"{reduction!r} and {dist_process_group}"
        )
    return linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        entropy=True,
    )


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[str, float | None, float]:
    """verl's loss_agg_mode and global counts as (aggregation, normalizer, factor of the loss).

    verl multiplies by dp_size, since data parallelism averages the gradients over ranks.
    """
    if mode == "token-sum":
        return mode, None, dp_size
    count, name = global_batch_size, "global_batch_size"
    if mode == "token-mean":
        count, name = batch_num_tokens, "batch_num_tokens"
    if count is None and dp_size > 1:
        raise ValueError(f"{name} is required when dp_size > 1")
    if mode == "seq-mean-token-sum-norm":
        return "seq-mean-token-sum", count, dp_size / (loss_scale_factor or mask.shape[-1])
    return mode, count, dp_size


_CORE, _TORCH = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
_PATCH = Patch(
    "verl",
    "verl",
    VERSIONS,
    Replacement(
        _CORE,
        "compute_gae_advantage_return",
        {"(token_level_rewards, values, response_mask, gamma, lam)": compute_gae_advantage_return},
    ),
    Replacement(
        _CORE,
        "compute_value_loss",
        {
            "(vpreds, returns, values, response_mask, cliprange_value, "
            "loss_agg_mode='token-mean', dp_size=1, batch_num_tokens=None, "
            "global_batch_size=None, loss_scale_factor=None)": compute_value_loss
        },
    ),
    Replacement(_CORE, "kl_penalty", {"(logprob, ref_logprob, kl_penalty)": kl_penalty}),
    Replacement(_TORCH, "masked_whiten", {"(values, mask, shift_mean=True)": masked_whiten}),
    Replacement(
        _TORCH,
        "logprobs_from_logits",
        {"(logits, labels, inplace_backward=True)": logprobs_from_logits},
    ),
    Replacement(
        "verl.utils.kernel.linear_cross_entropy",
        "linear_cross_entropy",
        {
            "(ctx, hidden, weight, labels, temperature=1.0, reduction='none', "
            "dist_process_group=None)": linear_cross_entropy
        },
    ),
)


def register() -> None:
    """Make the names above known to verl; importing this module does it."""
    register_policy_loss("rlhf_fast")(compute_policy_loss)
    for mode in MODES.keys() - {"vanilla"}:
        loss = functools.partial(compute_policy_loss, mode=mode)
        register_policy_loss(f"rlhf_fast_{mode}")(loss)
    register_adv_est("rlhf_fast_gae")(gae_estimator)


def patch() -> Patch:
    """Replace verl's functions until ``unpatch()``, or to the end of a ``with``.

    Raises:
        UnknownSignature: this verl is not one the adapter was written for; nothing was replaced.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put verl's own functions back."""
    _PATCH.undo()


register()
