"""One training step: what it changes, what else it needs, and the step itself."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError
from wds_convnext.rng import derive_key
from wds_convnext.stream.stream import Batch
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.adamp import AdamP, parameter_groups
from wds_convnext.training.augment import Mixer, Normalizer
from wds_convnext.training.distributed import Machine, World, gather_lists, sum_over_ranks
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.model import check_image_size, compile_model, create_model, init_from
from wds_convnext.training.monitor import DeviceTimer


@dataclass(frozen=True)
class Interval:
    """What the host reads of the steps since it last read."""

    loss: float  # mean over the steps that were not skipped; NaN if all were
    grad_norm: float  # likewise
    epoch_loss: float  # mean over the epoch's steps so far
    num_steps: int  # skipped ones included
    num_skipped: int
    last_failed: int  # the last step that was not finite, -1 if there was none in the run
    failed_step: int  # the step that froze the run, -1 if it is not frozen


class StepSums:
    """Sums over steps, on the device, so that a step never waits for the host to read them."""

    def __init__(self, device: torch.device):
        self.interval = torch.zeros(3, device=device)  # loss, gradient norm, steps not skipped
        self.epoch = torch.zeros(2, device=device)  # loss, steps not skipped
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # of the interval
        self.failed_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.last_failed = torch.full((), -1, dtype=torch.int64, device=device)
        self.failed_step = torch.full((), -1, dtype=torch.int64, device=device)

    @property
    def frozen(self) -> torch.Tensor:
        """0-d bool: whether too many steps failed, so that nothing may change any more."""
        return self.failed_step >= 0

    def note_failure(self, failed: torch.Tensor, step: int, *, max_skips: int) -> None:
        """Count a step where `failed` (0-d bool); freeze at the first one over `max_skips`."""
        self.failed_in_a_row = torch.where(failed, self.failed_in_a_row + 1, 0)
        self.last_failed = torch.where(failed, step, self.last_failed)
        first_over = (self.failed_in_a_row > max_skips) & ~self.frozen
        self.failed_step = torch.where(first_over, step, self.failed_step)

    def add(self, *, loss: torch.Tensor, grad_norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Add a step's numbers; of one that is skipped (0-d bool) nothing but the count."""
        one = torch.ones_like(loss)
        self.interval += torch.where(skipped, 0, torch.stack([loss, grad_norm, one]))
        self.epoch += torch.where(skipped, 0, torch.stack([loss, one]))
        self.num_skipped += skipped

    def read(self) -> Interval:
        """The interval's means and counts. The host waits for the device here, and only here."""
        sums = torch.cat([self.interval, self.epoch]).tolist()
        loss, grad_norm, num_added, epoch_loss, epoch_steps = sums
        counts = torch.stack([self.num_skipped, self.last_failed, self.failed_step]).tolist()
        return Interval(
            loss=loss / num_added if num_added else math.nan,
            grad_norm=grad_norm / num_added if num_added else math.nan,
            epoch_loss=epoch_loss / epoch_steps if epoch_steps else math.nan,
            num_steps=int(num_added) + counts[0],
            num_skipped=counts[0],
            last_failed=counts[1],
            failed_step=counts[2],
        )

    def start_interval(self) -> None:
        self.interval.zero_()
        self.num_skipped.zero_()

    def start_epoch(self) -> None:
        self.epoch.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in vars(self).keys() & state.keys():
            getattr(self, name).copy_(state[name])


@dataclass
class BadSamples:
    """The account of samples that did not decode: noted by each rank, counted over all of them."""

    count: int = 0  # in the epoch under way, over all ranks, as of the last `collect`
    _noted: list[dict] = field(default_factory=list)

    def note(self, batches: list[Batch], *, step: int) -> None:
        """Note those of this rank's batches of a step."""
        self._noted += [{"step": step, **bad} for batch in batches for bad in batch.bad_samples]

    def collect(self, world: World) -> list[dict]:
        """Count and give what all ranks noted since the last time; the same on every rank."""
        samples, self._noted = gather_lists(self._noted, world), []
        self.count += len(samples)
        return samples


