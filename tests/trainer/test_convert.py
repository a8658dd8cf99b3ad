"""Configurations of TRL and verl as ours: the tables against the installed frameworks, their
published examples, bad files."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from rlhf_fast.trainer.cli import main
from rlhf_fast.trainer.config import ConvertConfig, PPOConfig
from rlhf_fast.trainer.convert import FRAMEWORKS, convert, flat, trl_grpo, trl_ppo, verl
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.flags import parse

ROOT = Path(__file__).parents[2]
GIVEN = ["--model=m", "--data=d", "--reward=r", "--output_dir=o"]

# TRL's documentation of PPO: the command for TL;DR.
TLDR = {
    "dataset_name": "trl-lib/tldr", "dataset_test_split": "validation", "output_dir": "models/ppo",
    "learning_rate": 3e-6, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4,
    "total_episodes": 1000000, "model_name_or_path": "EleutherAI/pythia-1b-deduped",
    "sft_model_path": "org/sft", "reward_model_path": "org/reward",
    "local_rollout_forward_batch_size": 16, "missing_eos_penalty": 1.0, "stop_token": "eos",
    "eval_strategy": "steps", "eval_steps": 100, "response_length": 53,
}  # fmt: skip
# verl's example of PPO on GSM8K (examples/ppo_trainer), keys as its script gives them.
GSM8K = {
    "algorithm.adv_estimator": "gae", "data.train_files": "gsm8k/train.parquet",
    "data.val_files": "gsm8k/test.parquet", "data.train_batch_size": 1024,
    "data.max_prompt_length": 512, "data.max_response_length": 512,
    "data.filter_overlong_prompts": True, "data.truncation": "error",
    "actor_rollout_ref.model.path": "deepseek-ai/deepseek-llm-7b-chat",
    "actor_rollout_ref.actor.optim.lr": "1e-6",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 16,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
    "actor_rollout_ref.rollout.name": "vllm", "critic.optim.lr": "1e-5",
    "critic.model.path": "deepseek-ai/deepseek-llm-7b-chat",
    "algorithm.use_kl_in_reward": False, "trainer.critic_warmup": 0,
    "trainer.logger": ["console", "wandb"], "trainer.n_gpus_per_node": 8, "trainer.save_freq": 20,
    "trainer.test_freq": 1, "trainer.total_epochs": 15,
}  # fmt: skip
# Values of verl's GRPO example on the same data.
GRPO = GSM8K | {
    "algorithm.adv_estimator": "grpo", "actor_rollout_ref.rollout.n": 5,
    "actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": 0.001,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
}  # fmt: skip


def file_of(tmp_path: Path, given: dict) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def ours(tmp_path: Path, given: dict, **options) -> tuple[PPOConfig, str]:
    """As --config takes it, with the names that are still to be given; and the text."""
    text = convert(file_of(tmp_path, given), **options)
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    has = yaml.safe_load(text) or {}
    lacking = [flag for flag in GIVEN if flag[2:].split("=")[0] not in has]
    return parse(PPOConfig, ["--config", str(path), *lacking], prog="x"), text


def test_trl_ppo(tmp_path):
    config, text = ours(tmp_path, TLDR, processes=8)
    assert (config.batch_size, config.micro_batch_size, config.steps) == (512, 16, 1954)
    assert (config.model, config.reward) == ("org/sft", ["org/reward"])
    assert config.value_model == "org/reward" and config.eval_split == "validation"
    assert (config.max_new_tokens, config.temperature, config.eval_every) == (53, 0.7, 100)
    assert (config.beta, config.kl_in, config.kl_estimator) == (0.05, "reward", "k1")
    assert (config.clip, config.value_clip, config.value_coef) == (0.2, 0.2, 0.1)
    assert (config.epochs, config.minibatches, config.missing_eos_penalty) == (4, 1, 1.0)
    assert config.learning_rate == config.value_learning_rate == 3e-6
    assert (config.adam_epsilon, config.lr_scheduler_type, config.seed) == (1e-8, "linear", 42)
    assert config.sample_every == 195
    assert "# stop_token: eos  (an answer always ends" in text
    assert "# local_rollout_forward_batch_size: 16  (" in text
    assert "# model_name_or_path: EleutherAI" in text and "Still to be given" not in text


def test_trl_ppo_at_its_defaults(tmp_path):
    config, text = ours(tmp_path, {"num_ppo_epochs": 1, "warmup_steps": 7, "num_mini_batches": 2})
    assert config.missing_eos_penalty == 0.0  # unset there
    assert (config.warmup_steps, config.batch_size) == (7 * 1 * 2, 8)
    assert "# Still to be given: model, data, reward, output_dir." in text
    assert "# steps: unset total_episodes" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"policy_loss": "ppo", "aggregation": "token-mean", "beta": 0.0, "estimator": "grpo"}),
        ({"loss_type": "grpo"}, {"aggregation": "seq-mean-token-mean"}),
        ({"loss_type": "dr_grpo", "scale_rewards": False},
         {"aggregation": "token-sum", "estimator": "dr_grpo"}),
        ({"loss_type": "cispo", "epsilon_high": 5.0},
         {"policy_loss": "cispo", "clip": 1.0, "clip_high": 4.0}),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"},
         {"ratio": "sequence", "aggregation": "seq-mean-token-sum"}),
        ({"loss_type": "vespo"}, {"policy_loss": "vespo", "ratio": "sequence"}),
        ({"loss_type": "sapo"}, {"policy_loss": "sapo"}),
        ({"importance_sampling_level": "sequence", "epsilon": "3e-4", "epsilon_high": 4e-4},
         {"ratio": "sequence", "clip": 3e-4, "clip_high": 4e-4}),
        ({"beta": 0.04}, {"kl_in": "loss", "kl_estimator": "k3", "unbiased_kl": True}),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8, "num_iterations": 2,
          "max_steps": 400, "save_steps": 40},
         {"batch_size": 64, "minibatches": 2, "epochs": 2, "steps": 100, "save_every": 10}),
        ({"reward_funcs": ["a.py:f", "b.py:g"], "reward_weights": [1.0, 0.5]},
         {"reward": ["a.py:f", "b.py:g"], "reward_weights": [1.0, 0.5]}),
        ({"use_peft": True, "lora_r": 32, "lora_target_modules": ["q_proj", "v_proj"]},
         {"lora_r": 32, "lora_target_modules": "q_proj,v_proj"}),
    ],
    ids=str,
)  # fmt: skip
def test_trl_grpo(tmp_path, given, expected):
    config, _ = ours(tmp_path, {"num_generations": 8, "max_completion_length": 256} | given)
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.samples_per_prompt, config.max_new_tokens) == (8, 256)


def test_a_quoted_true_is_true(tmp_path):
    given = TLDR | {"whiten_rewards": "true", "use_peft": "False", "lora_r": 8}
    made = yaml.safe_load(convert(file_of(tmp_path, given)))
    assert made["whiten_rewards"] is True and "lora_r" not in made


def test_verl(tmp_path):
    config, text = ours(tmp_path, GSM8K)
    assert (config.batch_size, config.minibatches, config.micro_batch_size) == (1024, 4, 16)
    assert (config.data, config.eval_data) == ("gsm8k/train.parquet", "gsm8k/test.parquet")
    assert (config.learning_rate, config.value_learning_rate) == (1e-6, 1e-5)
    assert (config.estimator, config.gamma, config.lam, config.beta) == ("gae", 1.0, 1.0, 0.0)
    assert (config.dual_clip, config.value_clip, config.epochs) == (3.0, 0.5, 1)
    assert config.value_model == config.model == "deepseek-ai/deepseek-llm-7b-chat"
    assert (config.save_every, config.eval_every, config.report_to) == (20, 1, "wandb")
    assert "# actor_rollout_ref.rollout.tensor_model_parallel_size: 4  (see rollout_engine" in text
    assert "# Still to be given: reward, output_dir." in text


def test_verl_grpo_nested(tmp_path):
    nested: dict = {}
    for key, value in GRPO.items():
        *above, last = key.split(".")
        at = nested
        for part in above:
            at = at.setdefault(part, {})
        at[last] = value
    config, _ = ours(tmp_path, nested)
    assert (config.batch_size, config.samples_per_prompt) == (1024 * 5, 5)
    assert (config.estimator, config.beta, config.kl_in) == ("grpo", 0.001, "loss")
    assert (config.kl_estimator, config.value_model) == ("k3", None)


@pytest.mark.parametrize("of", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_the_tables_name_options_that_there_are(of):
    known = {f.name for f in fields(PPOConfig)}
    for name, key in of.keys.items():
        assert set(key.options) <= known, name
        assert key.options or key.note, name  # what has no equal has a reason
        assert not key.copied or len(key.options) == 1, name
    assert set(of.defaults) <= set(of.keys)


def own_fields(module: Path, config: str) -> dict[str, object]:
    """{field: default} of a dataclass, by its source: importing two TRLs takes long."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    (found,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == config)
    fields = [x for x in found.body if isinstance(x, ast.AnnAssign)]
    keywords = {x.target.id: getattr(x.value, "keywords", []) for x in fields}
    defaults = {name: [k.value for k in ks if k.arg == "default"] for name, ks in keywords.items()}
    return {name: ast.literal_eval(x[0]) if x else None for name, x in defaults.items()}


