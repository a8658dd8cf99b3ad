"""decoder_layer: a layer of the Llama family for one new token a row. Not public: `sample` uses it
through `rlhf_fast.trainer.rollout.fused_layers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import define_kernel


def reference(
    hidden: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    cached_keys: Tensor,
    cached_values: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention_epsilon: float,
    mlp_epsilon: float,
    scaling: float,
) -> Tensor:
    """The new token's hidden states after the layer [B, H]; its key and value go into the cache.

    x += o(attention(rope(q(n)), rope(k(n)), v(n))), n = rms_norm(x); then
    x += down(silu(gate(n)) · up(n)), n = rms_norm(x) (Touvron et al. 2023, arXiv:2302.13971), with
    D-wide heads, of which several queries share a key (Ainslie et al. 2023, arXiv:2305.13245). All
    float32. Attention reads only what the mask lets it, so padding may hold anything.

    Args:
        hidden: [B, H], what enters the layer.
        weights: of norm, q, k, v, o, norm, gate, up, down; those of linear layers [out, in].
        biases: [out] or None for each of them; None for the norms.
        cached_keys, cached_values: [B, KV, room, D]; written at t - 1.
        mask: [B, t] bool, True = a token to attend to, the new one (the last) included.
        cos, sin: [B, D], of the new token's rotary angles (Su et al. 2021, arXiv:2104.09864).
        attention_epsilon, mlp_epsilon: of the two norms.
        scaling: factor on the products of queries and keys.
    """

    def linear(x: Tensor, index: int) -> Tensor:
        return F.linear(x, weights[index], biases[index])

    def heads(x: Tensor) -> Tensor:  # [B, heads, 1, D]
        return x.view(len(x), -1, 1, cached_keys.size(-1))

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None, None] + torch.cat([-b, a], -1) * sin[:, None, None]

    end = mask.size(1)
    n = F.rms_norm(hidden, weights[0].shape, weights[0], attention_epsilon)
    query, key, value = (heads(linear(n, index)) for index in (1, 2, 3))
    cached_keys[:, :, end - 1 : end] = rotated(key)
    cached_values[:, :, end - 1 : end] = value
    attended = F.scaled_dot_product_attention(
        rotated(query), cached_keys[:, :, :end], cached_values[:, :, :end], mask[:, None, None],
        scale=scaling, enable_gqa=True,
    )  # fmt: skip
    hidden = hidden + linear(attended.flatten(1), 4)
    n = F.rms_norm(hidden, weights[5].shape, weights[5], mlp_epsilon)
    return hidden + linear(F.silu(linear(n, 6)) * linear(n, 7), 8)


KERNEL = define_kernel(
    "decoder_layer(Tensor hidden, Tensor[] weights, Tensor?[] biases, Tensor(a!) cached_keys, "
    "Tensor(b!) cached_values, Tensor mask, Tensor cos, Tensor sin, float attention_epsilon, "
    "float mlp_epsilon, float scaling) -> Tensor",
    fallback=reference,
    fake=lambda hidden, *args: torch.empty_like(hidden),
)
