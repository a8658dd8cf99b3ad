import dataclasses
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlhf_fast.trainer.config import (
    ConvertConfig,
    GenerateConfig,
    PlotConfig,
    PPOConfig,
    ReportConfig,
    RewardConfig,
    WatchConfig,
)
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.flags import GROUPS, parse

PPO = ["--model", "m", "--data", "d", "--reward", "r", "--output_dir", "o"]


def parse_ppo(*flags: str) -> PPOConfig:
    return parse(PPOConfig, [*PPO, *flags], prog="rlhf-fast ppo")


def test_flags_in_both_spellings():
    config = parse_ppo("--learning_rate", "1e-4", "--batch-size=8", "--resume")
    assert (config.learning_rate, config.batch_size, config.resume) == (1e-4, 8, True)


def test_yaml_gives_values_and_flags_win(tmp_path):
    file = tmp_path / "c.yaml"
    # YAML 1.1 reads 1e-5 as a string: it must arrive as the number all the same
    file.write_text("learning_rate: 1e-5\nbatch_size: 6\nresume: true\njudge:\nreward: mine\n")
    config = parse_ppo("--config", str(file), "--batch_size", "9")
    assert (config.learning_rate, config.batch_size, config.resume) == (1e-5, 9, True)
    assert config.judge is None and config.reward == ["r"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", r"unknown key learnin_rate \(did you mean learning_rate\?\)"),
        ("batch_size: [1, 2]", "batch_size is a list, expected one value"),
        ("batch_size: many", "--batch_size"),
        ("- a\n- b", "expected lines of `key: value`"),
        ("a: [", "is not YAML"),
        ("steps: 1\n\tbatch_size: 8", "is not YAML: .* that cannot start any token"),
        ("steps: 1\nbeta: 0.1\nsteps: 2", "steps is there 2 times"),
        ("config: other.yaml", "unknown key config"),
        ("steps: 1.5", "--steps: invalid int value: '1.5'"),
        ("steps: yes", "--steps: invalid int value: 'yes'"),
        ("steps: 0x10", "--steps: invalid int value: '0x10'"),
        ("beta: .inf", "--beta: invalid float value: '.inf'"),
        ("reward: [a, [b]]", "reward has an item that is a list, expected one value"),
        ("reward: [a, ~]", "reward has an item that is empty"),
        ("reward: [a, --overwrite]", "reward has an item that begins with --"),
        ("judge: {a: 1}", "judge is a dict, expected one value"),
        ("judge: !!python/name:os.system x", "judge has the tag .*os.system, expected one"),
        ("{a: 1}: 2", "unknown key that is not a word"),
        ("no: 1", "unknown key no"),
        ("--- {steps: 1}\n--- {steps: 2}", "is not YAML: expected a single document"),
        ("caf\xe9: 1", "is not UTF-8 text: "),
        ("steps: " + "[" * 5000, "nested too deep"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        parse_ppo("--config", str(file))
    assert "\n" not in str(error.value) and "mean config" not in str(error.value)


WORDS = ["no", "off", "Yes", "true", "007", "0x10", "0o17", "1_000", "1.10", "1e-5", "12:30:45",
         "2026-11-28", "2026_11_28", "=", "nan", ".inf", "-x", "'null'", '"~"', "a: b"]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["output_dir", "judge", "subset", "reward", "report_to"])
def test_yaml_gives_text_as_it_is_written(tmp_path, word, name):
    """Whatever YAML takes it for: Booleans, numbers of four bases, dates, hours."""
    file = tmp_path / "c.yaml"
    word = word.replace("a: b", "'a: b'")
    file.write_text(f"{name}: {word}\n")
    given = {"model": "m", "data": "d", "reward": "r", "output_dir": "o"}
    flags = [x for key, value in given.items() if key != name for x in (f"--{key}", value)]
    config = parse(PPOConfig, [*flags, "--config", str(file)], prog="x")
    want = word.strip("'\"")
    assert getattr(config, name) == ([want] if name == "reward" else want)


@pytest.mark.parametrize("word", ["", "null", "~", "Null"])
def test_yaml_null_leaves_an_option_unset(tmp_path, word):
    file = tmp_path / "c.yaml"
    file.write_text(f"judge: {word}\nsteps: {word}\nbf16: {word}\n")
    config = parse_ppo("--config", str(file))
    assert (config.judge, config.steps, config.bf16) == (None, 1000, False)


@pytest.mark.parametrize("word", ["yes", "on", "True", "ON", "y", "1", "no", "off", "False", "0"])
def test_yaml_switches(tmp_path, word):
    file = tmp_path / "c.yaml"
    file.write_text(f"bf16: {word}\nresume: {word}\npacking: {word}\n")
    config = parse_ppo("--config", str(file))
    switched = word in ("yes", "on", "True", "ON", "y", "1")
    assert [config.bf16, config.resume, config.packing] == [switched] * 3


def test_yaml_lists_and_merges(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("report_to: [tensorboard, wandb]\nlora_target_modules: [q, v]\nlora_r: 4\n")
    config = parse_ppo("--config", str(file))
    assert (config.report_to, config.lora_target_modules) == ("tensorboard,wandb", "q,v")
    file.write_text("<<: {steps: 3, seed: 1}\nsteps: 2\n")
    config = parse_ppo("--config", str(file))
    assert (config.steps, config.seed) == (2, 1)


def test_paths_are_taken_as_their_text():
    config = PPOConfig(
        model=Path("m"), data=Path("d"), output_dir=Path("o"), reward=[Path("r"), "s"],
        judge=Path("j"),
    )  # fmt: skip
    assert (config.model, config.data, config.output_dir) == ("m", "d", "o")
    assert (config.reward, config.judge) == (["r", "s"], "j")
    assert PPOConfig(model="m", data="d", output_dir="o", reward=Path("r")).reward == ["r"]
    assert RewardConfig(model="m", data=Path("d"), output_dir="o").data == "d"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "config=nowhere.yaml cannot be read"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", r"config='a\\x00b': expected text without a NUL"),
    ],
)
def test_a_yaml_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message):
        parse_ppo("--config", name)


