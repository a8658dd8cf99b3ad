"""TRL's log-probs, entropies, fused head and reward loss on the kernels of this package.

    from rlhf_fast.integrations import trl as fast_trl
    fast_trl.patch()              # until unpatch(); or: with fast_trl.patch(): trainer.train()

What is replaced, in every module of TRL that uses it:

- ``selective_log_softmax``, ``entropy_from_logits``, ``selective_log_softmax_and_entropy``: one
  read of the logits instead of several [..., V] temporaries;
- the fused head of GRPO, RLOO, SFT, DPO, KTO and AsyncGRPO (TRL 1.16; in 1.12 of AsyncGRPO alone)
  by ``linear_token_logprobs``, which leaves prompt and padding tokens out of the head's products,
  on a CPU too. TRL's own stays where the head is one that DeepSpeed ZeRO-3 has sharded, for DPO's
  ``use_weighting``, and for DPO and KTO of a model with softcapped logits;
- the loss of RewardTrainer;
- ``masked_mean`` and ``masked_whiten`` of PPOTrainer (TRL 1.12).

What stays TRL's own: the [B, T] arithmetic of GRPO's, RLOO's, DPO's and KTO's losses, of CPO's
(SimPO) and ORPO's, whose log-probs come from ``selective_log_softmax``, and PPOTrainer's GAE and
losses. They are written into ``_compute_loss`` and ``train()``, between metrics and data handling,
and cost nothing beside the head. For PPO with fused losses use ``rlhf-fast ppo``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import linear_token_logprobs, pairwise_loss, token_logprobs
from .. import masked_mean as masked_mean_op
from .. import masked_whiten as masked_whiten_op
from ..ops.check import IGNORE_INDEX
from .patching import Patch, Replacement, found

VERSIONS = "1.12.0 and 1.16.0"
LOGITS = 2**24  # at most so many are held where a metric needs them
_selective_log_softmax, _ChunkedLogProbFunction, _reward_compute_loss = found(
    "TRL",
    "trl",
    VERSIONS,
    "'trl==1.12.0', or 1.16.0",
    "trl.trainer.utils:selective_log_softmax",
    "trl.trainer.utils:_ChunkedLogProbFunction",
    "trl.trainer.reward_trainer:RewardTrainer.compute_loss",
)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of each index under softmax(logits / temperature), float32.

    Args:
        logits: [..., V].
        index: [...] int64. With several a row, [..., K], TRL's own function answers.
        row_mask: [...], 0 marks a row to skip: log-prob 0.
    """
    if index.dim() == logits.dim():
        options = {} if row_mask is None else {"row_mask": row_mask}
        return _selective_log_softmax(logits / temperature, index, **options)
    return token_logprobs(logits, _labels(index, row_mask), temperature=temperature)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with the entropy of each row, in one pass."""
    logp, entropy = token_logprobs(
        logits, _labels(index, row_mask), temperature=temperature, entropy=True
    )
    return logp, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of softmax(logits) in nats, [...]. ``chunk_size`` is not needed and ignored.

    Unlike TRL's, it is not NaN where a logit is −inf.
    """
    any_label = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, any_label, entropy=True)[1]


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    labels = index.long()
    return labels if row_mask is None else labels.masked_fill(row_mask == 0, IGNORE_INDEX)


