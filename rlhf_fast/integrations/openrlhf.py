"""OpenRLHF's losses, log-probs and GAE on the kernels of this package.

    from rlhf_fast.integrations import openrlhf as fast_openrlhf
    fast_openrlhf.patch()         # until unpatch(); or as a context manager

``patch()`` replaces ``PolicyLoss``, ``ValueLoss``, ``PairWiseLoss``, ``log_probs_from_logits``,
``compute_approx_kl`` and ``RemoteExperienceMaker.get_advantages_and_returns`` in every module of
OpenRLHF that uses them; each may also be used by itself. OpenRLHF computes its losses in Ray's
worker processes, so a call in the script that starts the training changes nothing: let Ray call it
in each worker, before anything else runs there:

    ray job submit --runtime-env-json \\
        '{"worker_process_setup_hook": "rlhf_fast.integrations.openrlhf.patch"}' \\
        -- python -m openrlhf.cli.train_ppo_ray ...

``PolicyLoss`` with an ``is_correction_level`` of token and the gating ratio takes its weights from
``rollout_correction``; with another one it keeps OpenRLHF's own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import (
    gae,
    masked_mean,
    pairwise_loss,
    policy_loss,
    rollout_correction,
    token_kl,
    token_logprobs,
    value_loss,
)
from .patching import Patch, Replacement, found

VERSIONS = "0.11.2"
_PolicyLoss, _ValueLoss, KL_IS_WEIGHT_CLIP = found(
    "OpenRLHF",
    "openrlhf",
    VERSIONS,
    "openrlhf==0.11.2",
    "openrlhf.models.loss:PolicyLoss",
    "openrlhf.models.loss:ValueLoss",
    "openrlhf.models.utils:KL_IS_WEIGHT_CLIP",
)

MAX_KL = 10.0


class PolicyLoss(_PolicyLoss):
    """PPO's clipped loss, or GSPO's; arguments, checks and results as in OpenRLHF's."""

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio); the last two are None without a
        correction."""
        corrects = self.is_correction_level != "off"
        by_ratio = self.is_correction_level == "token" and self.is_correction_gating == "ratio"
        if corrects and (not by_ratio or self.policy_loss_type == "gspo"):
            return super().forward(
                log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size,
                batch_num_tokens, global_batch_size,
            )  # fmt: skip
        mask = _mask(action_mask, log_probs)
        weights = vllm_kl = is_filter_ratio = None
        if corrects:
            low, high = self.is_correction_threshold
            weights, _, gap = rollout_correction(
                old_log_probs,
                rollout_log_probs,
                mask,
                mode="truncate" if self.is_correction_mode == "clip" else "mask",
                low=low,
                high=high,
            )
            vllm_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
            is_filter_ratio = gap.clipfrac
        loss, stats = policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            importance_weights=weights,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            ratio={"ppo": "token", "gspo": "sequence"}[self.policy_loss_type],
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        )
        return loss, stats.clipfrac, stats.old_kl_k1, vllm_kl, is_filter_ratio


class ValueLoss(_ValueLoss):
    """The critic's squared error, clipped if ``clip_eps`` is given."""

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        loss, _ = value_loss(
            values,
            old_values,
            returns,
            _mask(action_mask, values),
            clip=self.clip_eps,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        )
        return loss


class PairWiseLoss(nn.Module):
    """The reward model's loss: mean −log σ(chosen − rejected − margin)."""

    def forward(
        self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None
    ) -> Tensor:
        return pairwise_loss(chosen_reward, reject_reward, margin)[0]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label, float32: logits [..., V], labels [...].

    Unlike OpenRLHF's, it does not divide ``logits`` in place: they keep their values.
    """
    return token_logprobs(logits, labels, temperature=temperature)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Per-token KL estimate k1, k2 or k3, held within ±10; see OpenRLHF for the arguments."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator must be k1, k2 or k3, got {kl_estimator!r}")
    value = token_kl(log_probs, log_probs_base, kl_estimator).clamp(-MAX_KL, MAX_KL)
    if not unbiased_gradient:
        return value
    slope = token_kl(log_probs, log_probs_base, "k2")
    if log_probs_old is not None:
        ratio = (log_probs.float() - log_probs_old.float()).exp()
        slope = slope * ratio.clamp(max=KL_IS_WEIGHT_CLIP).detach()
    return value.detach() + slope - slope.detach()


@torch.no_grad()
def get_advantages_and_returns(
    self: object, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [batch, response]; a masked step has reward and value 0.

    Both are 0 where masked.
    """
    mask = None if action_mask is None else action_mask.bool()
    return gae(rewards, values, mask, gamma=gamma, lam=lambd, holes="zero")


def _mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if action_mask is None else action_mask.bool()


def _aggregation(
    token_level: bool,
    dp_size: int,
    batch_num_tokens: float | None,
    global_batch_size: float | None,
) -> dict[str, object]:
    """Gradients are averaged over ranks, so a rank divides by its share of the global count."""
    count = batch_num_tokens if token_level else global_batch_size
    return {
        "aggregation": "token-mean" if token_level else "seq-mean-token-mean",
        "normalizer": None if count is None else count / dp_size,
    }


_LOSS, _UTILS = "openrlhf.models.loss", "openrlhf.models.utils"
_COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None)"
_PATCH = Patch(
    "OpenRLHF",
    "openrlhf",
    VERSIONS,
    Replacement(
        _LOSS,
        "PolicyLoss",
        {
            "(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, "
            "policy_loss_type='ppo', is_correction_level='off', is_correction_mode='mask', "
            "is_correction_gating='ratio', is_correction_threshold=(0.5, 5.0)) "
            "(self, log_probs, old_log_probs, advantages, action_mask=None, "
            f"rollout_log_probs=None, {_COUNTS}": PolicyLoss
        },
    ),
    Replacement(
        _LOSS,
        "ValueLoss",
        {
            "(self, clip_eps=None, token_level_loss=True) "
            f"(self, values, old_values, returns, action_mask=None, {_COUNTS}": ValueLoss
        },
    ),
    Replacement(
        _LOSS, "PairWiseLoss", {"(self, chosen_reward, reject_reward, margin=None)": PairWiseLoss}
    ),
    Replacement(
        _UTILS,
        "log_probs_from_logits",
        {"(logits, labels, temperature=1.0)": log_probs_from_logits},
    ),
    Replacement(
        _UTILS,
        "compute_approx_kl",
        {
            "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', "
            "unbiased_gradient=False)": compute_approx_kl
        },
    ),
    Replacement(
        "openrlhf.trainer.ppo_utils.experience_maker",
        "RemoteExperienceMaker.get_advantages_and_returns",
        {"(self, values, rewards, action_mask, gamma, lambd)": get_advantages_and_returns},
    ),
)


def patch() -> Patch:
    """Replace OpenRLHF's functions until ``unpatch()``, or to the end of a ``with``.

    Raises:
        UnknownSignature: this OpenRLHF is not one the adapter was written for; nothing was
            replaced.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put OpenRLHF's own functions back."""
    _PATCH.undo()
