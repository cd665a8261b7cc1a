"""The formats that the loaders of `bench_peers` read, all made from the same photographs.

Each is a folder of its own, written next to its place and then renamed: half of one is never read.
"""

import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from wds_convnext.errors import DataError
from wds_convnext.progress import Progress

JPEG_QUALITY = 90  # FFCV's, and that of photographs brought to another size
SHRUNK_SIDE = 512  # pixels
SAMPLES_PER_SHARD, MIN_SHARDS = 125, 16
TILE_WIDTH, TILE_HEIGHT = 500, 375  # an ImageNet photograph
MOSAIC_SOURCES = 1000  # photographs to choose from, also where few mosaics are wanted


def prepare(name: str, formats: Path, write: Callable[[Path, Path], None] | None = None) -> None:
    """Write one format, whole or not at all, after those that it is made from.

    Args:
        formats: the folder of all formats of one data set.
        write: (formats, out) -> None; default: FORMATS[name].
    """
    if (formats / name).exists():
        return
    if write is None:
        made_from, write = FORMATS[name]
        prepare(made_from, formats)
    formats.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=formats) as temporary:
        out = Path(temporary) / name
        out.mkdir()
        write(formats, out)
        out.rename(formats / name)


def write_photos(
    source: Path, num_images: int, photo_size: tuple[int, int] | None, _: Path, out: Path
) -> None:
    """Parquet files of so many images: evenly taken from SOURCE, or repeated; all of one size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(source.glob("train-*.parquet"))
    if not files or set(pq.read_schema(files[0]).names) != {"image", "label"}:
        raise DataError(f"{source}: no train-*.parquet with the columns image and label.")
    num_rows = [pq.read_metadata(file).num_rows for file in files]
    num_taken = min(sum(num_rows), max(num_images, MOSAIC_SOURCES if photo_size else 0))
    rows = np.arange(num_taken) * sum(num_rows) // num_taken
    parts = np.split(rows, np.searchsorted(rows, np.cumsum(num_rows)[:-1]))
    starts = np.cumsum([0, *num_rows])
    table = pa.concat_tables(
        pq.read_table(file).take(part - start) for file, part, start in zip(files, parts, starts)
    )
    encoded = [image["bytes"] for image in table["image"].to_pylist()]
    labels = itertools.cycle(table["label"].to_pylist())
    with ThreadPool(os.cpu_count()) as pool:  # Pillow lets go of the interpreter's lock
        images = itertools.cycle(encoded)
        if photo_size:
            images = pool.imap(partial(_compose, encoded, photo_size), range(num_images))
        _write_parquet(out, zip(images, labels), num_images, table.schema)


def _compose(encoded: list[bytes], size: tuple[int, int], number: int) -> bytes:
    """A JPEG of the size: a mosaic of whole photographs, or where it has one tile, one resized."""
    from PIL import Image

    width, height = size
    columns, rows = max(1, round(width / TILE_WIDTH)), max(1, round(height / TILE_HEIGHT))
    others = np.random.default_rng(number).integers(len(encoded), size=columns * rows - 1)
    mosaic = Image.new("RGB", size)
    for place, chosen in enumerate([number % len(encoded), *others]):
        row, column = divmod(place, columns)
        left, top = column * width // columns, row * height // rows
        right, bottom = (column + 1) * width // columns, (row + 1) * height // rows
        photo = Image.open(io.BytesIO(encoded[chosen])).convert("RGB")
        if (photo.width - photo.height) * (right - left - bottom + top) < 0:
            photo = photo.transpose(Image.Transpose.ROTATE_90)  # upright, where tiles lie
        photo = photo.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        mosaic.paste(photo, (left, top))
    file = io.BytesIO()
    mosaic.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _write_parquet(out: Path, samples: Iterator, num_images: int, schema) -> None:
    """Files of (image, label) in mini-imagenet's layout, one for each shard to be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    progress = Progress(f"{out.name} (parquet)", total=num_images)
    num_files = min(num_images, max(MIN_SHARDS, num_images // SAMPLES_PER_SHARD))
    for number, part in enumerate(np.array_split(np.arange(num_images), num_files)):
        rows = []
        for row, (data, label) in zip(part, samples):
            rows.append({"image": {"bytes": data, "path": f"{row:06d}.jpg"}, "label": label})
            progress.add(1, len(data))
        path = out / f"train-{number:05d}-of-{num_files:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    progress.close()


def _write_shards(formats: Path, out: Path) -> None:
    from wds_convnext.conversion import convert

    convert(str(formats / "photos"), out=str(out), check="decode")


def _write_shrunk_shards(formats: Path, out: Path) -> None:
    from wds_convnext.conversion import convert

    convert(str(formats / "photos"), out=str(out), max_side=SHRUNK_SIDE, check="decode")


def _write_files(formats: Path, out: Path) -> None:
    import pyarrow.parquet as pq

    parts = sorted((formats / "photos").glob("*.parquet"))
    num_images = sum(pq.read_metadata(part).num_rows for part in parts)
    progress = Progress("files", total=num_images)
    for row in itertools.chain.from_iterable(pq.read_table(part).to_pylist() for part in parts):
        folder = out / f"{row['label']:03d}"
        folder.mkdir(exist_ok=True)
        (folder / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        progress.add(1, len(row["image"]["bytes"]))
    progress.close()


def _write_beton(formats: Path, out: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(formats / "files"))
    largest = max(os.path.getsize(path) for path, _ in dataset.samples)
    # A photograph must fit a page, else its writer waits for ever; its own default is 8 MiB.
    page_size = max(2**23, 2 ** (4 * largest).bit_length())
    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=JPEG_QUALITY),
        "label": IntField(),
    }
    writer = DatasetWriter(str(out / "train.beton"), fields, page_size=page_size)
    writer.from_indexed_dataset(dataset)


def _write_ffcv_shards(formats: Path, out: Path) -> None:
    """Shards of the very bytes that FFCV writes into its file."""
    import pyarrow.parquet as pq
    from ffcv.fields.rgb_image import encode_jpeg
    from PIL import Image

    from wds_convnext.conversion import convert

    files = sorted((formats / "files").glob("*/*.jpg"))
    schema = pq.read_schema(next((formats / "photos").glob("*.parquet")))
    samples = (
        (
            encode_jpeg(np.array(Image.open(file).convert("RGB")), JPEG_QUALITY).tobytes(),
            int(file.parent.name),
        )
        for file in files
    )
    photos = out.with_name("ffcv jpegs")
    photos.mkdir()
    _write_parquet(photos, samples, len(files), schema)
    convert(str(photos), out=str(out), check="decode")


FORMATS = {  # what it is made from, and how
    "shards": ("photos", _write_shards),
    "shrunk-shards": ("photos", _write_shrunk_shards),
    "files": ("photos", _write_files),
    "beton": ("files", _write_beton),
    "ffcv-shards": ("files", _write_ffcv_shards),
}
