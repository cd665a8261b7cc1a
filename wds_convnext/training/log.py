"""What a run reports: lines, scalars, images and a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from tqdm import tqdm

from wds_convnext import progress
from wds_convnext.errors import CheckpointError
from wds_convnext.files import format_json, unwritable, write_atomically
from wds_convnext.training.evaluate import EvalResult, name_bad

Item = TypeVar("Item")


class Stopwatch:
    """Time since the last lap, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and seconds of waiting among them."""
        now = time.perf_counter()
        seconds, waited = now - getattr(self, "_start", now), getattr(self, "_waited", 0.0)
        self._start, self._waited = now, 0.0
        return seconds, waited

    def wait_for(self, iterator: Iterator[Item]) -> Item:
        """The iterator's next item; the time until it comes counts as waiting."""
        start = time.perf_counter()
        item = next(iterator)
        self._waited += time.perf_counter() - start
        return item


class RunLog:
    """Writes a run's metrics: metrics.jsonl, TensorBoard, a progress bar, plain lines.

    Only the main rank has one that does anything; `quiet` gives one that writes nothing.
    On a resume everything later than `start_step` is cut off first, so that the files are those
    of an uninterrupted run.
    """

    def __init__(self, folder: Path, *, start_step: int, quiet: bool = False):
        self.quiet = quiet
        self._progress: progress.Progress | None = None  # of the epoch under way
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter  # 1 s; workers never pay for it

        self._folder = folder
        with self._writing():
            self._metrics = self._open_cut_back("metrics.jsonl", start_step)
            self._bad_samples = self._open_cut_back("bad_samples.jsonl", start_step)
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not self.quiet:
            progress.say(text)

    def steps(self, done: int, steps: range, *, epoch: int) -> None:
        """Show that `done` steps of the run are done, the last of them one of this epoch's."""
        if self.quiet:
            return
        if self._progress is None:
            self._progress = progress.Progress(
                f"Epoch {epoch}",
                total=len(steps),
                unit="batches",
                initial=done - 1 - steps.start,
                quiet=not sys.stderr.isatty(),  # elsewhere `interval` says how far it is
            )
        self._progress.show(done - steps.start)

    def interval(
        self,
        step: int,
        values: dict[str, float],
        *,
        readings: dict[str, float],
        epoch: int,
        num_steps: int,
        seconds_left: float,
    ) -> None:
        """Log one interval's means and the machine's readings, under TensorBoard's names.

        The line that is printed fits 80 columns; what is worth money comes first.

        Args:
            seconds_left: until the run's last step.
        """
        if self.quiet:
            return
        self._record(step, values | readings)
        parts = [
            f"{values['train/images_per_s']:.0f} images/s",
            f"wait {values['train/data_wait']:.0%}",
            f"{tqdm.format_interval(seconds_left)} left",
            f"loss {values['train/loss']:.4f}",
        ]
        if "train/mfu" in readings:
            parts.insert(2, f"MFU {readings['train/mfu']:.0%}")
        if self._progress is not None and self._progress.has_bar:
            self._progress.show(self._progress.done, note=", ".join(parts))
        else:
            self.say(f"Epoch {epoch}, {step}/{num_steps}: {', '.join(parts)}")

    def epoch(self, step: int, *, epoch: int, loss: float, seconds: float) -> None:
        """The article's line at the end of an epoch."""
        self._end_progress()
        self._record(step, {"train/epoch_loss": loss})
        self.say(f"Train Epoch: {epoch} | Average Loss: {loss:.4f} | Time: {seconds:.1f}s")

    def validation(self, step: int, *, result: EvalResult, best_top1: float) -> None:
        """The article's lines after a validation. TensorBoard's accuracy is in percent."""
        values = {"val/loss": result.loss, "val/accuracy": 100 * result.top1}
        self._record(step, values | {"val/top5": 100 * result.top5})
        self.say(f"Validation: Loss: {result.loss:.4f} | Acc: {result.top1:.2%}")
        if result.left_out:
            self.say(
                f"Left out of the validation, which is of {result.num_samples:,} samples: "
                + name_bad(result.left_out)
            )
        if not math.isfinite(result.loss):
            self.say("The loss is not finite, so these weights are no candidate for best.pt.")
        self.say(f"Best Accuracy: {best_top1:.2%}" if best_top1 >= 0 else "Best Accuracy: none yet")

    def images(self, step: int, images: torch.Tensor) -> None:
        """A grid of training images, float (B, 3, H, W) in [0, 1]."""
        if self.quiet:
            return
        with self._writing():
            self._writer.add_images("train/images", images[:16].cpu(), step)

    def bad_samples(self, samples: list[dict]) -> None:
        """Write replaced samples to bad_samples.jsonl; each names its step."""
        if self.quiet or not samples:
            return
        with self._writing():
            self._bad_samples.writelines(json.dumps(sample) + "\n" for sample in samples)
            self._bad_samples.flush()

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        self._end_progress()
        if not self.quiet:
            with suppress(OSError):  # what could not be written is tried again
                self._metrics.close()
            with suppress(OSError):
                self._bad_samples.close()
            with suppress(OSError):
                self._writer.close()

    def flush(self) -> None:
        """Bring everything logged so far to disk."""
        if not self.quiet:
            with self._writing():
                self._writer.flush()
                os.fsync(self._metrics.fileno())

    def _record(self, step: int, values: dict[str, float]) -> None:
        if self.quiet:
            return
        with self._writing():
            self._metrics.write(format_json({"step": step, **values}) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(unwritable(error.filename or self._folder, error)) from None

    def _open_cut_back(self, name: str, last_step: int) -> TextIO:
        """Open a JSON-lines file for appending, without its lines of later steps."""
        path = self._folder / name
        lines = path.read_bytes().splitlines() if path.exists() and last_step else []
        steps = list(map(_step_of, lines))
        kept = [line for line, step in zip(lines, steps) if step is not None and step <= last_step]
        if odd := steps.count(None):
            self.say(f"{path}: left out {odd} damaged lines.")
        write_atomically(path, b"".join(line + b"\n" for line in kept))
        return path.open("a")


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for one that a kill cut short, or that is damaged otherwise."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if type(step) is int else None
