"""Forward passes without padding give the numbers of those with it.

With SDPA (eager where a model asks for it) on packed rows, and with flash attention as transformers
calls it, its kernels replaced by PyTorch (flash_attention.py); the kernels' turn is in test_gpu.py.
"""

from functools import partial
from pathlib import Path

import flash_attention
import pytest
import torch
import transformers

from rlhf_fast.trainer import ppo, setup
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.packing import Packing, can_pack, final_hidden
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.sample import (
    Completions,
    Rollout,
    Sampling,
    answer_hidden,
    roll_out,
    sample,
)
from rlhf_fast.trainer.run.folder import read_metrics

CPU = torch.device("cpu")
PROMPTS, ANSWERS = [2, 5, 1, 3], [4, 0, 6, 1]  # tokens; the third has all 6, the second none
STARTS = [0, 6, 11, 17, 21]  # of each in one row; the sixth token of six is never an input

WINDOW = {"sliding_window": 3}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": WINDOW,
    "Gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, **WINDOW},
    "GPTNeoX": {},
}
OTHERS = {
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "Bloom": {},
    "WideHeads": {"head_dim": 264},
}


def tiny(name: str, vocab: int, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """load("Llama", ...) -> Policy of a tiny model; load.folder("Llama") -> its folder."""

    def folder(name: str) -> str:
        path = tmp_path / name
        if not path.exists():
            family = "Llama" if name == "WideHeads" else name
            tiny(family, len(tiny_tokenizer), **(MODELS | OTHERS)[name]).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
        return str(path)

    def load(name: str = "Llama", *, trainable_layers=None, **options):
        return load_policy(folder(name), trainable_layers=trainable_layers, device=CPU, **options)

    load.folder = folder
    return load


@pytest.fixture
def flash(monkeypatch) -> str:
    flash_attention.install(monkeypatch)
    return "flash_attention_2"


def answers(policy, seed: int = 0) -> Rollout:
    """Prompts padded left and answers padded right, as an engine would give them."""
    generator = torch.Generator().manual_seed(seed)
    width, longest = max(PROMPTS), max(ANSWERS)
    ids = torch.randint(3, 12, (len(PROMPTS), width + longest), generator=generator)
    prompts = torch.arange(width) >= width - torch.tensor(PROMPTS)[:, None]
    mask = torch.arange(longest) < torch.tensor(ANSWERS)[:, None]

    def engine(*_) -> Completions:
        return Completions(ids[:, width:], mask, torch.zeros(mask.shape))

    sampling = Sampling(longest, 1.0, stop_ids=[1])
    return roll_out(policy, ids[:, :width], prompts, sampling, torch.empty(0), engine)


def hidden_and_gradients(policy, rollout, rows=slice(None), **options):
    """Hidden states [n, H] that predict the answers' tokens; gradients of a sum of theirs."""
    body = policy.value_body if options.get("from_ids") else policy.body
    hidden = answer_hidden(body, rollout, rows, packed=policy.packed, **options)
    hidden = hidden[rollout.mask[rows]]
    weights = torch.cos(torch.arange(hidden.numel())).view(hidden.shape)
    learning = [p for p in body.parameters() if p.requires_grad]
    grads = torch.autograd.grad((hidden * weights).sum(), learning, allow_unused=True)
    return hidden.detach(), grads


def assert_same(found, expected) -> None:
    (hidden, grads), (exact, exact_grads) = found, expected
    torch.testing.assert_close(hidden, exact, rtol=1e-4, atol=1e-5)
    for grad, other in zip(grads, exact_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            assert (grad - other).norm() <= 1e-5 * other.norm().clamp(min=1e-3)


def test_packing_exactly():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    packing = Packing(mask)
    x = torch.arange(12).view(3, 4)
    assert packing.pack(x).tolist() == [[1, 2, 8, 9, 10, 11]]
    arguments = packing.arguments
    assert arguments["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]
    assert (
        arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 2, 2, 6]
    )
    assert arguments["max_length_q"] == arguments["max_length_k"] == 4
    again = packing.unpack(packing.pack(x)[..., None].float())
    assert torch.equal(again.squeeze(-1), x.float() * mask)


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_padded(load, name):
    padded, packed = load(name), load(name, packing=True)
    assert (padded.packed, packed.packed) == (False, True)
    rollout = answers(padded)
    for rows in (slice(None), slice(1, 2), slice(0, 1), torch.tensor([3, 1])):
        expected = hidden_and_gradients(padded, rollout, rows)
        assert_same(hidden_and_gradients(packed, rollout, rows), expected)


@pytest.mark.parametrize("name", MODELS)
def test_flash_attention_is_sdpa(load, flash, name):
    """Packed of its own accord, every layer is told where the sequences begin."""
    padded, packed = load(name), load(name, attn_implementation=flash)
    assert (padded.packed, packed.packed) == (False, True)
    rollout = answers(padded)
    expected = hidden_and_gradients(padded, rollout)
    flash_attention.calls.clear()
    assert_same(hidden_and_gradients(packed, rollout), expected)
    assert flash_attention.calls == [(STARTS, torch.float32)] * 3
    packed.packed = False
    assert_same(hidden_and_gradients(packed, rollout), expected)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_on_a_shared_trunk(load, flash, attention):
    padded = load(trainable_layers=2)
    packed = load(trainable_layers=2, attn_implementation=attention, packing=True)
    rollout, expected = answers(packed), answers(padded)
    real = rollout.attention[:, :-1]
    torch.testing.assert_close(rollout.trunk[real], expected.trunk[real], rtol=1e-4, atol=1e-5)
    assert (rollout.trunk[~real] == 0).all()
    assert_same(hidden_and_gradients(packed, rollout), hidden_and_gradients(padded, expected))


def test_a_critic_of_its_own(load):
    critic = {"value_model": load.folder("Qwen3")}
    padded, packed = load(**critic), load(**critic, packing=True)
    rollout = answers(padded)
    assert_same(
        hidden_and_gradients(packed, rollout, from_ids=True),
        hidden_and_gradients(padded, rollout, from_ids=True),
    )


@pytest.mark.parametrize("attention", [None, "flash_attention_2"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_sequences_do_not_see_each_other(load, flash, name, attention):
    """Other tokens in one sequence leave the others' hidden states as they were, bit for bit."""
    policy = load(name, attn_implementation=attention, packing=True)
    rollout = answers(policy)
    ids, mask = rollout.ids[:, :-1], rollout.attention[:, :-1]
    with torch.no_grad():
        before = final_hidden(policy.body, mask, packed=True, input_ids=ids)
        for row in range(len(ids)):
            changed = ids.clone()
            changed[row] = 3 + (changed[row] - 2) % 9  # 3 to 11, none as it was
            after = final_hidden(policy.body, mask, packed=True, input_ids=changed)
            others = torch.arange(len(ids)) != row
            assert torch.equal(after[others], before[others])
            assert (after[row] != before[row]).any(-1).equal(mask[row])


def test_models_that_cannot_be_packed(load, flash):
    """Lfm2's convolutions run over the whole row, from one sequence into the next."""
    assert not load("Lfm2").packed
    assert not load("Lfm2", attn_implementation=flash).packed
    with pytest.raises(InputError, match=r"packing=True: model=.*Lfm2 \(Lfm2Model\) does not keep"):
        load("Lfm2", packing=True)
    critic = {"value_model": load.folder("Lfm2")}
    assert not load("Llama", **critic, attn_implementation=flash).packed
    with pytest.raises(InputError, match=r"packing=True: value_model=.*Lfm2 \(Lfm2Model\)"):
        load("Llama", **critic, packing=True)


def test_a_forward_that_takes_no_more_arguments():
    class Closed(transformers.LlamaModel):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)

    base = tiny("Llama", vocab=20).base_model
    assert can_pack(base)
    assert not can_pack(Closed(base.config))


def test_loading_with_flash_attention(load, flash):
    """It has no float32, so the checks of a model that is loaded run in bfloat16, too."""
    assert load(attn_implementation=flash, bf16=True).packed
    assert {call.dtype for call in flash_attention.calls} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "options", "attention"),
    [
        ("Llama", {"bf16": True}, "flash_attention_2"),
        ("Llama", {}, "sdpa"),  # it has no float32
        ("Llama", {"bf16": True, "attn_implementation": "eager"}, "eager"),
        ("Bloom", {"bf16": True}, "eager"),  # transformers has no flash attention for it
        ("WideHeads", {"bf16": True}, "sdpa"),  # flash-attn has none for 264 numbers a head
    ],
)
def test_flash_attention_is_chosen_where_it_runs(load, flash, name, options, attention):
    policy = load(name, **options)
    assert policy.model.config._attn_implementation == attention
    assert policy.body.config._attn_implementation == attention
    assert policy.packed == (attention == "flash_attention_2")
    # A critic has its own; only together do they go without padding.
    policy = load(value_model=load.folder(name), **options)
    assert policy.value_body.config._attn_implementation == attention
    assert policy.packed == (attention == "flash_attention_2")


def test_packing_can_be_turned_off(load, flash):
    assert not load(attn_implementation=flash, packing=False).packed


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_sampling_with_flash_attention(load, flash, name):
    """Padding left, a growing cache, rows that leave: tokens and log-probs are those of SDPA."""
    ids = torch.randint(3, 12, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) >= 5 - torch.tensor(PROMPTS)[:, None]
    draws = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(8, 1.0, stop_ids=[1, 4, 5])
    expected, found = (
        sample(load(name, attn_implementation=each).model, ids, mask, sampling, draws)
        for each in (None, flash)
    )
    assert len(expected.mask.sum(1).unique()) > 1  # rows did leave before others
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-4, atol=1e-5)
    assert flash_attention.calls


