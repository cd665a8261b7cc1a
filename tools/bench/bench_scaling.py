"""The loader's images/s by number of workers; next to it torchvision's JPEG decoder on a GPU.

    python tools/bench/bench_scaling.py data/train.json --workers 1,2,4,8,16 --rounds 5

Made for a machine with many cores and a GPU; unmeasured there so far. Rounds go through all rows
in turn. Where CUDA is at hand, batches are pinned and copied to it, as in training, and
`torchvision.io.decode_jpeg(device="cuda")` decodes the same encoded images in batches: whole, as it
has no crop, and without a resize, so that its row is what decoding alone costs there. The data
should fit the page cache. Medians over the rounds, then lowest and highest.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import click
import torch
from spread import spread

from wds_convnext.progress import Progress
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import TrainTransform


def ours(dataset: Dataset, batch_size: int, image_size: int, workers: int) -> Iterator:
    """Our batches, on the GPU where there is one."""
    order = TrainOrder(dataset.sizes, 0, batch_size, 100_000)
    transform = TrainTransform(image_size)
    stream = ShardStream(dataset, order, batch_size=batch_size, transform=transform)
    has_cuda = torch.cuda.is_available()
    for batch in make_loader(stream, workers=workers, pin_memory=has_cuda):
        yield batch.images.cuda(non_blocking=True) if has_cuda else batch.images


def decoded_on_gpu(dataset: Dataset, batch_size: int) -> Iterator:
    """Whole images, decoded by nvJPEG in batches; reading them is not under the clock."""
    from torchvision.io import decode_jpeg

    reader = SampleReader(dataset)
    encoded = [
        torch.frombuffer(bytearray(reader.read(number)[0]), dtype=torch.uint8)
        for number in range(min(len(dataset), 16 * batch_size))
    ]
    while True:
        for start in range(0, len(encoded) - batch_size + 1, batch_size):
            yield decode_jpeg(encoded[start : start + batch_size], mode="RGB", device="cuda")


def images_per_s(batches: Iterator, batch_size: int, num_images: int, warm_up: int) -> float:
    num_batches = max(1, num_images // batch_size)
    for _ in range(warm_up):
        next(batches)
    _synchronize()
    started = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    _synchronize()
    rate = num_batches * batch_size / (time.perf_counter() - started)
    batches.close()
    return rate


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@click.command()
@click.argument("shards")
@click.option("--workers", default="1,2,4,8,16", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--measure", default=3000, show_default=True, help="Images per worker and round.")
def main(shards: str, workers: str, rounds: int, measure: int, **sizes: int) -> None:
    """Measure the loader over SHARDS for several numbers of workers."""
    dataset, batch_size = open_dataset(shards), sizes["batch_size"]
    rows: dict[str, tuple[int, Callable[[], Iterator]]] = {}
    for number in map(int, workers.split(",")):
        rows[f"{number} workers"] = number, partial(ours, dataset, workers=number, **sizes)
    if torch.cuda.is_available():
        rows["decode_jpeg, cuda"] = 1, partial(decoded_on_gpu, dataset, batch_size)
    rates: dict[str, list[float]] = {name: [] for name in rows}
    progress = Progress("scaling", total=rounds * len(rows), unit="measurements")
    for _ in range(rounds):
        for name, (number, batches) in rows.items():
            rate = images_per_s(batches(), batch_size, measure * number, 4 + 4 * number)
            rates[name].append(rate)
            progress.add(1, 0)
    progress.close()
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, n = {rounds}")
    for name, values in rates.items():
        print(f"{name:20}{spread(values, ',.0f'):>26} images/s")


if __name__ == "__main__":
    main()
