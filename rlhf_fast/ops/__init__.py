"""The ops, one file each. Importing a file registers its ops; the order here is the table's."""

# ruff: noqa: F401, I001
from . import token_logprobs
from .linear import logprobs, kl, policy_loss as linear_policy_loss
from . import (
    policy_loss,
    value_loss,
    gae,
    gae_packed,
    group_advantages,
    token_kl,
    kl_penalized_rewards,
    rollout_correction,
    pairwise_loss,
    preference_loss,
    kto_loss,
    masked,
)
from .decoding import thin_linear, decoder_layer, draw_tokens
