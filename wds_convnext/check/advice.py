"""The figures of `wds-convnext bench`, and what follows from them: text, JSON, one advice."""

import math
from dataclasses import asdict, dataclass

from wds_convnext.check.measure import LoaderCost

ROOM = 2  # sides of a crop that fit into the short side of an image stored as small as is sensible

# Shares of the time from which on the advice is about them.
_MUCH_READING, _MUCH_DECODING, _MUCH_JITTER, _MUCH_OTHER = 0.4, 0.2, 0.15, 0.25
_ALIKE = 0.95  # of the best rate: as good as it


@dataclass(frozen=True)
class WorkerRate(LoaderCost):
    """What the loader costs with a number of workers."""

    workers: int


@dataclass(frozen=True)
class Stages:
    """Milliseconds of one worker per image.

    All but the last are wall time, on one thread. `hand_over` is what the loader with one worker
    costs beyond them in CPU time, in both processes: its CPU time less theirs, at least 0 (and 0
    where CPU time is not known, see `measure`).
    """

    read: float  # bytes and label
    decode: float  # of the rows that the crop needs
    resize: float  # with flip and colour jitter
    batch: float  # order, draws, writing into the batch
    hand_over: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class BenchReport:
    """The figures, from which text, JSON and advice follow."""

    dataset: str
    split: str
    num_samples: int
    num_cores: int
    batch_size: int
    image_size: int
    by_workers: tuple[WorkerRate, ...]  # ascending
    stages: Stages
    jitter_ms: float  # of stages.resize
    other_ms: float  # of stages.total, in which the core did something else
    stored_bytes: float  # mean of the encoded images
    stored_pixels: float  # mean of the whole images
    needed_pixels: float  # the same if no short side were over ROOM * image_size
    target_images_per_s: float | None

    @property
    def best(self) -> WorkerRate:
        return max(self.by_workers, key=lambda row: row.images_per_s)

    @property
    def fewest_alike(self) -> WorkerRate:
        """The row with the fewest workers whose rate is about the best."""
        least = _ALIKE * self.best.images_per_s
        return next(row for row in self.by_workers if row.images_per_s >= least)

    @property
    def is_flat(self) -> bool:
        """Whether the most workers measured were not faster than fewer."""
        return self.fewest_alike.workers < self.by_workers[-1].workers

    @property
    def enough(self) -> WorkerRate | None:
        """The row with the fewest workers that reaches the target, if one does."""
        target = self.target_images_per_s or math.inf
        return next((row for row in self.by_workers if row.images_per_s >= target), None)

    @property
    def workers_needed(self) -> int | None:
        """Workers that reach the target: measured, or else taken as linear, a core for each.

        None if there is no target, or none was reached and more workers did not come nearer.
        """
        if self.enough:
            return self.enough.workers
        if self.target_images_per_s is None or self.is_flat:
            return None
        busy = max(1, min(self.best.workers, self.num_cores))
        return math.ceil(self.target_images_per_s / (self.best.images_per_s / busy))

    def rate_without(self, saved_ms: float) -> float:
        """Images/s if each image took so much less of a worker."""
        return self.best.images_per_s * self.stages.total / (self.stages.total - saved_ms)

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
            "",
            *self._target_lines(),
            f"Advice: {advise(self)}",
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
        names = {
            "resize": "resize, flip, jitter",
            "batch": "order, batch",
            "hand_over": "hand-over",
        }
        lines = ["one image in one worker     ms  share"]
        for stage, ms in (asdict(self.stages) | {"all": self.stages.total}).items():
            share = ms / self.stages.total
            lines.append(f"  {names.get(stage, stage):<20} {ms:>7.2f}  {share:>5.0%}")
        return lines

    def _target_lines(self) -> list[str]:
        if self.target_images_per_s is None:
            return []
        found = f"target {self.target_images_per_s:,.0f} images/s: "
        if self.enough:
            found += f"reached, {self.enough.images_per_s:,.0f} with {_workers(self.enough)}"
        else:
            found += f"not reached, {self.best.images_per_s:,.0f} with {_workers(self.best)}; "
            if self.workers_needed is None:
                found += "more did not help"
            else:
                found += f"{self.workers_needed:,} on as many cores might (estimated as linear)"
        return [found, ""]

    def to_json(self) -> dict:
        content = asdict(self)
        content["stages_ms"] = content.pop("stages")
        return {
            **asdict(self.best),  # workers, images_per_s, …
            **content,
            "workers_needed": self.workers_needed,
            "advice": advise(self),
        }


def _workers(row: WorkerRate) -> str:
    return "1 worker" if row.workers == 1 else f"{row.workers} workers"


def advise(report: BenchReport) -> str:
    """The one thing most worth doing, in a line."""
    best, stages, cores = report.best, report.stages, report.num_cores
    target, enough = report.target_images_per_s, report.enough
    if enough and enough.workers == 0:
        return "use --workers 1: with 0 the training step waits while images are decoded."
    if enough:
        return f"use --workers {enough.workers}: that keeps up with the target."
    if report.other_ms >= _MUCH_OTHER * stages.total:
        return (
            f"other programs had the core for {report.other_ms / stages.total:.0%} of the time, "
            "so these figures say little. Measure again when the machine is idle."
        )
    if stages.read >= _MUCH_READING * stages.total:
        return (
            f"reading takes {stages.read / stages.total:.0%} of the time, at "
            f"{report.stored_bytes / stages.read / 1e3:,.0f} MB/s: the disk or network that holds "
            "the shards is slow. Copy them to a local disk."
        )
    needed = report.workers_needed
    if needed and needed <= cores:
        return f"use --workers {needed}: they might reach the target (estimated as linear)."
    unneeded_ms = stages.decode * (1 - report.needed_pixels / report.stored_pixels)
    if unneeded_ms >= _MUCH_DECODING * stages.total:
        return (
            f"the images have {report.stored_pixels / 1e6:.2f} megapixels, "
            f"{report.stored_pixels / report.needed_pixels:.1f} times what crops of "
            f"{report.image_size} px need. Store them with a short side of "
            f"{ROOM * report.image_size}: about {report.rate_without(unneeded_ms):,.0f} images/s."
        )
    without_jitter = report.rate_without(report.jitter_ms)
    jitter = (
        f"colour jitter takes {report.jitter_ms / stages.total:.0%} of the time: "
        f"--color-jitter 0 gives about {without_jitter:,.0f} images/s"
    )
    if target and without_jitter >= target:
        return f"{jitter}, which reaches the target."
    if needed:
        return (
            f"the target needs about {needed:,} cores (estimated as linear), here are {cores}: "
            "use a machine with more, or a smaller --image-size."
        )
    if best.workers > cores:
        return f"use --workers {cores}, one per core: what is beyond only takes turns."
    if report.is_flat:
        return (
            f"use --workers {report.fewest_alike.workers}: more add less than "
            f"{1 - _ALIKE:.0%} on these {cores} cores."
        )
    if report.jitter_ms >= _MUCH_JITTER * stages.total:
        return f"{jitter}. It is a choice: more images, or more varied ones."
    if best.workers < cores:
        more = min(max(1, 2 * best.workers), cores)
        return f"{_workers(best)} leave some of the {cores} cores idle: measure --workers {more}."
    return (
        f"use {_workers(best)}, as many as cores. Decoding takes "
        f"{stages.decode / stages.total:.0%} of the time; only more cores give more images."
    )
