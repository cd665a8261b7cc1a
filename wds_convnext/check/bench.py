"""`wds-convnext bench`: measures the loader on the user's own shards and machine.

Each number of workers is measured with training's own loader, and one image's way through it with
training's own reader and transform. Every measurement goes on in the order where the one before
stopped, so that none finds in the page cache what another has just brought there (unless the data
set is smaller than what is read in all). What is in the cache from before is read from it.

A loader's processes end before the next one starts; what it leaves in this process is within 20 MB.
Peak memory is that of this process and its workers: much of it is torch; no model is in it. Pages
that other programs share count for less (PSS).
"""

from dataclasses import asdict, dataclass
from typing import Any

from wds_convnext.check.loads import Loads, Stages, WorkerRate
from wds_convnext.config import BenchConfig
from wds_convnext.pool import num_cores
from wds_convnext.progress import Progress
from wds_convnext.shards.opening import open_dataset
from wds_convnext.storage.cache import caching
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.policies import parse_policy
from wds_convnext.stream.transforms import TrainTransform
from wds_convnext.stream.workers import num_workers

_STAGE_NAMES = {"resize": "resize, flip", "batch": "order, batch", "hand_over": "hand-over"}


def bench(spec: str, config: BenchConfig | None = None, **options: Any) -> "BenchReport":
    """Measure the loader with 1, 2, 4, … workers, or with `workers` of them, and one image's way.

    Args:
        spec: shards, as for training.
        config: which loader to measure, and for how long.
        options: fields of `BenchConfig` by name: `seconds=1.0, image_size=64`.
    Raises:
        UsageError: if there are to be more workers than make sense.
        ShardError: if the spec names nothing, or a shard is missing or damaged.
        WdsConvnextError: what else the loader met.
    """
    config = BenchConfig.of(config, options)
    with caching(config):
        return _bench(spec, config)


def _bench(spec: str, config: BenchConfig) -> "BenchReport":
    most = num_workers(config.workers)
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    counts = [*powers, most] if config.workers is None else [config.workers]
    dataset = open_dataset(spec, jobs=num_cores(), quiet=False)
    order = TrainOrder(dataset.sizes, config.seed, config.batch_size, config.shuffle_buffer)
    transform = TrainTransform(
        config.image_size,
        policy=parse_policy(config.auto_augment),
        color_jitter=config.color_jitter,
        decoder=config.decoder,
    )
    measured = sorted({1, *counts})  # one worker in any case: what handing over costs
    with Progress("Measuring", total=len(measured) + 1, unit="measurements") as progress:
        loads = Loads(
            dataset,
            order,
            transform,
            batch_size=config.batch_size,
            seconds=config.seconds,
            progress=progress,
        )
        rates = {count: loads.rate(count) for count in measured}
        stages = loads.stages(rates[1].cpu_ms_per_image)
    return BenchReport(
        dataset=dataset.name,
        split=dataset.split,
        num_samples=len(dataset),
        num_cores=num_cores(),
        batch_size=config.batch_size,
        image_size=config.image_size,
        by_workers=tuple(rates[count] for count in counts),
        stages=stages,
        target_images_per_s=config.target_images_per_s,
    )


@dataclass(frozen=True)
class BenchReport:
    """The figures, as text and as JSON."""

    dataset: str
    split: str
    num_samples: int
    num_cores: int
    batch_size: int
    image_size: int
    by_workers: tuple[WorkerRate, ...]  # ascending
    stages: Stages
    target_images_per_s: float | None

    @property
    def best(self) -> WorkerRate:
        return max(self.by_workers, key=lambda row: row.images_per_s)

    @property
    def enough(self) -> WorkerRate | None:
        """The row with the fewest workers that reaches the target, if one does."""
        if self.target_images_per_s is None:
            return None
        reached = (row for row in self.by_workers if row.images_per_s >= self.target_images_per_s)
        return next(reached, None)

    def lines(self) -> list[str]:
        """The report as text."""
        cores = f"{self.num_cores} CPU core{'s' * (self.num_cores != 1)}"
        return [
            f"{self.dataset}, {self.split} split, {self.num_samples:,} samples: batches of "
            f"{self.batch_size} at {self.image_size} px, on {cores}",
            "",
            *self._rate_lines(),
            "",
            *self._stage_lines(),
            *self._target_lines(),
        ]

    def _rate_lines(self) -> list[str]:
        lines = ["workers  images/s  CPU ms per image  peak PSS MiB  first batch s"]
        for row in self.by_workers:
            cpu = "n/a" if row.cpu_ms_per_image is None else f"{row.cpu_ms_per_image:.2f}"
            memory = "n/a" if row.peak_pss_mib is None else f"{row.peak_pss_mib:,.0f}"
            lines.append(
                f"{row.workers:>7}  {row.images_per_s:>8,.0f}  {cpu:>16}  {memory:>12}  "
                f"{row.first_batch_s:>13.2f}"
            )
        return [*lines, "(memory: of this process and its workers, torch included)"]

    def _stage_lines(self) -> list[str]:
        lines = ["one image in one worker     ms  share"]
        for stage, ms in (asdict(self.stages) | {"all": self.stages.total}).items():
            name = _STAGE_NAMES.get(stage, stage)
            lines.append(f"  {name:<20} {ms:>7.2f}  {ms / self.stages.total:>5.0%}")
        largest = self.stages.largest
        share = getattr(self.stages, largest) / self.stages.total
        name = _STAGE_NAMES.get(largest, largest)
        return [*lines, "", f"largest stage: {name}, {100 * share:.0f} %"]

    def _target_lines(self) -> list[str]:
        if self.target_images_per_s is None:
            return []
        row = self.enough or self.best
        workers = "1 worker" if row.workers == 1 else f"{row.workers} workers"
        verdict = "reached" if self.enough else "not reached"
        return [
            f"target {self.target_images_per_s:,.0f} images/s: "
            f"{verdict}, {row.images_per_s:,.0f} with {workers}"
        ]

    def to_json(self) -> dict:
        content = asdict(self)
        content["stages_ms"] = content.pop("stages")
        return {
            **asdict(self.best),  # workers, images_per_s, …
            **content,
            "largest_stage": self.stages.largest,
            "workers_enough": self.enough and self.enough.workers,
        }
