"""The shards' bytes are those that the standard library writes."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.conversion.tarwriter import ShardWriter, member_header
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import read_samples
from wds_convnext.shards.tar import walk_tar


@given(name=st.from_regex(r"[0-9]{9}\.[a-z]{1,4}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_a_header_is_the_one_of_the_standard_library(name, size):
    """For any key, extension and size."""
    info = tarfile.TarInfo(name)
    info.size = size

    assert member_header(name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_shard_is_the_tar_that_tarfile_writes_and_its_sidecar_agrees(tmp_path):
    """Byte for byte, and the sidecar holds the offsets that a walk over the tar finds."""
    samples = [(f"{i:09d}", bytes([i]) * size, i) for i, size in enumerate((1, 512, 0, 700_000))]
    shard, sidecar = str(tmp_path / "train-000.tar"), str(tmp_path / "train-000.idx")
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    with ShardWriter(shard, sidecar_path=sidecar, records_path=str(tmp_path / "records")) as writer:
        for key, image, label in samples:
            writer.write(key, memoryview(image), extension="jpg", label=label)

    assert (tmp_path / "train-000.tar").read_bytes() == expected.getvalue()
    assert read_samples(shard) == list(walk_tar(shard))
    assert writer.record()["num_bytes"] == len(expected.getvalue())
    assert writer.record()["num_samples"] == 4
    scanned = scan_shard(shard, list(walk_tar(shard)), images=True)
    records = b"".join(sample.record.pack() for sample in scanned)
    assert (tmp_path / "records").read_bytes() == records + bytes(8 * 4)  # no image was shrunk


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    """Neither a file that could be taken for a whole one, nor one that fills the disk."""
    shard, sidecar = tmp_path / "train-000.tar", tmp_path / "train-000.idx"

    with pytest.raises(KeyboardInterrupt), ShardWriter(
        str(shard), sidecar_path=str(sidecar), records_path=str(tmp_path / "records")
    ) as writer:  # fmt: skip
        writer.write("0", b"image", extension="jpg", label=0)
        raise KeyboardInterrupt

    assert not list(tmp_path.iterdir())
