"""The trainer as a library: models, datasets and functions in place of their names."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import STARTS
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.trainer_callback import CallbackHandler

from rlhf_fast.trainer import InputError, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, ppo
from rlhf_fast.trainer.rollout.sample import Completions

ROWS = [{"prompt": p, "number": float(i)} for i, p in enumerate(STARTS * 4)]
PAIRS = [{"chosen": f"{s} good", "rejected": f"{s} bad"} for s in STARTS * 3]
COLUMNS = ("prompt", "number")


def share(prompts, completions, **columns):
    return [c.split().count("good") / max(1, len(c.split())) for c in completions]


def policy_of(folder: str, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.name_or_path = ""
    return model


@pytest.fixture
def policy(tiny_policy_folder):
    return policy_of(tiny_policy_folder)


@pytest.fixture
def config(undrawn, tmp_path):
    return PPOConfig(
        output_dir=tmp_path / "out", steps=2, batch_size=8, epochs=1, minibatches=2,
        max_new_tokens=5, eval_prompts=4, learning_rate=3e-3, missing_eos_penalty=0.0, device="cpu",
    )  # fmt: skip


def state_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_objects_train_as_their_names_do(
    config, configured, policy, tiny_policy_folder, tiny_tokenizer, tiny_reward_folder
):
    """The same numbers, whichever way model, data, reward and judge are given; the trained weights
    are in the object."""
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    judge.train()
    begun, judged = state_of(policy), state_of(judge)
    named = configured("named", prompts=ROWS, judge=tiny_reward_folder)
    changed = ("steps", "batch_size", "epochs", "max_new_tokens", "eval_prompts")
    named = replace(named, **{name: getattr(config, name) for name in changed})
    named = replace(named, value_learning_rate=config.value_learning_rate)
    expected = PPOTrainer(config=named).train()
    done = PPOTrainer(
        policy, share, Dataset.from_list(ROWS), config=config, tokenizer=tiny_tokenizer,
        judge=(judge, tiny_tokenizer),
    ).train()  # fmt: skip
    for summary in (expected, done):
        del summary["seconds"]
    assert done == expected
    saved = AutoModelForCausalLM.from_pretrained(f"{config.output_dir}/model")
    assert same(state_of(policy), state_of(saved)) and not same(state_of(policy), begun)
    assert same(state_of(judge), judged) and judge.training


@pytest.mark.parametrize("options", [{}, {"trainable_layers": 1}, {"lora_r": 2}], ids=str)
def test_a_model_is_given_back_as_it_came(
    config, policy, tiny_policy_folder, tiny_tokenizer, options
):
    """Its dtype, its modes, what of it learns; with adapters in it where those were trained."""
    policy = policy_of(tiny_policy_folder, torch.bfloat16).train()
    policy.model.layers[0].eval()
    policy.model.embed_tokens.weight.requires_grad_(False)
    kept = policy.model.embed_tokens.weight.clone()
    modes = {name: module.training for name, module in policy.named_modules()}
    learns = {id(p): p.requires_grad for p in policy.parameters()}
    PPOTrainer(
        policy, share, ROWS, config=replace(config, **options), tokenizer=tiny_tokenizer
    ).train()
    assert {policy.get_submodule(name).training for name, on in modes.items() if on} == {True}
    assert not policy.model.layers[0].training
    own = [p for p in policy.parameters() if id(p) in learns]
    assert len(own) == len(learns)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in own)
    assert all(p.requires_grad == learns[id(p)] for p in own)
    assert torch.equal(policy.model.embed_tokens.weight, kept)
    ids = torch.tensor([[3, 4, 5]])
    saved = AutoModelForCausalLM.from_pretrained(f"{config.output_dir}/model")
    assert saved.dtype == torch.bfloat16
    torch.testing.assert_close(
        policy.eval()(ids).logits.float(), saved(ids).logits.float(), rtol=0.05, atol=0.05
    )


def test_a_model_is_given_back_after_an_error(config, policy, tiny_tokenizer):
    policy.train()

    def fails(prompts, completions, **columns):
        raise RuntimeError("no")

    with pytest.raises(InputError, match="reward=<function fails> raised RuntimeError: no"):
        PPOTrainer(policy, fails, ROWS, config=config, tokenizer=tiny_tokenizer).train()
    assert policy.training and all(p.requires_grad for p in policy.parameters())


def test_several_rewards_an_engine_and_held_out_rows(config, policy, tiny_tokenizer, capsys):
    """Of everything a list or an object; what is held out is not learnt from."""
    asked = []

    def number(prompts, completions, number, **columns):
        asked.extend(prompts)
        return number

    def says_good(model, ids, mask, sampling, draws):
        tokens = torch.tensor([[3, 3, 1]]).repeat(len(ids), 1)
        return Completions(tokens, torch.ones_like(tokens).bool(), torch.zeros(len(ids), 3))

    rewards = [share, number, lambda prompts, completions, **columns: [1.0] * len(prompts)]
    held_out = [{"prompt": "the film", "number": 7.0}, {"prompt": "the plot", "number": 7.0}]
    config.reward_weights = [1.0, 0.0, 2.0]
    PPOTrainer(
        policy,
        rewards,
        ROWS,
        held_out,
        config=config,
        tokenizer=tiny_tokenizer,
        engine=says_good,
        callbacks=None,
    ).train()
    row = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert row["objective/scores/share"] == 1 and row["objective/scores"] == 3
    assert {"objective/scores/number", "objective/scores/lambda"} <= row.keys()
    assert asked[:2] == ["the film", "the plot"] and "the film" not in asked[2:-2]
    assert "4 rows of data with a held-out prompt are left out" in capsys.readouterr().out


def test_resume_knows_objects_again(config, policy, tiny_policy_folder, tiny_tokenizer, capsys):
    """What can be told apart is; what cannot is said in one line."""

    def train(model, reward, rows, steps, **options):
        one = replace(config, steps=steps, resume=True)
        PPOTrainer(model, reward, rows, config=one, tokenizer=tiny_tokenizer, **options).train()

    def fresh():
        return policy_of(tiny_policy_folder)

    offset = 1.0

    def closure(prompts, completions, **columns):
        return [offset] * len(prompts)

    train(policy, [share, closure], ROWS, 1)
    capsys.readouterr()
    with pytest.raises(InputError, match="model=<LlamaForCausalLM> has changed.* Load it again"):
        train(policy, [share, closure], ROWS, 2)  # it is the trained one by now
    with pytest.raises(InputError, match="data has changed"):
        train(fresh(), [share, closure], Dataset.from_list(ROWS[1:] + ROWS[:1]).to_list(), 2)
    capsys.readouterr()
    train(fresh(), [share, closure], ROWS, 2)
    said = " ".join(capsys.readouterr().out.split())
    assert "began cannot be checked: reward=<function closure>" in said and "changed" not in said
    one = fresh()
    before = state_of(one)
    train(one, [share, closure], ROWS, 2)
    assert "loaded models stay as they are" in capsys.readouterr().out
    assert same(state_of(one), before)
    with pytest.raises(InputError, match="model=<LlamaForCausalLM> was an object of a Python"):
        ppo.train(replace(config, model="<LlamaForCausalLM>", data="d", reward=["r"]))


def test_the_reward_trainer(tiny_reward_folder, tiny_tokenizer, tmp_path):
    """A loaded classifier learns in place; its tokenizer is not touched."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    config = RewardConfig(
        output_dir=tmp_path / "rm", batch_size=4, learning_rate=1e-2, epochs=4, device="cpu"
    )
    held_out = Dataset.from_list([{"chosen": "plot good", "rejected": "plot bad"}] * 2)
    trainer = RewardTrainer(model, PAIRS, held_out, config=config, tokenizer=tokenizer)
    assert trainer.train()["accuracy"] == 1
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model")
    assert same(state_of(model), state_of(saved)) and model.config.score_std == pytest.approx(
        saved.config.score_std
    )
    assert len(tokenizer) == size and tokenizer.pad_token == tokenizer.eos_token


