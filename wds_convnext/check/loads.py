"""Training's loader as `bench` measures it: by number of workers, and stage by stage."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from wds_convnext.check.measure import LoaderCost, measure_loader
from wds_convnext.progress import Progress
from wds_convnext.shards.boxdecoder import box_decoder
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream
from wds_convnext.stream.transforms import TrainTransform
from wds_convnext.stream.workers import NUM_SLOTS

_MIN_BATCHES = 3  # under the clock
Seconds = defaultdict[str, float]  # by stage


@dataclass(frozen=True)
class WorkerRate(LoaderCost):
    """What the loader costs with a number of workers."""

    workers: int


@dataclass(frozen=True)
class Stages:
    """Milliseconds of one worker per image.

    All but the last are wall time, on one thread. `hand_over` is what the loader with one worker
    costs beyond them in CPU time, in both processes: its CPU time less theirs, at least 0 (and 0
    where CPU time is not known).
    """

    read: float  # bytes and label
    decode: float  # of the rows that the crop needs
    resize: float  # with flip
    jitter: float
    batch: float  # order, draws, writing into the batch
    hand_over: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def largest(self) -> str:
        """The name of the stage that takes most of the time."""
        return max(asdict(self).items(), key=lambda stage: stage[1])[0]


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
        progress: Progress,
    ):
        self.dataset, self.order, self.transform = dataset, order, transform
        self.batch_size, self.seconds, self.progress = batch_size, seconds, progress
        self._start = 0  # the first batch that nothing has read yet
        self._num_measured = 0

    def rate(self, workers: int) -> WorkerRate:
        """What the loader costs with so many workers.

        They make batches side by side, so rounds of a batch from each are taken: one to start,
        one to learn how many fill the time, and those.
        """
        side_by_side = max(1, workers)
        per_round = side_by_side * self.batch_size
        self._show(0, f"--workers {workers}")
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
                self._watch(batches, num_batches + 1),
                batch_size=self.batch_size,
                num_images=num_batches * self.batch_size,
                warmup_batches=0,
            )
        self._start += 2 * side_by_side + 1 + num_batches + NUM_SLOTS * workers
        self._num_measured += 1
        peaks = [c.peak_pss_mib for c in (first, cost) if c.peak_pss_mib is not None]
        return WorkerRate(
            images_per_s=cost.images_per_s,
            cpu_ms_per_image=cost.cpu_ms_per_image,
            peak_pss_mib=max(peaks, default=None),
            first_batch_s=first.first_batch_s,
            workers=workers,
        )

    def stages(self, cpu_ms_of_one_worker: float | None) -> Stages:
        """Where the time of one worker goes.

        The way is that of a worker, within this process: the stream's own `load`, on one thread,
        into memory that was touched before. What is left of its time is the batch's.

        Args:
            cpu_ms_of_one_worker: per image, of the loader with one worker.
        """
        spent: Seconds = defaultdict(float)
        stream = self._stream(TimedTransform(self.transform, spent))
        images = stream.new_images()
        self._show(0, "stages")
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
                self._show(elapsed_s / self.seconds)
            cpu_s = time.process_time() - cpu_started
        self._start += num_batches + 1
        self._num_measured += 1
        num_images = num_batches * self.batch_size
        ms = {name: 1e3 * seconds / num_images for name, seconds in spent.items()}
        all_ms, cpu_ms = 1e3 * elapsed_s / num_images, 1e3 * cpu_s / num_images
        return Stages(
            **ms,
            batch=all_ms - sum(ms.values()),
            hand_over=max(0.0, (cpu_ms_of_one_worker or 0.0) - cpu_ms),
        )

    def _watch(self, batches: Iterator[Batch], num_batches: int) -> Iterator[Batch]:
        """Pass a measurement's batches on, and show how far it is."""
        for number, batch in enumerate(batches, 1):
            self._show(number / num_batches)
            yield batch

    def _show(self, share: float, note: str | None = None) -> None:
        """Display that this share of the measurement is done."""
        self.progress.show(self._num_measured + min(1, share), note=note)

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

    def __init__(self, reader: SampleReader, spent: Seconds):
        self.reader, self.spent = reader, spent

    def read(self, number: int) -> tuple[bytes, int]:
        started = time.perf_counter()
        found = self.reader.read(number)
        self.spent["read"] += time.perf_counter() - started
        return found

    def describe(self, number: int) -> dict[str, str | int]:
        return self.reader.describe(number)

    def is_known_to_decode(self, number: int) -> bool:
        return self.reader.is_known_to_decode(number)


class TimedTransform:
    """A training transform, its parts timed: seconds are added to `decode`, `resize`, `jitter`."""

    def __init__(self, transform: TrainTransform, spent: Seconds):
        self.transform, self.spent = transform, spent
        self.image_size, self.NUM_DRAWS = transform.image_size, transform.NUM_DRAWS

    def for_known(self) -> "TimedTransform":
        """As in a worker: nothing else happens in this process meanwhile."""
        if self.transform.decoder != "auto" or box_decoder() is None:
            return self
        return TimedTransform(replace(self.transform, decoder="nvimgcodec"), self.spent)

    @property
    def decoder(self) -> str:
        return self.transform.decoder

    def __call__(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        started = time.perf_counter()
        pixels = self.transform.crop(data, draws)
        self.spent["decode"] += time.perf_counter() - started
        return self.finish(pixels, draws)

    def crops(self, images: Sequence[bytes], draws: np.ndarray) -> list[np.ndarray | None]:
        started = time.perf_counter()
        crops = self.transform.crops(images, draws)
        self.spent["decode"] += time.perf_counter() - started
        return crops

    def finish(self, pixels_HWC: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        started = time.perf_counter()
        image = self.transform.resize(pixels_HWC, draws)
        resized = time.perf_counter()
        image = self.transform.augment(image, draws)
        self.spent["resize"] += resized - started
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
