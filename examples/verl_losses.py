"""verl's losses on our kernels, chosen in verl's own config.

This file is what each verl worker imports. With it on the PYTHONPATH::

    VERL_USE_EXTERNAL_MODULES=verl_losses python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=rlhf_fast algorithm.adv_estimator=gae ...

Run by itself it computes one loss by name, as verl's actor does, beside verl's own.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlhf_fast.integrations import verl as fast_verl

fast_verl.patch()  # GAE, value loss, KL, log-probs, fused head; loss_mode is registered by import


class ActorConfig(SimpleNamespace):
    """The fields of verl's ActorConfig that its losses read."""

    def get(self, name: str, default: object = None) -> object:
        return getattr(self, name, default)


def main() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    print(fast_verl.patch())
    torch.manual_seed(0)
    old_log_prob = -torch.rand(8, 32)
    batch = {
        "old_log_prob": old_log_prob,
        "log_prob": old_log_prob + 0.3 * torch.randn(8, 32),
        "advantages": torch.randn(8, 32),
        "response_mask": torch.arange(32) < torch.randint(1, 33, (8, 1)),
        "config": ActorConfig(
            clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0,
            global_batch_info={},
        ),
    }  # fmt: skip
    for loss_mode in ("vanilla", "rlhf_fast"):
        loss, metrics = get_policy_loss_fn(loss_mode)(**batch)
        numbers = "  ".join(f"{name} {value:.6f}" for name, value in metrics.items())
        print(f"{loss_mode:10} {loss:.6f}  {numbers}")


if __name__ == "__main__":
    main()
