"""Tokens a second of each rollout engine at 1, 16 and 64 rows, as a Markdown table.

python bench/engines.py [--model FOLDER] [--tokens 24] [engine …]

Without a model: a Llama of SmolLM2-135M's shape with random weights. Engines that are not installed
are left out, and said to be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_fast.trainer.rollout.continuous import TransformersEngine
from rlhf_fast.trainer.rollout.engine import FunctionEngine
from rlhf_fast.trainer.rollout.protocol import RolloutEngine, Sampling
from rlhf_fast.trainer.rollout.sample import sample
from rlhf_fast.trainer.rollout.vllm_in_process import VLLMEngine

ROWS = (1, 16, 64)
PROMPT = 8  # tokens


class Alone:
    """What our decoding needs of a policy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model


ENGINES = {
    "ours": lambda model: FunctionEngine(Alone(model), sample),
    "transformers": lambda model: TransformersEngine(model, None),
    "vllm": lambda model: VLLMEngine(model, None),
}


def of_the_shape() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens_a_second(engine: RolloutEngine, rows: int, tokens: int, repeats: int = 3) -> float:
    """The median; stop tokens there are none, so that every answer has all its tokens."""
    prompts = [[(7 * row + 3 * t) % 1000 + 3 for t in range(PROMPT)] for row in range(rows)]
    sampling = Sampling(tokens, 1.0, [])
    engine.generate(prompts, sampling, 0)
    seconds = []
    for seed in range(1, repeats + 1):
        began = time.perf_counter()
        engine.generate(prompts, sampling, seed)
        seconds.append(time.perf_counter() - began)
    return rows * tokens / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of each rollout engine.")
    parser.add_argument("engines", nargs="*", default=list(ENGINES), help=", ".join(ENGINES))
    parser.add_argument("--model", help="a folder; unset: random weights of SmolLM2-135M's shape")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.model) if asked.model else of_the_shape()
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    print("| engine | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for name in asked.engines:
        if name == "vllm" and find_spec("vllm") is None:
            print(f"| {name} | not installed |" + " |" * (len(ROWS) - 1))
            continue
        engine = ENGINES[name](model)
        engine.sync(model.state_dict().items())
        speeds = [tokens_a_second(engine, rows, asked.tokens) for rows in ROWS]
        engine.close()
        print(f"| {name} | " + " | ".join(f"{x:.0f}" for x in speeds) + " |", flush=True)


if __name__ == "__main__":
    main()
