"""What predict says is what eval counts, whatever the images come in and is among them."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import CLASS_NAMES, encode_image, sample_members, write_tar
from PIL import Image

import wds_convnext as wc
from wds_convnext.cli import commands
from wds_convnext.config import EvalConfig
from wds_convnext.errors import DataError, UsageError, WdsConvnextError
from wds_convnext.training.compare import evaluate_checkpoint

NO_TEXT = os.fsdecode(b"\xff.jpg")  # a file may be called so
CPU = {"device": "cpu", "workers": 0, "quiet": True}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six good images in folders, three bad ones, and what is no image."""
    folder = tmp_path / "pictures"
    (folder / "b" / "inner").mkdir(parents=True)
    names = [
        "c.jpg",
        "a.PNG",
        "b/1.jpg",
        "b/2.webp",
        "b/inner/ü \n🐈.jpg",
        NO_TEXT,
    ]
    for seed, name in enumerate(names):
        kind = {"jpg": "JPEG", "PNG": "PNG", "webp": "WEBP"}[name.rsplit(".", 1)[1]]
        (folder / name).write_bytes(encode_image(seed, format=kind))
    (folder / "b" / "cut.jpg").write_bytes(encode_image(9)[:-200])
    (folder / "b" / "empty.jpg").touch()
    os.mkfifo(folder / "b" / "pipe.jpg")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(encode_image(10))
    (folder / "b" / "back").symlink_to(folder)
    return folder


def predict(run, images, out, **options) -> tuple[wc.predict, list[dict]]:
    report = wc.predict(str(run), list(map(str, images)), out=str(out), **CPU | options)
    return report, [json.loads(line) for line in out.read_text().splitlines()]


def test_predict_agrees_with_eval_to_the_sample(trained_run, shards, tmp_path):
    """As many right, of the same samples, from shards, files, bytes and a list on stdin."""
    spec = str(shards / "validation.json")
    dataset = wc.open_dataset(spec)
    config = EvalConfig(checkpoint=str(trained_run), shards=spec, device="cpu", workers=0)
    result, _ = evaluate_checkpoint(config)

    report, lines = predict(trained_run, [spec], tmp_path / "out.jsonl")

    best = [line["predictions"][0] for line in lines]
    right = sum(guess["class"] == line["label"] for guess, line in zip(best, lines))
    assert report.num_images == len(dataset) == result.num_samples
    assert right / len(lines) == result.top1
    assert 0 < right < len(lines) or len({guess["class"] for guess in best}) > 1
    losses = []
    for line, sample in zip(lines, dataset):
        assert line["label"] == dataset.class_names[sample.label]
        assert line["image"].endswith(sample.key)
        by_class = {guess["number"]: guess["probability"] for guess in line["predictions"]}
        losses.append(-torch.tensor(by_class[sample.label]).log())
    assert torch.stack(losses).mean() == pytest.approx(result.loss, abs=1e-5)
    classifier = wc.load_classifier(trained_run, device="cpu")
    found = classifier.predict([sample.image for sample in dataset], batch_size=160)
    assert [p.best.number for p in found] == [guess["number"] for guess in best]
    assert [p.best.probability for p in found] == pytest.approx(
        [guess["probability"] for guess in best], abs=1e-6
    )


def test_paths_bytes_and_pillows_images_are_alike(trained_run, pictures):
    """Also one image alone; the values cannot be changed."""
    path = pictures / "a.PNG"
    classifier = wc.load_classifier(str(trained_run), device="cpu")

    found = classifier.predict([path, str(path), path.read_bytes(), Image.open(path)], top=2)

    assert len({prediction.guesses for prediction in found}) == 1
    assert [len(p.guesses) for p in found] == [2] * 4
    assert found[0].image == str(path) and found[2].image == "2"
    assert classifier.predict(path)[0].best.class_name == found[0].best.class_name
    assert sum(g.probability for g in classifier.predict(path)[0].guesses) == pytest.approx(1)
    with pytest.raises(AttributeError):
        found[0].image = "other"


def test_in_python_a_bad_image_is_a_value_and_a_wrong_type_is_an_error(trained_run, pictures):
    classifier = wc.load_classifier(trained_run, device="cpu")

    good, bad, missing = classifier.predict([encode_image(1), b"no image", "none.jpg"])

    assert good.error is None and "not an image" in bad.error and "No such file" in missing.error
    with pytest.raises(DataError, match="none.jpg"):
        missing.best  # noqa: B018
    with pytest.raises(UsageError, match="a int is no image"):
        classifier.predict([3])
    assert classifier.predict([]) == []


@pytest.mark.parametrize("batch_size", [2, 160])
def test_bad_files_are_listed_and_the_others_predicted(trained_run, pictures, tmp_path, batch_size):
    """By name, those in folders after them; hidden ones left out, a folder within itself once."""
    report, lines = predict(trained_run, [pictures], tmp_path / "out.jsonl", batch_size=batch_size)

    names = [os.path.relpath(line["image"], pictures) for line in lines]
    assert names == [
        *("a.PNG", "c.jpg", NO_TEXT, "b/1.jpg", "b/2.webp", "b/cut.jpg", "b/empty.jpg"),
        *("b/pipe.jpg", "b/inner/ü \n🐈.jpg"),
    ]
    bad = {name for name, line in zip(names, lines) if "error" in line}
    assert bad == {"b/cut.jpg", "b/empty.jpg", "b/pipe.jpg"}
    assert (report.num_images, report.num_bad) == (9, 3)
    assert str(report).count("\n") == 3


