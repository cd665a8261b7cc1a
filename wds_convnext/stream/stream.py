"""The stream of batches: the only module that knows order, reading and decoding.

Worker w of W makes the batches w, w + W, w + 2W, … whole; they are handed over round-robin, so what
the trainer sees does not depend on W. Images cross to the trainer as uint8, through memory that
both sides hold from the start (`workers`). Validation batches come from the same workers, in their
place in the sequence, so nothing waits when a validation starts or ends.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from wds_convnext.errors import DataError, TrainingError, UsageError
from wds_convnext.rng import uniform
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.custom import CustomTransform, Transform
from wds_convnext.stream.order import EvalOrder, TrainOrder
from wds_convnext.stream.sizes import ImageSizes, in_memory_of
from wds_convnext.stream.transforms import TrainTransform

_MAX_REPLACEMENTS = 64
_GROUP = 8  # samples decoded together; what that saves stands in `boxdecoder`
Item = TypeVar("Item")
BadSample = dict[str, str | int]  # shard, key, offset, epoch and reason


class Batch(NamedTuple):
    """One batch of one rank."""

    # uint8 (B, 3, S, S), channels_last, S that of the step; a custom transform's own shape
    images: torch.Tensor
    labels: torch.Tensor  # int64 (B,)
    is_real: torch.Tensor  # bool (B,); False for the padding of a last evaluation batch
    bad_samples: list[BadSample]  # those that were replaced, or left out
    erasures: torch.Tensor | None = None  # int64 (B, 5), see `erasing`; None where there are none

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        named = {"images": self.images, "labels": self.labels, "is_real": self.is_real}
        return named if self.erasures is None else named | {"erasures": self.erasures}


class Reader(Protocol):
    """What a stream takes samples from, as `SampleReader` gives them."""

    def read(self, number: int) -> tuple[bytes, int]: ...

    def describe(self, number: int) -> dict[str, str | int]: ...

    def is_known_to_decode(self, number: int) -> bool: ...


class Source(Protocol):
    """What makes the batches of a stream, by their numbers."""

    def open_reader(self) -> Any: ...

    def will_load(self, number: int, reader: Any) -> None: ...

    def load(self, number: int, reader: Any, images: torch.Tensor) -> Batch: ...


class Stream(Protocol):
    """What a loader takes: which batches to make, in order, and memory for one of them."""

    def turns(self) -> Iterator[tuple[Source, int]]: ...

    def new_images(self) -> torch.Tensor: ...


class _Transforms:
    """What makes a batch's images."""

    def __init__(self, transform: Any):
        self.unknown = transform  # of any bytes

    @cached_property
    def known(self) -> Any:
        """Of bytes that are known to decode; made once there are some, as it may load a library."""
        for_known = getattr(self.unknown, "for_known", None)
        return for_known() if for_known else self.unknown

    @property
    def decodes_groups(self) -> bool:
        decoder = getattr(self.known, "decoder", None)
        return decoder == "nvimgcodec" and hasattr(self.known, "crops")


