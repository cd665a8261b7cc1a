"""The loaders that `bench_loader` measures: ours and its peers'.

A loader is a function from a Setting to an endless iterator over batches. None of them comes to the
end of an epoch, where some wait and some do not: real epochs are long, and here they would be three
seconds. Everything is imported where it is used, so that a loader pays for its own imports alone.
"""

import contextlib
import io
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

JITTER = 0.4  # brightness, contrast, saturation, where a loader's name says so
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FFCV_EPOCH = 100_000  # samples
_GROUP = 8  # samples decoded together, as by our workers


@dataclass(frozen=True)
class Setting:
    """What all loaders have in common."""

    formats: Path
    num_images: int
    workers: int
    batch_size: int
    image_size: int


def ours(setting: Setting, *, shards: str = "shards", color_jitter: float = 0.0) -> Iterator:
    """make_loader as training uses it: order, offsets, decode, crop, flip, uint8 batch."""
    from wds_convnext.stream.loader import make_loader

    return make_loader(_our_stream(setting, shards, color_jitter), workers=setting.workers)


def _our_stream(setting: Setting, shards: str = "shards", color_jitter: float = 0.0):
    from wds_convnext.shards.opening import open_dataset
    from wds_convnext.stream.order import TrainOrder
    from wds_convnext.stream.stream import ShardStream
    from wds_convnext.stream.transforms import TrainTransform

    dataset = open_dataset(str(setting.formats / shards / "train.json"))
    order = TrainOrder(dataset.sizes, 0, setting.batch_size, 100_000)
    transform = TrainTransform(setting.image_size, color_jitter=color_jitter)
    return ShardStream(dataset, order, batch_size=setting.batch_size, transform=transform)


def our_threads(setting: Setting) -> Iterator:
    """Our batches made by threads of this process: the worker model that was not chosen."""
    import queue
    import threading

    import torch

    stream = _our_stream(setting)
    torch.set_num_threads(1)

    def work(number: int, made: queue.Queue) -> None:
        with contextlib.closing(stream.open_reader()) as reader:
            for turn in itertools.count(number, len(lines)):
                made.put(stream.load(turn, reader, stream.new_images()))

    lines = [queue.Queue(maxsize=2) for _ in range(max(1, setting.workers))]
    for number, line in enumerate(lines):
        threading.Thread(target=work, args=(number, line), daemon=True).start()
    for line in itertools.cycle(lines):
        yield line.get()


def bare_loop(setting: Setting) -> Iterator:
    """The ceiling: same images, same transform, no loader."""
    from wds_convnext.shards.opening import open_dataset
    from wds_convnext.shards.reader import SampleReader

    dataset = open_dataset(str(setting.formats / "shards" / "train.json"))
    reader = SampleReader(dataset)
    images = [reader.read(number)[0] for number in range(len(dataset))]
    context = multiprocessing.get_context("fork")  # shares the images
    workers = max(1, setting.workers)
    batches_done, batches_to_do = context.Semaphore(0), context.Semaphore(3 * workers)
    for number in range(workers):
        arguments = (images, setting, number, batches_done, batches_to_do)
        context.Process(target=_transform_for_ever, args=arguments, daemon=True).start()
    while True:
        yield batches_done.acquire()
        batches_to_do.release()


def _transform_for_ever(
    images: list[bytes], setting: Setting, number: int, batches_done, batches_to_do
) -> None:
    import torch

    from wds_convnext.stream.transforms import TrainTransform

    torch.set_num_threads(1)
    transform, rng = TrainTransform(setting.image_size).for_known(), np.random.default_rng(number)
    visits = itertools.chain.from_iterable(rng.permutation(len(images)) for _ in itertools.count())
    while True:
        batches_to_do.acquire()
        for start in range(0, setting.batch_size, _GROUP):
            size = min(_GROUP, setting.batch_size - start)
            group = [images[visit] for visit in itertools.islice(visits, size)]
            draws = rng.random((size, transform.NUM_DRAWS))
            crops = [None] * size  # what `crops` leaves to the strict decoder
            if transform.decoder == "nvimgcodec":
                crops = transform.crops(group, draws)
            for data, crop, row in zip(group, crops, draws):
                _ = transform(data, row) if crop is None else transform.finish(crop, row)
        batches_done.release()


def ffcv(setting: Setting) -> Iterator:
    """FFCV with its own file format (JPEGs written again); uint8 batches."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    crop = RandomResizedCropRGBImageDecoder((setting.image_size, setting.image_size))
    repeats = -(-_FFCV_EPOCH // setting.num_images)
    loader = Loader(
        str(setting.formats / "beton" / "train.beton"),
        batch_size=setting.batch_size,
        num_workers=max(1, setting.workers),
        order=OrderOption.RANDOM,  # its choice where the file fits the system's cache
        indices=np.tile(np.arange(setting.num_images), repeats),
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        yield from loader


def webdataset_torchvision(setting: Setting, *, color_jitter: float = 0.0) -> Iterator:
    """webdataset with torchvision's decode_image and v2 transforms; uint8 batches."""
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(setting.image_size, antialias=True), v2.RandomHorizontalFlip()]
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    transform = v2.Compose(steps)

    def decode(sample):
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        return transform(decode_image(data, ImageReadMode.RGB)), int(sample["cls"])

    return _webdataset(setting, lambda samples: samples.map(decode))


