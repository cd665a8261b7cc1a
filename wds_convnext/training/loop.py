"""The loop around the step: it decides when to log, validate, save and stop."""

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from wds_convnext.config import TrainConfig
from wds_convnext.errors import TrainingError
from wds_convnext.stream.loader import STOP_SIGNALS
from wds_convnext.stream.order import SampleRefs, TrainOrder, ValidationSchedule
from wds_convnext.stream.stream import Batch
from wds_convnext.training.adamp import lr_at, scaled_lr
from wds_convnext.training.distributed import StopVote, gather_lists
from wds_convnext.training.evaluate import EvalResult
from wds_convnext.training.log import Interval, RunLog, Stopwatch
from wds_convnext.training.monitor import Gauges
from wds_convnext.training.step import (
    StepRecipe,
    TrainState,
    augment_on_device,
    eager_loss,
    train_step,
)

_NUM_NAMED = 8  # samples of a failed step that a message names
# Relative, of a mean over a batch: half precision rounds elsewhere when operations are fused.
_COMPILED_TOLERANCE = 1e-2


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
        for again in STOP_SIGNALS:
            signal.signal(again, signal.SIG_DFL)


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
    name_samples: Callable[[SampleRefs], list[str]],
    gauges: Gauges,
) -> str:
    """Train until the last step or a stop signal.

    Args:
        batches: this rank's, endless, from the state's step on.
        validate: evaluates the model on the validation split; called where
            `validation_schedule` says.
        save: writes a checkpoint of a name (`last`, `best`).
        name_samples: shard and key of samples, for messages.
    Returns:
        "finished", or the name of the signal that stopped the run.
    Raises:
        TrainingError: if a loss or gradient is not finite, or too many samples do not decode.
    """
    schedule = validation_schedule(config, order)
    last_step = schedule.last_step
    first_step, rate = state.step, lr_schedule(config, order)
    vote, watch, bad_samples = StopVote(recipe.world), Stopwatch(), []
    with StopRequest() as request:
        while state.step < last_step:
            epoch = order.epoch_of(state.step)
            step_batches = [watch.wait_for(batches) for _ in range(config.accumulate)]
            here = [bad for batch in step_batches for bad in batch.bad_samples]
            bad_samples += [{"step": state.step + 1, **bad} for bad in here]
            do_step = train_step if state.step > first_step else partial(_first_step, log=log)
            do_step(state, step_batches, lr=rate(state.step), recipe=recipe)
            log.steps(state.step, order.steps_of(epoch), epoch=epoch)
            ends_epoch = order.epoch_of(state.step) > epoch
            is_last = state.step == last_step
            if state.step % config.log_every == 0 or ends_epoch or is_last:
                interval = _finite_interval(state, order, name_samples)
                _log_interval(interval, state, watch, rate(state.step - 1), order, gauges, log)
                _warn_of_skips(interval, state, order, name_samples, log)
                bad_samples = _account_for(bad_samples, state, config, order, recipe, log)
            if ends_epoch:
                _end_epoch(state, epoch, log)
            if validate and schedule.is_due(state.step):
                _validate(state, validate, save, log)
                watch.lap()
            stopping = vote.should_stop(request.signal_name is not None)
            if stopping or is_last or state.step % config.save_every == 0:
                _finite_interval(state, order, name_samples)
                bad_samples = _account_for(bad_samples, state, config, order, recipe, log)
                log.flush()
                save("last")
            if stopping and not is_last:
                return request.signal_name or "a signal to another process"
    return "finished"


def validation_schedule(config: TrainConfig, order: TrainOrder) -> ValidationSchedule:
    """After which steps of a run the model is validated, and which is its last."""
    num_steps = order.num_steps(config.epochs)
    return ValidationSchedule(
        order, every=config.val_every, last_step=min(num_steps, config.max_steps or num_steps)
    )


def lr_schedule(config: TrainConfig, order: TrainOrder) -> Callable[[int], float]:
    """The learning rate of a step of a run."""
    return partial(
        lr_at,
        lr=scaled_lr(
            config.lr,
            rule=config.scale_lr,
            global_batch_size=order.global_batch_size,
            reference_batch_size=config.reference_batch_size,
        ),
        total_steps=order.num_steps(config.epochs),
        warmup_steps=round(config.warmup_epochs * order.num_samples / order.global_batch_size),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
    )


def _first_step(
    state: TrainState, batches: list[Batch], *, lr: float, recipe: StepRecipe, log: RunLog
) -> None:
    """Train the first step of a process, and look at what only the first step can show."""
    if state.step == 0:
        _show_images(batches[0], recipe, log)
    eager = eager_loss(state, batches, recipe) if recipe.compiled else None
    loss = train_step(state, batches, lr=lr, recipe=recipe)
    if eager is not None:
        _compare_with_eager(loss.item(), eager.item(), log)
    # Everything that stays is here now. A full collection takes 150 ms of 400,000 objects (n = 5,
    # one CPU); frozen, none that is visible, so collecting need not be switched off.
    gc.collect()
    gc.freeze()


