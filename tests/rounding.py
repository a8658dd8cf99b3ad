"""dlogits in 16 bits, made the long way round: what the engine writes at once must be the same."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.linear import gradients
from rlhf_fast.ops.linear.chunks import Chunk, chunk_buffer


class RoundedAfterwards(gradients.Gradients):
    """All of them in float32; then the labels' entries are taken out and the others rounded."""

    def add(self, chunk: Chunk, labels: Tensor, write: gradients.Write) -> None:
        n, (rows, vocab) = labels.numel(), chunk.padded.shape
        _, exact = chunk_buffer(None, rows, vocab, torch.float32, labels.device)
        write(lambda x: x[None], labels, exact[:n][None])
        tokens, here = labels[0].clamp(min=0), labels[0] >= 0
        entries = exact[torch.arange(n, device=labels.device), tokens].masked_fill(~here, 0.0)
        exact[torch.arange(n, device=labels.device)[here], tokens[here]] = 0.0
        padded = self._place(chunk)
        padded.copy_(exact)
        at_labels = gradients.AtLabels(tokens, entries)
        assert chunk.hidden is not None
        self.waiting.append(
            gradients.Rows(chunk.rows, chunk.hidden, padded, at_labels, self.row_units)
        )
        if not self.groups:
            self._add_group()