def webdataset_recipe(setting: Setting) -> Iterator:
    """webdataset's documented recipe: decode("pil"), torchvision transforms; float batches."""
    from torchvision import transforms

    transform = transforms.Compose([*_pillow_steps(setting), transforms.Normalize(MEAN, STD)])

    def stages(samples):
        return samples.decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int)

    return _webdataset(setting, stages)


def _webdataset(setting: Setting, stages: Callable) -> Iterator:
    import webdataset

    urls = sorted(str(path) for path in (setting.formats / "shards").glob("train-*.tar"))
    samples = webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
    # Filled before the first sample: while it fills, two samples are read for each one given.
    buffer = min(1000, max(1, setting.num_images // max(1, setting.workers)))
    samples = stages(samples.shuffle(buffer, initial=buffer)).batched(setting.batch_size)
    return iter(webdataset.WebLoader(samples, batch_size=None, num_workers=setting.workers))


def article(setting: Setting) -> Iterator:
    """The article's: all bytes in a list, Pillow, ToTensor, DataLoader; float batches."""
    import pyarrow.parquet as pq
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision import transforms

    class ParquetImages(Dataset):
        def __init__(self, files, transform):
            self.samples = []
            for file in files:
                columns = pq.read_table(file).flatten().to_pydict()
                self.samples.extend(zip(columns["image.bytes"], columns["label"]))
            self.transform = transform

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            data, label = self.samples[index]
            return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), label

    files = sorted((setting.formats / "photos").glob("*.parquet"))
    dataset = ParquetImages(files, transforms.Compose(_pillow_steps(setting)))
    return _dataloader(setting, dataset, prefetch_factor=6)


def image_folder(setting: Setting) -> Iterator:
    """torchvision's ImageFolder and DataLoader; float batches."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(_pillow_steps(setting))
    return _dataloader(setting, datasets.ImageFolder(str(setting.formats / "files"), transform))


def _pillow_steps(setting: Setting) -> list:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(setting.image_size)
    return [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]


def _dataloader(setting: Setting, dataset, prefetch_factor: int = 2) -> Iterator:
    from torch.utils.data import DataLoader, RandomSampler

    return iter(
        DataLoader(
            dataset,
            setting.batch_size,
            sampler=RandomSampler(dataset, num_samples=2**40),  # one permutation after another
            num_workers=setting.workers,
            prefetch_factor=prefetch_factor if setting.workers else None,
        )
    )


def dali(setting: Setting) -> Iterator:
    """NVIDIA DALI, CPU pipeline with its file reader; uint8 batches."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    threads = max(1, setting.workers)

    @pipeline_def(batch_size=setting.batch_size, num_threads=threads, device_id=None)
    def pipeline():
        data, label = fn.readers.file(
            file_root=str(setting.formats / "files"),
            random_shuffle=True,
            initial_fill=min(1024, setting.num_images),
        )
        images = fn.decoders.image_random_crop(data, device="cpu", output_type=types.RGB)
        size = [setting.image_size, setting.image_size]
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()
    while True:
        images, label = built.run()
        yield torch.from_numpy(images.as_array()), torch.from_numpy(label.as_array())


@dataclass(frozen=True)
class Loader:
    """A row of the report."""

    batches: Callable[[Setting], Iterator]
    format: str  # a key of bench_formats.FORMATS
    against: tuple[str, ...] = ("ours",)  # which loaders of ours it is compared with
    by_default: bool = True


LOADERS = {
    "ours": Loader(ours, "shards", against=()),
    "ours on shrunk shards": Loader(
        partial(ours, shards="shrunk-shards"), "shrunk-shards", by_default=False
    ),
    "before": Loader(ours, "shards", by_default=False),
    "bare loop": Loader(bare_loop, "shards"),
    "ours in threads": Loader(our_threads, "shards", by_default=False),
    "ours on ffcv jpegs": Loader(partial(ours, shards="ffcv-shards"), "ffcv-shards", against=()),
    "ffcv": Loader(ffcv, "beton", against=("ours", "ours on ffcv jpegs")),
    "webdataset + torchvision": Loader(webdataset_torchvision, "shards"),
    "dali cpu": Loader(dali, "files", against=("ours", "ours on shrunk shards")),
    "article": Loader(article, "photos"),
    "image folder": Loader(image_folder, "files"),
    "webdataset recipe": Loader(webdataset_recipe, "shards"),
    "ours + jitter": Loader(
        partial(ours, color_jitter=JITTER), "shards", against=(), by_default=False
    ),
    "webdataset + jitter": Loader(
        partial(webdataset_torchvision, color_jitter=JITTER),
        "shards",
        against=("ours + jitter",),
        by_default=False,
    ),
}
