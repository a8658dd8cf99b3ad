"""TRL's own functions and trainers beside ours: the same values, gradients and losses.

The tests run with the TRL that is installed (1.12.0); ``test_trl_1_16`` runs them once more in a
child process with TRL 1.16.0.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import subprocess
import sys
import textwrap
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer import utils as trl_utils

from rlhf_fast import off_policy_mask, policy_loss, rollout_correction, top_entropy_mask
from rlhf_fast.integrations import trl as fast
from rlhf_fast.integrations.patching import UnknownSignature

V, H = 37, 16
OLD = trl.__version__ == "1.12.0"
only_1_12 = pytest.mark.skipif(not OLD, reason="TRL 1.12 has it; runs there")
only_1_16 = pytest.mark.skipif(OLD, reason="TRL 1.16 has it; runs there, in test_trl_1_16")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()


def draw(seed: int = 0, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = shape or (3, 7)
    return 4 * torch.randn(*shape, V, generator=g), torch.randint(V, shape, generator=g)


def run(function, logits, *args, **options):
    """(outputs, gradient of logits) for a fixed random incoming gradient."""
    x = logits.clone().requires_grad_()
    outputs = function(x, *args, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    live = [y for y in outputs if y.requires_grad]
    incoming = [torch.randn(y.shape, generator=g).to(y.dtype) for y in live]
    torch.autograd.backward(live, incoming)
    return outputs, x.grad


def same(function, replacement, logits, *args, **options) -> None:
    theirs, their_grad = run(function, logits, *args, **options)
    ours, our_grad = run(replacement, logits, *args, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)


def edge_logits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    minus_inf, index = draw(1)
    minus_inf[..., 20:] = -torch.inf
    huge, _ = draw(2)
    return {
        "random": draw(0),
        "one token": draw(3, 1, 1),
        "empty completions": draw(0, 2, 0),
        "4-D": draw(4, 2, 2, 3),
        "-inf logits": (minus_inf, index % 20),
        "huge": (1000 * huge, index),
        "not contiguous": (draw(5, 3, 8)[0][:, :-1], index),
    }


@pytest.mark.parametrize("case", edge_logits())
def test_selective_log_softmax(case):
    logits, index = edge_logits()[case]
    same(trl_utils.selective_log_softmax, fast.selective_log_softmax, logits, index)


@only_1_16
@pytest.mark.parametrize("masked", ["some", "all", "none"])
def test_row_mask_and_temperature(masked):
    logits, index = draw(6)
    row_mask = {"some": (index % 2), "all": torch.zeros_like(index), "none": None}[masked]
    for theirs, ours in (
        (trl_utils.selective_log_softmax, fast.selective_log_softmax),
        (trl_utils.selective_log_softmax_and_entropy, fast.selective_log_softmax_and_entropy),
    ):
        same(theirs, ours, logits, index, temperature=0.7, row_mask=row_mask)


@only_1_16
def test_row_mask_hides_nan_of_the_gradient_too():
    logits, index = draw(7)
    logits[1] = torch.nan
    row_mask = torch.ones_like(index)
    row_mask[1] = 0
    (logp,), grad = run(fast.selective_log_softmax, logits, index, row_mask=row_mask)
    assert logp[1].eq(0).all() and logp.isfinite().all()
    assert grad.isfinite().all()
    # TRL's gradient is NaN in the masked row, which then spreads to every weight
    _, grad = run(trl_utils.selective_log_softmax, logits, index, row_mask=row_mask)
    assert grad[1].isnan().all()


@only_1_16
def test_entropy_without_gradient():
    logits, index = draw(8)
    same(
        trl_utils.selective_log_softmax_and_entropy,
        fast.selective_log_softmax_and_entropy,
        logits,
        index,
        entropy_requires_grad=False,
    )


@pytest.mark.parametrize("shape", [(3, 7), (130, 2), (5,), (2, 3, 4)])
def test_entropy_from_logits(shape):
    same(trl_utils.entropy_from_logits, fast.entropy_from_logits, draw(9, *shape)[0])


def test_entropy_where_trl_is_nan():
    """One −inf logit (a top-k mask, a padded vocabulary) makes TRL's entropy and gradient NaN."""
    logits, _ = draw(10)
    logits[..., 30:] = -torch.inf
    (theirs,), _ = run(trl_utils.entropy_from_logits, logits)
    assert theirs.isnan().all()
    (ours,), grad = run(fast.entropy_from_logits, logits)
    (expected,), expected_grad = run(trl_utils.entropy_from_logits, logits[..., :30])
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert_close(grad[..., :30], expected_grad, rtol=1e-4, atol=1e-6)
    assert grad[..., 30:].eq(0).all()


