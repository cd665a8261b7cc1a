"""Exact evaluation: every sample once, on any number of ranks, the padding never counted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from wds_convnext.errors import DataError
from wds_convnext.stream.stream import Batch
from wds_convnext.training.distributed import World, sum_over_ranks


@dataclass(frozen=True)
class EvalResult:
    """What one pass over a split gave. Accuracies are fractions, 0..1."""

    top1: float
    top5: float
    loss: float  # mean cross-entropy, nats
    num_samples: int

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % interval of top1 (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
        z, n = 1.959964, self.num_samples
        centre = (self.top1 + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.top1 * (1 - self.top1) / n + (z / n) ** 2 / 4)
        return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def evaluate(model, batches: Iterable[Batch], *, normalizer, autocast, world: World) -> EvalResult:
    """Run a model over this rank's batches of a split, and sum over ranks.

    Args:
        model: images float32 (B, 3, S, S) -> logits (B, num_classes).
        batches: on the model's device; the same number on every rank.
        normalizer: uint8 images -> what the model takes.
        autocast: a function that gives the context to run the model in.
    Raises:
        DataError: if there is no sample to count.
    """
    model.eval()
    sums = None
    for batch in batches:
        with autocast():
            logits = model(normalizer(batch.images))
        counts = _count(logits.float(), batch.labels, batch.is_real)
        sums = counts if sums is None else sums + counts
    top1, top5, loss, num_samples = sum_over_ranks(sums, world).tolist()
    if num_samples == 0:
        raise DataError("No sample of the split decodes, so there is nothing to evaluate.")
    return EvalResult(top1 / num_samples, top5 / num_samples, loss / num_samples, int(num_samples))


def _count(logits: torch.Tensor, labels: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Sums over the real samples: correct in 1, correct in 5, loss, samples."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels.unsqueeze(1)) & is_real.unsqueeze(1)
    losses = F.cross_entropy(logits, labels, reduction="none").masked_fill(~is_real, 0)
    columns = [hits[:, 0], hits.any(dim=1), losses, is_real]
    return torch.stack([column.to(dtype).sum() for column in columns])
