"""Each of the doctor's rules about data finds what it is about, and nothing where that is right."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import encode_image, write_tar
from PIL import Image

from wds_convnext.check import doctor as module
from wds_convnext.check.case import Case, Finding
from wds_convnext.check.doctor import Check
from wds_convnext.check.rules import DATA_RULES
from wds_convnext.config import DoctorConfig

SMALL = {"image_size": 8, "jobs": 1, "workers": 0, "epochs": 30, "warmup_epochs": 5, "lr": 0.001}


def encode(mode: str, size: tuple[int, int] = (12, 10), **options) -> bytes:
    """A JPEG of noise, another each time."""
    pixels = np.random.default_rng().integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def picture(number: int) -> bytes:
    return encode_image(number, size=(12, 10))


def write_split(folder: Path, split: str, samples: list[tuple[bytes, int]], num_shards=1) -> None:
    """Raw shards of (image, label)."""
    folder.mkdir(exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(samples)), num_shards)):
        members = []
        for i in part.tolist():
            image, label = samples[i]
            members += [(f"{split}{i}.jpg", image), (f"{split}{i}.cls", str(label).encode())]
        write_tar(folder / f"{split}-{shard:03d}.tar", members)


def plain(start: int, num: int = 8, num_classes: int = 2) -> list[tuple[bytes, int]]:
    return [(picture(i), i % num_classes) for i in range(start, start + num)]


def examine(folder: Path, **options) -> Case:
    config = DoctorConfig(shards=str(folder), **SMALL | {"batch_size": 2} | options)
    return module._examine(config, quiet=True)


def found(case: Case) -> dict[str, list[Finding]]:
    """By rule, what those that need no torch find."""
    checks = [Check.of(rule, case) for rule in DATA_RULES]
    return {check.rule: list(check.findings) for check in checks if check.findings}


def test_nothing_is_found_where_all_is_well(tmp_path):
    """By no rule; then each line is one of "ok"."""
    write_split(tmp_path, "train", plain(0))
    write_split(tmp_path, "val", plain(100))

    case = examine(tmp_path)

    assert found(case) == {}
    assert [split.name for split in case.splits] == ["train", "val"]
    assert all(len(Check.of(rule, case).lines()) == 1 for rule in DATA_RULES)


def test_images_in_two_splits_are_found(tmp_path):
    """By their bytes, under other keys; in a test split, too, which training does not open."""
    train = plain(0)
    write_split(tmp_path, "train", train)
    write_split(tmp_path, "val", [*plain(100), train[3], train[4]])
    write_split(tmp_path, "test", [*plain(200), train[5]])

    in_val, in_test = found(examine(tmp_path))["shared_images"]

    assert "Images of val that are in train, too: 2 of 10" in in_val.found
    assert "Images of test that are in train, too: 1 of 9" in in_test.found
    keys = [[(x["split"], x["key"]) for x in image] for image in in_test.samples]
    assert keys == [[("train", "train5"), ("test", "test8")]]


def test_images_twice_in_a_split_are_found_and_two_labels_of_one(tmp_path):
    """A repeated image is a duplicate; with another label it is a conflict as well."""
    train = plain(0)
    write_split(tmp_path, "train", [*train, train[0], (train[1][0], 0)], num_shards=2)

    findings = found(examine(tmp_path))

    (duplicates,), (conflict,) = findings["duplicates"], findings["label_conflicts"]
    assert duplicates.found.startswith("Repeated images in train: 2 of 10")
    assert conflict.found == "Images with two labels: 1, e.g. train9 is 0, train1 is 1."
    assert [x["shard"][-7:] for x in conflict.samples[0]] == ["001.tar", "000.tar"]


def test_an_image_of_many_samples_is_counted_whole_and_named_ten_times(tmp_path):
    """Such as a placeholder; a sample of it under another label is named as well."""
    same = picture(500)
    write_split(tmp_path, "train", [*plain(0), *[(same, 0)] * 30, (same, 1)])

    findings = found(examine(tmp_path))

    (duplicates,), (conflict,) = findings["duplicates"], findings["label_conflicts"]
    assert duplicates.found.startswith("Repeated images in train: 30 of 39")
    assert [len(image) for image in duplicates.samples] == [11]
    assert conflict.found.endswith("e.g. train8 is 0, train38 is 1.")


def test_images_that_cannot_be_used_are_counted_and_are_no_copies(tmp_path):
    """Empty ones are equal, but that is not what is wrong with them."""
    write_split(tmp_path, "train", [*plain(0), (b"", 0), (b"", 1)])

    findings = found(examine(tmp_path))

    assert list(findings) == ["unusable_images"]
    assert findings["unusable_images"][0].found == "Images that cannot be used: 2 (2 empty)."


def test_classes_that_a_split_lacks_are_named(tmp_path):
    """In the training split, where they cannot be learned, and in one for validation."""
    write_split(tmp_path, "train", plain(0, 9, num_classes=3))
    write_split(tmp_path, "val", plain(100, num_classes=2))

    (finding,) = found(examine(tmp_path))["missing_classes"]

    assert finding.found == "Classes without a sample in val: 1 of 3: 2."
    write_split(tmp_path, "train", [*plain(0), (picture(50), 3)])
    (first, second) = found(examine(tmp_path))["missing_classes"]
    assert first.found == "Classes without a sample in train: 1 of 4: 2."
    assert second.found == "Classes without a sample in val: 2 of 4: 2, 3."


@pytest.mark.parametrize(("num", "is_found"), [(9, False), (10, True)])
def test_a_class_ten_times_as_large_is_found(tmp_path, num, is_found):
    write_split(tmp_path, "train", [(picture(i), int(i == 0)) for i in range(num + 1)])

    assert ("class_imbalance" in found(examine(tmp_path))) == is_found


@pytest.mark.parametrize(("shuffle_buffer", "is_found"), [(1, True), (64, False)])
def test_a_buffer_that_does_not_mix_sorted_shards_is_found(tmp_path, shuffle_buffer, is_found):
    """A buffer of one reads lane by lane; one of all samples is uniform."""
    write_split(tmp_path, "train", [(picture(i), i // 8) for i in range(64)], num_shards=2)

    case = examine(tmp_path, shuffle_buffer=shuffle_buffer, batch_size=8)
    # One lane, as where shards are many; 32 lanes mix eight classes of eight samples anyway.
    case = replace(case, order=replace(case.order, num_lanes=1))

    assert ("label_mix" in found(case)) == is_found


@pytest.mark.parametrize(
    ("image_size", "said"),
    [(8, None), (10, None), (224, "Smaller than --image-size 224: 100%"), (64, "Smaller than")],
)
def test_images_smaller_than_the_models_are_found(tmp_path, image_size, said):
    write_split(tmp_path, "train", plain(0))

    findings = found(examine(tmp_path, image_size=image_size))

    assert findings == {} if said is None else said in findings["image_sizes"][0].found


def test_images_many_times_the_models_are_found(tmp_path):
    write_split(tmp_path, "train", [(encode("RGB", (48, 33)), i % 2) for i in range(4)])

    (finding,) = found(examine(tmp_path))["image_sizes"]

    assert finding.found.startswith("The median image has 33 px, more than four times")


def test_images_that_exif_turns_are_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_split(tmp_path, "train", [*plain(0), (encode("RGB", exif=exif), 0)])

    (finding,) = found(examine(tmp_path))["rotations"]

    assert finding.found == "Images that EXIF turns or mirrors: 1 of 9."


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (["RGB"] * 8, []),
        (["L"] * 8, []),
        (["RGB"] * 6 + ["L"] * 2, ["Gray images: 25%; the others have colors."]),
        (["RGB"] * 7 + ["CMYK"], ["Images in CMYK: 1 of 8."]),
    ],
)
def test_mixed_color_modes_are_found(tmp_path, modes, said):
    """CMYK in any number; gray where it is neither rare nor all."""
    write_split(tmp_path, "train", [(encode(mode), i % 2) for i, mode in enumerate(modes)])

    assert [f.found for f in found(examine(tmp_path)).get("color_modes", [])] == said


def test_shards_larger_than_memory_are_found(tmp_path):
    """By the sizes that their manifest states, so that a test needs no such disk."""
    write_split(tmp_path, "train", plain(0))
    case = examine(tmp_path)
    large = tuple(replace(shard, num_bytes=1 << 50) for shard in case.train.dataset.shards)
    train = replace(case.train, dataset=replace(case.train.dataset, shards=large))

    (finding,) = found(replace(case, splits=(train,)))["page_cache"]

    assert finding.found.startswith("The shards have 1,125,899.9 GB")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"lr": 4e-3}, "learning_rate"),
        ({"lr": 4e-3, "scale_lr": "linear"}, None),
        ({"lr": 4e-3, "batch_size": 4, "ranks": 4, "accumulate": 256}, None),
        ({"epochs": 10}, "warmup"),
        ({"epochs": 15}, None),
        ({"epochs": 3, "warmup_epochs": 0}, None),
    ],
)
def test_a_schedule_that_does_not_fit_is_found(tmp_path, options, rule):
    """A rate for another global batch, which ranks and accumulation make; a long warm-up."""
    write_split(tmp_path, "train", plain(0))

    assert list(found(examine(tmp_path, **options))) == ([rule] if rule else [])


def test_every_finding_fits_a_terminal(tmp_path):
    """Three lines of at most 80 columns, with the names of these files."""
    train = plain(0)
    bad = [(b"", 0), (encode("CMYK"), 0), (train[0][0], 1), *[(encode("L"), 0)] * 20]
    write_split(tmp_path, "train", [*train, *bad, (picture(50), 3)])
    write_split(tmp_path, "val", train[:3])

    case = examine(tmp_path, lr=4e-3, epochs=3, image_size=224)
    lines = [line for rule in DATA_RULES for line in Check.of(rule, case).lines()]

    assert len(found(case)) >= 9
    assert [line for line in lines if len(line) > 80] == []
