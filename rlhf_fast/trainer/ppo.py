"""Train a policy with PPO against a reward: one loop, read from top to bottom.

A step samples an answer to each prompt of a batch, scores the answers, turns score and KL from the
frozen reference into a reward for every token, estimates advantages with GAE, and makes several
passes over the batch with the clipped losses on the log-probs stored before the first of them.

Several processes share every batch (see workers.py); read the loop as if there were one.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from transformers import set_seed

from rlhf_fast import (
    gae,
    group_advantages,
    kl_penalized_rewards,
    linear_policy_loss,
    masked_mean,
    masked_whiten,
    token_kl,
    value_loss,
)
from rlhf_fast.ops.policy_loss import PolicyStats
from rlhf_fast.trainer.config import CRITIC_FREE, GROUPED, PPOConfig
from rlhf_fast.trainer.data.read import Rows, load_rows
from rlhf_fast.trainer.data.rows import Prompt, batch_indices
from rlhf_fast.trainer.data.rows import prompts as load_prompts
from rlhf_fast.trainer.distributed.fsdp import gathered
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.measure import (
    Measured,
    gather,
    measure,
    predict_values,
    read_answers,
    sample_answers,
    score_all,
    slices,
)
from rlhf_fast.trainer.metrics import OF_POLICY, SPREAD, Means, times, with_variance
from rlhf_fast.trainer.models.loading import context_length
from rlhf_fast.trainer.models.logits import logit_divisor, softcap
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import Policy, load_policy
from rlhf_fast.trainer.quiet import quiet
from rlhf_fast.trainer.rewards.functions import load_function
from rlhf_fast.trainer.rewards.scorers import Scorer, load_scorer
from rlhf_fast.trainer.rollout.memory import Way, way_of_decoding
from rlhf_fast.trainer.rollout.sample import (
    Rollout,
    RolloutEngine,
    answer_hidden,
    decodes_exactly,
    sample,
)
from rlhf_fast.trainer.run import interrupts
from rlhf_fast.trainer.run.console import (
    Stopwatch,
    answers_table,
    console,
    profile,
    progress_bar,
    samples_table,
    summary_line,
)
from rlhf_fast.trainer.run.contents import check_contents
from rlhf_fast.trainer.run.diagnostics import warnings
from rlhf_fast.trainer.run.folder import Run, read_metrics
from rlhf_fast.trainer.run.metrics import finite
from rlhf_fast.trainer.run.plot import plot
from rlhf_fast.trainer.schedule import Control, Schedule
from rlhf_fast.trainer.update import Stepper


@interrupts.guarded()
@quiet()
def train(config: PPOConfig, *, engine: RolloutEngine | None = None) -> dict:
    """Returns (and saves as summary.json) score, judge and KL before and after training."""
    workers = Workers(config)
    run = Run(config, writes=workers.is_main)
    workers.wait()  # all have seen what was there before one of them writes
    if run.summary is not None:
        console.print(f"{run.folder} is finished already: {run.summary}")
        return run.summary

    began = time.perf_counter()
    device = workers.device
    rows = load_rows(
        config.data, split=config.split, subset=config.subset, max_rows=config.max_rows
    )
    load = partial(
        load_scorer,
        device=device,
        trust=config.trust_remote_code,
        timeout=config.reward_timeout,
        ran={},
    )
    reward = load(config.reward, config.reward_weights, field="reward")
    judge = load(config.judge, field="judge") if config.judge else None
    engine = load_engine(config) if engine is None else engine
    policy = load_policy(
        config.model,
        device=device,
        trainable_layers=config.trainable_layers,
        critic=config.estimator not in CRITIC_FREE,
        value_model=config.value_model,
        lora=lora_options(config),
        attn_implementation=config.attn_implementation,
        bf16=config.bf16,
        packing=config.packing,
        save_dtype=config.save_dtype,
        trust=config.trust_remote_code,
    )
    policy.exact_decoding = decodes_exactly(policy)
    if workers.is_main and engine is None and way_of_decoding(policy.model, sample) is Way.NONE:
        console.print(
            f"{type(policy.model).__name__} has no cache that decoding can use: each token takes a "
            "pass over all before it, which is slow for long answers"
        )
    workers.shard(policy)
    held_out, prompts = split_prompts(config, policy, rows)
    for scorer in (reward, judge):
        if scorer is not None:
            scorer.check_lengths([p.prompt for p in held_out + prompts], config.max_new_tokens)
    weights, critic = policy.trained(), policy.critic()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in weights.items() if name not in critic]},
            {"params": list(critic.values()), "lr": config.value_learning_rate},
        ],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon, weight_decay=config.weight_decay,
        fused=True,  # on a CPU, SmolLM2-135M: 41 to 65 ms against 347, two cores
    )  # fmt: skip
    stepper = workers.stepper(policy, optimizer, config.max_grad_norm)
    updates = config.epochs * config.minibatches  # in a step that target_kl does not end
    scheduler = Schedule(
        optimizer, config.lr_scheduler_type, config.warmup_steps, config.steps * updates
    )
    control = Control(config)
    run.check_end(config.steps)
    names = ("model", "value_model", "reward", "judge", "rollout_engine")
    contents = {"data": rows} | {name: getattr(config, name) for name in names}
    workers.main_only(partial(check_contents, run, contents))
    run.begin()
    # Answering held-out prompts first also shows whether reward and judge work at all.
    columns = ("prompt", "answer", "score", "kl")
    before = run.load("before.json", columns) if run.exists else None
    if before is None:
        before = evaluate(policy, held_out, reward, judge, config, workers)
        run.save("before.json", before)
    first = workers.agreed(
        run.restore(weights, stepper.optimizer, control=control), "step to go on from"
    )
    history = read_metrics(run.metrics)
    workers.start_trackers(run.folder.name, asdict(config))
    if workers.is_main and workers.size > 1:
        shared = f"each batch of {config.batch_size} answers{workers.sharing}"
        console.print(f"{workers.size} processes share {shared}")

    with progress_bar("ppo", config.steps, first, shown=workers.is_main) as bar:
        for step in range(first, config.steps):
            # Everything random is a function of (seed, step): a resumed run repeats every draw,
            # those of a reward function from the global generators included.
            seed = config.seed * 1_000_003 + step
            set_seed(seed % 2**32)  # NumPy takes no larger one
            generator = torch.Generator().manual_seed(seed)
            clock = Stopwatch(device)
            scheduler.after(step * updates)
            learnt = partial(run.keep, step, weights, stepper.optimizer, control=control)
            interrupts.step_begins(learnt, alone=workers.size == 1)

            # 1. Sample answers to each prompt, this process to its share of the batch.
            groups = config.batch_size // config.samples_per_prompt
            rows = batch_indices(len(prompts), groups, step, config.seed)
            batch = [prompts[i] for i in rows for _ in range(config.samples_per_prompt)]
            mine = workers.share(len(batch))
            rollout = sample_answers(policy, batch, config, generator, share=mine, engine=engine)
            clock.lap("rollout")

            # 2. Score the answers.
            texts = read_answers(policy, rollout, batch[mine], config)
            try:
                scored = workers.attempt(score_all, reward, judge, batch[mine], texts)
            except BaseException:  # a reward function's error must not cost what was learnt
                interrupts.keep_what_was_learnt()
                raise
            # All answers' scores: "scores", "scores/<name>" of each of several rewards, "judge".
            columns = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
            raw_scores = columns["scores"]
            clock.lap("score")

            # 3. Log-probs and values of what was sampled, before anything changes.
            rollout, old = gather(workers, rollout, measure(policy, rollout, config))
            mask = rollout.mask  # [B, T]
            clock.lap("reference")

            # 4. Advantages and returns from the scores, and the KL they cost.
            scores = shaped(raw_scores.to(device), rollout.ended, config)
            advantages, returns = estimate(scores, old, mask, control.beta, config)

            # 5. Several passes over the batch, each in minibatches that cover it.
            interrupts.update_begins()
            stats = learn(
                policy, rollout, old, advantages, returns, config, stepper, scheduler, control,
                workers, generator,
            )  # fmt: skip
            clock.lap("update")

            # 6. What happened.
            kl = masked_sum(token_kl(old.logp, old.ref_logp, "k1"), mask)  # [B], nats a sequence
            row = {
                "step": step + 1,
                "episode": (step + 1) * config.batch_size,
                **{f"objective/{name}": x.nanmean().item() for name, x in columns.items()},
                "objective/scores_std": raw_scores.std(correction=0).item(),
                "objective/kl": kl.mean().item(),
                "objective/kl_coef": control.beta,
                "objective/entropy": masked_sum(old.entropy, mask).mean().item(),
                "objective/non_score_reward": -times(control.beta, kl.mean().item()),
                "objective/rlhf_reward": scores.mean().item()
                - times(control.beta, kl.mean().item()),
                **stats,
                "val/num_eos_tokens": int(rollout.ended.sum()),
                "val/answer_tokens": mask.sum().item() / len(batch),
                **rollout_gap(rollout, old),
                **(
                    {}
                    if old.values is None
                    else {"val/explained_var": explained_variance(old.values, returns, mask)}
                ),
                "lr": optimizer.param_groups[0]["lr"],
                "eps": config.batch_size / clock.total,
                **clock.metrics(),
                "perf/tokens_per_second": int(mask.sum()) / clock.total,
            }
            if control.skipped_in_a_row >= config.max_skipped_updates:
                dump = {"prompts": [prompt.prompt for prompt in batch], "scores": scores}
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
                    asked = [prompt.prompt for prompt in batch[mine]]
                    console.print(samples_table(asked, texts, raw_scores[mine].tolist()))
            ending = workers.largest(interrupts.asked())
            if ending or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                run.save_checkpoint(step + 1, weights, stepper.optimizer, control=control)
            if ending:
                interrupts.stop(ending)

    interrupts.steps_are_over()

    # The trained policy, the table, the plot; the summary last: it marks the run as finished.
    whole = gathered(policy.state(), keep=workers.is_main)
    run.write("model", lambda folder: policy.save(folder, whole))
    if policy.value_body is not None:
        run.write("value_model", lambda folder: policy.save_critic(folder, whole))
    if config.lora_r is not None:
        save_adapter = partial(policy.model.save_pretrained, state_dict=whole["model"])
        run.write("adapter", save_adapter)
    after = evaluate(policy, held_out, reward, judge, config, workers)
    run.save("after.json", after)
    run.write("plot.png", lambda path: plot(history, path))
    summary = summarise(before, after) | {
        "skipped_updates": sum(row.get("skipped_updates") or 0 for row in history),
        "seconds": round(time.perf_counter() - began, 1),
    }
    run.save("summary.json", summary)
    workers.end()
    if workers.is_main:
        console.print(answers_table(before, after))
        console.print(
            "  ".join(f"{name} {value:.3g}" for name, value in summary.items())
            + f"\n{profile(history)}\nmodel, plot.png and metrics.jsonl in {run.folder}"
        )
    return summary


def shaped(scores: Tensor, ended: Tensor, config: PPOConfig) -> Tensor:
    """Scores [B] as they are learnt from: clipped, and changed where an answer did not end."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_score is not None:
        return scores.where(ended, config.missing_eos_score)
    return scores - config.eos_penalty * (~ended).float()