class Unfit:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model=3: expected a name, a folder or a loaded model"),
        ({"model": Unfit()}, "model=<Unfit>: expected a name"),
        ({"model": None}, "model is not given"),
        ({"tokenizer": "t"}, "tokenizer='t': expected a tokenizer of transformers"),
        ({"tokenizer": None}, "no tokenizer that can be found .*: give it, tokenizer="),
        ({"train_dataset": None}, "data is not given"),
        ({"train_dataset": []}, "data=<list> has no rows"),
        ({"train_dataset": Dataset.from_list([])}, "data=<Dataset> has no rows"),
        ({"train_dataset": 3}, "data=3: expected a file"),
        ({"train_dataset": ["the film"]}, "data=<list>: row 0 is 'the film', expected a dict"),
        ({"train_dataset": [{"text": "a"}]}, "data=<list> has no column 'prompt'; its columns are"),
        (
            {"train_dataset": DatasetDict(train=Dataset.from_list(ROWS))},
            r"data=<DatasetDict> has splits: give one of them, \['train'\]",
        ),
        ({"eval_dataset": [{"text": "a"}]}, "eval_data=<list> 2 has no column 'prompt'"),
        ({"rewards": None}, "reward is not given"),
        ({"rewards": []}, "reward is empty"),
        ({"rewards": 3}, "reward=3: expected a name, a function or a loaded sequence classifier"),
        ({"rewards": [share, None]}, "reward=None: expected a name, a function"),
        ({"rewards": lambda prompts: []}, "reward=<lambda> cannot be called with completions"),
        ({"rewards": (share, share)}, "expected .classifier, its tokenizer.; several .* a list"),
        ({"judge": lambda: []}, "judge=<lambda> cannot be called with completions"),
        ({"engine": 3}, "engine=3: expected a function of"),
        ({"callbacks": [3]}, "callbacks=3: expected a TrainerCallback"),
        ({"callbacks": [CallbackHandler]}, r"callbacks: CallbackHandler\(\) cannot be made"),
        ({"config": None}, r"config=None: expected a PPOConfig\(output_dir=…\)"),
    ],
)
def test_what_cannot_work_is_one_line(config, policy, tiny_tokenizer, options, message):
    """At once: nothing is loaded or written."""
    given = {"model": policy, "rewards": share, "train_dataset": ROWS, "config": config}
    with pytest.raises(InputError, match=message) as raised:
        PPOTrainer(**(given | {"tokenizer": tiny_tokenizer} | options))
    assert "\n" not in str(raised.value) and not Path(config.output_dir).exists()


