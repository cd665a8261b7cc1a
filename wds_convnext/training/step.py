"""One training step: what it needs besides the state that it changes, and the step itself."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wds_convnext.config import TrainConfig
from wds_convnext.rng import derive_key
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.augment import Mixer, Normalizer, build_mixer
from wds_convnext.training.compiler import compile_model, replayed_model
from wds_convnext.training.distributed import Machine, World, sum_over_ranks
from wds_convnext.training.erase import erase
from wds_convnext.training.loss import Loss
from wds_convnext.training.monitor import DeviceTimer
from wds_convnext.training.optimizer import set_lr, step_unless
from wds_convnext.training.state import TrainState


@dataclass(frozen=True)
class StepRecipe:
    """What a step does besides the state it changes."""

    forward: nn.Module  # the model, compiled and wrapped for many processes as configured
    normalizer: Normalizer
    mixer: Mixer
    loss: Loss
    autocast: Callable[[], AbstractContextManager]  # gives the context for mixed precision
    # Gives the context in which ranks do not exchange gradients.
    no_sync: Callable[[], AbstractContextManager]
    clip_grad_norm: float
    seed: int
    world: World
    optimizer_timer: DeviceTimer
    compiled: bool = False  # whether `forward` is
    cuda_graphs: bool = False  # whether `forward` is replayed from some
    max_skips: int = 0  # steps in a row that may be skipped for not being finite


def build_recipe(
    config: TrainConfig,
    state: TrainState,
    *,
    num_classes: int,
    machine: Machine,
    preprocessing: Preprocessing,
    order: TrainOrder | None = None,
    class_weights: list[float] | None = None,
) -> StepRecipe:
    """What a step does, with the model wrapped for many processes and compiled as configured.

    Args:
        order: which says with what step mixing ends; without it that is never.
        class_weights: see `loss`.
    """
    weights = None
    if class_weights is not None:
        weights = torch.tensor(class_weights, dtype=torch.float32, device=machine.device)
    forward: nn.Module = state.model
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    if machine.world.size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
        no_sync = forward.no_sync
    if machine.compiled:
        forward = (replayed_model if machine.cuda_graphs else compile_model)(forward)
    return StepRecipe(
        forward=forward,
        compiled=machine.compiled,
        cuda_graphs=machine.cuda_graphs,
        normalizer=Normalizer(preprocessing.mean, preprocessing.std, machine.device),
        mixer=build_mixer(config, num_classes, order),
        loss=Loss(config.loss, weights),
        autocast=machine.autocast,
        no_sync=no_sync,
        clip_grad_norm=config.clip_grad_norm,
        seed=config.seed,
        world=machine.world,
        optimizer_timer=DeviceTimer(machine.device),
        max_skips=config.max_skips if config.on_nonfinite == "skip" else 0,
    )


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
    state.enter_train_mode()
    set_lr(state.optimizer, lr)
    if recipe.cuda_graphs:  # before the first batch alone: the next ones add to its gradients
        torch.compiler.cudagraph_mark_step_begin()

    # The forward pass updates buffers (BatchNorm's statistics; ConvNeXt has none), and whether
    # the step is skipped is known only after it: so they are cloned before.
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    losses = [
        _forward_backward(state, batch, micro, len(batches), recipe)
        for micro, batch in enumerate(batches)
    ]
    loss = torch.stack(losses).mean()

    # Unscale before clipping: the limit is meant for the gradient itself, not a scaled one.
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(
        state.model.parameters(), recipe.clip_grad_norm or math.inf
    )

    # DDP has summed the gradients, so every rank sees the same overflow; losses are each rank's
    # own. One all-reduce carries both the loss and the failure: ranks decide alike, and the sums
    # that a checkpoint holds are the same on every rank.
    overflow = ~torch.isfinite(grad_norm)
    failed = ~torch.isfinite(loss)
    if not state.scaler.is_enabled():
        failed |= overflow
    loss, failed = sum_over_ranks(torch.stack([loss, failed]), recipe.world) / recipe.world.size
    state.sums.note_failure(failed > 0, state.step, max_skips=recipe.max_skips)
    skip = overflow | (failed > 0) | state.sums.frozen

    # The optimizer looks at `skip` on the device: the host never reads it. (What GradScaler.step
    # would set knows neither the loss nor the other ranks nor a frozen run.)
    with recipe.optimizer_timer.span():
        step_unless(state.optimizer, skip)
    state.scaler.update()  # after `unscale_`, which noted for it whether gradients overflowed
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(torch.where(skip, before, buffer))
    if state.average:
        state.average.update(frozen=skip)  # of the new weights, so after the step
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
    forward: nn.Module, state: TrainState, batch: Batch, micro: int, recipe: StepRecipe
) -> torch.Tensor:
    key = (recipe.seed, state.step, micro, recipe.world.rank)
    images, targets = augment_on_device(batch, key=key, recipe=recipe)
    torch.manual_seed(derive_key("dropout", *key))
    with recipe.autocast():
        return recipe.loss(forward(images), targets)


def step_loss(
    state: TrainState, batches: list[Batch], recipe: StepRecipe, *, compiled: bool
) -> torch.Tensor:
    """What `train_step` would return, with the compiler or without it; changes nothing."""
    forward = recipe.forward if compiled else state.model
    state.enter_train_mode()
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    losses = []
    for micro, batch in enumerate(batches):
        with torch.set_grad_enabled(compiled):
            loss = _loss(forward, state, batch, micro, recipe)
        if compiled:  # the graph of a step has both passes
            loss.backward()
        losses.append(loss.detach())
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    return sum_over_ranks(torch.stack(losses).mean(), recipe.world) / recipe.world.size


def rehearse(
    state: TrainState,
    batch: Batch,
    *,
    sizes: Iterable[int],
    evaluated: int | None,
    recipe: StepRecipe,
) -> None:
    """Train on a blank batch of each image size, as `batch` but for that, and change nothing.

    The model is compiled for all of them here, and activations that do not fit into memory end the
    run here, not in the middle of it (the optimizer's moments come with the first step). An
    evaluation of the size `evaluated` is rehearsed, too, if it is given.
    """
    state.enter_train_mode()
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    for size in sizes:
        blank = _blank(batch.images, size)
        _loss(recipe.forward, state, batch._replace(images=blank), 0, recipe).backward()
        state.optimizer.zero_grad(set_to_none=True)
    if evaluated is not None:
        state.model.eval()
        with torch.no_grad(), recipe.autocast():
            recipe.forward(recipe.normalizer(_blank(batch.images, evaluated)))
    for buffer, before in buffers:
        buffer.copy_(before)


def _blank(images: torch.Tensor, size: int) -> torch.Tensor:
    shape = (*images.shape[:2], size, size)
    blank = torch.zeros(shape, dtype=torch.uint8, device=images.device)
    return blank.contiguous(memory_format=torch.channels_last)


def augment_on_device(
    batch: Batch, *, key: tuple[int, ...], recipe: StepRecipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized, mixed images float32 (B, 3, S, S) and soft targets float32 (B, num_classes)."""
    draw = recipe.mixer.draw(batch.images.shape[-1], *key)
    images = recipe.normalizer(batch.images)
    if batch.erasures is not None:
        images = erase(images, batch.erasures)  # before mixing, as in timm
    return recipe.mixer(images, batch.labels, draw)
