"""Streams of small uneven shards, and what the tests of the loader and the stream do with them."""

import multiprocessing
from pathlib import Path

import torch
from conftest import write_shards

from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import EvalOrder, TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream
from wds_convnext.stream.transforms import EvalTransform, TrainTransform

SIZES = [7, 1, 12, 3]  # uneven, one of a single sample; 23 samples in all
TRAIN = TrainTransform(16, color_jitter=0.4)
EVAL = EvalTransform(16)


def damage_images(dataset: Dataset, places: list[tuple[int, int]]) -> Dataset:
    """Overwrite the first bytes of some images, in place."""
    reader = SampleReader(dataset)
    for shard, sample in places:
        where = reader.describe(dataset.numbers_of(shard)[sample])
        with open(where["shard"], "r+b") as file:
            file.seek(where["offset"])
            file.write(b"no jpeg!")
    return dataset


def train_order(dataset: Dataset, *, global_batch=4, buffer=8, seed=3) -> TrainOrder:
    return TrainOrder(dataset.sizes, seed, global_batch, buffer, num_lanes=4)


def train_stream(dataset: Dataset, *, batch_size=4, start=0, rank=0, world_size=1, **order):
    return ShardStream(
        dataset,
        train_order(dataset, **order),
        batch_size=batch_size,
        transform=TRAIN,
        rank=rank,
        world_size=world_size,
        start=start,
    )


def eval_stream(dataset: Dataset, *, batch_size=4, rank=0, world_size=1) -> ShardStream:
    return ShardStream(
        dataset,
        EvalOrder(dataset.sizes),
        batch_size=batch_size,
        transform=EVAL,
        rank=rank,
        world_size=world_size,
    )


def take(stream: ShardStream, num_batches: int, *, workers: int = 0) -> list[Batch]:
    """The first batches of a stream; the loader's processes are gone afterwards."""
    batches = make_loader(stream, workers=workers)
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return taken


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.is_real, other.is_real)
        assert one.bad_samples == other.bad_samples


def workers_of_this_process() -> list[multiprocessing.Process]:
    return sorted(multiprocessing.active_children(), key=lambda process: process.pid)


def write_damaged(folder: Path) -> Dataset:
    """Shards of SIZES whose samples 2, 3 and 20 do not decode."""
    return damage_images(open_dataset(str(write_shards(folder, SIZES))), [(0, 2), (0, 3), (3, 0)])


def concatenated(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat(tensors) for tensors in list(zip(*batches))[:3]),
        [bad for batch in batches for bad in batch.bad_samples],
    )