def test_several_indices_a_row_are_left_to_trl():
    logits, _ = draw(11)
    index = torch.randint(V, (3, 7, 4))
    same(trl_utils.selective_log_softmax, fast.selective_log_softmax, logits, index)


def test_bfloat16_is_nearer_the_truth():
    logits, index = draw(12, 16, 32)
    logits = logits.bfloat16()
    truth = logits.double().log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    ours = (fast.selective_log_softmax(logits, index) - truth).abs().max()
    theirs = (trl_utils.selective_log_softmax(logits, index) - truth).abs().max()
    assert ours < 1e-5 < theirs


# The fused head


def head_inputs(n: int = 11) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, H, generator=g), torch.randn(V, H, generator=g)
    bias = torch.randn(V, generator=g)
    return [hidden, weight, bias, torch.randint(V, (n,), generator=g)]


def run_head(head, hidden, weight, bias, targets, *options):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    operands = leaves if bias is not None or OLD else [*leaves, None]
    outputs = head.apply(*operands, targets, *options)
    logp, entropy = outputs[:2]
    loss = (logp * torch.linspace(-1, 1, len(logp))).sum()
    if entropy is not None:
        loss = loss + (entropy * torch.linspace(0, 2, len(logp))).sum()
    loss.backward()
    return outputs, [x.grad for x in leaves]


HEAD_OPTIONS = [(1.0, 8, None, 1.0), (0.7, 8, None, 1.0), (1.3, 64, 5.0, 1.0), (1.0, 8, 5.0, 0.25)]


@only_1_16
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "outputs",
    [
        ("log_probs",),
        ("log_probs", "entropy"),
        ("log_probs", "is_top1"),  # SFT asks for entropy, too
        ("log_probs", "entropy", "mean_logits"),  # KTO
        ("log_probs", "entropy", "mean_logits", "is_top1"),  # DPO
    ],
)
@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_fused_head(options, outputs, with_bias, monkeypatch):
    hidden, weight, bias, targets = head_inputs()
    bias = bias if with_bias else None
    logits = hidden @ weight.T + (0 if bias is None else bias)
    targets[:4] = logits.argmax(-1)[:4]
    targets[4:7] = logits.topk(2).indices[4:7, 1]
    monkeypatch.setattr(fast, "LOGITS", 3 * V)  # three rows at a time
    arguments = (hidden, weight, bias, targets, *options, outputs)
    theirs, their_grads = run_head(trl_utils._ChunkedLogProbFunction, *arguments)
    ours, our_grads = run_head(fast.FusedHead, *arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ours[4] is None or (ours[4][:4].all() and not ours[4][4:7].any())
    assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-5)


@only_1_16
def test_fused_head_leaves_other_outputs_to_trl():
    arguments = (*head_inputs(), 1.0, 8, None, 1.0, ("log_probs", "entropy", "log_sum_sq_probs"))
    theirs, _ = run_head(trl_utils._ChunkedLogProbFunction, *arguments)
    ours, _ = run_head(fast.FusedHead, *arguments)
    assert ours[2] is not None
    assert_close(ours, theirs, rtol=0, atol=0)


