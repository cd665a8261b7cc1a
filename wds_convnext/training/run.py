"""From a config to a run: opening shards, building the parts, resuming."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import timm
import torch

import wds_convnext
from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.pool import num_cores
from wds_convnext.progress import track
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.decode import decoder_versions
from wds_convnext.shards.expand import absolute_spec, split_specs
from wds_convnext.shards.opening import open_splits
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import check_sha256
from wds_convnext.stream.order import TrainOrder, ValidationSchedule
from wds_convnext.stream.sizes import ImageSizes
from wds_convnext.stream.stream import ShardStream, ValidatedStream
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.stream.workers import num_workers
from wds_convnext.training.augment import build_transform, pixels_of
from wds_convnext.training.checkpoint import DataFacts, Facts, taking_over
from wds_convnext.training.distributed import Machine
from wds_convnext.training.ema import warmup_note
from wds_convnext.training.evaluate import Evaluation, open_evaluation
from wds_convnext.training.fitting import check_ranks, check_resumable, fit_to_checkpoint
from wds_convnext.training.loss import (
    class_weights,
    weights_digest,
    with_absolute_class_weights,
)
from wds_convnext.training.monitor import Gauges, build_gauges
from wds_convnext.training.pretrained import absolute_source
from wds_convnext.training.remote import first_on_each_node
from wds_convnext.training.sampling import build_weighting, describe, with_absolute_weights
from wds_convnext.training.schedule import (
    image_sizes,
    lr_schedule,
    schedule_notes,
    validation_schedule,
)
from wds_convnext.training.state import TrainState, build_state
from wds_convnext.training.step import StepRecipe, build_recipe

_NUM_NAMED = 8  # samples of a failed step that a message names


@dataclass(frozen=True)
class Run:
    """A run: everything that is decided before its first step. Only `state` changes."""

    config: TrainConfig
    machine: Machine
    train_data: Dataset
    order: TrainOrder
    lr: Callable[[int], float]  # of a step
    image_sizes: ImageSizes  # likewise
    schedule: ValidationSchedule  # and the last step
    validation: Evaluation | None
    state: TrainState
    recipe: StepRecipe
    gauges: Gauges
    facts: Facts

    @property
    def preprocessing(self) -> Preprocessing:
        return self.facts.preprocessing

    @property
    def is_stale(self) -> bool:
        """Whether --early-stop ends the run here."""
        limit = self.config.early_stop
        return limit is not None and self.state.num_stale >= limit

    def stream(self) -> ShardStream | ValidatedStream:
        """This rank's batches from the state's step on, with validations in their place."""
        config, world = self.config, self.machine.world
        stream = ShardStream(
            self.train_data,
            self.order,
            batch_size=config.batch_size,
            transform=build_transform(config, self.preprocessing),
            rank=world.rank,
            world_size=world.size,
            start=self.state.step * config.accumulate,
            sizes=self.image_sizes,
        )
        if self.validation is None:
            return stream
        return ValidatedStream(
            stream,
            self.validation.stream,
            accumulate=config.accumulate,
            is_due=self.schedule.is_due,
            validates_first=self.state.owes_validation,
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
            validation = "none for validation"
        else:
            validation = f"{len(self.validation.stream.dataset):,} for validation"
        amp = "float32" if machine.amp == "off" else machine.amp
        counts = [f"{flops / 1e9:.3g}" for flops in self.gauges.flops.values() if flops]
        compiled = "compiled" if machine.compiled else "not compiled"
        compiled += ", CUDA graphs" * machine.cuda_graphs
        work = f"{', '.join(counts)} GFLOP" if counts else "an unknown number of FLOP"
        peak = f"; peak {self.gauges.peak / 1e12:.0f} TFLOP/s" if self.gauges.peak else ""
        return (
            f"{self.facts.model}: {num_parameters / 1e6:.1f} M parameters, "
            f"{work} per training image{peak}\n"
            f"{data.name}: {len(data):,} samples in {len(data.shards)} "
            f"shard{'s' * (len(data.shards) > 1)}, {validation}, {data.num_classes} classes\n"
            f"{config.epochs} epoch{'s' * (config.epochs > 1)} of "
            f"{order.num_samples / order.global_batch_size:.1f} steps, "
            f"global batch {order.global_batch_size}, on {machine.world.size} x {machine.device}, "
            f"{amp}, {compiled}"
        )


def open_run(
    config: TrainConfig,
    machine: Machine,
    *,
    checkpoint: dict[str, Any] | None,
    stated_batch: int | None = None,
    warn: Callable,
) -> tuple[Run, list[str]]:
    """A run from its first step, or from a checkpoint's, and sentences about how it begins.

    Args:
        stated_batch: see `fit_to_checkpoint`.
    Raises:
        WdsConvnextError: if options, data, machine and checkpoint do not fit each other.
    """
    then = Facts.from_dict(checkpoint.get("facts", {})) if checkpoint else None
    asked = config.batch_size
    if then:
        config = fit_to_checkpoint(config, then, machine.world, stated=stated_batch)
    num_workers(config.workers, ranks=machine.world.local_size)  # refuses too many
    shards = config.require_shards()
    train_data, val_data, val_spec = first_on_each_node(
        lambda: open_splits(shards, config.val_shards, jobs=num_cores(), quiet=False),
        split_specs(shards, config.val_shards),
        machine.world,
    )
    for flag, needs_validation in (
        (f"--early-stop {config.early_stop}", config.early_stop is not None),
        ("--max-steps 0", config.max_steps == 0),
    ):
        if needs_validation and val_data is None:
            raise UsageError(f"{flag}: there are no validation shards. Name some: --val-shards.")
    if config.check_shards:
        _check_sha256(train_data, val_data)
    config = _with_absolute_paths(config)
    order = TrainOrder(
        train_data.sizes,
        seed=config.seed,
        global_batch_size=config.batch_size * config.accumulate * machine.world.size,
        shuffle_buffer=config.shuffle_buffer,
        weighting=build_weighting(config, train_data),
        repeats=config.repeated_augmentation,
    )
    sizes = image_sizes(config, order)
    weights = class_weights(config, train_data)
    facts = _facts(
        config, machine, order=order, train_data=train_data, val_spec=val_spec, weights=weights
    )
    if then and train_data.is_meant_by(then.data.shards):
        facts = replace(facts, data=replace(facts.data, shards=then.data.shards))
    state, notes = build_state(
        config,
        num_classes=train_data.num_classes,
        machine=machine,
        class_names=train_data.class_names,
        is_resumed=then is not None,
    )
    if then and checkpoint:
        check_resumable(then, facts, warn=warn)
        with taking_over():
            state.load_state_dict(checkpoint)
    if config.max_steps == 0:  # what the starting weights are worth
        state.owes_validation = then is None
    check_ranks(
        facts,
        step=state.step,
        val_shards=val_data.digest if val_data else None,
        world=machine.world,
    )
    # After loading: DDP hands the main rank's weights to the others when it is made.
    recipe = build_recipe(
        config,
        state,
        num_classes=train_data.num_classes,
        machine=machine,
        preprocessing=facts.preprocessing,
        order=order,
        class_weights=weights,
    )
    run = Run(
        config=config,
        machine=machine,
        train_data=train_data,
        order=order,
        lr=lr_schedule(config, order),
        image_sizes=sizes,
        schedule=validation_schedule(config, order),
        validation=_open_validation(val_data, config, facts, machine) if val_data else None,
        state=state,
        recipe=recipe,
        gauges=build_gauges(
            state.model,
            sizes=sizes.sizes,
            machine=machine,
            timer=recipe.optimizer_timer,
        ),
        facts=facts,
    )
    if config.batch_size != asked:
        notes.append(
            f"--batch-size {asked} becomes {config.batch_size}, which keeps the run's global batch "
            f"of {order.global_batch_size} with {machine.world.size} ranks."
        )
    return run, [*notes, *_notes(run, val_data)]


def _open_validation(
    dataset: Dataset, config: TrainConfig, facts: Facts, machine: Machine
) -> Evaluation:
    return open_evaluation(
        dataset,
        batch_size=config.batch_size,
        preprocessing=facts.preprocessing,
        machine=machine,
        max_bad_samples=config.max_bad_val_samples,
        decoder=config.decoder,
        flag="--max-bad-val-samples",
    )


def _notes(run: Run, val_data: Dataset | None) -> list[str]:
    """Sentences about what is unusual in how a run begins."""
    splits = [run.train_data, *([val_data] if val_data else [])]
    notes = [_without_checksums(x) for x in splits if x.index and not x.index.has_checksums]
    average, decay = run.state.average, run.config.ema_decay
    if average and average.num_updates is not None:
        notes += filter(None, [warmup_note(decay, run.schedule.last_step)])
    if run.order.weighting:
        notes.append(describe(run.order.weighting))
    if len(run.image_sizes.sizes) > 1:
        starts = zip(run.image_sizes.sizes, run.image_sizes.first_steps, strict=True)
        notes.append("Images: " + ", ".join(f"{x} px from step {step:,}" for x, step in starts))
    return notes + schedule_notes(run.config, run.order)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config as a resume from another working directory can use it."""
    config = with_absolute_class_weights(with_absolute_weights(config))
    return replace(
        config,
        shards=absolute_spec(config.require_shards()),
        val_shards=config.val_shards and absolute_spec(config.val_shards),
        init_from=config.init_from and os.path.abspath(config.init_from),
        pretrained=config.pretrained and absolute_source(config.pretrained),
        cache_dir=config.cache_dir and os.path.abspath(config.cache_dir),
    )


