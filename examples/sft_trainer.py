"""transformers' Trainer with a loss that never makes the logits.

    python examples/sft_trainer.py

The base model gives the hidden states; ``linear_token_logprobs`` takes them, the head's weight and
the labels. Labels of −100 (prompt, padding) leave before the head. With your own model, nothing
but ``FusedSFTTrainer`` is needed.
"""

from __future__ import annotations

import tempfile

import tiny
import torch
from transformers import Trainer, TrainingArguments, set_seed

from rlhf_fast import linear_token_logprobs


class FusedSFTTrainer(Trainer):
    """The mean next-token loss of ``model(**inputs, labels=...)``, from hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        outputs = model.base_model(**inputs)
        head = model.get_output_embeddings()
        logp = linear_token_logprobs(
            outputs.last_hidden_state[:, :-1], head.weight, labels, bias=head.bias
        )
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = -logp.sum() / count
        return (loss, outputs) if return_outputs else loss


def rows(n: int = 64, length: int = 48) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the first 8 are a prompt without loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (n, length), generator=generator)
    labels = ids.masked_fill(torch.arange(length) < 8, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def train(trainer_class: type[Trainer]) -> list[float]:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10, per_device_train_batch_size=8, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_class(tiny.policy(), arguments, train_dataset=rows())
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    print("step  Trainer's loss  from hidden states")
    for step, (plain, fused) in enumerate(
        zip(train(Trainer), train(FusedSFTTrainer), strict=True), start=1
    ):
        print(f"{step:4}  {plain:14.6f}  {fused:18.6f}")


if __name__ == "__main__":
    main()
