"""Write a small real data set, offline, in the layout of timm/mini-imagenet's parquet files.

scikit-learn's handwritten digits (1,797 scans of 8x8 pixels, 10 classes; UCI ML repository,
Alpaydin and Kaynak 1998), enlarged to 32x32 PNG, stored sorted by class, several files per split.
"""

import io
import json
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FILES_PER_SPLIT = {"train": 3, "validation": 2, "test": 2}
ROWS_PER_GROUP = 100


def encode_png(pixels: np.ndarray) -> bytes:
    """A scan, float (8, 8) in 0..16, as a 32x32 RGB PNG."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    file = io.BytesIO()
    grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG")
    return file.getvalue()


def split_rows(labels: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Row numbers per split, 70 / 10 / 20 %, each sorted by class."""
    order = rng.permutation(len(labels))
    train, validation = int(0.7 * len(order)), int(0.8 * len(order))
    parts = np.split(order, [train, validation])
    return {
        split: part[np.argsort(labels[part], kind="stable")]
        for split, part in zip(FILES_PER_SPLIT, parts)
    }


def schema() -> pa.Schema:
    """mini-imagenet's columns, with the class names where Hugging Face datasets puts them."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": CLASS_NAMES, "_type": "ClassLabel"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write the digits data set to the folder OUT."""
    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in split_rows(digits.target, np.random.default_rng(0)).items():
        num_files = FILES_PER_SPLIT[split]
        for number, part in enumerate(np.array_split(rows, num_files)):
            images = [
                {"bytes": encode_png(digits.images[row]), "path": f"{row:05d}.png"} for row in part
            ]
            columns = {"image": images, "label": digits.target[part].tolist()}
            table = pa.table(columns, schema=schema())
            path = out / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
            pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
        click.echo(f"{split}: {len(rows)} images in {num_files} files")


if __name__ == "__main__":
    main()
