"""Whatever the source, the same images become the same samples: bytes and class name."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from parquet_sets import CLASS_NAMES, image_table, save_to_disk, sorted_rows, write_split
from test_conversion import convert
from test_folder import found

from wds_convnext.check.verify import verify


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The same twelve images as each kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    images, labels = sorted_rows(12)
    table = image_table(images, labels)
    write_split(folder / "parquet", "train", table)
    save_to_disk(folder / "saved", table)
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / "photos" / CLASS_NAMES[label] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    for kind in ("zip", "tar", "gztar"):
        shutil.make_archive(str(folder / "photos"), kind, folder, "photos")
    convert(str(folder / "parquet"), folder / "shards", num_shards=3)
    return folder


@pytest.mark.parametrize(
    "name", ["saved", "photos", "photos.zip", "photos.tar", "photos.tar.gz", "shards"]
)
def test_every_source_gives_the_samples_of_the_parquet_files(sources, tmp_path, name):
    """Each once, whatever their order; and shrunk from each of them the same."""
    for options in ({}, {"max_side": 8}):
        out = tmp_path / str(len(options))
        convert(str(sources / "parquet"), out / "expected", **options)

        convert(str(sources / name), out / "out", **options)

        assert Counter(found(out / "out")) == Counter(found(out / "expected"))
        against = verify(str(out / "out"), against=str(sources / name), jobs=1, quiet=True)
        assert against.problems == ()
    assert os.path.getsize(tmp_path / "1/out/train.sources") == 12 * 8