def estimate(
    scores: Tensor, old: Measured, mask: Tensor, beta: float, config: PPOConfig
) -> tuple[Tensor, Tensor | None]:
    """(advantages [B, T], returns [B, T], or None without a critic)."""
    beta = beta if config.kl_in == "reward" else 0.0
    returns = None
    if config.estimator in GROUPED:
        kl = masked_sum(token_kl(old.logp, old.ref_logp, config.kl_estimator), mask)
        advantages = group_advantages(
            scores - times(beta, kl), config.samples_per_prompt, method=config.estimator
        )
        advantages = advantages[:, None].expand(mask.shape)
    else:
        rewards = kl_penalized_rewards(
            scores, old.logp, old.ref_logp, mask, beta=beta, estimator=config.kl_estimator
        )
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if config.estimator == "gae":
            # Returns come before whitening: the critic learns the rewards' own scale.
            advantages, returns = gae(rewards, old.values, mask, gamma=config.gamma, lam=config.lam)
        else:  # reinforce: the rewards to go, which are GAE at λ = 1 without values
            zeros = torch.zeros_like(rewards)
            advantages, _ = gae(rewards, zeros, mask, gamma=config.gamma, lam=1.0)
    if config.whitens_advantages:
        advantages = masked_whiten(advantages, mask)
    return advantages, returns


