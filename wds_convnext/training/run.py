"""From a config to a run: opening shards, building the parts, resuming, evaluating."""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import click

from wds_convnext.config import EvalConfig, TrainConfig
from wds_convnext.errors import DataError, ShardError, TrainingError, UsageError
from wds_convnext.progress import track
from wds_convnext.shards.dataset import Dataset, find_validation, open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import check_sha256
from wds_convnext.stream.loader import num_cores, num_workers
from wds_convnext.stream.order import EvalOrder, SampleRefs, TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream, ValidatedStream, make_loader
from wds_convnext.stream.transforms import EvalTransform, TrainTransform
from wds_convnext.training import rundir
from wds_convnext.training.augment import Normalizer, prefetch_to_device
from wds_convnext.training.build import (
    CROP_RATIO,
    Compute,
    build_gauges,
    build_recipe,
    build_state,
    choose_amp,
    describe,
    fit_to_checkpoint,
    introduce,
    lr_warning,
)
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.distributed import World, barrier, is_lost_peer, join_world, leave_world
from wds_convnext.training.evaluate import EvalResult, evaluate
from wds_convnext.training.log import RunLog
from wds_convnext.training.loop import fit, validation_schedule
from wds_convnext.training.model import IMAGENET_MEAN, IMAGENET_STD, create_model
from wds_convnext.training.monitor import profile_steps
from wds_convnext.training.step import TrainState

STOPPED_EXIT_CODE = 75  # sysexits.h, EX_TEMPFAIL: stopped by a signal, to be run again


def run_training(config: TrainConfig) -> int:
    """Train as configured; gives the exit code: 0, or 75 if a signal stopped the run."""
    world, device = join_world(config.device)
    try:
        compiled = device.type == "cuda" if config.compile is None else config.compile
        return _train(config, Compute(world, device, choose_amp(config.amp, device), compiled))
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


def _train(config: TrainConfig, compute: Compute) -> int:
    world = compute.world
    say = click.echo if world.is_main else lambda text: None
    warn = partial(click.secho, err=True) if world.is_main else lambda text: None
    folder, resumed = rundir.choose(config, world, warn=warn)
    if resumed:
        config = fit_to_checkpoint(config, resumed["facts"], world)
    workers = num_workers(config.workers, ranks=world.size)
    train_data, val_data, val_spec = _open_splits(config)
    order = TrainOrder(
        train_data.sizes,
        seed=config.seed,
        global_batch_size=config.batch_size * config.accumulate * world.size,
        shuffle_buffer=config.shuffle_buffer,
    )
    facts = describe(config, train_data, val_spec, order, compute)
    state, notes = build_state(config, train_data.num_classes, compute)
    notes += [_without_checksums(data) for data in (train_data, val_data) if data is not None]
    if resumed:
        rundir.check_resumable(resumed["facts"], facts, warn=warn)
        state.load_state_dict(resumed)
        notes.append(f"Resumed at step {state.step}.")
    barrier(world)  # every rank has looked at the folder
    if world.is_main:
        rundir.prepare(folder, config, fresh=resumed is None)
    recipe = build_recipe(config, state, train_data.num_classes, compute)
    gauges = build_gauges(config, state, recipe, compute)
    say(introduce(config, state, train_data, val_data, order, compute, gauges))
    for note in filter(None, notes):
        say(note)
    warning = lr_warning(config, order.global_batch_size)
    if warning:
        warn(warning)

    stream = _train_stream(config, train_data, order, state, world)
    val_stream = None
    if val_data is not None:
        val_stream = _eval_stream(val_data, config.batch_size, config.image_size, world)
        is_due = validation_schedule(config, order).is_due
        stream = ValidatedStream(stream, val_stream, accumulate=config.accumulate, is_due=is_due)
    evaluate_on = partial(_evaluate, val_stream, recipe.forward, compute=compute)
    with (
        rundir.status(folder, state, world) as status,
        _loading(stream, workers, compute) as batches,
        closing(RunLog(folder, start_step=state.step, quiet=not world.is_main)) as log,
        closing(_traced(batches, folder, config, world)) as step_batches,
    ):
        status.reason = fit(
            state,
            step_batches,
            config=config,
            order=order,
            recipe=recipe,
            log=log,
            validate=val_stream and (lambda: evaluate_on(islice(batches, val_stream.stop))),
            save=partial(
                rundir.save, folder, state=state, facts=facts, keep=config.keep, world=world
            ),
            name_samples=partial(_name_samples, train_data),
            gauges=gauges,
        )
    if status.reason != "finished":
        say(f"Stopped by {status.reason} after step {state.step}; saved {folder / 'last.pt'}.")
        say(f"Continue with: wds-convnext train --resume {folder}")
        return STOPPED_EXIT_CODE
    if val_stream:
        with _loading(val_stream, workers, compute) as val_batches:
            _evaluate_best(folder, state, partial(evaluate_on, val_batches), say)
    return 0


def _traced(
    batches: Iterator[Batch], folder: Path, config: TrainConfig, world: World
) -> Iterator[Batch]:
    if not (config.profile and world.is_main):
        return batches
    return profile_steps(batches, folder / "trace.json", batches_per_step=config.accumulate)


