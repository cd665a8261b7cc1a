"""What parquet files are converted to never changes: shards, offsets, index and manifest."""

import hashlib
from pathlib import Path

import pytest
from parquet_sets import read_folder

from wds_convnext.conversion import convert

SOURCE = Path(__file__).parents[1] / "fixtures" / "parquet"  # 12 training rows and 4 test rows


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "13106c893707e1b2468c3664fe89df3bf01ec742f6a8d448419c0fc4f6a22e36"),
        ({"shuffle": False}, "e1b62dbed05a513a24168204b90a87b694a91eaee9596f4f05ced25c066ca29d"),
        (
            {"num_shards": 3, "seed": 5},
            "7372699a36e68a64128259fc0eae100b68b8496644e3bea84d773bc504448554",
        ),
    ],
)
def test_every_byte_is_that_of_the_first_version(tmp_path, options, expected):
    """Of a folder that was converted before there were other sources than parquet files."""
    convert(str(SOURCE), out=str(tmp_path), jobs=1, quiet=True, **options)

    digest = hashlib.sha256()
    for name, content in read_folder(tmp_path).items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    assert digest.hexdigest() == expected