def learn(
    policy: Policy,
    rollout: Rollout,
    old: Measured,
    advantages: Tensor,
    returns: Tensor | None,
    config: PPOConfig,
    stepper: Stepper,
    scheduler: Schedule,
    control: Control,
    workers: Workers,
    generator: torch.Generator,
) -> dict[str, float]:
    """The passes over one batch; their statistics, over all tokens of the updates made."""
    device, mask = policy.model.device, rollout.mask
    correction = None
    if config.tis_cap is not None:
        correction = (old.logp - rollout.logp).exp().clamp(max=config.tis_cap)
    losses = ["loss", "loss/policy_avg"]
    statistics = [*OF_POLICY, SPREAD]
    if policy.value_head is not None:
        losses.append("loss/value_avg")
        statistics.append("val/clipfrac_avg")
    step = Means([*losses, *statistics, "grad_norm"], device)
    updates = skipped = 0
    for minibatch in minibatches(len(mask), config, generator):
        tokens, normalizer = counts(mask[minibatch], config)
        known = Means(statistics, device)
        sums = dict.fromkeys(losses, torch.zeros((), device=device))  # of the parts' losses
        mine = parts(minibatch[workers.rank :: workers.size], config.micro_batch_size)
        for part, counted in workers.in_step(mine, idle=minibatch[:1]):
            m = mask[part] & counted
            with policy.precision():
                hidden = answer_hidden(policy.body, rollout, part, packed=policy.packed)
                policy_part, policy_stats = policy_term(
                    policy, hidden, rollout, old, advantages, part, m, config, beta=control.beta,
                    normalizer=normalizer,
                    weights=None if correction is None else correction[part],
                )  # fmt: skip
            apart = policy.value_body is not None
            if apart:  # the policy's graph is gone before the critic's is made
                stepper.backward(policy_part)
            with policy.precision():
                values = predict_values(policy, hidden, rollout, part)
            to_learn = None if apart else policy_part
            sums["loss"] = sums["loss"] + policy_part.detach()
            sums["loss/policy_avg"] = sums["loss/policy_avg"] + policy_part.detach()
            if values is not None:
                value_part, value_stats = value_loss(
                    values, old.values[part], returns[part], m,
                    clip=config.value_clip, normalizer=tokens,
                )  # fmt: skip
                sums["loss/value_avg"] = sums["loss/value_avg"] + value_part.detach()
                known.add({"val/clipfrac_avg": value_stats.clipfrac}, value_stats.tokens)
                if config.value_coef:
                    weighted = config.value_coef * value_part
                    sums["loss"] = sums["loss"] + weighted.detach()
                    to_learn = weighted if apart else policy_part + weighted
            if to_learn is not None:
                stepper.backward(to_learn)
            known.add(
                {
                    "policy/approxkl_avg": policy_stats.old_kl_k2,
                    "policy/clipfrac_avg": policy_stats.clipfrac,
                    "policy/entropy_avg": policy_stats.entropy,
                    "val/ratio": policy_stats.ratio_mean,
                    SPREAD: policy_stats.ratio_var + (policy_stats.ratio_mean - 1) ** 2,
                },
                policy_stats.tokens,  # rows of no advantage may have left
            )
        totals = torch.stack(list(sums.values()))
        workers.sum([totals, known.sums])
        sums = dict(zip(sums, totals, strict=True))

        target = config.target_kl
        if target is not None and known["policy/approxkl_avg"] > target:
            stepper.drop()
            break
        norm, made = stepper.step(sums["loss"])
        if made:
            updates += 1
            step.add(sums | {"grad_norm": norm}, 1)
            step.merge(known)
        else:
            skipped += 1
        scheduler.step()
        if not control.made(made):
            break
    stats = with_variance(step.known())
    if updates and "val/ratio" not in stats:  # no token had an advantage: nothing was looked at
        stats |= unmoved(old, mask)
    return {**stats, "policy/updates": updates, "skipped_updates": skipped}


