"""One training step, and the loop around it that decides when to log, validate, save and stop."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from wds_convnext.config import TrainConfig
from wds_convnext.device import Mixer, Normalizer
from wds_convnext.distributed import StopVote, World, gather_lists, sum_over_ranks
from wds_convnext.errors import TrainingError
from wds_convnext.evaluate import EvalResult
from wds_convnext.metrics import RunLog, StepSums, Stopwatch
from wds_convnext.model import WeightAverage
from wds_convnext.optim import lr_at
from wds_convnext.order import TrainOrder
from wds_convnext.rng import derive_key
from wds_convnext.stream import STOP_SIGNALS, Batch


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
    best_step: int = 0
    epoch_seconds: float = 0.0  # spent in the epoch under way
    num_bad_samples: int = 0  # in the epoch under way

    def state_dict(self) -> dict:
        numbers = ("step", "best_top1", "best_step", "epoch_seconds", "num_bad_samples")
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.sums.state_dict(),
            **{name: getattr(self, name) for name in numbers},
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        keep_lr_on_device(self.optimizer, self.sums.epoch.device)
        self.scaler.load_state_dict(state["scaler"])
        self.sums.load_state_dict(state["sums"])
        for name in ("step", "best_top1", "best_step", "epoch_seconds", "num_bad_samples"):
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


def train_step(state: TrainState, batches: list[Batch], *, lr: float, recipe: StepRecipe) -> None:
    """One optimizer step on the batches of one step; adds to the sums, reads nothing back.

    A loss or gradient that is not finite sets a flag on the device, and from then on weights,
    optimizer and average stay as they are until the host reads the flag. Under fp16 a gradient
    that overflows only skips the step, and the scale is lowered.
    """
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"].fill_(lr)
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
    state.sums.note_failure(failed > 0, state.step)
    state.optimizer.found_inf = (overflow | state.sums.frozen).float()
    state.optimizer.step()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average:
        state.average.update(frozen=state.sums.frozen)
    state.sums.add(loss=loss, grad_norm=grad_norm.detach())
    state.step += 1


def _forward_backward(
    state: TrainState, batch: Batch, micro: int, num_micro: int, recipe: StepRecipe
) -> torch.Tensor:
    """The loss of one batch; its gradient, divided by the number of batches, is added up."""
    key = (recipe.seed, state.step, micro, recipe.world.rank)
    images, targets = augment_on_device(batch, key=key, recipe=recipe)
    torch.manual_seed(derive_key("dropout", *key))
    is_last = micro == num_micro - 1
    with nullcontext() if is_last else recipe.no_sync():
        with recipe.autocast():
            loss = soft_target_cross_entropy(recipe.forward(images), targets)
        state.scaler.scale(loss / num_micro).backward()
    return loss.detach()


def augment_on_device(batch: Batch, *, key: tuple[int, ...], recipe: StepRecipe):
    """Normalised, mixed images float32 (B, 3, S, S) and soft targets float32 (B, num_classes)."""
    draw = recipe.mixer.draw(batch.images.shape[-1], *key)
    return recipe.mixer(recipe.normalizer(batch.images), batch.labels, draw)


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -sum(targets * log softmax(logits)); float32, whatever the logits' precision."""
    return F.cross_entropy(logits.float(), targets)


