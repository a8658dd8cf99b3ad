"""FSDP2: two processes, each with half of every weight, give the numbers of one, to rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from launches import RANKS, SMOOTH_ADAM, assert_same_run, broken_off, flags, launch_two, runs_file

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.config import RewardConfig
from rlhf_fast.trainer.distributed.fsdp import Sharder, check
from rlhf_fast.trainer.errors import InputError


def fsdp_launch(folder: Path, script: list[str], **fsdp_config) -> CompletedProcess:
    config = {
        "fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }  # fmt: skip
    return launch_two(folder, script, "FSDP", fsdp_config=config | fsdp_config)


OPTIONS = SMOOTH_ADAM | {"steps": 3, "batch_size": 12, "save_every": 2, "epochs": 1}


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(
    configured, tmp_path, untied_folder, tiny_reward_folder
):
    options = OPTIONS.copy()
    # Tied embeddings, a value head on them; 3 rows a minibatch: one process has an idle pass.
    alone = configured("alone", minibatches=4, micro_batch_size=1, **options)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    ppo.train(alone)
    done = fsdp_launch(
        tmp_path,
        ["-m", "rlhf_fast.trainer.cli", "ppo", *flags(together)],
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
    size_based = {
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "5000",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
    }  # fmt: skip
    several = [
        (critic, replace(critic, output_dir=str(tmp_path / "critic_together")), size_based),
        (alone, broken_off(alone, "by_one_then_two"), size_based),
        (alone, broken_off(together, "by_two_then_two"), size_based),
    ]
    # The reference is the policy without adapters, or shares its frozen layers.
    frozen = {
        "lora": {"lora_r": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1},
        "top": {"trainable_layers": 2, "minibatches": 4, "micro_batch_size": 1},
    }
    for name, more in frozen.items():
        one = configured(name, **OPTIONS | more)
        ppo.train(one)
        layer_wise = {
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": str(name == "lora").lower(),
            "FSDP_ACTIVATION_CHECKPOINTING": "true",
        }
        both = replace(one, output_dir=str(tmp_path / f"{name}_together"))
        several.append((one, both, layer_wise))
        several.append((one, broken_off(one, f"{name}_by_one_then_two"), layer_wise))
    runs = [(two, {"environment": environment}) for _, two, environment in several]
    done = fsdp_launch(tmp_path, [RANKS, "fsdp", runs_file(tmp_path, runs)])
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two, _ in several:
        assert_same_run(one, two)
        if "_together" in two.output_dir and one is not critic:
            by_one = broken_off(two, f"{Path(two.output_dir).name}_then_one")
            ppo.train(by_one)
            assert_same_run(one, by_one)
    by_one = broken_off(together, "by_two_then_one")
    ppo.train(by_one)
    assert_same_run(alone, by_one)


FAILS = """
import os
import torch
from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.rollout.sample import sample

class Fails:
    def __init__(self, model, tokenizer, where, taken=0):
        self.model, self.where, self.taken, self.steps = model, where, taken, 0
    def fail(self, where):
        if self.where == where and self.steps == 2 and os.environ["RANK"] == "1":
            raise ConnectionError("it is gone")
    def generate(self, prompts, sampling, seed):
        self.fail("generate")
        ids, mask = pad([list(p) for p in prompts], side="left")
        draws = torch.rand(len(ids), sampling.max_new_tokens)
        done = sample(self.model, ids, mask, sampling, draws)
        return done._replace(trunk=None, hidden=None)
    def sync(self, weights):
        for _ in range(self.taken):
            next(weights)
        self.fail("sync")
        for _ in weights:
            pass
    def sleep(self):
        self.fail("sleep")
    def wake(self):
        self.steps += 1
        self.fail("wake")
    def close(self):
        self.fail("close")
"""


@pytest.mark.long
def test_an_engine_that_fails_in_one_process_ends_both(configured, tmp_path):
    """In one line that is the same in both, with a checkpoint; weights that all must gather leave
    nobody waiting, wherever one stops to ask for them."""
    (tmp_path / "fails.py").write_text(FAILS)
    runs = []
    for where, taken in (("wake", 0), ("sync", 0), ("sync", 2), ("generate", 0), ("sleep", 0)):
        name, options = f"{where}_{taken}", [f"where={where}", f"taken={taken}"]
        config = configured(
            name, steps=3, batch_size=12, eval_prompts=2, epochs=1, minibatches=1, save_every=9,
            rollout_engine=f"{tmp_path}/fails.py:Fails", rollout_engine_options=options,
        )  # fmt: skip
        runs.append((config, {"refused": str(tmp_path / f"{name}.said")}))
    ends = configured(
        "ends", steps=2, batch_size=12, eval_prompts=2, epochs=1, minibatches=1,
        rollout_engine=f"{tmp_path}/fails.py:Fails", rollout_engine_options=["where=close"],
    )  # fmt: skip
    wrapped = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    file = runs_file(tmp_path, [*runs, (ends, {})])
    done = fsdp_launch(tmp_path, [RANKS, "fsdp", file], **wrapped)
    assert done.returncode == 0, done.stderr[-3000:]
    for config, _ in runs:
        folder = Path(config.output_dir)
        said = {(tmp_path / f"{folder.name}.said.{rank}").read_text() for rank in range(2)}
        where = folder.name.partition("_")[0]
        assert len(said) == 1 and "\n" not in (line := said.pop())
        assert f"Fails: {where} raised ConnectionError: it is gone" in line
        assert "(in process 1)" in line
        assert (folder / "checkpoints" / "step_1.pt").is_file(), where
    assert (Path(ends.output_dir) / "summary.json").is_file()
    assert "Fails could not be closed: ConnectionError: it is gone" in " ".join(done.stdout.split())


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


@pytest.mark.parametrize("engine", ["MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_engines_are_refused(configured, monkeypatch, engine):
    from rlhf_fast.trainer.distributed.workers import Workers

    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match="not supported.*fsdp_version: 2"):
        Workers(configured())
