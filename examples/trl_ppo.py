"""TRL's PPOTrainer (gone after 1.12.0) on our log-probs, masked means and whitening.

    pip install 'trl==1.12.0'
    python examples/trl_ppo.py

Its GAE and losses are written into its ``train()`` and stay its own; ``rlhf-fast ppo`` is the
trainer where they are fused.
"""

from __future__ import annotations

import os
import tempfile

import tiny
from datasets import Dataset
from transformers import set_seed

from rlhf_fast.integrations import trl as fast_trl

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    tokenizer = tiny.tokenizer()
    prompts = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in tiny.PROMPTS]
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder, fast_trl.patch() as done:
        print(done)
        trainer = PPOTrainer(
            args=PPOConfig(
                folder, total_episodes=24, per_device_train_batch_size=8, num_ppo_epochs=2,
                num_mini_batches=1, response_length=12, num_sample_generations=0, logging_steps=1,
                local_rollout_forward_batch_size=8, learning_rate=1e-3, report_to=[],
                save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=tiny.policy(),
            ref_model=tiny.policy(),
            reward_model=tiny.scorer(),
            value_model=tiny.scorer(),
            train_dataset=Dataset.from_list(prompts * 6),
        )  # fmt: skip
        trainer.train()
    for row in trainer.state.log_history:
        if "loss/policy_avg" in row:
            print(
                f"policy loss {row['loss/policy_avg']:9.6f}  value loss "
                f"{row['loss/value_avg']:9.6f}  score {row['objective/scores']:7.4f}"
            )


if __name__ == "__main__":
    main()