def test_models_of_another_kind(config, policy, tiny_reward_folder, tiny_tokenizer, untied_folder):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    frozen = policy_of(untied_folder).requires_grad_(False)
    labels = copy.deepcopy(classifier.config)
    labels.num_labels = 3
    several = AutoModelForSequenceClassification.from_config(labels)
    for options, message in (
        ({"model": classifier}, "model=<LlamaForSequenceClassification>: expected a model …ForC"),
        ({"rewards": policy}, "reward=<LlamaForCausalLM>: expected a model …ForSequenceClass"),
        ({"model": frozen}, "has no weight that requires a gradient"),
        ({"model": policy.to("meta")}, "has weights on the device meta"),
        ({"rewards": several}, "reward=<LlamaForSequenceClassification> gives 3 scores"),
        ({"model": "x", "config": replace(config, model="y")}, "model is given twice: .* as 'y'"),
    ):
        given = {"model": policy_of(untied_folder), "rewards": share, "train_dataset": ROWS}
        given |= {"config": config, "tokenizer": tiny_tokenizer}
        with pytest.raises(InputError, match=message):
            PPOTrainer(**(given | options)).train()
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_config_takes_no_objects():
    for name, given in (("model", Unfit()), ("data", Unfit()), ("reward", [share])):
        with pytest.raises(InputError, match=f"{name}=.*: expected text in a config; PPOTrainer"):
            PPOConfig(output_dir="o", **{name: given})
    assert asdict(PPOConfig(output_dir=Path("o"), reward=[Path("r")]))["reward"] == ["r"]
