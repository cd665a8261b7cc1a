"""What a run reports: lines, scalars, images and a progress bar."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from wds_convnext import progress
from wds_convnext.files import format_json, write_atomically
from wds_convnext.training.evaluate import EvalResult

# How the progress line shows what `gauges` reads.
READINGS = {
    "train/tflops_per_s": "{:.3g} TFLOP/s",
    "train/mfu": "mfu={:.0%}",
    "train/optimizer_ms": "optimizer={:.1f}ms",
    "train/memory_gb": "{:.2f} GB",
}


class Stopwatch:
    """Time since the last lap, and how much of it was spent waiting for data."""

    def __init__(self):
        self.lap()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and seconds of waiting among them."""
        now = time.perf_counter()
        seconds, waited = now - getattr(self, "_start", now), getattr(self, "_waited", 0.0)
        self._start, self._waited = now, 0.0
        return seconds, waited

    def wait_for(self, iterator):
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

        self._metrics = _open_cut_back(folder / "metrics.jsonl", start_step)
        self._bad_samples = _open_cut_back(folder / "bad_samples.jsonl", start_step)
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
    ) -> None:
        """Log one interval's means and the machine's readings, under TensorBoard's names."""
        if self.quiet:
            return
        self._record(step, values | readings)
        parts = [
            f"loss={values['train/loss']:.4f}",
            f"avg={values['train/avg_loss']:.4f}",
            f"lr={values['train/lr']:.6f}",
            f"{values['train/images_per_s']:.0f} images/s",
            f"wait={values['train/data_wait']:.0%}",
        ]
        parts += [READINGS[name].format(value) for name, value in readings.items()]
        if self._progress is not None and self._progress.has_bar:
            self._progress.show(self._progress.done, note=", ".join(parts))
        else:
            self.say(f"Epoch {epoch} step {step}/{num_steps}: {', '.join(parts)}")

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
        if not math.isfinite(result.loss):
            self.say("The loss is not finite, so these weights are no candidate for best.pt.")
        self.say(f"Best Accuracy: {best_top1:.2%}" if best_top1 >= 0 else "Best Accuracy: none yet")

    def images(self, step: int, images: torch.Tensor) -> None:
        """A grid of training images, float (B, 3, H, W) in [0, 1]."""
        if self.quiet:
            return
        self._writer.add_images("train/images", images[:16].cpu(), step)

    def bad_samples(self, samples: list[dict]) -> None:
        """Write replaced samples to bad_samples.jsonl; each names its step."""
        if self.quiet:
            return
        self._bad_samples.writelines(json.dumps(sample) + "\n" for sample in samples)
        self._bad_samples.flush()

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        self._end_progress()
        if not self.quiet:
            self._metrics.close()
            self._bad_samples.close()
            self._writer.close()

    def flush(self) -> None:
        """Bring everything logged so far to disk."""
        if not self.quiet:
            self._writer.flush()
            os.fsync(self._metrics.fileno())

    def _record(self, step: int, values: dict[str, float]) -> None:
        if self.quiet:
            return
        self._metrics.write(format_json({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _open_cut_back(path: Path, last_step: int):
    """Open a JSON-lines file for appending, without its lines of later steps."""
    lines = path.read_text().splitlines() if path.exists() and last_step else []
    kept = [line for line in lines if _step_of(line) <= last_step]
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
    return path.open("a")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a kill cut short
