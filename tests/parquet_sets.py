"""Small parquet data sets for tests, with real encoded images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASS_NAMES = ("ant", "bee", "cat", "dog")


def encode(number: int, image_format: str = "JPEG", *, size=(24, 18), mode="RGB", **save) -> bytes:
    """An encoded image whose pixels depend on `number`."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, image_format, **save)
    return buffer.getvalue()


def image_table(images, labels, *, class_names=CLASS_NAMES, image="image", label="label"):
    """A table in Hugging Face's layout: struct images, integer labels, names in the metadata."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if data is None else {"bytes": data, "path": f"{i}.jpg"}
            for i, data in enumerate(images)]  # fmt: skip
    table = pa.table({image: pa.array(rows, kind), label: labels})
    features = {image: {"_type": "Image"}}
    if class_names:
        features[label] = {"_type": "ClassLabel", "names": list(class_names)}
    stated = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": stated})


def write_small_source(folder: Path) -> str:
    """40 training rows in three files, and 8 test rows."""
    write_split(folder, "train", image_table(*sorted_rows(40)), num_files=3)
    write_split(folder, "test", image_table(*sorted_rows(8, start=100)))
    return str(folder)


def write_split(folder, split, table, *, num_files=1, row_group_size=7, **options) -> list[Path]:
    """Write a table as `{split}-{i:05d}-of-{n:05d}.parquet`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(num_files):
        begin, end = (k * len(table) // num_files for k in (i, i + 1))
        paths.append(Path(folder) / f"{split}-{i:05d}-of-{num_files:05d}.parquet")
        part = table.slice(begin, end - begin)
        pq.write_table(part, paths[-1], row_group_size=row_group_size, **options)
    return paths


def save_to_disk(folder: Path, table: pa.Table, *, split="train", num_files=2) -> None:
    """What `Dataset.save_to_disk` leaves, as far as it is read: a few rows in each batch."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    for i, name in enumerate(names):
        begin, end = (k * len(table) // num_files for k in (i, i + 1))
        part = table.slice(begin, end - begin)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(part, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def sorted_rows(num_rows: int, *, num_classes: int = 4, start: int = 0):
    """Images, and labels sorted by class, as many real data sets are."""
    images = [encode(start + number) for number in range(num_rows)]
    return images, [number * num_classes // num_rows for number in range(num_rows)]


def read_tar(path) -> list[tuple[str, bytes, int]]:
    """Key, image bytes and label of each sample, by the standard library."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    pairs = zip(members[::2], members[1::2], strict=True)
    return [(image[0].split(".")[0], image[1], int(label[1])) for image, label in pairs]


def read_folder(folder) -> dict[str, bytes]:
    """The content of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }
