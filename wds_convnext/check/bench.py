"""`wds-convnext bench`: measures the loader on the user's own shards and machine.

Each number of workers is measured with training's own loader, and one image's way through it with
training's own reader and transform. Every measurement goes on in the order where the one before
stopped, so that none finds in the page cache what another has just brought there (unless the data
set is smaller than what is read in all). What is in the cache from before is read from it.

A loader's processes end before the next one starts; what it leaves in this process is within 20 MB.
Peak memory is that of this process and its workers: much of it is torch; no model is in it. Pages
that other programs share count for less (PSS).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

import click
import numpy as np
import torch
from tqdm import tqdm

from wds_convnext.check.advice import ROOM, BenchReport, Stages, WorkerRate
from wds_convnext.check.measure import measure_loader
from wds_convnext.errors import DataError
from wds_convnext.shards.dataset import Dataset, open_dataset
from wds_convnext.shards.image import inspect_image
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import PREFETCH, num_cores, num_workers
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream, make_loader
from wds_convnext.stream.transforms import TrainTransform

_MIN_BATCHES = 3  # under the clock
_MAX_SURVEYED = 256  # images whose size is looked at


def bench(
    spec: str,
    *,
    image_size: int = 224,
    batch_size: int = 160,
    color_jitter: float = 0.4,
    shuffle_buffer: int = 100_000,
    workers: int | None = None,
    seed: int = 0,
    seconds: float = 5.0,
    target_images_per_s: float | None = None,
) -> BenchReport:
    """Measure the loader with 1, 2, 4, … workers, or with `workers`, and one image's way.

    Args:
        spec: shards, as for training.
        seconds: of each measurement, about; at least a few batches.
    Raises:
        UsageError: if there are to be more workers than make sense.
        ShardError: if the spec names nothing, or a shard is missing or damaged.
        WdsConvnextError: what else the loader met.
    """
    most = num_workers(workers)
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    counts = [*powers, most] if workers is None else [workers]
    dataset = open_dataset(spec, jobs=num_cores(), quiet=False)
    order = TrainOrder(dataset.sizes, seed, batch_size, shuffle_buffer)
    transform = TrainTransform(image_size, color_jitter=color_jitter)
    measured = sorted({1, *counts})  # one worker in any case: what handing over costs
    with closing(Progress(len(measured) + 1)) as progress:
        loads = Loads(
            dataset, order, transform, batch_size=batch_size, seconds=seconds, progress=progress
        )
        rates = {count: loads.rate(count) for count in measured}
        stage_times = loads.stages(rates[1].cpu_ms_per_image)
    return BenchReport(
        dataset=dataset.name,
        split=dataset.split,
        num_samples=len(dataset),
        num_cores=num_cores(),
        batch_size=batch_size,
        image_size=image_size,
        by_workers=tuple(rates[count] for count in counts),
        target_images_per_s=target_images_per_s,
        **stage_times,
        **loads.survey(),
    )


class Loads:
    """Training's loader, started again and again, each time further on in the order."""

    def __init__(
        self,
        dataset: Dataset,
        order: TrainOrder,
        transform: TrainTransform,
        *,
        batch_size: int,
        seconds: float,
        progress: "Progress",
    ):
        self.dataset, self.order, self.transform = dataset, order, transform
        self.batch_size, self.seconds, self.progress = batch_size, seconds, progress
        self._start = 0  # the first batch that nothing has read yet

    def rate(self, workers: int) -> WorkerRate:
        """What the loader costs with so many workers.

        They make batches side by side, so rounds of a batch from each are taken: one to start,
        one to learn how many fill the time, and those.
        """
        side_by_side = max(1, workers)
        per_round = side_by_side * self.batch_size
        self.progress.begin("1 worker" if workers == 1 else f"{workers} workers")
        with closing(make_loader(self._stream(), workers=workers)) as batches:
            first = measure_loader(
                batches,
                batch_size=self.batch_size,
                num_images=per_round,
                warmup_batches=side_by_side - 1,
            )
            num_rounds = max(
                math.ceil(_MIN_BATCHES / side_by_side),
                round(self.seconds * first.images_per_s / per_round),
            )
            num_batches = num_rounds * side_by_side
            cost = measure_loader(
                self.progress.watch(batches, num_batches + 1, self.batch_size),
                batch_size=self.batch_size,
                num_images=num_batches * self.batch_size,
                warmup_batches=0,
            )
        self._start += 2 * side_by_side + 1 + num_batches + PREFETCH * workers
        self.progress.end(f"{cost.images_per_s:,.0f} images/s")
        peaks = [c.peak_pss_mib for c in (first, cost) if c.peak_pss_mib is not None]
        return WorkerRate(
            images_per_s=cost.images_per_s,
            cpu_ms_per_image=cost.cpu_ms_per_image,
            peak_pss_mib=max(peaks, default=None),
            first_batch_s=first.first_batch_s,
            workers=workers,
        )

    def stages(self, cpu_ms_of_one_worker: float | None) -> dict[str, Stages | float]:
        """Where the time of one worker goes, as the report's fields; milliseconds per image.

        The way is that of a worker, within this process: the stream's own `load`, on one thread,
        into memory that was touched before. What is left of its time is the batch's.

        Args:
            cpu_ms_of_one_worker: per image, of the loader with one worker.
        """
        spent = Counter()
        stream = self._stream(TimedTransform(self.transform, spent))
        images = stream.new_images()
        self.progress.begin("stages")
        with _one_thread(), closing(stream.open_reader()) as reader:
            timed_reader = TimedReader(reader, spent)
            stream.load(self._start, timed_reader, images)  # opens files, touches memory
            spent.clear()
            num_batches, elapsed_s = 0, 0.0
            started, cpu_started = time.perf_counter(), time.process_time()
            while num_batches < 2 or elapsed_s < self.seconds:
                num_batches += 1
                stream.will_load(self._start + num_batches + 1, reader)
                stream.load(self._start + num_batches, timed_reader, images)
                elapsed_s = time.perf_counter() - started
                self.progress.show(min(1, elapsed_s / self.seconds))
            cpu_s = time.process_time() - cpu_started
        self._start += num_batches + 1
        num_images = num_batches * self.batch_size
        ms = {name: 1e3 * seconds / num_images for name, seconds in spent.items()}
        all_ms, cpu_ms = 1e3 * elapsed_s / num_images, 1e3 * cpu_s / num_images
        self.progress.end(f"{all_ms:.2f} ms per image")
        stages = Stages(
            read=ms["read"],
            decode=ms["decode"],
            resize=ms["resize"] + ms["jitter"],
            batch=all_ms - sum(ms.values()),
            hand_over=max(0.0, (cpu_ms_of_one_worker or 0.0) - cpu_ms),
        )
        other_ms = max(0.0, all_ms - ms["read"] - cpu_ms)
        return {"stages": stages, "jitter_ms": ms["jitter"], "other_ms": other_ms}

    def survey(self) -> dict[str, float]:
        """Mean bytes and pixels of some images, and the pixels that are needed of them."""
        found = []
        refs, _ = self.order.at(np.arange(min(_MAX_SURVEYED, self.order.num_samples)))
        with closing(self._stream().open_reader()) as reader:
            for number in refs.number.tolist():
                data, _ = reader.read(number)
                try:
                    image = inspect_image(data)
                except DataError:
                    continue  # training passes over it, too
                pixels = image.height * image.width
                side = ROOM * self.transform.image_size / min(image.height, image.width)
                found.append((len(data), pixels, pixels * min(1, side) ** 2))
        means = np.mean(found or [(0, 1, 1)], axis=0).tolist()
        return dict(zip(("stored_bytes", "stored_pixels", "needed_pixels"), means))

    def _stream(self, transform: "TimedTransform | None" = None) -> ShardStream:
        return ShardStream(
            self.dataset,
            self.order,
            batch_size=self.batch_size,
            transform=transform or self.transform,
            start=self._start,
        )


