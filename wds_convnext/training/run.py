"""From a config to a run: opening shards, building the parts, resuming; and evaluating."""

import gc
import os
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
import numpy as np
import timm
import torch

import wds_convnext
from wds_convnext.config import EvalConfig, TrainConfig
from wds_convnext.errors import CheckpointError, ShardError, TrainingError, UsageError
from wds_convnext.progress import track
from wds_convnext.shards.dataset import Dataset, find_validation, open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import check_sha256
from wds_convnext.stream.loader import num_cores, num_workers
from wds_convnext.stream.order import TrainOrder, ValidationSchedule
from wds_convnext.stream.stream import ShardStream, ValidatedStream, make_loader
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.augment import prefetch_to_device
from wds_convnext.training.checkpoint import DataFacts, Facts, load_checkpoint
from wds_convnext.training.distributed import (
    STOPPED_EXIT_CODE,
    Machine,
    barrier,
    choose_amp,
    is_lost_peer,
    join_world,
    leave_world,
)
from wds_convnext.training.evaluate import EvalResult, Evaluation, open_evaluation
from wds_convnext.training.log import RunLog
from wds_convnext.training.loop import fit
from wds_convnext.training.model import create_model
from wds_convnext.training.monitor import Gauges, build_gauges
from wds_convnext.training.rundir import (
    RunDir,
    best_checkpoint,
    check_resumable,
    choose,
    fit_to_checkpoint,
)
from wds_convnext.training.schedule import lr_schedule, lr_warning, validation_schedule
from wds_convnext.training.step import StepRecipe, TrainState, build_recipe, build_state

_NUM_NAMED = 8  # samples of a failed step that a message names


@dataclass(frozen=True)
class Run:
    """A run: everything that is decided before its first step. Only `state` changes."""

    config: TrainConfig
    machine: Machine
    train_data: Dataset
    order: TrainOrder
    lr: Callable[[int], float]  # of a step
    schedule: ValidationSchedule  # and the last step
    validation: Evaluation | None
    state: TrainState
    recipe: StepRecipe
    gauges: Gauges
    facts: Facts

    @property
    def preprocessing(self) -> Preprocessing:
        return self.facts.preprocessing

    def stream(self) -> ShardStream | ValidatedStream:
        """This rank's batches from the state's step on, with validations in their place."""
        config, world = self.config, self.machine.world
        stream = ShardStream(
            self.train_data,
            self.order,
            batch_size=config.batch_size,
            transform=self.preprocessing.train_transform(
                color_jitter=config.color_jitter, scale=(config.min_crop, 1.0), hflip=config.hflip
            ),
            rank=world.rank,
            world_size=world.size,
            start=self.state.step * config.accumulate,
        )
        if self.validation is None:
            return stream
        return ValidatedStream(
            stream,
            self.validation.stream,
            accumulate=config.accumulate,
            is_due=self.schedule.is_due,
        )

    def name_samples(self, step: int) -> str:
        """Shard and key of the samples of a step, for messages."""
        refs = self.order.global_batch(step)
        named = refs.take(slice(_NUM_NAMED))
        with closing(SampleReader(self.train_data)) as reader:
            places = [reader.describe(number) for number in named.number.tolist()]
        names = "; ".join(f"{place['shard']}, key {place['key']}" for place in places)
        rest = len(refs) - _NUM_NAMED
        return f"{names}; and {rest} more." if rest > 0 else f"{names}."

    def introduction(self) -> str:
        """What is about to be trained, on what, where."""
        config, machine, order, data = self.config, self.machine, self.order, self.train_data
        num_parameters = sum(p.numel() for p in self.state.model.parameters())
        if self.validation is None:
            validation = "no validation shards found (name some with --val-shards)"
        else:
            validation = f"{len(self.validation.stream.dataset):,} for validation"
        amp = "float32" if machine.amp == "off" else machine.amp
        peak = f"{self.gauges.peak / 1e12:.0f} TFLOP/s" if self.gauges.peak else "not known"
        return (
            f"{config.model}, {num_parameters / 1e6:.1f} M parameters, on {data.name}: "
            f"{len(data):,} samples in {len(data.shards)} shards, {validation}, "
            f"{data.num_classes} classes\n"
            f"{config.epochs} epochs of {order.num_samples / order.global_batch_size:.1f} steps, "
            f"global batch {order.global_batch_size}, on {machine.world.size} x {machine.device}, "
            f"{amp}, {'compiled' if machine.compiled else 'not compiled'}\n"
            f"{self.gauges.flops_per_image / 1e9:.3g} GFLOP per training image; peak of the device "
            f"{peak}"
        )


