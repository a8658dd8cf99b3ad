"""TRL's GRPOTrainer on our log-probs and head: one line.

pip install 'trl==1.12.0'    # or 1.16.0, whose GRPO makes no logits at all
python examples/trl_grpo.py
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from rlhf_fast.integrations import trl as fast_trl


def reward_short_words(completions: list[str], **_: object) -> list[float]:
    return [-len(text) / 10 for text in completions]


def main() -> None:
    print(fast_trl.patch())  # the one line; it says what it replaced
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tiny.policy().save_pretrained(folder)  # TRL loads the reference from there once more
        trainer = GRPOTrainer(
            folder,
            reward_funcs=reward_short_words,
            args=GRPOConfig(
                folder, max_steps=5, per_device_train_batch_size=8, num_generations=4,
                max_completion_length=16, beta=0.05, learning_rate=1e-3, logging_steps=1,
                report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": tiny.PROMPTS}),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        trainer.train()
    for row in trainer.state.log_history[:-1]:
        print(f"loss {row['loss']:9.6f}  reward {row['reward']:7.4f}  KL {row['kl']:.6f}")


if __name__ == "__main__":
    main()
