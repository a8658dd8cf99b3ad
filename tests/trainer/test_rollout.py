import functools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from rlhf_fast.trainer.data.rows import pad
from rlhf_fast.trainer.measure import measure
from rlhf_fast.trainer.models.logits import logit_divisor
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout import sample as rollout_module
from rlhf_fast.trainer.rollout.fused_layers import same_states
from rlhf_fast.trainer.rollout.memory import cache_argument
from rlhf_fast.trainer.rollout.sample import (
    Completions,
    Sampling,
    answer_hidden,
    choose,
    decode,
    decodes_exactly,
    roll_out,
    widen,
)

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


@pytest.fixture(params=["all layers", "top 2", "gpt2", "granite"])
def policy(request, tiny_policy_folder, tiny_tokenizer, tmp_path):
    """Llama, whole or with a shared trunk; GPT-2, whose positions are absolute; Granite, which
    scales its logits."""
    if request.param not in ("gpt2", "granite"):
        layers = None if request.param == "all layers" else 2
        return load_policy(tiny_policy_folder, trainable_layers=layers, device=CPU)
    torch.manual_seed(0)
    vocab = len(tiny_tokenizer)
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
        model = GPT2LMHeadModel(config)
    else:
        config = GraniteConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
            logits_scaling=0.5, embedding_multiplier=2.0,
        )  # fmt: skip
        model = GraniteForCausalLM(config)
    model.save_pretrained(tmp_path)
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


def test_hidden_states_of_decoding_are_those_of_one_pass(policy):
    """Prompts of unequal lengths, and answers that end early."""
    assert not policy.exact_decoding and roll(policy).hidden is None
    assert decodes_exactly(policy) and not policy.exact_decoding
    policy.exact_decoding = True
    rollout = roll(policy, stop=(1, 4, 6))
    whole = answer_hidden(policy.body, rollout, slice(None))
    assert rollout.mask.any(1).all() and not rollout.mask.all()
    torch.testing.assert_close(
        rollout.hidden[rollout.mask], whole[rollout.mask], atol=1e-4, rtol=1e-4
    )
    assert widen(rollout, 9).hidden.shape == (3, 9, rollout.hidden.size(-1))


def test_log_probs_are_measured_on_the_hidden_states_of_decoding(policy, configured):
    policy.exact_decoding = True
    rollout, config = roll(policy), configured()
    reused = measure(policy, rollout, config)
    rollout.hidden = None
    passed = measure(policy, rollout, config)
    torch.testing.assert_close(reused.logp[rollout.mask], passed.logp[rollout.mask])
    rollout.hidden = torch.zeros_like(answer_hidden(policy.body, rollout, slice(None)))
    logp = measure(policy, rollout, config).logp[rollout.mask]
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(policy.head.out_features)))


def test_layers_are_themselves_again_after_decoding(tiny_policy_folder, monkeypatch):
    """While it lasts every linear layer goes through the product for few rows, the head too."""
    policy = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)
    layers = [m for m in policy.model.modules() if type(m) is torch.nn.Linear]
    seen = set()

    def product(x, weight, bias):
        seen.add(weight)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(rollout_module, "thin_linear", product)
    roll(policy)
    assert seen == {layer.weight for layer in layers}
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(ZeroDivisionError), rollout_module.thin_products(policy.model):
        assert all("forward" in vars(layer) for layer in layers)
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers)


def test_what_does_not_decode_exactly(policy, monkeypatch):
    """bfloat16, and a model that makes something else of a token over the cache."""
    policy.bf16 = True
    assert not decodes_exactly(policy)
    policy.bf16 = False
    forward = type(policy.model.base_model).forward

    @functools.wraps(forward)  # the arguments it takes are asked for
    def other(self, input_ids=None, **kwargs):
        out = forward(self, input_ids, **kwargs)
        if kwargs.get("use_cache"):
            out.last_hidden_state = out.last_hidden_state * 1.0005  # too little for memory.py
        return out

    monkeypatch.setattr(type(policy.model.base_model), "forward", other)
    assert not decodes_exactly(policy)