@only_1_12
@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_fused_head_of_async_grpo(options):
    """Values as TRL's; the entropy's gradient, which TRL 1.12 drops silently, is there."""
    hidden, weight, _, targets = head_inputs()
    arguments = (hidden, weight, None, targets, *options)
    (their_logp, their_entropy), _ = run_head(trl_utils._ChunkedLogProbFunction, *arguments)
    (logp, entropy), grads = run_head(fast.FusedHeadOfAsyncGRPO, *arguments)
    assert_close(logp, their_logp, rtol=1e-5, atol=1e-5)
    assert_close(entropy, their_entropy, rtol=1e-5, atol=1e-5)

    temperature, _, softcap, scale = options

    class Plain:
        @staticmethod
        def apply(hidden, weight, targets, *_):
            z = scale * hidden @ weight.T
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            log_p = (z / temperature).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy

    _, expected = run_head(Plain, *arguments)
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_a_head_sharded_by_zero_3_is_left_to_trl(monkeypatch):
    hidden, weight, bias, targets = head_inputs()
    weight.ds_id = 0
    monkeypatch.setattr(fast, "linear_token_logprobs", None)
    operands = (hidden, weight, targets) if OLD else (hidden, weight, bias, targets)
    head = fast.FusedHeadOfAsyncGRPO if OLD else fast.FusedHead
    theirs = trl_utils._ChunkedLogProbFunction.apply(*operands, 1.0, 8)
    assert_close(head.apply(*operands, 1.0, 8)[0], theirs[0], rtol=0, atol=0)


@pytest.fixture
def tiny_policy(tiny_policy_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_policy_folder)