def open_run(
    config: TrainConfig, machine: Machine, *, checkpoint: dict[str, Any] | None, warn: Callable
) -> tuple[Run, list[str]]:
    """A run from its first step, or from a checkpoint's, and sentences about how it begins.

    Raises:
        WdsConvnextError: if options, data, machine and checkpoint do not fit each other.
    """
    then = Facts.from_dict(checkpoint.get("facts", {})) if checkpoint else None
    if then:
        config = fit_to_checkpoint(config, then, machine.world)
    num_workers(config.workers, ranks=machine.world.size)  # refuses too many
    train_data, val_data, val_spec = _open_splits(config)
    order = TrainOrder(
        train_data.sizes,
        seed=config.seed,
        global_batch_size=config.batch_size * config.accumulate * machine.world.size,
        shuffle_buffer=config.shuffle_buffer,
    )
    facts = _facts(config, machine, order=order, train_data=train_data, val_spec=val_spec)
    state, notes = build_state(config, num_classes=train_data.num_classes, machine=machine)
    notes += [
        _without_checksums(x) for x in (train_data, val_data) if x and not x.index.has_checksums
    ]
    if then:
        check_resumable(then, facts, warn=warn)
        state.load_state_dict(checkpoint)
        notes.append(f"Resumed at step {state.step}.")
    # After loading: DDP hands the main rank's weights to the others when it is made.
    recipe = build_recipe(
        config,
        state,
        num_classes=train_data.num_classes,
        machine=machine,
        preprocessing=facts.preprocessing,
    )
    validation = None
    if val_data is not None:
        validation = open_evaluation(
            val_data,
            batch_size=config.batch_size,
            preprocessing=facts.preprocessing,
            machine=machine,
        )
    run = Run(
        config=config,
        machine=machine,
        train_data=train_data,
        order=order,
        lr=lr_schedule(config, order),
        schedule=validation_schedule(config, order),
        validation=validation,
        state=state,
        recipe=recipe,
        gauges=build_gauges(
            state.model,
            image_size=config.image_size,
            machine=machine,
            timer=recipe.optimizer_timer,
        ),
        facts=facts,
    )
    return run, notes


def _facts(
    config: TrainConfig,
    machine: Machine,
    *,
    order: TrainOrder,
    train_data: Dataset,
    val_spec: str | None,
) -> Facts:
    """What a run's checkpoints say about it."""
    return Facts(
        model=config.model,
        class_names=train_data.class_names,
        batch_size=config.batch_size,
        preprocessing=Preprocessing(config.image_size),
        data=DataFacts(
            shards=train_data.digest,
            seed=order.seed,
            global_batch_size=order.global_batch_size,
            shuffle_buffer=order.shuffle_buffer,
            num_lanes=order.num_lanes,
        ),
        dataset=train_data.name,
        val_shards=val_spec and os.path.abspath(val_spec),
        environment={
            "wds_convnext": wds_convnext.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "numpy": np.__version__,
            "device": machine.device.type,
            "amp": machine.amp,
            "compiled": machine.compiled,
            "num_threads": torch.get_num_threads(),
            "world_size": machine.world.size,
        },
        config=asdict(config),
    )


def _open_splits(config: TrainConfig) -> tuple[Dataset, Dataset | None, str | None]:
    """The training split, the validation split if there is one, and what names the latter."""
    train_data = open_dataset(config.shards, jobs=num_cores(), quiet=False)
    spec = config.val_shards or find_validation(train_data)
    val_data = open_dataset(spec, jobs=num_cores(), quiet=False) if spec else None
    if val_data is not None and val_data.class_names != train_data.class_names:
        raise ShardError(
            f"{spec}: its {val_data.num_classes} class names differ from the "
            f"{train_data.num_classes} of {config.shards}. Use splits of one data set."
        )
    if config.check_shards:
        for dataset in filter(None, (train_data, val_data)):
            name = f"Checking {dataset.split}"
            for shard in track(dataset.shards, name, unit="shards"):
                check_sha256(shard)
    return train_data, val_data, spec


def _without_checksums(dataset: Dataset) -> str:
    folder = os.path.dirname(dataset.shards[0].path) or "."
    return (
        f"The {dataset.split} split has no checksums, so flipped bits in it go unseen; "
        f"add them once: wds-convnext index {folder}"
    )


@contextmanager
def _loading(stream: ShardStream | ValidatedStream, workers: int | None, machine: Machine):
    """A stream's batches on the device; the workers end with the context."""
    workers = num_workers(workers, ranks=machine.world.size)
    if isinstance(stream, ShardStream) and stream.stop is not None:
        workers = min(workers, stream.stop)
    batches = make_loader(stream, workers=workers, pin_memory=machine.device.type == "cuda")
    with closing(batches):
        yield prefetch_to_device(batches, machine.device)