NAMES = ["model", "data", "output_dir", "value_model", "judge", "rollout_engine", "reward"]


@pytest.mark.parametrize("name", [*NAMES, "split", "lora_target_modules"])
def test_text_that_no_name_can_have(name):
    required = {"model": "m", "data": "d", "reward": "r", "output_dir": "o", "lora_r": 2}
    with pytest.raises(InputError, match=rf"{name}='a\\x00b': expected text without a NUL"):
        PPOConfig(**(required | {name: ["a\0b"] if name == "reward" else "a\0b"}))
    if name in NAMES:
        for long in ("x" * 300, "x/" * 3000):
            with pytest.raises(InputError, match=f"{name}=x.*: longer than the name of a file"):
                PPOConfig(**(required | {name: [long] if name == "reward" else long}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rat", "1"], "did you mean --learning_rate?"),
        (["--batch", "8"], "unknown flag --batch"),  # no silent abbreviations
        (["--temperature", "0"], "temperature=0.0: expected a finite number, above 0"),
        (["--gamma", "1.5"], "gamma=1.5"),
        (["--beta", "nan"], "beta=nan"),
        (["--steps", "0"], "steps=0"),
        (["--resume", "--overwrite"], "resume and overwrite"),
        (["--batch_size", "10", "--minibatches", "4"], "batch_size=10 .* minibatches=4"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        parse_ppo(*flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "ppo"}, "estimator=ppo: expected one of gae, grpo"),
        ({"kl_in": "both"}, "kl_in=both: expected one of reward, loss"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: expected a finite number, above 1"),
        ({"dual_clip": float("inf")}, "dual_clip=inf: expected a finite number"),
        ({"clip": 1.5}, "clip=1.5: expected a finite number, at most 1"),
        ({"ratio": "row"}, "ratio=row: expected one of token, sequence"),
        ({"policy_loss": "gspo"}, "policy_loss=gspo: expected one of ppo, cispo, reinforce"),
        ({"max_skipped_updates": 0}, "max_skipped_updates=0"),
        ({"seed": -1}, "seed=-1: expected a finite number, at least 0"),
        ({"seed": 2**32}, "seed=4294967296: expected a finite number, at most 4294967295"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"judge": " "}, "judge is empty"),
        ({"report_to": ","}, "report_to is empty"),
        ({"lora_r": 2, "lora_target_modules": " , ,"}, "lora_target_modules is empty"),
        ({"reward": ["a", ""]}, "reward is empty"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"missing_eos_score": float("nan")}, "missing_eos_score=nan"),
        ({"batch_size": 6, "samples_per_prompt": 4}, "batch_size=6 .* samples_per_prompt=4"),
        ({"save_total_limit": 0}, "save_total_limit=0"),
    ],
)
def test_bad_values(options, message):
    required = {"model": "m", "data": "d", "reward": "r", "output_dir": "o"}
    with pytest.raises(InputError, match=message):
        PPOConfig(**(required | options))


