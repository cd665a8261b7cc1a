"""Exact evaluation: every sample once, on any number of ranks, the padding never counted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from wds_convnext.errors import DataError, UsageError, sentence
from wds_convnext.progress import track
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import BadSample, Batch, ShardStream
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.augment import Normalizer
from wds_convnext.training.distributed import (
    Machine,
    World,
    gather_lists,
    sum_over_ranks,
)
from wds_convnext.training.feed import loading
from wds_convnext.training.scores import EvalResult

_NUM_NAMED = 10  # samples that a message names


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int,
    normalizer: Normalizer,
    autocast: Callable[[], AbstractContextManager],
    world: World,
) -> EvalResult:
    """Run a model over this rank's batches of a split, and sum over ranks.

    Args:
        model: images float32 (B, 3, S, S) -> logits (B, num_classes).
        batches: on the model's device; the same number on every rank.
        num_classes: of the split; the model may have more.
        normalizer: uint8 images -> what the model takes.
        autocast: a function that gives the context to run the model in.
    Raises:
        UsageError: if the model has fewer classes than the split.
        DataError: if there is no sample to count.
    """
    model.eval()
    sums: torch.Tensor | None = None
    bad_samples: list[BadSample] = []
    for batch in batches:
        with autocast():
            logits = model(normalizer(batch.images))
        if logits.shape[-1] < num_classes:
            raise UsageError(
                f"the model has {logits.shape[-1]} classes, and the split {num_classes}. "
                "Evaluate it on the data set that it was trained on."
            )
        counts = _count(logits.float(), batch.labels, batch.is_real)
        sums = counts if sums is None else sums + counts
        bad_samples += batch.bad_samples
    assert sums is not None  # a data set has samples, so every rank has a batch
    left_out = tuple(gather_lists(bad_samples, world))
    top1, top5, loss, num_samples = sum_over_ranks(sums, world).tolist()
    if num_samples == 0:
        raise DataError(
            f"No sample of the split decodes, so there is nothing to evaluate: {name_bad(left_out)}"
        )
    top1, top5, loss = (total / num_samples for total in (top1, top5, loss))
    return EvalResult(top1, top5, loss, int(num_samples), left_out)


def _count(logits: torch.Tensor, labels: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Sums over the real samples: correct in 1, correct in 5, loss, samples."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels.unsqueeze(1)) & is_real.unsqueeze(1)
    losses = F.cross_entropy(logits, labels, reduction="none").masked_fill(~is_real, 0)
    columns = [hits[:, 0], hits.any(dim=1), losses, is_real]
    return torch.stack([column.to(dtype).sum() for column in columns])


@dataclass(frozen=True)
class Evaluation:
    """How models are evaluated on one split: this rank's batches of it, and on what device."""

    stream: ShardStream
    normalizer: Normalizer
    machine: Machine
    max_bad_samples: float  # share of the split that may be left out for not decoding
    flag: str  # the option that sets it
    quiet: bool = False

    def run(self, forward: nn.Module, batches: Iterator[Batch]) -> EvalResult:
        """Evaluate a model on the stream's batches, which are taken from `batches`.

        Args:
            forward: the model; it is put into evaluation mode.
            batches: on the device. As many are taken as the stream has, so that it may be a
                training loader's with validations in their place.
        Raises:
            DataError: if too many samples do not decode.
        """
        shown = track(
            islice(batches, self.stream.stop),
            f"Evaluating {self.stream.dataset.split}",
            unit="batches",
            total=self.stream.stop,
            quiet=self.quiet or not self.machine.world.is_main,
        )
        result = evaluate_batches(
            forward,
            shown,
            num_classes=self.stream.dataset.num_classes,
            normalizer=self.normalizer,
            autocast=self.machine.autocast,
            world=self.machine.world,
        )
        num_samples = len(self.stream.dataset)
        if len(result.left_out) > self.max_bad_samples * num_samples:
            raise DataError(
                f"{len(result.left_out)} of {num_samples:,} samples of the "
                f"{self.stream.dataset.split} split do not decode, {self.max_bad_samples:g} of "
                f"them may: {name_bad(result.left_out)} Write the shard again, or allow more with "
                f"{self.flag}."
            )
        return result


def name_bad(samples: Sequence[BadSample]) -> str:
    """The first of the samples that do not decode, with the reasons, and a count of the rest."""
    first = [
        f"{bad['shard']}, key {bad['key']}: {sentence(str(bad['reason']))}"
        for bad in samples[:_NUM_NAMED]
    ]
    rest = len(samples) - len(first)
    return " ".join(first) + (f" And {rest} more." if rest else "")


def open_evaluation(
    dataset: Dataset,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    machine: Machine,
    max_bad_samples: float,
    flag: str,
    decoder: str = "auto",
    quiet: bool = False,
) -> Evaluation:
    """The evaluation of every sample of a split once, over all ranks."""
    stream = ShardStream(
        dataset,
        EvalOrder(dataset.sizes),
        batch_size=batch_size,
        transform=preprocessing.eval_transform(decoder=decoder),
        rank=machine.world.rank,
        world_size=machine.world.size,
    )
    normalizer = Normalizer(preprocessing.mean, preprocessing.std, machine.device)
    return Evaluation(stream, normalizer, machine, max_bad_samples, flag, quiet)


def evaluate(
    model: nn.Module,
    dataset: Dataset | str,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    amp: str = "off",
    max_bad_samples: float = 0.0,
    quiet: bool = False,
) -> EvalResult:
    """Evaluate a model on every sample of a split, once, on the device that it is on.

    Args:
        model: images float32 (B, 3, S, S), normalized -> logits (B, num_classes). It is left in
            evaluation mode.
        dataset: the split, or a spec as `open_dataset` takes it.
        preprocessing: what the model was trained with; by default 224 px, center crop of 0.875,
            ImageNet's mean and std.
        workers: loader processes; by default one per CPU core, at most 16.
        amp: `off`, `bf16`, `fp16` or `auto`. The model is taken as it is: `wds-convnext eval`
            keeps depthwise convolutions in float32 on a CPU, see `precision`.
        max_bad_samples: share of the split that may fail to decode and is left out, 0..1.
    Raises:
        UsageError: if the device cannot do `amp`, or the model has fewer classes than the split.
        DataError: if more samples do not decode.
    """
    if isinstance(dataset, str):
        dataset = open_dataset(dataset, use="validation")
    device = next(model.parameters()).device
    evaluation = open_evaluation(
        dataset,
        batch_size=batch_size,
        preprocessing=preprocessing or Preprocessing(),
        machine=Machine.of(World(), device, amp=amp),
        max_bad_samples=max_bad_samples,
        flag="max_bad_samples",
        quiet=quiet,
    )
    with loading(evaluation.stream, workers, evaluation.machine) as batches:
        return evaluation.run(model, batches)