@dataclass
class TrainState:
    """Everything a run changes, and so everything a checkpoint has to hold."""

    model: nn.Module  # as timm made it: neither compiled nor wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    sums: StepSums
    bad_samples: BadSamples = field(default_factory=BadSamples)
    step: int = 0  # steps done
    best_top1: float = -1.0
    epoch_seconds: float = 0.0  # spent in the epoch under way

    def start_epoch(self) -> None:
        self.sums.start_epoch()
        self.epoch_seconds, self.bad_samples.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state_dict(),
            "step": self.step,
            "best_top1": self.best_top1,
            "epoch_seconds": self.epoch_seconds,
            "num_bad_samples": self.bad_samples.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's values. All of them are copied, none is referred to.

        Keys that are not known are ignored; what the report alone depends on may be missing.

        Raises:
            CheckpointError: if something is missing without which training cannot go on.
        """
        needed = {"model", "optimizer", "step"} | ({"ema"} if self.average else set())
        if missing := sorted(name for name in needed if state.get(name) is None):
            raise CheckpointError(f"The checkpoint holds no {', '.join(missing)}.")
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        _own_tensors(self.optimizer)
        keep_lr_on_device(self.optimizer, self.sums.epoch.device)
        if state.get("scaler"):  # empty where the checkpoint was not trained in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.sums.load_state_dict(state.get("sums", {}))
        self.step = state["step"]
        self.best_top1 = state.get("best_top1", self.best_top1)
        self.epoch_seconds = state.get("epoch_seconds", self.epoch_seconds)
        self.bad_samples = BadSamples(state.get("num_bad_samples", 0))


def _own_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Copy the tensors that `load_state_dict` took over as they were: those on the CPU.

    They would be views of the checkpoint's file, and keep it and its pages from being freed.
    """
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                values[name] = value.clone()


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


def build_state(
    config: TrainConfig, *, num_classes: int, machine: Machine
) -> tuple[TrainState, list[str]]:
    """A fresh state on the device, and sentences about what it started from."""
    torch.manual_seed(config.seed)
    model = create_model(
        config.model, num_classes=num_classes, drop_path_rate=config.drop_path_rate
    )
    check_image_size(model, config.image_size)
    notes = [init_from(model, config.init_from)] if config.init_from else []
    model = model.to(machine.device, memory_format=torch.channels_last)
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    optimizer = AdamP(groups, lr=config.lr)
    keep_lr_on_device(optimizer, machine.device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.amp == "fp16"),
        average=WeightAverage(model, decay=config.ema_decay) if config.ema_decay else None,
        sums=StepSums(machine.device),
    )
    return state, notes


def build_recipe(
    config: TrainConfig,
    state: TrainState,
    *,
    num_classes: int,
    machine: Machine,
    preprocessing: Preprocessing,
) -> StepRecipe:
    """What a step does, with the model wrapped for many processes and compiled as configured."""
    forward, no_sync = state.model, nullcontext
    if machine.world.size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
        no_sync = forward.no_sync
    return StepRecipe(
        forward=compile_model(forward) if machine.compiled else forward,
        compiled=machine.compiled,
        normalizer=Normalizer(preprocessing.mean, preprocessing.std, machine.device),
        mixer=Mixer(
            num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.switch_prob,
            label_smoothing=config.label_smoothing,
        ),
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
    _enter_train_mode(state.model)
    for group in state.optimizer.param_groups:
        group["lr"].fill_(lr)  # in place: a new number would recompile a compiled optimizer

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

    # Set before the step, which looks at it on the device: the host never reads `skip`. (What
    # GradScaler.step would set knows neither the loss nor the other ranks nor a frozen run.)
    state.optimizer.found_inf = skip.float()
    with recipe.optimizer_timer.span():
        state.optimizer.step()
    state.scaler.update()  # after `unscale_`, which noted for it whether gradients overflowed
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(torch.where(skip, before, buffer))
    if state.average:
        state.average.update(frozen=skip)  # of the new weights, so after the step
    state.sums.add(loss=loss, grad_norm=grad_norm.detach(), skipped=skip)
    state.step += 1
    return loss


def _enter_train_mode(model: nn.Module) -> None:
    """Put a model into training mode if it is not: setting all modules costs the host 1.6 ms.

    Evaluation sets the whole model, so its outermost module tells for all.
    """
    if not model.training:
        model.train()


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
    _enter_train_mode(state.model)
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    losses = [
        _loss(state.model, state, batch, micro, recipe) for micro, batch in enumerate(batches)
    ]
    for buffer, before in buffers:
        buffer.copy_(before)
    return sum_over_ranks(torch.stack(losses).mean(), recipe.world) / recipe.world.size


def augment_on_device(batch: Batch, *, key: tuple[int, ...], recipe: StepRecipe):
    """Normalized, mixed images float32 (B, 3, S, S) and soft targets float32 (B, num_classes)."""
    draw = recipe.mixer.draw(batch.images.shape[-1], *key)
    return recipe.mixer(recipe.normalizer(batch.images), batch.labels, draw)


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -sum(targets * log softmax(logits)); float32, whatever the logits' precision."""
    return F.cross_entropy(logits.float(), targets)
