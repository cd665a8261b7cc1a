"""Training from the first line that is printed to the last."""

import contextlib
import gc
import shlex
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import click
import torch

from wds_convnext import progress
from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError, TrainingError
from wds_convnext.options import warn
from wds_convnext.shards.expand import find_counterpart, split_specs
from wds_convnext.training.checkpoint import Facts, load_checkpoint, load_weights
from wds_convnext.training.claim import claim
from wds_convnext.training.distributed import (
    Machine,
    choose_amp,
    gather_lists,
    is_lost_peer,
    is_out_of_memory,
    join_world,
    leave_world,
)
from wds_convnext.training.evaluate import Evaluation, open_evaluation
from wds_convnext.training.feed import loading
from wds_convnext.training.log import RunLog
from wds_convnext.training.loop import fit
from wds_convnext.training.memory import batch_advice, memory_needs
from wds_convnext.training.pretrained import with_pretrained
from wds_convnext.training.remote import Pace, follow_run, node_cache
from wds_convnext.training.run import Run, open_run
from wds_convnext.training.rundir import RunDir
from wds_convnext.training.runs import RUNS
from wds_convnext.training.schedule import lr_warning
from wds_convnext.training.stopping import STOPPED_EXIT_CODE, Stopped, StopRequest, StopVote

_UNVALIDATED = (
    "No validation shards were found, so no accuracy is known, and no best.pt is chosen. "
    "Name some with --val-shards."
)


def train(config: TrainConfig | None = None, **options: Any) -> int:
    """Train as configured; gives the exit code: 0, or 75 if a signal stopped the run.

    Args:
        config: what to train on what, how.
        options: fields of `TrainConfig` by name: `shards="data/train.json", epochs=10`.
    Raises:
        UsageError: if options do not fit each other, the machine or the run that is resumed.
        WdsConvnextError: if data, checkpoint or training fail; the message says what to do.
    """
    config = TrainConfig.of(config, options)
    shards = config.require_shards()
    world, device = join_world(config.device)
    try:
        config = with_pretrained(config)
        machine = Machine.for_training(world, device, config)
        with (
            claim(config, world, warn=warn) as rundir,
            node_cache(config, split_specs(shards, config.val_shards), world),
        ):
            return _train(config, machine, rundir)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            reason = str(error).split(". ")[0]
            raise TrainingError(f"Out of memory ({reason}). {_advice(config, device)}") from None
        if world.size == 1 or not is_lost_peer(error):
            raise
        raise TrainingError(
            f"rank {world.rank}: another process of the run is gone "
            f"({str(error).splitlines()[0]}). Nothing was saved from this step; continue with "
            "--resume, or let torchrun --max-restarts do so."
        ) from None
    finally:
        gc.unfreeze()  # `fit` froze; frozen objects would also outlive their modules at exit
        leave_world(world)


