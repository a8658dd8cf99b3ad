"""A layer as one op: against the formula in float64, and against the model's own modules."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_fast.ops.decoding.decoder_layer import reference
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout import fused_layers as module
from rlhf_fast.trainer.rollout import sample as rollout_module
from rlhf_fast.trainer.rollout.fused_layers import FusedLayers, fused_layers
from rlhf_fast.trainer.rollout.kv_cache import growing_cache
from rlhf_fast.trainer.rollout.sample import Sampling, roll_out, sample

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
# rows, width, query heads, key-value heads, head size, inner width, room, tokens; around the 8
# floats of a vector and the 16 rows of a product
SHAPES = [
    (1, 8, 1, 1, 8, 8, 1, 1),
    (3, 20, 4, 2, 6, 17, 9, 5),
    (16, 64, 9, 3, 16, 40, 32, 32),
    (33, 24, 2, 2, 10, 100, 12, 7),
]


def arguments(rows, width, heads, kv_heads, size, inner, room, tokens, *, biased=True):
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape, scale=0.3):
        return scale * torch.randn(*shape, generator=generator)

    q, kv = heads * size, kv_heads * size
    linear = [(q, width), (kv, width), (kv, width), (width, q)]
    linear += [(inner, width), (inner, width), (width, inner)]
    matrices = [draw(*shape, scale=shape[1] ** -0.5) for shape in linear]
    weights = [1 + draw(width), *matrices[:4], 1 + draw(width), *matrices[4:]]
    biases = [draw(len(w)) if biased and w.dim() == 2 else None for w in weights]
    mask = torch.rand(rows, tokens, generator=generator) > 0.3
    mask[:, -1] = True
    cache = [draw(rows, kv_heads, room, size, scale=1.0) for _ in range(2)]
    for stored, anything in zip(cache, (1e30, float("nan")), strict=True):  # at the padding
        stored[:, :, :tokens].transpose(1, 2)[~mask] = anything
    angles = draw(rows, size // 2, scale=3.0).repeat(1, 2)
    hidden = draw(rows, width, scale=1.0)
    return [hidden, weights, biases, *cache, mask, angles.cos(), angles.sin(), 1e-5, 1e-2, 0.4]


def mapped(function, x):
    if isinstance(x, list):
        return [mapped(function, part) for part in x]
    return function(x) if isinstance(x, torch.Tensor) else x


def wide(x):
    """In float64, on a cache without NaN: PyTorch's attention multiplies what is masked by 0."""
    return mapped(lambda t: t.nan_to_num().double() if t.is_floating_point() else t.clone(), x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, biased):
    given = arguments(*shape, biased=biased)
    before = mapped(torch.clone, given)
    oracle = wide(given)
    hidden = torch.ops.rlhf_fast.decoder_layer(*given)
    torch.testing.assert_close(hidden.double(), reference(*oracle), rtol=1e-5, atol=1e-5)
    end = shape[-1]
    for cached, old, exact in zip(given[3:5], before[3:5], oracle[3:5], strict=True):
        torch.testing.assert_close(cached[:, :, end - 1], exact[:, :, end - 1].float())
        cached[:, :, end - 1] = old[:, :, end - 1]
        assert torch.equal(cached.nan_to_num(), old.nan_to_num())  # nothing else is written
    for x, old in zip([given[0], *given[1]], [before[0], *before[1]], strict=True):
        assert torch.equal(x, old)