def test_defaults_that_depend_on_others():
    assert parse_ppo().eos_penalty == 1.0
    assert parse_ppo("--missing_eos_score", "-1").eos_penalty == 0.0
    assert parse_ppo().whitens_advantages is True
    groups = ["--samples_per_prompt", "4", "--estimator", "rloo"]
    assert parse_ppo(*groups).whitens_advantages is False
    assert parse_ppo(*groups, "--whiten_advantages", "true").whitens_advantages is True


def test_what_is_unset_stays_unset():
    """A config made from another, by replace or by its config.yaml, has defaults of its own."""
    given = {"model": "m", "data": "d", "reward": ["r"], "output_dir": "o"}
    config = PPOConfig(**given)
    assert {f.name for f in fields(config) if getattr(config, f.name) != f.default} == set(given)
    grouped = dataclasses.replace(config, estimator="grpo", samples_per_prompt=4)
    assert grouped.whitens_advantages is False
    assert dataclasses.replace(config, missing_eos_score=-1.0).eos_penalty == 0.0
    assert PPOConfig(**vars(config)) == config  # what config.yaml keeps can be read again


@pytest.mark.parametrize(
    ("flags", "resume"),
    [([], False), (["--resume"], True), (["--resume", "auto"], True), (["--resume=false"], False)],
)
def test_resume(flags, resume):
    assert parse_ppo(*flags).resume is resume


# RLHF's details: each an option with the default that works.
@pytest.mark.parametrize(
    ("name", "default"),
    {
        "learning_rate": 3e-6, "value_learning_rate": 1e-5, "adam_epsilon": 1e-5, "epochs": 4,
        "minibatches": 1, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "clip_high": None,
        "dual_clip": None, "value_clip": 0.2, "value_coef": 0.1, "beta": 0.05,
        "adaptive_kl_target": None, "kl_horizon": 10_000, "whiten_rewards": False,
        "whitens_advantages": True, "eos_penalty": 1.0, "missing_eos_score": None,
        "score_clip": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "tis_cap": None,
        "max_grad_norm": 1.0, "ratio": "token", "policy_loss": "ppo",
    }.items(),
)  # fmt: skip
def test_defaults(name, default):
    assert getattr(parse_ppo(), name) == default


def test_required_flags_are_named():
    with pytest.raises(InputError, match="missing --data, --reward:"):
        parse(PPOConfig, ["--model", "m", "--output_dir", "o"], prog="x")


def test_held_out_pairs_come_from_one_place():
    with pytest.raises(InputError, match="eval_data and eval_pairs"):
        RewardConfig(model="m", data="d", output_dir="o", eval_data="e", eval_pairs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_split": "test", "eval_pairs": 3}, "eval_split and eval_pairs"),
        ({"eval_split": "train"}, "eval_split=train is split"),
        ({"lr_scheduler_type": "polynomial"}, "polynomial: expected one of constant_with_warmup"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_bad_reward_options(options, message):
    with pytest.raises(InputError, match=message):
        RewardConfig(model="m", data="d", output_dir="o", **options)


def test_several_rewards_as_flags_and_in_yaml(tmp_path):
    assert parse_ppo("--reward", "a", "b.py:f", "--reward_weights", "1", "-0.5").reward == [
        "a", "b.py:f",
    ]  # fmt: skip
    file = tmp_path / "c.yaml"
    file.write_text("reward: [a, b.py:f]\nreward_weights: [1, -5e-1]\nsteps: 3\n")
    flags = [flag for flag in PPO if flag not in ("--reward", "r")]
    config = parse(PPOConfig, [*flags, "--config", str(file)], prog="x")
    assert (config.reward, config.reward_weights) == (["a", "b.py:f"], [1.0, -0.5])
    assert config.steps == 3
    assert parse_ppo("--config", str(file), "--reward_weights", "2").reward_weights == [2.0]


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        (["a", "b"], [1.0], r"reward_weights=\[1.0\] has 1 numbers for the 2 of reward="),
        (["a"], [float("inf")], "expected finite numbers"),
        ([], None, "reward is empty"),
    ],
)
def test_bad_rewards(rewards, weights, message):
    with pytest.raises(InputError, match=message):
        PPOConfig(model="m", data="d", output_dir="o", reward=rewards, reward_weights=weights)


