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
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from frameworks import OPENRLHF, VERL, load  # noqa: E402

from bench import machine, measure, memory  # noqa: E402
from bench.inputs import Answer  # noqa: E402
from bench.libraries import VerlConfig  # noqa: E402

Call = Callable[[], Answer]
Rows = dict[tuple[str, str, str], tuple[Call, Call]]
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


@dataclass(frozen=True)
class Inputs:
    """What the functions are called with, and its sizes in words."""

    logits: Tensor  # [4, N/4, V]
    labels: Tensor  # [4, N/4]
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    logp: Tensor  # [B, T], as all below
    old_logp: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    mask: Tensor
    from_logits: str
    from_hidden: str
    steps: str

    @property
    def targets(self) -> Tensor:
        return self.labels.flatten()


def draw(quick: bool) -> Inputs:
    g = torch.Generator().manual_seed(0)
    n, b, t = (64, 16, 128) if quick else (512, 64, 1024)
    logits, labels = torch.randn(4, n // 4, V, generator=g), torch.randint(V, (4, n // 4))
    hidden, weight = torch.randn(n, H, generator=g), 0.05 * torch.randn(V, H, generator=g)
    logp = -torch.rand(b, t, generator=g)
    old_logp = logp + 0.2 * torch.randn(b, t, generator=g)
    advantages, values, returns = torch.randn(3, b, t, generator=g)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    sizes = f"N={n} V={V}", f"N={n} H={H} V={V}", f"B={b} T={t}"
    return Inputs(
        logits, labels, hidden, weight, logp, old_logp, advantages, values, returns, mask, *sizes
    )


def rows(quick: bool) -> Rows:
    """(framework, function, shape) -> (theirs, ours)"""
    x = draw(quick)
    return trl_rows(x) | verl_rows(x) | openrlhf_rows(x) | transformers_rows(x)


def trl_rows(x: Inputs) -> Rows:
    import trl
    from trl.trainer import utils as trl_utils

    from rlhf_fast.integrations import trl as fast_trl

    framework = f"TRL {trl.__version__}"

    def with_entropy(log_softmax: Callable, entropy: Callable) -> Callable:
        """As GRPO does it: the entropy is a metric, without gradient."""

        def function(logits: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                h = entropy(logits)
            return log_softmax(logits, x.labels), h

        return function

    from_logits = tuple(
        trained(with_entropy(side.selective_log_softmax, side.entropy_from_logits), x.logits)
        for side in (trl_utils, fast_trl)
    )
    old_head = trl.__version__ == "1.12.0"
    theirs = trl_utils._ChunkedLogProbFunction
    ours = fast_trl.FusedHeadOfAsyncGRPO if old_head else fast_trl.FusedHead
    tail = (1.0, 8192) if old_head else (1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    bias = () if old_head else (None,)
    from_hidden = tuple(
        trained(lambda h, w, f=f: f.apply(h, w, *bias, x.targets, *tail)[:2], x.hidden, x.weight)
        for f in (theirs, ours)
    )
    return {
        (framework, "selective_log_softmax, entropy_from_logits", x.from_logits): from_logits,
        (framework, "fused head", x.from_hidden): from_hidden,
    }


def verl_rows(x: Inputs) -> Rows:
    core = load("verl.trainer.ppo.core_algos", VERL)
    torch_functional = load("verl.utils.torch_functional", VERL)
    twin = load("verl.utils.experimental.torch_functional", VERL).FusedLinearForPPO()
    load("verl.utils.kernel.linear_cross_entropy", VERL)
    from rlhf_fast.integrations import verl as fast_verl

    config = VerlConfig(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None,
                        clip_ratio_c=3.0, global_batch_info={})  # fmt: skip
    found = {
        ("logprobs_from_logits", x.from_logits): tuple(
            trained(lambda logits, f=f: f(logits, x.labels), x.logits)
            for f in (
                torch_functional.logprobs_from_logits,
                lambda *given: fast_verl.logprobs_from_logits(*given, inplace_backward=False),
            )
        ),
        ("linear_cross_entropy (its PyTorch backend)", x.from_hidden): (
            trained(lambda h, w: twin(h[None], w, x.targets[None]), x.hidden, x.weight),
            trained(
                lambda h, w: fast_verl.linear_cross_entropy(h, w, x.targets), x.hidden, x.weight
            ),
        ),
        ("policy loss", x.steps): tuple(
            trained(
                lambda logp, f=f: f(x.old_logp, logp, x.advantages, x.mask, config=config), x.logp
            )
            for f in (core.compute_policy_loss_vanilla, fast_verl.compute_policy_loss)
        ),
        ("compute_value_loss", x.steps): tuple(
            trained(lambda values, f=f: f(values, x.returns, x.values, x.mask, 0.2), x.advantages)
            for f in (core.compute_value_loss, fast_verl.compute_value_loss)
        ),
        ("kl_penalty k3", x.steps): tuple(
            trained(lambda logp, f=f: f(logp, x.old_logp, "k3"), x.logp)
            for f in (core.kl_penalty, fast_verl.kl_penalty)
        ),
        ("compute_gae_advantage_return", x.steps): tuple(
            forward(only_kept(f, x.mask), x.advantages, x.values, x.mask.long(), 1.0, 0.95)
            for f in (core.compute_gae_advantage_return, fast_verl.compute_gae_advantage_return)
        ),
    }
    return {("verl 0.9.1", *row): calls for row, calls in found.items()}


def openrlhf_rows(x: Inputs) -> Rows:
    losses = load("openrlhf.models.loss", OPENRLHF)
    utils = load("openrlhf.models.utils", OPENRLHF)
    maker = load("openrlhf.trainer.ppo_utils.experience_maker", OPENRLHF).RemoteExperienceMaker
    from rlhf_fast.integrations import openrlhf as fast_openrlhf

    mask = x.mask.long()
    found = {
        ("log_probs_from_logits", x.from_logits): tuple(
            trained(lambda logits, f=f: f(logits, x.labels), x.logits)
            for f in (utils.log_probs_from_logits, fast_openrlhf.log_probs_from_logits)
        ),
        ("PolicyLoss", x.steps): tuple(
            trained(lambda logp, f=f: f(logp, x.old_logp, x.advantages, mask), x.logp)
            for f in (losses.PolicyLoss(), fast_openrlhf.PolicyLoss())
        ),
        ("ValueLoss", x.steps): tuple(
            trained(lambda values, f=f: f(values, x.values, x.returns, mask), x.advantages)
            for f in (losses.ValueLoss(0.2), fast_openrlhf.ValueLoss(0.2))
        ),
        ("get_advantages_and_returns", x.steps): tuple(
            forward(only_kept(f, x.mask), None, x.values, x.advantages, mask, 1.0, 0.95)
            for f in (maker.get_advantages_and_returns, fast_openrlhf.get_advantages_and_returns)
        ),
    }
    return {("OpenRLHF 0.11.2", *row): calls for row, calls in found.items()}


def transformers_rows(x: Inputs) -> Rows:
    from transformers.loss.loss_utils import ForCausalLMLoss

    from rlhf_fast import linear_token_logprobs

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return ForCausalLMLoss(h @ w.T, None, V, shift_labels=x.targets)

    def from_hidden_states(h: Tensor, w: Tensor) -> Tensor:
        return -linear_token_logprobs(h, w, x.targets).mean()

    name = "Trainer's loss (examples/sft_trainer.py)"
    calls = tuple(trained(f, x.hidden, x.weight) for f in (plain, from_hidden_states))
    return {("transformers", name, x.from_hidden): calls}


def only_kept(function: Callable, mask: Tensor) -> Callable:
    """Its results with 0 where masked: there the frameworks leave what they like."""
    return lambda *given: tuple(y.masked_fill(~mask, 0) for y in function(*given))


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