INSTALLED = Path(importlib.util.find_spec("trl").origin).parent


@pytest.mark.parametrize(
    ("of", "config", "module"),
    [
        (trl_ppo, "PPOConfig", INSTALLED / "experimental" / "ppo" / "ppo_config.py"),
        (trl_grpo, "GRPOConfig", INSTALLED / "trainer" / "grpo_config.py"),
        (trl_grpo, "GRPOConfig", ROOT / ".venv" / "trl-1.16.0/trl/trainer/grpo_config.py"),
    ],
    ids=["ppo", "grpo of 1.12", "grpo of 1.16"],
)
def test_every_field_of_trls_own_is_in_its_table(of, config, module):
    found, of = own_fields(module, config), of.FRAMEWORK
    assert len(found) > 25
    assert not {name for name in found.keys() - of.keys.keys() if of.why(name) == "not known here"}
    if "1.16" in str(module) or of.name == "trl-ppo":
        theirs = {f.name: f.default for f in fields(TrainingArguments)} | found
        assert {name: theirs[name] for name in of.defaults} == of.defaults


def test_verls_keys_are_its_own():
    folder = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
    file = folder / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    found = dict(flat(yaml.safe_load(file.read_text())))
    assert verl.KEYS.keys() - found.keys() == set()
    for name, value in verl.DEFAULTS.items():
        assert found[name] == value, name


