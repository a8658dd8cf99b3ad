"""Train a policy with PPO against a reward: one loop, read from top to bottom.

A step samples an answer to each prompt of a batch, scores the answers, turns score and KL from the
frozen reference into a reward for every token, estimates advantages with GAE, and makes several
passes over the batch with the clipped losses on the log-probs stored before the first of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from rlhf_fast import (
    gae,
    kl_penalized_rewards,
    linear_policy_loss,
    linear_token_logprobs,
    masked_mean,
    masked_whiten,
    token_kl,
    value_loss,
)
from rlhf_fast.config import InputError, PPOConfig
from rlhf_fast.data import Prompt, batch_indices, load_rows, pad
from rlhf_fast.data import prompts as load_prompts
from rlhf_fast.models import Policy, load_policy, pick_device, softcap
from rlhf_fast.report import answers_table, console, plot, progress_bar
from rlhf_fast.rollout import Rollout, answer_hidden, answers, sample
from rlhf_fast.run import Run, read_metrics
from rlhf_fast.scorers import Scorer, load_scorer


def train(config: PPOConfig) -> dict:
    """Returns (and saves as summary.json) score, judge and KL before and after training."""
    run = Run(config)
    if run.summary is not None:
        console.print(f"{run.folder} is finished already: {run.summary}")
        return run.summary

    began = time.perf_counter()
    device = pick_device(config.device)
    reward = load_scorer(config.reward, config.reward_weights, field="reward", device=device)
    judge = load_scorer(config.judge, field="judge", device=device) if config.judge else None
    policy = load_policy(config.model, trainable_layers=config.trainable_layers, device=device)
    held_out, prompts = split_prompts(config, policy)
    weights = policy.trained()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in policy.model.parameters() if p.requires_grad]},
            {"params": list(policy.value_head.parameters()), "lr": config.value_learning_rate},
        ],
        lr=config.learning_rate, eps=1e-5, weight_decay=0.0,
    )  # fmt: skip
    run.begin()
    # Answering held-out prompts first also shows whether reward and judge work at all.
    before = run.load("before.json") if run.exists else None
    if before is None:
        before = evaluate(policy, held_out, reward, judge, config)
        run.save("before.json", before)
    first = run.restore(weights, optimizer)

    with progress_bar("ppo", config.steps, first) as bar:
        for step in range(first, config.steps):
            # Everything random is a function of (seed, step): a resumed run repeats no draw.
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
            clock = [time.perf_counter()]

            # 1. Sample an answer to each prompt.
            rows = batch_indices(len(prompts), config.batch_size, step, config.seed)
            batch = [prompts[i] for i in rows]
            rollout = sample_answers(policy, batch, config, generator)
            mask = rollout.mask  # [B, T]
            clock.append(time.perf_counter())

            # 2. Score the answers.
            texts = answers(policy.tokenizer, rollout)
            try:
                raw_scores = score(reward, batch, texts)
                judged = None if judge is None else score(judge, batch, texts)
            except BaseException:  # a reward function's error must not cost what was learnt
                run.save_checkpoint(step, weights, optimizer)
                raise
            scores = raw_scores.to(device)
            if config.score_clip is not None:
                scores = scores.clamp(-config.score_clip, config.score_clip)
            scores = scores - config.missing_eos_penalty * (~rollout.ended).float()
            clock.append(time.perf_counter())

            # 3. Log-probs and values of what was sampled, before anything changes.
            old_logp, old_values, entropy, ref_logp = measure(policy, rollout, config)

            # 4. Rewards per token, advantages, returns. Returns come before whitening.
            rewards = kl_penalized_rewards(scores, old_logp, ref_logp, mask, beta=config.beta)
            advantages, returns = gae(rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
            advantages = masked_whiten(advantages, mask)

            # 5. Several passes over the batch, each in minibatches that cover it.
            stats: dict[str, list[Tensor]] = defaultdict(list)
            skipped = 0
            for _ in range(config.epochs):
                order = torch.randperm(len(batch), generator=generator, device=device)
                for minibatch in order.chunk(config.minibatches):
                    tokens = mask[minibatch].sum()
                    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
                    for part in minibatch.split(config.micro_batch_size or len(minibatch)):
                        m = mask[part]
                        hidden = answer_hidden(policy.body, rollout, part)  # [b, T, H]
                        values = policy.value_head(hidden).squeeze(-1)
                        policy_part, policy_stats = linear_policy_loss(
                            hidden, policy.head.weight, rollout.labels[part], old_logp[part],
                            advantages[part], m, clip_low=config.clip, clip_high=config.clip,
                            entropy_coef=config.entropy_coef, normalizer=tokens,
                            temperature=config.temperature, softcap=softcap(policy.model),
                            bias=policy.head.bias,
                        )  # fmt: skip
                        value_part, value_stats = value_loss(
                            values, old_values[part], returns[part], m,
                            clip=config.value_clip, normalizer=tokens,
                        )  # fmt: skip
                        loss = policy_part + config.value_coef * value_part
                        loss.backward()

                        share = m.sum() / tokens
                        sums["loss/policy_avg"] += policy_part.detach()
                        sums["loss/value_avg"] += value_part.detach()
                        sums["policy/approxkl_avg"] += policy_stats.old_kl_k2 * share
                        sums["policy/clipfrac_avg"] += policy_stats.clipfrac * share
                        sums["policy/entropy_avg"] += policy_stats.entropy * share
                        sums["val/ratio"] += policy_stats.ratio_mean * share
                        sums["val/ratio_var"] += policy_stats.ratio_var * share
                        sums["val/clipfrac_avg"] += value_stats.clipfrac * share

                    norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
                    if torch.isfinite(norm):
                        optimizer.step()
                        for name, value in sums.items():
                            stats[name].append(value)
                        stats["grad_norm"].append(norm)
                    else:  # one bad minibatch must not end a run, nor enter the weights
                        skipped += 1
                    optimizer.zero_grad()
            clock.append(time.perf_counter())

            # 6. What happened.
            kl = masked_sum(token_kl(old_logp, ref_logp, "k1"), mask)  # [B], nats a sequence
            seconds = clock[-1] - clock[0]
            row = {
                "step": step + 1,
                "episode": (step + 1) * config.batch_size,
                "objective/scores": raw_scores.mean().item(),
                "objective/scores_std": raw_scores.std(correction=0).item(),
                **{
                    f"objective/scores/{name}": part.nanmean().item()
                    for name, part in reward.components.items()
                },
                "objective/kl": kl.mean().item(),
                "objective/entropy": masked_sum(entropy, mask).mean().item(),
                "objective/non_score_reward": -config.beta * kl.mean().item(),
                "objective/rlhf_reward": scores.mean().item() - config.beta * kl.mean().item(),
                **({} if judged is None else {"objective/judge": judged.mean().item()}),
                **{name: torch.stack(values).mean().item() for name, values in stats.items()},
                "val/num_eos_tokens": int(rollout.ended.sum()),
                "val/explained_var": explained_variance(old_values, returns, mask),
                "val/rollout_logp_gap": masked_mean((rollout.logp - old_logp).abs(), mask).item(),
                "skipped_updates": skipped,
                "lr": config.learning_rate,
                "eps": config.batch_size / seconds,
                "perf/seconds": seconds,
                "perf/rollout_seconds": clock[1] - clock[0],
                "perf/score_seconds": clock[2] - clock[1],
                "perf/update_seconds": clock[3] - clock[2],
                "perf/tokens_per_second": int(mask.sum()) / seconds,
            }
            run.log(row)
            bar.show(summary_line(row))
            if (step + 1) % config.log_every == 0:
                console.print(f"step {step + 1}/{config.steps}  {summary_line(row)}")
            if (step + 1) % config.save_every == 0:
                run.save_checkpoint(step + 1, weights, optimizer)

    # The trained policy, the table, the plot; the summary last: it marks the run as finished.
    run.write("model", lambda folder: save_policy(policy, folder))
    after = evaluate(policy, held_out, reward, judge, config)
    run.save("after.json", after)
    rows = read_metrics(run.metrics)
    run.write("plot.png", lambda path: plot(rows, path))
    summary = summarise(before, after) | {
        "skipped_updates": sum(row["skipped_updates"] for row in rows),
        "seconds": round(time.perf_counter() - began, 1),
    }
    run.save("summary.json", summary)
    console.print(answers_table(before, after))
    console.print(
        "  ".join(f"{name} {value:.3g}" for name, value in summary.items())
        + f"\nmodel, plot.png and metrics.jsonl in {run.folder}"
    )
    return summary


def split_prompts(config: PPOConfig, policy: Policy) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts answered before and after, prompts to train on)."""
    rows = load_rows(
        config.data, split=config.split, subset=config.subset, max_rows=config.max_rows
    )
    prompts = load_prompts(
        rows, policy.tokenizer, source=config.data, max_tokens=config.max_prompt_tokens
    )
    if len(prompts) <= config.eval_prompts:
        raise InputError(
            f"data={config.data} has {len(prompts)} prompts: too few to keep "
            f"eval_prompts={config.eval_prompts} of them from training"
        )
    return prompts[: config.eval_prompts], prompts[config.eval_prompts :]


