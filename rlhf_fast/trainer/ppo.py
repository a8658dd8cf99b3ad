"""Train a policy with PPO against a reward: one loop, read from top to bottom.

A step samples an answer to each prompt of a batch, scores the answers, turns score and KL from the
frozen reference into a reward for every token, estimates advantages with GAE, and makes several
passes over the batch with the clipped losses on the log-probs stored before the first of them.

Several processes share every batch (see workers.py); read the loop as if there were one.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from transformers import set_seed

from rlhf_fast import (
    linear_policy_loss,
    off_policy_mask,
    value_loss,
)
from rlhf_fast.ops.policy_loss import PolicyStats
from rlhf_fast.trainer.advantages import estimate, shaped
from rlhf_fast.trainer.batch import Batch, corrections, counts, minibatches, parts
from rlhf_fast.trainer.callbacks import Callbacks
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.data.held_out import split_prompts
from rlhf_fast.trainer.data.read import read_data
from rlhf_fast.trainer.data.rows import batch_indices
from rlhf_fast.trainer.distributed.fsdp import gathered
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.dynamic_sampling import Sampled, without_even_groups
from rlhf_fast.trainer.evaluate import evaluate, summarise
from rlhf_fast.trainer.freed_memory import freed_memory_kept
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.greedy import greedy_scores
from rlhf_fast.trainer.measure import (
    gather,
    logprobs,
    measure,
    predict_values,
    read_answers,
    sample_answers,
    score_all,
    without_lost,
)
from rlhf_fast.trainer.metrics import UpdateMetrics, of_the_answers
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.policy import Policy
from rlhf_fast.trainer.positive_nll import positive_nll
from rlhf_fast.trainer.quiet import quiet
from rlhf_fast.trainer.rollout.engine import engines_closed, load_engine
from rlhf_fast.trainer.rollout.environment import load_environment, with_environment
from rlhf_fast.trainer.rollout.protocol import RolloutEngine
from rlhf_fast.trainer.rollout.sample import EmbeddedEngine, answer_hidden
from rlhf_fast.trainer.run import interrupts
from rlhf_fast.trainer.run.card import check_push, model_card, push
from rlhf_fast.trainer.run.console import (
    Stopwatch,
    answers_table,
    console,
    profile,
    progress_bar,
    samples_table,
    summary_line,
)
from rlhf_fast.trainer.run.contents import CONTENTS, check_contents
from rlhf_fast.trainer.run.diagnostics import new_warnings
from rlhf_fast.trainer.run.folder import Run, read_metrics
from rlhf_fast.trainer.run.metrics import finite
from rlhf_fast.trainer.run.plot import plot
from rlhf_fast.trainer.schedule import Control, Schedule
from rlhf_fast.trainer.setup import adam, load_models, load_scorers, warn_of_slow_decoding
from rlhf_fast.trainer.update import Stepper


@interrupts.guarded()
@engines_closed()
@quiet()
@freed_memory_kept()
def train(
    config: PPOConfig, *, engine: RolloutEngine | None = None, given: Given | None = None
) -> dict:
    """Returns (and saves as summary.json) score, judge and KL before and after training.

    given: objects that names in the config stand for (see PPOTrainer).
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
    rows, eval_rows = read_data(config, given)
    reward, judge = load_scorers(config, device, given)
    make_engine = load_engine(config, given, engine)
    make_environment = load_environment(config, given)
    policy = load_models(config, device, given)
    if workers.is_main and make_engine is None:
        warn_of_slow_decoding(policy)
    workers.shard(policy)
    with workers.together():
        engine = EmbeddedEngine(policy) if make_engine is None else make_engine(policy)
    held_out, prompts = split_prompts(config, policy, rows, eval_rows)
    who = f"environment={config.environment}"
    with_environment(held_out + prompts, make_environment, policy, who)
    for scorer in (reward, judge):
        if scorer is not None:
            scorer.check_lengths([p.prompt for p in held_out + prompts], config.max_new_tokens)
    weights, optimizer = policy.trained(), adam(policy, config)
    stepper = workers.stepper(policy, optimizer, config.max_grad_norm)
    updates = config.epochs * config.minibatches  # in a step that target_kl does not end
    scheduler = Schedule(
        optimizer, config.lr_scheduler_type, config.warmup_steps, config.steps * updates,
        frozen=config.critic_warmup_steps * updates,
    )  # fmt: skip
    control = Control(config)
    callbacks = Callbacks(
        given, config, config.steps, run, workers, model=policy.model, tokenizer=policy.tokenizer,
        optimizer=optimizer, schedule=scheduler,
    )  # fmt: skip
    steering = {"control": control, "callbacks": callbacks}  # kept beside weights and optimizer
    run.check_end(config.steps)
    names = ("model", "value_model", "reward", "judge", "rollout_engine", "environment")
    named = {"data": rows, "eval_data": eval_rows} | {name: getattr(config, name) for name in names}
    contents = workers.main_only(partial(check_contents, run, named, given))
    run.begin()
    run.save(CONTENTS, contents)
    # Answering held-out prompts first also shows whether reward and judge work at all.
    columns = ("prompt", "answer", "score", "kl")
    before = run.load("before.json", columns) if run.exists else None
    if before is None:
        before = evaluate(policy, held_out, reward, judge, config, workers)
        run.save_completions(0, before)
        run.save("before.json", before)
    first = workers.agreed(
        run.restore(weights, stepper.optimizer, **steering), "step to go on from"
    )
    history = read_metrics(run.metrics)
    workers.start_trackers(run.folder.name, asdict(config))
    if workers.is_main and not first:
        workers.log_answers(0, before)
    if workers.is_main and workers.size > 1:
        shared = f"each batch of {config.batch_size} answers{workers.sharing}"
        console.print(f"{workers.size} processes share {shared}")

    with progress_bar("ppo", config.steps, first, shown=workers.is_main) as bar:
        for step in callbacks.steps(first, history):
            # Everything random is a function of (seed, step): a resumed run repeats every draw,
            # those of a reward function from the global generators included.
            seed = config.seed * 1_000_003 + step
            set_seed(seed % 2**32)  # NumPy takes no larger one
            generator = torch.Generator().manual_seed(seed)
            clock = Stopwatch(device)
            scheduler.after(step * updates)
            learnt = partial(run.keep, step, weights, stepper.optimizer, **steering)
            interrupts.step_begins(learnt, alone=workers.size == 1)

            # 1. Sample answers to each prompt, this process to its share of the batch.
            groups = config.batch_size // config.samples_per_prompt
            rows = batch_indices(len(prompts), groups, step, config.seed)
            asked = [prompts[i] for i in rows for _ in range(config.samples_per_prompt)]
            mine = workers.share(len(asked))
            try:
                with workers.together():
                    engine.wake()
                with workers.together(), workers.in_turns(policy.weights()) as weights_now:
                    engine.sync(weights_now)
                with workers.together():
                    rollout = sample_answers(
                        policy, asked, config, generator, share=mine, engine=engine
                    )
                clock.lap("rollout")

                # 2. Score the answers.
                texts = read_answers(policy, rollout, asked[mine], config)
                scored = workers.attempt(score_all, reward, judge, asked[mine], texts)
                baseline = greedy_scores(policy, asked, reward, config, workers, engine)
            except BaseException:  # what others' code raises must not cost what was learnt
                interrupts.keep_what_was_learnt()
                raise
            # All answers' scores: "scores", "scores/<name>" of each of several rewards, "judge".
            columns = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
            clock.lap("score")

            # 3. Log-probs and values of what was sampled, before anything changes.
            rollout, old = gather(workers, rollout, measure(policy, rollout, config))
            clock.lap("reference")
            sampled = Sampled(asked, columns, rollout, old)
            if config.dynamic_sampling_rounds:
                sampled = without_even_groups(
                    sampled, prompts, policy, reward, judge, config, workers, generator, engine
                )
                texts = read_answers(policy, sampled.rollout, sampled.asked, config)[mine]
                clock.lap("rollout")
            asked, columns, rollout, old = (
                sampled.asked,
                sampled.columns,
                sampled.rollout,
                sampled.old,
            )
            rollout, kept = without_lost(rollout, columns["scores"], baseline)
            mask, raw_scores = rollout.mask, columns["scores"]  # [B, T], [B]

            with interrupts.keeping_what_was_learnt(), workers.together():
                engine.sleep()

            # 4. Advantages and returns from the scores, and the KL they cost.
            scored_as = raw_scores.to(device).masked_fill(~kept, 0.0)
            scores = shaped(scored_as, rollout.ended, mask.sum(1), config)
            corrected = corrections(rollout, old, config)
            advantages, returns = estimate(
                scores, old, mask, control.beta, config, corrected.mask, baseline, kept,
                rollout.rewards,
            )  # fmt: skip
            right = scored_as > 0
            batch = Batch(rollout, old, advantages, returns, corrected, right)

            # 5. Several passes over the batch, each in minibatches that cover it.
            interrupts.update_begins()
            stats = learn(policy, batch, config, stepper, scheduler, control, workers, generator)
            clock.lap("update")

            # 6. What happened.
            row = {
                "step": step + 1,
                "episode": (step + 1) * config.batch_size,
                **of_the_answers(columns, scores, batch, control.beta, kept),
                **sampled.counts,
                **stats,
                "lr": optimizer.param_groups[0]["lr"],
                "eps": config.batch_size / clock.total,
                **clock.metrics(),
                **{f"perf/reward_{name}_seconds": t for name, t in reward.take_seconds().items()},
                "perf/tokens_per_second": int(mask.sum()) / clock.total,
            }
            if control.skipped_in_a_row >= config.max_skipped_updates:
                dump = {"prompts": [prompt.prompt for prompt in asked], "scores": scores}
                dump |= {"advantages": advantages, "rollout": vars(rollout), "measured": vars(old)}
                workers.main_only(partial(run.stop_with_the_batch, step + 1, dump))
            control.adapt(row["objective/kl"])
            run.log(row)
            history.append(finite(row))
            if workers.is_main:
                workers.log(row)
                bar.show(summary_line(row))
                for warning in new_warnings(history):
                    console.print(f"[bold yellow]step {step + 1}: {warning}[/]")
                if (step + 1) % config.log_every == 0:
                    console.print(f"step {step + 1}/{config.steps}  {summary_line(row)}")
                if config.sample_every and (step + 1) % config.sample_every == 0:
                    shown = [prompt.prompt for prompt in asked[mine]]
                    console.print(
                        samples_table(shown, list(map(str, texts)), raw_scores[mine].tolist())
                    )
            save = partial(run.save_checkpoint, step + 1, weights, stepper.optimizer, **steering)
            with interrupts.saving_at_an_error(save):
                callbacks.step_ended(row, per_epoch=len(prompts) / groups)
                if callbacks.evaluates():
                    callbacks.evaluated(evaluate(policy, held_out, reward, judge, config, workers))
            ending = workers.largest(interrupts.asked())
            if ending or callbacks.saves():
                save()
                callbacks.saved(save)
            if ending:
                interrupts.stop(ending)

    interrupts.steps_are_over()

    if (best := callbacks.best_step()) is not None:
        run.go_back(best, weights, stepper.optimizer)
    callbacks.end()

    # The trained policy, the table, the plot; the summary last: it marks the run as finished.
    whole = gathered(policy.state(), keep=workers.is_main)
    after = callbacks.answers or callbacks.answered(
        evaluate(policy, held_out, reward, judge, config, workers), best
    )
    run.save("after.json", after)
    summary = summarise(before, after) | {
        **callbacks.summary(),
        "skipped_updates": sum(row.get("skipped_updates") or 0 for row in history),
        "seconds": round(time.perf_counter() - began, 1),
    }
    card = model_card(config, summary)
    run.write("model", lambda folder: policy.save(folder, whole, card))
    if policy.value_body is not None:
        run.write("value_model", lambda folder: policy.save_critic(folder, whole))
    if config.lora_r is not None:
        save_adapter = partial(policy.model.save_pretrained, state_dict=whole["model"])
        run.write("adapter", save_adapter)
    run.write("plot.png", lambda path: plot(history, path))
    run.save("summary.json", summary)
    workers.end()
    if workers.is_main:
        console.print(answers_table(before, after))
        console.print(
            "  ".join(f"{name} {value:.3g}" for name, value in summary.items())
            + f"\n{profile(history)}\nmodel, plot.png and metrics.jsonl in {run.folder}"
        )
        push(config, run.folder)
    return summary


