import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_fast.trainer.ppo as ppo
from rlhf_fast.trainer import setup
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.run.folder import Run, read_metrics
from rlhf_fast.trainer.run.plot import plot


def metrics(config: PPOConfig) -> list[dict[str, float]]:
    """Rows without what depends on the clock."""
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k[:5] != "perf/" and k != "eps"} for row in rows]


def weights(config: PPOConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("layers", [None, 2])
def test_learns_a_reward(configured, reward, layers, monkeypatch):
    """Every sign matters: flip one of the loss, the advantages or the scores and this fails."""
    monkeypatch.setattr(ppo, "plot", plot)  # which other tests leave out
    config = configured(
        trainable_layers=layers, steps=25, batch_size=32, beta=0.01, judge=reward("negative")
    )
    summary = ppo.train(config)
    rows = metrics(config)
    assert rows[0]["objective/scores"] < 0.25
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.4
    assert summary["score_after"] > summary["score_before"] + 0.4
    assert summary["judge_after"] == pytest.approx(-summary["score_after"])
    assert summary["kl"] > 0.5 and rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)

    folder = Path(config.output_dir)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(["the film"], return_tensors="pt")["input_ids"]
    good = tokenizer.convert_tokens_to_ids("good")
    assert torch.softmax(model(ids).logits[0, -1], -1)[good] > 0.4
    head = load_file(folder / "model" / "value_head.safetensors")
    assert head["weight"].shape == (1, 32) and head["weight"].abs().sum() > 0


def test_the_critic_learns(configured, reward):
    config = configured(reward=reward("three"), steps=25, beta=0.0)
    ppo.train(config)
    rows = metrics(config)
    assert rows[0]["loss/value_avg"] > 2.5  # ½·3² = 4.5, less what the first passes learn
    assert rows[-1]["loss/value_avg"] < 0.3


def test_beta_keeps_the_policy_near(configured):
    free, held = configured("free", steps=12, beta=0.0), configured("held", steps=12, beta=2.0)
    assert ppo.train(held)["kl"] < 0.5 * ppo.train(free)["kl"]


