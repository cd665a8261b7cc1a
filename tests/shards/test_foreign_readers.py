"""Others read our shards: webdataset, timm, wids, and Hugging Face datasets."""

import io

import pytest
from parquet_sets import image_table, read_tar, sorted_rows, write_split
from PIL import Image

from wds_convnext.conversion import convert


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with three shards of 13 or 14 training samples."""
    folder = tmp_path_factory.mktemp("foreign")
    write_split(folder / "in", "train", image_table(*sorted_rows(40)), num_files=3)
    convert(str(folder / "in"), out=str(folder / "out"), jobs=1, quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def samples(shards):
    return [sample for path in sorted(shards.glob("*.tar")) for sample in read_tar(path)]


def test_webdataset_reads_them(shards, samples):
    """Keys, bytes and labels, in order, without a word of configuration."""
    webdataset = pytest.importorskip("webdataset")

    dataset = webdataset.WebDataset(f"{shards}/train-{{000..002}}.tar", shardshuffle=False)

    read = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in dataset]
    assert read == samples


def test_timm_reads_them(shards, samples):
    """Its wds reader with an explicit split, `train-{000..002}.tar|40`: every sample once."""
    factory = pytest.importorskip("timm.data.dataset_factory")

    dataset = factory.create_dataset(
        "wds/", root=str(shards), split="train-{000..002}.tar|40", is_training=False, batch_size=1
    )

    read = [(image.tobytes(), label) for image, label in dataset]
    assert len(dataset) == 40
    assert read == [(Image.open(io.BytesIO(data)).tobytes(), label) for _, data, label in samples]


def test_wids_reads_the_manifest(shards, samples, tmp_path):
    """Random access through train.json."""
    wids = pytest.importorskip("wids")

    dataset = wids.ShardListDataset(
        str(shards / "train.json"), cache_dir=str(tmp_path), transformations=[]
    )

    assert len(dataset) == 40
    for number in (0, 39, 17):
        sample = dataset[number]
        read = sample["__key__"], sample[".jpg"].read(), int(sample[".cls"].read())
        assert read == samples[number]


@pytest.mark.slow
def test_hugging_face_datasets_reads_them(shards, samples, tmp_path):
    """`load_dataset("webdataset", …)`."""
    datasets = pytest.importorskip("datasets")

    dataset = datasets.load_dataset(
        "webdataset",
        data_files={"train": str(shards / "train-*.tar")},
        split="train",
        cache_dir=str(tmp_path),
    )

    assert dataset["__key__"][:] == [key for key, _, _ in samples]
    assert dataset["cls"][:] == [label for _, _, label in samples]
    assert dataset[17]["jpg"].size == (24, 18)