def test_the_page():
    spec = importlib.util.spec_from_file_location("hand_over", ROOT / "docs" / "hand_over.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "is not YAML"),
        ("- 1", "expected lines of `key: value`"),
        ("", "expected lines of `key: value`"),
        ("learning_rate: 1e-5", "whose keys these are cannot be told: give --framework"),
        ("num_ppo_epochs: four", "num_ppo_epochs=four, expected a number"),
        ("num_ppo_epochs: 4\ngamma: 2", "becomes options that cannot work: gamma=2"),
        ("num_ppo_epochs: 4\nper_device_train_batch_size: 3\nnum_mini_batches: 2",
         "cannot work: batch_size=3 cannot be cut into minibatches=2"),
        ("num_generations: 8\nscale_rewards: group\nper_device_train_batch_size: 0",
         "a count is 0, expected at least 1; 0: per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, capsys, text, words):
    path = tmp_path / "theirs.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["convert", str(path)]) == 2
    said = capsys.readouterr()
    assert words in " ".join(said.err.split()) and len(said.err.splitlines()) == 1
    assert not said.out


def test_the_command(tmp_path, capsys):
    path, target = file_of(tmp_path, TLDR), tmp_path / "ours.yaml"
    assert main(["convert", str(path)]) == 0
    printed = capsys.readouterr().out
    for _ in range(2):
        assert main(["convert", "--file", str(path), "--output", str(target)]) == 0
    assert target.read_text() == printed
    target.write_text("steps: 3\n")
    assert main(["convert", str(path), "--output", str(target)]) == 2
    assert "was not written by this" in capsys.readouterr().err
    with pytest.raises(InputError, match="framework=trl: expected"):
        ConvertConfig(file=str(path), framework="trl")
