import copy
import os
import shutil

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.attention import has_flash_attention
from rlhf_fast.trainer.models.critic import load_critic
from rlhf_fast.trainer.models.loading import pick_device
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.models.reward_model import (
    load_reward_model,
    new_reward_model,
    score_texts,
    score_tokens,
)
from rlhf_fast.trainer.models.tokenizer import check_vocabulary, choose_pad, load_tokenizer
from rlhf_fast.trainer.models.trunk import trunk_recorder

CPU = torch.device("cpu")


@pytest.fixture
def save_model(tmp_path, tiny_tokenizer):
    def save(model) -> str:
        model.save_pretrained(tmp_path / "m")
        tiny_tokenizer.save_pretrained(tmp_path / "m")
        return str(tmp_path / "m")

    return save


@pytest.mark.parametrize("layers", [None, 1, 2, 3])
def test_what_trains(tiny_policy_folder, layers):
    policy = load_policy(tiny_policy_folder, trainable_layers=layers, device=CPU)
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    if layers is None:
        assert names == {name for name, _ in policy.model.named_parameters()}
    else:
        top = [
            name
            for name, _ in policy.model.named_parameters()
            if any(f".layers.{i}." in name for i in range(3 - layers, 3))
        ]
        assert names == {*top, "model.norm.weight"}
    assert set(policy.trained()) == names | {"value_head.weight", "value_head.bias"}
    assert all((p == 0).all() for p in policy.value_head.parameters())
    assert not any(m.training for m in policy.model.modules())  # dropout off


@pytest.mark.parametrize("layers", [None, 2])
def test_reference_stays_when_the_policy_moves(tiny_policy_folder, layers):
    policy = load_policy(tiny_policy_folder, trainable_layers=layers, device=CPU)
    ids = torch.tensor([[3, 4, 5, 6]])

    def logits(body, head):
        with torch.no_grad(), trunk_recorder(policy.model, policy.trunk_layers) as recorded:
            policy.model(ids)
            given = {"inputs_embeds": recorded[0]} if recorded else {"input_ids": ids}
            return head(body(**given, use_cache=False).last_hidden_state)

    def reference():
        with policy.reference() as body:
            return logits(body, policy.reference_head)

    before = logits(policy.body, policy.head)
    torch.testing.assert_close(reference(), before)
    with torch.no_grad():
        for name, p in policy.trained().items():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    torch.testing.assert_close(reference(), before)
    moved = logits(policy.body, policy.head)
    assert (moved - before).abs().max() > 0.1
    torch.testing.assert_close(moved, policy.model(ids).logits)  # the slice trains the model itself


def test_unsupported_architectures_say_so(save_model, tiny_tokenizer):
    vocab = len(tiny_tokenizer)
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 16}
    granite = save_model(
        GraniteForCausalLM(
            GraniteConfig(
                **sizes,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                embedding_multiplier=3.0,
                initializer_range=0.5,
            )
        )
    )
    with pytest.raises(InputError, match="GraniteForCausalLM.*not supported with trainable_layers"):
        load_policy(granite, trainable_layers=1, device=CPU)
    assert load_policy(granite, trainable_layers=None, device=CPU).trunk_layers == 0
    gpt2 = save_model(GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2)))
    with pytest.raises(InputError, match="trainable_layers=1: .*GPT2Model"):
        load_policy(gpt2, trainable_layers=1, device=CPU)
    assert load_policy(gpt2, trainable_layers=None, device=CPU).trunk_layers == 0


def test_too_many_trainable_layers(tiny_policy_folder):
    with pytest.raises(InputError, match="trainable_layers=4: .* has 3 layers"):
        load_policy(tiny_policy_folder, trainable_layers=4, device=CPU)


def test_model_folder_without_tokenizer(tmp_path, tiny_config):
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        load_policy(str(tmp_path), trainable_layers=None, device=CPU)


def test_folders_that_are_no_models(tmp_path, tiny_tokenizer):
    with pytest.raises(InputError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"), field="model")
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        load_policy(str(tmp_path), trainable_layers=None, device=CPU)


def test_another_vocabulary(save_model, tiny_config, tiny_policy_folder, tiny_tokenizer):
    config = copy.deepcopy(tiny_config)
    config.vocab_size = len(tiny_tokenizer) - 1
    config.num_labels = 1
    folder = save_model(LlamaForSequenceClassification(config))
    with pytest.raises(InputError, match=f"reward={folder}: its tokenizer has another vocabulary"):
        load_reward_model(folder, field="reward", device=CPU)
    policy = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)
    check_vocabulary(tiny_tokenizer, policy.model, field="model", name="fits")


def test_language_model_is_no_reward_model(tiny_policy_folder):
    with pytest.raises(InputError, match=r"score\.weight.*not a reward model"):
        load_reward_model(tiny_policy_folder, field="reward", device=CPU)


def test_reward_model_is_no_policy(tiny_reward_folder):
    with pytest.raises(InputError, match="is a LlamaForSequenceClassification: expected a causal"):
        load_policy(tiny_reward_folder, trainable_layers=None, device=CPU)


def test_reward_model_with_two_scores(save_model, tiny_config):
    config = copy.deepcopy(tiny_config)
    config.num_labels = 2
    folder = save_model(LlamaForSequenceClassification(config))
    with pytest.raises(InputError, match="gives 2 scores, expected one"):
        load_reward_model(folder, field="reward", device=CPU)


def test_new_reward_model(tiny_policy_folder, tiny_tokenizer):
    model = new_reward_model(
        tiny_policy_folder, tiny_tokenizer, trainable_layers=1, seed=0, device=CPU
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("model.layers.2.", "model.norm.", "score."))
    }
    std = model.score.weight.std().item()
    assert 0.5 < std / (33**-0.5) < 1.5
    assert model.config.pad_token_id == 0