def train(config: TrainConfig) -> int:
    """Train as configured; gives the exit code: 0, or 75 if a signal stopped the run."""
    world, device = join_world(config.device)
    try:
        compiled = device.type == "cuda" if config.compile is None else config.compile
        return _train(config, Machine(world, device, choose_amp(config.amp, device), compiled))
    except RuntimeError as error:
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


def _train(config: TrainConfig, machine: Machine) -> int:
    say = click.echo if machine.world.is_main else lambda text: None
    warn = partial(click.secho, err=True) if machine.world.is_main else lambda text: None
    rundir, checkpoint = choose(config, machine.world, warn=warn)
    is_resumed = checkpoint is not None
    run, notes = open_run(config, machine, checkpoint=checkpoint, warn=warn)
    del checkpoint  # nothing refers to its file from here on

    barrier(machine.world)  # every rank has looked at the folder
    rundir.prepare(run.config, fresh=not is_resumed)
    for line in (run.introduction(), *notes):
        say(line)
    if warning := lr_warning(config, run.order.global_batch_size):
        warn(warning)

    with (
        rundir.status(run) as status,
        _loading(run.stream(), config.workers, machine) as batches,
        closing(
            RunLog(rundir.path, start_step=run.state.step, quiet=not machine.world.is_main)
        ) as log,
    ):
        status.reason = fit(run, batches, log=log, rundir=rundir)
    if status.reason != "finished":
        say(
            f"Stopped by {status.reason} after step {run.state.step}; "
            f"saved {rundir.path / 'last.pt'}."
        )
        say(f"Continue with: wds-convnext train --resume {rundir.path}")
        return STOPPED_EXIT_CODE
    if run.validation:
        _evaluate_best(run, rundir, say=say)
    return 0


def _evaluate_best(run: Run, rundir: RunDir, *, say: Callable) -> None:
    """Evaluate the best of the run's weights, and say how good they are."""
    best = load_checkpoint(rundir.path / "best.pt")
    _load_weights(run.state.model, best)
    stream = run.validation.stream
    with _loading(stream, run.config.workers, run.machine) as batches:
        result = run.validation.run(run.recipe.forward, batches)
    low, high = result.top1_interval
    say(
        f"Final Model Accuracy: {result.top1:.2%} (validation split, n = {result.num_samples:,}, "
        f"95 % interval {low:.2%} to {high:.2%}; chosen on this split, so report a test split)"
    )


def _load_weights(model: torch.nn.Module, checkpoint: dict[str, Any]) -> None:
    """The weights that a checkpoint is evaluated with: their average, if it has one."""
    model.load_state_dict(checkpoint["model"])
    if checkpoint.get("ema"):
        model.load_state_dict(checkpoint["ema"], strict=False)  # it holds no buffers


def evaluate_checkpoint(config: EvalConfig) -> tuple[EvalResult, dict[str, Any]]:
    """Evaluate a checkpoint; the result, and what was evaluated on what (plain values)."""
    world, device = join_world(config.device)
    try:
        machine = Machine(world, device, choose_amp(config.amp, device))
        path = best_checkpoint(config.checkpoint)
        checkpoint = load_checkpoint(path)
        try:
            facts = Facts.from_dict(checkpoint.get("facts", {}))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        spec = config.shards or facts.val_shards
        if spec is None:
            raise UsageError(f"{path}: its run had no validation shards. Give --shards.")
        dataset = open_dataset(spec, jobs=num_cores(), quiet=False)
        if dataset.class_names != facts.class_names:
            raise ShardError(
                f"{spec}: its {dataset.num_classes} classes are not the {facts.num_classes} "
                f"that {path} was trained on. Evaluate on the same data set."
            )
        model = create_model(facts.model, num_classes=facts.num_classes).to(device)
        _load_weights(model, checkpoint)
        about = {
            "model": facts.model,
            "weights": "ema" if checkpoint.get("ema") else "model",
            "checkpoint": str(path),
            "step": checkpoint["step"],
            "dataset": dataset.name,
            "split": dataset.split,
        }
        del checkpoint  # nothing refers to its file from here on
        evaluation = open_evaluation(
            dataset,
            batch_size=config.batch_size,
            preprocessing=facts.preprocessing,
            machine=machine,
            max_bad_samples=config.max_bad_samples,
        )
        with _loading(evaluation.stream, config.workers, machine) as batches:
            return evaluation.run(model, batches), about
    finally:
        leave_world(world)
