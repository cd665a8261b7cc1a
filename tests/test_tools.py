"""The programs run from a checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import HANG_S

TOOLS = Path(__file__).parent.parent / "tools"


def make_sample(out: Path) -> list[Path]:
    subprocess.run([sys.executable, TOOLS / "make_sample.py", out], check=True, timeout=HANG_S)
    return sorted(out.glob("*.parquet"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("sample") / "digits")


def test_the_sample_set_is_laid_out_as_mini_imagenet(sample):
    """Several files per split, its columns and types, class names in the metadata."""
    schema = pq.read_schema(sample[0])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]

    assert [path.name for path in sample][-2:] == [
        "validation-00000-of-00002.parquet",
        "validation-00001-of-00002.parquet",
    ]
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("label").type) == "int64"
    assert features["label"]["names"][3] == "three"


def test_the_sample_set_is_sorted_by_class_and_splits_share_no_image(sample):
    """As real sets often are; 1,797 scans in all."""
    paths = []
    for split in ("train", "validation", "test"):
        tables = [pq.read_table(p) for p in sample if p.name.startswith(split)]
        labels = [label for table in tables for label in table["label"].to_pylist()]
        paths += [row["path"] for table in tables for row in table["image"].to_pylist()]
        assert labels == sorted(labels) and set(labels) == set(range(10))
    assert len(paths) == len(set(paths)) == 1797


def test_the_sample_set_is_the_same_bytes_every_time(sample, tmp_path):
    again = make_sample(tmp_path / "digits")

    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in sample]


def test_the_download_ends_in_one_line_without_network(tmp_path):
    """What to do is said; exit code 2."""
    result = subprocess.run(
        [sys.executable, TOOLS / "download_data.py", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "", "HOME": str(tmp_path)},
    )

    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "make data" in result.stderr and "make demo" in result.stderr