def unmoved(old: Measured, mask: Tensor) -> dict[str, float]:
    """A step's statistics of the policy that it began with."""
    entropy = masked_mean(old.entropy, mask).item()
    zeros = dict.fromkeys(("policy/approxkl_avg", "policy/clipfrac_avg", SPREAD), 0.0)
    return zeros | {"policy/entropy_avg": entropy, "val/ratio": 1.0}


def policy_term(
    policy: Policy,
    hidden: Tensor,
    rollout: Rollout,
    old: Measured,
    advantages: Tensor,
    rows: Tensor,
    mask: Tensor,
    config: PPOConfig,
    *,
    beta: float,
    normalizer: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, PolicyStats]:
    """The policy's loss on some rows of the batch, from their hidden states [b, T, H]; mask [b, T]:
    the tokens that count."""
    return linear_policy_loss(
        hidden, policy.head.weight, rollout.labels[rows], old.logp[rows], advantages[rows], mask,
        clip_low=config.clip, clip_high=config.clip_high or config.clip,
        dual_clip=config.dual_clip, ratio=config.ratio, loss=config.policy_loss,
        aggregation=config.aggregation, normalizer=normalizer, weights=weights,
        entropy_coef=config.entropy_coef, ref_logp=old.ref_logp[rows],
        kl_coef=beta if config.kl_in == "loss" else 0.0, kl_estimator=config.kl_estimator,
        temperature=config.temperature * logit_divisor(policy.model),
        softcap=softcap(policy.model), bias=policy.head.bias,
    )  # fmt: skip


