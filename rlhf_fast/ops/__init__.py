"""The ops, one file each. Importing a file registers its ops; the order here is the table's."""

from . import (  # noqa: F401, I001
    token_logprobs,
    linear_token_logprobs,
    linear_token_kl,
    linear_policy_loss,
    policy_loss,
    value_loss,
    gae,
    gae_packed,
    group_advantages,
    token_kl,
    kl_penalized_rewards,
    pairwise_loss,
    masked,
    thin_linear,
    decoder_layer,
    draw_tokens,
)
