"""`wds-convnext predict`: what a model says of many images."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from wds_convnext.config import PredictConfig
from wds_convnext.errors import printable
from wds_convnext.progress import Progress
from wds_convnext.report.classifier import Classifier, Prediction, load_classifier
from wds_convnext.report.listing import (
    ImageList,
    ImageReader,
    Reference,
    list_images,
    name_of,
)
from wds_convnext.report.outputs import (
    Write,
    check_suffix,
    write_json_lines,
    write_table,
    writing,
)
from wds_convnext.stream.workers import num_workers
from wds_convnext.training.feed import loading

_NUM_NAMED = 10  # images that a message names


@dataclass(frozen=True)
class PredictReport:
    """How many images were predicted, and which could not be read."""

    num_images: int
    num_bad: int
    first_bad: tuple[Prediction, ...]  # with their errors

    def __str__(self) -> str:
        lines = [f"{self.num_images:,} images, {self.num_bad:,} of them could not be read."]
        lines += [printable(f"  {bad.image}: {bad.error}", limit=2000) for bad in self.first_bad]
        more = self.num_bad - len(self.first_bad)
        return "\n".join([*lines, f"  and {more:,} more"] if more > 0 else lines)


def predict(
    model: str | None,
    images: Sequence[str],
    config: PredictConfig | None = None,
    **options: Any,
) -> PredictReport:
    """Predict images and print or write what was found, in the images' order.

    Args:
        model: as for `load_classifier`.
        images: files, folders, zips, specs of shards, or `-` for a list on stdin.
        config, options: how, and where to.
    Raises:
        UsageError: if an image that is named is not there, or the output cannot be written.
        CheckpointError, ShardError: if model or shards are not whole.
    """
    config = PredictConfig.of(config, options)
    if config.out is not None:
        check_suffix(config.out)  # before anything is loaded
    size = config.batch_size
    with list_images(images, batch_size=size, quiet=config.quiet) as listed:
        classifier = load_classifier(model, device=config.device, amp=config.amp)
        found = predictions(classifier, listed, config)
        if config.out is None:
            return _hand_over(found, write_json_lines if config.json else write_table)
        with writing(config.out, top=min(config.top, len(classifier.class_names))) as write:
            return _hand_over(found, write)


def _hand_over(found: Iterator[list[Prediction]], write: Write) -> PredictReport:
    num_images = num_bad = 0
    first_bad: list[Prediction] = []
    for some in found:
        write(some)
        bad = [prediction for prediction in some if prediction.error is not None]
        num_images, num_bad = num_images + len(some), num_bad + len(bad)
        first_bad += bad[: _NUM_NAMED - len(first_bad)]
    return PredictReport(num_images, num_bad, tuple(first_bad))


def predictions(
    classifier: Classifier, images: ImageList, config: PredictConfig
) -> Iterator[list[Prediction]]:
    """The predictions of listed images, a list for each batch."""
    stream = classifier.stream(images, batch_size=config.batch_size)
    workers = min(num_workers(config.workers), images.num_batches)
    if images.num_batches == 1 and config.workers is None:
        workers = 0  # a process would take longer to start
    with (
        closing(ImageReader(images.datasets)) as reader,
        Progress("Predicting", total=images.num_images, quiet=config.quiet) as progress,
        loading(stream, workers, classifier.machine) as batches,
    ):
        for number, batch in enumerate(batches):
            references = images.batch(number)
            names = [name_of(reference, reader) for reference in references]
            errors = {int(bad["position"]): str(bad["reason"]) for bad in batch.bad_samples}
            guesses = classifier.guesses(batch.images, top=config.top)
            yield [
                Prediction(name, error=errors[i])
                if i in errors
                else Prediction(name, guesses[i], _label(images, references[i], int(label)))
                for i, (name, label) in enumerate(zip(names, batch.labels.tolist()))
            ]
            progress.add(len(references))


def _label(images: ImageList, reference: Reference, label: int) -> str | None:
    return images.datasets[int(reference[0])].class_names[label] if label >= 0 else None