def _advice(config: TrainConfig, device: torch.device) -> str:
    """What to do where memory did not suffice; on a GPU, which batch would fit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        with contextlib.suppress(Exception):  # a model's code that knows no tensors without data
            needs = memory_needs(config, amp=choose_amp(config.amp, device))
            return batch_advice(config, needs, total=total)
    return "Use a smaller --batch-size, with --accumulate for the same global batch."


def _train(config: TrainConfig, machine: Machine, rundir: RunDir) -> int:
    say, show = (progress.say, click.echo) if machine.world.is_main else (_drop, _drop)
    checkpoint, stated_batch = rundir.load(), rundir.stated_batch()
    run, notes = open_run(
        config, machine, checkpoint=checkpoint, stated_batch=stated_batch, warn=warn
    )
    cache_notes, pace, last_pace = follow_run(run, is_fresh=not rundir.resumed)
    notes += cache_notes + rundir.prepare(run)
    if rundir.resumed:
        step = run.state.step
        notes += [f"Resumed at step {step}. Read {rundir.resumed}; goes on in {rundir.path}."]
        if step >= run.schedule.last_step:
            notes += ["All steps of the run are done; more --epochs or --max-steps train on."]
    if run.validation is None:
        notes += [_UNVALIDATED]
    for line in (run.introduction(), f"The run's folder is {rundir.path}.", *notes):
        say(line)
    if warning := lr_warning(config, run.order.global_batch_size):
        warn(warning)

    with StopRequest(quiet=not machine.world.is_main) as request:
        vote = StopVote(request, machine.world)
        with (
            rundir.status(run) as status,
            loading(run.stream(), config.workers, machine, vote=vote, pace=pace) as batches,
            closing(
                RunLog(rundir.path, start_step=run.state.step, quiet=not machine.world.is_main)
            ) as log,
        ):
            log.introduce(run)
            has_finished = fit(run, batches, log=log, rundir=rundir)
            status.reason = "finished" if has_finished else request.reason
        try:
            if has_finished and run.validation:
                _evaluate_best(run, run.validation, rundir, vote=vote, pace=last_pace, say=say)
        except Stopped:
            has_finished = False
    if not has_finished:
        say(
            f"Stopped by {request.reason} after step {run.state.step}; "
            f"saved {rundir.path / 'last.pt'}."
        )
        show(f"Continue with: wds-convnext train --resume {shlex.quote(str(rundir.path))}")
        return STOPPED_EXIT_CODE
    if run.validation is None:
        say(_UNVALIDATED)
    for line in _next_commands(run, rundir):
        show(line)
    return 0


def _drop(text: str) -> None:
    """What the other ranks do with what rank 0 prints."""


def _next_commands(run: Run, rundir: RunDir) -> list[str]:
    """Where a finished run is, and what to type next."""
    path = shlex.quote(str(rundir.path))
    evaluate = f"wds-convnext eval --checkpoint {path}"
    if test := find_counterpart(run.train_data.shards[0].path, use="test"):
        evaluate += f" --shards {shlex.quote(test)}"
    commands = [evaluate] if test or run.validation else []
    # TensorBoard names a run by its folder within the one that it is given.
    curves = rundir.path.parent if rundir.path.parent.name == RUNS.name else rundir.path
    commands.append(f"tensorboard --logdir {shlex.quote(str(curves))}")
    return [f"{'' if i else 'next:':5} {command}" for i, command in enumerate(commands)]


def _evaluate_best(
    run: Run,
    validation: Evaluation,
    rundir: RunDir,
    *,
    vote: StopVote,
    pace: Pace | None,
    say: Callable[[str], None],
) -> None:
    """Evaluate the best of the run's weights as they were chosen, and say how good they are."""
    facts = _load_best(run, rundir.path / "best.pt", say=say)
    chosen = "chosen on this split, so report a test split" if facts else "the last weights"
    evaluation = open_evaluation(
        validation.stream.dataset,
        batch_size=run.config.batch_size,
        preprocessing=(facts or run.facts).preprocessing,  # of a resumed run, not its last
        machine=run.machine,
        max_bad_samples=validation.max_bad_samples,
        flag=validation.flag,
        decoder=run.config.decoder,
    )
    average = None if facts else run.state.average
    with (
        average.applied() if average else nullcontext(),
        loading(
            evaluation.stream, run.config.workers, run.machine, vote=vote, pace=pace
        ) as batches,
    ):
        result = evaluation.run(run.recipe.forward, batches)
    low, high = result.top1_interval
    say(
        f"Final Model Accuracy: {result.top1:.2%} (validation split, n = {result.num_samples:,}, "
        f"95 % interval {low:.2%} to {high:.2%}; {chosen})"
    )


def _load_best(run: Run, path: Path, *, say: Callable) -> Facts | None:
    """Load the weights of best.pt, on all ranks alike; None if it is missing or damaged."""
    best, reasons = {}, []
    try:
        best = load_checkpoint(path)
    except CheckpointError as error:
        reasons = [str(error)]
    if reasons := gather_lists(reasons, run.machine.world):
        say(f"{reasons[0]} The last weights are evaluated instead.")
        return None
    load_weights(run.state.model, best)
    return Facts.from_dict(best["facts"])