def test_metric_names(configured):
    config = configured(steps=1)
    ppo.train(config)
    (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    names = """
        objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward
        objective/scores policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg
        loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/ratio_var
        val/num_eos_tokens val/explained_var perf/tokens_per_second eps lr episode step
    """.split()
    assert set(names) <= row.keys()
    assert row["episode"] == 16 and row["val/ratio"] == pytest.approx(1, abs=0.2)


def test_micro_batches_change_nothing(configured):
    whole, cut = configured("whole"), configured("cut", micro_batch_size=3)
    ppo.train(whole), ppo.train(cut)
    for a, b in zip(metrics(whole)[:2], metrics(cut)[:2], strict=True):
        for name in (
            "objective/scores",
            "loss/policy_avg",
            "loss/value_avg",
            "grad_norm",
            "policy/entropy_avg",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


def test_sharing_the_trunk_changes_nothing(configured, monkeypatch):
    shared = configured("shared", steps=2, trainable_layers=2)
    ppo.train(shared)

    def apart(name, *, trainable_layers, **options):  # the same layers train, nothing is shared
        policy = load_policy(name, trainable_layers=None, **options)
        policy.model.requires_grad_(False)
        policy.model.model.layers[1:].requires_grad_(True)
        policy.model.model.norm.requires_grad_(True)
        return policy

    load_policy = setup.load_policy
    monkeypatch.setattr(setup, "load_policy", apart)
    alone = configured("alone", steps=2, trainable_layers=2)
    ppo.train(alone)
    for a, b in zip(metrics(shared), metrics(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_missing_eos_penalty_and_score_clip(configured, reward):
    """With no step of learning between them, the same rollouts get other rewards."""
    rows = {}
    for name, options in {
        "plain": {},
        "penalty": {"missing_eos_penalty": 10.0},
        "clip": {"score_clip": 0.5},
    }.items():
        config = configured(name, steps=1, reward=reward("number"), beta=0.0, **options)
        ppo.train(config)
        (rows[name],) = metrics(config)
    ended = rows["plain"]["val/num_eos_tokens"]
    assert 0 < ended < 16
    assert rows["penalty"]["objective/scores"] == rows["plain"]["objective/scores"]
    lost = rows["plain"]["objective/rlhf_reward"] - rows["penalty"]["objective/rlhf_reward"]
    assert lost == pytest.approx(10 * (16 - ended) / 16, rel=1e-4)
    assert rows["clip"]["objective/rlhf_reward"] <= 0.5 < rows["clip"]["objective/scores"]


def test_entropy_bonus_keeps_entropy(configured):
    plain = configured("plain", steps=8)
    bonus = configured("bonus", steps=8, entropy_coef=0.3)
    ppo.train(plain), ppo.train(bonus)
    assert metrics(bonus)[-1]["policy/entropy_avg"] > 1.1 * metrics(plain)[-1]["policy/entropy_avg"]


def test_conversations(configured, reward, starts):
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in starts * 8]
    summary = ppo.train(configured(prompts=rows, reward=reward("conversation"), steps=2))
    assert 0 <= summary["score_before"] <= 1


def test_reward_model_as_reward_and_judge(configured, tiny_reward_folder, reward):
    config = configured(reward=tiny_reward_folder, judge=tiny_reward_folder, steps=1)
    ppo.train(config)
    (row,) = metrics(config)
    assert row["objective/scores"] == row["objective/judge"] != 0


def test_weighted_sum_of_rewards(configured, reward):
    config = configured(
        reward=[reward("share"), reward("three")], reward_weights=[2.0, -0.5], steps=1
    )
    ppo.train(config)
    (row,) = metrics(config)
    assert row["objective/scores/three"] == 3
    assert 0 < row["objective/scores/share"] < 1
    expected = 2 * row["objective/scores/share"] - 1.5
    assert row["objective/scores"] == pytest.approx(expected, abs=1e-6)


def test_nonfinite_update_is_skipped_and_counted(configured, monkeypatch):
    healthy, calls = ppo.linear_policy_loss, 0

    def sometimes_nan(*args, **kwargs):
        nonlocal calls
        calls += 1
        loss, stats = healthy(*args, **kwargs)
        return (loss * float("nan") if calls == 2 else loss), stats

    monkeypatch.setattr(ppo, "linear_policy_loss", sometimes_nan)
    config = configured(steps=2)
    assert ppo.train(config)["skipped_updates"] == 1
    assert [row["skipped_updates"] for row in metrics(config)] == [1, 0]
    assert all(torch.isfinite(w).all() for w in weights(config).values())


# ------------------------------------------------------------------------------- interruption


@pytest.mark.long
def test_killed_command_resumes_to_the_same_numbers(configured, reward, tmp_path, monkeypatch):
    """From the command line; test_kill.py kills at many moments."""
    unbroken = configured("unbroken", save_every=2, steps=5)
    ppo.train(unbroken)
    config = configured(
        "killed", save_every=2, steps=5, reward=reward("killed"), data=unbroken.data, resume=True
    )
    options = {k: v if isinstance(v, list) else [v] for k, v in vars(config).items()}
    flags = [f"--{k}={v}" for k, vs in options.items() for v in vs if v is not None]
    counter = tmp_path / "calls_left"
    monkeypatch.setenv("KILL_AFTER", str(counter))
    counter.write_text("3")  # scores are asked for before training, then in each step
    killed = subprocess.run(
        [sys.executable, "-m", "rlhf_fast.trainer.cli", "ppo", *flags],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    counter.write_text("1000")
    ppo.train(config)
    assert metrics(config) == metrics(unbroken)
    assert all(torch.equal(weights(config)[k], w) for k, w in weights(unbroken).items())
    for name in ("before.json", "after.json"):
        results = [json.loads(Path(c.output_dir, name).read_text()) for c in (config, unbroken)]
        assert results[0] == results[1]


def test_a_run_is_made_longer(configured):
    """To the numbers of a run that was as long from the beginning."""
    whole = configured("whole", steps=4)
    longer = configured("longer", steps=2, data=whole.data)
    ppo.train(whole), ppo.train(longer)
    longer.resume, longer.steps = True, 4
    ppo.train(longer)
    assert metrics(longer) == metrics(whole)
    assert all(torch.equal(weights(longer)[k], w) for k, w in weights(whole).items())
    summary = ppo.train(longer)  # finished, now at the new end
    assert summary == json.loads((Path(longer.output_dir) / "summary.json").read_text())
    longer.steps = 3
    with pytest.raises(InputError, match="has made 4 steps already, it cannot end after 3"):
        ppo.train(longer)
    assert Run(configured("longer", steps=4, data=whole.data, resume=True)).summary == summary


def test_other_step_sizes_from_a_resume_on(configured, capsys):
    """What the optimizer and the schedule kept must not bring the old ones back."""
    options = {"warmup_steps": 2, "lr_scheduler_type": "linear", "epochs": 1, "minibatches": 2}
    config = configured(steps=2, learning_rate=0.1, value_learning_rate=0.2, **options)
    ppo.train(config)
    config.resume, config.steps, config.learning_rate = True, 4, 1e-9
    before = weights(config)
    ppo.train(config)
    # 2 updates of warm-up, then linearly to 0: after the third step 2 of 6 are left
    assert [row["lr"] for row in metrics(config)] == pytest.approx([0.1, 0.0, 1e-9 / 3, 0.0])
    for name, weight in weights(config).items():
        assert (weight - before[name]).abs().max() < 1e-7, name
    text = " ".join(capsys.readouterr().out.split())
    assert "going on with learning_rate=1e-09 (before: 0.1)" in text
    assert "going on with steps=4 (before: 2)" in text


def test_every_step_and_every_seed_has_its_own_draws(configured, monkeypatch):
    seeds, real = [], ppo.sample_answers

    def recorded(policy, batch, config, generator, **options):
        seeds.append((generator.initial_seed(), torch.initial_seed()))
        return real(policy, batch, config, generator, **options)

    monkeypatch.setattr(ppo, "sample_answers", recorded)
    for seed in (0, 1):
        ppo.train(configured(f"seed {seed}", steps=2, seed=seed))
    for drawn in zip(*seeds, strict=True):
        assert len(set(drawn)) == len(drawn) == 4


def test_failing_reward_function_costs_no_learnt_step(configured, reward):
    config = configured(reward=reward("fails_later"), steps=8)
    with pytest.raises(InputError, match="fails_later returned nan for row 2"):
        ppo.train(config)
    assert len(metrics(config)) == 4  # one call before training, four good steps
    state = torch.load(Path(config.output_dir) / "checkpoints" / "step_4.pt", weights_only=True)
    assert state["step"] == 4


def test_metrics_cut_short_by_a_kill(configured):
    config = configured(steps=2, save_every=1)
    ppo.train(config)
    file = Path(config.output_dir) / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 20])
    assert [row["step"] for row in read_metrics(file)] == [1]


def test_one_folder_one_run(configured):
    config = configured(steps=1)
    summary = ppo.train(config)
    with pytest.raises(InputError, match="holds a run already"):
        ppo.train(config)
    config.resume = True
    assert ppo.train(config) == summary  # finished: nothing to do
    config.top_k = 7
    with pytest.raises(InputError, match="top_k=7, but the run in .* began with top_k=0"):
        ppo.train(config)
    config.resume, config.overwrite = False, True
    ppo.train(config)
    assert "top_k: 7" in Path(config.output_dir, "config.yaml").read_text()


def test_overwrite_deletes_nothing_before_all_is_checked(configured):
    config = configured(steps=1)
    ppo.train(config)
    config.overwrite, config.data = True, "nowhere.jsonl"
    with pytest.raises(InputError, match="nowhere.jsonl"):
        ppo.train(config)
    assert Run(configured(steps=1, resume=True)).summary is not None


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"nan returned nan for row 2, expected a finite number; prompt .*, answer "),
        ("none", "returned None for row 0"),
        ("short", "returned 1 scores, expected a list of 8"),
        ("wrong", "returned 3.0, expected a list of 8"),
        ("missing", "has no function missing"),
        ("not_a_function", "has no function not_a_function"),
    ],
)
def test_bad_reward_function_stops_before_training(configured, reward, name, message):
    config = configured(reward=reward(name))
    with pytest.raises(InputError, match=message):
        ppo.train(config)
    assert not Path(config.output_dir, "metrics.jsonl").exists()
    config.reward = reward("share")  # set right, the same command runs: no --overwrite needed
    ppo.train(config)
    assert len(metrics(config)) == config.steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "nowhere.py:f"}, "reward=nowhere.py:f: there is no file"),
        ({"reward": "no_such_module:f"}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ({"reward": "/no/where"}, "reward=/no/where: there is no such folder"),
        ({"eval_prompts": 40}, "has 40 prompts: too few to keep eval_prompts=40"),
        ({"prompts": []}, "is empty"),
        ({"prompts": [{"text": "x"}]}, "no column 'prompt'"),
        ({"trainable_layers": 9}, "trainable_layers=9"),
        ({"reward": "my_reward.py"}, "reward=my_reward.py: expected file.py:function"),
        ({"subset": "main"}, "subset=main, but data=.* is a file"),
        ({"max_new_tokens": 126}, "at most 128 tokens, .* has 3 and max_new_tokens=126"),
        ({"prompts": [{"prompt": "film"}, {"prompt": " \n"}]}, "row 1: prompt is empty"),
    ],
)
def test_bad_input_writes_nothing(configured, options, message):
    config = configured(**options)
    with pytest.raises(InputError, match=message):
        ppo.train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("weights", [b"", b"\0" * 500], ids=["empty", "cut"])
def test_weights_that_cannot_be_read(configured, tiny_policy_folder, tmp_path, weights):
    folder = shutil.copytree(tiny_policy_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="model=.*broken cannot be loaded as a model: .*header"):
        ppo.train(configured(model=str(folder)))


def test_a_large_seed(configured):
    """Times a million it is more than NumPy takes."""
    config = configured(seed=12345, steps=1)
    ppo.train(config)
    assert len(metrics(config)) == 1


def test_reward_from_an_importable_module(configured, reward, tmp_path, monkeypatch):
    reward("share")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ppo.train(configured(reward="my_reward:share", steps=1))["score_before"] >= 0