def test_the_result_does_not_depend_on_workers(trained_run, pictures, shards, tmp_path):
    """The same bytes, for files and shards together."""
    named = [pictures, shards / "test.json"]
    predict(trained_run, named, tmp_path / "0.jsonl", batch_size=3)

    predict(trained_run, named, tmp_path / "2.jsonl", batch_size=3, workers=2)

    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_zip_a_list_and_a_folder_say_the_same(trained_run, pictures, tmp_path, monkeypatch):
    """Of a zip its images; of a list what it names, there or not, after line ends or NULs."""
    files = [pictures / "a.PNG", pictures / "b/1.jpg", pictures / "c.jpg"]
    with zipfile.ZipFile(tmp_path / "album.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(pictures))
        archive.writestr("read.me", "text")
        archive.writestr("bad.jpg", b"no image")
    _, expected = predict(trained_run, files, tmp_path / "files.jsonl")

    _, zipped = predict(trained_run, [tmp_path / "album.ZIP"], tmp_path / "zip.jsonl")
    listed = []
    for end in (b"\n", b"\r\n", b"\0"):
        text = end.join(map(os.fsencode, [*files, "none.jpg"]))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        listed.append(predict(trained_run, ["-"], tmp_path / "list.jsonl")[1])

    guesses = [line["predictions"] for line in expected]
    assert [line["predictions"] for line in zipped[:3]] == guesses
    assert zipped[0]["image"].endswith("album.ZIP/a.PNG") and "error" in zipped[3]
    for lines in listed:
        assert lines[:3] == expected and "No such file" in lines[3]["error"] and len(lines) == 4


def test_every_format_holds_the_same(trained_run, pictures, tmp_path):
    """CSV and parquet, with names that are no text, and the error in its own column."""
    _, lines = predict(trained_run, [pictures], tmp_path / "out.jsonl", top=2)

    for name in ("out.csv", "out.parquet"):
        wc.predict(str(trained_run), [str(pictures)], out=str(tmp_path / name), top=2, **CPU)

    with open(tmp_path / "out.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image"] for row in rows] == [line["image"] for line in lines]
    assert [row["image"] for row in table[:2]] == [line["image"] for line in lines[:2]]
    assert table[2]["image"].endswith("\\xff.jpg")
    for line, row, entry in zip(lines, rows, table, strict=True):
        guesses = line.get("predictions", [])
        assert (row["error"] or None) == entry["error"] == line.get("error")
        assert entry["classes"] == [guess["class"] for guess in guesses]
        if guesses:
            assert row["class_2"] == entry["classes"][1]
            assert float(row["probability_1"]) == guesses[0]["probability"]
            assert entry["probabilities"][0] == pytest.approx(guesses[0]["probability"])


def test_the_command_prints_a_table_and_says_by_its_exit_code_what_was_bad(trained_run, pictures):
    arguments = ["predict", str(trained_run), "--device", "cpu", "--workers", "0", "--top", "1"]

    good = CliRunner().invoke(commands, [*arguments, str(pictures / "c.jpg")])
    bad = CliRunner().invoke(commands, [*arguments, str(pictures / "b")])

    assert good.exit_code == 0 and bad.exit_code == 1
    (line,) = good.stdout.splitlines()
    assert line.startswith(str(pictures / "c.jpg")) and line.endswith(tuple(CLASS_NAMES))
    assert len(bad.stdout.splitlines()) == 9  # a name with a line end is one line, too
    assert "9 images, 3 of them could not be read." in bad.stderr


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (["none.jpg"], {}, "none.jpg: no such file"),
        (["none.zip"], {}, "none.zip: not a readable zip"),
        (["."], {}, "no image found"),
        (["none.json"], {}, "none.json"),
        ([__file__], {"out": "out.txt"}, "expected a file that ends in .csv, .jsonl, .parquet"),
        ([__file__], {"out": "none/out.csv"}, "none/out.csv: cannot be written"),
        ([__file__], {"top": 0}, "--top 0"),
    ],
)
def test_what_cannot_be_is_one_line(trained_run, tmp_path, monkeypatch, images, options, message):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(WdsConvnextError, match=message):
        wc.predict(str(trained_run), images, **CPU | options)

    assert os.listdir(tmp_path) == []


def test_nothing_is_half_written(trained_run, shards, tmp_path):
    """A damaged shard ends it; the file of before stays."""
    (tmp_path / "out.csv").write_text("before")
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "train-000.tar", sample_members(2))
    wc.index(str(tmp_path / "data"), jobs=1)
    content = bytearray(Path(path).read_bytes())
    header = content.index(b"0001.jpg")
    content[header : header + 512] = bytes(512)
    Path(path).write_bytes(content)

    with pytest.raises(WdsConvnextError, match="train-000.tar"):
        wc.predict(str(trained_run), [path], out=str(tmp_path / "out.csv"), **CPU)

    assert (tmp_path / "out.csv").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["data", "out.csv"]
