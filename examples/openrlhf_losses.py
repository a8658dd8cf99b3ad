"""OpenRLHF's losses on our kernels.

OpenRLHF computes them in Ray's worker processes, each of which has to call ``patch()``::

    ray job submit --runtime-env-json \\
        '{"worker_process_setup_hook": "rlhf_fast.integrations.openrlhf.patch"}' \\
        -- python -m openrlhf.cli.train_ppo_ray ...

Run by itself this computes one policy loss by both.
"""

from __future__ import annotations

import torch

from rlhf_fast.integrations import openrlhf as fast_openrlhf


def main() -> None:
    import openrlhf.models

    torch.manual_seed(0)
    old_log_probs = -torch.rand(8, 32)
    log_probs = old_log_probs + 0.3 * torch.randn(8, 32)
    advantages = torch.randn(8, 32)
    action_mask = torch.arange(32) < torch.randint(1, 33, (8, 1))

    def show(name: str) -> None:
        policy_loss = openrlhf.models.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28)
        loss, clip_ratio, ppo_kl, *_ = policy_loss(
            log_probs, old_log_probs, advantages, action_mask
        )
        print(f"{name:9} loss {loss:.6f}  clip_ratio {clip_ratio:.6f}  ppo_kl {ppo_kl:.6f}")

    show("OpenRLHF")
    with fast_openrlhf.patch() as done:
        show("rlhf_fast")
        print(done)


if __name__ == "__main__":
    main()