def minibatches(size: int, config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """Rows of every minibatch of a step: each pass covers the batch, in an order of its own."""
    passes = (torch.randperm(size, generator=generator) for _ in range(config.epochs))
    return [rows for order in passes for rows in order.chunk(config.minibatches)]


def parts(rows: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Rows of every forward pass; none where a process has no share of a small minibatch."""
    return rows.split(size or len(rows)) if len(rows) else ()


def counts(mask: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(tokens of a whole minibatch, what its policy losses are divided by): 0-dim.

    They are those of all micro-batches and processes together, so the parts' gradients add up.
    """
    tokens = mask.sum()
    if config.aggregation == "token-mean":
        return tokens, tokens
    if config.aggregation == "token-sum":
        return tokens, torch.full_like(tokens, len(mask) * config.max_new_tokens)
    return tokens, mask.any(-1).sum()


def load_engine(config: PPOConfig) -> RolloutEngine | None:
    if config.rollout_engine is None:
        return None
    engine = load_function(config.rollout_engine, "rollout_engine")
    try:
        inspect.signature(engine).bind("model", "ids", "mask", "sampling", "draws")
    except TypeError as error:
        raise InputError(
            f"rollout_engine={config.rollout_engine}: {error}; expected a function of "
            "(model, ids, mask, sampling, draws)"
        ) from None
    return engine


def lora_options(config: PPOConfig) -> LoRA | None:
    if config.lora_r is None:
        return None
    modules = [name.strip() for name in (config.lora_target_modules or "").split(",")]
    return LoRA(config.lora_r, config.lora_alpha, [m for m in modules if m] or None, config.seed)


def split_prompts(
    config: PPOConfig, policy: Policy, rows: Rows
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts answered before and after, prompts to train on)."""
    prompts = load_prompts(
        rows, policy.tokenizer, source=config.data, max_tokens=config.max_prompt_tokens
    )
    if len(prompts) <= config.eval_prompts:
        raise InputError(
            f"data={config.data} has {len(prompts)} prompts: too few to keep "
            f"eval_prompts={config.eval_prompts} of them from training"
        )
    models = {f"model={config.model}": policy.model}
    if policy.value_body is not None:
        models[f"value_model={config.value_model}"] = policy.value_body
    longest = max(len(prompt.ids) for prompt in prompts)
    for name, model in models.items():
        room = context_length(model)
        if room is not None and longest + config.max_new_tokens > room:
            raise InputError(
                f"{name} reads at most {room} tokens, but the longest prompt has "
                f"{longest} and max_new_tokens={config.max_new_tokens}: lower that or "
                f"max_prompt_tokens={config.max_prompt_tokens}"
            )
    return hold_out(prompts, config.eval_prompts)


def hold_out(prompts: list[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(the first `count` different prompts, the rows of all others)."""
    first: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(tuple(prompt.ids), prompt)
    if len(first) <= count:
        console.print(
            f"the {len(prompts)} prompts are duplicates of only {len(first)} different ones: the "
            f"eval_prompts={count} answered before and after are trained on, too"
        )
        return prompts[:count], prompts[count:]
    held_out = dict(list(first.items())[:count])
    rest = [prompt for prompt in prompts if tuple(prompt.ids) not in held_out]
    if twice := len(prompts) - count - len(rest):
        console.print(f"{twice} rows with the same prompt as one of eval_prompts are left out")
    return list(held_out.values()), rest


def evaluate(
    policy: Policy,
    prompts: list[Prompt],
    reward: Scorer,
    judge: Scorer | None,
    config: PPOConfig,
    workers: Workers,
) -> dict[str, list]:
    """Answers to held-out prompts with score, judge's score and KL; the same draws each time, and
    our own decoding, so that they can be compared whatever the rollout engine is.

    Every process does the same, since the model may be sharded over all; the main one's scores
    count.
    """
    result: dict[str, list] = defaultdict(list)
    set_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for rows in slices(len(prompts), config.batch_size):
        batch = prompts[rows]
        rollout = sample_answers(policy, batch, config, generator)
        texts = read_answers(policy, rollout, batch, config)
        measured = measure(policy, rollout, config)
        result["prompt"] += [prompt.prompt for prompt in batch]
        result["answer"] += texts
        scored = workers.main_only(partial(score_all, reward, judge, batch, texts))
        result["score"] += scored["scores"].tolist()
        if judge is not None:
            result["judge"] += scored["judge"].tolist()
        kl = token_kl(measured.logp, measured.ref_logp, "k1")
        result["kl"] += masked_sum(kl, rollout.mask).tolist()
    return dict(result)


def summarise(before: dict, after: dict) -> dict[str, float]:
    summary = {"score_before": fmean(before["score"]), "score_after": fmean(after["score"])}
    summary["score_rise"] = summary["score_after"] - summary["score_before"]
    if "judge" in before:
        summary["judge_before"] = fmean(before["judge"])
        summary["judge_after"] = fmean(after["judge"])
    return summary | {"kl": fmean(after["kl"])}


def new_warnings(history: list[dict[str, float]]) -> list[str]:
    """Warnings that the step before did not give."""
    known = warnings(history[:-1])
    return [text for name, text in warnings(history).items() if name not in known]


def rollout_gap(rollout: Rollout, old: Measured) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, of the same tokens."""
    gap = (rollout.logp - old.logp).abs()
    return {
        "val/rollout_logp_gap": masked_mean(gap, rollout.mask).item(),
        "val/rollout_ratio_max": gap.masked_fill(~rollout.mask, 0.0).max().exp().item(),
    }


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B]."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values)/Var(returns): 1 is a perfect critic, 0 one that knows nothing, or
    returns that are all the same (see ValueStats)."""
    return value_loss(values, None, returns, mask, clip=None)[1].explained_var.item()
