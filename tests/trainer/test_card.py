"""The card beside a trained model, and its way to the hub, which is a pretended one here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, constants

from rlhf_fast.trainer import InputError, PPOTrainer, RewardConfig
from rlhf_fast.trainer.config import PPOConfig
from rlhf_fast.trainer.run import card


@pytest.fixture
def run(configured, monkeypatch):
    monkeypatch.setattr(card, "get_token", lambda: "a token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return configured(steps=1, batch_size=8, epochs=1, max_new_tokens=4, eval_prompts=4)


def test_the_card_of_a_policy(run, tmp_path):
    summary = PPOTrainer(config=run).train()
    read = ModelCard.load(Path(run.output_dir) / "model" / "README.md")
    assert read.data.library_name == "transformers" and read.data.tags == ["rlhf_fast", "ppo"]
    assert read.data.base_model is None and read.data.datasets is None  # they are not on the hub
    for line in (
        "the reward `my_reward.py:share`",
        "the data was `out.jsonl`",
        f"| score after | {summary['score_after']:.4g} |",
        "| `learning_rate` | `0.003` |",
        "| `reward` | `my_reward.py:share` |",
    ):
        assert line in read.text, line
    assert str(tmp_path) not in read.content and "`output_dir`" not in read.text
    assert "`seed`" not in read.text
    assert str(Path(run.model).parent) not in read.content


def test_the_card_names_what_is_on_the_hub():
    made = card.model_card(
        RewardConfig(model="owner/base", data="owner/pairs", output_dir="/x/rm"), {"accuracy": 0.5}
    )
    assert (made.data.base_model, made.data.datasets) == ("owner/base", "owner/pairs")
    assert made.text.startswith("\n# rm") and "`score_mean`" in made.text


def test_it_is_uploaded_when_the_run_is_finished(run, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(card, "HfApi", Api)
    PPOTrainer(config=replace(run, push_to_hub=True, hub_private_repo=True)).train()
    assert calls[0] == ("out", {"private": True, "exist_ok": True}) and calls[1][0] == "me/out"
    assert {"README.md", "config.json", "model.safetensors"} <= set(calls[1][1])

    def fails(self, name, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(Api, "create_repo", fails)
    other = replace(run, output_dir=f"{run.output_dir}2", push_to_hub=True, hub_model_id="a/b")
    assert PPOTrainer(config=other).train()
    assert "push_to_hub=a/b failed, the model is in" in capsys.readouterr().out
    assert (Path(other.output_dir) / "summary.json").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("offline", True, "HF_HUB_OFFLINE is set"), ("token", None, "needs a token of the hub")],
)
def test_what_cannot_be_uploaded_is_not_trained(run, monkeypatch, name, value, message):
    if name == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    else:
        monkeypatch.setattr(card, "get_token", lambda: value)
    config: PPOConfig = replace(run, push_to_hub=True)
    with pytest.raises(InputError, match=message):
        PPOTrainer(config=config).train()
    assert not Path(run.output_dir).exists()
