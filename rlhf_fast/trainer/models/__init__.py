"""Policy, critic, reference, reward model: one file an idea, and here the names of all of them."""

from rlhf_fast.trainer.models.attention import (
    has_flash_attention,
    pick_packing,
    use_flash_attention,
)
from rlhf_fast.trainer.models.critic import load_critic, new_value_head
from rlhf_fast.trainer.models.loading import (
    load_causal_lm,
    load_config,
    load_model,
    pick_device,
    resolve,
)
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.lora import LoRA, add_adapters, merged
from rlhf_fast.trainer.models.policy import Policy, check_architecture, load_policy
from rlhf_fast.trainer.models.reward_model import (
    chosen_score,
    load_reward_model,
    new_reward_model,
    score_hidden,
    score_texts,
    score_tokens,
)
from rlhf_fast.trainer.models.tokenizer import (
    check_vocabulary,
    choose_pad,
    load_tokenizer,
    stop_tokens,
)
from rlhf_fast.trainer.models.trunk import frozen_copy, shallow_copy, top_slice, trunk_recorder

__all__ = [
    "LoRA",
    "Policy",
    "add_adapters",
    "check_architecture",
    "check_vocabulary",
    "choose_pad",
    "chosen_score",
    "frozen_copy",
    "has_flash_attention",
    "load_causal_lm",
    "load_config",
    "load_critic",
    "load_model",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "logit_divisor",
    "merged",
    "new_reward_model",
    "new_value_head",
    "pick_device",
    "pick_packing",
    "resolve",
    "score_hidden",
    "score_texts",
    "score_tokens",
    "shallow_copy",
    "softcap",
    "stop_tokens",
    "top_slice",
    "trunk_recorder",
    "use_flash_attention",
]
