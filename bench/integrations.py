"""What ``rlhf_fast.integrations`` changes: time and peak extra memory, before and after.

    python bench/integrations.py [--quick] [--json FILE]

Each row is one function of a framework, forward and backward where it has one, beside the one that
``patch()`` puts in its place, on the same inputs: first compared, then timed in turns in one
process, then measured for memory in a fresh one. Float32. verl's and OpenRLHF's modules are
imported as the tests import them (tests/frameworks.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from frameworks import OPENRLHF, VERL, load  # noqa: E402

from bench import machine, measure, memory  # noqa: E402
from bench.inputs import Answer  # noqa: E402

Call = Callable[[], Answer]
V, H = 49152, 576  # SmolLM2-135M's head


def trained(function: Callable, *leaves: Tensor, differentiate: int = 1) -> Call:
    """A call of ``function(*leaves)`` and the backward of its first ``differentiate`` outputs."""

    def call() -> Answer:
        fresh = [x.detach().requires_grad_() for x in leaves]
        outputs = function(*fresh)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(x.sum() for x in outputs[:differentiate]).backward()
        kept = [x.detach() for x in outputs if isinstance(x, Tensor)]
        return Answer(kept, {str(i): x.grad for i, x in enumerate(fresh)})

    return call


def forward(function: Callable, *arguments: object) -> Call:
    def call() -> Answer:
        outputs = function(*arguments)
        return Answer(list(outputs) if isinstance(outputs, tuple) else [outputs])

    return call


def rows(quick: bool) -> dict[tuple[str, str, str], tuple[Call, Call]]:
    """(framework, function, shape) -> (theirs, ours)"""
    g = torch.Generator().manual_seed(0)
    n, b, t = (64, 16, 128) if quick else (512, 64, 1024)
    logits, labels = torch.randn(4, n // 4, V, generator=g), torch.randint(V, (4, n // 4))
    hidden, weight = torch.randn(n, H, generator=g), 0.05 * torch.randn(V, H, generator=g)
    targets = labels.flatten()
    logp = -torch.rand(b, t, generator=g)
    old = logp + 0.2 * torch.randn(b, t, generator=g)
    advantages, values, returns = torch.randn(3, b, t, generator=g)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    from_logits, from_hidden, steps = f"N={n} V={V}", f"N={n} H={H} V={V}", f"B={b} T={t}"
    found: dict[tuple[str, str, str], tuple[Call, Call]] = {}

    import trl
    from trl.trainer import utils as trl_utils

    from rlhf_fast.integrations import trl as fast_trl

    framework = f"TRL {trl.__version__}"

    def with_entropy(log_softmax: Callable, entropy: Callable) -> Callable:
        """As GRPO does it: the entropy is a metric, without gradient."""

        def function(logits: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                h = entropy(logits)
            return log_softmax(logits, labels), h

        return function

    found[framework, "selective_log_softmax, entropy_from_logits", from_logits] = tuple(
        trained(with_entropy(x.selective_log_softmax, x.entropy_from_logits), logits)
        for x in (trl_utils, fast_trl)
    )

    old_head = trl.__version__ == "1.12.0"
    theirs = trl_utils._ChunkedLogProbFunction
    ours = fast_trl.FusedHeadOfAsyncGRPO if old_head else fast_trl.FusedHead
    tail = (1.0, 8192) if old_head else (1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    bias = () if old_head else (None,)
    found[framework, "fused head", from_hidden] = tuple(
        trained(lambda h, w, f=f: f.apply(h, w, *bias, targets, *tail)[:2], hidden, weight)
        for f in (theirs, ours)
    )

    core = load("verl.trainer.ppo.core_algos", VERL)
    torch_functional = load("verl.utils.torch_functional", VERL)
    fused = load("verl.utils.experimental.torch_functional", VERL)
    load("verl.utils.kernel.linear_cross_entropy", VERL)
    from rlhf_fast.integrations import verl as fast_verl

    class Config(types.SimpleNamespace):
        def get(self, name: str, default: object = None) -> object:
            return getattr(self, name, default)

    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0,
                    global_batch_info={})  # fmt: skip
    framework = "verl 0.9.1"
    found[framework, "logprobs_from_logits", from_logits] = tuple(
        trained(lambda x, f=f: f(x, labels), logits)
        for f in (
            torch_functional.logprobs_from_logits,
            lambda x, y: fast_verl.logprobs_from_logits(x, y, inplace_backward=False),
        )
    )
    twin = fused.FusedLinearForPPO()
    found[framework, "linear_cross_entropy (its PyTorch backend)", from_hidden] = (
        trained(lambda h, w: twin(h[None], w, targets[None]), hidden, weight),
        trained(lambda h, w: fast_verl.linear_cross_entropy(h, w, targets), hidden, weight),
    )
    found[framework, "policy loss", steps] = tuple(
        trained(lambda x, f=f: f(old, x, advantages, mask, config=config), logp)
        for f in (core.compute_policy_loss_vanilla, fast_verl.compute_policy_loss)
    )
    found[framework, "compute_value_loss", steps] = tuple(
        trained(lambda x, f=f: f(x, returns, values, mask, 0.2), advantages)
        for f in (core.compute_value_loss, fast_verl.compute_value_loss)
    )
    found[framework, "kl_penalty k3", steps] = tuple(
        trained(lambda x, f=f: f(x, old, "k3"), logp)
        for f in (core.kl_penalty, fast_verl.kl_penalty)
    )
    long_mask = mask.long()

    def only_kept(function: Callable) -> Callable:
        return lambda *x: tuple(y.masked_fill(~mask, 0) for y in function(*x))

    found[framework, "compute_gae_advantage_return", steps] = tuple(
        forward(only_kept(f), advantages, values, long_mask, 1.0, 0.95)
        for f in (core.compute_gae_advantage_return, fast_verl.compute_gae_advantage_return)
    )

    losses = load("openrlhf.models.loss", OPENRLHF)
    utils = load("openrlhf.models.utils", OPENRLHF)
    maker = load("openrlhf.trainer.ppo_utils.experience_maker", OPENRLHF)
    from rlhf_fast.integrations import openrlhf as fast_openrlhf

    framework = "OpenRLHF 0.11.2"
    found[framework, "log_probs_from_logits", from_logits] = tuple(
        trained(lambda x, f=f: f(x, labels), logits)
        for f in (utils.log_probs_from_logits, fast_openrlhf.log_probs_from_logits)
    )
    found[framework, "PolicyLoss", steps] = tuple(
        trained(lambda x, f=f: f(x, old, advantages, long_mask), logp)
        for f in (losses.PolicyLoss(), fast_openrlhf.PolicyLoss())
    )
    found[framework, "ValueLoss", steps] = tuple(
        trained(lambda x, f=f: f(x, values, returns, long_mask), advantages)
        for f in (losses.ValueLoss(0.2), fast_openrlhf.ValueLoss(0.2))
    )
    found[framework, "get_advantages_and_returns", steps] = tuple(
        forward(only_kept(f), None, values, advantages, long_mask, 1.0, 0.95)
        for f in (
            maker.RemoteExperienceMaker.get_advantages_and_returns,
            fast_openrlhf.get_advantages_and_returns,
        )
    )

    from transformers.loss.loss_utils import ForCausalLMLoss

    from rlhf_fast import linear_token_logprobs

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return ForCausalLMLoss(h @ w.T, None, V, shift_labels=targets)

    def from_hidden_states(h: Tensor, w: Tensor) -> Tensor:
        return -linear_token_logprobs(h, w, targets).mean()

    found["transformers", "Trainer's loss (examples/sft_trainer.py)", from_hidden] = (
        trained(plain, hidden, weight),
        trained(from_hidden_states, hidden, weight),
    )
    return found


def check(name: str, theirs: Answer, ours: Answer) -> None:
    pairs = list(zip(theirs.outputs, ours.outputs, strict=False))
    pairs += [(theirs.gradients[key], ours.gradients[key]) for key in theirs.gradients]
    for a, b in pairs:
        torch.testing.assert_close(
            b.flatten(), a.flatten(), rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )


def extra_memory(quick: bool) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(theirs, ours) in bytes: peak beyond inputs, outputs and gradients."""
    return {
        row: tuple(memory.resident_growth(call)["extra"] for call in calls)
        for row, calls in rows(quick).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # verl names each engine that is not installed

    cpu = torch.device("cpu")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        extra = pool.submit(extra_memory, options.quick).result()
    record = []
    print("| framework | replaced | shape | before, ms | after, ms | faster | extra MiB |")
    print("|---|---|---|---|---|---|---|")
    for row, (theirs, ours) in rows(options.quick).items():
        check(row[1], theirs(), ours())
        seconds = measure.interleaved(
            {"before": lambda _, f=theirs: f(), "after": lambda _, f=ours: f()},
            cpu,
            budget=0.5 if options.quick else 4.0,
            least=3,
        )
        before, after = (measure.Spread.of(seconds[side]).median for side in ("before", "after"))
        faster = measure.ratio(seconds["before"], seconds["after"])
        mib = [x / 2**20 for x in extra[row]]
        print(
            f"| {' | '.join(row)} | {before * 1e3:.2f} | {after * 1e3:.2f} | "
            f"{faster.median:.2f}× | {mib[0]:.0f} → {mib[1]:.0f} |",
            flush=True,
        )
        record.append(
            dict(zip(("framework", "function", "shape"), row, strict=True))
            | {"before_s": before, "after_s": after, "faster": faster.__dict__}
            | {"extra_before": extra[row][0], "extra_after": extra[row][1]}
        )
    if options.json:
        report = {"machine": machine.describe(cpu), "rows": record}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
