"""The moving average of a model's weights."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def decay_at(num_updates: int, decay: float) -> float:
    """The decay of an update after so many: it rises to `decay`, so that few steps count, too.

    Source: num_updates of TensorFlow's tf.train.ExponentialMovingAverage.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def warmup_note(decay: float, num_steps: int) -> str | None:
    """A sentence for a run that ends before its average's decay has risen to `decay`."""
    if decay_at(num_steps - 1, decay) == decay:
        return None
    return (
        f"--ema-decay {decay:g} averages over some {1 / (1 - decay):,.0f} steps, this run has "
        f"{num_steps:,}: after t steps the decay is (1 + t) / (10 + t), at the end "
        f"{decay_at(num_steps - 1, decay):.3f}."
    )


class WeightAverage:
    """An exponential moving average of a model's parameters, updated on the device without reads.

    Buffers are not averaged: the model's own go with the average, wherever it is used. Those of
    BatchNorm are moving averages already, others are counts or constants.

    Args:
        num_updates: how many there were, by which the decay warms up; None for a decay that is
            constant, as in runs of version 0.1.0.
    """

    def __init__(self, model: nn.Module, *, decay: float, num_updates: int | None = None):
        self.decay = decay
        self.num_updates = num_updates
        self.names = [name for name, _ in model.named_parameters()]
        self._parameters: list[torch.Tensor] = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]
        self._of = dict(zip(self._parameters, self._average))
        self._moved: set[torch.Tensor] = set()  # parameters whose average is ahead of the update

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The average of a parameter, for an optimizer that moves it along; None if it is not here.

        It moves by `next_weight` of the way to the new weights, and says so: see `note_moved`.
        """
        return self._of.get(parameter)

    @property
    def next_weight(self) -> float:
        """By which part of the way to the weights the next update moves the average."""
        if self.num_updates is None:
            return 1 - self.decay
        return 1 - decay_at(self.num_updates, self.decay)

    def note_moved(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take note of averages that need no more of the next update."""
        self._moved.update(parameters)

    @torch.no_grad()
    def update(self, *, frozen: torch.Tensor) -> None:
        """Move towards the model's weights; not at all where the 0-d flag `frozen` is set."""
        weight = torch.where(frozen, 0.0, self.next_weight)  # float32
        if self.num_updates is not None:
            self.num_updates += 1  # frozen ones included: the host does not know of them
        parameters = [p for p in self._parameters if p not in self._moved]
        averages = [self._of[p] for p in parameters]
        self._moved.clear()
        if not parameters:
            return
        # Not _foreach_lerp_: it takes a Python number, and would read `frozen` to get one.
        moves = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(moves, weight)
        torch._foreach_add_(averages, moves)

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