def learn(
    policy: Policy,
    batch: Batch,
    config: PPOConfig,
    stepper: Stepper,
    scheduler: Schedule,
    control: Control,
    workers: Workers,
    generator: torch.Generator,
) -> dict[str, float]:
    """The passes over one batch; their statistics, over all tokens of the updates made."""
    metrics = UpdateMetrics(policy.model.device, critic=policy.value_head is not None)
    for minibatch in minibatches(len(batch.mask), config, generator):
        tokens, normalizer = counts(batch.mask[minibatch], config)
        metrics.begin()
        mine = parts(minibatch[workers.rank :: workers.size], config.micro_batch_size)
        for rows, counted in workers.in_step(mine, idle=minibatch[:1]):
            mask = batch.mask[rows] & counted
            with policy.precision():
                hidden = answer_hidden(policy.body, batch.rollout, rows, packed=policy.packed)
                loss, stats = policy_term(
                    policy, hidden, batch, rows, mask, config,
                    beta=control.beta, normalizer=normalizer,
                )  # fmt: skip
                if config.positive_nll_coef:
                    loss = loss + positive_nll(policy, hidden, batch, rows, mask, minibatch, config)
            metrics.add_policy(loss, stats)
            if policy.value_body is not None:  # the graph is gone before the critic's is made
                stepper.backward(loss)
                loss = None
            with policy.precision():
                values = predict_values(policy, hidden, batch.rollout, rows)
            if values is not None:
                value_part, value_stats = value_loss(
                    values, batch.old.values[rows], batch.returns[rows], mask,
                    clip=config.value_clip, normalizer=tokens,
                )  # fmt: skip
                metrics.add_values(value_part, value_stats, config.value_coef)
                if config.value_coef:
                    weighted = config.value_coef * value_part
                    loss = weighted if loss is None else loss + weighted
            if loss is not None:
                stepper.backward(loss)
        metrics.sum_up(workers)

        if config.target_kl is not None and metrics.kl > config.target_kl:
            stepper.drop()
            break
        norm, made = stepper.step(metrics.loss)
        metrics.end(norm, made)
        scheduler.step()
        if not control.made(made):
            break
    return metrics.of_the_step(batch.old, batch.mask)


