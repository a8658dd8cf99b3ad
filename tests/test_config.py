from dataclasses import fields

import pytest

from rlhf_fast.config import GenerateConfig, InputError, PPOConfig, RewardConfig, parse

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
        ("learnin_rate: 1", "unknown key learnin_rate (did you mean learning_rate?)"),
        ("batch_size: [1, 2]", "batch_size is a list, expected one value"),
        ("batch_size: many", "--batch_size"),
        ("- a\n- b", "expected lines of `key: value`"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse_ppo("--config", str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_yaml():
    with pytest.raises(InputError, match="config=nowhere.yaml cannot be read"):
        parse_ppo("--config", "nowhere.yaml")


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
        GenerateConfig(model="m", prompt="")


@pytest.mark.parametrize("config", [RewardConfig, PPOConfig, GenerateConfig])
def test_help_explains_every_flag(config, capsys):
    with pytest.raises(SystemExit) as done:
        parse(config, ["--help"], prog="rlhf-fast x")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in fields(config):
        assert f"--{field.name}" in text
        assert field.metadata["help"].split()[0] in text
