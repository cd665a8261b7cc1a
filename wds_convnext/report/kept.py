"""The predictions for a split, kept as parquet in the model's folder: nothing is computed twice."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from wds_convnext.config.models import UseConfig
from wds_convnext.errors import DataError
from wds_convnext.files import replacing, unwritable
from wds_convnext.progress import Progress, warn
from wds_convnext.report.classifier import Classifier
from wds_convnext.report.listing import list_dataset
from wds_convnext.shards.dataset import Dataset
from wds_convnext.stream.workers import num_workers
from wds_convnext.training.feed import loading
from wds_convnext.training.scores import EvalResult

_FORMAT = 1
_LEAST = float(np.finfo(np.float16).min)  # less would be infinite
FOLDER = "report"  # in the folder of a run


@dataclass(frozen=True)
class Predictions:
    """What a model says of every sample of a split, in the order of their numbers.

    Attributes:
        labels: int32 (num_samples,).
        guesses: int32 (num_samples,), the likeliest class; -1 for a sample that does not decode.
        log_probabilities: float16 (num_samples, num_classes), rounded from float32.
        losses: float32 (num_samples,), cross-entropy in nats, NaN for one that does not decode.
        about: plain values: what was computed, on what, how.
    """

    labels: np.ndarray
    guesses: np.ndarray
    losses: np.ndarray
    log_probabilities: np.ndarray
    about: dict[str, Any]

    @property
    def is_read(self) -> np.ndarray:
        return self.guesses >= 0

    @property
    def is_right(self) -> np.ndarray:
        return self.guesses == self.labels

    @property
    def confidences(self) -> np.ndarray:
        """The probability of the likeliest class, float32 (num_samples,)."""
        return np.exp(self.log_probabilities.max(axis=1).astype(np.float32))

    def result(self) -> EvalResult:
        """The same that eval counts.

        Raises:
            DataError: if no sample decodes.
        """
        read = self.is_read
        if not read.any():
            raise DataError("No sample of the split decodes, so there is nothing to report.")
        own = np.take_along_axis(self.log_probabilities, self.labels[:, None], axis=1)
        in_top5 = (self.log_probabilities > own).sum(axis=1) < 5
        return EvalResult(
            top1=float(self.is_right[read].mean()),
            top5=float(in_top5[read].mean()),
            loss=float(self.losses[read].mean(dtype=np.float64)),
            num_samples=int(read.sum()),
        )


def predictions_of(
    classifier: Classifier, dataset: Dataset, folder: Path, config: UseConfig
) -> Predictions:
    """The predictions for a split: from the folder if they are kept there, else computed and kept.

    They are of these weights, pixels, samples and precision; others are others' files.

    Args:
        folder: is made if it is not there. Where it cannot be written to, a line says so.
    """
    about = {
        "format": _FORMAT,
        "model": classifier.stored.digest(),
        "dataset": dataset.digest,
        "precision": classifier.machine.amp,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"predictions-{key}.parquet"
    if (kept := _read(path, about)) is not None:
        return kept
    found = _compute(classifier, dataset, config, about)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, found)
    except OSError as error:
        warn(f"The predictions are not kept: {unwritable(path, error)}")
    return found


def _compute(
    classifier: Classifier, dataset: Dataset, config: UseConfig, about: dict[str, Any]
) -> Predictions:
    num_samples, num_classes = len(dataset), len(classifier.class_names)
    guesses = np.full(num_samples, -1, dtype=np.int32)
    losses = np.full(num_samples, np.nan, dtype=np.float32)
    log_probabilities = np.zeros((num_samples, num_classes), dtype=np.float16)
    labels = torch.from_numpy(dataset.labels.astype(np.int64))
    start = 0
    with tempfile.TemporaryDirectory(prefix="wds_convnext-") as folder:
        images = list_dataset(dataset, folder, batch_size=config.batch_size)
        stream = classifier.stream(images, batch_size=config.batch_size)
        workers = min(num_workers(config.workers), images.num_batches)
        with (
            Progress(f"Predicting {dataset.split}", total=num_samples, quiet=config.quiet) as shown,
            loading(stream, workers, classifier.machine) as batches,
        ):
            for batch in batches:
                num = min(config.batch_size, num_samples - start)
                stop, read = start + num, batch.is_real[:num].cpu().numpy()
                rows = classifier.logits(batch.images)[:num].log_softmax(dim=1).cpu()
                own = -rows.gather(1, labels[start:stop, None])[:, 0]
                guesses[start:stop] = np.where(read, rows.argmax(dim=1).numpy(), -1)
                losses[start:stop] = np.where(read, own.numpy(), np.nan)
                log_probabilities[start:stop] = rows.clamp(min=_LEAST).numpy()
                start = stop
                shown.add(num)
    return Predictions(dataset.labels, guesses, losses, log_probabilities, about)


def _write(path: Path, found: Predictions) -> None:
    num_samples, num_classes = found.log_probabilities.shape
    flat = pa.array(found.log_probabilities.reshape(-1))
    columns = {
        "label": pa.array(found.labels),
        "guess": pa.array(found.guesses),
        "loss": pa.array(found.losses),
        "log_probabilities": pa.FixedSizeListArray.from_arrays(flat, num_classes),
    }
    table = pa.table(columns).replace_schema_metadata({"about": json.dumps(found.about)})
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=10_000)


def _read(path: Path, about: dict[str, Any]) -> Predictions | None:
    """The predictions in a file; None if it is not there, or not whole, or of something else."""
    try:
        table = pq.read_table(path)
        if json.loads(table.schema.metadata[b"about"]) != about:
            return None
        plain = {name: table[name].to_numpy() for name in ("label", "guess", "loss")}
        column = table["log_probabilities"].combine_chunks()
        rows = column.flatten().to_numpy().reshape(table.num_rows, -1)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    return Predictions(plain["label"], plain["guess"], plain["loss"], rows, about)
