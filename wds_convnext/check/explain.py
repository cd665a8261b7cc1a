"""Which samples a training step gets, how they are drawn and mixed; and a sample's steps.

An order is a pure function of the run's facts, and so are the draws. A step is loaded as the run
loads it, one batch at a time. A sample's place in each epoch comes from the inverse of the order,
so no epoch is walked through: at ImageNet-1k's size (1.28 million samples in 1,281 shards, global
batch 4096), 300 epochs take 0.3 s of CPU with a uniform order, 2.0 s with a shuffle buffer, and
nothing grows in memory (32 MB in all). Walking would take 1.4 us a position, 9 minutes.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from wds_convnext.check.explanation import (
    DrawnBatch,
    DrawnSample,
    SampleExplanation,
    StepExplanation,
    Visit,
)
from wds_convnext.check.sheet import save_sheet
from wds_convnext.config import ExplainConfig
from wds_convnext.errors import UsageError
from wds_convnext.progress import track, warn
from wds_convnext.rng import uniform
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.decode import Box, decode_rgb
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.sidecar import may_hold, read_samples
from wds_convnext.storage.cache import caching
from wds_convnext.storage.layout import held
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import TrainTransform
from wds_convnext.training.augment import MixDraw, Normalizer, build_mixer, build_transform
from wds_convnext.training.batchsheet import BatchSheet
from wds_convnext.training.erase import erase
from wds_convnext.training.recorded import RecordedRun, open_recorded_run


def explain(
    run: str | None = None, config: ExplainConfig | None = None, **options: Any
) -> StepExplanation | SampleExplanation:
    """Say what a training step gets, or in which steps a sample comes.

    Args:
        run: a run's folder or a checkpoint; by default the newest run's.
        config: which step or sample.
        options: fields of `ExplainConfig` by name: `step=1234, sheet="step.png"`.
    Raises:
        UsageError: if the run has no such step or sample, or was trained on other shards.
        CheckpointError: if there is no whole checkpoint.
    """
    config = ExplainConfig.of(config, options)
    config.require_one()
    with caching(config):
        return _explain(run, config)


def _explain(run: str | None, config: ExplainConfig) -> StepExplanation | SampleExplanation:
    recorded = open_recorded_run(run, shards=config.shards, warn=warn)
    if config.key is not None:
        return _explain_sample(recorded, find_sample(recorded.dataset, config.key))
    assert config.step is not None  # one of the two is given
    if config.step >= recorded.num_steps:
        raise UsageError(
            f"--step {config.step}: the run has steps 0 to {recorded.num_steps - 1}, in "
            f"{recorded.config.epochs} epochs."
        )
    return _explain_step(recorded, config.step, sheet_path=config.sheet)


def _explain_step(run: RecordedRun, step: int, *, sheet_path: str | None) -> StepExplanation:
    mixer = build_mixer(run.config, run.dataset.num_classes, run.order)
    normalizer = Normalizer(
        run.facts.preprocessing.mean, run.facts.preprocessing.std, torch.device("cpu")
    )
    sheet = None
    if sheet_path is not None:
        sheet = BatchSheet(
            num_batches=run.num_ranks * run.config.accumulate,
            batch_size=run.facts.batch_size,
            image_size=run.image_sizes.at(step),
        )
    batches = []
    for batch, images in load_step(run, step):
        batches.append(batch)
        if sheet is not None:
            labels = torch.tensor([sample.label for sample in batch.samples])
            erasures = torch.tensor([sample.erasure or (0,) * 5 for sample in batch.samples])
            mixed, _ = mixer(erase(normalizer(images), erasures), labels, batch.mix)
            seen = (normalizer.undo(mixed) * 255).round().to(torch.uint8)
            sheet.add(batch.title(), seen, batch.captions())
    if sheet is not None and sheet_path is not None:
        save_sheet(sheet.image, sheet_path)
    return StepExplanation(run, step, batches)


def load_step(run: RecordedRun, step: int) -> Iterator[tuple[DrawnBatch, torch.Tensor]]:
    """The batches of a step, rank by rank, and their images before they are erased and mixed.

    The images are uint8 (batch_size, 3, S, S), bit for bit those that the run trains on.
    """
    accumulate = run.config.accumulate
    mixer = build_mixer(run.config, run.dataset.num_classes, run.order)
    size = run.image_sizes.at(step)
    transform = build_transform(run.config, replace(run.facts.preprocessing, image_size=size))
    draw = partial(_draw_one, run.dataset, transform)
    for rank in range(run.num_ranks):
        stream = ShardStream(
            run.dataset,
            run.order,
            batch_size=run.facts.batch_size,
            transform=transform,
            rank=rank,
            world_size=run.num_ranks,
        )
        for micro in range(accumulate):
            key = (run.config.seed, step, micro, rank)
            mix = mixer.draw(size, *key)
            samples, images = _load_batch(stream, step * accumulate + micro, mix, draw)
            yield DrawnBatch(rank, micro, mix, samples), images


def _load_batch(
    stream: ShardStream, index: int, mix: MixDraw, draw: Callable
) -> tuple[list[DrawnSample], torch.Tensor]:
    """As `ShardStream.load`, keeping what was drawn for each sample."""
    refs = stream.order.micro_batch(index, **stream.place)
    draws = uniform(stream.order.sample_keys(refs), stream.transform.NUM_DRAWS)
    images, samples = stream.new_images(), []
    with closing(stream.open_reader()) as reader:
        for i, number in enumerate(refs.number.tolist()):
            load = partial(draw, reader, draws=draws[i])
            drawn, reasons = stream.first_good(reader, number, load)
            assert drawn is not None  # in training another takes the place of one that is bad
            images[i], about = drawn
            partner = len(refs) - 1 - i if mix.share < 1 else None
            samples.append(
                DrawnSample(
                    position=i,
                    epoch=int(refs.epoch[i]),
                    copy=int(refs.copy[i]),
                    partner=partner,
                    in_place_of=reasons,
                    **about,
                )
            )
    return samples, images


def _draw_one(
    dataset: Dataset,
    transform: TrainTransform,
    reader: SampleReader,
    number: int,
    *,
    draws: np.ndarray,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A sample's image as the transform makes it, and what was drawn for it."""
    found: dict[str, Any] = {}

    def choose_box(height: int, width: int) -> Box:
        size, crop = transform.crop_place(draws, height, width)
        found.update(image_size=size, crop=crop)
        return transform.crop_box(draws, height, width)

    data, label = reader.read(number)
    image = transform.resize(decode_rgb(data, choose_box), draws)
    place = reader.describe(number)
    found |= {
        "number": number,
        "shard": place["shard"],
        "key": place["key"],
        "label": label,
        "class_name": dataset.class_names[label],
        "is_flipped": transform.flips(draws),
        "operations": transform.operations(draws),
        "color_factors": transform.color_factors(draws),
        "erasure": _erasure(transform, draws),
    }
    return transform.augment(image, draws), found


