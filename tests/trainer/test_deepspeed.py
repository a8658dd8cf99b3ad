"""DeepSpeed: two processes, each with half of Adam's moments, give the numbers of one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from accelerate import DeepSpeedPlugin
from launches import RANKS, SMOOTH_ADAM, assert_same_run, broken_off, flags, launch_two, runs_file
from ranks import broken

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import PPOConfig, RewardConfig
from rlhf_fast.trainer.distributed.deepspeed import asked_for, engine_config
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.folder import read_metrics

STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@pytest.fixture(autouse=True)
def deepspeed_to_import(monkeypatch) -> None:
    """It lies apart: accelerate and TRL would import it in every process that could."""
    folder = Path(sys.prefix, "deepspeed-0.19.8")
    if not folder.is_dir():
        pytest.fail(f"missing: pip install --no-deps --target {folder} deepspeed==0.19.8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def zero_launch(folder: Path, script: list[str], **deepspeed_config) -> CompletedProcess:
    config = {
        "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "zero3_init_flag": False,
        "offload_optimizer_device": "none", "offload_param_device": "none",
    }  # fmt: skip
    return launch_two(folder, script, "DEEPSPEED", deepspeed_config=config | deepspeed_config)


def assert_same_checkpoint(config: PPOConfig, other: PPOConfig) -> None:
    """So that a run goes on under DeepSpeed, FSDP or neither."""
    one, two = (
        torch.load(Path(c.output_dir) / "checkpoints" / "step_2.pt", weights_only=True)
        for c in (config, other)
    )
    groups, others = (state["optimizer"]["param_groups"] for state in (one, two))
    assert [group["params"] for group in groups] == [group["params"] for group in others]
    moments, others = (state["optimizer"]["state"] for state in (one, two))
    torch.testing.assert_close(others, moments, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(
    configured, tmp_path, untied_folder, tiny_reward_folder
):
    options = SMOOTH_ADAM | {"steps": 3, "batch_size": 12, "save_every": 2, "epochs": 1}
    # Tied embeddings, a value head on them; 3 rows a minibatch: one process has an idle pass.
    alone = configured("alone", minibatches=4, micro_batch_size=1, **options)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    ppo.train(alone)
    script = ["-m", "rlhf_fast.trainer.cli", "ppo", *flags(together)]
    done = zero_launch(tmp_path, script, zero_stage=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes share each batch of 12 answers and Adam's moments (ZeRO-2)" in done.stdout
    assert_same_run(alone, together)
    assert_same_checkpoint(alone, together)

    small = options | {"batch_size": 6, "minibatches": 6}  # 1 row a minibatch: one process has none
    other = {
        # A critic of its own, and a head of its own. Small steps: the rounding of a gradient that
        # is almost zero is magnified by Adam, up to 1e-2 of a step.
        "critic": small
        | {
            "model": untied_folder,
            "value_model": tiny_reward_folder,
            "value_learning_rate": 1e-3,
        },
        "top": small | {"trainable_layers": 2, "estimator": "rloo", "samples_per_prompt": 2},
        "lora": small | {"lora_r": 4, "lr_scheduler_type": "linear"},
        "broken": options | {"minibatches": 4},
        "too_far": options | {"minibatches": 4, "epochs": 4, "target_kl": 0.05},
    }
    runs = {name: configured(name, **options) for name, options in other.items()}
    for name, config in runs.items():
        if name == "broken":
            with broken():
                ppo.train(config)
        else:
            ppo.train(config)
    stages = {"critic": (1, 2), "top": (2,), "lora": (1,), "broken": (1, 2), "too_far": (1, 2)}
    several = {
        (name, stage): replace(runs[name], output_dir=str(tmp_path / f"{name}_{stage}"))
        for name in runs
        for stage in stages[name]
    }
    several["alone", 1] = broken_off(alone, "by_one_then_two")
    several["alone", 2] = broken_off(together, "by_two_then_two")
    list_of = [
        (config, {"environment": {STAGE: str(stage)}, "broken": name == "broken"})
        for (name, stage), config in several.items()
    ]
    done = zero_launch(tmp_path, [RANKS, "deepspeed", runs_file(tmp_path, list_of)])
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, _), config in several.items():
        assert_same_run(runs.get(name, alone), config)
    by_one = broken_off(together, "by_two_then_one")
    ppo.train(by_one)
    assert_same_run(alone, by_one)

    def of_all_steps(run: str, name: str) -> list[float]:
        rows = read_metrics(Path(runs[run].output_dir) / "metrics.jsonl")
        return [row[name] for row in rows]

    assert of_all_steps("broken", "skipped_updates") == [2, 1, 2]  # rows 5 and 7, once together
    assert max(of_all_steps("too_far", "policy/updates")) < 4 * 4


@pytest.mark.parametrize(
    ("deepspeed", "options", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "stage 3 .* fsdp_reshard_after_forward: true"),
        ({"zero_optimization": {"stage": 0}}, {}, "stage 0 is not supported"),
        ({"fp16": {"enabled": True}}, {}, "fp16 .* is not supported"),
        ({"bf16": {"enabled": True}}, {}, "asks for bf16, but bf16=False: give --bf16"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping=0.5 .* contradicts max_grad_norm=1.0"),
        ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps=4 .* contradicts"),
        ({"train_batch_size": 16}, {}, "train_batch_size=16 .* batch_size/minibatches=8"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {"micro_batch_size": 2},
            "train_micro_batch_size_per_gpu=8 .* contradicts micro_batch_size=2",
        ),
        ({"optimizer": {"type": "AdamW"}}, {}, "optimizer in DeepSpeed's config .* leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler in DeepSpeed's config"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer in DeepSpeed's config is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused(configured, deepspeed, options, message):
    plugin = DeepSpeedPlugin({"zero_optimization": {"stage": 2}} | deepspeed)
    with pytest.raises(InputError, match=message):
        engine_config(plugin.deepspeed_config, configured(**options))


def test_what_agrees_with_the_options_is_taken(configured):
    config = configured(max_grad_norm=0.5, micro_batch_size=2, bf16=True)
    plugin = DeepSpeedPlugin(
        {
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
            "gradient_clipping": 0.5, "train_batch_size": 8, "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": "auto"},
        }
    )  # fmt: skip
    plugin.set_mixed_precision("bf16")
    made = engine_config(plugin.deepspeed_config, config)
    assert made["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert made["gradient_clipping"] == 0.5
    assert "bf16" not in made  # by autocast: the weights stay float32


def test_only_ppo_is_trained_by_it():
    config = RewardConfig(model="model", data="data", output_dir="out")
    with pytest.raises(InputError, match="DeepSpeed is for `rlhf-fast ppo`"):
        engine_config({}, config)


def test_a_config_that_is_not_there(configured, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(InputError, match="accelerate's DeepSpeed config: .*nowhere.json"):
        asked_for(configured())


@pytest.mark.parametrize(
    ("installed", "message"), [(False, "pip install deepspeed"), (True, "DeepSpeed is too old")]
)
def test_deepspeed_must_be_installed(configured, monkeypatch, installed, message):
    monkeypatch.setattr(
        "rlhf_fast.trainer.distributed.deepspeed.is_deepspeed_available", lambda: installed
    )
    monkeypatch.setattr("rlhf_fast.trainer.distributed.deepspeed.OLDEST", "99")
    with pytest.raises(InputError, match=message):
        asked_for(configured())