@only_1_16
@pytest.mark.parametrize("kept", ["some", "an empty row", "none"])
def test_model_with_fused_head(tiny_policy, kept, monkeypatch):
    """Prompt and padding rows, which TRL computes on a CPU, do not reach our head."""
    ids = torch.randint(3, 17, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    labels[0, 7:] = -100
    if kept != "some":
        labels[1 if kept == "an empty row" else slice(None)] = -100
    trl_utils.add_fused_lm_head(tiny_policy, temperature=0.8, outputs=("log_probs", "entropy"))
    rows = []
    op = fast.linear_token_logprobs
    monkeypatch.setattr(
        fast, "linear_token_logprobs", lambda h, *a, **k: (rows.append(len(h)), op(h, *a, **k))[1]
    )

    def step():
        tiny_policy.zero_grad()
        out = tiny_policy(ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        return out, [p.grad.clone() for p in tiny_policy.parameters()]

    theirs, their_grads = step()
    assert not rows
    with fast.patch():
        ours, our_grads = step()
    assert rows == [int((labels[:, 1:] != -100).sum())]
    for name in ("loss", "log_probs", "entropy", "label_mask"):
        assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-5)


# GRPO's losses, which stay TRL's own, beside the options of policy_loss with the same formula


def grpo(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    """What GRPOTrainer._compute_loss gets of a batch, and what it asks of the model."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(4, 9, generator=g)
    return {
        "logp": logp,
        "entropy": torch.rand(4, 9, generator=g),
        "old_per_token_logps": logp + spread * torch.randn(4, 9, generator=g),
        "ref_per_token_logps": logp + 0.4 * torch.randn(4, 9, generator=g),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.9]),
        "completion_mask": (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).int(),
        "num_items_in_batch": torch.tensor(21),
    }


def trls_loss(x: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """[loss, its gradient of logp, mean KL from the reference] by GRPOTrainer itself."""
    same = types.SimpleNamespace(
        reduce=lambda x, **_: x, gather=lambda x: x, pad_across_processes=lambda x, **_: x,
        num_processes=1,
    )  # fmt: skip
    defaults = GRPOConfig(bf16=False, report_to=[])
    arguments = types.SimpleNamespace(**vars(defaults) | {"steps_per_generation": 1} | options)
    logp = x["logp"].clone().requires_grad_()
    trainer = types.SimpleNamespace(
        **vars(arguments), args=arguments, accelerator=same, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)},
        epsilon_low=arguments.epsilon, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, x["entropy"], None),
    )  # fmt: skip
    trainer.epsilon_high = arguments.epsilon_high or arguments.epsilon
    trainer.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    ids = torch.zeros(4, 9, dtype=torch.int64)
    prompt = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    loss = GRPOTrainer._compute_loss(trainer, None, x | prompt)
    return [loss.detach(), *torch.autograd.grad(loss, logp), *trainer._metrics["train"]["kl"]]


def our_loss(x: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    logp = x["logp"].clone().requires_grad_()
    loss, stats = policy_loss(
        logp, x["old_per_token_logps"], x["advantages"][:, None].expand_as(logp),
        x["completion_mask"].bool(), ref_logp=x["ref_per_token_logps"], **options,
    )  # fmt: skip
    kl = [float(stats.ref_kl)] if options.get("kl_coef") else []
    return [loss.detach(), *torch.autograd.grad(loss, logp), *kl]


def assert_same_loss(x: dict[str, torch.Tensor], theirs: dict, ours: dict) -> None:
    for a, b in zip(our_loss(x, **ours), trls_loss(x, **theirs), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


SEQUENCES = {"aggregation": "seq-mean-token-mean"}
KL = {"beta": 0.1, "use_bias_correction_kl": True}, {"kl_coef": 0.1, "unbiased_kl": True}
OBJECTIVES = {  # TRL's arguments, ours
    "sapo": (
        {"loss_type": "sapo", "beta": 0.1, "use_bias_correction_kl": False},
        {"loss": "sapo", "kl_coef": 0.1, **SEQUENCES},
    ),
    "sapo, unbiased KL": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5, **KL[0]},
        {"loss": "sapo", "sapo_tau_pos": 2.0, "sapo_tau_neg": 0.5, **KL[1], **SEQUENCES},
    ),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"aggregation": "seq-mean-token-sum", "ratio": "sequence", "clip_low": 0.05,
         "clip_high": 0.05},
    ),
    "vespo": (
        {"loss_type": "vespo"}, {"loss": "vespo", "ratio": "sequence", "normalizer": 21.0},
    ),
    "vespo, other weights": (
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.5,
         "vespo_lambda_neg": 1.0, **KL[0]},
        {"loss": "vespo", "ratio": "sequence", "normalizer": 21.0, "vespo_k_pos": 1.0,
         "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.0, **KL[1]},
    ),
    **{
        f"delta {delta}, {level}": (
            {"loss_type": "grpo", "delta": delta, "importance_sampling_level": level},
            {"delta": delta, "ratio": level, **SEQUENCES},
        )
        for delta in (0.7, 1.1, 1.5)
        for level in ("token", "sequence")
    },
}  # fmt: skip


@only_1_16
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    theirs, ours = OBJECTIVES[name]
    for spread in (0.1, 0.4, 1.0):
        assert_same_loss(grpo(0, spread), theirs, ours)


@only_1_16
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_top_entropy_mask(share):
    x = grpo()
    kept = top_entropy_mask(x["entropy"], x["completion_mask"].bool(), share)
    assert kept.sum() in {0.2: [5], 0.5: [11], 1.0: [21]}[share]
    ours = {"importance_weights": kept.float(), **SEQUENCES}
    assert_same_loss(x, {"loss_type": "grpo", "top_entropy_quantile": share}, ours)


@only_1_16
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_off_policy_mask(threshold):
    x = grpo()
    x["old_per_token_logps"] += torch.tensor([[3.0], [1.0], [3.0], [0.3]])  # rows of 9, 4, 1, 7
    advantages = x["advantages"][:, None].expand(4, 9)
    kept = off_policy_mask(
        x["logp"], x["old_per_token_logps"], advantages, x["completion_mask"].bool(), threshold
    )
    assert kept.sum() == {0.0: 10, 0.5: 17, 2.0: 21}[threshold]
    ours = {"importance_weights": kept.float(), **SEQUENCES}
    assert_same_loss(x, {"loss_type": "grpo", "off_policy_mask_threshold": threshold}, ours)


# PPO's helpers


@only_1_12
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_and_mean(shift_mean):
    from trl.experimental.ppo import ppo_trainer

    values, index = draw(13)[0][..., 0], draw(13)[1]
    mask = index % 3 > 0
    theirs = ppo_trainer.masked_whiten(values, mask, shift_mean).masked_fill(~mask, 0)
    assert_close(fast.masked_whiten(values, mask, shift_mean), theirs, rtol=1e-5, atol=1e-5)
    same(ppo_trainer.masked_mean, fast.masked_mean, values, mask)
    same(ppo_trainer.masked_mean, fast.masked_mean, values, mask, axis=1)
    # nothing counts: TRL's mean is NaN and its whitening refuses; ours are 0
    nothing = torch.zeros_like(mask)
    assert ppo_trainer.masked_mean(values, nothing).isnan()
    assert fast.masked_mean(values, nothing) == 0
    assert fast.masked_whiten(values, nothing).eq(0).all()


# Patching


def test_patch_and_unpatch():
    entropy, loss = trl_utils.entropy_from_logits, RewardTrainer.compute_loss
    done = fast.patch()
    assert trl_utils.selective_log_softmax is fast.selective_log_softmax
    assert RewardTrainer.compute_loss is fast.reward_compute_loss
    if OLD:
        from trl.experimental.ppo import ppo_trainer

        assert grpo_trainer.selective_log_softmax is fast.selective_log_softmax
        assert rloo_trainer.entropy_from_logits is fast.entropy_from_logits
        assert ppo_trainer.masked_whiten is fast.masked_whiten
        assert ppo_trainer.selective_log_softmax is fast.selective_log_softmax
        assert "trl.trainer.grpo_trainer.selective_log_softmax" in done.replaced
    else:
        assert trl_utils._ChunkedLogProbFunction is fast.FusedHead
    assert fast.patch() is done and len(set(done.replaced)) == len(done.replaced)
    assert "entropy_from_logits" in repr(done)
    fast.unpatch()
    for module in [m for name, m in sys.modules.items() if name.startswith("trl")]:
        for value in vars(module).values():
            assert getattr(value, "__module__", "") != fast.__name__
    assert trl_utils.entropy_from_logits is entropy
    assert RewardTrainer.compute_loss is loss
    assert repr(done) == "rlhf_fast in TRL: nothing replaced"


def test_a_module_imported_while_patched_is_restored(monkeypatch):
    package = importlib.import_module("trl.experimental.cpo")
    before = importlib.import_module("trl.experimental.cpo.cpo_trainer")  # others' class is of it
    monkeypatch.setattr(package, "cpo_trainer", before)
    monkeypatch.delitem(sys.modules, before.__name__)
    with fast.patch():
        cpo_trainer = importlib.import_module("trl.experimental.cpo.cpo_trainer")
        assert cpo_trainer.selective_log_softmax is fast.selective_log_softmax
    assert cpo_trainer.selective_log_softmax is trl_utils.selective_log_softmax
    assert cpo_trainer.selective_log_softmax is not fast.selective_log_softmax


def test_an_unknown_signature_is_refused(monkeypatch):
    original = trl_utils.selective_log_softmax
    monkeypatch.setattr(trl_utils, "entropy_from_logits", lambda logits, temperature: None)
    with pytest.raises(UnknownSignature) as error:
        fast.patch()
    assert str(error.value) == (
        f"TRL {trl.__version__}: trl.trainer.utils.entropy_from_logits takes "
        "(logits, temperature), expected (logits, chunk_size=128). rlhf_fast works with TRL "
        "1.12.0 and 1.16.0; nothing was replaced."
    )
    assert trl_utils.selective_log_softmax is original
    monkeypatch.delattr(trl_utils, "entropy_from_logits")
    with pytest.raises(UnknownSignature, match="entropy_from_logits is not there"):
        fast.patch()
    assert trl_utils.selective_log_softmax is original


# Trainers: a few real steps on a tiny model, patched and unpatched


@pytest.fixture
def calls(monkeypatch):
    """Names of our ops in the order they were called by the adapter."""
    names = []
    for name in ("token_logprobs", "linear_token_logprobs", "pairwise_loss", "masked_whiten_op"):
        op = getattr(fast, name)

        def counted(*args, op=op, name=name, **options):
            names.append(name)
            return op(*args, **options)

        monkeypatch.setattr(fast, name, counted)
    return names


def both(train, calls, *expected: str) -> None:
    """``train()`` -> rows of metrics; the same with TRL's functions and with ours."""
    theirs = train()
    assert not calls
    with fast.patch():
        ours = train()
    assert set(calls) == set(expected)
    assert len(ours) == len(theirs) >= 2
    for a, b in zip(ours, theirs, strict=True):
        numbers = [k for k in b if "time" not in k and "per_second" not in k and "eps" not in k]
        assert set(numbers) <= set(a)
        for name in numbers:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6), name


def options(folder: Path, **more) -> dict:
    return dict(
        output_dir=str(folder), max_steps=3, logging_steps=1, report_to=[], save_strategy="no",
        learning_rate=1e-3, per_device_train_batch_size=4, seed=1, disable_tqdm=True,
        use_cpu=True, bf16=False, **more,
    )  # fmt: skip


def losses(trainer) -> list[dict]:
    trainer.train()
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    assert any(row.get("grad_norm", 1.0) > 0 for row in rows)  # PPOTrainer does not log it
    return rows


def prompts(tiny_tokenizer):
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["the film", "a very good plot", "bad", "the actor is"]})


