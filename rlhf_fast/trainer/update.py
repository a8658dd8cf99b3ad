"""How losses become an update: their gradients, clipped to one norm, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rlhf_fast.trainer.distributed.fsdp import gathered


class Stepper:
    """For whole weights and for FSDP's shards; DeepSpeed's engine does it in
    distributed/deepspeed.py.

    sum_up: sums tensors over the processes, in place.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        sum_up: Callable[[Iterable[Tensor]], None],
    ) -> None:
        self.weights, self.optimizer = list(weights), optimizer
        self.max_norm, self.sum_up = max_norm, sum_up

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of the minibatch."""
        loss.backward()

    def drop(self) -> None:
        """Forget the minibatch's gradients."""
        self.optimizer.zero_grad()

    def step(self, loss: Tensor) -> tuple[Tensor, bool]:
        """An update from the minibatch, whose loss is `loss`, in all processes together.

        Returns the norm of its gradient, before clipping, and whether the update was made: one bad
        minibatch must not end a run, nor enter the weights, so none is made where loss or gradient
        is not finite.
        """
        for p in self.weights:
            if p.grad is None:  # this process had nothing to learn from
                p.grad = torch.zeros_like(p)
        self.sum_up(p.grad for p in self.weights)
        norm = gathered(torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm))
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if finite:
            self.optimizer.step()
        self.drop()
        return norm, finite