class ShardStream(IterableDataset[Batch | dict[str, str | bytes]]):
    """Batches of one rank, in the order's order; endless for training, finite for evaluation.

    Args:
        dataset: the shards to read.
        order: which sample comes when.
        transform: `TrainTransform`, `EvalTransform`, or any function of the encoded bytes that
            gives an image (C, H, W); see `custom.CustomTransform`.
        batch_size: samples per batch and rank.
        start: number of the first batch to make (to resume).
        sizes: of the images of each step, for a `TrainTransform` of the largest.
        decode: False gives samples as webdataset's dicts (`__key__`, `__url__`, one entry per
            member, bytes) instead of batches: a first stage for `webdataset.DataPipeline`.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: TrainOrder | EvalOrder,
        *,
        batch_size: int,
        transform: Transform | Callable[[bytes], torch.Tensor | np.ndarray] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        decode: bool = True,
        sizes: ImageSizes | None = None,
    ):
        super().__init__()
        if decode and transform is None:
            raise UsageError("ShardStream: a transform is missing. Give one, or decode=False.")
        if sizes is not None and (
            not isinstance(transform, TrainTransform) or sizes.sizes[-1] != transform.image_size
        ):
            raise UsageError("ShardStream: sizes need a TrainTransform of the last of them.")
        self.dataset = dataset
        self.order = order
        self._transform = transform
        self.place = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
        self.start = start
        self.decode = decode
        self.sizes = sizes
        self._made: dict[int | None, _Transforms] = {}  # by image size
        self.stop: int | None = None
        if isinstance(order, EvalOrder):
            self.stop = order.num_micro_batches(batch_size=batch_size, world_size=world_size)

    def __iter__(self) -> Iterator[Batch | dict[str, str | bytes]]:
        return load_batches(self) if self.decode else self._raw_samples()

    def turns(self) -> Iterator[tuple["ShardStream", int]]:
        """The batches to make, in order: which stream, and its batch number."""
        numbers = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        return ((self, number) for number in numbers)

    def new_images(self) -> torch.Tensor:
        """Memory for the images of any batch, channels_last."""
        channels, height, width = self._image.shape
        shape = (self.place["batch_size"], height, width, channels)
        return torch.empty(shape, dtype=self._image.dtype).permute(0, 3, 1, 2)

    @cached_property
    def transform(self) -> Transform | CustomTransform:
        """What makes images of bytes, and so batches of samples."""
        if self._transform is None or not self.decode:
            raise UsageError("ShardStream(decode=False) has no batches. Iterate over it itself.")
        if isinstance(self._transform, Transform):
            return self._transform
        return CustomTransform(self._transform)

    @cached_property
    def _image(self) -> torch.Tensor:
        """An image as the transform makes them; only its shape and dtype count."""
        if not isinstance(self.transform, CustomTransform):
            size = self.transform.image_size
            return torch.empty((3, size, size), dtype=torch.uint8)
        with closing(self.open_reader()) as reader:
            for number in range(min(len(self.dataset), _MAX_REPLACEMENTS)):
                with suppress(DataError):
                    transforms = self._transforms_of(self.start)
                    return self._load_one(reader, number, np.zeros(1), transforms)[0]
        raise DataError(f"{self.dataset.shards[0].path}: the transform takes none of its samples.")

    def open_reader(self) -> SampleReader:
        return SampleReader(self.dataset)

    def will_load(self, number: int, reader: SampleReader) -> None:
        """Ask the OS to prefetch the bytes of a batch."""
        for sample in self.order.micro_batch(number, **self.place).number.tolist():
            reader.will_read(sample)

    def load(self, number: int, reader: Reader, images: torch.Tensor) -> Batch:
        """One batch of this stream, its images written into the memory of `images`."""
        refs = self.order.micro_batch(number, **self.place)
        numbers, labels = refs.number.tolist(), np.zeros(len(refs), dtype=np.int64)
        transforms = self._transforms_of(number)
        transform = transforms.unknown
        if isinstance(transform, TrainTransform):
            size = transform.image_size
            images = in_memory_of(images, (*images.shape[:2], size, size))
        draws = uniform(self.order.sample_keys(refs), transform.NUM_DRAWS)
        bad_samples: list[BadSample] = []
        real = refs.is_real.nonzero()[0].tolist()
        for start in range(0, len(real), _GROUP):
            group = real[start : start + _GROUP]
            loads = self._load_group(reader, [numbers[i] for i in group], draws[group], transforms)
            for i, loaded in zip(group, loads):
                if loaded is None:
                    load = partial(self._load_one, reader, draws=draws[i], transforms=transforms)
                    loaded, reasons = self.first_good(reader, numbers[i], load)
                    bad_samples += [{**reason, "epoch": int(refs.epoch[i])} for reason in reasons]
                if loaded is None:
                    refs.is_real[i] = False
                    continue
                image, labels[i] = loaded
                # Assigning would repeat a gray image's channel without a word.
                if image.shape != images.shape[1:] or image.dtype != images.dtype:
                    raise UsageError(
                        f"sample {numbers[i]:,}: the transform gives {tuple(image.shape)} of "
                        f"{image.dtype}, and {tuple(images.shape[1:])} of {images.dtype} for the "
                        "data set's first sample. Give all images one shape and dtype."
                    )
                images[i] = image
        for i in (~refs.is_real).nonzero()[0].tolist():
            images[i] = 0  # the memory was another batch's
        erasures = None
        if isinstance(transform, TrainTransform) and transform.random_erasing:
            erasures = torch.from_numpy(np.stack([transform.erasure(row) for row in draws]))
        is_real = torch.from_numpy(refs.is_real)
        return Batch(images, torch.from_numpy(labels), is_real, bad_samples, erasures)

    def _transforms_of(self, number: int) -> _Transforms:
        """What makes the images of a batch, in the size that its step asks for."""
        size = None
        if self.sizes is not None:
            assert isinstance(self.order, TrainOrder)
            num_ranked = self.place["batch_size"] * self.place["world_size"]
            size = self.sizes.at(number * num_ranked // self.order.global_batch_size)
        if size not in self._made:
            transform: Any = self.transform
            if size is not None:
                transform = replace(transform, image_size=size)
            self._made[size] = _Transforms(transform)
        return self._made[size]

    def _load_one(
        self, reader: Reader, sample: int, draws: np.ndarray, transforms: _Transforms
    ) -> tuple[torch.Tensor, int]:
        data, label = reader.read(sample)
        is_known = reader.is_known_to_decode(sample)
        transform = transforms.known if is_known else transforms.unknown
        return transform(data, draws), label

    def _load_group(
        self, reader: Reader, numbers: list[int], draws: np.ndarray, transforms: _Transforms
    ) -> Iterator[tuple[torch.Tensor, int] | None]:
        """What `_load_one` gives for each of a few samples, their crops decoded together.

        None for those that it has to load itself, as they may be refused.
        """
        known = [place for place, n in enumerate(numbers) if reader.is_known_to_decode(n)]
        if not known or not transforms.decodes_groups:
            yield from itertools.repeat(None, len(numbers))
            return
        samples: dict[int, tuple[bytes, int]] = {}
        for place in known:
            with suppress(DataError):
                samples[place] = reader.read(numbers[place])
        transform = transforms.known
        images = [data for data, _ in samples.values()]
        crops = dict(zip(samples, transform.crops(images, draws[list(samples)])))
        for place in range(len(numbers)):
            loaded = None
            if crops.get(place) is not None:
                with suppress(DataError):
                    _, label = samples[place]
                    loaded = transform.finish(crops[place], draws[place]), label
            yield loaded

    def _raw_samples(self) -> Iterator[dict[str, str | bytes]]:
        with closing(self.open_reader()) as reader:
            for _, number in _share_of_this_worker(self.turns()):
                refs = self.order.micro_batch(number, **self.place)
                for sample in refs.number[refs.is_real].tolist():
                    raw, _ = self.first_good(reader, sample, reader.read_raw)
                    if raw is not None:
                        yield raw

    def first_good(
        self, reader: Reader, sample: int, load: Callable[[int], Item]
    ) -> tuple[Item | None, list[BadSample]]:
        """What `load` makes of a sample, and why samples before it could not be used.

        In training a sample that cannot be used is replaced by the next of its shard that can,
        which depends on the shard alone: the stream is the same for any number of workers. In
        evaluation nothing takes its place, and None is returned.
        """
        reasons: list[BadSample] = []
        for candidate in self._candidates(sample):
            try:
                return load(candidate), reasons
            except DataError as error:
                reasons.append({**reader.describe(candidate), "reason": str(error)})
        if self.stop is not None:
            return None, reasons
        raise TrainingError(
            f"{reasons[0]['shard']}: no sample that decodes from {reasons[0]['key']} to "
            f"{reasons[-1]['key']} ({reasons[0]['reason']}). Write the shard again."
        )

    def _candidates(self, sample: int) -> Iterator[int]:
        yield sample
        if self.stop is None:
            shard, _ = self.dataset.locate(sample)
            numbers = self.dataset.numbers_of(shard)
            for attempt in range(1, min(len(numbers), _MAX_REPLACEMENTS)):
                yield numbers[(sample - numbers.start + attempt) % len(numbers)]


class ValidatedStream(IterableDataset[Batch]):
    """A training stream with a whole validation stream after each step that `is_due` names.

    Both have the same batch size; images of validation have the training's final size. With
    `validates_first` it begins with one.
    """

    def __init__(
        self,
        train: ShardStream,
        validation: ShardStream,
        *,
        accumulate: int,
        is_due: Callable[[int], bool],
        validates_first: bool = False,
    ):
        super().__init__()
        self.train, self.validation = train, validation
        self.accumulate, self.is_due = accumulate, is_due
        self.validates_first = validates_first

    def __iter__(self) -> Iterator[Batch]:
        return load_batches(self)

    def turns(self) -> Iterator[tuple[ShardStream, int]]:
        if self.validates_first:
            yield from self.validation.turns()
        for stream, number in self.train.turns():
            yield stream, number
            steps, rest = divmod(number + 1, self.accumulate)
            if not rest and self.is_due(steps):
                yield from self.validation.turns()

    def new_images(self) -> torch.Tensor:
        return self.train.new_images()


def load_batches(
    stream: Stream,
    turns: Iterator[tuple[Source, int]] | None = None,
    next_images: Callable[[], torch.Tensor] | None = None,
) -> Iterator[Batch]:
    """A stream's batches of these turns, their images written into what `next_images` gives.

    A batch's bytes are asked for while the batch before it is decoded: the order is known.

    Args:
        turns: default: all, or in a worker of a DataLoader its share of them.
        next_images: default: new memory for each.
    """
    turns = _share_of_this_worker(stream.turns()) if turns is None else turns
    next_images = next_images or stream.new_images
    with ExitStack() as open_readers:
        readers: dict[Source, Any] = {}
        turn: tuple[Source, int] | None = None
        for coming in itertools.chain(turns, [None]):
            if coming is not None:
                source, number = coming
                if source not in readers:
                    readers[source] = open_readers.enter_context(closing(source.open_reader()))
                source.will_load(number, readers[source])
            if turn is not None:
                source, number = turn
                yield source.load(number, readers[source], next_images())
            turn = coming


def _share_of_this_worker(turns: Iterator[Item]) -> Iterator[Item]:
    worker = get_worker_info()
    return turns if worker is None else itertools.islice(turns, worker.id, None, worker.num_workers)
