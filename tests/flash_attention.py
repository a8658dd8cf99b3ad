"""flash-attn's two functions in plain PyTorch, for transformers to call where there is no GPU.

Everything but the kernels is then the real thing: how transformers takes padding out and puts it
back, finds windows and caps, and hands the sequences' starts to every layer. The functions work in
any precision, so that results can be compared with SDPA's to rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as transformers_flash


class Call(NamedTuple):
    starts: list[int]  # of the queries' sequences
    dtype: torch.dtype


calls: list[Call] = []


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
) -> Tensor:
    """q, k, v: [b, L, heads, d]."""
    calls.append(Call([i * q.size(1) for i in range(len(q) + 1)], q.dtype))
    rows = zip(q, k, v, strict=True)
    return torch.stack([attend(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
) -> Tensor:  # fmt: skip
    """q: [n, heads, d], k, v: [m, heads, d]; the i-th sequence is cu_seqlens[i] to [i+1]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (int(max_seqlen_q), int(max_seqlen_k))
    assert (sum(queries), sum(keys)) == (len(q), len(k))
    calls.append(Call(cu_seqlens_q.tolist(), q.dtype))
    sequences = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat(
        [attend(*one, softmax_scale, causal, window_size, softcap) for one in sequences]
    )


def attend(q, k, v, scale, causal, window, softcap) -> Tensor:
    """[n, heads, d]; as in flash-attn 2.1 and later, the last query sees the last key."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    if q.size(-1) > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    scores = torch.einsum("nhd,mhd->hnm", q, k).float() * (scale or q.size(-1) ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= ahead < -window[0]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def install(monkeypatch) -> None:
    """transformers finds these functions, and takes a model on a CPU for one that may call them."""
    unpadding = (transformers_flash._pad_input, transformers_flash._unpad_input)
    found = (flash_attn_func, flash_attn_varlen_func, None, *unpadding)
    monkeypatch.setattr(transformers_flash, "_lazy_imports", lambda *args, **kwargs: found)
    monkeypatch.setattr(transformers_flash, "_loaded_implementation", None)
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def adjust(self, attn_implementation, *args, **kwargs):
        if attn_implementation == "flash_attention_2" and self._supports_flash_attn:
            return attn_implementation
        return check(self, attn_implementation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", adjust)
    monkeypatch.setattr("rlhf_fast.trainer.models.policy.has_flash_attention", lambda device: True)
    calls.clear()