def test_scores_beyond_what_exp_holds():
    given = arguments(*SHAPES[2])
    given[-1] = 100.0
    exact = reference(*wide(given))
    hidden = torch.ops.rlhf_fast.decoder_layer(*given)
    torch.testing.assert_close(hidden.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_rows_beside_a_row_do_not_change_it():
    given = arguments(*SHAPES[-1])
    whole = torch.ops.rlhf_fast.decoder_layer(*mapped(torch.clone, given))
    for rows in (slice(0, 1), slice(3, 20), slice(30, 33)):
        some = [given[0][rows], *given[1:3], *(x[rows].clone() for x in given[3:8]), *given[8:]]
        assert torch.equal(torch.ops.rlhf_fast.decoder_layer(*some), whole[rows])


def test_padding_costs_no_digit():
    """A row that other rows pad has the hidden states that it has alone, to the last bit."""
    given = mapped(torch.nan_to_num, arguments(*SHAPES[2]))
    given[5][:] = True
    padded = mapped(torch.clone, given)
    for index in (3, 4):
        padded[index] = torch.cat([torch.full_like(given[index], torch.nan), given[index]], 2)
    padded[5] = torch.cat([torch.zeros_like(given[5]), given[5]], 1)
    layer = torch.ops.rlhf_fast.decoder_layer
    assert torch.equal(layer(*padded), layer(*given))


def test_what_does_not_fit_is_refused():
    """Angles of half a head: a model that rotates only a part of it."""
    given = arguments(*SHAPES[2])
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.rlhf_fast.decoder_layer(*given[:6], given[6][:, :8], given[7][:, :8], *given[8:])
    given[6] = given[6].t().contiguous().t()
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.rlhf_fast.decoder_layer(*given)


def test_opcheck():
    given = mapped(torch.nan_to_num, arguments(*SHAPES[1]))
    torch.library.opcheck(torch.ops.rlhf_fast.decoder_layer.default, tuple(given))


def tiny(kind: str, **options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "initializer_range": 0.3, "max_position_embeddings": 4096, "pad_token_id": 0,
    }  # fmt: skip
    config = CONFIG_MAPPING[kind](**(sizes | options))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def is_fused(model) -> bool:
    return fused_layers(model, growing_cache(model, 9)) is not None


SCALED = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
FUSED = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("granite", {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
]
OWN = [
    ("llama", {"hidden_act": "gelu"}),
    ("mistral", {"sliding_window": 4}),
    ("granite", {"residual_multiplier": 0.5}),
    ("granite", {"embedding_multiplier": 3.0}),
    ("qwen3", {}),  # a norm of queries and keys
    ("smollm3", {}),  # layers without positions
    ("gemma", {}),
    ("gpt2", {}),
    ("phi3", {}),
    # the queries of far positions are scaled
    ("ministral3", {"rope_parameters": SCALED | {"original_max_position_embeddings": 64}}),
]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "options"), FUSED)
def test_what_is_fused_samples_what_the_modules_do(kind, options, monkeypatch):
    """Rows that end early leave, and 150 rows are too many until some have."""
    model = tiny(kind, **options)
    assert is_fused(model)
    rollout_module.way_of_decoding(model, sample)  # tried beforehand
    calls = []
    step = FusedLayers.__call__
    monkeypatch.setattr(
        FusedLayers, "__call__", lambda self, *args: calls.append(len(args[0])) or step(self, *args)
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (150, 5), generator=generator)
    mask = torch.arange(5) >= torch.randint(5, (150, 1), generator=generator)
    draws = torch.rand(150, 16, generator=generator)
    given = (model, ids, mask, Sampling(16, 0.8, [3, 4]), draws)
    fused = sample(*given, trunk_layers=2, keep_hidden=True)
    assert 1 < len(calls) < 15 and max(calls) <= 128 > min(calls)
    monkeypatch.setattr(rollout_module, "fused_layers", lambda *_: None)
    own = sample(*given, trunk_layers=2, keep_hidden=True)
    assert torch.equal(fused.mask, own.mask)
    assert torch.equal(fused.tokens[own.mask], own.tokens[own.mask])
    for name in ("logp", "trunk", "hidden"):
        torch.testing.assert_close(getattr(fused, name), getattr(own, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), OWN)
def test_what_is_left_to_the_modules(kind, options):
    assert not is_fused(tiny(kind, **options))


def test_type_adapters_and_hooks_are_left_to_the_modules(tiny_policy_folder):
    model = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU).model
    assert is_fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(model)
    handle = model.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not is_fused(model)
    handle.remove()
    assert is_fused(model)
    assert not is_fused(model.bfloat16())
    lora = LoRA(r=2, alpha=4.0, target_modules=["q_proj"], seed=0)
    adapted = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU, lora=lora).model
    assert not is_fused(adapted)


def test_a_layer_that_disagrees_is_found(monkeypatch):
    """Were the op wrong, the model's modules would decode."""
    model = tiny("llama")
    kernel = torch.ops.rlhf_fast.decoder_layer
    monkeypatch.setattr(
        torch.ops.rlhf_fast, "decoder_layer", lambda *args: kernel(*args) * (1 + 3e-4)
    )
    assert not module.agrees(model)
    monkeypatch.undo()
    assert module.agrees(model)


def test_weights_that_learn_are_read_anew(tiny_policy_folder):
    policy = load_policy(tiny_policy_folder, trainable_layers=None, device=CPU)
    ids = torch.tensor([[3, 4, 5]])
    draws = torch.zeros(1, 6)

    def logp():
        return roll_out(policy, ids, ids > 0, Sampling(6, 0.0, []), draws).logp

    before = logp()
    with torch.no_grad():
        policy.model.base_model.layers[0].mlp.down_proj.weight.mul_(2)
    after = logp()
    policy.model.base_model.layers[2].register_forward_hook(lambda *_: None)  # its own modules
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, logp(), rtol=1e-4, atol=1e-4)
