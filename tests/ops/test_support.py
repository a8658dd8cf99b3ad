"""Truncated support: the sets themselves, and what samples in the registry cannot show."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops import pages
from rlhf_fast.ops import support as sets
from rlhf_fast.ops.linear import support as few
from rlhf_fast.ops.registry import KERNELS

N, H, V, K = 6, 8, 200, 5


@pytest.fixture
def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=generator)
    return {
        "hidden": torch.randn(N, H, generator=generator),
        "weight": torch.randn(V, H, generator=generator),
        "labels": labels,
        "support": sets.drawn(labels, V, K, generator),
    }


def all_ops(given: dict[str, Tensor], support: Tensor) -> None:
    """Every public function that takes sets."""
    hidden, weight, labels = (given[x] for x in ("hidden", "weight", "labels"))
    rf.token_logprobs(hidden @ weight.t(), labels, support=support)
    rf.linear_token_logprobs(hidden, weight, labels, support=support)
    rf.linear_token_kl(hidden, weight, labels, hidden, support=support)
    zero = torch.zeros(1, N)
    policy = (hidden[None], weight, labels[None], zero, zero, zero == 0)
    rf.linear_policy_loss(*policy, support=support[None])


def each_op(given: dict[str, Tensor], support: Tensor, error: type, match: str) -> None:
    hidden, weight, labels = (given[x] for x in ("hidden", "weight", "labels"))
    zero = torch.zeros(1, N)
    for call in (
        lambda s: rf.token_logprobs(hidden @ weight.t(), labels, support=s),
        lambda s: rf.linear_token_logprobs(hidden, weight, labels, support=s),
        lambda s: rf.linear_token_kl(hidden, weight, labels, hidden, support=s),
        lambda s: rf.linear_policy_loss(
            hidden[None], weight, labels[None], zero, zero, zero == 0,
            support=s[None] if isinstance(s, Tensor) else s,
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call(support)


def test_what_is_no_set_is_refused_by_name(given: dict[str, Tensor]) -> None:
    ids, labels = given["support"], given["labels"]
    all_ops(given, ids)
    full = ids.clone()
    full[:] = torch.arange(K)
    full[:, 0] = labels
    full[:, 1:] = (labels[:, None] + torch.arange(1, K)) % V
    all_ops(given, full)

    def changed(column: int, value: int | Tensor) -> Tensor:
        wrong = full.clone()
        wrong[2, column] = value
        return wrong

    each_op(given, changed(1, V), ValueError, r"tokens in \[0, 200\), or -1 to fill .* in row 2")
    each_op(given, changed(1, -2), ValueError, r"tokens in \[0, 200\)")
    each_op(given, changed(1, full[2, 2]), ValueError, "each token once, got .* in row 2")
    each_op(given, changed(0, (labels[2] + 50) % V), ValueError,
            rf"hold the label in each row .* {labels[2]}, got .* in row 2")  # fmt: skip
    each_op(given, full.float(), TypeError, "support must be int64 or int32, got a float32")
    each_op(given, full > 0, TypeError, "support must be int64 or int32, got a bool")
    each_op(given, full[:-1], ValueError, r"support must be \[.*6, K\], the shape of labels")
    each_op(given, full[..., None], ValueError, "support must be")
    each_op(given, full.tolist(), TypeError, "support must be a tensor, got list")
    each_op(given, full.to("meta"), ValueError, "support.* on ")


def test_a_row_without_a_token_has_the_whole_vocabulary(given: dict[str, Tensor]) -> None:
    x = {k: given[k] for k in ("hidden", "weight", "labels")}
    dense = rf.linear_token_logprobs(**x, entropy=True)
    for nothing in (torch.full((N, K), -1), torch.empty(N, 0, dtype=torch.int64)):
        for a, b in zip(
            rf.linear_token_logprobs(**x, entropy=True, support=nothing), dense, strict=True
        ):
            assert torch.equal(a, b)
    everything = torch.arange(V).expand(N, V)
    for a, b in zip(
        rf.linear_token_logprobs(**x, entropy=True, support=everything), dense, strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_kl"])
def test_both_ways_give_the_same_numbers(
    op: str, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token and as a chunk's rows; in float64, where no sample is too ill-conditioned."""
    seen = []
    for times in (1, 10**6):
        monkeypatch.setattr(few, "SMALL", times)
        x = dict(given)
        leaves = [x[name] for name in ("hidden", "weight")]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        x |= dict(zip(("hidden", "weight"), leaves, strict=True))
        if op == "linear_token_kl":
            x["ref_hidden"] = given["hidden"].double().flip(0)
        found = getattr(rf, op)(**x, temperature=0.7)
        found = found if isinstance(found, tuple) else (found,)
        total = sum((i + 1) * out.sum() for i, out in enumerate(found) if out.requires_grad)
        seen.append([*found, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_small_sets_take_no_product_of_the_head(given: dict[str, Tensor]) -> None:
    given["support"][0] = given["labels"][0]  # drawn without a set
    given["support"][0, 1:] = -1
    hidden, weight = (given[x].requires_grad_() for x in ("hidden", "weight"))
    with torch.profiler.profile() as seen:
        rf.linear_token_logprobs(**given).sum().backward()
    names = {event.name for event in seen.events()}
    assert "rlhf_fast::support_logits" in names
    assert not names & {"aten::mm", "aten::addmm", "rlhf_fast::linear_token_logprobs"}
    touched = torch.zeros(V, dtype=torch.bool)
    touched[given["support"][given["support"] >= 0]] = True
    assert (weight.grad[~touched] == 0).all() and (weight.grad[touched] != 0).any()
    assert hidden.grad.isfinite().all()


def test_the_fallback_of_positions_is_the_kernel() -> None:
    """Every answer that it can give, wrong sets included."""
    ids = torch.tensor(
        [[3, 1, -1], [-1, -1, -1], [2, 2, 3], [9, 3, -1], [4, 5, 6], [-2, 3, 1], [7, 7, 7]]
    )
    labels = torch.tensor([1, 0, 3, 3, 3, 3, -100])
    want = [1, -100, -3, -2, -1, -2, -100]
    kernel = torch.ops.rlhf_fast.support_positions(ids, labels, 8, True)
    fallback = KERNELS["support_positions"].fallback(ids, labels, 8, True)
    assert kernel.tolist() == fallback.tolist() == want


# What large gradients lie in.

SHAPE = (1024, 8192)  # as large as pages.LEAST


@pytest.fixture
def like() -> Tensor:
    pages.release()
    yield torch.empty(1).expand(SHAPE)
    pages.release()


def test_memory_is_used_again_only_when_nobody_has_it(like: Tensor) -> None:
    first = pages.empty_like(like)
    where, part = first.data_ptr(), first[5:7].view(-1)
    part.fill_(3.0)
    array = first.numpy()
    del first
    second = pages.empty_like(like).fill_(1.0)
    assert second.data_ptr() != where and (part == 3).all()
    del part
    assert pages.empty_like(like).data_ptr() != where and array[5, 0] == 3
    del array
    assert pages.empty_like(like).data_ptr() == where
    assert (second == 1).all()


def test_no_more_than_one_free_block_is_kept(like: Tensor) -> None:
    many = [pages.empty_like(like) for _ in range(3)]
    del many
    kept = pages.empty_like(like)
    assert len(pages._blocks) == 1
    wide = pages.empty_like(like, torch.float64)
    assert (kept.dtype, wide.dtype, wide.shape) == (torch.float32, torch.float64, like.shape)
    del kept, wide
    rf.release_memory()
    assert pages._blocks == []


def test_a_tied_embeddings_gradient_is_added_in_place(like: Tensor) -> None:
    """Not into memory of its own, as autograd does where a gradient is a view of another tensor."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(5)
    rf.linear_token_logprobs(weight[ids], weight, ids).sum().backward()
    blocks = [torch.frombuffer(block, dtype=torch.float32) for block in pages._blocks]
    assert weight.grad.data_ptr() in [block.data_ptr() for block in blocks]


def test_small_memory_and_other_devices_are_torchs(like: Tensor) -> None:
    assert pages.empty_like(torch.empty(3, 4)).shape == (3, 4)
    assert pages.empty_like(torch.empty(SHAPE, device="meta")).device.type == "meta"
    assert pages._blocks == []
    assert pages.PRIVATE & mmap.MAP_PRIVATE  # or a forked process would write into ours


def test_a_gradient_of_logits_lies_where_the_last_one_lay(like: Tensor) -> None:
    """Two thirds of the time of forward and backward were new memory's."""
    logits = torch.zeros(SHAPE, requires_grad=True)
    labels = torch.zeros(SHAPE[0], dtype=torch.int64)

    def gradient() -> Tensor:
        return torch.autograd.grad(rf.token_logprobs(logits, labels).sum(), logits)[0]

    where = gradient().data_ptr()
    kept = gradient()
    assert kept.data_ptr() == where
    other = gradient()
    assert other.data_ptr() != where and torch.equal(kept, other)
    assert len(pages._blocks) == 2
