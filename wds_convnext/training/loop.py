"""The loop around the step: it decides when to log, validate, save and stop."""

import gc
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from wds_convnext.errors import DataError, ShardError, TrainingError, printable, sentence
from wds_convnext.progress import track
from wds_convnext.stream.stream import Batch
from wds_convnext.training.batchsheet import BatchSheet, captions
from wds_convnext.training.compiler import Compiled, compiled_so_far
from wds_convnext.training.evaluate import Evaluation
from wds_convnext.training.head import head_filled
from wds_convnext.training.log import RunLog, Stopwatch
from wds_convnext.training.monitor import tracing
from wds_convnext.training.remote import fetched
from wds_convnext.training.rundir import RunDir
from wds_convnext.training.state import Interval
from wds_convnext.training.step import augment_on_device, rehearse, step_loss, train_step
from wds_convnext.training.stopping import Stopped

if TYPE_CHECKING:
    from wds_convnext.training.run import Run

# Relative, of a mean over a batch: half precision rounds elsewhere when operations are fused.
_COMPILED_TOLERANCE = 1e-2
_NUM_SHOWN = 20  # pictures of the first step in TensorBoard


def fit(run: "Run", batches: Iterator[Batch], *, log: RunLog, rundir: RunDir) -> bool:
    """Train until the last step, or until the batches end because the run is to stop.

    Args:
        batches: this rank's, on the device, from the state's step on, agreed upon with the other
            ranks; after each step with which a validation is due stand those of the validation.
            One that the state owes comes first.
    Returns:
        Whether the last step was reached.
    Raises:
        WdsConvnextError: if a loss or gradient is not finite, too many samples do not decode, the
            data cannot be read, or a checkpoint not written. What can be saved is saved.
    """
    try:
        _train_and_validate(run, batches, log=log, rundir=rundir)
    except (Stopped, DataError, ShardError, TrainingError) as ending:
        # No step is under way, so the state is whole, unless it is frozen.
        _finite_interval(run)
        log.bad_samples(run.state.bad_samples.collect(run.machine.world))
        _save(run, log=log, rundir=rundir)
        rundir.wait()
        if not isinstance(ending, Stopped):
            raise
        return False
    rundir.wait()  # on all ranks, which read best.pt next
    return True


def _train_and_validate(
    run: "Run", batches: Iterator[Batch], *, log: RunLog, rundir: RunDir
) -> None:
    config, state, order, schedule = run.config, run.state, run.order, run.schedule
    world, first_step = run.machine.world, run.state.step
    watch = Stopwatch()
    trace = rundir.path / "trace.json" if config.profile and world.is_main else None
    if run.validation and state.owes_validation:
        is_best = _validate(run, run.validation, batches, log=log)
        _save(run, log=log, rundir=rundir, is_best=is_best)
    with tracing(trace) as end_traced_step:
        while state.step < schedule.last_step and not run.is_stale:
            # One optimizer step. It is queued on the device, and nothing of it is read.
            epoch = order.epoch_of(state.step)
            lr = run.lr(state.step)
            step_batches = [watch.wait_for(batches) for _ in range(config.accumulate)]
            state.bad_samples.note(step_batches, step=state.step + 1)
            if state.step == first_step:
                _first_step(run, step_batches, lr=lr, log=log)
            else:
                train_step(state, step_batches, lr=lr, recipe=run.recipe)
            end_traced_step()
            log.steps(state.step, order.steps_of(epoch), epoch=epoch)

            # What is due after it. All ranks come to the same answers: collectives depend on them.
            ends_epoch = order.epoch_of(state.step) > epoch
            is_last = state.step == schedule.last_step
            logs = state.step % config.log_every == 0 or ends_epoch or is_last
            saves = state.step % config.save_every == 0 or is_last
            state.owes_validation = run.validation is not None and schedule.is_due(state.step)
            if not (logs or saves):
                continue

            # Here the host waits for the device, and nowhere else in this loop. Weights that are
            # not known to be finite are neither validated nor saved, so this comes first.
            interval = _finite_interval(run)
            if logs:
                _log_interval(run, interval, lr=lr, watch=watch, log=log)
            too_many = _account_for_bad_samples(run, log)
            if ends_epoch:
                log.epoch(
                    state.step, epoch=epoch, loss=interval.epoch_loss, seconds=state.epoch_seconds
                )
                state.start_epoch()
            if too_many:
                raise too_many
            is_best = False
            if run.validation and state.owes_validation:
                is_best = _validate(run, run.validation, batches, log=log)
                watch.lap()  # images per second are those of training alone
            # After all the rest, so that a resumed run repeats and misses nothing of it.
            saves |= run.is_stale
            if saves or is_best:
                _save(run, log=log, rundir=rundir, by_step=saves, is_best=is_best)
    if run.is_stale:
        log.say(
            f"Stopped early, after step {state.step}: {state.num_stale} validations in a row were "
            f"not better than {state.best_top1:.2%} (--early-stop {config.early_stop})."
        )