def run_evaluation(config: EvalConfig) -> tuple[EvalResult, dict]:
    """Evaluate a checkpoint; the result, and what was evaluated on what (plain values)."""
    world, device = join_world(config.device)
    try:
        path = rundir.best_checkpoint(config.checkpoint)
        content = load_checkpoint(path)
        facts = content["facts"]
        spec = config.shards or facts["val_shards"]
        if spec is None:
            raise UsageError(f"{path}: its run had no validation shards. Give --shards.")
        dataset = open_dataset(spec, jobs=num_cores(), quiet=False)
        if dataset.class_names != tuple(facts["class_names"]):
            raise ShardError(
                f"{spec}: its {dataset.num_classes} classes are not the {facts['num_classes']} "
                f"that {path} was trained on. Evaluate on the same data set."
            )
        model = create_model(facts["model"], num_classes=facts["num_classes"]).to(device)
        model.load_state_dict(content["ema"] or content["model"], strict=False)
        compute = Compute(world, device, choose_amp(config.amp, device))
        image_size = facts["preprocessing"]["image_size"]
        stream = _eval_stream(dataset, config.batch_size, image_size, world)
        with _loading(stream, num_workers(config.workers, ranks=world.size), compute) as batches:
            result = _evaluate(
                stream, model, batches, max_bad_samples=config.max_bad_samples, compute=compute
            )
        about = {
            "model": facts["model"],
            "weights": "ema" if content["ema"] else "model",
            "checkpoint": str(path),
            "step": content["step"],
            "dataset": dataset.name,
            "split": dataset.split,
        }
        return result, about
    finally:
        leave_world(world)


def _train_stream(
    config: TrainConfig, dataset: Dataset, order: TrainOrder, state: TrainState, world: World
) -> ShardStream:
    """This rank's training batches from the state's step on."""
    return ShardStream(
        dataset,
        order,
        batch_size=config.batch_size,
        transform=TrainTransform(
            config.image_size,
            color_jitter=config.color_jitter,
            scale=(config.min_crop, 1.0),
            hflip=config.hflip,
        ),
        rank=world.rank,
        world_size=world.size,
        start=state.step * config.accumulate,
    )


def _eval_stream(dataset: Dataset, batch_size: int, image_size: int, world: World) -> ShardStream:
    """Every sample of a split once, over all ranks."""
    return ShardStream(
        dataset,
        EvalOrder(dataset.sizes),
        batch_size=batch_size,
        transform=EvalTransform(image_size, crop_ratio=CROP_RATIO),
        rank=world.rank,
        world_size=world.size,
    )


@contextmanager
def _loading(stream: ShardStream | ValidatedStream, workers: int, compute: Compute):
    """A stream's batches on the device; the workers end with the context."""
    if isinstance(stream, ShardStream) and stream.stop is not None:
        workers = min(workers, stream.stop)
    batches = make_loader(stream, workers=workers, pin_memory=compute.device.type == "cuda")
    with closing(batches):
        yield prefetch_to_device(batches, compute.device)


def _evaluate(
    stream: ShardStream,
    forward: Callable,
    batches: Iterator[Batch],
    *,
    compute: Compute,
    max_bad_samples: float = 0.0,
) -> EvalResult:
    """Evaluate on the batches of a finite stream; `forward` is put into evaluation mode."""
    split, device, is_main = stream.dataset, compute.device, compute.world.is_main
    title = f"Evaluating {split.split}"
    shown = track(batches, title, unit="batches", total=stream.stop, quiet=not is_main)
    return evaluate(
        forward,
        _limit_bad_samples(shown, max_bad_samples * len(split)),
        normalizer=Normalizer(IMAGENET_MEAN, IMAGENET_STD, device),
        autocast=compute.autocast,
        world=compute.world,
    )


def _name_samples(dataset: Dataset, refs: SampleRefs) -> list[str]:
    """Shard and key of samples, as messages name them."""
    with closing(SampleReader(dataset)) as reader:
        places = [reader.describe(number) for number in refs.number.tolist()]
    return [f"{place['shard']}, key {place['key']}" for place in places]


def _without_checksums(dataset: Dataset) -> str | None:
    if dataset.index.has_checksums:
        return None
    folder = Path(dataset.shards[0].path).parent
    return (
        f"The {dataset.split} split has no checksums, so flipped bits in it go unseen; "
        f"add them once: wds-convnext index {folder}"
    )


def _limit_bad_samples(batches: Iterator[Batch], allowed: float) -> Iterator[Batch]:
    found = 0
    for batch in batches:
        found += len(batch.bad_samples)
        if found > allowed:
            bad = batch.bad_samples[0]
            raise DataError(
                f"{bad['shard']}, key {bad['key']}: {bad['reason']} Write the shard again, or "
                "leave such samples out of the result with --max-bad-samples."
            )
        yield batch


def _evaluate_best(folder: Path, state: TrainState, validate: Callable, say: Callable) -> None:
    best = load_checkpoint(folder / "best.pt")
    state.model.load_state_dict(best["model"])
    if best["ema"]:
        state.model.load_state_dict(best["ema"], strict=False)
    result = validate()
    low, high = result.top1_interval
    say(
        f"Final Model Accuracy: {result.top1:.2%} (validation split, n = {result.num_samples:,}, "
        f"95 % interval {low:.2%} to {high:.2%}; chosen on this split, so report a test split)"
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