def sample_answers(
    policy: Policy, batch: list[Prompt], config: PPOConfig, generator: torch.Generator
) -> Rollout:
    ids, mask = pad([prompt.ids for prompt in batch], side="left")
    device = policy.model.device
    return sample(
        policy.model, ids.to(device), mask.to(device), max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, stop_ids=policy.stop_ids, generator=generator,
        trunk_layers=policy.trunk_layers,
    )  # fmt: skip


def score(scorer: Scorer, batch: list[Prompt], texts: list[str]) -> Tensor:
    columns = {name: [p.columns[name] for p in batch] for name in batch[0].columns}
    return scorer([p.prompt for p in batch], texts, columns)


def logprobs(
    policy: Policy,
    hidden: Tensor,
    head: torch.nn.Module,
    rollout: Rollout,
    rows: Tensor | slice,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) [b, T] of the answers' tokens; no [b, T, V] tensor is ever held."""
    labels = rollout.labels[rows].masked_fill(~rollout.mask[rows], -100)
    return linear_token_logprobs(
        hidden, head.weight, labels, bias=head.bias, temperature=config.temperature,
        softcap=softcap(policy.model), entropy=True,
    )  # fmt: skip


@torch.no_grad()
def measure(policy: Policy, rollout: Rollout, config: PPOConfig) -> tuple[Tensor, ...]:
    """(logp, values, entropy, ref_logp), each [B, T], under the present weights."""
    columns = []
    for rows in slices(len(rollout.ids), config.micro_batch_size):
        hidden = answer_hidden(policy.body, rollout, rows)
        logp, entropy = logprobs(policy, hidden, policy.head, rollout, rows, config)
        values = policy.value_head(hidden).squeeze(-1)
        reference = answer_hidden(policy.reference_body, rollout, rows)
        ref_logp, _ = logprobs(policy, reference, policy.reference_head, rollout, rows, config)
        columns.append((logp, values, entropy, ref_logp))
    return tuple(torch.cat(parts) for parts in zip(*columns, strict=True))


