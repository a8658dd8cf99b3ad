"""FSDP2: two processes, each with half of every weight, give the numbers of one, to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from launches import RANKS, assert_same_run, broken_off, flags, launch_two, runs_file

from rlhf_fast import ppo
from rlhf_fast.config import InputError, RewardConfig
from rlhf_fast.sharding import Sharder, check


def fsdp_launch(folder: Path, script: list[str], **fsdp_config) -> CompletedProcess:
    config = {
        "fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }  # fmt: skip
    return launch_two(folder, script, "FSDP", fsdp_config=config | fsdp_config)


def test_two_processes_give_the_numbers_of_one(
    configured, tmp_path, untied_folder, tiny_reward_folder
):
    options = {"steps": 3, "batch_size": 12, "save_every": 2, "epochs": 1}
    # Tied embeddings, a value head on them; 3 rows a minibatch: one process has an idle pass.
    alone = configured("alone", minibatches=4, micro_batch_size=1, **options)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    ppo.train(alone)
    done = fsdp_launch(
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
    done = fsdp_launch(
        tmp_path,
        [RANKS, "fsdp", runs_file(tmp_path, [(each, {}) for each in several])],
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
    ("plugin", "options", "message"),
    [
        ({"fsdp_version": 1}, {}, "set fsdp_version: 2"),
        ({}, {"trainable_layers": 1}, "trainable_layers=1 cannot be combined with .*FSDP"),
        ({}, {"lora_r": 4}, "lora_r=4 cannot be combined with .*FSDP"),
        ({"cpu_offload": True}, {}, "fsdp_offload_params"),
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing"),
        ({"mixed_precision_policy": "fp16"}, {}, "mixed_precision: fp16"),
    ],
)
def test_what_is_not_supported_is_refused(configured, plugin, options, message):
    plugin = FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | plugin))
    with pytest.raises(InputError, match=message):
        check(plugin, configured(**options))


def test_only_ppo_is_sharded():
    config = RewardConfig(model="model", data="data", output_dir="out")
    with pytest.raises(InputError, match="FSDP is for `rlhf-fast ppo`"):
        check(FullyShardedDataParallelPlugin(fsdp_version=2), config)


def test_a_layer_that_the_model_has_not(tiny_config):
    from transformers import LlamaModel

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )  # fmt: skip
    with pytest.raises(InputError, match="GPT2Block: LlamaModel has no such layer"):
        Sharder.wrapped(SimpleNamespace(plugin=plugin), LlamaModel(tiny_config))


@pytest.mark.parametrize("engine", ["MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_engines_are_refused(configured, monkeypatch, engine):
    from rlhf_fast.workers import Workers

    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match="not supported.*fsdp_version: 2"):
        Workers(configured())