def _first_step(run: "Run", batches: list[Batch], *, lr: float, log: RunLog) -> None:
    """Train the first step of a process, and look at what only the first step can show."""
    state, recipe = run.state, run.recipe
    if state.step == 0 and not log.quiet:
        _show_batch(run, batches[0], log=log)
    before = compiled_so_far() if recipe.compiled else None
    to_come = range(state.step, run.schedule.last_step)
    num_rehearsed = 0
    # CUDA graphs are recorded and replayed from the second call on: the step that is compared with
    # eager code must be one of those.
    if len(sizes := run.image_sizes.num_steps(to_come)) > 1 or recipe.cuda_graphs:
        shown = track(sizes, "Image sizes", unit="sizes", quiet=log.quiet)
        evaluated = run.image_sizes.sizes[-1] if run.validation else None
        rehearse(state, batches[0], sizes=shown, evaluated=evaluated, recipe=recipe)
        num_rehearsed = len(sizes) + (evaluated is not None)
    if before is None:
        train_step(state, batches, lr=lr, recipe=recipe)
    else:
        _first_compiled_step(run, batches, lr=lr, log=log)
        _warn_of_cuts(run, before, most=max(num_rehearsed, 1), log=log)
    # Everything that stays is here now. A full collection takes 150 ms of 400,000 objects (n = 5,
    # one CPU); frozen, none that is visible, so collecting need not be switched off.
    gc.collect()
    gc.freeze()


def _first_compiled_step(run: "Run", batches: list[Batch], *, lr: float, log: RunLog) -> None:
    """Train one step, and hold the compiler against what it should have done."""
    state, recipe = run.state, run.recipe
    with head_filled(state.model):
        compiled, uncompiled = (
            step_loss(state, batches, recipe, compiled=compiled).item()
            for compiled in (True, False)
        )
    train_step(state, batches, lr=lr, recipe=recipe)
    if not abs(compiled - uncompiled) <= _COMPILED_TOLERANCE * abs(uncompiled):
        log.say(
            f"Warning: the compiled model's first loss is {compiled:.6g}, the uncompiled "
            f"model's {uncompiled:.6g}. Do not trust this run: use --no-compile, or another "
            "torch version."
        )


def _warn_of_cuts(run: "Run", before: Compiled, *, most: int, log: RunLog) -> None:
    if reason := compiled_so_far().cut_since(before, most=most):
        if run.machine.world.size > 1:
            reason = "where, is unknown"  # the first cut is in DistributedDataParallel's own code
        log.say(
            "Warning: the compiler cut the model into several graphs, which is slower "
            f"({printable(' '.join(reason.split()))}). Use another torch version or --model, or "
            "look at TORCH_LOGS=graph_breaks."
        )


def _show_batch(run: "Run", batch: Batch, *, log: RunLog) -> None:
    """Log the main rank's first pictures of the first step, mixed, with what their labels are."""
    recipe = run.recipe
    key = (recipe.seed, 0, 0, recipe.world.rank)
    images, _ = augment_on_device(batch, key=key, recipe=recipe)
    mix = recipe.mixer.draw(batch.images.shape[-1], *key)
    names = [run.train_data.class_names[label] for label in batch.labels.tolist()]
    seen = recipe.normalizer.undo(images[:_NUM_SHOWN]) * 255
    sheet = BatchSheet(num_batches=1, batch_size=len(seen), image_size=seen.shape[-1])
    sheet.add(f"step 0: {mix}", seen.round().to(torch.uint8).cpu(), captions(names, mix))
    log.batch(0, sheet)


