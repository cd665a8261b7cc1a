"""Loaders side by side on the same images: images/s, CPU per image, memory, time to first batch.

    python tools/bench_loader.py PARQUET --rounds 7 --workers 2 --json loaders.json

PARQUET is a folder in mini-imagenet's layout, repeated until there are --images of it. Every loader
does RandomResizedCrop(224) and a flip and gives batches; uint8 except where the peer's documented
way is float. Each measurement is a process of its own; rounds go through all loaders in turn, so
that a drift of the machine's speed hits all of them; ratios are taken round by round.

Peers that are not installed are left out: `pip install .[bench]`. FFCV is not in that extra, as it
compiles against system libraries: `apt install libopencv-dev libturbojpeg0-dev pkg-config`, then
`pip install ffcv`. Memory is the peak proportional set size of the whole process tree.
"""

import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click

from wds_convnext.measure import measure_loader, process_tree

BATCH_SIZE = 64
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(work: Path, workers: int) -> Iterator:
    """make_loader as training uses it: order, offsets, decode, crop, flip, uint8 batch."""
    from wds_convnext.order import TrainOrder
    from wds_convnext.reader import open_shards
    from wds_convnext.stream import ShardStream, make_loader
    from wds_convnext.transforms import TrainTransform

    shard_set = open_shards(str(work / "shards" / "train.json"))
    order = TrainOrder(shard_set.sizes, 0, BATCH_SIZE, 100_000)
    stream = ShardStream(
        shard_set, order, batch_size=BATCH_SIZE, transform=TrainTransform(IMAGE_SIZE)
    )
    return make_loader(stream, workers=workers)


def article(work: Path, workers: int) -> Iterator:
    """The article's: all bytes in a list, Pillow, ToTensor, DataLoader; float batches."""
    import pyarrow.parquet as pq
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
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

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = ParquetImages(sorted((work / "parquet").glob("*.parquet")), transform)
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=6 if workers else None,
        persistent_workers=workers > 0,
    )
    return _endless(loader)


def webdataset_torchvision(work: Path, workers: int) -> Iterator:
    """webdataset with torchvision's decode_jpeg and v2 transforms; uint8 batches."""
    import torch
    import webdataset
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(IMAGE_SIZE, antialias=True), v2.RandomHorizontalFlip()]
    )

    def decode(sample):
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        return transform(decode_image(data, ImageReadMode.RGB)), int(sample["cls"])

    return _webdataset(work, workers, lambda dataset: dataset.map(decode), webdataset)


def webdataset_recipe(work: Path, workers: int) -> Iterator:
    """webdataset's documented recipe: decode("pil"), torchvision transforms; float batches."""
    import webdataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def stages(dataset):
        return dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int)

    return _webdataset(work, workers, stages, webdataset)