def policy_term(
    policy: Policy,
    hidden: Tensor,
    batch: Batch,
    rows: Tensor,
    mask: Tensor,
    config: PPOConfig,
    *,
    beta: float,
    normalizer: Tensor,
) -> tuple[Tensor, PolicyStats]:
    """The policy's loss on some rows of the batch, from their hidden states [b, T, H]; mask [b, T]:
    the tokens that count."""
    rollout, old, advantages = batch.rollout, batch.old, batch.advantages
    weights = batch.corrections.weights
    corrections = None if weights is None else weights[rows]
    if (threshold := config.off_policy_mask_threshold) is not None:
        with torch.no_grad():  # the policy as it is now: by each update it moves away
            logp, _ = logprobs(policy, hidden, policy.head, rollout, rows, config)
        kept = off_policy_mask(logp, rollout.logp[rows], advantages[rows], mask, threshold)
        corrections = kept.float() if corrections is None else corrections * kept
    return linear_policy_loss(
        hidden, policy.head.weight, rollout.labels[rows], old.logp[rows], advantages[rows], mask,
        normalizer=normalizer, importance_weights=corrections, ref_logp=old.ref_logp[rows],
        **config.policy_options(beta),
        temperature=config.temperature * logit_divisor(policy.model),
        softcap=softcap(policy.model), bias=policy.head.bias,
        support=None if rollout.support is None else rollout.support[rows],
    )  # fmt: skip
