"""FSDP2: two processes, each with half of every weight, give the numbers of one, to rounding."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_workers import COMPARED

from rlhf_fast import ppo
from rlhf_fast.config import InputError, PPOConfig, RewardConfig
from rlhf_fast.run import read_metrics
from rlhf_fast.sharding import Sharder, check

RANKS = str(Path(__file__).with_name("ranks.py"))


def launch(folder: Path, script: list[str], **fsdp_config) -> subprocess.CompletedProcess:
    """Two processes, by a config file as `accelerate config` writes it."""
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1,
        "num_processes": 2, "mixed_precision": "no", "main_process_port": 0,
        "fsdp_config": {
            "fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        } | fsdp_config,
    }  # fmt: skip
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    return subprocess.run(
        [*command, "--config_file", str(folder / "accelerate.yaml"), *script],
        capture_output=True, text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def flags(config: PPOConfig) -> list[str]:
    options = {k: v if isinstance(v, list) else [v] for k, v in vars(config).items()}
    return [f"--{k}={v}" for k, vs in options.items() for v in vs if v is not None]


def assert_same_run(config: PPOConfig, other: PPOConfig) -> None:
    """Metrics of every step, and all that was written in the end."""
    folder, others = Path(config.output_dir), Path(other.output_dir)
    one, two = (read_metrics(each / "metrics.jsonl") for each in (folder, others))
    assert len(one) == len(two) == config.steps
    assert max(row["grad_norm"] for row in one) > config.max_grad_norm  # clipping is tested, too
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(COMPARED):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert files and files == sorted(p.relative_to(others) for p in others.rglob("*.safetensors"))
    for file in files:
        a, b = load_file(folder / file), load_file(others / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=name)


def broken_off(config: PPOConfig, name: str) -> PPOConfig:
    """A copy of a finished run as it was after its checkpoint, to be continued."""
    folder = Path(config.output_dir).with_name(name)
    shutil.copytree(config.output_dir, folder)
    for result in ("model", "value_model", "adapter"):
        shutil.rmtree(folder / result, ignore_errors=True)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step_2.pt":
            path.unlink()
    return replace(config, output_dir=str(folder), resume=True)


@pytest.fixture
def untied_folder(tmp_path, tiny_tokenizer, tiny_config) -> str:
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny_config)
    config.tie_word_embeddings = False
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "untied")
    tiny_tokenizer.save_pretrained(tmp_path / "untied")
    return str(tmp_path / "untied")


OPTIONS = {"steps": 3, "batch_size": 12, "save_every": 2, "epochs": 1}


def test_two_processes_give_the_numbers_of_one(
    configured, tmp_path, untied_folder, tiny_reward_folder
):
    options = OPTIONS.copy()
    # Tied embeddings, a value head on them; 3 rows a minibatch: one process has an idle pass.
    alone = configured("alone", minibatches=4, micro_batch_size=1, **options)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    ppo.train(alone)
    done = launch(
        tmp_path,
        ["-m", "rlhf_fast.cli", "ppo", *flags(together)],
        fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        fsdp_reshard_after_forward=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes share each batch of 12 answers and all weights (FSDP2)" in done.stdout
    assert_same_run(alone, together)

    # A critic of its own, and a head of its own; 1 row a minibatch: one process has idle ones only.
    options |= {
        "batch_size": 6,
        "minibatches": 6,
        "model": untied_folder,
        "value_model": tiny_reward_folder,
    }
    critic = configured("critic", **options)
    ppo.train(critic)
    several = [
        replace(critic, output_dir=str(tmp_path / "critic_together")),
        broken_off(alone, "by_one_then_two"),
        broken_off(together, "by_two_then_two"),
    ]
    (tmp_path / "several.json").write_text(json.dumps([asdict(each) for each in several]))
    done = launch(
        tmp_path,
        [RANKS, str(tmp_path / "several.json")],
        fsdp_auto_wrap_policy="SIZE_BASED_WRAP",
        fsdp_min_num_params=5000,
        fsdp_reshard_after_forward=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_one = broken_off(together, "by_two_then_one")
    ppo.train(by_one)
    assert_same_run(critic, several[0])
    for continued in (*several[1:], by_one):
        assert_same_run(alone, continued)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_r": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1},
        {"trainable_layers": 2, "minibatches": 4, "micro_batch_size": 1},
    ],
    ids=["LoRA", "top layers"],
)
def test_frozen_weights_are_sharded_too(configured, tmp_path, options):
    """The reference is the policy without adapters, or shares its frozen layers."""
    alone = configured("alone", **OPTIONS | options)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    ppo.train(alone)
    several = [together, broken_off(alone, "by_one_then_two")]
    for run in several:
        (tmp_path / "run.json").write_text(json.dumps([asdict(run)]))
        done = launch(
            tmp_path,
            [RANKS, str(tmp_path / "run.json")],
            fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            fsdp_reshard_after_forward="lora_r" in options,
            fsdp_activation_checkpointing=run is together,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    by_one = broken_off(together, "by_two_then_one")
    ppo.train(by_one)
    for run in (*several, by_one):
        assert_same_run(alone, run)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"cpu_offload": True}, "fsdp_offload_params"),
        ({"mixed_precision_policy": "fp16"}, "mixed_precision: fp16"),
    ],
)
def test_what_is_not_supported_is_refused(configured, plugin, message):
    plugin = FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | plugin))
    with pytest.raises(InputError, match=message):
        check(plugin, configured())


def test_only_ppo_is_sharded():
    config = RewardConfig(model="model", data="data", output_dir="out")
    with pytest.raises(InputError, match="FSDP is for `rlhf-fast ppo`"):
        check(FullyShardedDataParallelPlugin(fsdp_version=2), config)


@pytest.mark.parametrize("asked", [False, True])
def test_activation_checkpointing_runs_layers_twice(tiny_config, asked):
    from transformers import LlamaModel

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", activation_checkpointing=asked
    )
    body, calls = LlamaModel(tiny_config), []
    for layer in body.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    layer_wise = SimpleNamespace(plugin=plugin, unit=lambda *_, **__: None)
    layer_wise.wrapped = partial(Sharder.wrapped, layer_wise)
    Sharder.layers(layer_wise, body, None)
    body(torch.zeros(1, 4, dtype=torch.int64)).last_hidden_state.sum().backward()
    assert len(calls) == (6 if asked else 3)


def test_a_layer_that_the_model_has_not(tiny_config):
    from transformers import LlamaModel

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )  # fmt: skip
    with pytest.raises(InputError, match="GPT2Block: LlamaModel has no such layer"):
        Sharder.wrapped(SimpleNamespace(plugin=plugin), LlamaModel(tiny_config))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_engines_are_refused(configured, monkeypatch, engine):
    from rlhf_fast.workers import Workers

    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match="not supported.*fsdp_version: 2"):
        Workers(configured())
