"""A sample that does not decode never shifts the stream: replaced, counted, listed, limited."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RUN
from test_cli import call
from test_resume import assert_same

from wds_convnext.shards.sidecar import read_sidecar
from wds_convnext.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory):
    """The shards with one training image overwritten: shard 2, sample 5, key 000000027."""
    out = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(shards, out)
    overwrite_image(out / "train-002.tar", 5)
    return out


def overwrite_image(shard: Path, sample: int) -> None:
    """Write zeros over the image of a sample, in place."""
    members = read_sidecar(shard.with_suffix(".idx"))[sample]
    image = next(member for member in members if member.extension == "jpg")
    with shard.open("r+b") as tar:
        tar.seek(image.offset)
        tar.write(b"\0" * image.num_bytes)


def train(capsys, shards, out, *flags, **options):
    flat = [part for pair in (TINY_RUN | options).items() for part in pair]
    return call(capsys, "train", "--shards", shards / "train.json", "--out", out, *flags, *flat)


def test_a_bad_sample_is_replaced_and_listed_for_any_workers_and_resumes(capsys, damaged, tmp_path):
    """Once per epoch, with shard, key, offset and reason; weights do not depend on workers."""
    allowed = {"--max-bad-samples": 0.05}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train(capsys, damaged, straight, **allowed)[0] == 0
    for workers, steps in ((2, 4), (1, 11), (0, 1000)):
        options = allowed | {"--workers": workers, "--max-steps": steps}
        assert train(capsys, damaged, broken, "--resume", **options)[0] == 0

    lines = (straight / "bad_samples.jsonl").read_text()
    listed = [json.loads(line) for line in lines.splitlines()]
    assert [line["epoch"] for line in listed] == [0, 1, 2, 3]
    assert {line["key"] for line in listed} == {"000000027"}
    assert all(line["shard"].endswith("train-002.tar") and line["offset"] for line in listed)
    assert all(line["reason"] for line in listed)
    assert (broken / "bad_samples.jsonl").read_text() == lines
    one, two = (load_checkpoint(out / "last.pt") for out in (straight, broken))
    assert_same(one["model"], two["model"])
    assert_same(one["optimizer"], two["optimizer"])


def test_too_many_bad_samples_stop_the_run(capsys, damaged, tmp_path):
    """One of 50 is over the default's tenth of a percent: one line, exit code 2."""
    code, _, err = train(capsys, damaged, tmp_path / "run")

    assert code == 2
    assert "more than --max-bad-samples 0.001 of 50 allows" in err
    assert "train-002.tar, key 000000027" in err


def test_shards_can_be_checked_before_a_run(capsys, damaged, tmp_path):
    """--check-shards compares checksums: the damaged shard is named, and no folder is made."""
    code, _, err = train(capsys, damaged, tmp_path / "run", "--check-shards")

    assert code == 2
    assert "train-002.tar: its SHA-256 is" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def damaged_validation(shards, tmp_path):
    """The shards with one validation image overwritten: shard 1, sample 2, key 000000011."""
    out = tmp_path / "data"
    shutil.copytree(shards, out)
    overwrite_image(out / "validation-001.tar", 2)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_leaves_out_what_does_not_decode(capsys, damaged_validation, tmp_path, workers):
    """Named in the log and in bad_samples.jsonl, counted in n; `eval` takes it only if told to."""
    out = tmp_path / "run"
    code, output, _ = train(capsys, damaged_validation, out, **{"--workers": workers})
    listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    evaluation = ["eval", "--checkpoint", out, "--device", "cpu", "--workers", 0]
    strict = call(capsys, *evaluation)
    lenient = call(capsys, *evaluation, "--max-bad-samples", 0.1, "--json")

    assert code == 0
    num_validations = output.count("Validation: Loss")
    assert output.count("Left out of the validation, which is of 12 samples: ") == num_validations
    assert "validation-001.tar, key 000000011: " in output and "n = 12, " in output
    assert [line["key"] for line in listed] == num_validations * ["000000011"]
    assert strict[0] == 2 and "1 of 13 samples of the validation split do not decode" in strict[2]
    result = json.loads(lenient[1])
    assert result["num_samples"] == 12
    assert f"Final Model Accuracy: {result['top1']:.2%}" in output


def test_too_many_validation_images_that_do_not_decode_end_the_run(
    capsys, damaged_validation, tmp_path
):
    """One of 13, where none may: with last.pt saved, and the option that allows more."""
    code, _, err = train(
        capsys, damaged_validation, tmp_path / "run", **{"--max-bad-val-samples": 0}
    )

    assert code == 2
    assert "000000011" in err and "allow more with --max-bad-val-samples." in err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["owes_validation"]
