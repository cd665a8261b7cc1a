"""How long a trainer waits for its next batch: in mid-epoch, at epochs, validations, checkpoints.

    python tools/bench/bench_waits.py PARQUET --batches 400

A step is a pause of 1.3 times what the loader needs for a batch, so a loader that never stalls has
the next batch ready. After every second epoch PARQUET's images are validated on, too; in the middle
of each epoch ours writes a checkpoint of CHECKPOINT_MB, in a thread, as the trainer does. Ours is
one loader for both; the article's are two DataLoaders with `persistent_workers`, each used once
before the clock starts. Waits for a batch in ms, median and highest; n is their number.
"""

import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import click
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from wds_convnext.conversion import convert
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import EvalOrder, TrainOrder, ValidationSchedule
from wds_convnext.stream.stream import ShardStream, ValidatedStream
from wds_convnext.stream.transforms import EvalTransform, TrainTransform
from wds_convnext.training.checkpoint import save_checkpoint
from wds_convnext.training.saving import Writer, copy_to_host

BATCH_SIZE, IMAGE_SIZE = 32, 224
CHECKPOINT_MB = 115  # the weights of convnext_tiny
PAUSE = 1.3  # of the time that the loader needs for a batch
START, MIDDLE, VALIDATION, AFTER, SAVED = (
    "first of an epoch",
    "in mid-epoch",
    "first of a validation",
    "first after a validation",
    "first after a checkpoint",
)
Takes = Iterator[tuple[str, Callable]]  # which batch comes, and what waits for it


def ours(folder: Path, workers: int) -> Takes:
    dataset = open_dataset(str(folder / "train.json"))
    order = TrainOrder(dataset.sizes, 0, BATCH_SIZE, 100_000)
    stream_of = partial(ShardStream, dataset, batch_size=BATCH_SIZE)
    validation = stream_of(EvalOrder(dataset.sizes), transform=EvalTransform(IMAGE_SIZE))
    is_due = ValidationSchedule(order, every=2, last_step=0).is_due
    train = stream_of(order, transform=TrainTransform(IMAGE_SIZE))
    stream = ValidatedStream(train, validation, accumulate=1, is_due=is_due)
    take = partial(next, make_loader(stream, workers=workers))
    checkpoint = {"model": torch.zeros(CHECKPOINT_MB * 250_000)}
    middle = len(dataset) // BATCH_SIZE // 2
    kind = START
    with Writer() as writer:
        for step in count(1):
            yield kind, take
            epoch = order.epoch_of(step)
            kind = START if epoch > order.epoch_of(step - 1) else MIDDLE
            if step == order.steps_of(epoch).start + middle:
                state = copy_to_host(checkpoint)
                writer.start(partial(save_checkpoint, folder / "checkpoint.pt", state))
                kind = SAVED
            if is_due(step):
                yield VALIDATION, take
                for _ in range(validation.stop - 1):
                    yield MIDDLE, take
                kind = AFTER


class ParquetImages:
    """The article's data set: all encoded images in a list."""

    def __init__(self, folder: Path, transform: Callable):
        tables = map(pq.read_table, sorted(folder.glob("train-*.parquet")))
        columns = [table.flatten().to_pydict() for table in tables]
        self.samples = [s for c in columns for s in zip(c["image.bytes"], c["label"])]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        data, label = self.samples[index]
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), label


def article(folder: Path, workers: int) -> Takes:
    from torch.utils.data import DataLoader
    from torchvision import transforms as T

    crop = [T.RandomResizedCrop(IMAGE_SIZE), T.RandomHorizontalFlip(), T.ToTensor()]
    centre = [T.Resize(256), T.CenterCrop(IMAGE_SIZE), T.ToTensor()]
    datasets = [ParquetImages(folder, T.Compose(steps)) for steps in (crop, centre)]
    train, validation = (
        DataLoader(
            dataset,
            BATCH_SIZE,
            shuffle=dataset is datasets[0],
            num_workers=workers,
            prefetch_factor=6,
            persistent_workers=True,
        )
        for dataset in datasets
    )
    for loader in (train, validation):
        list(loader)
    for epoch in count():
        yield from _one_pass(train, AFTER if epoch % 2 else START)
        if epoch % 2 == 0:
            yield from _one_pass(validation, VALIDATION)


def _one_pass(loader, first: str) -> Takes:
    batches = None

    def take():
        nonlocal batches
        batches = batches or iter(loader)
        return next(batches)

    yield first, take
    for _ in range(len(loader) - 1):
        yield MIDDLE, take


def measure(takes: Takes, num_batches: int, name: str) -> dict[str, list[float]]:
    """The waits for num_batches batches in ms, by kind, after as many at full speed."""
    warm_up = max(10, num_batches // 4)
    started = time.perf_counter()
    for _, take in tqdm(islice(takes, warm_up), f"{name}, warm-up", warm_up, disable=None):
        take()
    pause = PAUSE * (time.perf_counter() - started) / warm_up
    waits = defaultdict(list)
    for kind, take in tqdm(islice(takes, num_batches), name, num_batches, disable=None):
        started = time.perf_counter()
        take()
        waits[kind].append(1e3 * (time.perf_counter() - started))
        time.sleep(pause)
    return waits


@click.command()
@click.argument("parquet", type=click.Path(exists=True, path_type=Path))
@click.option("--workers", default=2, show_default=True)
@click.option("--batches", default=400, show_default=True, help="Batches under the clock.")
def main(parquet: Path, workers: int, batches: int) -> None:
    """Measure the waits for batches of PARQUET's training images."""
    with tempfile.TemporaryDirectory() as folder:
        convert(str(parquet), out=folder, jobs=workers, check="decode", quiet=True)
        for name, takes in (
            ("ours", ours(Path(folder), workers)),
            ("the article's", article(parquet, workers)),
        ):
            waits = measure(takes, batches, name)
            takes.close()
            for kind, times in waits.items():
                print(
                    f"{name:14}{kind:26}median {statistics.median(times):7.1f} ms   "
                    f"highest {max(times):7.1f} ms   n = {len(times)}"
                )


if __name__ == "__main__":
    main()
