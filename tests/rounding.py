"""dlogits in 16 bits, made the long way round: what the engine writes at once must be the same."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.linear import groups
from rlhf_fast.ops.linear.chunks import Chunk, chunk_buffer


class RoundedAfterwards(groups.Group):
    """All of them in float32; then the labels' entries are taken out and the others rounded."""

    def add(self, chunk: Chunk, labels: Tensor, write: groups.Write, units: Tensor | None) -> None:
        n, (rows, vocab) = labels.numel(), chunk.padded.shape
        _, exact = chunk_buffer(None, rows, vocab, torch.float32, labels.device)
        write(lambda x: x[None], labels, exact[:n][None])
        tokens, here = labels[0].clamp(min=0), labels[0] >= 0
        entries = exact[torch.arange(n, device=labels.device), tokens].masked_fill(~here, 0.0)
        exact[torch.arange(n, device=labels.device)[here], tokens[here]] = 0.0
        padded = self.placed(chunk)
        padded.copy_(exact)
        at_labels = groups.AtLabels(tokens, entries)
        assert chunk.hidden is not None
        self.waiting.append(groups.Rows(chunk.rows, chunk.hidden, padded, at_labels, units))
