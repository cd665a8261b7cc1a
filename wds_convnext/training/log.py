"""What a run reports: sums kept on the device, and the lines, scalars and bars made of them."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from tqdm import tqdm

from wds_convnext.files import write_atomically
from wds_convnext.training.evaluate import EvalResult

# How the progress line shows what `gauges` reads.
READINGS = {
    "train/tflops_per_s": "{:.3g} TFLOP/s",
    "train/mfu": "mfu={:.0%}",
    "train/optimizer_ms": "optimizer={:.1f}ms",
    "train/memory_gb": "{:.2f} GB",
}


@dataclass(frozen=True)
class Interval:
    """What the host reads of the steps since it last read."""

    loss: float  # mean over the steps that were not skipped; NaN if all were
    grad_norm: float  # likewise
    epoch_loss: float  # mean over the epoch's steps so far
    num_steps: int  # skipped ones included
    num_skipped: int
    last_failed: int  # the last step that was not finite, -1 if there was none in the run
    failed_step: int  # the step that froze the run, -1 if it is not frozen


class StepSums:
    """Sums over steps, on the device, so that a step never waits for the host to read them."""

    def __init__(self, device: torch.device):
        self.interval = torch.zeros(3, device=device)  # loss, gradient norm, steps not skipped
        self.epoch = torch.zeros(2, device=device)  # loss, steps not skipped
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # of the interval
        self.failed_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.last_failed = torch.full((), -1, dtype=torch.int64, device=device)
        self.failed_step = torch.full((), -1, dtype=torch.int64, device=device)

    @property
    def frozen(self) -> torch.Tensor:
        """0-d bool: whether too many steps failed, so that nothing may change any more."""
        return self.failed_step >= 0

    def note_failure(self, failed: torch.Tensor, step: int, *, max_skips: int) -> None:
        """Count a step where `failed` (0-d bool); freeze at the first one over `max_skips`."""
        self.failed_in_a_row = torch.where(failed, self.failed_in_a_row + 1, 0)
        self.last_failed = torch.where(failed, step, self.last_failed)
        first_over = (self.failed_in_a_row > max_skips) & ~self.frozen
        self.failed_step = torch.where(first_over, step, self.failed_step)

    def add(self, *, loss: torch.Tensor, grad_norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Add a step's numbers; of one that is skipped (0-d bool) nothing but the count."""
        one = torch.ones_like(loss)
        self.interval += torch.where(skipped, 0, torch.stack([loss, grad_norm, one]))
        self.epoch += torch.where(skipped, 0, torch.stack([loss, one]))
        self.num_skipped += skipped

    def read(self) -> Interval:
        """The interval's means and counts; here, and at an epoch's end, the host waits."""
        sums = torch.cat([self.interval, self.epoch]).tolist()
        loss, grad_norm, num_added, epoch_loss, epoch_steps = sums
        counts = torch.stack([self.num_skipped, self.last_failed, self.failed_step]).tolist()
        return Interval(
            loss=loss / num_added if num_added else math.nan,
            grad_norm=grad_norm / num_added if num_added else math.nan,
            epoch_loss=epoch_loss / epoch_steps if epoch_steps else math.nan,
            num_steps=int(num_added) + counts[0],
            num_skipped=counts[0],
            last_failed=counts[1],
            failed_step=counts[2],
        )

    def start_interval(self) -> None:
        self.interval.zero_()
        self.num_skipped.zero_()

    def start_epoch(self) -> None:
        self.epoch.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


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
        self._bar = None
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter  # 1 s; workers never pay for it

        self._metrics = _open_cut_back(folder / "metrics.jsonl", start_step)
        self._bad_samples = _open_cut_back(folder / "bad_samples.jsonl", start_step)
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not self.quiet:
            tqdm.write(text) if self._bar is not None else click.echo(text)

    def steps(self, done: int, steps: range, *, epoch: int) -> None:
        """Show that `done` steps of the run are done, the last of them one of this epoch's."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            before = done - 1 - steps.start
            self._bar = tqdm(total=len(steps), desc=f"Epoch {epoch}", unit="batch", initial=before)
        self._bar.update(done - steps.start - self._bar.n)

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
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        elif not sys.stderr.isatty():
            click.echo(f"Epoch {epoch} step {step}/{num_steps}: {', '.join(parts)}")

    def epoch(self, step: int, *, epoch: int, loss: float, seconds: float) -> None:
        """The article's line at the end of an epoch."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._record(step, {"train/epoch_loss": loss})
        self.say(f"Train Epoch: {epoch} | Average Loss: {loss:.4f} | Time: {seconds:.1f}s")

    def validation(self, step: int, *, result: EvalResult, best_top1: float) -> None:
        """The article's lines after a validation. TensorBoard's accuracy is in percent."""
        values = {"val/loss": result.loss, "val/accuracy": 100 * result.top1}
        self._record(step, values | {"val/top5": 100 * result.top5})
        self.say(f"Validation: Loss: {result.loss:.4f} | Acc: {result.top1:.2%}")
        self.say(f"Best Accuracy: {best_top1:.2%}")

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

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
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
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
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