def test_empty_prompt():
    with pytest.raises(InputError, match="prompt is empty"):
        GenerateConfig(model="m", prompt=" ")


@pytest.mark.parametrize("config", [RewardConfig, PPOConfig, GenerateConfig, PlotConfig])
def test_help_explains_every_flag_in_its_group(config, capsys):
    with pytest.raises(SystemExit) as done:
        parse(config, ["--help"], prog="rlhf-fast x")
    assert done.value.code == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert titles == [title for title in GROUPS if title in titles]  # no other, in this order
    parts = dict(zip(titles, re.split(r"^\w.*:$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "--config" in parts["run"] and "--help" in parts["run"]
    for field in fields(config):
        group = field.metadata["group"]
        shown = [title for title, part in parts.items() if f"  --{field.name} " in part]
        assert shown == [group], field.name
        assert field.metadata["help"].split()[0] in parts[group]
        assert all(word in parts[group] for word in field.metadata.get("choices", ()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eval_every": 1.5}, "eval_every=1.5: expected a whole number or unset"),
        ({"eval_every": "3"}, "eval_every='3': expected a whole number or unset"),
        ({"eval_every": True}, "eval_every=True: expected a whole number or unset"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5': expected a number"),
        ({"max_grad_norm": False}, "max_grad_norm=False: expected a number"),
        ({"overwrite": "no"}, "overwrite='no': expected true or false"),
        ({"split": 3}, "split=3: expected text"),
        ({"epochs": None}, "epochs=None: expected a whole number"),
        ({"report_to": ["wandb"]}, "report_to=.*: expected names in one text, separated by commas"),
    ],
)
@pytest.mark.parametrize("kind", [PPOConfig, RewardConfig])
def test_a_value_of_another_kind(kind, options, message):
    """As a Python program may give it; flags are read by their kind."""
    with pytest.raises(InputError, match=message):
        kind(model="m", data="d", output_dir="o", **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GenerateConfig, {"model": "m", "prompt": "p", "samples": "3"}, "samples='3': expected"),
        (GenerateConfig, {"model": "m", "prompt": 3}, "prompt=3: expected text"),
        (WatchConfig, {"run": "r", "every": "2"}, "every='2': expected a number"),
        (WatchConfig, {"run": ""}, "run is empty: expected text"),
        (ReportConfig, {"run": 3}, "run=3: expected text"),
        (PlotConfig, {"run": "r", "output": 3}, "output=3: expected text or unset"),
        (ConvertConfig, {"file": None}, "file=None: expected text"),
        (ConvertConfig, {"file": "f", "processes": 1.5}, "processes=1.5: expected a whole number"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_in_the_other_commands(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_paths_of_the_other_commands_are_taken_as_their_text():
    assert WatchConfig(run=Path("r")).run == "r" and ConvertConfig(file=Path("f")).file == "f"


@pytest.mark.parametrize(("command", "metric"), [(PPOConfig, "kl"), (RewardConfig, "loss")])
def test_a_metric_with_transformers_prefix(command, metric):
    names = ["--model=m", "--data=d", "--output_dir=o"]
    names += ["--reward=r"] if command is PPOConfig else []
    config = parse(command, [*names, f"--metric_for_best_model=eval_{metric}"], prog="p")
    assert config.metric_for_best_model == metric
    assert replace(config, metric_for_best_model=f"eval_{metric}").metric_for_best_model == metric


def test_one_stands_for_a_list_of_one():
    config = PPOConfig(model="m", data="d", output_dir="o", reward="r", reward_weights=2)
    assert config.reward == ["r"] and config.reward_weights == [2]