def reward_even(completion_ids, **_) -> list[float]:
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]


@pytest.mark.long
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_online_trainers(name, tiny_policy_folder, tiny_tokenizer, tmp_path, calls):
    config, trainer = {
        "grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer),
    }[name]  # fmt: skip

    def train():
        set_seed(0)
        return losses(
            trainer(
                tiny_policy_folder,
                reward_funcs=reward_even,
                args=config(
                    **options(tmp_path), num_generations=2, max_completion_length=6, beta=0.1,
                    num_iterations=2, temperature=0.9, epsilon=0.05,
                ),
                train_dataset=prompts(tiny_tokenizer),
                processing_class=tiny_tokenizer,
            )
        )  # fmt: skip

    both(train, calls, "token_logprobs" if OLD else "linear_token_logprobs")


def test_reward_trainer(tiny_reward_folder, tiny_tokenizer, tmp_path, calls):
    from datasets import Dataset

    data = Dataset.from_dict(
        {
            "chosen": ["the film was good", "very good plot", "a good actor", "not bad"] * 3,
            "rejected": ["the film was bad", "very bad", "the actor is not good", "bad"] * 3,
            "margin": [0.0, 0.5, 0.1, 1.0] * 3,
        }
    )

    def train():
        set_seed(0)
        return losses(
            RewardTrainer(
                tiny_reward_folder,
                args=RewardConfig(**options(tmp_path), center_rewards_coefficient=0.01),
                train_dataset=data,
                processing_class=tiny_tokenizer,
            )
        )

    both(train, calls, "pairwise_loss")


