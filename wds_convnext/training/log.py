"""What a run reports: lines, metrics.jsonl, a progress bar; TensorBoard's part is `board`."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

from wds_convnext import progress
from wds_convnext.errors import CheckpointError
from wds_convnext.files import format_json, unwritable, write_atomically
from wds_convnext.training.batchsheet import BatchSheet
from wds_convnext.training.board import Board
from wds_convnext.training.evaluate import EvalResult, name_bad

if TYPE_CHECKING:
    from wds_convnext.training.run import Run

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
        self._folder = folder
        with self._writing():
            self._metrics, last = self._open_cut_back("metrics.jsonl", start_step)
            self._bad_samples, _ = self._open_cut_back("bad_samples.jsonl", start_step)
            self._board = Board(folder, start_step=start_step)
        # Of a run that is resumed `time` goes on where its last line stands.
        spent = last.get("time")
        self._started = time.monotonic() - (spent if isinstance(spent, int | float) else 0)

    def introduce(self, run: "Run") -> None:
        """Show TensorBoard's readers what is trained, on what, how."""
        if self.quiet:
            return
        with self._writing():
            self._board.introduce(
                run.state.step,
                config=run.config,
                facts=run.facts,
                introduction=run.introduction(),
            )

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
                unit="steps",
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

        The line that is printed fits 80 columns, but for remote shards; what is worth money comes
        first.

        Args:
            seconds_left: until the run's last step.
        """
        if self.quiet:
            return
        self._record(step, values | readings, epoch=epoch)
        parts = [
            f"{values['train/images_per_s']:.0f} images/s",
            f"wait {values['train/data_wait']:.0%}",
            f"{tqdm.format_interval(seconds_left)} left",
            f"loss {values['train/loss']:.4f}",
        ]
        if "train/mfu" in readings:
            parts.insert(2, f"MFU {readings['train/mfu']:.0%}")
        if "remote/hits" in readings:
            gb, hits = readings["remote/fetched_gb"], readings["remote/hits"]
            parts.append(f"fetched {gb:.3g} GB, hits {hits:.1%}")
        if self._progress is not None and self._progress.has_bar:
            self._progress.show(self._progress.done, note=", ".join(parts))
        else:
            self.say(f"Epoch {epoch}, {step}/{num_steps}: {', '.join(parts)}")

    def epoch(self, step: int, *, epoch: int, loss: float, seconds: float) -> None:
        """The article's line at the end of an epoch."""
        self._end_progress()
        self._record(step, {"train/epoch_loss": loss}, epoch=epoch)
        self.say(f"Train Epoch: {epoch} | Average Loss: {loss:.4f} | Time: {seconds:.1f}s")

    def validation(self, step: int, *, epoch: int, result: EvalResult, best_top1: float) -> None:
        """The article's lines after a validation. In metrics the accuracy is in percent."""
        values = {"val/loss": result.loss, "val/accuracy": 100 * result.top1}
        self._record(step, values | {"val/top5": 100 * result.top5}, epoch=epoch)
        self.say(f"Validation: Loss: {result.loss:.4f} | Acc: {result.top1:.2%}")
        if result.left_out:
            self.say(
                f"Left out of the validation, which is of {result.num_samples:,} samples: "
                + name_bad(result.left_out)
            )
        if not math.isfinite(result.loss):
            self.say("The loss is not finite, so these weights are no candidate for best.pt.")
        self.say(f"Best Accuracy: {best_top1:.2%}" if best_top1 >= 0 else "Best Accuracy: none yet")

    def batch(self, step: int, sheet: BatchSheet) -> None:
        """A labeled batch as the model sees it."""
        if self.quiet:
            return
        with self._writing():
            self._board.batch(step, sheet)

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
                self._board.close()

    def flush(self) -> None:
        """Bring everything logged so far to disk."""
        if not self.quiet:
            with self._writing():
                self._board.flush()
                os.fsync(self._metrics.fileno())

    def _record(self, step: int, values: dict[str, float], *, epoch: int) -> None:
        if self.quiet:
            return
        spent = round(time.monotonic() - self._started, 3)
        with self._writing():
            line = format_json({"step": step, "epoch": epoch, "time": spent, **values})
            self._metrics.write(line + "\n")
            self._metrics.flush()
            self._board.scalars(step, values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(unwritable(error.filename or self._folder, error)) from None

    def _open_cut_back(self, name: str, last_step: int) -> tuple[TextIO, dict[str, Any]]:
        """Open a JSON-lines file for appending, without its lines of later steps; and the last."""
        path = self._folder / name
        lines = path.read_bytes().splitlines() if path.exists() and last_step else []
        entries = list(map(_entry_of, lines))
        kept = [(line, e) for line, e in zip(lines, entries) if e and e["step"] <= last_step]
        if odd := entries.count(None):
            self.say(f"{path}: left out {odd} damaged lines.")
        write_atomically(path, b"".join(line + b"\n" for line, _ in kept))
        return path.open("a"), kept[-1][1] if kept else {}


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """A line of a step; None for one that a kill cut short, or that is damaged otherwise."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None
