"""The moving average of a model's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of a model's parameters, updated on the device without reads.

    Buffers are not averaged: they belong to the running model.
    """

    def __init__(self, model: nn.Module, *, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, *, frozen: torch.Tensor) -> None:
        """Move towards the model's weights; not at all where the 0-d flag `frozen` is set."""
        weight = (1 - self.decay) * (1 - frozen.float())
        # Not _foreach_lerp_: it takes a Python number, and would read `frozen` to get one.
        moves = torch._foreach_sub(self._parameters, self._average)
        torch._foreach_mul_(moves, weight)
        torch._foreach_add_(self._average, moves)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model computes with the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        running = [p.detach().clone() for p in self._parameters]
        torch._foreach_copy_(self._parameters, self._average)
        torch._foreach_copy_(self._average, running)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self._average))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(self._average, [state[name] for name in self.names])