class TimedReader:
    """A reader whose reading is timed: seconds are added to spent["read"]."""

    def __init__(self, reader: SampleReader, spent: Counter):
        self.reader, self.spent = reader, spent

    def read(self, number: int) -> tuple[bytes, int]:
        started = time.perf_counter()
        found = self.reader.read(number)
        self.spent["read"] += time.perf_counter() - started
        return found

    def describe(self, number: int) -> dict:
        return self.reader.describe(number)


class TimedTransform:
    """A training transform, its parts timed: seconds are added to `decode`, `resize`, `jitter`."""

    def __init__(self, transform: TrainTransform, spent: Counter):
        self.transform, self.spent = transform, spent
        self.image_size, self.NUM_DRAWS = transform.image_size, transform.NUM_DRAWS

    def __call__(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        started = time.perf_counter()
        pixels = self.transform.crop(data, draws)
        decoded = time.perf_counter()
        image = self.transform.resize(pixels, draws)
        resized = time.perf_counter()
        image = self.transform.jitter(image, draws)
        self.spent["decode"] += decoded - started
        self.spent["resize"] += resized - decoded
        self.spent["jitter"] += time.perf_counter() - resized
        return image


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, as in a loader's worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Progress:
    """All measurements: a bar on a terminal, elsewhere a line after each; on stderr."""

    def __init__(self, num_measurements: int):
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        self._bar = tqdm(total=num_measurements, bar_format=layout, disable=None, leave=False)
        self._started, self._total, self._done = time.monotonic(), num_measurements, 0

    def begin(self, title: str) -> None:
        self._title = title
        self._bar.set_description_str(title)

    def watch(self, batches: Iterator[Batch], num_batches: int, batch_size: int) -> Iterator[Batch]:
        """Pass a measurement's batches on, and show how far it is."""
        started = time.monotonic()
        for number, batch in enumerate(batches, 1):
            rate = number * batch_size / max(time.monotonic() - started, 1e-9)
            self.show(min(1, number / num_batches), f"{rate:,.0f} images/s")
            yield batch

    def show(self, share: float, result: str = "") -> None:
        """Display that this share of the measurement is done."""
        self._bar.set_postfix_str(result, refresh=False)
        self._bar.update(self._done + share - self._bar.n)

    def end(self, result: str) -> None:
        self.show(1, result)
        self._done += 1
        if self._bar.disable:
            left_s = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            done = f"{self._done} of {self._total}"
            click.echo(f"{self._title}: {result} ({done}, {left_s:.0f} s left)", err=True)

    def close(self) -> None:
        self._bar.close()