class StopRequest:
    """Within this context the first stop signal is only noted; a second one acts at once."""

    def __init__(self):
        self.signal_name: str | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame) -> None:
        self.signal_name = signal.Signals(signum).name
        for again, handler in self._handlers.items():
            signal.signal(again, handler)


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    *,
    config: TrainConfig,
    order: TrainOrder,
    recipe: StepRecipe,
    log: RunLog,
    validate: Callable[[], EvalResult] | None,
    save: Callable[[str], None],
) -> str:
    """Train until the last step or a stop signal.

    Args:
        batches: this rank's, endless, from the state's step on.
        validate: evaluates the model on the validation split.
        save: writes a checkpoint of a name (`last`, `best`).
    Returns:
        "finished", or the name of the signal that stopped the run.
    Raises:
        TrainingError: if a loss or gradient is not finite, or too many samples do not decode.
    """
    num_steps = order.num_steps(config.epochs)
    last_step = min(num_steps, config.max_steps or num_steps)
    rate = partial(
        lr_at,
        lr=config.lr,
        total_steps=num_steps,
        warmup_steps=round(config.warmup_epochs * order.num_samples / order.global_batch_size),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
    )
    vote, watch, bad_samples = StopVote(recipe.world), Stopwatch(), []
    with StopRequest() as request:
        while state.step < last_step:
            epoch = order.epoch_of(state.step)
            step_batches = [watch.wait_for(batches) for _ in range(config.accumulate)]
            bad_samples += [bad for batch in step_batches for bad in batch.bad_samples]
            if state.step == 0:
                _show_images(step_batches[0], recipe, log)
            train_step(state, step_batches, lr=rate(state.step), recipe=recipe)
            log.steps(state.step, order.steps_of(epoch), epoch=epoch)
            ends_epoch = order.epoch_of(state.step) > epoch
            is_last = state.step == last_step
            if state.step % config.log_every == 0 or ends_epoch or is_last:
                _log_interval(state, watch, rate(state.step - 1), order, log)
                _account_for_bad_samples(bad_samples, state, config, order, recipe, log)
                bad_samples = []
            if ends_epoch:
                _end_epoch(state, epoch, log)
            if validate and (is_last or (ends_epoch and epoch % config.val_every == 0)):
                _validate(state, validate, save, log)
                watch.lap()
            stopping = vote.should_stop(request.signal_name is not None)
            if stopping or is_last or state.step % config.save_every == 0:
                log.flush()
                save("last")
            if stopping and not is_last:
                return request.signal_name or "a signal to another process"
    return "finished"


def _show_images(batch: Batch, recipe: StepRecipe, log: RunLog) -> None:
    images, _ = augment_on_device(batch, key=(recipe.seed, 0, 0, recipe.world.rank), recipe=recipe)
    log.images(0, recipe.normalizer.undo(images))


def _log_interval(
    state: TrainState,
    watch: Stopwatch,
    lr: float,
    order: TrainOrder,
    log: RunLog,
) -> None:
    """Read the sums of the steps since the last time, and log their means."""
    loss, grad_norm, num_steps, epoch_loss, epoch_steps, failed_step = state.sums.read()
    if failed_step >= 0:
        numbers = order.global_batch(failed_step).number[:8]
        raise TrainingError(
            f"The loss or gradient of step {failed_step} is not finite. Weights are those before "
            "it; no checkpoint was written since. Lower --lr, or look at the samples of that step: "
            f"numbers {', '.join(map(str, numbers))}, …"
        )
    seconds, waited = watch.lap()
    state.epoch_seconds += seconds
    values = {
        "train/loss": loss / num_steps,
        "train/avg_loss": epoch_loss / epoch_steps,
        "train/lr": lr,
        "train/grad_norm": grad_norm / num_steps,
        "train/images_per_s": num_steps * order.global_batch_size / max(seconds, 1e-9),
        "train/data_wait": waited / max(seconds, 1e-9),
    }
    epoch = order.epoch_of(state.step - 1)
    log.interval(state.step, values, epoch=epoch, num_steps=order.num_steps(epoch + 1))
    state.sums.interval.zero_()


def _account_for_bad_samples(
    bad_samples: list[dict],
    state: TrainState,
    config: TrainConfig,
    order: TrainOrder,
    recipe: StepRecipe,
    log: RunLog,
) -> None:
    """Log the samples that were replaced, and stop the run if they are too many."""
    bad_samples = gather_lists(bad_samples, recipe.world)
    log.bad_samples(state.step, bad_samples)
    state.num_bad_samples += len(bad_samples)
    allowed = config.max_bad_samples * order.num_samples
    if state.num_bad_samples > allowed:
        last = bad_samples[-1]
        raise TrainingError(
            f"{state.num_bad_samples} samples of this epoch do not decode, more than "
            f"--max-bad-samples {config.max_bad_samples:g} of {order.num_samples} allows; the last "
            f"is {last['shard']}, key {last['key']}: {last['reason']}. See bad_samples.jsonl."
        )


def _end_epoch(state: TrainState, epoch: int, log: RunLog) -> None:
    loss, num_steps = state.sums.epoch.tolist()
    log.epoch(state.step, epoch=epoch, loss=loss / num_steps, seconds=state.epoch_seconds)
    state.sums.epoch.zero_()
    state.epoch_seconds, state.num_bad_samples = 0.0, 0


def _validate(state: TrainState, validate: Callable, save: Callable, log: RunLog) -> None:
    """Validate, and keep the weights if they are the best so far."""
    with state.average.applied() if state.average else nullcontext():
        result = validate()
    is_best = result.top1 > state.best_top1
    if is_best:
        state.best_top1, state.best_step = result.top1, state.step
        save("best")
    log.validation(state.step, result=result, best_top1=state.best_top1)
