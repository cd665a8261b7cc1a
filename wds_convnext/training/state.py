"""What a run changes: weights, optimizer, average, sums; all that a checkpoint has to hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError
from wds_convnext.stream.stream import Batch
from wds_convnext.training.distributed import Machine, World, gather_lists
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.finetune import freeze
from wds_convnext.training.head import check_frozen_head
from wds_convnext.training.model import (
    check_batch_of_one,
    check_image_sizes,
    init_from,
    model_for,
    small_image_note,
)
from wds_convnext.training.optimizer import build_optimizer, keep_lr_on_device
from wds_convnext.training.pretrained import load_pretrained


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
    frozen_norms: tuple[nn.Module, ...] = ()  # of the model, that stay in evaluation mode
    bad_samples: BadSamples = field(default_factory=BadSamples)
    step: int = 0  # steps done
    best_top1: float = -1.0
    num_stale: int = 0  # validations in a row without a better accuracy
    epoch_seconds: float = 0.0  # spent in the epoch under way
    owes_validation: bool = False  # one is due after the steps done, and has not ended

    def enter_train_mode(self) -> None:
        """Put the model into training mode if it is not: setting all modules costs 1.6 ms.

        Evaluation sets the whole model, so its outermost module stands for all.
        """
        if not self.model.training:
            self.model.train()
            for norm in self.frozen_norms:
                norm.eval()

    def start_epoch(self) -> None:
        self.sums.start_epoch()
        self.epoch_seconds, self.bad_samples.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        weights = self.model.state_dict()
        average = self.average.state_dict() if self.average else None
        return {
            "model": weights,
            "ema": average,
            "ema_updates": self.average and self.average.num_updates,
            # What was validated, whole, under the name that timm prefers to "model". The tensors
            # are those above, and stand in the file once.
            "state_dict_ema": average and weights | average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state_dict(),
            "step": self.step,
            "best_top1": self.best_top1,
            "num_stale": self.num_stale,
            "epoch_seconds": self.epoch_seconds,
            "num_bad_samples": self.bad_samples.count,
            "owes_validation": self.owes_validation,
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
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"its step is {state['step']!r}")
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
            self.average.num_updates = state.get("ema_updates")
        # Moments are the checkpoint's; weight decay and the like are the config's, which may be
        # another. The learning rate is the last step's, and each step sets its own.
        groups = [
            own | {"params": stored["params"], "lr": stored["lr"]}
            for own, stored in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"])
        ]
        has_lr_on_device = isinstance(self.optimizer.param_groups[0]["lr"], torch.Tensor)
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        _own_tensors(self.optimizer)
        if has_lr_on_device:
            keep_lr_on_device(self.optimizer, self.sums.epoch.device)
        if state.get("scaler"):  # empty where the checkpoint was not trained in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.sums.load_state_dict(state.get("sums", {}))
        self.step = state["step"]
        self.best_top1 = state.get("best_top1", self.best_top1)
        self.num_stale = state.get("num_stale", self.num_stale)
        self.epoch_seconds = state.get("epoch_seconds", self.epoch_seconds)
        self.bad_samples = BadSamples(state.get("num_bad_samples", 0))
        self.owes_validation = state.get("owes_validation", False)


def _own_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Copy the tensors that `load_state_dict` took over as they were: those on the CPU.

    They would be views of the checkpoint's file, and keep it and its pages from being freed.
    """
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                values[name] = value.clone()


def build_state(
    config: TrainConfig,
    *,
    num_classes: int,
    machine: Machine,
    class_names: tuple[str, ...] | None = None,
    is_resumed: bool = False,
) -> tuple[TrainState, list[str]]:
    """A fresh state on the device, and sentences about what it started from.

    Args:
        class_names: what a classifier in --init-from must have been trained for.
        is_resumed: a checkpoint's weights follow, so none are looked for in --init-from.
    """
    torch.manual_seed(config.seed)
    model = model_for(config, num_classes=num_classes)
    assert config.image_size is not None  # `with_pretrained` filled it in
    check_image_sizes(model, config)
    if config.batch_size == 1:
        check_batch_of_one(model, config.size_shares[0][1])
    notes = list(filter(None, [small_image_note(model, config.image_size)]))
    frozen_norms: tuple[nn.Module, ...] = ()
    if config.init_from and not is_resumed:
        notes.append(init_from(model, config.init_from, class_names=class_names))
    if config.pretrained and not is_resumed:
        notes.append(load_pretrained(model, config, class_names=class_names))
    if config.freeze is not None:
        frozen_norms, note = freeze(model, config.freeze)
        check_frozen_head(model, config.freeze)
        notes.append(note)
    model = machine.place(model).to(memory_format=torch.channels_last)
    average = None
    if config.ema_decay:
        average = WeightAverage(model, decay=config.ema_decay, num_updates=0)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model, config, average=average),
        scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.amp == "fp16"),
        average=average,
        sums=StepSums(machine.device),
        frozen_norms=frozen_norms,
    )
    return state, notes
