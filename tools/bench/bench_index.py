"""What the index costs at the sizes of ImageNet-1k and ImageNet-21k: opening, reading, memory.

    python tools/bench/bench_index.py --out /dev/shm/bench_index

One shard is written and linked under as many names as there are to be shards, so everything but
the images' total size is real: manifest, index file, tar headers, checksums. A uniform order over
all samples is then read, in a process that imports no torch, and by `ShardStream(decode=False)`.
"""

import resource
import shutil
import time
from pathlib import Path

import click
import numpy as np

from wds_convnext.conversion.tarwriter import ShardWriter
from wds_convnext.files import write_atomically
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.index import index_content
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import Shard
from wds_convnext.stream.order import TrainOrder

SIZES = {"ImageNet-1k": (1_251, 1_024), "ImageNet-21k": (1_400, 10_000)}  # samples, shards
BATCH = 256


def make_shards(folder: Path, samples: int, shards: int, image_bytes: int) -> Path:
    """Equal shards, their manifest and index; gives the manifest's path."""
    folder.mkdir(parents=True)
    first = folder / "train-00000.tar"
    paths = {"sidecar_path": str(folder / "sidecar"), "records_path": str(folder / "records")}
    rng = np.random.default_rng(0)
    with ShardWriter(str(first), **paths) as writer:
        for i in range(samples):
            writer.write(f"{i:09d}", rng.bytes(image_bytes), extension="jpg", label=i % 1000)
    facts = writer.record()
    listed = [Shard(f"train-{i:05d}.tar", **facts) for i in range(shards)]
    for shard in listed[1:]:
        (folder / shard.name).hardlink_to(first)
    records = Path(paths["records_path"]).read_bytes()
    names = [shard.name for shard in listed]
    content = index_content([records] * shards, names, listed, checksums=True)
    write_atomically(folder / "train.index", content)
    classes = tuple(map(str, range(1000)))
    Dataset("synthetic", "train", tuple(listed), classes).write_manifest(folder / "train.json")
    return folder / "train.json"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_s(manifest: Path, rounds: int = 5) -> float:
    """Median seconds to open a data set."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        open_dataset(str(manifest))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def read_ms(dataset: Dataset, num_samples: int, *, raw: bool) -> float:
    """CPU ms a sample of a uniform order: order, index and read, checksum included."""
    order = TrainOrder(dataset.sizes, 0, BATCH, len(dataset))
    reader = SampleReader(dataset)
    read = reader.read_raw if raw else reader.read
    order.micro_batch(0, batch_size=BATCH, rank=0, world_size=1)
    started = time.process_time()
    for step in range(num_samples // BATCH):
        refs = order.micro_batch(step, batch_size=BATCH, rank=0, world_size=1)
        for number in refs.number.tolist():
            read(number)
    spent = time.process_time() - started
    reader.close()
    return 1e3 * spent / (num_samples // BATCH * BATCH)


@click.command()
@click.option("--out", required=True, type=Path, help="A folder to make and delete.")
@click.option("--samples", default=25_600, show_default=True, help="Samples read of each.")
@click.option("--image-bytes", default=8_000, show_default=True, help="Bytes of an image.")
def main(out: Path, samples: int, image_bytes: int) -> None:
    """Print one line for each size."""
    print(f"images of {image_bytes:,} bytes; n = 5 for opening, {samples:,} samples read")
    for name, (per_shard, shards) in SIZES.items():
        manifest = make_shards(out / name, per_shard, shards, image_bytes)
        try:
            opening = open_s(manifest)
            dataset = open_dataset(str(manifest))
            before = peak_mb()
            ms = read_ms(dataset, samples, raw=False)
            raw_ms = read_ms(dataset, samples, raw=True)
            print(
                f"{name}: {len(dataset):,} samples in {shards:,} shards, opened in "
                f"{1e3 * opening:.0f} ms; {ms:.3f} ms of CPU a sample, raw {raw_ms:.3f} ms; "
                f"peak memory {before:.0f} MB when opened, {peak_mb():.0f} MB after reading"
            )
        finally:
            shutil.rmtree(out / name)


if __name__ == "__main__":
    main()
