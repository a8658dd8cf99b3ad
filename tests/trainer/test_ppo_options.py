"""Each option of the trainer does what it says, in a run of a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

import rlhf_fast.trainer.ppo as ppo
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rollout.sample import Completions, sample
from rlhf_fast.trainer.run.folder import read_metrics


def metrics(config: PPOConfig) -> list[dict[str, float]]:
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


@pytest.fixture
def seen(monkeypatch):
    """Arguments of every call of linear_policy_loss."""
    calls, real = [], ppo.linear_policy_loss

    def record(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(ppo, "linear_policy_loss", record)
    return calls


# ----------------------------------------------------------------------------------- learning


def test_warm_up_and_schedule(configured):
    """2 steps of 4 updates: 4 of them warm up, then 4 fall linearly to 0."""
    config = configured(steps=2, warmup_steps=4, lr_scheduler_type="linear", learning_rate=0.1)
    ppo.train(config)
    assert [row["lr"] for row in metrics(config)] == pytest.approx([0.1, 0.0])
    config = configured("constant", steps=1, warmup_steps=8, learning_rate=0.1)
    ppo.train(config)
    assert metrics(config)[0]["lr"] == pytest.approx(0.1 * 4 / 8)


def test_adaptive_kl_is_used_and_logged(configured):
    config = configured(steps=3, adaptive_kl_target=0.01, kl_horizon=16, beta=0.5)
    ppo.train(config)
    beta = 0.5
    for row in metrics(config):
        assert row["objective/kl_coef"] == pytest.approx(beta)
        paid = row["objective/scores"] - beta * row["objective/kl"]
        assert row["objective/rlhf_reward"] == pytest.approx(paid, abs=1e-5)
        beta *= 1 + min(max(row["objective/kl"] / 0.01 - 1, -0.2), 0.2)
    assert beta > 0.5


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_a_first_update_starts_at_the_ratio_1_among_the_tokens_left(configured, options):
    config = configured(steps=1, epochs=1, minibatches=1, **options)
    ppo.train(config)
    (row,) = metrics(config)
    assert row["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert row["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
    if "top_k" in options:
        assert 0 < row["policy/entropy_avg"] <= math.log(3)


def test_early_stop_on_kl(configured):
    """The first update starts at KL 0 and is made; the next is too far already."""
    config = configured(steps=2, target_kl=1e-9, epochs=4)
    ppo.train(config)
    assert [row["policy/updates"] for row in metrics(config)] == [1, 1]
    config = configured("far", steps=1, target_kl=100.0, epochs=4)
    ppo.train(config)
    assert metrics(config)[0]["policy/updates"] == 8


def test_optimizer_options(configured, monkeypatch):
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            made.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(ppo.torch.optim, "AdamW", Spy)
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.1}
    ppo.train(configured(steps=1, **options))
    (used,) = made
    assert used["betas"] == (0.8, 0.95)
    assert (used["eps"], used["weight_decay"]) == (1e-7, 0.1)


def test_clip_options_reach_the_loss(configured, seen):
    ppo.train(configured(steps=1, clip=0.1, clip_high=0.28, dual_clip=3.0))
    assert {(c["clip_low"], c["clip_high"], c["dual_clip"]) for c in seen} == {(0.1, 0.28, 3.0)}
    assert all(c["kl_coef"] == 0 and c["importance_weights"] is None for c in seen)


TRUNCATED = [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8}]


@pytest.mark.parametrize("options", [*TRUNCATED, {"top_k": 3, "temperature": 1.7, "bf16": True}])
def test_before_the_first_update_all_ratios_are_1(configured, seen, options):
    """That of policy and old policy, that of rollout and trainer, and the one of policy and
    reference, which are the same model: whatever sampling left out."""
    config = configured(
        steps=1, epochs=1, minibatches=1, tis_cap=2.0, eval_prompts=2, estimator="reinforce",
        trainable_layers=1, beta=0.1, **options,
    )  # fmt: skip
    ppo.train(config)
    (call,), row = seen, metrics(config)[0]
    one = 1e-2 if config.bf16 else 1e-5
    assert row["val/ratio"] == pytest.approx(1, abs=one)
    assert row["val/rollout_ratio_max"] == pytest.approx(1, abs=10 * one)
    weights = call["importance_weights"]
    weights = weights[weights != 0]  # of the answers' tokens
    assert len(weights) == round(16 * row["val/answer_tokens"])
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=10 * one)
    assert row["objective/kl"] == pytest.approx(0, abs=10 * one)
    assert (call["support"] is None) == (not set(options) - {"temperature", "bf16"})


def test_an_engine_that_does_not_say_what_it_left_out(configured):
    def silent(*given):
        return sample(*given)._replace(support=None)

    with pytest.warns(UserWarning, match="samples among few tokens .* does not say among which"):
        ppo.train(configured(steps=1, top_k=3), engine=silent)


def test_kl_in_the_loss(configured, seen):
    config = configured(steps=1, kl_in="loss", kl_estimator="k3", beta=0.3, estimator="reinforce")
    ppo.train(config)
    assert {(c["kl_coef"], c["kl_estimator"]) for c in seen} == {(0.3, "k3")}
    assert all(c["ref_logp"].shape[1] > 0 for c in seen)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
def test_micro_batches_change_nothing(configured, aggregation):
    """As with token-mean: what a loss is divided by is counted over the whole minibatch."""
    whole = configured("whole", steps=2, aggregation=aggregation)
    cut = configured("cut", steps=2, aggregation=aggregation, micro_batch_size=3)
    ppo.train(whole), ppo.train(cut)
    for a, b in zip(metrics(whole), metrics(cut), strict=True):
        for name in ("objective/scores", "loss/policy_avg", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


# --------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo", "dr_grpo"])
def test_learns_without_a_critic(configured, estimator):
    groups = {} if estimator == "reinforce" else {"samples_per_prompt": 4}
    config = configured(estimator=estimator, steps=20, batch_size=32, beta=0.01, **groups)
    summary = ppo.train(config)
    assert summary["score_after"] > summary["score_before"] + 0.3
    assert not {"loss/value_avg", "val/explained_var"} & metrics(config)[0].keys()
    assert not (Path(config.output_dir) / "model" / "value_head.safetensors").exists()


def test_groups_are_answers_to_one_prompt(configured, reward, monkeypatch):
    batches, real = [], ppo.sample_answers

    def record(policy, batch, *arguments, **options):
        batches.append([prompt.prompt for prompt in batch])
        return real(policy, batch, *arguments, **options)

    monkeypatch.setattr(ppo, "sample_answers", record)
    rows = [{"prompt": f"film {i}"} for i in range(40)]
    config = configured(prompts=rows, steps=2, samples_per_prompt=4, estimator="reinforce")
    ppo.train(config)
    assert len(batches) == 2
    for batch in batches:
        assert len(batch) == 16 and len(set(batch)) == 4
        assert all(len(set(batch[i : i + 4])) == 1 for i in range(0, 16, 4))


def test_remax_compares_with_greedy_answers(configured, monkeypatch):
    """Those of transformers' generate; a prompt that follows itself is answered once."""
    seen, real = [], ppo.greedy_scores

    def record(policy, asked, reward, config, *more):
        texts = []
        for prompt in asked:
            ids = torch.tensor([prompt.ids])
            out = policy.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            answer = policy.tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
            texts.append(answer.split().count("good") / max(1, len(answer.split())))
        calls = []
        scores = real(policy, asked, lambda *x: calls.append(x[1]) or reward(*x), config, *more)
        seen.append((scores, texts, calls))
        return scores

    monkeypatch.setattr(ppo, "greedy_scores", record)
    ppo.train(configured(steps=1, estimator="remax", samples_per_prompt=2, batch_size=8))
    ((scores, expected, (answers,)),) = seen
    assert scores.tolist() == pytest.approx(expected)
    assert len(answers) <= 4 and len(set(expected)) > 1