def test_rounding_beside_a_large_element_is_no_other_state():
    states = torch.full((2, 3, 512), 0.5)
    states[..., 7] = 500.0
    assert same_states(states + 2e-3, states)  # 9e-5 of its length, 4e-3 of the small elements
    assert not same_states(states * 1.0002, states)
    states[1, 2, 0] = torch.nan
    assert not same_states(states, states)


def test_hidden_states_predict_the_answers(policy):
    """answer_hidden sits one before each token, from ids and from the shared trunk alike."""
    rollout = roll(policy)
    with torch.no_grad():
        hidden = answer_hidden(policy.body, rollout, slice(None))
        logp = torch.log_softmax(policy.head(hidden) / logit_divisor(policy.model), -1)
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


# ------------------------------------------------------------------------------------ sampling


def test_draws_give_each_token_its_probability():
    """Evenly spaced draws: every token's share is its probability, to one draw."""
    logits = torch.tensor([0.3, float("-inf"), 2.0, -1.0, 0.7, float("-inf")])
    count = 10_000
    draws = (torch.arange(count) + 0.5) / count
    token, logp, _ = choose(logits.expand(count, -1), draws, Sampling(1, 1.3, []))
    probs = torch.softmax(logits / 1.3, -1)
    shares = torch.bincount(token, minlength=6) / count
    assert (shares - probs).abs().max() <= 1.001 / count
    torch.testing.assert_close(logp, probs.log()[token])


def test_no_draw_takes_an_impossible_token():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-24])  # the ends of what torch.rand gives
    token, logp, _ = choose(logits, draws, Sampling(1, 1.0, []))
    assert token.tolist() == [1, 2] and torch.isfinite(logp).all()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_p": 0.7},
        {"min_p": 0.5},
        {"top_k": 3, "top_p": 0.7},
        {"top_k": 3, "min_p": 0.5},
        {"top_p": 0.85, "min_p": 0.5},
    ],
)
def test_top_k_top_p_and_min_p(options):
    """Probabilities .5 .3 .1 .1: each option leaves the first two, renormalised, and says so."""
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log().expand(100, -1)
    draws = (torch.arange(100) + 0.5) / 100
    token, logp, among = choose(logits, draws, Sampling(1, 1.0, [], **options))
    assert set(token.tolist()) == {0, 1}
    torch.testing.assert_close(logp.exp(), torch.tensor([0.625, 0.375])[token])
    assert torch.equal(among, torch.tensor([[0, 1]]).expand(100, -1))


def test_sets_of_other_sizes_are_filled_up():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.05, 0.85, 0.0]]).log()
    _, _, among = choose(logits, torch.tensor([0.5, 0.5]), Sampling(1, 1.0, [], top_p=0.7))
    assert among.tolist() == [[0, 1], [2, -1]]


@pytest.mark.parametrize(
    ("temperature", "top_p", "left"),
    [(2.0, 0.75, [0.415, 0.322, 0.263]), (0.5, 0.6, [1.0, 0.0, 0.0])],
)
def test_the_temperature_comes_before_top_p(temperature, top_p, left):
    """Of .5 .3 .2 as they are both leave the first two. (top_k sees an order, which stays.)"""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(100, -1)
    draws = (torch.arange(100) + 0.5) / 100
    token, logp, _ = choose(logits, draws, Sampling(1, temperature, [], top_p=top_p))
    shares = torch.bincount(token, minlength=3) / 100
    torch.testing.assert_close(shares, torch.tensor(left), rtol=0, atol=0.011)
    torch.testing.assert_close(logp.exp(), torch.tensor(left)[token], rtol=0, atol=1e-3)


def test_each_token_is_drawn_by_its_own_number(policy):
    """The one at which the cumulated probability passes it, in the order of the vocabulary."""
    draws = torch.rand(3, 6, generator=torch.Generator().manual_seed(3))
    ids, mask = pad(PROMPTS, side="left")
    rollout = roll_out(policy, ids, mask, Sampling(6, 1.0, []), draws)
    with torch.no_grad():
        hidden = answer_hidden(policy.body, rollout, slice(None))
        logits = policy.head(hidden).double() / logit_divisor(policy.model)
    cumulated = logits.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulated, draws.double()[..., None], right=True).squeeze(-1)
    assert torch.equal(rollout.labels, drawn) and len(drawn.unique()) > 3