def slices(size: int, step: int | None) -> Iterator[slice]:
    step = step or size
    return (slice(at, at + step) for at in range(0, size, step))


def evaluate(
    policy: Policy, prompts: list[Prompt], reward: Scorer, judge: Scorer | None, config: PPOConfig
) -> dict[str, list]:
    """Answers to held-out prompts with score, judge's score and KL; the same draws each time."""
    result: dict[str, list] = defaultdict(list)
    generator = torch.Generator(policy.model.device).manual_seed(config.seed)
    for rows in slices(len(prompts), config.batch_size):
        batch = prompts[rows]
        rollout = sample_answers(policy, batch, config, generator)
        texts = answers(policy.tokenizer, rollout)
        logp, _, _, ref_logp = measure(policy, rollout, config)
        result["prompt"] += [prompt.prompt for prompt in batch]
        result["answer"] += texts
        result["score"] += score(reward, batch, texts).tolist()
        if judge is not None:
            result["judge"] += score(judge, batch, texts).tolist()
        result["kl"] += masked_sum(token_kl(logp, ref_logp, "k1"), rollout.mask).tolist()
    return dict(result)


def summarise(before: dict, after: dict) -> dict[str, float]:
    summary = {"score_before": fmean(before["score"]), "score_after": fmean(after["score"])}
    summary["score_rise"] = summary["score_after"] - summary["score_before"]
    if "judge" in before:
        summary["judge_before"] = fmean(before["judge"])
        summary["judge_after"] = fmean(after["judge"])
    return summary | {"kl": fmean(after["kl"])}


def save_policy(policy: Policy, folder) -> None:
    """The policy as transformers reads it; the value head in a file of its own beside it."""
    from safetensors.torch import save_file

    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    save_file(policy.value_head.state_dict(), folder / "value_head.safetensors")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B]."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values)/Var(returns): 1 is a perfect critic, 0 one that knows nothing."""
    returns, values = returns[mask], values[mask]
    spread = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / spread.clamp(min=1e-8)).item()


def summary_line(row: dict[str, float]) -> str:
    judge = f"  judge {row['objective/judge']:+.2f}" if "objective/judge" in row else ""
    return (
        f"score {row['objective/scores']:+.2f}  kl {row['objective/kl']:.2f}{judge}  "
        f"{row['perf/seconds']:.1f} s"
    )
