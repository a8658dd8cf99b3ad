"""What is asked of a rollout engine, as checks that any of them can be put through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.trainer.rollout.protocol import Completions, RolloutEngine, Sampling

PROMPTS = ((5, 9), (3, 4, 5, 6, 8), (7,))
TRUNCATED = ({"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.9}, {"min_p": 0.3})


def check_engine(
    make: Callable[[], RolloutEngine],
    model: PreTrainedModel,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_new_tokens: int = 6,
    gap: float = 1e-3,
) -> None:
    """Puts an engine through all that the trainer asks of one (``RolloutEngine``).

    Greedy answers are the model's; log-probs are those of the distribution that was drawn from,
    over the tokens that truncation left, which are returned; stop tokens end an answer; a seed
    repeats it; new weights count after ``sync``, sleep or not; what cannot be answered raises;
    nothing is left after ``close``.

    Args:
        make: gives a new engine for `model`.
        model: the policy, in evaluation mode. Its head is changed on the way, and put back.
        prompts: token ids of the model.
        max_new_tokens: tokens of an answer.
        gap: nats by which log-probs may be off; a likeliest token may be so much less likely.

    Raises:
        AssertionError: what does not hold, in words.
    """
    before = running()
    engine = make()
    try:
        prompts = [list(prompt) for prompt in prompts]
        whole = Sampling(max_new_tokens, 0.0, [])
        engine.sync(model.state_dict().items())
        greedy = engine.generate(prompts, whole, 0)
        is_greedy(greedy, model, prompts, gap)
        check(greedy.mask.all() and greedy.mask.size(1) == max_new_tokens, "an answer is too short")

        warm = Sampling(max_new_tokens, 0.7, [])
        drawn = engine.generate(prompts * 3, warm, 1)
        are_as_sampled(drawn, model, prompts * 3, warm, gap)
        again, other = (engine.generate(prompts * 3, warm, seed) for seed in (1, 2))
        check(torch.equal(drawn.tokens, again.tokens), "a seed does not repeat its answers")
        check(not torch.equal(drawn.tokens, other.tokens), "seeds make no difference")

        for options in TRUNCATED:
            sampling = Sampling(max_new_tokens, 1.3, [], **options)
            done = engine.generate(prompts * 2, sampling, 3)
            are_as_sampled(done, model, prompts * 2, sampling, gap)

        stop = int(greedy.tokens[0, 1])
        ended = engine.generate(prompts, Sampling(max_new_tokens, 0.0, [stop]), 0)
        check_stops(ended, greedy, stop)

        new_weights_count(engine, model, prompts, whole, gap)
        vocabulary = model.get_input_embeddings().weight.size(0)
        try:
            engine.generate([[vocabulary + 7]], whole, 0)
        except Exception:
            pass
        else:
            raise AssertionError("a token that does not exist raises nothing")
    finally:
        engine.close()
    engine.close()
    for _ in range(50):  # a thread that was told to end needs a moment
        left = {name: running()[name] - known for name, known in before.items()}
        if not any(left.values()):
            break
        time.sleep(0.1)
    check(not any(left.values()), f"after close there are still {left}")


def check(holds: Tensor | bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def distributions(model: PreTrainedModel, prompts: list, done: Completions) -> list[Tensor]:
    """The model's own logits [length, V] at each answer's tokens, by one pass without padding."""
    rows = []
    with torch.no_grad():
        for prompt, tokens, mask in zip(prompts, done.tokens, done.mask, strict=True):
            ids = torch.cat([torch.tensor(prompt), tokens[mask].cpu()]).to(model.device)
            logits = model(ids[None], use_cache=False).logits[0].double().cpu()
            rows.append(logits[len(prompt) - 1 : -1])
    return rows


def is_greedy(done: Completions, model: PreTrainedModel, prompts: list, gap: float) -> None:
    for row, logits in enumerate(distributions(model, prompts, done)):
        tokens, logp = done.tokens[row][done.mask[row]], done.logp[row][done.mask[row]]
        said = logits.log_softmax(-1)
        less = said.max(-1).values - said.gather(1, tokens[:, None]).squeeze(1)
        check((less <= gap).all(), f"greedy answer {row} is not the model's: {less.tolist()}")
        off = (logp - (said.max(-1).values - less)).abs().max()
        check(off <= gap, f"greedy answer {row}: log-probs are off by {off:.2g}")


def are_as_sampled(
    done: Completions, model: PreTrainedModel, prompts: list, sampling: Sampling, gap: float
) -> None:
    """Log-probs are those of what was drawn among; that is what truncation leaves, but for tokens
    whose probability is within the gap of the edge."""
    check((done.support is not None) == sampling.truncates, "what it was drawn among is not said")
    for row, logits in enumerate(distributions(model, prompts, done)):
        logits = logits / sampling.temperature
        for t, token in enumerate(done.tokens[row][done.mask[row]].tolist()):
            left = logits[t]
            if done.support is not None:
                among = done.support[row, t]
                among = among[among >= 0].long()
                check(token in among.tolist(), "a token was not among those it was drawn among")
                surely, perhaps = kept(left, sampling, gap)
                here = torch.zeros_like(surely).index_fill(0, among, True)
                check((here | ~surely).all() and (perhaps | ~here).all(), f"another set: {among}")
                left = left.masked_fill(~here, -torch.inf)
            off = abs(float(left.log_softmax(-1)[token] - done.logp[row, t]))
            check(off <= gap, f"answer {row}, token {t}: the log-prob is off by {off:.2g}")


def kept(logits: Tensor, sampling: Sampling, gap: float) -> tuple[Tensor, Tensor]:
    """(tokens that truncation keeps, those that it may keep) if logits may be off by the gap."""
    order = logits.argsort(descending=True)
    sorted_ = logits[order]
    surely, perhaps = torch.ones_like(sorted_).bool(), torch.ones_like(sorted_).bool()
    if sampling.top_k:
        edge = sorted_[min(sampling.top_k, len(order)) - 1]
        surely, perhaps = sorted_ > edge + gap, sorted_ >= edge - gap
        surely[0] = True
    probs = sorted_.masked_fill(~perhaps, -torch.inf).softmax(0)
    before = probs.cumsum(0) - probs
    surely, perhaps = (
        surely & (before < sampling.top_p - gap),
        perhaps & (before < sampling.top_p + gap),
    )
    if sampling.min_p:
        share = (sorted_ - sorted_[0]).exp()
        surely &= share > sampling.min_p * (1 + gap)
        perhaps &= share > sampling.min_p * (1 - gap)
    surely[0] = perhaps[0] = True
    back = order.argsort()
    return surely[back], perhaps[back]


def check_stops(ended: Completions, whole: Completions, stop: int) -> None:
    """Cut at the first stop token, which belongs to the answer."""
    for row, tokens in enumerate(whole.tokens.tolist()):
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        came = ended.tokens[row][ended.mask[row]].tolist()
        check(came == expected, f"stop token {stop}: {came}, expected {expected}")


@torch.no_grad()
def new_weights_count(
    engine: RolloutEngine, model: PreTrainedModel, prompts: list, whole: Sampling, gap: float
) -> None:
    """The head's rows in another order are another model; sleeping forgets nothing else."""
    weight = model.get_output_embeddings().weight
    old = weight.clone()
    try:
        for turn in (1, 2):
            weight.copy_(weight.roll(1, 0))
            if turn == 2:
                engine.sleep()
                engine.wake()
            engine.sync(model.state_dict().items())
            is_greedy(engine.generate(prompts, whole, 0), model, prompts, gap)
    finally:
        weight.copy_(old)


def running() -> dict[str, set]:
    """This process's threads, child processes and connections."""
    me = psutil.Process()
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "processes": {child.pid for child in me.children(recursive=True)},
        "connections": {(c.fd, str(c.laddr)) for c in me.net_connections()},
    }
