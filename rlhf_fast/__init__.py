"""RLHF with PPO whose losses never hold a full-vocabulary tensor."""

from . import interrupted as _interrupted  # noqa: F401  before torch is imported
from .ops.check import debug
from .ops.gae import gae
from .ops.gae_packed import gae_packed
from .ops.group_advantages import group_advantages
from .ops.kl_penalized_rewards import kl_penalized_rewards
from .ops.kto_loss import KTOStats, kto_loss
from .ops.linear.chunks import chunk_budget, release_memory
from .ops.linear.kl import linear_token_kl
from .ops.linear.logprobs import linear_token_logprobs
from .ops.linear.policy_loss import linear_policy_loss
from .ops.masked import masked_mean, masked_whiten
from .ops.pairwise_loss import pairwise_loss
from .ops.policy_loss import PolicyStats, policy_loss
from .ops.preference_loss import PreferenceStats, preference_loss
from .ops.rollout_correction import RolloutStats, rollout_correction
from .ops.token_kl import token_kl
from .ops.token_logprobs import token_logprobs
from .ops.token_masks import covariance_mask, off_policy_mask, top_entropy_mask
from .ops.value_loss import ValueStats, value_loss
from .version import __version__

__path__.append(f"{__path__[0]}/moved")  # modules by the paths they had in 0.1

__all__ = [
    "KTOStats",
    "PolicyStats",
    "PreferenceStats",
    "RolloutStats",
    "ValueStats",
    "__version__",
    "chunk_budget",
    "covariance_mask",
    "debug",
    "gae",
    "gae_packed",
    "group_advantages",
    "kl_penalized_rewards",
    "kto_loss",
    "linear_policy_loss",
    "linear_token_kl",
    "linear_token_logprobs",
    "masked_mean",
    "masked_whiten",
    "off_policy_mask",
    "pairwise_loss",
    "policy_loss",
    "preference_loss",
    "release_memory",
    "rollout_correction",
    "token_kl",
    "token_logprobs",
    "top_entropy_mask",
    "value_loss",
]
