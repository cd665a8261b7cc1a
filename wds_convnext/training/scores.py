"""What an evaluation found, and how it is said: of one checkpoint, or of several in a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wds_convnext.errors import printable
from wds_convnext.stream.stream import BadSample

# What --tta takes of the logits.
VIEWS = {
    "flip": "mean of the logits of the image and its mirror image",
    "flip-shift": "mean of the logits of the image in three places and their mirror images",
}


@dataclass(frozen=True)
class EvalResult:
    """What one pass over a split gave. Accuracies are fractions, 0..1."""

    top1: float
    top5: float
    loss: float  # mean cross-entropy, nats
    num_samples: int  # that were counted
    left_out: tuple[BadSample, ...] = ()  # those that do not decode

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % interval of top1."""
        return wilson_interval(self.top1, self.num_samples)


def wilson_interval(share: float, num_samples: int) -> tuple[float, float]:
    """The 95 % interval of a share of samples (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z, n = 1.959964, num_samples
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / n) ** 2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Score:
    """What one checkpoint achieved: the result, and what was evaluated on what (plain values)."""

    result: EvalResult
    about: dict[str, Any]

    def lines(self) -> list[str]:
        """The score as text."""
        result, about = self.result, self.about
        low, high = result.top1_interval
        lines = [
            f"{about['model']} ({about['checkpoint']}, step {about['step']})",
            f"on {about['dataset']}, {about['split']} split, {result.num_samples:,} samples",
            f"at {_pixels(about)}",
            f"top-1 {result.top1:.2%} (95 % interval {low:.2%} to {high:.2%})",
            f"top-5 {result.top5:.2%}",
            f"loss  {result.loss:.4f}",
        ]
        return [printable(line, limit=2000) for line in lines]

    def to_json(self) -> dict[str, Any]:
        result = self.result
        low, high = result.top1_interval
        return self.about | {
            "top1": result.top1,
            "top1_low": low,
            "top1_high": high,
            "top5": result.top5,
            "loss": result.loss,
            "num_samples": result.num_samples,
        }


def table(scores: Sequence[Score]) -> list[str]:
    """Scores on one split, a line each, with the names of the checkpoints last."""
    about = scores[0].about
    lines = [
        f"on {about['dataset']}, {about['split']} split",
        "       n   top-1  95 % interval       top-5    loss   px   crop  checkpoint",
    ]
    for score in scores:
        result, about = score.result, score.about
        low, high = result.top1_interval
        lines.append(
            f"{result.num_samples:8,} {result.top1:7.2%}  {low:6.2%} to {high:7.2%} "
            f"{result.top5:8.2%} {result.loss:7.4f} {about['image_size']:4d} {about['crop']:6.3f}  "
            f"{about['checkpoint']}, step {about['step']}"
        )
    if about["tta"] != "none":
        lines.append(f"Each the {VIEWS[about['tta']]}.")
    return [printable(line, limit=2000) for line in lines]


def _pixels(about: dict[str, Any]) -> str:
    views = "" if about["tta"] == "none" else f", {VIEWS[about['tta']]}"
    return f"{about['image_size']} px, crop {about['crop']:g}{views}"
