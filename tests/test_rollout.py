import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fast.data import pad
from rlhf_fast.models import load_policy
from rlhf_fast.rollout import Sampling, answer_hidden, decode, roll_out

CPU = torch.device("cpu")
PROMPTS = [[7, 5], [3, 4, 5, 6, 8], [9]]


def roll(
    policy, prompts=PROMPTS, *, seed=0, max_new_tokens=6, stop=(1,), engine=None, temperature=1.0,
    **options,
):  # fmt: skip
    ids, mask = pad(prompts, side="left")
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(max_new_tokens, temperature, list(stop), **options)
    return roll_out(policy, ids, mask, sampling, draws, engine)


@pytest.fixture(params=["all layers", "top 2", "gpt2"])
def policy(request, tiny_policy_folder, tiny_tokenizer, tmp_path):
    """Llama, whole or with a shared trunk; GPT-2, whose positions are absolute."""
    if request.param != "gpt2":
        layers = None if request.param == "all layers" else 2
        return load_policy(tiny_policy_folder, trainable_layers=layers, device=CPU)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return load_policy(str(tmp_path), trainable_layers=None, device=CPU)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logp_is_that_of_one_unpadded_pass(policy, temperature):
    """KV cache, left padding, positions and temperature together change no number."""
    rollout = roll(policy, temperature=temperature)
    for row, prompt in enumerate(PROMPTS):
        answer = rollout.labels[row][rollout.mask[row]]
        ids = torch.cat([torch.tensor(prompt), answer])[None]
        with torch.no_grad():
            logp = torch.log_softmax(policy.model(ids).logits[0] / temperature, -1)
        expected = logp[len(prompt) - 1 : -1].gather(1, answer[:, None]).squeeze(1)
        torch.testing.assert_close(
            rollout.logp[row][rollout.mask[row]], expected, atol=1e-4, rtol=1e-4
        )
    assert (rollout.logp[~rollout.mask] == 0).all()


def test_hidden_states_predict_the_answers(policy):
    """answer_hidden sits one before each token, from ids and from the shared trunk alike."""
    rollout = roll(policy)
    with torch.no_grad():
        hidden = answer_hidden(policy.body, rollout, slice(None))
        logp = torch.log_softmax(policy.head(hidden), -1)
    logp = logp.gather(2, rollout.labels[..., None]).squeeze(2)
    torch.testing.assert_close(logp[rollout.mask], rollout.logp[rollout.mask], atol=1e-4, rtol=1e-4)
    assert (rollout.trunk is None) == (policy.trunk_layers == 0)


def test_answers_stop_at_the_first_stop_token(policy):
    rollout = roll(policy, prompts=PROMPTS * 20, max_new_tokens=12, stop=(1, 5))
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    for ids, mask, ended in zip(rollout.labels, rollout.mask, rollout.ended, strict=True):
        stops = ((ids == 1) | (ids == 5)) & mask
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert int(stops.sum()) == int(ended) and (not ended or stops[length - 1])
        assert ended or length == 12


def test_sampling_ends_when_all_have(policy):
    every = tuple(range(policy.model.config.vocab_size))
    rollout = roll(policy, max_new_tokens=50, stop=every)
    assert rollout.mask.shape == (3, 1) and rollout.ended.all()


def test_the_seed_decides(policy):
    first, again, other = (roll(policy, seed=s).ids for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_greedy_takes_the_likeliest(policy):
    rollout = roll(policy, temperature=0.0, stop=())
    assert torch.equal(rollout.ids, roll(policy, temperature=0.0, seed=5, stop=()).ids)
    with torch.no_grad():
        hidden = answer_hidden(policy.body, rollout, slice(None))
    assert torch.equal(policy.head(hidden).argmax(-1), rollout.labels)


def test_temperature_spreads(policy):
    cold = roll(policy, prompts=PROMPTS * 20, temperature=0.05)
    hot = roll(policy, prompts=PROMPTS * 20, temperature=5.0)
    assert cold.labels[:, 0].unique().numel() < hot.labels[:, 0].unique().numel()


def test_answers_are_text_without_special_tokens(policy, tiny_tokenizer):
    rollout = roll(policy)
    length = rollout.mask.size(1)
    rollout.ids[:, rollout.prompt_length :] = torch.tensor([3, 5, 1, 4, 4, 4])[:length]
    rollout.mask[:] = (torch.arange(6) < 3)[:length]
    assert decode(tiny_tokenizer, rollout.labels, rollout.mask) == ["good film"] * 3