def _erasure(transform: TrainTransform, draws: np.ndarray) -> tuple[int, ...] | None:
    if not transform.random_erasing:
        return None
    erasure = tuple(transform.erasure(draws).tolist())
    return erasure if any(erasure[:4]) else None


def find_sample(dataset: Dataset, key: str) -> int:
    """The number of the sample of a key, or that is the number itself.

    Keys stand in the shards, so their sidecars are read: all of them, since a key may come twice,
    but only those that have its letters are parsed (1.28 million samples: 100 MB, 0.3 s of CPU).

    Raises:
        UsageError: if there is no such sample, or more than one.
    """
    word = "_".join(key.split())  # as sidecars have it
    found = []
    for shard, stated in enumerate(track(dataset.shards, "Looking for the key", unit="shards")):
        with held(stated.path):
            if not may_hold(stated.path, word):
                continue
            start = dataset.numbers_of(shard).start
            keys = ("_".join(members[0].key.split()) for members in read_samples(stated.path))
            found += [start + i for i, other in enumerate(keys) if other == word]
    if len(found) > 1:
        numbers = ", ".join(map(str, found[:10]))
        raise UsageError(f"--key {key}: samples {numbers} have it. Give the number of one.")
    if found:
        return found[0]
    if key.isdecimal() and int(key) < len(dataset):
        return int(key)
    raise UsageError(
        f"--key {key}: no sample of {dataset.name}, {dataset.split} split, has it. Give the key "
        f"that stands in the shard, or a number from 0 to {len(dataset) - 1}."
    )


def _explain_sample(run: RecordedRun, number: int) -> SampleExplanation:
    with closing(SampleReader(run.dataset)) as reader:
        place = reader.describe(number)
    return SampleExplanation(
        run=run,
        number=number,
        shard=str(place["shard"]),
        key=str(place["key"]),
        label=int(run.dataset.labels[number]),
        visits=list(_visits(run, number)),
    )


def _visits(run: RecordedRun, number: int) -> Iterator[Visit]:
    order, batch_size = run.order, run.facts.batch_size
    num_positions = run.num_steps * order.global_batch_size
    # The last step takes from the epoch after, so a sample may come once more there.
    epochs = range(-(-num_positions // order.num_samples))
    for position in order.positions_of(number, epochs).tolist():
        epoch, step = position // order.num_samples, position // order.global_batch_size
        if step >= run.num_steps:
            continue
        batch, place = divmod(order.place_in_batch(position), batch_size)
        rank, micro = divmod(batch, run.config.accumulate)
        yield Visit(epoch, step, rank, micro, place, is_done=step < run.steps_done)