def _facts(
    config: TrainConfig,
    machine: Machine,
    *,
    order: TrainOrder,
    train_data: Dataset,
    val_spec: str | None,
    weights: list[float] | None,
) -> Facts:
    """What a run's checkpoints say about it."""
    return Facts(
        model=config.model or "",
        class_names=train_data.class_names,
        batch_size=config.batch_size,
        preprocessing=pixels_of(config),
        data=DataFacts(
            shards=train_data.digest,
            seed=order.seed,
            global_batch_size=order.global_batch_size,
            shuffle_buffer=order.shuffle_buffer,
            num_lanes=order.num_lanes,
            weighting=order.weighting.digest if order.weighting else None,
            repeats=order.repeats,
        ),
        dataset=train_data.name,
        val_shards=val_spec and absolute_spec(val_spec),
        environment={
            "wds_convnext": wds_convnext.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "numpy": np.__version__,
            "decoder": decoder_versions(config.decoder),
            "device": machine.device.type,
            "amp": machine.amp,
            "convolutions": machine.convolutions,
            "compiled": machine.compiled,
            "cuda_graphs": machine.cuda_graphs,
            "num_threads": torch.get_num_threads(),
            "world_size": machine.world.size,
            **({"class_weights": weights_digest(weights)} if weights else {}),
        },
        config=asdict(config),
    )


def _check_sha256(*datasets: Dataset | None) -> None:
    for dataset in filter(None, datasets):
        for shard in track(dataset.shards, f"Checking {dataset.split}", unit="shards"):
            if not shard.is_remote:  # it is, whenever it is fetched
                check_sha256(shard)


def _without_checksums(dataset: Dataset) -> str:
    folder = os.path.dirname(dataset.shards[0].where) or "."
    return (
        f"The {dataset.split} split has no checksums, so flipped bits in it go unseen; "
        f"add them once: wds-convnext index {folder}"
    )