PREFERENCES = {"dpo": {"beta": 0.3}, "ipo": {"loss_type": "ipo"}, "kto": {"beta": 0.3},
               "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
               "orpo": {}}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_trainers(name, tiny_policy_folder, tiny_tokenizer, tmp_path, calls):
    """Losses, norms of the gradients and all metrics of three updates."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    kind = name if name in ("kto", "orpo") else {"simpo": "cpo"}.get(name, "dpo")
    if kind == "dpo":
        config, trainer = DPOConfig, DPOTrainer
    else:
        module = importlib.import_module("trl" if kind == "kto" else f"trl.experimental.{kind}")
        config, trainer = (getattr(module, kind.upper() + x) for x in ("Config", "Trainer"))
    good = [" was good", " is very good and the actor", " not bad", " good"] * 3
    bad = [" was bad", " bad", " is not good the film was bad", " very bad"] * 3
    ask = ["the film", "a plot", "the actor", "the very film"] * 3
    data = {"prompt": ask, "chosen": good, "rejected": bad}
    if kind == "kto":
        data = {"prompt": ask * 2, "completion": good + bad, "label": [True] * 12 + [False] * 12}

    def train():
        set_seed(0)
        return losses(
            trainer(
                AutoModelForCausalLM.from_pretrained(tiny_policy_folder),
                args=config(**options(tmp_path), max_length=32, **PREFERENCES[name]),
                train_dataset=Dataset.from_dict(data),
                processing_class=tiny_tokenizer,
            )
        )

    fused = not OLD and kind in ("dpo", "kto")
    both(train, calls, "linear_token_logprobs" if fused else "token_logprobs")


@only_1_12
def test_ppo_trainer(tiny_policy_folder, tiny_reward_folder, tiny_tokenizer, tmp_path, calls):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    data = prompts(tiny_tokenizer).map(
        lambda row: {"input_ids": tiny_tokenizer(row["prompt"])["input_ids"]},
        remove_columns="prompt",
    )

    def train():
        set_seed(0)
        policy, ref = (AutoModelForCausalLM.from_pretrained(tiny_policy_folder) for _ in range(2))
        reward, value = (
            AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder, num_labels=1)
            for _ in range(2)
        )
        trainer = PPOTrainer(
            args=PPOConfig(
                **options(tmp_path) | {"per_device_train_batch_size": 8, "max_steps": -1},
                total_episodes=16, num_ppo_epochs=2, num_mini_batches=1, response_length=5,
                num_sample_generations=0, whiten_rewards=True, missing_eos_penalty=1.0,
                local_rollout_forward_batch_size=8, cliprange=0.05,
            ),
            processing_class=tiny_tokenizer, model=policy, ref_model=ref, reward_model=reward,
            value_model=value, train_dataset=data.repeat(4),
        )  # fmt: skip
        return losses(trainer)

    both(train, calls, "token_logprobs", "masked_whiten_op")


@only_1_16
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollout_weights(mode, level):
    """TRL's ratio stands inside a method: those very lines are run by themselves."""
    asked = "if self.use_vllm and self.vllm_importance_sampling_correction:"
    lines = inspect.getsource(grpo_trainer).splitlines()
    (begin,) = (
        i
        for i, line in enumerate(lines)
        if line.strip() == asked and "completion_mask" in lines[i + 1]
    )
    indent = lines[begin].index("if")
    end = next(
        i for i in range(begin + 1, len(lines)) if lines[i].strip() and lines[i][indent] != " "
    )
    g = torch.Generator().manual_seed(0)
    rollout, noise = -3 * torch.rand(6, 9, generator=g), torch.randn(6, 9, generator=g)
    old, counts = rollout + 0.3 * noise, torch.rand(6, 9, generator=g) < 0.7
    asked_for = {
        "use_vllm": True, "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": f"{level}_{mode}",
        "vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": 0.8,
    }  # fmt: skip
    names = {
        "self": types.SimpleNamespace(**asked_for), "torch": torch, "math": math,
        "completion_mask": counts.int(), "tool_mask": None, "old_per_token_logps": old,
        "sampling_per_token_logps": rollout,
    }  # fmt: skip
    exec(textwrap.dedent("\n".join(lines[begin:end])), names)
    theirs = names["vllm_importance_sampling_ratio"].expand(6, 9)
    ours, kept, stats = rollout_correction(
        old, rollout, counts, mode=mode, level=level, low=0.8, high=1.4
    )
    assert_close(ours, theirs * counts)
    assert torch.equal(kept, counts) and 0 < stats.clipfrac < 1


@pytest.mark.long
@pytest.mark.skipif(not OLD, reason="this is that run")
def test_trl_1_16():
    """This file once more, with TRL 1.16.0 before 1.12.0 on the path."""
    folder = Path(sys.prefix, "trl-1.16.0")
    if not folder.is_dir():
        pytest.fail(f"missing: pip install --no-deps --target {folder} trl==1.16.0")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
