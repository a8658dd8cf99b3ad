"""Train a reward model from preference pairs: one loop, read from top to bottom.

    loss = −log σ(score(chosen) − score(rejected) − margin)

(InstructGPT, arXiv:2203.02155; the same numbers as TRL's RewardTrainer on the same batch.)
ln 2 = 0.693 is a coin's loss. Scores are defined only up to a shift and (against a given margin of
victory) a scale, so after training they are normalised to mean 0 and standard deviation 1 on the
held-out texts; both numbers go into the saved model's config, as score_mean and score_std.

Several processes share every batch (see workers.py); read the loop as if there were one.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast import pairwise_loss
from rlhf_fast.ops.pairwise_loss import PairwiseStats
from rlhf_fast.trainer.callbacks import Callbacks
from rlhf_fast.trainer.config import RewardConfig
from rlhf_fast.trainer.data.read import Rows, read_data
from rlhf_fast.trainer.data.rows import Pair, batch_order, pad, preference_pairs
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.freed_memory import freed_memory_kept
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.metrics import Means
from rlhf_fast.trainer.models.loading import context_length, source_dtype
from rlhf_fast.trainer.models.reward_model import new_reward_model, score_texts, score_tokens
from rlhf_fast.trainer.models.saving import rounded, save_model
from rlhf_fast.trainer.models.tokenizer import choose_pad, load_tokenizer
from rlhf_fast.trainer.models.trunk_cache import TrunkCache, fits
from rlhf_fast.trainer.quiet import quiet
from rlhf_fast.trainer.run import interrupts
from rlhf_fast.trainer.run.card import check_push, model_card, push
from rlhf_fast.trainer.run.console import console, progress_bar
from rlhf_fast.trainer.run.contents import CONTENTS, check_contents
from rlhf_fast.trainer.run.folder import Run, read_metrics
from rlhf_fast.trainer.schedule import Schedule, Updates
from rlhf_fast.trainer.update import Stepper

Score = Callable[[list[list[int]]], Tensor]  # token rows -> raw scores [B], with gradient
AVERAGED = ("loss", "accuracy", "margin", "mean_reward")
WINDOW = 8  # batches drawn at once and sorted by length: little padding, still a random order


@interrupts.guarded()
@quiet()
@freed_memory_kept()
def train(config: RewardConfig, *, given: Given | None = None) -> dict:
    """Returns (and saves as summary.json) held-out accuracy, loss and the scores' mean and std.

    given: objects that names in the config stand for (see RewardTrainer).
    """
    given = given or Given()
    workers = Workers(config)
    given.check(config, workers.sharing)
    check_push(config)
    run = Run(config, writes=workers.is_main)
    workers.wait()  # all have seen what was there before one of them writes
    if run.summary is not None:
        console.print(f"{run.folder} is finished already: {run.summary}{given.untouched()}")
        return run.summary

    began = time.perf_counter()
    device = workers.device
    trust = config.trust_remote_code
    tokenizer = copy.deepcopy(given.tokenizer(config.model))  # its pad may become another
    if tokenizer is None:
        tokenizer = load_tokenizer(config.model, field="model", trust=trust)
    rows, eval_rows = read_data(config, given)
    pairs, held_out = load_pairs(config, tokenizer, (rows, eval_rows))
    loaded = given.get(config.model)
    if loaded is None:
        dtype = source_dtype(config.model, field="model", trust=trust)
    else:
        dtype = loaded.dtype
    texts = [text for pair in pairs + held_out for text in (pair.chosen, pair.rejected)]
    choose_pad(tokenizer, used=set().union(*texts))
    model = new_reward_model(
        config.model,
        tokenizer,
        trainable_layers=config.trainable_layers,
        seed=config.seed,
        device=device,
        trust=trust,
        loaded=loaded,
    )
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=config.learning_rate, eps=1e-5, weight_decay=0.0, fused=True
    )
    room, longest = context_length(model), max(map(len, texts))
    if room is not None and longest > room:
        raise InputError(
            f"model={config.model} reads at most {room} tokens, but the longest text has "
            f"{longest}: lower max_tokens={config.max_tokens}"
        )
    lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    steps = config.epochs * steps_of_a_pass(len(pairs), config.batch_size)
    micro = config.micro_batch_size or config.batch_size
    if config.warmup_steps >= steps:
        raise InputError(
            f"warmup_steps={config.warmup_steps}, but the {len(pairs)} pairs give {steps} steps"
        )
    # A function of the step alone, so a resumed run needs no saved scheduler.
    schedule = Schedule(optimizer, config.lr_scheduler_type, config.warmup_steps, steps)
    updates = Updates(config)
    stepper = Stepper(weights.values(), optimizer, config.max_grad_norm, workers.sum)
    callbacks = Callbacks(
        given, config, steps, run, workers, model=model, tokenizer=tokenizer, optimizer=optimizer,
        schedule=schedule,
    )  # fmt: skip
    steering = {"updates": updates, "callbacks": callbacks}  # kept beside weights and optimizer
    run.check_end(steps)
    named = {"data": rows, "eval_data": eval_rows, "model": config.model}
    contents = workers.main_only(partial(check_contents, run, named, given))
    run.begin()
    run.save(CONTENTS, contents)
    first = workers.agreed(run.restore(weights, optimizer, **steering), "step to go on from")
    workers.start_trackers(run.folder.name, asdict(config))
    if workers.is_main:
        console.print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out, {steps} steps")
        if workers.size > 1:
            console.print(f"{workers.size} processes share each batch of {config.batch_size} pairs")
    score = scorer(model, config, pairs, workers.size)

    with progress_bar("reward model", steps, first, shown=workers.is_main) as bar:
        for step in callbacks.steps(first, read_metrics(run.metrics)):
            schedule.after(step)
            learnt = partial(run.keep, step, weights, optimizer, **steering)
            interrupts.step_begins(learnt, alone=workers.size == 1)
            rows = similar_lengths(lengths, config.batch_size, step, config.seed)
            batch = [pairs[i] for i in rows]

            means = Means(("loss", "accuracy", "margin", "mean_reward"), device)
            mine = batch[workers.share(len(batch))]
            for at in range(0, len(mine), micro):
                part = mine[at : at + micro]
                loss, stats = batch_loss(score, part, center_coef=config.center_coef)
                stepper.backward(loss * (len(part) / len(batch)))
                of_part = {"loss": loss, "accuracy": stats.accuracy, "margin": stats.gap}
                of_part["mean_reward"] = (stats.chosen + stats.rejected) / 2
                means.add(of_part, len(part))
            workers.sum([means.sums])
            interrupts.update_begins()
            norm, made = stepper.step(means["loss"])

            row = {
                "step": step + 1,
                **means.known(),
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "skipped_updates": int(not made),
            }
            if not updates.made(made):
                dump = {"chosen": [pair.chosen for pair in batch]}
                dump |= {"rejected": [pair.rejected for pair in batch], "statistics": row}
                workers.main_only(partial(run.stop_with_the_batch, step + 1, dump))
            run.log(row)
            if workers.is_main:
                workers.log(row)
                bar.show(f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.2f}")
            checkpoint = partial(run.save_checkpoint, step + 1, weights, optimizer, **steering)
            with interrupts.saving_at_an_error(checkpoint):
                callbacks.step_ended(row, per_epoch=steps / config.epochs)
                if callbacks.evaluates():
                    callbacks.evaluated(workers.main_only(partial(evaluate, model, held_out)))
            ending = workers.largest(interrupts.asked())
            if ending or callbacks.saves():
                checkpoint()
                callbacks.saved(checkpoint)
            if ending:
                interrupts.stop(ending)

    interrupts.steps_are_over()
    if (best := callbacks.best_step()) is not None:
        run.go_back(best, weights, optimizer)
    callbacks.end()
    if config.save_dtype:
        dtype = getattr(torch, config.save_dtype)
    model.load_state_dict(rounded(model, model.state_dict(keep_vars=True), dtype))
    # What is measured, here and below, is the model as it is saved.
    result = workers.main_only(partial(normalise, model, held_out, config))
    summary = result | callbacks.summary() | {"seconds": round(time.perf_counter() - began, 1)}
    run.write("model", partial(save, model, tokenizer, dtype, model_card(config, summary)))
    run.save("summary.json", summary)
    workers.end()
    if workers.is_main:
        console.print(
            f"held-out pair accuracy {summary['accuracy']:.3f} on {len(held_out)} pairs, "
            f"{summary['seconds']:.0f} s; model in {run.folder / 'model'}"
        )
        push(config, run.folder)
    return summary


def save(
    model: PreTrainedModel, tokenizer, dtype: torch.dtype, card: ModelCard, folder: Path
) -> None:
    save_model(model, folder, model.state_dict(keep_vars=True), dtype)
    tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")


def evaluate(model: PreTrainedModel, held_out: list[Pair]) -> dict[str, list[float]]:
    """Accuracy and loss of each held-out pair."""
    texts = [pair.chosen for pair in held_out] + [pair.rejected for pair in held_out]
    gaps = torch.sub(*score_texts(model, texts).chunk(2))
    losses = -torch.nn.functional.logsigmoid(gaps)
    return {"accuracy": (gaps > 0).float().tolist(), "loss": losses.tolist()}


def normalise(
    model: PreTrainedModel, held_out: list[Pair], config: RewardConfig
) -> dict[str, float]:
    """Put the scores' mean and std into the model's config; return them, accuracy and loss."""
    scores = score_texts(model, [pair.chosen for pair in held_out] + [p.rejected for p in held_out])
    if not torch.isfinite(scores).all() or scores.std() == 0:
        raise InputError(
            f"the reward model's scores are not finite or all the same after training: lower "
            f"learning_rate={config.learning_rate}"
        )
    chosen, rejected = scores.chunk(2)
    model.config.score_mean = scores.mean().item()
    model.config.score_std = scores.std().item()
    return {
        "accuracy": (chosen > rejected).float().mean().item(),
        "loss": pairwise_loss(chosen, rejected)[0].item(),
        "score_mean": model.config.score_mean,
        "score_std": model.config.score_std,
    }


def scorer(
    model: PreTrainedModel, config: RewardConfig, pairs: list[Pair], processes: int = 1
) -> Score:
    """Token rows -> raw scores, without running frozen layers twice on the same text."""
    # Any process may meet any pair in time, so each fills a cache of its own: no more work than
    # without it only from as many epochs on as there are processes.
    if config.epochs > processes and config.trainable_layers is not None:
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        if fits(model, config.trainable_layers, texts, config.trunk_cache_mib):
            return TrunkCache(model, config.trainable_layers, texts).score
    return partial(score_rows, model)


def score_rows(model: PreTrainedModel, texts: list[list[int]]) -> Tensor:
    ids, mask = pad(texts, side="right")
    return score_tokens(model, ids.to(model.device), mask.to(model.device))


def batch_loss(
    score: Score, pairs: list[Pair], *, center_coef: float = 0.0
) -> tuple[Tensor, PairwiseStats]:
    """pairwise_loss of raw scores: the mean over the pairs, with gradient."""
    scores = score([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen, rejected = scores.chunk(2)
    margin = torch.tensor([pair.margin for pair in pairs], device=scores.device)
    return pairwise_loss(chosen, rejected, margin, center_coef=center_coef)


def load_pairs(
    config: RewardConfig, tokenizer, read: tuple[Rows, Rows | None] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, pairs held out); read: what read_data gave, if it was called."""
    rows, eval_rows = read or read_data(config, Given())
    limit = config.max_tokens
    pairs = preference_pairs(rows, tokenizer, source=config.data, max_tokens=limit)
    if eval_rows is not None:
        source = config.eval_data or config.data
        held_out = preference_pairs(eval_rows, tokenizer, source=source, max_tokens=limit)
        known = {(tuple(pair.chosen), tuple(pair.rejected)) for pair in pairs}
        both = sum((tuple(pair.chosen), tuple(pair.rejected)) in known for pair in held_out)
        if both:
            console.print(
                f"{both} of the {len(held_out)} held-out pairs are duplicates of pairs that are "
                "trained on: the held-out accuracy is too high by what is remembered of them"
            )
        return pairs, held_out
    count = config.eval_pairs or min(200, max(1, len(pairs) // 10))
    if count >= len(pairs):
        raise InputError(
            f"data={config.data} has {len(pairs)} pairs: too few to hold out {count} of them"
        )
    random.Random(config.seed).shuffle(pairs)
    return hold_out(pairs, count)


def hold_out(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, pairs held out): no prompt is in both.

    Prompts are held out with all their pairs, those that `count` has room for first.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.asked].append(pair)
    held_out: list[Pair] = []
    for exactly in (True, False):
        for asked in list(groups):
            room = count - len(held_out)
            if len(groups) > 1 and room > 0 and (len(groups[asked]) <= room or not exactly):
                held_out += groups.pop(asked)
    if len(held_out) < count:
        console.print(
            f"too many of the {len(pairs)} pairs have the same prompt to keep the held-out ones "
            "apart: prompts of theirs are trained on"
        )
        return pairs[count:], pairs[:count]
    return [pair for pair in pairs if pair.asked in groups], held_out


def steps_of_a_pass(pairs: int, batch_size: int) -> int:
    return math.ceil(pairs / batch_size)


def similar_lengths(lengths: list[int], batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of the step-th batch, alike in length; a function of (seed, step) alone.

    A pass over the rows is so many batches, as equal in size as can be: every row is in one.
    """
    count = steps_of_a_pass(len(lengths), batch_size)
    epoch, slot = divmod(step, count)
    order = batch_order(len(lengths), epoch, seed)
    edges = [len(order) * i // count for i in range(count + 1)]
    window = slot // WINDOW * WINDOW
    slots = list(range(window, min(window + WINDOW, count)))
    first, last = edges[slots[0]], edges[slots[-1] + 1]
    rows = sorted(order[first:last], key=lambda i: lengths[i])
    random.Random(seed * 1_000_003 + epoch * count + window).shuffle(slots)
    mine = slots[slot - window]
    return rows[edges[mine] - first : edges[mine + 1] - first]