def _finite_interval(run: "Run") -> Interval:
    """What the host reads of the steps since it last read.

    Raises:
        TrainingError: if the run is frozen.
    """
    interval = run.state.sums.read()
    if interval.failed_step < 0:
        return interval
    raise TrainingError(
        f"The loss or gradient of step {interval.failed_step} is not finite. Weights are those "
        "before it; no checkpoint was written since. Lower --lr, pass over such steps with "
        "--on-nonfinite skip, or look at the step's samples: "
        + run.name_samples(interval.failed_step)
    )


def _log_interval(
    run: "Run", interval: Interval, *, lr: float, watch: Stopwatch, log: RunLog
) -> None:
    """Log the means of the steps since the last time, and begin the next interval."""
    state, order, sizes = run.state, run.order, run.image_sizes
    done = range(state.step - interval.num_steps, state.step)
    to_come = range(state.step, run.schedule.last_step)
    seconds, waited = watch.lap()
    state.epoch_seconds += seconds
    images_per_s = interval.num_steps * order.global_batch_size / max(seconds, 1e-9)
    values = {
        "train/loss": interval.loss,
        "train/avg_loss": interval.epoch_loss,
        "train/lr": lr,
        "train/grad_norm": interval.grad_norm,
        "train/skipped_steps": interval.num_skipped,
        "train/images_per_s": images_per_s,
        "train/data_wait": waited / max(seconds, 1e-9),
    }
    epoch = order.epoch_of(state.step - 1)
    log.interval(
        state.step,
        values,
        readings=run.gauges.read(images_per_s, sizes.num_steps(done)) | fetched(),
        epoch=epoch,
        num_steps=order.num_steps(epoch + 1),
        seconds_left=seconds * sizes.num_pixels(to_come) / sizes.num_pixels(done),
    )
    if interval.last_failed >= state.step - interval.num_steps:
        log.say(
            f"{interval.num_skipped} of the last {interval.num_steps} steps were skipped; the loss "
            f"or gradient of step {interval.last_failed} is not finite. Its samples: "
            + run.name_samples(interval.last_failed)
        )
    state.sums.start_interval()


def _account_for_bad_samples(run: "Run", log: RunLog) -> TrainingError | None:
    """Log the samples that were replaced; an error if they are too many."""
    account, config = run.state.bad_samples, run.config
    samples = account.collect(run.machine.world)
    log.bad_samples(samples)
    if samples and account.count > config.max_bad_samples * run.order.num_samples:
        last = samples[-1]
        return TrainingError(
            f"{account.count} samples of this epoch do not decode, more than "
            f"--max-bad-samples {config.max_bad_samples:g} of {run.order.num_samples} allows; the "
            f"last is {last['shard']}, key {last['key']}: {sentence(last['reason'])} "
            "See bad_samples.jsonl."
        )
    return None


def _validate(run: "Run", evaluation: Evaluation, batches: Iterator[Batch], *, log: RunLog) -> bool:
    """Validate; gives whether the weights are the best so far, which are to be saved."""
    state = run.state
    with state.average.applied() if state.average else nullcontext():
        result = evaluation.run(run.recipe.forward, batches)
    # Of weights that give NaN the first class always wins: no accuracy to choose them by.
    is_best = result.top1 > state.best_top1 and math.isfinite(result.loss)
    if is_best:
        state.best_top1 = result.top1
    state.num_stale = 0 if is_best else state.num_stale + 1
    state.owes_validation = False
    log.bad_samples([{"step": state.step, **bad} for bad in result.left_out])
    epoch = run.order.epoch_of(state.step - 1)
    log.validation(state.step, epoch=epoch, result=result, best_top1=state.best_top1)
    return is_best


def _save(
    run: "Run", *, log: RunLog, rundir: RunDir, by_step: bool = True, is_best: bool = False
) -> None:
    # The log goes to the disk first: a checkpoint must not be ahead of it.
    log.flush()
    rundir.save(run, by_step=by_step, is_best=is_best)