class FusedHead:
    """In the place of ``_ChunkedLogProbFunction`` of TRL 1.16."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs", "entropy"),
    ) -> tuple[Tensor | None, ...]:
        known = {"log_probs", "entropy", "mean_logits", "is_top1"}
        # The mean of softcapped logits is that of every one of them; DPO's weighting wants squares.
        capped_mean = final_logit_softcapping is not None and "mean_logits" in outputs
        if set(outputs) - known or capped_mean or _sharded(weight):
            return _ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        options = (hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)
        if not {"entropy", "is_top1"} & set(outputs):
            logp, entropy = _head(*options, entropy=False), None
        else:
            logp, entropy = _head(*options, entropy=True)
        mean_logits = is_top1 = None
        with torch.no_grad():  # metrics
            if "mean_logits" in outputs:
                mean_logits = _mean_logits(hidden, weight, bias) * (logit_scale / temperature)
            if "is_top1" in outputs:
                is_top1 = _is_top1(hidden, weight, bias, targets, logp, entropy)
        return logp, entropy if "entropy" in outputs else None, None, mean_logits, is_top1


class FusedHeadOfAsyncGRPO:
    """In the place of ``_ChunkedLogProbFunction`` of TRL 1.12.

    TRL's own drops the entropy's gradient silently; here it flows.
    """

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        if _sharded(weight):
            return _ChunkedLogProbFunction.apply(
                last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale,
            )  # fmt: skip
        return _head(
            last_hidden, weight, None, targets, temperature, final_logit_softcapping, logit_scale,
            entropy=True,
        )  # fmt: skip


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    *,
    entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """logit_scale multiplies the logits before the softcap, so it may as well the operands."""
    if logit_scale != 1.0:
        hidden = hidden * logit_scale
        bias = None if bias is None else bias * logit_scale
    return linear_token_logprobs(
        hidden,
        weight.to(hidden.dtype),
        targets,
        bias=None if bias is None else bias.to(hidden.dtype),
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
    )


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with the head's mean row, in place of one with all of them. [N] float32."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)


def _is_top1(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor,
) -> Tensor:
    """Whether each target is its row's likeliest token, [N] bool.

    It is where p > ½. It is not where log p < −H, for the likeliest p is at least e^(−H). The
    logits of the other rows are computed once more, 2HV FLOPs each.
    """
    slack = 1e-3  # far above the rounding of both
    top = logp > math.log(0.5) + slack
    open_ = (~top & (logp >= -entropy - slack)).nonzero().flatten()
    dtype = hidden.dtype
    for rows in open_.split(max(1, LOGITS // len(weight))):
        logits = hidden[rows] @ weight.to(dtype).t()
        if bias is not None:
            logits += bias.to(dtype)
        top[rows] = logits.argmax(-1) == targets[rows]
    return top


def _sharded(weight: Tensor) -> bool:
    """ZeRO-3 gathers the head for the forward only; TRL's own gathers it again in the backward."""
    return hasattr(weight, "ds_id")


def use_compact_rows(device: torch.device) -> bool:
    """In the place of ``_use_triton`` where TRL 1.16 asks it whether masked rows leave the head."""
    return True


def reward_compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """RewardTrainer.compute_loss: TRL's metrics, and ``pairwise_loss`` of its two scores."""
    _, outputs = _reward_compute_loss(self, model, inputs, True, num_items_in_batch)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    loss, _ = pairwise_loss(
        chosen,
        rejected,
        inputs.get("margin"),
        center_coef=self.args.center_rewards_coefficient or 0.0,
    )
    return (loss, outputs) if return_outputs else loss


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean over mask; 0 where nothing counts (TRL: NaN)."""
    if axis is not None:
        return torch.where(mask.bool(), values, 0.0).sum(axis) / mask.sum(axis)
    return masked_mean_op(values, mask.bool())


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Whitened over mask, and 0 where masked (TRL leaves that to the caller)."""
    return masked_whiten_op(values, mask.bool(), shift_mean=shift_mean)


_UTILS = "trl.trainer.utils"
_PPO = "trl.experimental.ppo.ppo_trainer"
_PATCH = Patch(
    "TRL",
    "trl",
    VERSIONS,
    Replacement(
        _UTILS,
        "selective_log_softmax",
        {
            "(logits, index)": selective_log_softmax,
            "(logits, index, temperature=1.0, row_mask=None)": selective_log_softmax,
        },
    ),
    Replacement(
        _UTILS,
        "selective_log_softmax_and_entropy",
        {
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)": (
                selective_log_softmax_and_entropy
            )
        },
        optional=True,  # not in 1.12
    ),
    Replacement(_UTILS, "entropy_from_logits", {"(logits, chunk_size=128)": entropy_from_logits}),
    Replacement(
        _UTILS,
        "_ChunkedLogProbFunction",
        {
            "(ctx, last_hidden, weight, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0)": FusedHeadOfAsyncGRPO,
            "(ctx, hidden, weight, bias, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0, outputs=('entropy', "
            "'log_sum_sq_probs', 'mean_logits', 'is_top1'))": FusedHead,
        },
        only_here=True,
    ),
    Replacement(
        _UTILS, "_use_triton", {"(device)": use_compact_rows}, optional=True, only_here=True
    ),
    Replacement(
        "trl.trainer.reward_trainer",
        "RewardTrainer.compute_loss",
        {
            "(self, model, inputs, return_outputs=False, num_items_in_batch=None)": (
                reward_compute_loss
            )
        },
    ),
    Replacement(_PPO, "masked_mean", {"(values, mask, axis=None)": masked_mean}, optional=True),
    Replacement(
        _PPO, "masked_whiten", {"(values, mask, shift_mean=True)": masked_whiten}, optional=True
    ),
)


def patch() -> Patch:
    """Replace TRL's functions until ``unpatch()``, or to the end of a ``with``.

    Returns:
        What was replaced, in ``.replaced`` and in its ``repr``.

    Raises:
        UnknownSignature: this TRL is not one the adapter was written for; nothing was replaced.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put TRL's own functions back."""
    _PATCH.undo()