def _webdataset(work: Path, workers: int, stages: Callable, webdataset) -> Iterator:
    shards = sorted(str(path) for path in (work / "shards").glob("train-*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=100, empty_check=False)
    dataset = stages(dataset.shuffle(1000)).batched(BATCH_SIZE, partial=False)
    return _endless(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def image_folder(work: Path, workers: int) -> Iterator:
    """torchvision's ImageFolder and DataLoader; float batches."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = datasets.ImageFolder(str(work / "files"), transform)
    return _endless(DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers))


def dali(work: Path, workers: int) -> Iterator:
    """NVIDIA DALI, CPU pipeline with its file reader; uint8 batches."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=max(1, workers), device_id=None)
    def pipeline():
        data, label = fn.readers.file(file_root=str(work / "files"), random_shuffle=True)
        images = fn.decoders.image_random_crop(data, device="cpu", output_type=types.RGB)
        images = fn.resize(
            images,
            size=[IMAGE_SIZE, IMAGE_SIZE],
            interp_type=types.INTERP_TRIANGULAR,  # antialiased when it shrinks
        )
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()
    while True:
        images, label = built.run()
        yield torch.from_numpy(images.as_array()), torch.from_numpy(label.as_array())


def ffcv(work: Path, workers: int) -> Iterator:
    """FFCV with its own file format (JPEGs as they are); uint8 batches."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    crop = RandomResizedCropRGBImageDecoder((IMAGE_SIZE, IMAGE_SIZE))
    loader = Loader(
        str(work / "train.beton"),
        batch_size=BATCH_SIZE,
        num_workers=max(1, workers),
        order=OrderOption.QUASI_RANDOM,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return _endless(loader)


def bare_loop(work: Path, workers: int) -> Iterator:
    """Our decode, crop and flip in bare loops over bytes in memory: the ceiling of any loader."""
    queue = multiprocessing.get_context("fork").Queue(maxsize=1000)
    for number in range(max(1, workers)):
        multiprocessing.get_context("fork").Process(
            target=_decode_for_ever, args=(work, number, queue), daemon=True
        ).start()
    while True:
        yield queue.get()


def _decode_for_ever(work: Path, number: int, queue) -> None:
    import numpy as np
    import torch

    from wds_convnext.reader import SampleReader, open_shards
    from wds_convnext.transforms import TrainTransform

    torch.set_num_threads(1)
    shards = open_shards(str(work / "shards" / "train.json")).shards
    reader = SampleReader(shards)
    images = [
        reader.read(number % len(shards), i)[0] for i in range(min(500, shards[0].num_samples))
    ]
    transform, rng = TrainTransform(IMAGE_SIZE), np.random.default_rng(number)
    while True:
        for start in range(0, len(images) - BATCH_SIZE + 1, BATCH_SIZE):
            for data in images[start : start + BATCH_SIZE]:
                transform(data, rng.random(TrainTransform.NUM_DRAWS))
            queue.put(number)


LOADERS = {
    "ours": ours,
    "bare loop": bare_loop,
    "ffcv": ffcv,
    "webdataset + torchvision": webdataset_torchvision,
    "dali cpu": dali,
    "article": article,
    "image folder": image_folder,
    "webdataset recipe": webdataset_recipe,
}
NEEDS = {"ffcv": "ffcv", "dali cpu": "nvidia.dali"}


def _endless(loader) -> Iterator:
    while True:
        yield from loader


def prepare(parquet: Path, work: Path, num_images: int, loaders: list[str]) -> None:
    """Bring the same images into every loader's format, once."""
    import pyarrow.parquet as pq

    from wds_convnext.reshard import reshard

    (work / "parquet").mkdir(parents=True, exist_ok=True)
    files = sorted(parquet.glob("train-*.parquet"))
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    copies = max(1, round(num_images / rows))
    names = [
        f"train-{i:05d}-of-{copies * len(files):05d}.parquet" for i in range(copies * len(files))
    ]
    for i, name in enumerate(names):
        shutil.copyfile(files[i % len(files)], work / "parquet" / name)
    reshard(str(work / "parquet"), str(work / "shards"), jobs=os.cpu_count() or 1, quiet=True)
    if {"image folder", "dali cpu", "ffcv"} & set(loaders):
        _write_files(work)
    if "ffcv" in loaders:
        _write_beton(work)


def _write_files(work: Path) -> None:
    from wds_convnext.reader import SampleReader, open_shards

    shard_set = open_shards(str(work / "shards" / "train.json"))
    reader = SampleReader(shard_set.shards)
    for shard in range(len(shard_set.shards)):
        for sample in range(shard_set.shards[shard].num_samples):
            data, label = reader.read(shard, sample)
            folder = work / "files" / f"{label:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{shard:03d}_{sample:06d}.jpg").write_bytes(data)


def _write_beton(work: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    writer = DatasetWriter(
        str(work / "train.beton"), {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    )
    writer.from_indexed_dataset(ImageFolder(str(work / "files")))


def measure(name: str, work: Path, workers: int, num_images: int) -> dict:
    """One loader in this process: after a warm-up, its rate, CPU time and memory."""
    cost = measure_loader(
        LOADERS[name](work, workers),
        batch_size=BATCH_SIZE,
        num_images=num_images,
        warmup_batches=8 + 4 * workers,
    )
    return asdict(cost)


def _end_at_once() -> None:
    """End this process and its endless workers, without waiting for them."""
    for pid in process_tree(os.getpid())[1:]:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def installed(name: str) -> bool:
    """Whether what a loader needs can be imported."""
    if name not in NEEDS:
        return True
    code = [sys.executable, "-c", f"import {NEEDS[name]}"]
    return subprocess.run(code, capture_output=True).returncode == 0


def report(results: dict[str, list[dict]], json_path: str | None, facts: dict) -> None:
    """A row per loader: median (lowest to highest) images/s, ours as a multiple, the rest."""
    print(f"{'loader':26}{'images/s':>22}{'ours is':>9}{'CPU ms':>8}{'PSS MiB':>9}{'first s':>9}")
    for name, rounds in results.items():
        rates = [r["images_per_s"] for r in rounds]
        ratios = [
            mine["images_per_s"] / other["images_per_s"]
            for mine, other in zip(results["ours"], rounds)
        ]
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        columns = [
            statistics.median(r[key] for r in rounds)
            for key in ("cpu_ms_per_image", "peak_pss_mib", "first_batch_s")
        ]
        print(
            f"{name:26}{spread:>22}{statistics.median(ratios):>8.2f}x"
            f"{columns[0]:>8.2f}{columns[1]:>9,.0f}{columns[2]:>9.2f}"
        )
    if json_path:
        Path(json_path).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


@click.command()
@click.argument("parquet", type=click.Path(exists=True, path_type=Path))
@click.option("--work", default="bench-loader", type=click.Path(path_type=Path), show_default=True)
@click.option("--images", default=3000, show_default=True, help="Images in the data set.")
@click.option("--measure", "measured", default=3000, show_default=True, help="Images per round.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--loaders", default=",".join(LOADERS), show_default=True)
@click.option("--json", "json_path")
@click.option("--one", hidden=True)
def main(parquet, work, images, measured, rounds, workers, loaders, json_path, one) -> None:
    """Measure loaders on the images of PARQUET."""
    if one:
        print(json.dumps(measure(one, work, workers, measured)), flush=True)
        _end_at_once()
    names = [name for name in loaders.split(",") if installed(name)]
    if not (work / "shards" / "train.json").exists():
        prepare(parquet, work, images, names)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [sys.executable, __file__, str(parquet), "--work", str(work)]
            command += ["--workers", str(workers), "--measure", str(measured), "--one", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                results.pop(name)
                names.remove(name)
                break
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    facts = {
        "images": images,
        "workers": workers,
        "batch_size": BATCH_SIZE,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    report(results, json_path, facts)


if __name__ == "__main__":
    main()
