"""A model in use: images in, class names and probabilities out, with the pixels that eval uses."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from wds_convnext.conversion.sources.images import read_image
from wds_convnext.errors import CheckpointError, DataError, UsageError
from wds_convnext.report.listing import ImageList, ImageReader
from wds_convnext.stream.stream import BadSample, Batch
from wds_convnext.training.augment import Normalizer
from wds_convnext.training.distributed import Machine, join_world
from wds_convnext.training.stored import StoredModel, open_model

# What PNG keeps as it is; decoding treats these as it does those of an image file.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Guess:
    """A class that an image may be of."""

    class_name: str
    number: int  # of the class
    probability: float  # 0..1, softmax of the logits


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: the likeliest classes first, or why it could not be read."""

    image: str  # its path, its container's path and its name in it, or its number in a list
    guesses: tuple[Guess, ...] = ()
    label: str | None = None  # the name of its class, where it is a sample of a shard
    error: str | None = None

    @property
    def best(self) -> Guess:
        """The likeliest class.

        Raises:
            DataError: if the image could not be read.
        """
        if self.error is not None:
            raise DataError(f"{self.image}: {self.error}")
        return self.guesses[0]

    def to_json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        guesses = [
            {"class": g.class_name, "number": g.number, "probability": g.probability}
            for g in self.guesses
        ]
        return {"image": self.image, "label": self.label, "predictions": guesses}


class Classifier:
    """A model on a device, with its preprocessing and its class names."""

    def __init__(self, stored: StoredModel, machine: Machine):
        self.stored = stored
        self.machine = machine
        self.class_names = stored.class_names
        self.preprocessing = stored.preprocessing
        self._model = machine.place(stored.build())
        mean, std = self.preprocessing.mean, self.preprocessing.std
        self._normalizer = Normalizer(mean, std, machine.device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) -> float32 (B, num_classes), on the device, in its precision.

        Raises:
            CheckpointError: if one of them is NaN or infinite.
        """
        with self.machine.autocast():
            logits = self._model(self._normalizer(images.to(self.machine.device))).float()
        if not logits.isfinite().all():
            raise CheckpointError(
                f"{self.stored.path}: its outputs are not finite in precision {self.machine.amp}. "
                "Take an earlier checkpoint, or, if it was trained in another precision, --amp off."
            )
        return logits

    def predict(
        self,
        images: Iterable[str | os.PathLike | bytes | Image.Image],
        *,
        top: int = 5,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """The likeliest classes of images, in this process.

        Args:
            images: paths, encoded bytes, or Pillow's images. Bytes give exactly the pixels that
                evaluation uses; Pillow has decoded its images itself, which may differ by a bit.
            top: how many classes of each.
        Returns:
            In their order; for an image that cannot be read, a prediction with an `error`.
        Raises:
            UsageError: if an image is something else.
        """
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            images = [images]
        transform = self.preprocessing.eval_transform()
        results: list[Prediction] = []
        remaining = iter(images)
        while some := list(islice(remaining, batch_size)):
            pixels, names, errors = [], [], {}
            for number, image in enumerate(some):
                is_path = isinstance(image, str | os.PathLike)
                names.append(str(image) if is_path else str(len(results) + number))
                try:
                    pixels.append(transform(_encoded(image)))
                except DataError as error:
                    errors[number] = str(error)
            found = self.guesses(torch.stack(pixels), top=top) if pixels else []
            good = iter(found)
            results += [
                Prediction(name, error=errors[number])
                if number in errors
                else Prediction(name, next(good))
                for number, name in enumerate(names)
            ]
        return results

    def guesses(self, images: torch.Tensor, *, top: int) -> list[tuple[Guess, ...]]:
        """The likeliest classes of a batch: uint8 (B, 3, S, S)."""
        probabilities = self.logits(images).softmax(dim=1)
        best = probabilities.topk(min(top, len(self.class_names)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist())
        return [
            tuple(Guess(self.class_names[n], n, p) for n, p in zip(numbers, values))
            for numbers, values in rows
        ]

    def stream(self, images: ImageList, *, batch_size: int) -> "ImageStream":
        """Batches of listed images, with the pixels that evaluation uses."""
        return ImageStream(images, self.preprocessing.eval_transform(), batch_size)


def _encoded(image: object) -> bytes:
    """The bytes of an image file, read or made.

    Raises:
        DataError: if it cannot be read.
        UsageError: if it is no image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        found = read_image(os.fspath(image))
        if isinstance(found, DataError):
            raise found
        return found
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        try:
            whole = image if image.mode in _PNG_MODES else image.convert("RGB")
            whole.save(file, "PNG", compress_level=0)
        except Exception as error:  # an image is decoded here, where Pillow raises anything
            raise DataError(f"does not decode ({error})") from None
        return file.getvalue()
    raise UsageError(f"a {type(image).__name__} is no image: expected a path, bytes or Pillow's.")


class ImageStream:
    """The batches of listed images: a stream for `make_loader`."""

    def __init__(self, images: ImageList, transform: Any, batch_size: int):
        self.images, self.transform, self.batch_size = images, transform, batch_size

    def turns(self) -> Iterator[tuple["ImageStream", int]]:
        return ((self, number) for number in range(self.images.num_batches))

    def new_images(self) -> torch.Tensor:
        size = self.transform.image_size
        return torch.empty((self.batch_size, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def open_reader(self) -> ImageReader:
        return ImageReader(self.images.datasets)

    def will_load(self, number: int, reader: ImageReader) -> None:
        """Ask the OS to prefetch samples of shards; other files are read whole as it is."""
        for reference in self.images.batch(number):
            if isinstance(reference[0], int):
                reader.samples(reference[0]).will_read(int(reference[1]))

    def load(self, number: int, reader: ImageReader, images: torch.Tensor) -> Batch:
        """A batch; labels are -1 where there are none, `bad_samples` have position and reason."""
        references = self.images.batch(number)
        labels = torch.full((self.batch_size,), -1, dtype=torch.int64)
        is_real = torch.zeros(self.batch_size, dtype=torch.bool)
        bad: list[BadSample] = []
        for position, reference in enumerate(references):
            try:
                data, label = reader.read(reference)
                images[position] = self.transform(data)
            except DataError as error:
                bad.append({"position": position, "reason": str(error)})
            else:
                labels[position] = -1 if label is None else label
                is_real[position] = True
        images[~is_real] = 0  # the memory was another batch's
        return Batch(images, labels, is_real, bad)


def load_classifier(
    path: str | os.PathLike | None = None, *, device: str = "auto", amp: str = "auto"
) -> Classifier:
    """A model ready to predict.

    Args:
        path: a run's folder (its best checkpoint), a checkpoint, or a folder that `export` wrote;
            None for the newest run.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        amp: `auto`, `bf16`, `fp16` or `off`, as in evaluation.
    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
        UsageError: if the device is not there, or cannot do `amp`.
    """
    stored = open_model(None if path is None else os.fspath(path))
    return Classifier(stored, one_machine(device, amp))


def one_machine(device: str, amp: str) -> Machine:
    """This process alone on a device.

    Raises:
        UsageError: if the device is not there, or cannot do `amp`; under torchrun.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("WORLD_SIZE: this command runs as one process. Start it without torchrun.")
    world, found = join_world(device)
    return Machine.of(world, found, amp=amp)
