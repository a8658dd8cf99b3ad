"""What a continued run takes: every option that is not `fixed` counts from there on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REWARD, STARTS

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.config import PPOConfig, RewardConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.folder import Run, read_metrics

ENGINE_FILE = """
import torch
from rlhf_fast.trainer.rollout.sample import Completions

def says_good(model, ids, mask, sampling, draws):
    tokens = torch.tensor([[3, 3, 1]]).repeat(len(ids), 1)
    return Completions(tokens, torch.ones_like(tokens).bool(), torch.zeros(len(ids), 3))
"""

# Of the runs below, which are of one step of 4 updates before they are continued.
STEERS = {
    "max_grad_norm": 0.01, "missing_eos_penalty": 0.7, "missing_eos_score": -0.7,
    "score_clip": 0.1, "bf16": True, "rollout_engine": "engine.py:says_good", "tis_cap": 0.5,
    "gamma": 0.5, "lam": 0.5, "whiten_rewards": True, "whiten_advantages": False, "beta": 0.7,
    "kl_in": "loss", "kl_estimator": "k2", "adaptive_kl_target": 30.0, "kl_horizon": 50,
    "epochs": 1, "minibatches": 4, "learning_rate": 1e-3, "value_learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 8, "adam_beta1": 0.5, "adam_beta2": 0.5,
    "adam_epsilon": 1e-2, "weight_decay": 0.5, "policy_loss": "cispo", "ratio": "sequence",
    "clip": 0.01, "clip_high": 0.01, "dual_clip": 1.001, "value_clip": 1e-3, "value_coef": 0.7,
    "entropy_coef": 0.1, "aggregation": "seq-mean-token-sum", "target_kl": 1e-9,
    "rollout_veto": 0.1, "bypass": True, "rollout_correction": "mask", "rollout_ratio_min": 0.7,
    "rollout_correction_level": "sequence", "rollout_normalize": True,
    "rollout_reject": "sum_k1", "rollout_reject_above": 0.1,
    "lam_critic": 0.5, "lam_length_alpha": 0.5, "critic_warmup_steps": 2,
    "positive_nll_coef": 0.5, "overlong_cache": 4, "dynamic_sampling_rounds": 2,
    "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 1e-4, "delta": 1.001,
    "unbiased_kl": True,
    "sapo_tau_pos": 3.0, "sapo_tau_neg": 3.0, "vespo_k_pos": 0.5, "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.0,
}  # fmt: skip
# What some of them need beside them: a correction, and what there is to correct. The engine's k1 is
# 2.8 nats a token, of 3 tokens.
ENGINE = {"rollout_engine": "engine.py:says_good"}
REJECT = ENGINE | {"rollout_reject": "mean_k1"}
SAPO, VESPO = {"policy_loss": "sapo"}, {"policy_loss": "vespo", "ratio": "sequence"}
BESIDE = {
    "sapo_tau_pos": SAPO, "sapo_tau_neg": SAPO, "vespo_k_pos": VESPO, "vespo_lambda_pos": VESPO,
    "vespo_k_neg": VESPO, "vespo_lambda_neg": VESPO, "unbiased_kl": {"kl_in": "loss"},
    "delta": {"clip_high": 5e-4}, "rollout_veto": ENGINE, "bypass": ENGINE, "tis_cap": ENGINE,
    "critic_warmup_steps": {"steps": 3, "save_every": 1},  # the last step is the policy's
    "rollout_correction": ENGINE | {"tis_cap": 0.01},
    "rollout_ratio_min": ENGINE | {"tis_cap": 2.0},
    "rollout_correction_level": ENGINE | {"tis_cap": 2.0},
    "rollout_normalize": ENGINE | {"tis_cap": 2.0},
    "rollout_reject": REJECT | {"rollout_reject_above": 5.0},
    "rollout_reject_above": REJECT | {"rollout_reject_above": 5.0},
}  # fmt: skip
CHANGES_NO_NUMBER = {
    "trust_remote_code", "save_dtype",
    "output_dir", "resume", "overwrite", "device", "steps", "micro_batch_size", "save_every",
    "save_total_limit", "max_skipped_updates", "report_to", "log_every", "sample_every",
    "attn_implementation", "packing", "reward_timeout", "eval_every", "load_best_model_at_end",
    "metric_for_best_model", "early_stopping_patience", "stop_at_kl", "push_to_hub",
    "hub_model_id", "hub_private_repo", "rollout_engine_options",
    "reward_concurrency", "reward_retries", "reward_failures",
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_policy_folder) -> PPOConfig:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "reward.py").write_text(REWARD)
    (folder / "engine.py").write_text(ENGINE_FILE)
    rows = [{"prompt": prompt} for prompt in STARTS * 3]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PPOConfig(
        model=tiny_policy_folder, data=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "run"), device="cpu", missing_eos_penalty=0.0, eval_prompts=1,
        reward=f"{folder / 'reward.py'}:share", steps=1, batch_size=8, epochs=2, minibatches=2,
        samples_per_prompt=2, max_new_tokens=6, learning_rate=3e-3, value_learning_rate=1e-2,
        kl_estimator="k3", adaptive_kl_target=1.0, kl_horizon=100,
    )  # fmt: skip
    ppo.train(config)
    return config


@pytest.fixture(scope="module")
def go_on(begun):
    """go_on(**options) -> what the run has learnt after a second step with these."""
    known: dict[str, list[torch.Tensor]] = {}

    def go_on(**options) -> list[torch.Tensor]:
        if (key := json.dumps(options, sort_keys=True)) not in known:
            known[key] = learnt(Path(begun.output_dir).with_name(f"run_{len(known)}"), options)
        return known[key]

    def learnt(folder: Path, options: dict) -> list[torch.Tensor]:
        shutil.copytree(begun.output_dir, folder)
        with pytest.MonkeyPatch.context() as patch:  # drawing takes half of the time
            patch.setattr(ppo, "plot", lambda rows, path: path.touch())
            further = {"output_dir": str(folder), "steps": 2, "resume": True} | options
            ppo.train(replace(begun, **further))
        state = torch.load(folder / "checkpoints" / "step_2.pt", weights_only=True)
        return [*state["weights"].values(), torch.tensor(state["control"]["beta"])]

    return go_on


@pytest.fixture(scope="module")
def unchanged(go_on) -> list[torch.Tensor]:
    return go_on()


def test_every_option_is_one_or_the_other():
    names = {f.name for f in fields(PPOConfig)}
    assert PPOConfig.fixed < names and RewardConfig.fixed < {f.name for f in fields(RewardConfig)}
    assert names - PPOConfig.fixed == STEERS.keys() | CHANGES_NO_NUMBER
    assert not STEERS.keys() & CHANGES_NO_NUMBER


@pytest.mark.parametrize("name", STEERS)
def test_what_steers_learning_counts_from_there_on(begun, go_on, unchanged, monkeypatch, name):
    monkeypatch.chdir(Path(begun.data).parent)
    beside = BESIDE.get(name)
    unchanged = unchanged if beside is None else go_on(**beside)
    changed = go_on(**(beside or {}) | {name: STEERS[name]})
    assert not all(torch.equal(a, b) for a, b in zip(changed, unchanged, strict=True))


def test_unchanged_it_is_the_run_that_was_not_broken(begun, unchanged):
    whole = replace(begun, output_dir=begun.output_dir + "_whole", steps=2)
    ppo.train(whole)
    file = Path(whole.output_dir) / "checkpoints" / "step_2.pt"
    weights = torch.load(file, weights_only=True)["weights"].values()
    assert all(torch.equal(a, b) for a, b in zip(weights, unchanged, strict=False))


@pytest.mark.parametrize("config_class", [PPOConfig, RewardConfig])
def test_what_would_be_another_run(config_class, tmp_path):
    required = {"model": "m", "data": "d", "output_dir": str(tmp_path), "resume": True}
    config = config_class(**required, **({"reward": ["r"]} if config_class is PPOConfig else {}))
    (tmp_path / "metrics.jsonl").touch()
    for name in config_class.fixed:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config) | {name: "other"}))
        with pytest.raises(InputError, match=f"^{name}=.* began with {name}=other: set it back"):
            Run(config)


def metrics(config: PPOConfig | RewardConfig, name: str) -> list[float]:
    return [row[name] for row in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def test_another_beta_takes_the_place_of_the_adapted_one(configured, monkeypatch):
    config = configured(
        steps=2, beta=0.1, adaptive_kl_target=1e9, kl_horizon=16, save_every=9
    )  # each step multiplies beta by 1 - 0.2
    ppo.train(config)
    config.resume, config.steps, config.beta = True, 4, 0.5

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_checkpoint", killed)
        ppo.train(config)
    ppo.train(config)  # config.yaml has the new beta by now, the checkpoint the old one
    assert metrics(config, "objective/kl_coef") == pytest.approx([0.1, 0.08, 0.5, 0.4])
    config.steps, config.adaptive_kl_target = 6, None  # without a target it stays where it is
    ppo.train(config)
    assert metrics(config, "objective/kl_coef")[4:] == pytest.approx([0.32, 0.32])


def test_another_schedule_is_that_of_the_whole_run(configured):
    """As if it had been so from the beginning, whatever the number of updates in a step was."""
    config = configured(steps=4, save_every=2, learning_rate=0.1)
    ppo.train(config)
    assert metrics(config, "lr") == pytest.approx([0.1] * 4)
    for name in ("summary.json", "checkpoints/step_4.pt"):  # it came to step 2
        (Path(config.output_dir) / name).unlink()
    config = replace(config, resume=True, lr_scheduler_type="linear", epochs=1, warmup_steps=2)
    ppo.train(config)  # 8 updates, 2 of them warm-up: after 6 a third is left
    assert metrics(config, "lr") == pytest.approx([0.1, 0.1, 0.1 / 3, 0])


def test_a_step_cut_short_does_not_delay_the_schedule(configured):
    config = configured(steps=2, lr_scheduler_type="linear", learning_rate=0.1, target_kl=1e-9)
    ppo.train(config)  # one update of 4 is made in each step
    assert metrics(config, "policy/updates") == [1, 1]
    assert metrics(config, "lr") == pytest.approx([0.1 * 7 / 8, 0.1 * 3 / 8])


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"learning_rate": 2e-2}, [1, 0.75, 1, 0.5]),
        ({"lr_scheduler_type": "constant_with_warmup"}, [1, 0.75, 1, 1]),
        ({"warmup_steps": 3}, [1, 0.75, 2 / 3, 1]),
        ({"center_coef": 0.5}, [1, 0.75, 0.5, 0.25]),
        ({"max_grad_norm": 1e-3}, [1, 0.75, 0.5, 0.25]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_the_reward_trainer(tiny_policy_folder, write_jsonl, tmp_path, options, rates):
    rows = [{"chosen": f"{start} good", "rejected": f"{start} bad"} for start in STARTS * 2]
    config = RewardConfig(
        model=tiny_policy_folder, data=write_jsonl(rows), output_dir=str(tmp_path / "run"),
        eval_pairs=2, batch_size=2, learning_rate=1e-2, save_every=2, device="cpu",
    )  # fmt: skip
    reward.train(config)
    folder = Path(config.output_dir)
    before = (folder / "model" / "model.safetensors").read_bytes()
    for name in ("summary.json", "checkpoints/step_4.pt"):
        (folder / name).unlink()
    reward.train(replace(config, resume=True, **options))
    assert metrics(config, "lr") == pytest.approx([1e-2 * rate for rate in rates])
    assert (folder / "model" / "model.safetensors").read_bytes() != before
