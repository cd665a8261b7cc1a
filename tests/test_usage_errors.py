"""What a user gets wrong is answered in one line, with exit code 2, and nothing is written."""

import re
import subprocess
import sys

import pytest
from conftest import write_parquet
from test_cli import call, train_args

from wds_convnext.conversion import convert


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--shards": "nowhere/train-<000..002>.tar"}, "there is no folder nowhere"),
        ({"--shards": "{shards}/train-<000..007>.tar"}, "train-003.tar"),
        ({"--shards": "{shards}/trian-*.tar"}, "Did you mean"),
        ({"--shards": "{other}"}, "holds no train split, but validation"),
        ({"--val-shards": "{other}/validation.json"}, "classes are not the"),
        ({"--model": "convnext_bsae"}, "Did you mean convnext_base"),
        ({"--batch-size": 7}, "must be even"),
        ({"--workers": 200}, "--workers 200: this machine has"),
        ({"--image-size": 8}, "--image-size 8: the model cannot take it"),
        ({"--init-from": "nothing.pt"}, "nothing.pt: no such file"),
        ({"--device": "gpu"}, "--device gpu: no such device"),
        ({"--amp": "fp16"}, "--amp fp16 needs CUDA"),
        ({"--recipe": "artcle"}, "Did you mean article"),
        ({"--config": "{config}"}, "no option is called 'epoch'. Did you mean epochs"),
        ({"--resume": "nothing"}, "nothing: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, shards, tmp_path, options, said):
    """What was found and what to do, on standard error; no folder is made."""
    write_parquet(tmp_path / "other", "validation", [4], classes=["emu", "fox", "gnu", "hen"])
    convert(str(tmp_path / "other"), out=str(tmp_path / "other"), jobs=1, quiet=True)
    (tmp_path / "config.toml").write_text("epoch = 5\n")
    places = {"shards": shards, "other": tmp_path / "other", "config": tmp_path / "config.toml"}
    options = {key: str(value).format(**places) for key, value in options.items()}

    code, out, err = call(capsys, *train_args(shards, tmp_path / "run", **options))

    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert re.fullmatch(r"(Training on .* Importing torch …\n)?", out)  # what came before it
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://b/x", "hf://datasets/x", "host:/x"])
@pytest.mark.parametrize(
    "args", [["train", "--out"], ["shards", "in", "--out"], ["inspect", "in", "--sheet"]]
)
def test_what_cannot_be_written_to_is_refused(capsys, tmp_path, monkeypatch, args, url):
    """A URL never becomes a folder of that name."""
    monkeypatch.chdir(tmp_path)

    code, _, err = call(capsys, *args, url)

    assert code == 2
    assert f"{args[-1]} {url}: expected a local path" in err
    assert list(tmp_path.iterdir()) == []


def test_shards_of_a_missing_source_are_one_line(capsys, tmp_path):
    code, _, err = call(capsys, "shards", tmp_path / "nothing", "--out", tmp_path / "out")

    assert code == 2
    assert "nothing: there is no such file or folder. Expected parquet files" in err
    assert not (tmp_path / "out").exists()


def test_train_without_shards_says_so(capsys, tmp_path):
    code, _, err = call(capsys, "train", "--out", tmp_path / "run")

    assert code == 2
    assert "--shards is missing" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--shards", "nowhere/*.tar"], "there is no folder nowhere"),
        (["train", "--shards", "a.tar", "--val-shards", "c.tar"], "c.tar: no shard matches"),
        (["train", "--shards", "a.tar", "--init-from", "w.pt"], "--init-from w.pt: no such file"),
        (["train", "--shards", "a.tar", "b.tar", "c.tar"], "b.tar, c.tar: 2 arguments too many"),
        (["train", "--shards", "a.tar", "--lr", "-1"], "--lr -1: expected a number > 0"),
        (["train", "--shards", "a.tar", "--model", "convnxt_base"], "mean convnext_base"),
        (["--foo"], "--foo: no such option. See "),
        (["train", "--shard", "a.tar"], "--shard: no such option. Did you mean --shards"),
        (["train", "--lr"], "Option '--lr' requires an argument. See "),
        (["inspect"], "Missing argument 'SHARDS'. See "),
        (["trian"], "trian: no such command. Did you mean train"),
        (["verify", "a.tar", "b.tar"], "quote it: 'data/train-{000..012}.tar'"),
        (["train", "--resume", "gone"], "--resume gone: no such file or folder"),
        (["train", "--resume"], "runs/: no run here"),
        (["eval", "gone"], "gone: no such file or folder"),
        (["eval", "a.tar", "--shards", "nowhere/*.tar"], "there is no folder nowhere"),
        (["explain", "gone", "--step", "0"], "gone: no such file or folder"),
    ],
)
def test_a_typo_is_answered_before_torch_is_imported(args, said, tmp_path):
    (tmp_path / "a.tar").touch()
    code = "import sys; sys.modules['torch'] = None; from wds_convnext.cli import main; main()"

    result = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True
    )

    assert result.returncode == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""
