"""The loader on a cold disk: images/s and MB/s against what the disk itself gives.

    python tools/bench/bench_cold.py data/train.json --rounds 5 --workers 2

Before each measurement every shard is dropped from the system's cache (posix_fadvise, DONTNEED;
Linux). "disk" reads all shards from start to end in pieces of 4 MiB, without a look at them; "cold"
and "cached" are one epoch of ours, shuffled uniformly, in a new loader each, so its start counts.
What a disk or a hypervisor keeps in caches of its own is not dropped: on a virtual disk of which
all fits there, "disk" is the rate of that. Medians over the rounds, then lowest and highest.
"""

import os
import time
from collections.abc import Callable

import click
from spread import spread

from wds_convnext.progress import Progress
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import TrainTransform

PIECE = 1 << 22


def drop_from_cache(dataset: Dataset) -> None:
    for shard in dataset.shards:
        file = os.open(shard.path, os.O_RDONLY)
        os.fsync(file)  # pages that were not written yet stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_through(dataset: Dataset) -> None:
    for shard in dataset.shards:
        with open(shard.path, "rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def load_epoch(dataset: Dataset, *, workers: int, batch_size: int, image_size: int) -> None:
    order = TrainOrder(dataset.sizes, 0, batch_size, len(dataset))
    transform = TrainTransform(image_size)
    stream = ShardStream(dataset, order, batch_size=batch_size, transform=transform)
    batches = make_loader(stream, workers=workers)
    for _ in range(order.num_steps(1)):
        next(batches)
    batches.close()


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@click.command()
@click.argument("shards")
@click.option("--rounds", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--image-size", default=224, show_default=True)
def main(shards: str, rounds: int, **options) -> None:
    """Measure one epoch over SHARDS on a cold disk."""
    dataset = open_dataset(shards)
    num_mb = sum(shard.num_bytes for shard in dataset.shards) / 1e6
    works: dict[str, Callable[[], None]] = {
        "disk": lambda: read_through(dataset),
        "cold": lambda: load_epoch(dataset, **options),
        "cached": lambda: load_epoch(dataset, **options),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}  # MB/s
    progress = Progress("cold disk", total=rounds, unit="rounds")
    for _ in range(rounds):
        for name, work in works.items():
            if name != "cached":
                drop_from_cache(dataset)
            rates[name].append(num_mb / seconds(work))
        progress.add(1, 0)
    progress.close()
    for name, values in rates.items():
        images = spread([rate * len(dataset) / num_mb for rate in values], ",.0f")
        print(f"{name:8}{spread(values, ',.1f'):>24} MB/s   {images:>24} images/s")
    for other in ("disk", "cached"):
        ratio = [cold / rate for cold, rate in zip(rates["cold"], rates[other])]
        print(f"cold is {spread(ratio, ',.2f')} of {other}, n = {rounds}")


if __name__ == "__main__":
    main()