def _compare_with_eager(loss: float, eager: float, log: RunLog) -> None:
    if not abs(loss - eager) <= _COMPILED_TOLERANCE * abs(eager):
        log.say(
            f"Warning: the compiled model's first loss is {loss:.6g}, the uncompiled model's "
            f"{eager:.6g}. Do not trust this run: use --no-compile, or another torch version."
        )


def _show_images(batch: Batch, recipe: StepRecipe, log: RunLog) -> None:
    images, _ = augment_on_device(batch, key=(recipe.seed, 0, 0, recipe.world.rank), recipe=recipe)
    log.images(0, recipe.normalizer.undo(images))


def _finite_interval(state: TrainState, order: TrainOrder, name_samples: Callable) -> Interval:
    """Read the sums of the steps since the last log line, and stop the run if it is frozen."""
    interval = state.sums.read()
    if interval.failed_step >= 0:
        raise TrainingError(
            f"The loss or gradient of step {interval.failed_step} is not finite. Weights are those "
            "before it; no checkpoint was written since. Lower --lr, pass over such steps with "
            "--on-nonfinite skip, or look at the step's samples: "
            + _samples_of(interval.failed_step, order, name_samples)
        )
    return interval


def _warn_of_skips(
    interval: Interval, state: TrainState, order: TrainOrder, name_samples: Callable, log: RunLog
) -> None:
    if interval.last_failed >= state.step - interval.num_steps:
        log.say(
            f"{interval.num_skipped} of the last {interval.num_steps} steps were skipped; the loss "
            f"or gradient of step {interval.last_failed} is not finite. Its samples: "
            + _samples_of(interval.last_failed, order, name_samples)
        )


def _samples_of(step: int, order: TrainOrder, name_samples: Callable) -> str:
    refs = order.global_batch(step)
    named = "; ".join(name_samples(refs.take(slice(_NUM_NAMED))))
    rest = len(refs) - _NUM_NAMED
    return f"{named}; and {rest} more." if rest > 0 else f"{named}."


def _log_interval(
    interval: Interval,
    state: TrainState,
    watch: Stopwatch,
    lr: float,
    order: TrainOrder,
    gauges: Gauges,
    log: RunLog,
) -> None:
    """Log the means of the steps since the last time, and begin the next interval."""
    seconds, waited = watch.lap()
    state.epoch_seconds += seconds
    values = {
        "train/loss": interval.loss,
        "train/avg_loss": interval.epoch_loss,
        "train/lr": lr,
        "train/grad_norm": interval.grad_norm,
        "train/skipped_steps": interval.num_skipped,
        "train/images_per_s": interval.num_steps * order.global_batch_size / max(seconds, 1e-9),
        "train/data_wait": waited / max(seconds, 1e-9),
    }
    epoch = order.epoch_of(state.step - 1)
    log.interval(
        state.step,
        values,
        readings=gauges.read(values["train/images_per_s"]),
        epoch=epoch,
        num_steps=order.num_steps(epoch + 1),
    )
    state.sums.start_interval()


def _account_for(
    bad_samples: list[dict],
    state: TrainState,
    config: TrainConfig,
    order: TrainOrder,
    recipe: StepRecipe,
    log: RunLog,
) -> list[dict]:
    """Log the samples that were replaced, stop the run if they are too many; none are left over."""
    bad_samples = gather_lists(bad_samples, recipe.world)
    log.bad_samples(bad_samples)
    state.num_bad_samples += len(bad_samples)
    allowed = config.max_bad_samples * order.num_samples
    if state.num_bad_samples > allowed:
        last = bad_samples[-1]
        raise TrainingError(
            f"{state.num_bad_samples} samples of this epoch do not decode, more than "
            f"--max-bad-samples {config.max_bad_samples:g} of {order.num_samples} allows; the last "
            f"is {last['shard']}, key {last['key']}: {last['reason']} See bad_samples.jsonl."
        )
    return []


def _end_epoch(state: TrainState, epoch: int, log: RunLog) -> None:
    loss = state.sums.read().epoch_loss
    log.epoch(state.step, epoch=epoch, loss=loss, seconds=state.epoch_seconds)
    state.sums.start_epoch()
    state.epoch_seconds, state.num_bad_samples = 0.0, 0


def _validate(state: TrainState, validate: Callable, save: Callable, log: RunLog) -> None:
    """Validate, and keep the weights if they are the best so far."""
    with state.average.applied() if state.average else nullcontext():
        result = validate()
    is_best = result.top1 > state.best_top1
    if is_best:
        state.best_top1 = result.top1
        save("best")
    log.validation(state.step, result=result, best_top1=state.best_top1)