def test_while_the_critic_warms_up_the_policy_stays(configured, tiny_policy_folder):
    before = load_file(Path(tiny_policy_folder) / "model.safetensors")
    for value_model in (None, tiny_policy_folder):
        config = configured(
            f"warm{value_model is None}", steps=2, critic_warmup_steps=1, save_every=1,
            value_model=value_model, weight_decay=0.1, eval_prompts=1,
        )  # fmt: skip
        ppo.train(config)
        moved = []
        for step in (1, 2):
            file = Path(config.output_dir) / "checkpoints" / f"step_{step}.pt"
            weights = torch.load(file, weights_only=True)["weights"]
            end = "layers.0.mlp.up_proj.weight"
            now, then = (
                next(w for x, w in y.items() if x.endswith(end)) for y in (weights, before)
            )
            moved.append(not torch.equal(now, then))
            assert any(x.any() for key, x in weights.items() if "value_head" in key)
        assert moved == [False, True]


# ------------------------------------------------------------------------------------- models


@pytest.mark.long
def test_lora_learns_and_its_reference_stays(configured, tiny_policy_folder):
    config = configured(
        lora_r=4, lora_alpha=8, learning_rate=2e-2, steps=20, batch_size=32, beta=0.01, save_every=5
    )
    summary = ppo.train(config)
    rows = metrics(config)
    assert summary["score_after"] > summary["score_before"] + 0.3
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["objective/kl"] > 0.3

    folder = Path(config.output_dir)
    state = torch.load(folder / "checkpoints" / "step_20.pt", weights_only=True)
    assert all("lora_" in name or "value_head" in name for name in state["weights"])
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(tiny_policy_folder)
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")  # merged: no peft needed
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert (whole(ids).logits - base(ids).logits).abs().max() > 0.1

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(adapted(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)


def test_lora_on_what_cannot_have_it(configured):
    with pytest.raises(InputError, match="lora_target_modules: .*nothing_like_it"):
        ppo.train(configured(lora_r=4, lora_target_modules="nothing_like_it"))
    with pytest.raises(InputError, match="names the output head"):
        ppo.train(configured(lora_r=4, lora_target_modules="q_proj,lm_head"))


@pytest.mark.parametrize("layers", [None, 2])
def test_a_critic_of_its_own_learns(configured, reward, tiny_policy_folder, layers):
    config = configured(
        value_model=tiny_policy_folder, reward=reward("three"), steps=15, beta=0.0,
        learning_rate=1e-5, trainable_layers=layers,
    )  # fmt: skip
    ppo.train(config)
    rows = metrics(config)
    assert rows[0]["loss/value_avg"] > 2 and rows[-1]["loss/value_avg"] < 0.3
    folder = Path(config.output_dir)
    body = load_file(folder / "value_model" / "model.safetensors")
    before = load_file(Path(tiny_policy_folder) / "model.safetensors")
    name = "layers.0.self_attn.q_proj.weight"
    assert (body[name] - before[f"model.{name}"]).abs().max() > 1e-3


def test_a_critic_begins_as_the_reward_model(configured, tiny_reward_folder):
    config = configured(value_model=tiny_reward_folder, steps=1)
    ppo.train(config)
    assert metrics(config)[0]["val/explained_var"] != 0  # a zero head explains exactly nothing


def test_bf16(configured):
    rounded, exact = configured("bf16", bf16=True, steps=2), configured("float32", steps=2)
    ppo.train(rounded), ppo.train(exact)
    a, b = metrics(rounded)[0], metrics(exact)[0]
    assert a["objective/entropy"] == pytest.approx(b["objective/entropy"], rel=0.02)  # 8 bits:
    assert 1e-4 < a["val/rollout_logp_gap"] < 0.05  # other numbers, near the right ones
    assert b["val/rollout_logp_gap"] < 1e-5
    saved = load_file(Path(rounded.output_dir) / "model" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in saved.values())


def test_a_model_that_scales_its_logits(configured, tiny_tokenizer, tmp_path):
    """Log-probs of rollout and trainer agree, and so does the loss's ratio at the first update."""
    config = GraniteConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, logits_scaling=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tiny_tokenizer.save_pretrained(tmp_path / "granite")
    options = {"epochs": 1, "minibatches": 1, "steps": 1, "temperature": 0.7}
    run = configured(model=str(tmp_path / "granite"), **options)
    ppo.train(run)
    (row,) = metrics(run)
    assert row["val/rollout_logp_gap"] < 1e-4
    assert row["val/ratio"] == pytest.approx(1, abs=1e-5) and row["val/ratio_var"] < 1e-8


# ------------------------------------------------------------------------------------ engines

ENGINE = """
import torch
from rlhf_fast.trainer.rollout.sample import Completions

def says_good(model, ids, mask, sampling, draws):
    tokens = torch.tensor([[3, 3, 1]]).repeat(len(ids), 1)  # good good <eos>
    return Completions(tokens, torch.ones_like(tokens).bool(), torch.full((len(ids), 3), -0.1))
"""


@pytest.mark.parametrize("layers", [None, 2])
def test_an_engine_in_one_file(configured, tmp_path, layers):
    (tmp_path / "engine.py").write_text(ENGINE)
    config = configured(
        rollout_engine=f"{tmp_path / 'engine.py'}:says_good", steps=1, trainable_layers=layers
    )
    ppo.train(config)
    (row,) = metrics(config)
    assert row["objective/scores"] == 1.0 and row["val/num_eos_tokens"] == 16
    assert row["val/answer_tokens"] == 3
    assert row["val/rollout_logp_gap"] > 0.5  # the engine's log-probs are made up
    with pytest.raises(
        InputError,
        match="rollout_engine=x: expected transformers, vllm, vllm-server, file",
    ):
        ppo.train(configured("bad", rollout_engine="x"))
    (tmp_path / "two.py").write_text("def two(prompts, completions): ...")
    with pytest.raises(InputError, match="two.py:two: too many .*expected a function of .model, i"):
        ppo.train(configured("bad", rollout_engine=f"{tmp_path / 'two.py'}:two"))


def test_an_engine_with_other_numerics_is_corrected(configured, seen):
    def biased(model, ids, mask, sampling, draws):
        done = sample(model, ids, mask, sampling, draws)
        shift = torch.tensor(4.0).log()
        return Completions(done.tokens, done.mask, (done.logp - shift) * done.mask)

    config = configured(steps=1, tis_cap=2.0)
    ppo.train(config, engine=biased)
    weights = torch.cat([c["importance_weights"].flatten() for c in seen])
    assert weights.max() == 2.0  # the ratio is 4, cut at the cap
    assert (weights == 2.0).float().mean() > 0.5
    assert metrics(config)[0]["val/rollout_ratio_max"] == pytest.approx(4, rel=1e-3)


# ---------------------------------------------------------------------------- bad luck, output


def test_a_run_without_updates_stops_with_the_batch(configured, monkeypatch):
    healthy, calls = ppo.linear_policy_loss, 0

    def nan_later(*arguments, **options):
        nonlocal calls
        calls += 1
        loss, stats = healthy(*arguments, **options)
        return (loss * float("nan") if calls > 8 else loss), stats

    monkeypatch.setattr(ppo, "linear_policy_loss", nan_later)
    config = configured(steps=9, save_every=1, max_skipped_updates=6)
    with pytest.raises(InputError, match="step 4: 6 updates in a row .*checkpoint is that of st"):
        ppo.train(config)
    folder = Path(config.output_dir)
    dump = torch.load(folder / "bad_batch.pt", weights_only=True)
    assert dump["step"] == 4 and len(dump["prompts"]) == 16
    assert dump["rollout"]["ids"].shape[0] == dump["scores"].shape[0] == 16
    state = torch.load(folder / "checkpoints" / "step_3.pt", weights_only=True)
    assert all(torch.isfinite(w).all() for w in state["weights"].values())
    assert [row["skipped_updates"] for row in metrics(config)] == [0, 0, 4]


def test_an_infinite_loss_with_a_finite_gradient_is_skipped(configured, monkeypatch):
    healthy = ppo.linear_policy_loss

    def infinite(*arguments, **options):
        loss, stats = healthy(*arguments, **options)
        return loss + float("inf"), stats

    monkeypatch.setattr(ppo, "linear_policy_loss", infinite)
    config = configured(steps=1)
    assert ppo.train(config)["skipped_updates"] == 4


def test_what_is_shown(configured, capsys):
    config = configured(steps=2, sample_every=1, log_every=1)
    ppo.train(config)
    text = capsys.readouterr().out
    assert "tokens/s" in text and "answer" in text
    assert "s a step: rollout" in text and "learning" in text
    row = metrics(config)[0]
    parts = [row[f"perf/{name}_seconds"] for name in ("rollout", "score", "reference", "update")]
    assert sum(parts) == pytest.approx(row["perf/seconds"])


def test_warnings_in_words(configured, capsys):
    ppo.train(configured(steps=2, learning_rate=0.3, beta=0.0))
    assert "the KL from the reference explodes" in " ".join(capsys.readouterr().out.split())


def test_trackers(configured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(steps=2, report_to="tensorboard")
    ppo.train(config)
    folder = Path(config.output_dir) / "rlhf_fast"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("objective/kl")] == [1, 2]
    assert {*metrics(config)[0]} == {*events.Tags()["scalars"]}  # numbers all of them, none as text
    assert events.Tags()["tensors"] == ["completions/text_summary"]
    shown = events.Tensors("completions/text_summary")
    assert [e.step for e in shown] == [0, 2]
    text = shown[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| step | prompt | completion | score |")
    assert text.count("\n| 2 | ") == config.eval_prompts
    (file,) = folder.glob("*/hparams.yml")
    hyperparameters = yaml.safe_load(file.read_text())
    assert (hyperparameters["batch_size"], hyperparameters["ratio"]) == (16, "token")
    assert "None" not in hyperparameters.values() and "dual_clip" not in hyperparameters


def test_weights_and_biases(configured, reward, monkeypatch, tmp_path):
    """A run offline, through wandb's own process: what it is given, and that it writes its file."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    logged, log = [], wandb.Run.log

    def record(run, values, step=None, **options):
        logged.append((step, dict(values)))
        hyperparameters.update(run.config.as_dict())
        log(run, values, step=step, **options)

    hyperparameters = {}
    monkeypatch.setattr(wandb.Run, "log", record)
    config = configured(steps=2, report_to="wandb", reward=[reward("share"), reward("three")])
    ppo.train(config)
    assert [step for step, row in logged if "completions" in row] == [0, 2]
    logged = [(step, row) for step, row in logged if "completions" not in row]
    assert [step for step, _ in logged] == [1, 2]
    for (_, sent), row in zip(logged, metrics(config), strict=True):
        assert sent == row and sent["objective/scores/three"] == 3
    assert (hyperparameters["batch_size"], hyperparameters["policy_loss"]) == (16, "ppo")
    assert hyperparameters["reward"] == str(config.reward)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"objective/scores/three" in file.read_bytes()


def test_a_tracker_that_cannot_start(configured, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr("rlhf_fast.trainer.distributed.workers.Accelerator.init_trackers", refuses)
    with pytest.raises(InputError, match="report_to=tensorboard cannot start: no API key config"):
        ppo.train(configured(report_to="tensorboard"))


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_tracker_that_fails_costs_nothing(configured, monkeypatch, capsys, method):
    def fails(*_, **__):
        raise ConnectionError("server [gone]")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fails)
    config = configured(steps=2, report_to="tensorboard")
    ppo.train(config)
    assert len(metrics(config)) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("goes on without: ConnectionError: server [gone]") == 1  # and is told once


def test_trackers_that_are_not_there(configured):
    with pytest.raises(InputError, match="report_to=tensorbord: expected one of .*tensorboard"):
        ppo.train(configured(report_to="tensorbord"))


def test_summary_counts_and_profile_survive_a_resume(configured):
    config = configured(steps=2, save_every=1)
    ppo.train(config)
    folder = Path(config.output_dir)
    (folder / "summary.json").unlink()  # as if killed before the last file
    config.resume = True
    assert ppo.train(config)["skipped_updates"] == 0
    assert json.loads((folder / "summary.json").read_text())["score_before"] >= 0