@pytest.mark.parametrize(
    "options", [{}, {"trainable_layers": 2}, {"lora_r": 2}, {"value_model": "Qwen3"}]
)
@pytest.mark.parametrize("attention", [None, "flash_attention_2"])
def test_a_run_has_the_same_metrics(configured, load, flash, monkeypatch, options, attention):
    if "value_model" in options:
        options = {"value_model": load.folder(options["value_model"])}
    forward_passes = []

    def recorded(*args, packed, **given):
        forward_passes.append(packed)
        return final_hidden(*args, packed=packed, **given)

    def metrics(name: str, attention: str | None, **more) -> list[dict]:
        forward_passes.clear()
        forced = partial(load_policy, attn_implementation=attention)  # in float32, too
        monkeypatch.setattr(
            setup, "load_policy", lambda *a, attn_implementation, **b: forced(*a, **b)
        )
        config = configured(name, steps=2, micro_batch_size=3, **options, **more)
        ppo.train(config)
        rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        return [
            {k: x for k, x in row.items() if k != "eps" and not k.startswith(("perf", "time"))}
            for row in rows
        ]

    monkeypatch.setattr("rlhf_fast.trainer.rollout.sample.final_hidden", recorded)
    padded = metrics("padded", None)
    assert set(forward_passes) == {False} and not flash_attention.calls
    packed = metrics("packed", attention, packing=True if attention is None else None)
    assert set(forward_passes) == {True}
    assert bool(flash_attention.calls) == (attention is not None)
    for a, b in zip(packed, padded, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