def test_score_is_of_the_last_real_token(tiny_reward_folder):
    """Whatever the padding, and also when a text ends in the pad token."""
    model, _ = load_reward_model(tiny_reward_folder, field="reward", device=CPU)
    rows = [[3, 4, 5], [6, 7, 8, 9, 3, 4], [5, 6, 0]]
    with torch.no_grad():
        alone = []
        for row in rows:
            hidden = model.model(torch.tensor([row])).last_hidden_state
            alone.append(model.score(hidden[0, -1]).item())
    torch.testing.assert_close(score_texts(model, rows), torch.tensor(alone))
    torch.testing.assert_close(score_texts(model, rows, batch_size=1), torch.tensor(alone))

    ids = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 3, 4]])  # and the same padded left
    left = torch.tensor([[0, 0, 0, 3, 4, 5], [6, 7, 8, 9, 3, 4]])
    with torch.no_grad():
        right = score_tokens(model, ids, torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]).bool())
        torch.testing.assert_close(
            score_tokens(model, left, torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]).bool()), right
        )
        assert (right - score_tokens(model, ids, torch.ones(2, 6).bool())).abs().max() > 1e-3


def test_scores_are_normalised_by_the_config(tiny_reward_folder):
    model, _ = load_reward_model(tiny_reward_folder, field="reward", device=CPU)
    raw = score_texts(model, [[3, 4], [5]])
    model.config.score_mean, model.config.score_std = 2.0, 4.0
    torch.testing.assert_close(score_texts(model, [[3, 4], [5]]), (raw - 2) / 4)


def test_pad_is_not_eos_where_there_is_a_choice(tmp_path, tiny_policy_folder):
    shutil.copytree(tiny_policy_folder, tmp_path / "m")
    tokenizer = load_tokenizer(str(tmp_path / "m"), field="model")
    tokenizer.pad_token = tokenizer.eos_token
    choose_pad(tokenizer)
    assert tokenizer.pad_token != tokenizer.eos_token


def test_home_folder(monkeypatch, tiny_policy_folder):
    parent, name = os.path.split(tiny_policy_folder)
    monkeypatch.setenv("HOME", parent)
    assert load_policy(f"~/{name}", trainable_layers=None, device=CPU).trunk_layers == 0


def test_device():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device=toaster cannot be used"):
        pick_device("toaster")


# ------------------------------------------------------------------- critics, adapters, attention


def test_a_critic_from_a_reward_model_gives_its_scores(tiny_reward_folder, tmp_path):
    """Normalised ones: the scale in which the policy is rewarded."""
    model, tokenizer = load_reward_model(tiny_reward_folder, field="reward", device=CPU)
    model.config.score_mean, model.config.score_std = 2.0, 4.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    body, head = load_critic(str(tmp_path), tokenizer, CPU, None)
    rows = [[3, 4, 5], [6, 7, 8]]
    with torch.no_grad():
        values = head(body(torch.tensor(rows)).last_hidden_state[:, -1]).squeeze(-1)
    torch.testing.assert_close(values, score_texts(model, rows))


def test_a_critic_from_a_language_model_begins_at_zero(tiny_policy_folder):
    tokenizer = load_tokenizer(tiny_policy_folder, field="model")
    body, head = load_critic(tiny_policy_folder, tokenizer, CPU, None)
    assert all((p == 0).all() for p in head.parameters())
    assert all(p.requires_grad for p in body.parameters())


def test_a_critic_reads_the_policys_tokens(tiny_policy_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_policy_folder, field="model")
    shutil.copytree(tiny_policy_folder, tmp_path / "m")
    tokenizer.add_tokens(["more"])
    with pytest.raises(InputError, match=r"value_model=.* has another tokenizer than the policy"):
        load_critic(str(tmp_path / "m"), tokenizer, CPU, None)


def test_adapters(tiny_policy_folder):
    lora = LoRA(r=2, alpha=4, target_modules=["q_proj"], seed=0)
    policy = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU, lora=lora)
    names = policy.trained().keys() - policy.critic().keys()
    assert len(names) == 6 and all(".q_proj.lora_" in name for name in names)  # A, B in 3 layers
    assert not any(m.training for m in policy.model.modules())
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = policy.body(ids).last_hidden_state
        for name in names:
            policy.trained()[name].add_(0.5)
        moved = policy.body(ids).last_hidden_state
        with policy.reference() as body:
            torch.testing.assert_close(body(ids).last_hidden_state, before)
        torch.testing.assert_close(policy.body(ids).last_hidden_state, moved)  # switched on again
    assert (moved - before).abs().max() > 0.1


def test_flash_attention_that_is_not_there(tiny_policy_folder, monkeypatch):
    def load(device: torch.device):
        load_policy(
            tiny_policy_folder, trainable_layers=None, device=device, bf16=True,
            attn_implementation="flash_attention_2",
        )  # fmt: skip

    with pytest.raises(InputError, match="flash_attention_2: not on device=cpu"):
        load(CPU)
    for there in (True, False):
        monkeypatch.setattr(
            "rlhf_fast.trainer.models.attention.is_flash_attn_2_available",
            lambda there=there: there,
        )
        assert has_flash_attention(torch.device("cuda")) is there
        assert not has_flash_attention(CPU)
    with pytest.raises(InputError, match="flash-attn is not installed"):
        load(torch.device("cuda"))


def test_attention_implementation_is_the_models(tiny_policy_folder):
    policy = load_policy(
        tiny_policy_folder, trainable_layers=None, device=CPU, attn_implementation="eager"
    )
    assert policy.model.config._attn_implementation == "eager"
