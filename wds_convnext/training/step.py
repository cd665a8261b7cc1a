"""One training step: what it changes, what else it needs, and the step itself."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from wds_convnext.rng import derive_key
from wds_convnext.stream.stream import Batch
from wds_convnext.training.augment import Mixer, Normalizer
from wds_convnext.training.distributed import World, sum_over_ranks
from wds_convnext.training.log import StepSums
from wds_convnext.training.model import WeightAverage
from wds_convnext.training.monitor import DeviceTimer

_NUMBERS = ("step", "best_top1", "epoch_seconds", "num_bad_samples")  # of TrainState


@dataclass
class TrainState:
    """Everything a run changes, and so everything a checkpoint has to hold."""

    model: nn.Module  # as timm made it: neither compiled nor wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    sums: StepSums
    step: int = 0  # steps done
    best_top1: float = -1.0
    epoch_seconds: float = 0.0  # spent in the epoch under way
    num_bad_samples: int = 0  # in the epoch under way

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state_dict(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        keep_lr_on_device(self.optimizer, self.sums.epoch.device)
        self.scaler.load_state_dict(state["scaler"])
        self.sums.load_state_dict(state["sums"])
        for name in _NUMBERS:
            setattr(self, name, state[name])


def keep_lr_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make each group's learning rate a 0-d tensor, so that changing it recompiles nothing."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=device)


@dataclass(frozen=True)
class StepRecipe:
    """What a step does besides the state it changes."""

    forward: Callable  # the model, compiled and wrapped for many processes as configured
    normalizer: Normalizer
    mixer: Mixer
    autocast: Callable  # gives the context for mixed precision
    no_sync: Callable  # gives the context in which ranks do not exchange gradients
    clip_grad_norm: float
    seed: int
    world: World
    optimizer_timer: DeviceTimer
    compiled: bool = False  # whether `forward` is
    max_skips: int = 0  # steps in a row that may be skipped for not being finite


def train_step(
    state: TrainState, batches: list[Batch], *, lr: float, recipe: StepRecipe
) -> torch.Tensor:
    """One optimizer step on the batches of one step; adds to the sums, reads nothing back.

    A step whose loss or gradient is not finite on any rank changes nothing. More than `max_skips`
    such steps in a row set a flag on the device, and from then on nothing changes until the host
    reads the flag. Under fp16 a gradient that overflows only skips the step, and lowers the scale.

    Returns:
        The mean loss over batches and ranks, 0-d, on the device.
    """
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"].fill_(lr)
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    losses = [
        _forward_backward(state, batch, micro, len(batches), recipe)
        for micro, batch in enumerate(batches)
    ]
    loss = torch.stack(losses).mean()
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(
        state.model.parameters(), recipe.clip_grad_norm or math.inf
    )
    overflow = ~torch.isfinite(grad_norm)
    failed = ~torch.isfinite(loss)
    if not state.scaler.is_enabled():
        failed |= overflow
    # Summed over ranks here, the sums that a checkpoint holds are the same on every rank.
    loss, failed = sum_over_ranks(torch.stack([loss, failed]), recipe.world) / recipe.world.size
    state.sums.note_failure(failed > 0, state.step, max_skips=recipe.max_skips)
    skip = overflow | (failed > 0) | state.sums.frozen
    state.optimizer.found_inf = skip.float()
    with recipe.optimizer_timer.span():
        state.optimizer.step()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:  # none in ConvNeXt; elsewhere BatchNorm's running statistics
        buffer.copy_(torch.where(skip, before, buffer))
    if state.average:
        state.average.update(frozen=skip)
    state.sums.add(loss=loss, grad_norm=grad_norm.detach(), skipped=skip)
    state.step += 1
    return loss


def _forward_backward(
    state: TrainState, batch: Batch, micro: int, num_micro: int, recipe: StepRecipe
) -> torch.Tensor:
    """The loss of one batch; its gradient, divided by the number of batches, is added up."""
    is_last = micro == num_micro - 1
    with nullcontext() if is_last else recipe.no_sync():
        loss = _loss(recipe.forward, state, batch, micro, recipe)
        state.scaler.scale(loss / num_micro).backward()
    return loss.detach()


def _loss(
    forward: Callable, state: TrainState, batch: Batch, micro: int, recipe: StepRecipe
) -> torch.Tensor:
    key = (recipe.seed, state.step, micro, recipe.world.rank)
    images, targets = augment_on_device(batch, key=key, recipe=recipe)
    torch.manual_seed(derive_key("dropout", *key))
    with recipe.autocast():
        return soft_target_cross_entropy(forward(images), targets)


@torch.no_grad()
def eager_loss(state: TrainState, batches: list[Batch], recipe: StepRecipe) -> torch.Tensor:
    """What `train_step` would return if the model were not compiled; changes nothing."""
    state.model.train()
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    losses = [
        _loss(state.model, state, batch, micro, recipe) for micro, batch in enumerate(batches)
    ]
    for buffer, before in buffers:
        buffer.copy_(before)
    return sum_over_ranks(torch.stack(losses).mean(), recipe.world) / recipe.world.size


def augment_on_device(batch: Batch, *, key: tuple[int, ...], recipe: StepRecipe):
    """Normalised, mixed images float32 (B, 3, S, S) and soft targets float32 (B, num_classes)."""
    draw = recipe.mixer.draw(batch.images.shape[-1], *key)
    return recipe.mixer(recipe.normalizer(batch.images), batch.labels, draw)


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -sum(targets * log softmax(logits)); float32, whatever the logits' precision."""
    return F.cross_entropy(logits.float(), targets)