def test_an_answer_does_not_depend_on_its_neighbours(policy):
    """Nor on how many there are: processes that share a batch sample what one would."""
    prompts = PROMPTS * 4
    together = roll(policy, prompts, max_new_tokens=8, stop=(1, 5))
    draws = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(0))
    ids, mask = pad(prompts, side="left")
    for row in range(len(prompts)):
        one = slice(row, row + 1)
        alone = roll_out(policy, ids[one], mask[one], Sampling(8, 1.0, [1, 5]), draws[one])
        length = int(together.mask[row].sum())
        assert alone.mask.sum() == length and alone.ended == together.ended[row]
        assert torch.equal(alone.labels[0, :length], together.labels[row, :length])


def test_finished_rows_leave_the_batch(policy):
    rollout_module.way_of_decoding(policy.model, rollout_module.sample)  # tried beforehand
    rows = []
    layer = next(m for n, m in policy.model.named_modules() if n.endswith(".0.mlp"))
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    rollout = roll(policy, prompts=PROMPTS * 10, max_new_tokens=12, stop=(1, 5, 7))
    handle.remove()
    assert rows == rollout.mask.sum(0).tolist()  # at each token, the answers that have it
    assert rows[0] == 30 > rows[-1]


def test_the_cache_with_room_is_the_models_own(policy, monkeypatch):
    monkeypatch.setattr(rollout_module, "fused_layers", lambda model, cache: None)
    with_room = roll(policy, max_new_tokens=10, stop=(1,))
    monkeypatch.setattr(
        "rlhf_fast.trainer.rollout.sample.growing_cache",
        lambda model, room: DynamicCache(config=model.config.get_text_config()),
    )
    own = roll(policy, max_new_tokens=10, stop=(1,))
    assert torch.equal(with_room.ids, own.ids) and torch.equal(with_room.logp, own.logp)


def test_an_engine_takes_the_place_of_sampling(policy):
    """It gives tokens, mask and log-probs; ends and the trunk are worked out from them."""
    asked = []

    def engine(model, ids, mask, sampling, draws):
        asked.append((ids.shape, draws.shape, sampling.temperature))
        tokens = torch.tensor([[4, 1, 9], [4, 5, 6], [1, 9, 9]])
        kept = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
        return Completions(tokens, kept, torch.zeros(3, 3))

    rollout = roll(policy, engine=engine, temperature=0.7)
    assert asked == [((3, 5), (3, 6), 0.7)]
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.labels.tolist() == [[4, 1, 0], [4, 5, 6], [1, 0, 0]]
    with torch.no_grad():
        hidden = answer_hidden(policy.body, rollout, slice(None))
        whole = answer_hidden(policy.model.base_model, rollout, slice(None), from_ids=True)
    torch.testing.assert_close(hidden[rollout.mask], whole[rollout.mask], atol=1e-4, rtol=1e-4)


def test_wider_rollouts_are_the_same_answers(policy):
    rollout = roll(policy)
    wide = widen(rollout, 9)
    assert wide.prompt_length == rollout.prompt_length and wide.mask.shape == (3, 9)
    with torch.no_grad():
        a, b = (answer_hidden(policy.body, r, slice(None)) for r in (rollout, wide))
    torch.testing.assert_close(
        a[rollout.mask], b[:, : a.size(1)][rollout.mask], atol=1e-5, rtol=1e-5
    )
    rollout.support = rollout.labels[..., None].int()
    wide = widen(rollout, 9, sets=4).support
    length = rollout.mask.size(1)
    assert torch.equal(wide[:, :length, :1], rollout.support) and wide.shape == (3, 9, 4)
    assert (wide[:, :, 1:] == -1).all() and (wide[:, length:] == -1).all()  # of no token


def test_the_cache_goes_by_the_name_that_the_model_has_for_it():
    """Renamed in transformers 5.24; a model's own code may be older."""

    class Old(torch.nn.Module):
        def forward(self, ids, past_key_values=None): ...

    class New(torch.nn.Module):
        def forward(self, ids, cache=None): ...

    class Without(torch.nn.Module):
        def forward(self, ids): ...

    for body, name in ((Old, "past_key_values"), (New, "cache"), (Without, None)):
        assert cache_argument(SimpleNamespace(base_model=body())) == name
